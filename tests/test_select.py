"""Ranking against brute force, and the name that the standard library has too."""

import csv
import doctest
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

import cropi
import project
import rollout
from rollout import load_prompts, open_tensors

select = cropi.select  # the stage; by its name Python may know another module


@pytest.fixture
def scored(small_world):
    world = small_world
    for name, samples in {"train": 8, "valid-rev": 16, "valid-srt": 16}.items():
        rollout.rollout(out=world / f"{name}.safetensors", data=world / f"{name}.jsonl", samples=samples)
        project.project(trajectories=world / f"{name}.safetensors", out=world / f"gradients-{name}.safetensors", k=256)
    return world


def run_select(world, **options):
    out = world / "selection.safetensors"
    sources = {"data": world / "train.jsonl", "trajectories": world / "train.safetensors"}
    if options.get("method", "influence") == "influence":
        sources["gradients"] = world / "gradients-train.safetensors"
        sources["valid_gradients"] = [world / f"gradients-valid-{name}.safetensors" for name in ("rev", "srt")]
    select.select(out=out, **sources, **options)
    tensors, metadata = open_tensors(out, "selection")
    return {name: np.array(values) for name, values in tensors.items()}, metadata


def test_influence_equals_brute_force(scored):
    found, metadata = run_select(scored, frac=0.1)
    train, _ = open_tensors(scored / "gradients-train.safetensors", "gradients")
    valid = [open_tensors(scored / f"gradients-valid-{name}.safetensors", "gradients")[0] for name in ("rev", "srt")]
    cosine, fused = {}, {}
    for g, i in zip(train["sketch"].astype(float), train["prompt_index"].tolist(), strict=True):
        means = [v["sketch"].astype(float).mean(0) for v in valid]
        cosine[i] = [float(g @ v / np.sqrt((g @ g) * (v @ v))) for v in means]
    for i in cosine:
        ranks = [1 + sum(cosine[j][s] > cosine[i][s] for j in cosine) for s in range(2)]
        fused[i] = sum(1 / rank for rank in ranks if rank <= 6)  # N = 0.1 · 60
    expected = sorted(fused, key=lambda i: (-fused[i], -sum(cosine[i]), i))[:6]
    assert found["ranked"].tolist() == expected
    np.testing.assert_allclose(found["score"], [fused[i] for i in expected])
    np.testing.assert_allclose(found["score_by_set"], [cosine[i] for i in expected], rtol=1e-6)
    assert metadata["options"]["sets"] == ["rev", "srt"]


def test_fusion_by_hand():
    # set A ranks x0 x1 x2 x3, set B ranks x2 x0 x3 x1; N = 2: x0 = 1 + 1/2, x1 = 1/2, x2 = 1, x3 = 0
    scores = np.array([[0.9, 0.5], [0.8, 0.1], [0.7, 0.6], [0.6, 0.2]])
    ranks = select.ranks(scores)
    assert ranks.tolist() == [[1, 2], [2, 4], [3, 1], [4, 3]]
    assert select.reciprocal_rank_fusion(ranks, 2).tolist() == [1.5, 0.5, 1.0, 0.0]


def test_cosine_by_hand():
    sketch = np.array([[3.0, 4.0], [0.0, 0.0]], np.float32)
    np.testing.assert_allclose(select.cosines(sketch, np.array([[1.0, 0.0], [0.0, 2.0]])), [[0.6, 0.8], [0.0, 0.0]])
    np.testing.assert_allclose(select.mean_sketch(sketch), [1.5, 2.0])


def test_large_files_are_read_in_blocks(monkeypatch):
    sketch = np.random.default_rng(0).normal(size=(50, 8)).astype(np.float32)
    directions = np.random.default_rng(1).normal(size=(3, 8))
    whole, mean = select.cosines(sketch, directions), select.mean_sketch(sketch)
    monkeypatch.setattr(select, "ROWS", 7)
    np.testing.assert_allclose(select.cosines(sketch, directions), whole)
    np.testing.assert_allclose(select.mean_sketch(sketch), mean)


def test_dead_prompts_are_never_chosen_by_influence(scored):
    found, _ = run_select(scored, frac=1.0)
    live = rollout.open_trajectories(scored / "train.safetensors").live_groups()
    assert sorted(found["ranked"].tolist()) == sorted(live)
    assert len(live) < 60


def test_baselines(scored):
    rates = rollout.open_trajectories(scored / "train.safetensors").pass_rates()
    full, _ = run_select(scored, method="full")
    assert sorted(full["ranked"].tolist()) == list(range(60))
    random, _ = run_select(scored, method="random", frac=0.5, seed=1)
    other, _ = run_select(scored, method="random", frac=0.5, seed=2)
    assert len(set(random["ranked"].tolist())) == 30
    assert random["ranked"].tolist() != other["ranked"].tolist()
    nearest, _ = run_select(scored, method="pass-rate", frac=0.2)
    assert len(nearest["ranked"]) == 12
    rest = set(range(60)) - set(nearest["ranked"].tolist())
    assert max(abs(rates[i] - 0.5) for i in nearest["ranked"].tolist()) <= min(abs(rates[i] - 0.5) for i in rest)
    learnable, _ = run_select(scored, method="learnability", frac=0.2)
    np.testing.assert_allclose(learnable["score"], [rates[i] * (1 - rates[i]) for i in learnable["ranked"].tolist()])
    assert sorted(learnable["score"], reverse=True) == learnable["score"].tolist()
    rest = set(range(60)) - set(learnable["ranked"].tolist())
    assert learnable["score"].min() >= max(rates[i] * (1 - rates[i]) for i in rest) - 1e-6


def test_equal_pass_rates_are_ordered_at_random():
    rates = np.array([1 / 3, 2 / 3] * 50, np.float32)  # equally near to 1/2, up to rounding
    ranked = select.by_baseline("pass-rate", rates, seed=0)["ranked"]
    assert 10 < sum(i % 2 for i in ranked[:50].tolist()) < 40


def test_worked_examples_of_the_docstrings():
    results = doctest.testmod(select)
    assert results.attempted >= 2 and results.failed == 0


def test_csv_says_the_same_to_people(scored):
    found, _ = run_select(scored, frac=0.1)
    rows = load_prompts(scored / "train.jsonl")
    with open(scored / "selection.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    chosen = [line for line in lines if line["chosen"] == "1"]
    assert [int(line["prompt_index"]) for line in chosen] == found["ranked"].tolist()
    assert all(line["prompt"] == rows[int(line["prompt_index"])]["prompt"] for line in lines)
    assert [float(line["score"]) for line in chosen] == pytest.approx(found["score"].tolist(), abs=1e-5)
    assert [int(line["rank_rev"]) for line in chosen] == found["rank_by_set"][:, 0].tolist()


# ---------------------------------------------------------------------------------------------------------------------
# `import select` from the project's folder must find the standard library's


def interpreters() -> list[str]:
    """This interpreter and others on the machine, so that both kinds are met: `select` shared, and built in."""
    names = [f"/usr/bin/python3.{minor}" for minor in range(11, 20)]
    names += map(str, Path.home().glob(".pyenv/versions/3.1[1-9].*/bin/python"))
    return [sys.executable, *(name for name in names if os.path.exists(name))]


SPAWN = """
import multiprocessing, select
def child(queue):
    import select
    select.poll()
    queue.put("child")
if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=child, args=(queue,))
    process.start()
    print(queue.get(timeout=60))
    process.join()
"""


@pytest.mark.parametrize("python", interpreters())
def test_the_standard_librarys_select_is_found(python, tmp_path):
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}

    def run(*words, **options):
        return subprocess.run(
            [python, *words], cwd=ROOT, env=env, capture_output=True, text=True, timeout=100, **options
        )

    plain = run("-c", "import subprocess, select, sys; select.poll(); print(sys.modules['select'] is select)")
    assert plain.stdout.split() == ["True"], plain.stderr
    shutil.copy(ROOT / "select.py", tmp_path)  # a spawned child has the script's folder on its path, so ours beside it
    (tmp_path / "spawn.py").write_text(SPAWN)
    assert run(str(tmp_path / "spawn.py")).stdout.split() == ["child"]
    (tmp_path / "debugged.py").write_text("import select\nprint(select.poll is not None)\n")
    debugged = run("-m", "pdb", "-c", "continue", str(tmp_path / "debugged.py"), input="quit\n")
    assert "True" in debugged.stdout, debugged.stderr
    (tmp_path / "test_it.py").write_text("import select, subprocess\ndef test_it():\n    assert select.poll()\n")
    env["PYTHONPATH"] = os.path.dirname(os.path.dirname(pytest.__file__))  # pure Python, so any interpreter runs it
    tested = run(
        "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), str(tmp_path / "test_it.py")
    )
    assert "1 passed" in tested.stdout, tested.stdout + tested.stderr
