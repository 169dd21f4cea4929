"""Training on many processes (`pytest -m dist`): the gradient, the course, failures."""

from __future__ import annotations

import copy
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import ROOT, THREADS, processes, random_trajectories, save_selection
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Qwen2Config, Qwen2ForCausalLM

import rollout
import train
from rollout import TOY

sys.path.insert(0, str(ROOT / "bench"))

import kill
import plan

pytestmark = pytest.mark.dist
# ---------------------------------------------------------------------------------------------------------------------
# The gradient. This file is also what the processes run.

CASES = [*itertools.product(("none", "full"), (False, True), (False, True), (False, True))]
PROMPTS, SAMPLES, WORDS = 8, 4, 50


def some_trajectories(dead: bool) -> rollout.Trajectories:
    """If `dead`, those of rank 1 of 2, and of ranks 1 and 3 of 4, have nothing to learn from."""
    made = random_trajectories((PROMPTS, SAMPLES), WORDS, (3, 12), (1, 9), -4)
    made.rewards[1::2] = 1 if dead else [1, 1, 1, 0]
    return made


def random_models(tied: bool, words: int = WORDS, width: int = 32, layers: int = 3) -> list[Qwen2ForCausalLM]:
    """A policy and an initial policy."""
    torch.manual_seed(0)
    shape = {"vocab_size": words, "hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": layers}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": tied}
    policy = Qwen2ForCausalLM(Qwen2Config(**shape, **heads, attn_implementation=rollout.our_attention())).eval()
    initial = copy.deepcopy(policy).requires_grad_(False)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.1 * parameter.std() * torch.randn_like(parameter) if parameter.dim() > 1 else 0)
    return [policy, initial]


def gradient(
    shard: str, checkpointing: bool, tied: bool, dead: bool, dtype: str = "float64"
) -> dict[str, torch.Tensor]:
    """That of one step, before it is clipped, in as many processes as there are."""
    models = random_models(tied)
    if dtype == "float64":
        models = [model.double() for model in models]
    step(models, shard, checkpointing, dead, dtype)
    return train.owned({name: parameter.grad for name, parameter in models[0].named_parameters()}, lambda i: 0)


def step(
    models: list[Qwen2ForCausalLM], shard: str, checkpointing: bool, dead: bool, dtype: str, steps: int = 1
) -> Live:
    """Training steps, and the memory of the last one."""
    if checkpointing:
        models[0].gradient_checkpointing_enable({"use_reentrant": False})
    options = {
        "temperature": 1.0,
        "clip": 0.2,
        "kl": 0.1,
        "entropy": 0.01,
        "batch_tokens": 60,
        "iterations": 1,
        "clip_high": None,
    }
    options |= {"max_grad_norm": 1e9, "dtype": "float32" if dtype == "float64" else dtype}
    o = SimpleNamespace(gradient_checkpointing=checkpointing, shard_weights=shard, **options)
    precision = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    cut = train.too_large(models[0], o)
    roots = [train.shard_weights(model, precision) if cut else train.LogProbs(model) for model in models]
    adamw = torch.optim.AdamW(models[0].parameters(), lr=1e-4, fused=True)
    train.make_gradients(roots[0])
    trajectories = some_trajectories(dead).take(np.arange(rollout.RANK, PROMPTS, rollout.WORLD))
    for _ in range(steps):
        live = Live(x for m in models for p in m.parameters() for x in (p.data, p.grad, *adamw.state[p].values()))
        with live, train.gathered(roots[0]):
            pass
        live.sampling, live.peak = live.peak, 0
        with live:
            train.update(*roots, adamw, trajectories, o, range(PROMPTS))
    return live


class Live(TorchDispatchMode):
    """The bytes of all tensors that are alive at a time, at most: of those given, and of what is made meanwhile."""

    def __init__(self, tensors: Iterable[torch.Tensor | None]):
        super().__init__()
        self.storages, self.peak = {}, 0
        self.see(list(tensors))

    def see(self, values: object) -> None:
        for x in tree_leaves(values):
            x = x.to_local() if isinstance(x, DTensor) else x
            if torch.is_tensor(x):
                storage = x.untyped_storage()
                self.storages.setdefault(storage._cdata, StorageWeakRef(storage))
        alive = {key: torch.UntypedStorage._new_with_weak_ptr(weak.cdata) for key, weak in self.storages.items()}
        alive = {key: storage for key, storage in alive.items() if storage is not None}  # gloo's threads free some, too
        self.storages = {key: self.storages[key] for key in alive}
        self.peak = max(self.peak, sum(storage.nbytes() for storage in alive.values()))  # FSDP resizes them

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        self.see([args, kwargs, made])
        return made


def memory(out: Path) -> None:
    """Bytes at their peak while a process has all weights, and in an update."""
    found = {}
    for shard, tied, dtype in itertools.product(("none", "full"), (False, True), ("float32", "bfloat16")):
        models = random_models(tied, *SIZE)
        live = step(models, shard, False, False, dtype, steps=2)
        found[json.dumps([shard, tied, dtype])] = torch.tensor([live.sampling, live.peak])
    if rollout.RANK == 0:
        safetensors.torch.save_file(found, out)


def work(out: Path, dtype: str) -> None:
    rollout.gather()
    if dtype == "memory":
        return memory(out)
    found = {}
    for shard, *others in CASES if dtype == "float64" else [("full", False, True, False)]:
        case = gradient(shard, *others, dtype)
        found |= {json.dumps([shard, *others, name]): torch.from_numpy(values) for name, values in case.items()}
    if rollout.RANK == 0:
        safetensors.torch.save_file(found, out)
    rollout.gather()


def gradients(tmp_path: Path, count: int, dtype: str) -> dict[str, torch.Tensor]:
    out = tmp_path / f"{count}-{dtype}.safetensors"
    done = processes(count, __file__, out, dtype)
    assert done.returncode == 0, done.stderr
    return safetensors.torch.load_file(out)


def test_the_sum_over_processes_is_the_gradient_of_one(tmp_path):
    """Float64; replicated or sharded, with gradient checkpointing, tied, and with processes whose share is dead."""
    alone = gradients(tmp_path, 1, "float64")
    for case in {tuple(json.loads(key)[:-1]) for key in alone}:
        assert any(values.abs().max() > 1e-3 for key, values in alone.items() if tuple(json.loads(key)[:-1]) == case)
    for count in (2, 4):
        together = gradients(tmp_path, count, "float64")
        assert together.keys() == alone.keys()
        for case in CASES:
            keys = [key for key in alone if tuple(json.loads(key)[:-1]) == case]
            ours, theirs = (torch.cat([found[key].flatten() for key in keys]) for found in (together, alone))
            assert ours.dtype == torch.float64 and (ours - theirs).norm() < 1e-10 * theirs.norm(), (count, case)


def test_sharded_weights_in_bfloat16(tmp_path):
    """With autocast in place of FSDP's own precision the gradients would be wrong, without a word."""
    exact, rounded = gradients(tmp_path, 2, "float32"), gradients(tmp_path, 2, "bfloat16")
    exact, rounded = (torch.cat([x.flatten() for x in found.values()]) for found in (exact, rounded))
    assert 1 - torch.cosine_similarity(exact, rounded, 0) < 5e-3
    assert not torch.equal(exact, rounded)


SIZE = 3000, 256, 6  # words, width, layers: activations are small beside that


def test_the_plan_of_memory_is_what_fsdp_allocates(tmp_path):
    found = gradients(tmp_path, 2, "memory")
    assert len(found) == 8
    for case, most in found.items():
        shard, tied, dtype = json.loads(case)
        costs = plan.Costs(random_models(tied, *SIZE)[0])
        planned = plan.held(costs, 20, dtype == "bfloat16", 2)[shard]
        batch = 60 * (costs.activations + 20 * SIZE[0])
        expected = [planned["sampling"], planned["updates"] + batch]
        assert most.tolist() == pytest.approx(expected, rel=0.15), case


# ---------------------------------------------------------------------------------------------------------------------
# The course of a stage


@pytest.fixture
def world(tmp_path):
    save_selection(tmp_path / "s.safetensors", TOY / "train.jsonl", range(40))
    return tmp_path


def trained(world: Path, out: str, count: int, *words: object, steps: int = 10) -> dict[str, torch.Tensor]:
    """Weights and moments after ten steps on so many processes."""
    given = ["--selection", world / "s.safetensors", "--out", world / out, "--steps", steps, "--batch-prompts", 16]
    done = processes(count, ROOT / "train.py", *given, "--lr", "1e-3", *words)
    assert done.returncode == 0, done.stderr
    assert (world / out / "model/model.safetensors").exists() and not list((world / out).rglob("*.part"))
    tensors = safetensors.torch.load_file(world / out / "model/model.safetensors")
    for path in rollout.shards(world / out / "optimizer", "optimizer"):
        tensors |= {name: torch.from_numpy(x) for name, x in rollout.load(path, "optimizer")[0].items()}
    return tensors


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], ending: str = "weight") -> float:
    """The norm of the difference. Biases are left out: those of keys have gradients of rounding alone."""
    assert a.keys() <= b.keys()
    return sum(float((a[name] - b[name]).square().sum()) for name in a if name.endswith(ending)) ** 0.5


def test_the_number_of_processes_changes_rounding_alone(world):
    """Ten steps: weights differ by no more than smaller batches on one process make them differ."""
    alone = trained(world, "alone", 1)
    moved = distance(safetensors.torch.load_file(TOY / "model/model.safetensors"), alone)
    halved = max(distance(alone, trained(world, f"{n}", 1, "--batch-tokens", n)) for n in (512, 256))  # else 1024
    assert 0 < halved < 1e-3 * moved
    for count, shard in ((2, "none"), (2, "full"), (3, "full")):
        out = f"{shard}-{count}"
        found = trained(world, out, count, "--shard-weights", shard)
        assert distance(alone, found) < 1.5 * halved, (count, shard)  # 0.34, 0.45, 0.78 where this was written
        files = sorted((world / out / "optimizer").iterdir())
        sizes = [len(rollout.load(path, "optimizer")[0]) for path in files]
        assert len(files) == count and max(sizes) - min(sizes) <= 1  # each writes its own tensors
        log = rollout.peek(world / out / "model")["facts"]["log"]
        ours = rollout.peek(world / "alone/model")["facts"]["log"]
        for name in ("reward", "prompts", "live_prompts", "trajectories", "completion_tokens", "truncated"):
            assert log[0][name] == pytest.approx(ours[0][name]), name
        for name in ("objective", "kl", "entropy", "grad_norm"):
            assert log[0][name] == pytest.approx(ours[0][name], rel=1e-4, abs=1e-8), name
        assert log[0]["imbalance"] >= 1 and ours[0]["imbalance"] == 1


STOPPED = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import rollout, train

def stop(log, warn=train.warn_of_collapse):
    warn(log)
    if len(log) == 6:
        sys.exit(3)

train.warn_of_collapse = stop
rollout.command_line(train.app)
"""


def test_dynamic_sampling_on_many_processes(world):
    """The same draws, batches and token means: of 33 prompts, 16 a draw, so the third has one, for one process."""
    save_selection(world / "s.safetensors", TOY / "train.jsonl", range(33))
    words = ["--loss", "dapo", "--clip-high", 0.28, "--mask-truncated", "--dynamic-sampling", "--max-tokens", 4]
    words += ["--temperature", 0.5]
    logs = {}
    for count, shard in ((1, "none"), (2, "none"), (3, "full")):
        out = f"{count}"
        trained(world, out, count, *words, "--shard-weights", shard, steps=3)
        logs[count] = rollout.peek(world / out / "model")["facts"]["log"]
    assert any(line["trajectories"] == 33 * 8 for line in logs[1])  # all three draws
    assert 0 < logs[1][0]["truncated"] < 1
    same = ("prompts", "trajectories", "live_prompts", "all_right", "all_wrong", "completion_tokens", "length_max")
    for count in (2, 3):
        for ours, theirs in zip(logs[count], logs[1], strict=True):
            assert [ours[name] for name in same] == [theirs[name] for name in same]
            for name in ("objective", "grad_norm", "entropy", "reward_std", "length_right", "length_wrong"):
                assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-6), (count, name)


@pytest.mark.parametrize("shard", ["none", "full"])
def test_another_number_of_processes_goes_on(world, shard):
    """From 2 processes to 1 and to 4, in the middle of a stage, and from one stage to the next."""
    whole = trained(world, "whole", 2, "--shard-weights", shard)
    given = ["--selection", world / "s.safetensors", "--steps", 10, "--batch-prompts", 16, "--lr", "1e-3"]
    given += ["--shard-weights", shard, "--save-every", 0]
    (world / "stopped.py").write_text(STOPPED)
    assert processes(2, world / "stopped.py", *given, "--out", world / "part").returncode != 0
    assert [len(list(saved.iterdir())) for saved in (world / "part/checkpoint").iterdir()] == [2]
    for count in (1, 4, 2):
        shutil.copytree(world / "part", world / f"on-{count}")
        found = trained(world, f"on-{count}", count, "--shard-weights", shard, "--save-every", 0)
        if count == 2:  # to the byte
            assert all(torch.equal(found[name], whole[name]) for name in whole)
        assert distance(found, whole) < 2e-5, count
        assert not (world / f"on-{count}/checkpoint").exists()
    state = ["--model", world / "on-4/model", "--initial-model", TOY / "model", "--optimizer", world / "on-4/optimizer"]
    after = [trained(world, f"next-{count}", count, *state, steps=2) for count in (1, 2)]
    assert distance(*after) < 2e-5 and distance(*after, "exp_avg") < 1e-4


# ---------------------------------------------------------------------------------------------------------------------
# Failures


def cropi(world: Path, *words: object) -> list[str]:
    settings = ["project.k=64", "valid.samples=4", "test.samples=2", "train.steps=3", "train.batch_prompts=8"]
    sets = ["--train", world / "train.jsonl", "--valid", world / "valid-rev.jsonl", "--test", world / "test-rev.jsonl"]
    sets += ["--frac", 0.3, "--stages", 2, "--out", world / "run", *(w for text in settings for w in ("--set", text))]
    return [str(word) for word in (sys.executable, ROOT / "cropi.py", "run", *sets, *words)]


def start(world: Path, *words: object) -> subprocess.Popen:
    """`cropi.py run` with two processes, in a group of their own."""
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    command = cropi(world, "--processes", 2, "--save-every", 0, "--set", "train.steps=15", *words)
    return subprocess.Popen(command, env=THREADS, start_new_session=True, **pipes)


def wait_for(run: subprocess.Popen, path: Path) -> None:
    while not path.exists():
        assert run.poll() is None, run.stderr.read()
        time.sleep(0.01)


def ended(run: subprocess.Popen) -> tuple[int, list[str]]:
    """Exit code, and what was said on stderr. A minute is allowed."""
    _, said = run.communicate(timeout=60)
    return run.returncode, said.splitlines()


@pytest.mark.parametrize("shard", ["none", "full"])
def test_processes_that_are_killed_are_started_again(small_world, shard):
    """`--max-restarts` goes on, and ends with what an undisturbed run ends with, to the byte."""
    words = ["--set", f"train.shard_weights={shard}"]
    assert ended(start(small_world, *words))[0] == 0
    expected = kill.result(small_world / "run")
    (small_world / "run").rename(small_world / "undisturbed")
    run = start(small_world, *words, "--max-restarts", 2)
    for rank, moment in enumerate(("stage-01/checkpoint", "stage-02/gradients-train")):
        wait_for(run, small_world / "run" / moment)
        kill.kill_one(run, rank)
    code, said = ended(run)
    assert code == 0, said
    assert kill.result(small_world / "run") == expected
    assert not [path for path in (small_world / "run").rglob(".*") if path.name not in (".lock", ".writer")]


def test_one_process_that_fails_ends_all(small_world):
    """Within a minute, with one line, which comes last."""
    (small_world / "bad.py").write_text(
        "import os\ndef reward(completions, **columns):\n"
        "    return ['x'] if os.environ['RANK'] == '1' else [float(len(completions[0]) % 2)]\n"
    )
    code, said = ended(start(small_world, "--set", f"train.reward={small_world}/bad.py:reward"))
    line = f"error: step 0: reward '{small_world}/bad.py:reward' returned ['x'] for one completion, not a list"
    assert code == 2 and said[-1].startswith(line) and "\n".join(said).count("error: ") == 1, said
    shutil.rmtree(small_world / "run")
    run = start(small_world)
    wait_for(run, small_world / "run/stage-01/checkpoint")
    kill.kill_one(run, 1)
    code, said = ended(run)
    assert code == 1 and said[-1].startswith("process 1 ended (Signal 9 (SIGKILL)"), said
    run = start(small_world)
    wait_for(run, small_world / "run/stage-02/checkpoint")
    os.killpg(run.pid, signal.SIGINT)
    code, said = ended(run)
    assert code == 130 and said[-1].startswith("interrupted; the same command resumes: python"), said
    assert "\n".join(said).count("interrupted") == 1 and "Traceback" not in "\n".join(said), said
    assert ended(start(small_world))[0] == 0


def test_bad_input_is_one_line_for_all_processes(small_world):
    code, said = ended(start(small_world, "--frac", 0))
    assert code == 2 and len(said) == 1 and said[0].startswith("error: Invalid value for '--frac'"), said
    code, said = ended(start(small_world, "--train", small_world / "no.jsonl"))
    assert code == 2 and len(said) == 1 and "no.jsonl" in said[0], said


def test_more_processes_than_prompts_are_refused(tmp_path):
    save_selection(tmp_path / "s.safetensors", TOY / "train.jsonl", range(1))
    done = processes(2, ROOT / "train.py", "--selection", tmp_path / "s.safetensors", "--out", tmp_path / "o")
    assert done.returncode != 0 and "1 prompts a step for 2 processes; start 1 or fewer" in done.stderr
    assert not (tmp_path / "o").exists()


if __name__ == "__main__":
    work(Path(sys.argv[1]), sys.argv[2])
    sys.exit()
