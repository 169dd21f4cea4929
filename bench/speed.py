"""Speed of the default run and of scoring.

    python bench/speed.py            # about five minutes on two cores; writes docs/speed.json
    python bench/speed.py --no-run   # only scoring; writes nothing

Scoring a stage (`project.py` on the training pool, reading and writing its files included) is compared with a plain
forward + backward of the same trajectories in the same process, in alternating rounds: medians and their ratios. There
are two plain ones. "repeated" is how trainers usually lay trajectories out: every sequence with its prompt, padded, one
loss, `.backward()`. "shared" is `train.py`'s own pass, which computes a prompt once for its K completions.
"""

import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Annotated
from unittest import mock

import typer

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from peers import random_model  # noqa: E402

import project  # noqa: E402
import rollout  # noqa: E402
import train  # noqa: E402


def plain(model, trajectories: Path, layout: str, batch_tokens: int) -> None:
    """Forward + backward of all live trajectories, parameter gradients summed over everything."""
    model.zero_grad()
    for path in rollout.shards(trajectories, "trajectories"):
        stored, _ = rollout.load_trajectories(path)
        with mock.patch.object(train, "CACHE", batch_tokens):
            batches = [*train.micro_batches(stored, stored.live(), batch_tokens)]
        for pieces in batches:
            if layout == "repeated":  # a row for each completion, each with its prompt
                pieces = [(n, range(k, k + 1)) for n, ks in pieces for k in ks]
            batch = train.collate(stored, pieces, model.device)
            project.off_policy_objective(train.completion_logps(model, batch, 1.0)[0], batch, "token").backward()


def best_plain(model, trajectories: Path, layout: str) -> partial:
    """`plain` at the batch size that suits it best."""
    sizes = {n: partial(plain, model, trajectories, layout, n) for n in (1024, 1536, 2048, 4096, 8192)}
    rounds = [{n: timed(sizes[n]) for n in sizes} for _ in range(4)][1:]
    seconds = {n: statistics.median(each[n] for each in rounds) for n in sizes}
    print(f"plain, {layout}: batches of " + ", ".join(f"{n} tokens {seconds[n]:.2f} s" for n in sizes))
    return sizes[min(seconds, key=seconds.get)]


def timed(work, *args, **options) -> float:
    clock = time.perf_counter()
    work(*args, **options)
    return time.perf_counter() - clock


def scoring(rounds: int) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        trajectories, numbers = Path(folder) / "train", itertools.count()
        rollout.rollout(out=trajectories)
        shards = rollout.shards(trajectories, "trajectories")
        live = sum(rollout.peek(path)["facts"]["live"] for path in shards)
        model, _ = rollout.load_model(rollout.TOY / "model")

        def score() -> None:  # into a new folder each time: what is there is not made again
            project.project(trajectories=trajectories, out=Path(folder) / f"gradients-{next(numbers)}")

        ways = {"score": score}
        for layout in ("repeated", "shared"):
            ways[f"plain, {layout}"] = best_plain(model, trajectories, layout)
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for way in ways.values():  # warm up
            way()
        for _ in range(rounds):
            for name, way in ways.items():
                seconds[name].append(timed(way))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    ratio = {
        name: statistics.median(a / b for a, b in zip(seconds["score"], seconds[name], strict=True))
        for name in ways
        if name != "score"
    }
    for name, value in medians.items():
        print(f"{name:16s} {value:6.2f} s  {1e3 * value / live:5.2f} ms per live prompt")
    for name, value in ratio.items():
        print(f"score / {name}: {value:.2f}")
    return {"live_prompts": live, "rounds": rounds, "seconds": medians, "score_over": ratio}


def sampling(rounds: int, prompts: int = 64, samples: int = 8, max_tokens: int = 8) -> dict:
    """Our engine and `model.generate` on one batch, the prompts of a training step: completion tokens per second."""
    model, tokenizer = rollout.load_model(rollout.TOY / "model")
    texts = [row["prompt"] for row in rollout.load_prompts(rollout.TOY / "train.jsonl")[:prompts]]
    encoded = tokenizer(texts, add_special_tokens=False).input_ids
    engine = rollout.TransformersEngine(model, tokenizer)
    ids, mask = rollout.pad_left(encoded, model.device)
    options = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0, "num_return_sequences": samples}
    options |= {"max_new_tokens": max_tokens, "pad_token_id": tokenizer.pad_token_id}

    def ours() -> int:
        groups = engine.generate(
            encoded, range(prompts), samples=samples, max_tokens=max_tokens, temperature=1.0, seed=[0]
        )
        return sum(len(c.tokens) for group in groups for c in group)

    @torch.inference_mode()
    def theirs() -> int:
        new = model.generate(input_ids=ids, attention_mask=mask, **options)[:, ids.shape[1] :]
        return int((new != tokenizer.pad_token_id).sum())

    ours(), theirs()
    rates: dict[str, list[float]] = {"engine": [], "model.generate": []}
    for _ in range(rounds):
        for name, way in zip(rates, (ours, theirs), strict=True):
            clock = time.perf_counter()
            tokens = way()
            rates[name].append(tokens / (time.perf_counter() - clock))
    ratio = statistics.median(a / b for a, b in zip(*rates.values(), strict=True))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    for name, value in medians.items():
        print(f"{name:16s} {value:8,.0f} completion tokens per second")
    print(f"engine / model.generate: {ratio:.2f}")
    return {"tokens_per_second": medians, "engine_over_generate": ratio}


def sharing_heads(rounds: int, prompts: int = 8, samples: int = 8, max_tokens: int = 64) -> dict:
    """Sampling with transformers' attention, which copies keys and values for each head, against ours: seconds, from a
    random Qwen2 of 23 million parameters with eight heads on two of keys and values."""
    with tempfile.TemporaryDirectory() as folder:
        random_model(Path(folder), 6000, 512, 6)
        model, tokenizer = rollout.load_model(Path(folder))
    random, engine = np.random.default_rng(0), rollout.TransformersEngine(model, tokenizer)
    encoded = [random.integers(2, 6000, length).tolist() for length in random.integers(50, 150, prompts)]
    seconds: dict[str, list[float]] = {rollout.our_attention(): [], "sdpa": []}
    sizes = {"samples": samples, "max_tokens": max_tokens, "temperature": 1.0, "seed": [0]}
    for number in range(rounds + 1):
        for name, values in seconds.items():
            model.set_attn_implementation(name)
            spent = timed(engine.generate, encoded, range(prompts), **sizes)
            values += [spent] if number else []  # the first round warms up
    ours, theirs = seconds.values()
    ratio = statistics.median(b / a for a, b in zip(ours, theirs, strict=True))
    print(f"sampling with transformers' attention / ours, 23M parameters: {ratio:.2f}")
    return {"seconds": {name: statistics.median(values) for name, values in seconds.items()}, "sdpa_over_ours": ratio}


GUARDED = """
import json, os, sys, time

spent = {"flushing to disk": 0.0, "digests": 0.0}

def clocked(name, function):
    def called(*args):
        start = time.perf_counter()
        try:
            return function(*args)
        finally:
            spent[name] += time.perf_counter() - start
    return called

sys.path.insert(0, os.getcwd())
import pathlib, cropi, rollout
os.fsync = clocked("flushing to disk", os.fsync)
rollout.digest = clocked("digests", rollout.digest)
start = time.perf_counter()
cropi.run(out=pathlib.Path(sys.argv[1]))
print(json.dumps({"inside": time.perf_counter() - start, "spent": spent}))
"""


def whole_run() -> dict:
    """The default run, and in it what its files' safety costs: flushing them to disk, and hashing what is written and
    what is read."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", GUARDED, folder + "/run"]
        clock = time.perf_counter()
        ended = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
        seconds = time.perf_counter() - clock
        child = json.loads(ended.stdout.splitlines()[-1])
        report = json.loads((Path(folder) / "run" / "report.json").read_text())
    parts = {"start and imports": seconds - child["inside"]}
    for key in ("rollout", "scoring", "training", "evaluation"):
        part = "offline rollouts" if key == "rollout" else key
        parts[part] = sum(stage.get(f"seconds_{key}", 0.0) for stage in report["evaluations"])
    print(f"default run: {seconds:.0f} s; start and imports {parts['start and imports'] / seconds:.0%} of it")
    for part, value in parts.items():
        print(f"  {part:18s} {value:6.1f} s")
    for name, value in child["spent"].items():
        print(f"  of that, {name} {value:.2f} s, {value / seconds:.1%}")
    return {"seconds": seconds, "parts": parts, "safety": child["spent"]}


app = typer.Typer(**rollout.PLAIN)


@app.command(help=__doc__.splitlines()[0])
def measure(
    rounds: Annotated[int, typer.Option(min=1, help="Of each comparison, in turn.")] = 7,
    no_run: Annotated[bool, typer.Option("--no-run", help="Without the default run; writes nothing.")] = False,
) -> None:
    result = {"cores": os.cpu_count(), "torch": torch.__version__, "python": platform.python_version()}
    result["sampling"] = sampling(rounds)
    result["sharing_heads"] = sharing_heads(rounds)
    result["scoring"] = scoring(rounds)
    if not no_run:
        result["default_run"] = whole_run()
        (ROOT / "docs" / "speed.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    rollout.command_line(app)
