"""Kill a run again and again: what it ends with is, to the byte, what an undisturbed run ends with.

    python bench/kill.py --kills 100
    python bench/kill.py --processes 2 --kills 20   # weights on all processes, then sharded

Runs of two small stages are killed (SIGKILL), five times each, at moments drawn uniformly over the time that an
undisturbed run works, and started again until they end. That time is measured anew before each run, as other work may
make the machine slower or faster. Time that a new process needs to find its place, measured as a run with nothing to
do, is added to its moments, so that what is hit is work and not the start of a process. Processes are forked from one
that has imported everything.

At the end the tensors, the models' files and all identities must be those of the run that nobody killed, nothing that
a killed try left may be there, and all files must be readable as the umask says. Prints what was being made when the
kills came: `.NAME.part` is there from before a file's first byte until after it has got its name.

With `--processes N`, one process of each run is killed, at a moment drawn over the time of an undisturbed run, and
`--max-restarts` does the rest. A moment at which the process is not there is drawn again.
"""

import multiprocessing
import os
import random
import re
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import datasets  # noqa: E402, F401  (imported now and not in every process)
import matplotlib.figure  # noqa: E402, F401
import safetensors.numpy  # noqa: E402
import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

import cropi  # noqa: E402
import rollout  # noqa: E402
from rollout import TOY, digest, peek  # noqa: E402

SETTINGS = (
    *("project.halves=20", "project.k=64", "valid.samples=4", "test.samples=2", "rollout.batch_tokens=1500"),
    *("train.steps=12", "train.batch_prompts=16", "train.lr=1e-3", "train.save_every=0"),
)
SIZES = {"train": 60, "valid-rev": 12, "test-rev": 10}
PER_RUN = 5  # kills
UMASK = 0o027  # of the runs; not the usual one, so that its part in the files' modes is seen
LATE = "too late: the process had ended"
ABSENT = "the process was not there yet, or no more"
TRAINING, TEMPORARY = "inside training", "between a temporary file and its rename"


def make_world(folder: Path) -> None:
    for name, count in SIZES.items():
        lines = (TOY / f"{name}.jsonl").read_text().splitlines(keepends=True)[:count]
        (folder / f"{name}.jsonl").write_text("".join(lines))


def run(world: Path, out: Path, pictures: bool = True) -> None:
    """In a process of its own."""
    if not pictures:
        cropi.draw_curve = cropi.draw_selection = lambda *given: None
    torch.set_num_threads(1)  # what was forked has no threads, and rounding must not depend on their number
    os.umask(UMASK)
    quiet = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(quiet, stream)
    cropi.run(
        pool=str(world / "train.jsonl"),
        valid=[str(world / "valid-rev.jsonl")],
        test=[str(world / "test-rev.jsonl")],
        stages=2,
        frac=0.3,
        assignments=list(SETTINGS),
        refresh_every=1,
        out=out,
    )


def result(out: Path) -> dict[str, str]:
    """Of all that a run has made: digests of the tensors, as the library reads them, and of the models' other files,
    and the identities."""
    made = {}
    for path in sorted(out.rglob("*.safetensors")):
        tensors = safetensors.numpy.load_file(path)
        parts = [part for name, x in sorted(tensors.items()) for part in (f"{name} {x.dtype} {x.shape}", x.tobytes())]
        made[str(path.relative_to(out))] = digest(*parts)
        if path.parent.name != "model":
            made[f"{path.relative_to(out)}, identity"] = peek(path)["identity"]
    for path in sorted(out.rglob("model/*.json")):
        if path.name == "cropi.json":
            made[f"{path.relative_to(out)}, identity"] = peek(path.parent)["identity"]
        else:
            made[str(path.relative_to(out))] = digest(path.read_bytes())
    return made


def parts(out: Path) -> dict[tuple, Path]:
    """The `.NAME.part` that are there, told apart from those that another try has left in the same place."""
    return {(path, path.stat().st_ino, path.stat().st_ctime_ns): path for path in out.rglob(".*.part")}


def hit(out: Path, before: dict[tuple, Path]) -> tuple[str, set[str]]:
    """What was being made when the kill came, without its numbers, and which of the kinds that are counted it is.
    `before`: the temporary folders that were there already when the process started."""
    new, kinds = [path for key, path in parts(out).items() if key not in before], set()
    if any(any(path.iterdir()) for path in new):
        kinds.add(TEMPORARY)
    stages = [path for path in out.glob("stage-*") if (path / "selection.csv").exists()]
    if any(not (path / "model").exists() for path in stages):
        kinds.add(TRAINING)
    files = [path for path in out.rglob("[!.]*") if path.is_file() and ".part" not in str(path.relative_to(out))]
    if new:
        path = max(new, key=lambda path: path.stat().st_mtime_ns)
        phase, name = "making", path.relative_to(out).with_name(path.name[1 : -len(".part")])
    elif files:
        path = max(files, key=lambda path: path.stat().st_mtime_ns)
        phase, name = "after", path.relative_to(out)
        name = name.parent if name.parent.name == "model" else name
    else:
        return "before the first file", kinds
    name = re.sub(r"stage-\d+", "stage", re.sub(r"\d{5}(?=\.)", "#", str(name)))
    return f"{phase} {name}", kinds


def check(out: Path, expected: dict[str, str]) -> None:
    """A run that has ended.

    Raises:
        AssertionError: it is not as an undisturbed one.
    """
    found = result(out)
    assert found == expected, [name for name in expected | found if found.get(name) != expected.get(name)]
    left = [path for path in out.rglob(".*") if path.name not in (".lock", ".writer")]
    assert not left, left
    for path in out.rglob("[!.]*"):
        mode = (0o777 if path.is_dir() else 0o666) & ~UMASK
        assert stat.S_IMODE(path.stat().st_mode) == mode, (path, oct(path.stat().st_mode))


def survive(kills: int, seed: int) -> tuple[Counter, Counter]:
    """Counts of what was being made at each kill, and of the kinds of kills.

    Raises:
        AssertionError: a run that was killed ended with something else, or not at all.
    """
    context, rng, met, kinds = multiprocessing.get_context("fork"), random.Random(seed), Counter(), Counter()

    def start(out: Path, pictures: bool = True) -> multiprocessing.Process:
        process = context.Process(target=run, args=(world, out, pictures))
        process.start()
        return process

    def complete(out: Path, pictures: bool = True) -> float:
        clock, process = time.monotonic(), start(out, pictures)
        process.join()
        assert process.exitcode == 0, f"{out.name} ended with {process.exitcode} after {met.total()} kills"
        return time.monotonic() - clock

    with tempfile.TemporaryDirectory() as folder:
        world = Path(folder)
        make_world(world)
        complete(world / "warm")  # files of the library `datasets`, for one, are there afterwards
        expected = result(world / "warm")
        assert len(expected) > 50
        number = 0
        bar = tqdm(total=kills, desc="kills", unit="kill", disable=None)
        while met.total() < kills:
            working, idle = complete(world / f"whole-{number}"), complete(world / f"whole-{number}", pictures=False)
            check(world / f"whole-{number}", expected)
            out, at = world / f"run-{number}", 0.0
            number += 1
            for moment in sorted(rng.uniform(0, working) for _ in range(min(PER_RUN, kills - met.total()))):
                before = parts(out)
                process = start(out)
                process.join(moment - at + (idle if at else 0.0))
                at = moment
                if process.exitcode is None:
                    process.kill()
                    process.join()
                    artefact, of_kinds = hit(out, before)
                    met[artefact] += 1
                    kinds.update(of_kinds)
                else:
                    assert process.exitcode == 0, f"ended with {process.exitcode} after {met.total()} kills"
                    met[LATE] += 1
                bar.update()
            complete(out)
            check(out, expected)
            said = f"run {number}: the same as undisturbed ({working:.1f} s, with nothing to do {idle:.1f} s)"
            tqdm.write(f"{said}; {met.total()} moments so far")
    return met, kinds


def start_many(world: Path, out: Path, processes: int, shard: str) -> subprocess.Popen:
    """`cropi.py run`, by its launcher."""
    words = ["--train", world / "train.jsonl", "--valid", world / "valid-rev.jsonl", "--test", world / "test-rev.jsonl"]
    words += ["--stages", 2, "--frac", 0.3, "--refresh-every", 1, "--out", out]
    words += ["--processes", processes, "--max-restarts", 2]
    words += [word for setting in (*SETTINGS, f"train.shard_weights={shard}") for word in ("--set", setting)]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True, "umask": UMASK}
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, ROOT / "cropi.py", "run", *map(str, words)], env=environment, **quiet)


def kill_one(run: subprocess.Popen, rank: int) -> bool:
    """Kill one of the processes that a launcher has started; False if it is not there."""
    try:
        for pid in Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split():
            if f"RANK={rank}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                os.kill(int(pid), signal.SIGKILL)
                return True
    except (FileNotFoundError, ProcessLookupError):
        pass
    return False


def was_making(out: Path) -> str:
    """As `hit`; the other processes, and the new ones, may take files away while it looks."""
    while True:
        with suppress(FileNotFoundError):
            return hit(out, {})[0]


def survive_restarts(processes: int, kills: int, seed: int) -> None:
    """Raises:
    AssertionError: as `survive`.
    """
    rng = random.Random(seed)
    for shard in ("none", "full"):
        met = Counter()
        with tempfile.TemporaryDirectory() as folder:
            world = Path(folder)
            make_world(world)
            for whole in ("warm", "whole"):
                clock, run = time.monotonic(), start_many(world, world / whole, processes, shard)
                assert run.wait() == 0, run.stderr.read()
            working, expected = time.monotonic() - clock, result(world / "whole")
            assert len(expected) > 50
            while (found := met.total() - met[ABSENT]) < kills:
                out, rank, moment = world / f"run-{met.total()}", rng.randrange(processes), rng.uniform(0, working)
                clock, run = time.monotonic(), start_many(world, out, processes, shard)
                time.sleep(moment)
                what = was_making(out) if kill_one(run, rank) else ABSENT
                _, said = run.communicate()
                assert run.returncode == 0, (what, said)
                check(out, expected)
                met[what] += 1
                taken = time.monotonic() - clock
                print(f"{shard}: rank {rank} after {moment:.1f} s, {what}: the same, in {taken:.1f} s", flush=True)
        late = f"{met[ABSENT]} more moments found none"
        print(f"{shard}: {found} processes killed in runs of {working:.1f} s ({late}); all ended the same")


app = typer.Typer(**rollout.PLAIN)


@app.command(help=__doc__.splitlines()[0])
def main(
    kills: Annotated[int, typer.Option(min=1, help="In all.")] = 100,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    processes: Annotated[int, typer.Option(min=1, help="Of each run.")] = 1,
) -> None:
    if processes > 1:
        survive_restarts(processes, kills, seed)
        return
    met, kinds = survive(kills, seed)
    for name, count in met.most_common():
        print(f"{count:4d}  {name}")
    found = met.total() - met[LATE]
    print(f"{met.total()} moments: {found} found the process alive", end="")
    print("".join(f", {kinds[kind]} {kind}" for kind in (TRAINING, TEMPORARY)) + "; all runs ended the same")


if __name__ == "__main__":
    rollout.command_line(app)
