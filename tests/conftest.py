"""What the tests share: the toy model, a policy that has moved away from it, ragged trajectories, and our files."""

import copy
import importlib.util
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("OMP_NUM_THREADS", "1")  # `pytest -n auto` runs a test on each core; and forks need it

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import rollout  # noqa: E402
import train  # noqa: E402
from rollout import TOY, Trajectories, TransformersEngine, load_model, load_prompts, sample_trajectories  # noqa: E402

THREADS = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


def processes(count: int, *words: object) -> subprocess.CompletedProcess:
    """A command in so many processes, each of one thread."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    return subprocess.run([*launch, *map(str, words)], env=THREADS, capture_output=True, text=True, timeout=300)


def run_script(*words: object, home: Path = ROOT) -> subprocess.CompletedProcess:
    """`python SCRIPT ...` in a process of its own, in the project's folder or one with a copy of the scripts. It is
    a fork of this process, which has made the imports: they take longer than most commands. (CUDA forbids forks.)"""
    command = list(map(str, words))
    if torch.cuda.is_available():
        return subprocess.run([sys.executable, *command], cwd=home, capture_output=True, text=True)
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as error:
        fork = multiprocessing.get_context("fork").Process(target=_as_main, args=(command, home, output, error))
        fork.start()
        fork.join()
        said = [file.seek(0) or file.read() for file in (output, error)]
    return subprocess.CompletedProcess(command, fork.exitcode, *said)


def _as_main(command: list[str], home: Path, output, error) -> None:
    os.chdir(home)
    sys.argv, sys.stdout, sys.stderr = command, output, error
    if home != ROOT:  # the scripts there
        sys.path.insert(0, str(home))
        for name in ("rollout", "train", "project", "cropi"):
            del sys.modules[name]
    runpy.run_path(command[0], run_name="__main__")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("vllm") and not importlib.util.find_spec("vllm"):
        pytest.exit("vLLM is not installed: requirements-vllm.txt, or on a CPU what .ci/run installs", 2)


@pytest.fixture(scope="session")
def toy():
    """(model, tokenizer); not to be changed."""
    return load_model(TOY / "model")


@pytest.fixture(scope="session")
def moved(toy):
    """A policy π_θ ≠ β: the toy model with every weight disturbed by 5%."""
    torch.manual_seed(0)
    model = copy.deepcopy(toy[0])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * parameter.std() * torch.randn_like(parameter) if parameter.numel() > 1 else 0)
    return model


@pytest.fixture(scope="session", autouse=True)
def engines_end():
    """Before pytest closes the files that vLLM logs to."""
    yield
    rollout.close_engine()


TEMPERATURE = 1.3


def random_trajectories(
    shape: tuple[int, int], words: int, prompt: tuple[int, int], completion: tuple[int, int], logp: float
) -> Trajectories:
    """N prompts x K of random words; lengths from the ranges, log-probs around `logp`. Every second one is right."""
    random = np.random.default_rng(0)
    length = random.integers(*completion, shape).astype(np.int32)
    prompt_length = random.integers(*prompt, shape[0]).astype(np.int32)
    return Trajectories(
        prompt_index=np.arange(shape[0], dtype=np.int32),
        prompt_length=prompt_length,
        prompt_tokens=random.integers(2, words, prompt_length.sum()).astype(np.int32),
        length=length,
        tokens=random.integers(2, words, length.sum()).astype(np.int32),
        behavior_logps=random.normal(logp, 0.1, length.sum()).astype(np.float32),
        rewards=np.tile(np.array([1, 0] * (shape[1] // 2), np.float32), (shape[0], 1)),
        truncated=np.zeros_like(length, np.uint8),
    )


def sample(engine, tokenizer, rows, picked, seed, **options) -> Trajectories:
    """`sample_trajectories` for some rows, with the reward `exact`."""
    options = {"temperature": TEMPERATURE, "reward": "exact", "reward_seconds": 10.0} | options
    prompts = rollout.encode_prompts(tokenizer, rows)
    return sample_trajectories(engine, tokenizer, rows, prompts, picked, SimpleNamespace(**options), seed)


@pytest.fixture(scope="session")
def ragged(toy):
    """Trajectories of 40 prompts x 6: prompts and completions of many lengths, some cut off at 5 tokens."""
    rows = load_prompts(TOY / "train.jsonl")[:40]
    trajectories = sample(TransformersEngine(*toy), toy[1], rows, range(40), [3], samples=6, max_tokens=5)
    assert 0 < trajectories.truncated.mean() < 1
    assert len(set(trajectories.prompt_length.tolist())) > 1
    assert len(set(trajectories.length.flatten().tolist())) > 1
    assert 5 < len(trajectories.live()) < 40
    return trajectories


@pytest.fixture
def small_world(tmp_path):
    """Folder with 60 training prompts, two validation sets of 12 and two test sets of 10, for runs of seconds."""
    for name, count in {"train": 60, "valid-rev": 12, "valid-srt": 12, "test-rev": 10, "test-untargeted": 10}.items():
        lines = (TOY / f"{name}.jsonl").read_text().splitlines(keepends=True)[:count]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    return tmp_path


def every(trajectories: Trajectories) -> Iterable[tuple[int, int]]:
    """(n, i) of all N*K trajectories, in the order of the file."""
    return np.ndindex(trajectories.rewards.shape)


def sequence(trajectories: Trajectories, n: int, i: int) -> tuple[torch.Tensor, int, np.ndarray]:
    """Prompt and completion of trajectory i of prompt n as one row of ids, the prompt's length, and the completion's
    stored log-probs: by adding up lengths, without the offsets that the scripts use."""
    first = int(trajectories.prompt_length[:n].sum())
    prompt = trajectories.prompt_tokens[first : first + trajectories.prompt_length[n]]
    start = int(trajectories.length[:n].sum() + trajectories.length[n, :i].sum())
    span = slice(start, start + int(trajectories.length[n, i]))
    ids = np.concatenate([prompt, trajectories.tokens[span]]).astype(np.int64)
    return torch.from_numpy(ids), len(prompt), trajectories.behavior_logps[span]


def load_folder(folder: Path, kind: str) -> dict[str, np.ndarray]:
    """The tensors of a folder of shards, one shard after the other."""
    shards = [rollout.load(path, kind)[0] for path in rollout.shards(folder, kind)]
    return {name: np.concatenate([shard[name] for shard in shards]) for name in shards[0]}


def load_all(folder: Path) -> Trajectories:
    """The trajectories of a whole folder as one table."""
    return Trajectories(**load_folder(folder, "trajectories"))


def identities(folder: Path, pattern: str) -> dict[str, str]:
    """Of our files and model folders: equal where recipe and tensors are."""
    return {str(path.relative_to(folder)): rollout.peek(path)["identity"] for path in sorted(folder.glob(pattern))}


def save_selection(path: Path, data: str | Path, ranked: Iterable[int]) -> Path:
    """A selection file as select.py would write it for a baseline, with these prompts chosen."""
    recipe = rollout.make_recipe("selection", {}, {}, data=load_prompts(data).digest, model=None)
    rollout.save(path, {"ranked": np.array(list(ranked), np.int64)}, recipe, rollout.facts(0.0))
    return path


def save_descendant(folder: Path, model, tokenizer) -> Path:
    """A model folder as train.py would have written it after a stage that began with the toy model."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    about = rollout.facts(0.0, log=[], ancestors=[rollout.model_identity(TOY / "model")])
    train.write_record(folder, rollout.make_recipe("model", {}, {}), about)
    return folder
