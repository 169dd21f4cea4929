"""What the tests share: the toy model, a policy that has moved away from it, and ragged trajectories."""

import copy
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import rollout  # noqa: E402
from rollout import TOY, TransformersEngine, load_model, load_prompts, sample_trajectories  # noqa: E402


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


@pytest.fixture(scope="session")
def ragged(toy):
    """Trajectories of 40 prompts x 6: prompts and completions of many lengths, some cut off at 5 tokens."""
    rows = load_prompts(TOY / "train.jsonl")[:40]
    engine = TransformersEngine(*toy)
    trajectories = sample_trajectories(
        engine,
        toy[1],
        rows,
        range(40),
        samples=6,
        max_tokens=5,
        temperature=TEMPERATURE,
        reward="exact",
        seed=[3],
    )
    assert 0 < trajectories.truncated.mean() < 1
    assert len(set(trajectories.prompt_length.tolist())) > 1
    assert len(set(trajectories.completion_length.tolist())) > 1
    assert 5 < len(trajectories.live_groups()) < 40
    return trajectories


@pytest.fixture
def small_world(tmp_path):
    """Folder with 60 training prompts, two validation sets of 12 and two test sets of 10, for runs of seconds."""
    for name, count in {"train": 60, "valid-rev": 12, "valid-srt": 12, "test-rev": 10, "test-untargeted": 10}.items():
        lines = (TOY / f"{name}.jsonl").read_text().splitlines(keepends=True)[:count]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    return tmp_path


def digests(folder: Path, pattern: str) -> dict[str, str]:
    return {str(path.relative_to(folder)): rollout.digest(path) for path in sorted(folder.glob(pattern))}
