"""Kill a run again and again: what it ends with is, to the byte, what an undisturbed run ends with.

    python bench/kill.py --kills 100

A run of two small stages that saves after every batch and step is killed (SIGKILL) after random times and started
anew, until it ends; then the next one, until so many kills have been survived. Selections, models and optimizer states
must be those of a run that nobody killed. Prints what had been written last when the kills came. Processes are forked
from one that has imported everything, since importing takes longer than the run.
"""

import argparse
import collections
import multiprocessing
import os
import random
import re
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import datasets  # noqa: E402, F401  (imported now and not in every process)
import matplotlib.figure  # noqa: E402, F401
import torch  # noqa: E402

import cropi  # noqa: E402
from rollout import TOY, Source, digest  # noqa: E402

SETTINGS = (
    *("rollout.batch_tokens=1500", "project.batch_tokens=400", "project.halves=20", "project.k=64", "valid.samples=4"),
    *("test.samples=2", "train.steps=4", "train.batch_prompts=8", "train.lr=1e-3"),
)
SIZES = {"train": 60, "valid-rev": 12, "test-rev": 10}


def make_world(folder: Path) -> None:
    for name, count in SIZES.items():
        lines = (TOY / f"{name}.jsonl").read_text().splitlines(keepends=True)[:count]
        (folder / f"{name}.jsonl").write_text("".join(lines))


def run(world: Path, out: Path) -> None:
    """In a process of its own."""
    torch.set_num_threads(1)  # what was forked has no threads, and rounding must not depend on their number
    quiet = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(quiet, stream)
    cropi.run(
        pool=Source(world / "train.jsonl"),
        valid=[str(world / "valid-rev.jsonl")],
        test=[str(world / "test-rev.jsonl")],
        stages=2,
        frac=0.3,
        assignments=list(SETTINGS),
        save_every=0.0,
        refresh_every=1,
        out=out,
    )


def result(out: Path) -> dict[str, str]:
    """Digests of all that the next stage, or a person, would use."""
    files = [*out.glob("**/selection.*"), *out.glob("**/optimizer.safetensors"), *out.glob("**/rollouts/*.safetensors")]
    files += [*out.glob("**/model"), *out.glob("**/gradients-*"), *out.glob("**/test-*")]
    return {str(path.relative_to(out)): digest(path) for path in files}


def newest(out: Path) -> str:
    """What was written last: the kind of file, without its number and process."""
    files = [path for path in out.rglob("*") if path.is_file() and path.name != ".lock"]
    if not files:
        return "nothing yet"
    name = str(max(files, key=lambda path: path.stat().st_mtime_ns).relative_to(out))
    return re.sub(r"stage-\d+", "stage", re.sub(r"\.\d+(?=$|/)|\d{6}", "", name))


def survive(kills: int, seed: int) -> collections.Counter:
    """Counts of what was being written at each kill.

    Raises:
        AssertionError: a run that was killed ended with something else, or not at all.
    """
    context, rng, met = multiprocessing.get_context("fork"), random.Random(seed), collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        world = Path(folder)
        make_world(world)
        clock = time.monotonic()
        undisturbed = context.Process(target=run, args=(world, world / "whole"))
        undisturbed.start()
        undisturbed.join()
        assert undisturbed.exitcode == 0
        longest, expected = time.monotonic() - clock, result(world / "whole")
        assert len(expected) > 15
        number = 0
        while met.total() < kills:
            out, ended, number = world / f"run-{number}", False, number + 1
            while not ended:
                process = context.Process(target=run, args=(world, out))
                process.start()
                process.join(rng.uniform(0.1, 1.0) * longest / 2 if met.total() < kills else None)
                if ended := process.exitcode is not None:
                    assert process.exitcode == 0, f"ended with {process.exitcode} after {met.total()} kills"
                else:
                    process.kill()
                    process.join()
                    met[newest(out)] += 1
            found = result(out)
            assert found == expected, [name for name in expected if found.get(name) != expected[name]]
            print(f"run {number}: the same as undisturbed; {met.total()} kills survived", flush=True)
    return met


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    met = survive(arguments.kills, arguments.seed)
    for name, count in met.most_common():
        print(f"{count:4d}  {name}")
    print(f"{met.total()} kills survived")
