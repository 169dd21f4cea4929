"""Ranking against brute force, what a selector sees, and the name that the standard library has too."""

import csv
import doctest
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, TOY, load_all, load_folder, sample, save_descendant, save_selection

import cropi
import project
import rollout
import train
from rollout import BadInput, load_prompts

select = cropi.select  # the stage; by its name Python may know another module


def sample_and_project(world: Path, name: str, samples: int, **options) -> None:
    """Trajectories of NAME.jsonl in the folder NAME, and their gradients in gradients-NAME."""
    rollout.rollout(out=world / name, data=str(world / f"{name}.jsonl"), samples=samples, **options)
    project.project(trajectories=world / name, out=world / f"gradients-{name}", k=256)


@pytest.fixture
def scored(small_world):
    for name, samples in {"train": 8, "valid-rev": 16, "valid-srt": 16}.items():
        sample_and_project(small_world, name, samples)
    return small_world


def sources(world: Path) -> dict:
    """All that a selector may need."""
    return {
        "data": str(world / "train.jsonl"),
        "trajectories": world / "train",
        "gradients": world / "gradients-train",
        "valid_gradients": [world / f"gradients-valid-{name}" for name in ("rev", "srt")],
    }


def run_select(world: Path, name: str = "selection", **options) -> tuple[dict[str, np.ndarray], dict]:
    """Tensors and record of the selection file NAME."""
    out = world / f"{name}.safetensors"
    select.select(out=out, **sources(world) | options)
    return rollout.load(out, "selection")


def test_influence_equals_brute_force(scored):
    tensors, record = run_select(scored, frac=0.1)
    train = load_folder(scored / "gradients-train", "gradients")
    valid = [load_folder(scored / f"gradients-valid-{name}", "gradients") for name in ("rev", "srt")]
    cosine, fused = {}, {}
    for g, i in zip(train["sketch"].astype(float), train["prompt_index"].tolist(), strict=True):
        means = [v["sketch"].astype(float).mean(0) for v in valid]
        cosine[i] = [float(g @ v / np.sqrt((g @ g) * (v @ v))) for v in means]
    ranks = {i: [1 + sum(cosine[j][s] > cosine[i][s] for j in cosine) for s in range(2)] for i in cosine}
    for i in cosine:
        fused[i] = sum(1 / rank for rank in ranks[i] if rank <= 6)  # N = 0.1 · 60
    expected = sorted(fused, key=lambda i: (-fused[i], -sum(cosine[i]), i))[:6]
    assert tensors["ranked"].tolist() == expected
    np.testing.assert_allclose(tensors["score"][expected], [fused[i] for i in expected])
    np.testing.assert_allclose(tensors["cosine"][list(cosine)], list(cosine.values()), rtol=1e-6)
    assert tensors["rank"][list(cosine)].tolist() == list(ranks.values())
    dead = sorted(set(range(60)) - set(cosine))
    assert dead
    assert np.isnan(tensors["score"][dead]).all() and np.isnan(tensors["cosine"][dead]).all()
    assert not tensors["rank"][dead].any()
    assert list(record["recipe"]["inputs"]["valid_gradients"]) == ["rev", "srt"]


def test_fusion_by_hand():
    # set A ranks x0 x1 x2 x3, set B ranks x2 x0 x3 x1; N = 2: x0 = 1 + 1/2, x1 = 1/2, x2 = 1, x3 = 0
    scores = np.array([[0.9, 0.5], [0.8, 0.1], [0.7, 0.6], [0.6, 0.2]])
    ranks = select.ranks(scores)
    assert ranks.tolist() == [[1, 2], [2, 4], [3, 1], [4, 3]]
    assert select.reciprocal_rank_fusion(ranks, 2).tolist() == [1.5, 0.5, 1.0, 0.0]
    # the same with a prompt that is not live in the second row; N = round(0.4 · 5) = 2; x1 and x3 by mean cosine
    cosine = np.insert(scores, 1, np.nan, axis=0)
    score = select.influence(cosine, 0.4, "any")
    np.testing.assert_allclose(score, [1.5, np.nan, 0.5, 1.0, 0.0], atol=1e-8)
    assert np.argsort(-score, kind="stable").tolist() == [0, 3, 2, 4, 1]


def test_equal_fused_scores_are_ordered_by_mean_cosine_then_by_index():
    # The best two of each set are x4, x2 and x0, x2: 1, 1/2 + 1/2 and 1. All others have 0; of them x3 has the largest
    # mean cosine, then x1 and x5, which are equal.
    cosine = np.array([[0.1, 0.9], [0.2, 0.2], [0.8, 0.8], [0.3, 0.3], [0.9, 0.1], [0.2, 0.2]])
    score = select.influence(cosine, 1 / 3, "any")
    np.testing.assert_allclose(score, [1, 0, 1, 0, 1, 0], atol=1e-8)
    assert np.argsort(-score, kind="stable").tolist() == [2, 0, 4, 3, 1, 5]


def test_three_rules_for_the_sign_by_hand():
    """Fewer are live than the top n = 4 of 5: `any` takes x2, which points away from both sets."""
    cosine = np.array([[0.9, 0.5], [0.8, -0.1], [-0.7, -0.6], [0.2, -0.3], [np.nan, np.nan]])
    scores = {sign: select.influence(cosine, 0.8, sign) for sign in ("any", "set", "mean")}
    # ranks of the first set: x0 x1 x3 x2; of the second: x0 x1 x3 x2
    np.testing.assert_allclose(scores["any"], [2, 1, 1 / 2, 2 / 3, np.nan], atol=1e-8)
    np.testing.assert_allclose(scores["set"], [2, 1 / 2, np.nan, 1 / 3, np.nan], atol=1e-8)
    np.testing.assert_allclose(scores["mean"], [2, 1, np.nan, np.nan, np.nan], atol=1e-8)
    np.testing.assert_array_equal(select.inner_product(cosine, 0.8, "set"), scores["set"])


def test_cosine_by_hand():
    sketch = np.array([[3.0, 4.0], [0.0, 0.0]], np.float32)
    np.testing.assert_allclose(select.cosines(sketch, np.array([[1.0, 0.0], [0.0, 2.0]])), [[0.6, 0.8], [0.0, 0.0]])


def test_the_size_of_shards_changes_nothing(scored):
    """A pool is read shard by shard; nine shards say the same as four."""
    whole, record = run_select(scored)
    for name, samples in {"train": 8, "valid-rev": 16, "valid-srt": 16}.items():
        shutil.rmtree(scored / name)
        shutil.rmtree(scored / f"gradients-{name}")
        sample_and_project(scored, name, samples, shard=7)
    counts = [len(list((scored / name).glob("*.safetensors"))) for name in ("train", "gradients-train", "valid-rev")]
    assert counts == [9, 9, 2]
    tensors, other = run_select(scored, "in-nine")
    assert tensors["ranked"].tolist() == whole["ranked"].tolist()
    np.testing.assert_allclose(tensors["cosine"], whole["cosine"], rtol=1e-5, atol=1e-6)
    diagnostics = record["facts"]["diagnostics"]
    assert other["facts"]["diagnostics"] == pytest.approx(diagnostics, rel=1e-4, abs=2e-5)


def test_diagnostics_by_brute_force(scored):
    before, _ = run_select(scored, "before", selector="random", frac=0.1, seed=7)
    tensors, record = run_select(scored, frac=0.1, previous=scored / "before.safetensors")
    diagnostics = record["facts"]["diagnostics"]
    stored = load_all(scored / "train")
    train = load_folder(scored / "gradients-train", "gradients")
    live, chosen = len(train["prompt_index"]), tensors["ranked"].tolist()
    assert diagnostics["live_prompts"] == live
    assert diagnostics["overlap_previous"] == len(set(chosen) & set(before["ranked"].tolist())) / len(chosen)
    rates = dict(zip(stored.prompt_index.tolist(), stored.rewards.mean(1).tolist(), strict=True))
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
        tensors_of_valid = load_folder(scored / f"gradients-valid-{name}", "gradients")
        valid, half = (tensors_of_valid[n].astype(np.float64) for n in ("sketch", "half_sketch"))
        assert len(half) == len(valid)
        d, f = valid.mean(0), half.mean(0) - valid.mean(0)
        a = [cosine(x, d + f) for x in first.values()]
        b = [cosine(2 * whole[i] - x, d - f) for i, x in first.items()]
        top = round(live / 10)
        overlaps.append(len(set(np.argsort(a)[-top:]) & set(np.argsort(b)[-top:])) / top)
        errors, h = [], 1e-5  # how the cosine changes along the halves' difference, by a finite difference
        for i, x in first.items():
            g, e = whole[i], x - whole[i]
            errors.append((cosine(g + h * e, d + h * f) - cosine(g - h * e, d - h * f)) / (2 * h))
        noises.append(np.sqrt(np.mean(np.square(errors))))
        scores = {i: cosine(x, valid.mean(0)) for i, x in whole.items()}
        ordered = sorted(scores.values(), reverse=True)
        margins.append(ordered[len(chosen) - 1] - ordered[len(chosen)])
        means.append(scores)
    assert diagnostics["split_half"] == pytest.approx(np.mean(overlaps))
    assert diagnostics["noise"] == pytest.approx(np.mean(noises), rel=1e-4)
    assert diagnostics["margin"] == pytest.approx(np.mean(margins), rel=1e-3, abs=1e-6)
    x = [np.mean([scores[i] for scores in means]) for i in chosen + [i for i in whole if i not in chosen]]
    lengths = dict(zip(stored.prompt_index.tolist(), stored.length.mean(1).tolist(), strict=True))
    y = [lengths[i] for i in chosen + [i for i in whole if i not in chosen]]
    slope = np.mean((x - np.mean(x)) * (y - np.mean(y))) / np.std(x) / np.std(y)
    assert diagnostics["length_correlation"] == pytest.approx(slope, rel=1e-3)


def test_staleness_of_the_pool_and_of_the_worst_validation_set(scored, toy, moved):
    """Means over the live prompts of all shards; of the largest change the largest."""
    policy = save_descendant(scored / "moved", moved, toy[1])
    for name in ("train", "valid-rev", "valid-srt"):
        project.project(trajectories=scored / name, model=policy, out=scored / f"stale-{name}", k=64)
    gradients = {"gradients": scored / "stale-train"}
    gradients["valid_gradients"] = [scored / f"stale-valid-{name}" for name in ("rev", "srt")]
    diagnostics = run_select(scored, **gradients)[1]["facts"]["diagnostics"]
    pool, *valid = (load_folder(scored / f"stale-{name}", "gradients") for name in ("train", "valid-rev", "valid-srt"))
    for name in ("token_kl", "mean_change", "ess_token", "ess_trajectory"):
        worst = min if name.startswith("ess") else max
        assert diagnostics[name] == pytest.approx(sum(pool[name].tolist()) / len(pool[name]), rel=1e-5)
        means = [sum(tensors[name].tolist()) / len(tensors[name]) for tensors in valid]
        assert means[0] != means[1]
        assert diagnostics[f"valid_{name}"] == pytest.approx(worst(means), rel=1e-5)
    assert diagnostics["largest_change"] == pytest.approx(max(pool["largest_change"].tolist()))
    largest = [max(tensors["largest_change"].tolist()) for tensors in valid]
    assert diagnostics["valid_largest_change"] == pytest.approx(max(largest))
    assert diagnostics["ess_trajectory"] < diagnostics["ess_token"] < 1 and diagnostics["token_kl"] > 0.001


def test_a_previous_selection_of_other_data_is_refused(scored):
    run_select(scored, "before", selector="random")
    with open(scored / "train.jsonl", "a") as file:
        file.write('{"prompt": "cpy(abc)=", "answer": "abc"}\n')
    with pytest.raises(BadInput, match=r"before\.safetensors was made from other data"):
        run_select(scored, selector="random", previous=scored / "before.safetensors")
    assert not list(scored.glob("*selection.*"))


def test_too_few_prompts_have_no_split_half():
    sketch = np.ones((30, 4), np.float32)
    assert set(select.split_half(sketch, sketch, np.ones((1, 2, 4)))) == {"split_half", "noise"}
    assert select.split_half(sketch, sketch, np.zeros((1, 2, 4))) == {}  # one validation prompt
    assert select.split_half(sketch[:10], sketch[:10], np.ones((1, 2, 4))) == {}
    assert select.split_half(sketch[:0], sketch[:0], np.ones((1, 2, 4))) == {}
    assert select.split_half(sketch, sketch, np.ones((0, 2, 4))) == {}  # no validation set
    assert select.margin(np.ones((5, 1)), top=5) == {}


@pytest.mark.parametrize("policy", ["beta", "trained"])
def test_noise_is_that_of_independent_draws(toy, tmp_path, policy):
    """10 times, new trajectories of the same prompts from β: the standard deviation of a prompt's cosine (root mean
    square over live prompts, mean over the sets), against what a draw says of itself (root mean square)."""
    beta, tokenizer = toy
    path, data = TOY / "model", {"train": (150, 8), "valid-rev": (64, 16), "valid-srt": (64, 16)}
    if policy == "trained":
        chosen = [i for i, row in enumerate(load_prompts(TOY / "train.jsonl")) if row["family"] in ("rev", "srt")]
        save_selection(tmp_path / "s", TOY / "train.jsonl", chosen)
        train.train(selection=tmp_path / "s", out=tmp_path, steps=20)
        path = tmp_path / "model"
    sketcher = project.GradientSketcher(rollout.load_model(path)[0], 4096, 1.0, seed=0)
    engine = rollout.TransformersEngine(beta, tokenizer)
    cosine, noises = np.full((10, 150, 2), np.nan), []
    for draw in range(10):
        tensors, halves = {}, {}
        for number, (name, (count, samples)) in enumerate(data.items()):
            rows = load_prompts(TOY / f"{name}.jsonl")
            rows = rows[:: len(rows) // count][:count]
            options = {"samples": samples, "max_tokens": 8}
            groups = sample(engine, tokenizer, rows, range(count), [draw, number], temperature=1.0, **options)
            groups = groups.take(groups.live())
            halved = np.ones(len(groups.rewards), bool)
            tensors[name] = project.project_groups(sketcher, groups, halved, 1.0, 4096)
            halves[name] = select.halves_of(tensors[name])
        directions = np.array([tensors[name]["sketch"].mean(0, np.float64) for name in data if name != "train"])
        pool, first = tensors["train"]["sketch"].astype(np.float64), halves["train"][0]
        cosine[draw, tensors["train"]["prompt_index"]] = select.cosines(pool, directions)
        valid_halves = np.array([[half.mean(0) for half in halves[name]] for name in data if name != "train"])
        noises.append(select.split_half(pool, first, valid_halves)["noise"] ** 2)
    draws = (~np.isnan(cosine)).sum(0)  # (150, 2) in which the prompt was live
    often = (draws > 1).all(1)
    variance, draws = np.nanvar(cosine[:, often], 0, ddof=1), draws[often]
    truth = np.sqrt((variance * draws).sum(0) / draws.sum(0)).mean()
    noise = np.mean(noises) ** 0.5
    print(f"{policy}: noise {noise:.4f}, standard deviation over draws {truth:.4f}")
    assert noise == pytest.approx(truth, rel=0.15)


def test_stale_and_noisy_rankings_are_warned_of(scored, capsys, monkeypatch):
    run_select(scored)
    assert "warning" not in capsys.readouterr().out  # still β, and far better than chance
    monkeypatch.setattr(select, "STALE", 1.1)
    monkeypatch.setattr(select, "NOISY", 1.1)
    run_select(scored, "again")
    printed = capsys.readouterr().out
    assert "moved away from the stored trajectories" in printed and "mostly noise" in printed


def test_a_single_validation_prompt_and_odd_samples(small_world):
    """Neither has halves; the rest goes its way."""
    world, lines = small_world, (small_world / "valid-rev.jsonl").read_text().splitlines(keepends=True)
    sample_and_project(world, "train", samples=7)
    rollout.rollout(out=world / "valid", data=str(world / "valid-rev.jsonl"))
    live = load_all(world / "valid").live()[0]
    (world / "one.jsonl").write_text(lines[live])
    for seed in range(9):  # until that prompt is live in its new place as well
        rollout.rollout(out=world / f"one-{seed}", data=str(world / "one.jsonl"), seed=seed)
        if len(load_all(world / f"one-{seed}").live()):
            break
    project.project(trajectories=world / f"one-{seed}", out=world / "gradients-one", k=256)
    halves = load_folder(world / "gradients-train", "gradients")
    assert halves["half_sketch"].shape == (0, 256) and halves["half_index"].shape == (0,)
    tensors, record = run_select(world, valid_gradients=[world / "gradients-one"])
    assert len(tensors["ranked"]) == 6
    assert "split_half" not in record["facts"]["diagnostics"] and "margin" in record["facts"]["diagnostics"]


def test_dead_prompts_are_never_chosen_by_influence(scored):
    tensors, _ = run_select(scored, frac=1.0, sign="any")
    live = load_all(scored / "train").live()
    assert sorted(tensors["ranked"].tolist()) == live.tolist()
    assert len(live) < 60


def test_baselines(scored):
    stored = load_all(scored / "train")
    rates = dict(zip(stored.prompt_index.tolist(), stored.rewards.mean(1).tolist(), strict=True))
    full, _ = run_select(scored, "full", selector="full")
    assert sorted(full["ranked"].tolist()) == list(range(60))
    random, _ = run_select(scored, "random-1", selector="random", frac=0.5, seed=1)
    other, _ = run_select(scored, "random-2", selector="random", frac=0.5, seed=2)
    assert len(set(random["ranked"].tolist())) == 30
    assert random["ranked"].tolist() != other["ranked"].tolist()
    nearest, _ = run_select(scored, "pass-rate", selector="pass-rate", frac=0.2)
    assert len(nearest["ranked"]) == 12
    np.testing.assert_allclose(nearest["pass_rate"], [rates[i] for i in range(60)])
    rest = set(range(60)) - set(nearest["ranked"].tolist())
    assert max(abs(rates[i] - 0.5) for i in nearest["ranked"].tolist()) <= min(abs(rates[i] - 0.5) for i in rest)
    learnable, _ = run_select(scored, "learnability", selector="learnability", frac=0.2)
    score, ranked = learnable["score"], learnable["ranked"].tolist()
    np.testing.assert_allclose(score[ranked], [rates[i] * (1 - rates[i]) for i in ranked])
    assert sorted(score[ranked], reverse=True) == score[ranked].tolist()
    rest = set(range(60)) - set(ranked)
    assert score[ranked].min() >= max(rates[i] * (1 - rates[i]) for i in rest) - 1e-6


def test_hardest_and_the_longest_gradients(scored):
    stored = load_all(scored / "train")
    rates = dict(zip(stored.prompt_index.tolist(), stored.rewards.mean(1).tolist(), strict=True))
    hardest, _ = run_select(scored, "hardest", selector="hardest", frac=0.2)
    solved_at_all = sorted(rate for rate in rates.values() if rate > 0)
    assert [rates[i] for i in hardest["ranked"].tolist()] == solved_at_all[:12]
    longest, _ = run_select(scored, "grad-norm", selector="grad-norm", frac=0.1)
    gradients = load_folder(scored / "gradients-train", "gradients")
    order = gradients["prompt_index"][np.argsort(-gradients["grad_norm"])]
    assert longest["ranked"].tolist() == order[:6].tolist()
    inner, _ = run_select(scored, "inner", selector="inner", frac=0.1)
    assert inner["ranked"].tolist() != run_select(scored)[0]["ranked"].tolist()


def test_equal_pass_rates_are_ordered_at_random():
    rates = np.array([1 / 3, 2 / 3] * 50, np.float32)  # equally near to 1/2, up to rounding
    for selector in (select.nearest_pass_rate, select.learnability):
        ranked = np.argsort(-selector(rates, np.random.default_rng(0)), kind="stable")
        assert 10 < sum(i % 2 for i in ranked[:50].tolist()) < 40


def test_worked_examples_of_the_docstrings():
    results = doctest.testmod(select)
    assert results.attempted >= 2 and results.failed == 0


def test_csv_says_the_same_to_people(scored):
    tensors, _ = run_select(scored, frac=0.1, sign="any")
    rows = load_prompts(scored / "train.jsonl")
    with open(scored / "selection.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    live = load_all(scored / "train").live()
    assert sorted(int(line["prompt_index"]) for line in lines) == live.tolist()  # all candidates, best first
    assert [int(line["place"]) for line in lines] == list(range(1, len(live) + 1))
    chosen = [line for line in lines if line["chosen"] == "1"]
    assert chosen == lines[:6]
    assert [int(line["prompt_index"]) for line in chosen] == tensors["ranked"].tolist()
    assert all(line["prompt"] == rows[int(line["prompt_index"])]["prompt"] for line in lines)
    assert all(line["answer"] == rows[int(line["prompt_index"])]["answer"] for line in lines)
    for column in ("score", "pass_rate"):
        expected = [tensors[column][int(line["prompt_index"])] for line in lines]
        assert [float(line[column]) for line in lines] == pytest.approx(
            expected, abs=1e-3 if column != "score" else 1e-5
        )
    for v, name in enumerate(("rev", "srt")):
        assert [int(line[f"rank_{name}"]) for line in chosen] == tensors["rank"][tensors["ranked"], v].tolist()
        cosine = tensors["cosine"][tensors["ranked"], v].tolist()
        assert [float(line[f"cosine_{name}"]) for line in chosen] == pytest.approx(cosine, abs=1e-4)


def test_a_csv_that_was_lost_is_written_again(scored):
    """It is for people alone, so the next command makes it from the selection file."""
    run_select(scored)
    written = (scored / "selection.csv").read_text()
    (scored / "selection.csv").unlink()
    made = (scored / "selection.safetensors").stat().st_mtime_ns
    run_select(scored)
    assert (scored / "selection.csv").read_text() == written
    assert (scored / "selection.safetensors").stat().st_mtime_ns == made


# ---------------------------------------------------------------------------------------------------------------------
# Selectors of one's own: the contract at the head of select.py


CONTRACT = """
import json
from pathlib import Path

import numpy as np

SAW = Path(__file__).with_name("saw.json")


def everything(rows, random, stage, previous, pass_rate, length, truncated, cosine, inner, grad_norm, frac):
    given = dict(locals())
    given["random"] = random.random(3)
    SAW.write_text(json.dumps(given, default=lambda array: array.tolist()))
    return grad_norm


def of_rows(rows):
    return [len(row["prompt"]) for row in rows]


def of_trajectories(pass_rate, truncated):
    return pass_rate - truncated


def of_gradients(grad_norm):
    return grad_norm


def of_validation(inner):
    return inner.max(1)


def ties(rows):
    score = np.zeros(len(rows))
    score[[3, 4, 40]] = np.nan
    score[[50, 20, 30]] = 1
    score[10] = np.inf
    score[0] = -np.inf
    return score


def few(rows):
    return np.where(np.arange(len(rows)) % 30 == 5, 1.0, np.nan)


def fused(cosine, frac):
    live = np.flatnonzero(~np.isnan(cosine[:, 0]))
    score = np.full(len(cosine), np.nan)
    n = max(1, round(frac * len(cosine)))
    for i in live:
        ranks = [1 + sum(cosine[j, v] > cosine[i, v] for j in live) for v in range(cosine.shape[1])]
        score[i] = sum(1 / rank for rank in ranks if rank <= n) + 1e-6 * cosine[i].mean()
    return score


def careless(cosine, pass_rate, rows):
    cosine[np.isnan(cosine)] = -9
    pass_rate += 1
    rows.sort(key=str)
    return cosine.sum(1)
"""


@pytest.fixture
def contract(tmp_path):
    """FILE.py: of the selectors above."""
    (tmp_path / "contract.py").write_text(CONTRACT)
    return f"{tmp_path / 'contract.py'}:"


def seen(folder: Path) -> dict:
    """What `everything` was given, tables of the pool as arrays."""
    tables = ("pass_rate", "length", "truncated", "cosine", "inner", "grad_norm")
    given = json.loads((folder / "saw.json").read_text())
    return given | {name: np.array(given[name]) for name in tables}


def test_a_selector_sees_what_it_asks_for(scored, contract):
    before, _ = run_select(scored, "before", selector="random", frac=0.1, seed=7)
    given = {"selector": f"{contract}everything", "frac": 0.25, "stage": 3, "seed": 11}
    tensors, _ = run_select(scored, previous=scored / "before.safetensors", **given)
    saw = seen(scored)
    assert saw["rows"] == list(load_prompts(scored / "train.jsonl"))
    assert (saw["stage"], saw["frac"]) == (3, 0.25)
    assert saw["previous"] == before["ranked"].tolist()
    assert saw["random"] == np.random.default_rng(11).random(3).tolist()
    stored = load_all(scored / "train")
    assert stored.prompt_index.tolist() == list(range(60))
    for name, of in {"pass_rate": "rewards", "length": "length", "truncated": "truncated"}.items():
        np.testing.assert_allclose(saw[name], [np.mean(row.tolist()) for row in getattr(stored, of)], rtol=1e-6)
    train = load_folder(scored / "gradients-train", "gradients")
    live = train["prompt_index"]
    dead = np.setdiff1d(np.arange(60), live)
    assert 0 < len(dead) < 60
    assert saw["grad_norm"].shape == (60,) and saw["cosine"].shape == saw["inner"].shape == (60, 2)
    for name in ("grad_norm", "cosine", "inner"):
        assert np.isnan(saw[name][dead]).all() and np.isfinite(saw[name][live]).all()
    norms = np.linalg.norm(train["sketch"].astype(np.float64), axis=1)
    np.testing.assert_allclose(saw["grad_norm"][live], norms, rtol=1e-5)
    for v, name in enumerate(("rev", "srt")):
        mean = load_folder(scored / f"gradients-valid-{name}", "gradients")["sketch"].astype(np.float64).mean(0)
        inner = train["sketch"].astype(np.float64) @ mean
        np.testing.assert_allclose(saw["inner"][live, v], inner, rtol=1e-5, atol=1e-9)
        np.testing.assert_allclose(saw["cosine"][live, v], inner / norms / np.linalg.norm(mean), rtol=1e-5, atol=1e-7)
    assert tensors["ranked"].tolist() == live[np.argsort(-norms, kind="stable")][:15].tolist()
    np.testing.assert_allclose(tensors["score"], saw["grad_norm"])
    run_select(scored, "first", **given)
    assert seen(scored)["previous"] is None


def test_prompts_that_were_not_sampled_are_unknown(scored, contract):
    """Those longer than --max-prompt-tokens have neither pass rate nor gradient, and are not chosen by them."""
    shutil.rmtree(scored / "train")
    shutil.rmtree(scored / "gradients-train")
    longest = int(np.median([len(row["prompt"]) for row in load_prompts(scored / "train.jsonl")]))
    sample_and_project(scored, "train", 8, max_prompt_tokens=longest)
    sampled = load_all(scored / "train").prompt_index.tolist()
    assert 10 < len(sampled) < 60
    run_select(scored, selector=f"{contract}everything")
    saw = seen(scored)
    for name in ("pass_rate", "length", "truncated"):
        assert np.flatnonzero(~np.isnan(saw[name])).tolist() == sampled
    assert set(np.flatnonzero(~np.isnan(saw["grad_norm"])).tolist()) < set(sampled)
    for selector in ("pass-rate", "learnability"):
        tensors, _ = run_select(scored, selector, selector=selector, frac=1.0)
        assert sorted(tensors["ranked"].tolist()) == sampled


def test_only_what_is_asked_for_is_needed(scored, contract):
    """And what is not asked for does not enter the recipe."""
    paths = sources(scored)
    needs = {
        "of_rows": ["data"],
        "of_trajectories": ["data", "trajectories"],
        "of_gradients": ["data", "trajectories", "gradients"],
        "of_validation": list(paths),
    }
    for name, needed in needs.items():
        selector, out = f"{contract}{name}", scored / f"{name}.safetensors"
        for lacking in needed[1:]:
            given = {path: paths[path] for path in needed if path != lacking}
            with pytest.raises(BadInput, match=f"{name} needs .*--{lacking.replace('_', '-')}"):
                select.select(out=out, selector=selector, **given)
            assert not out.exists()
        select.select(out=out, selector=selector, **{path: paths[path] for path in needed})
        tensors, record = rollout.load(out, "selection")
        assert len(tensors["ranked"]) == 6
        assert ("cosine" in tensors) == ("rank" in tensors) == (name == "of_validation")
        assert np.isnan(tensors["pass_rate"]).all() == (name == "of_rows")
        used = {path for path, value in record["recipe"]["inputs"].items() if value and path in paths}
        assert used == set(needed)
        select.select(out=out, selector=selector, **paths)  # with all paths it is the same file, so nothing is made
        assert rollout.peek(out) == record
    for name in ("full", "random"):
        select.select(out=scored / f"{name}.safetensors", selector=name, data=paths["data"])


def test_ties_are_ordered_by_index_and_nan_is_never_chosen(scored, contract):
    tensors, _ = run_select(scored, selector=f"{contract}ties", frac=0.1)
    assert tensors["ranked"].tolist() == [10, 20, 30, 50, 1, 2]
    tensors, _ = run_select(scored, "all", selector=f"{contract}ties", frac=1.0)
    equal = [i for i in range(60) if i not in (0, 3, 4, 10, 20, 30, 40, 50)]
    assert tensors["ranked"].tolist() == [10, 20, 30, 50, *equal, 0]
    assert np.flatnonzero(np.isnan(tensors["score"])).tolist() == [3, 4, 40]
    tensors, _ = run_select(scored, "few", selector=f"{contract}few", frac=0.5)
    assert tensors["ranked"].tolist() == [5, 35]


def test_a_selector_that_fuses_ranks_is_the_papers(scored, contract):
    ours, record = run_select(scored, "ours")
    theirs, other = run_select(scored, "theirs", selector=f"{contract}fused")
    assert theirs["ranked"].tolist() == ours["ranked"].tolist()
    assert theirs["cosine"].tobytes() == ours["cosine"].tobytes() and theirs["rank"].tobytes() == ours["rank"].tobytes()
    assert record["facts"]["diagnostics"].keys() == other["facts"]["diagnostics"].keys()


def test_a_selector_that_writes_into_what_it_is_given_changes_nothing_else(scored, contract):
    ours, record = run_select(scored, "ours", frac=0.2)
    theirs, other = run_select(scored, "theirs", selector=f"{contract}careless", frac=0.2)
    for name in ("pass_rate", "cosine", "rank"):
        assert theirs[name].tobytes() == ours[name].tobytes(), name
    correlation = record["facts"]["diagnostics"]["length_correlation"]
    assert other["facts"]["diagnostics"]["length_correlation"] == pytest.approx(correlation)
    rows = load_prompts(scored / "train.jsonl")
    with open(scored / "theirs.csv", newline="") as file:
        assert all(line["prompt"] == rows[int(line["prompt_index"])]["prompt"] for line in csv.DictReader(file))


def test_a_changed_selector_file_is_refused_and_a_moved_one_is_not(scored, contract, tmp_path):
    _, record = run_select(scored, selector=f"{contract}ties")
    (tmp_path / "elsewhere").mkdir()
    shutil.copy(tmp_path / "contract.py", tmp_path / "elsewhere" / "contract.py")
    assert run_select(scored, selector=f"{tmp_path / 'elsewhere/contract.py'}:ties")[1] == record
    (tmp_path / "contract.py").write_text(CONTRACT + "\n# another version\n")
    with pytest.raises(
        BadInput, match=r"selection\.safetensors was made with options\.selector contract\.py:ties .*, now "
    ):
        run_select(scored, selector=f"{contract}ties")
    with pytest.raises(BadInput, match=r"was made with .*options\.selector contract\.py:ties \(\w+\), now influence"):
        run_select(scored)


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
    env["PYTHONPATH"] = str(ROOT)  # two folders with such a file
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
