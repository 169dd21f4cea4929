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


def test_diagnostics_by_brute_force(scored):
    before, _ = run_select(scored, method="random", frac=0.1, seed=7)
    (scored / "selection.safetensors").rename(scored / "before.safetensors")
    found, metadata = run_select(scored, frac=0.1, previous=scored / "before.safetensors")
    diagnostics = metadata["diagnostics"]
    stored = rollout.open_trajectories(scored / "train.safetensors")
    train, _ = open_tensors(scored / "gradients-train.safetensors", "gradients")
    live, chosen = len(train["prompt_index"]), found["ranked"].tolist()
    assert diagnostics["live_prompts"] == live
    assert diagnostics["overlap_previous"] == len(set(chosen) & set(before["ranked"].tolist())) / len(chosen)
    rates = stored.pass_rates()
    gain = {i: rate * (1 - rate) for i, rate in rates.items()}
    certain = {i for i in gain if sum(other >= gain[i] - 1e-6 for other in gain.values()) <= len(chosen)}
    possible = {i for i in gain if sum(other > gain[i] + 1e-6 for other in gain.values()) < len(chosen)}
    low, high = (len(set(chosen) & some) / len(chosen) for some in (certain, possible))
    assert low <= diagnostics["overlap_learnability"] <= high

    def cosine(a, b):
        return a @ b / np.linalg.norm(a) / np.linalg.norm(b)

    whole = dict(zip(train["prompt_index"].tolist(), train["sketch"].astype(np.float64), strict=True))
    first = dict(zip(train["half_index"].tolist(), train["half_sketch"].astype(np.float64), strict=True))
    assert len(first) == live  # a small pool: all of them are halved
    overlaps, noises, margins, means = [], [], [], []
    for name in ("rev", "srt"):
        valid = open_tensors(scored / f"gradients-valid-{name}.safetensors", "gradients")[0]["sketch"]
        a = [cosine(x, valid[0::2].mean(0)) for x in first.values()]
        b = [cosine(2 * whole[i] - x, valid[1::2].mean(0)) for i, x in first.items()]
        top = round(live / 10)
        overlaps.append(len(set(np.argsort(a)[-top:]) & set(np.argsort(b)[-top:])) / top)
        norms = [
            np.linalg.norm(whole[i]) * np.linalg.norm(valid[0::2].mean(0) + valid[1::2].mean(0)) / 2 for i in first
        ]
        products = [
            (x @ valid[0::2].mean(0) - (2 * whole[i] - x) @ valid[1::2].mean(0)) / norm
            for (i, x), norm in zip(first.items(), norms, strict=True)
        ]
        noises.append(np.std(products) / 2)
        scores = {i: cosine(x, valid.mean(0)) for i, x in whole.items()}
        ordered = sorted(scores.values(), reverse=True)
        margins.append(ordered[len(chosen) - 1] - ordered[len(chosen)])
        means.append(scores)
    assert diagnostics["split_half"] == pytest.approx(np.mean(overlaps))
    assert diagnostics["noise"] == pytest.approx(np.mean(noises), rel=1e-4)
    assert diagnostics["margin"] == pytest.approx(np.mean(margins), rel=1e-3, abs=1e-6)
    x = [np.mean([scores[i] for scores in means]) for i in chosen + [i for i in whole if i not in chosen]]
    groups = stored.groups()
    y = [stored.completion_length[groups[i]].mean() for i in chosen + [i for i in whole if i not in chosen]]
    slope = np.mean((x - np.mean(x)) * (y - np.mean(y))) / np.std(x) / np.std(y)
    assert diagnostics["length_correlation"] == pytest.approx(slope, rel=1e-3)


def test_a_previous_selection_of_other_data_is_refused(scored):
    run_select(scored, method="random")
    (scored / "selection.safetensors").rename(scored / "before.safetensors")
    (scored / "selection.csv").unlink()
    with open(scored / "train.jsonl", "a") as file:
        file.write('{"prompt": "cpy(abc)=", "answer": "abc"}\n')
    with pytest.raises(rollout.BadInput, match=r"before\.safetensors was made from other data"):
        run_select(scored, method="random", previous=scored / "before.safetensors")
    assert not list(scored.glob("selection.*"))


def test_too_few_prompts_have_no_split_half():
    sketch = np.ones((30, 4), np.float32)
    train = {"half_sketch": sketch, "sketch": sketch, "prompt_index": np.arange(30), "half_index": np.arange(30)}
    assert set(select.split_half(train, np.ones((1, 2, 4)))) == {"split_half", "noise"}
    assert select.split_half(train, np.zeros((1, 2, 4))) == {}  # one validation prompt
    assert select.split_half({"sketch": sketch, "prompt_index": np.arange(30)}, np.ones((1, 2, 4))) == {}
    assert select.margin(np.ones((5, 1)), top=5) == {}


def test_noise_is_that_of_repeated_draws():
    """Of cosines with gradients g + e and directions d + f, drawn many times."""
    random = np.random.default_rng(0)
    g, d = random.normal(size=(40, 50)) + 1, random.normal(size=(1, 50)) + 1

    def draw():
        halves = g + random.normal(size=(2, 40, 50)), d + random.normal(size=(2, 1, 50)) / 4
        return *halves, select.cosines(halves[0].mean(0), halves[1].mean(0))

    truth = np.std([draw()[2] for _ in range(300)], axis=0).mean()
    found = []
    for _ in range(20):
        e, f, _ = draw()
        index = np.arange(40)
        train = {"half_sketch": e[0], "sketch": e.mean(0), "prompt_index": index, "half_index": index}
        found.append(select.split_half(train, f.transpose(1, 0, 2))["noise"])
    assert np.mean(found) == pytest.approx(truth, rel=0.15)


def test_stale_and_noisy_rankings_are_warned_of(scored, capsys, monkeypatch):
    run_select(scored)
    assert "warning" not in capsys.readouterr().out  # still β, and far better than chance
    monkeypatch.setattr(select, "STALE", 1.1)
    monkeypatch.setattr(select, "NOISY", 1.1)
    run_select(scored)
    printed = capsys.readouterr().out
    assert "moved away from the stored trajectories" in printed and "mostly noise" in printed


def test_a_single_validation_prompt_and_odd_samples(small_world):
    """Neither has halves; the rest goes its way."""
    world, lines = small_world, (small_world / "valid-rev.jsonl").read_text().splitlines(keepends=True)
    rollout.rollout(out=world / "train.safetensors", data=world / "train.jsonl", samples=7)
    rolled = rollout.rollout(out=world / "valid.safetensors", data=world / "valid-rev.jsonl", samples=8)
    live = next(iter(rolled.live_groups()))
    (world / "one.jsonl").write_text(lines[live])
    for seed in range(9):  # until that prompt is live in its new place as well
        rolled = rollout.rollout(out=world / "one.safetensors", data=world / "one.jsonl", samples=8, seed=seed)
        if rolled.live_groups():
            break
    for name in ("train", "one"):
        project.project(trajectories=world / f"{name}.safetensors", out=world / f"gradients-{name}.safetensors", k=64)
    assert "half_sketch" not in open_tensors(world / "gradients-train.safetensors", "gradients")[0]
    select.select(
        out=world / "s.safetensors",
        data=world / "train.jsonl",
        trajectories=world / "train.safetensors",
        gradients=world / "gradients-train.safetensors",
        valid_gradients=[world / "gradients-one.safetensors"],
    )
    tensors, metadata = open_tensors(world / "s.safetensors", "selection")
    assert len(tensors["ranked"]) == 6
    assert "split_half" not in metadata["diagnostics"] and "margin" in metadata["diagnostics"]


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
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:hypothesispytest",
        "--rootdir",
        str(tmp_path),
        str(tmp_path / "test_it.py"),
    )
    assert "1 passed" in tested.stdout, tested.stdout + tested.stderr
