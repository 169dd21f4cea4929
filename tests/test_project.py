"""Sketches from the batched hooks against plain autograd, one prompt at a time."""

import copy
import doctest
import gc
import os
import subprocess
import sys
import weakref
from functools import partial

import numpy as np
import pytest
import torch
from conftest import ROOT, TEMPERATURE, TOY, load_all, load_folder, sample, save_descendant, save_selection, sequence
from torch import nn
from transformers import GemmaConfig, GemmaForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import cropi
import project
import rollout
import train
from project import GradientSketcher, SparseProjection, project_groups
from train import collate

K = 512


def live_pieces(trajectories) -> list[train.Piece]:
    """Every live group, whole."""
    return [(int(n), range(trajectories.samples)) for n in trajectories.live()]


def dense_projection(sketcher: GradientSketcher) -> dict[str, torch.Tensor]:
    """P M as explicit matrices (k, d) for each parameter tensor, from the description at the head of project.py."""
    matrices, k = {}, sketcher.projection.k
    for name, (sign, scale, shifts) in sketcher.projection.blocks.items():
        matrices[name] = torch.zeros(k, len(sign))
        for j, value in enumerate(sign.tolist()):
            matrices[name][(j + shifts[j // k]) % k, j] = value * scale
    return matrices


def autograd_sketch(model, trajectories, piece, matrices, ratio="token") -> torch.Tensor:
    """P M ĝ of equation 2 for one piece, with the advantages of its group, by plain autograd, one trajectory at a
    time."""
    n, ks = piece
    rewards = trajectories.rewards[n].astype(np.float64)
    advantages = (rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-6)
    model = copy.deepcopy(model).requires_grad_(True)
    for k in ks:
        ids, start, behavior = sequence(trajectories, n, k)
        logps = torch.log_softmax(model(ids[None]).logits[0] / TEMPERATURE, -1)[start - 1 : -1]
        logps = logps.gather(1, ids[start:, None])[:, 0]
        rho = (logps.detach() - torch.tensor(behavior)).exp()
        weight = {
            "none": 1.0,
            "token": rho,
            "prefix": torch.stack([rho[: t + 1].prod() for t in range(len(rho))]),
            "sequence": rho.prod(),
        }[ratio]
        (advantages[k] * (weight * logps).mean() / len(ks)).backward()
    parameters = dict(model.named_parameters())
    return sum(matrix @ parameters[name].grad.flatten() for name, matrix in matrices.items())


@pytest.fixture(scope="module", params=["toy", "tied"])
def case(request, moved):
    """The moved toy model (biases, untied), and a small Llama (no biases, output head and embedding one weight)."""
    if request.param == "toy":
        return moved
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=moved.config.vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("sparse_ratio", [0.1, 1.0])
def test_hooks_equal_autograd_prompt_by_prompt(case, ragged, sparse_ratio):
    sketcher = GradientSketcher(copy.deepcopy(case), k=K, sparse_ratio=sparse_ratio, seed=1)
    matrices = dense_projection(sketcher)
    left_out = {name for name, _ in case.named_parameters()} - set(matrices)
    assert all("norm" in name for name in left_out)
    live = live_pieces(ragged)
    batch = collate(ragged, live, case.device)
    assert (batch.segment[:, 0] == -1).any() and (batch.segment[:, -1] == -1).any()  # padding on both sides
    sketch, logps = sketcher.sketch(batch, TEMPERATURE)
    assert (logps - batch.behavior_logps).abs().max() > 0.1  # π_θ ≠ β
    for row, piece in enumerate(live):  # every position in the batch
        expected = autograd_sketch(case, ragged, piece, matrices)
        assert (sketch[row] - expected).norm() <= 1e-4 * expected.norm()


@pytest.mark.parametrize("ratio", ["none", "prefix", "sequence"])
def test_other_estimators_equal_autograd(moved, ragged, ratio):
    live = live_pieces(ragged)[:5]
    batch = collate(ragged, live, moved.device)
    token, _ = GradientSketcher(copy.deepcopy(moved), K, 1.0, seed=1).sketch(batch, TEMPERATURE)
    sketcher = GradientSketcher(copy.deepcopy(moved), K, 1.0, seed=1, ratio=ratio)
    sketch, _ = sketcher.sketch(batch, TEMPERATURE)
    matrices = dense_projection(sketcher)
    for row, piece in enumerate(live):
        expected = autograd_sketch(moved, ragged, piece, matrices, ratio)
        assert (sketch[row] - expected).norm() <= 1e-4 * expected.norm()
    assert (token - sketch).norm() > 1e-2 * sketch.norm()  # another estimate than the default


def test_estimators_agree_while_the_policy_is_still_beta(toy, ragged):
    """The engine's log-probs aside: β's are computed here as π's are."""
    batch = collate(ragged, live_pieces(ragged), toy[0].device)
    sketcher = GradientSketcher(copy.deepcopy(toy[0]), K, 1.0, seed=1)
    _, batch.behavior_logps = sketcher.sketch(batch, TEMPERATURE)
    sketches = []
    for sketcher.ratio in project.RATIOS:
        sketches.append(sketcher.sketch(batch, TEMPERATURE)[0])
        assert ((sketches[-1] - sketches[0]).norm(dim=1) <= 1e-6 * sketches[0].norm(dim=1)).all()
    assert len(sketches) == 4


def test_released_formula_by_hand():
    """Two trajectories of 2 tokens and 1, rewards 1 and 0: token ratio, group mean and standard deviation, mean over
    the sequence, no clipping. ∂/∂log π of what ĝ is the gradient of is ρ_kt Â_k / (K |τ_k|), ∇log π being the rest."""
    pi = torch.tensor([0.9, 0.2, 0.5]).log().requires_grad_(True)
    beta = torch.tensor([0.3, 0.4, 0.25]).log()  # ratios 3, 1/2 and 2: far outside 1 ± 0.2
    trajectories = rollout.Trajectories(
        prompt_index=np.array([0]),
        prompt_length=np.array([1]),
        prompt_tokens=np.array([7]),
        length=np.array([[2, 1]]),
        tokens=np.array([7, 7, 7]),
        behavior_logps=beta.numpy(),
        rewards=np.array([[1.0, 0.0]], np.float32),  # advantages ±(1/2) / √(1/2) = ±0.70711
        truncated=np.zeros((1, 2), np.uint8),
    )
    batch = collate(trajectories, [(0, range(2))], torch.device("cpu"))
    project.off_policy_objective(pi, batch, "token").backward()
    # 3 · 0.70711 / 4, 0.5 · 0.70711 / 4; -2 · 0.70711 / 2
    torch.testing.assert_close(pi.grad, torch.tensor([0.53033, 0.08839, -0.70711]), rtol=1e-4, atol=1e-6)


def test_cap_bounds_the_weights():
    pi, beta = torch.tensor([0.9, 0.2, 0.2]).log(), torch.tensor([0.3, 0.4, 0.4]).log()  # of two trajectories
    weights = partial(project.importance_weights, pi, beta, [2, 1])
    assert weights("token", cap=2.0).tolist() == pytest.approx([2.0, 0.5, 0.5])
    assert weights("prefix", cap=1.6).tolist() == pytest.approx([1.6, 1.5, 0.5])
    assert weights("sequence").tolist() == pytest.approx([1.5, 1.5, 0.5])


@pytest.mark.parametrize("batch_tokens", [60, 10**6])  # groups in pieces; all at once
def test_halves_are_those_of_the_trajectories(moved, ragged, batch_tokens):
    """Half by half for every second prompt, whole for the others."""
    sketcher, groups = GradientSketcher(copy.deepcopy(moved), K, 1.0, seed=1), ragged.take(ragged.live())
    halved = np.arange(len(groups.rewards)) % 2 == 0
    whole, _ = sketcher.sketch(collate(groups, live_pieces(groups), moved.device), TEMPERATURE)
    tensors = project_groups(sketcher, groups, halved, TEMPERATURE, batch_tokens)
    sketch, first = (torch.from_numpy(tensors[name]) for name in ("sketch", "half_sketch"))
    assert ((sketch - whole).norm(dim=1) <= 1e-5 * whole.norm(dim=1)).all()
    assert tensors["half_index"].tolist() == groups.prompt_index[::2].tolist()
    assert first.shape == (halved.sum(), K)
    second, matrices = 2 * sketch[halved] - first, dense_projection(sketcher)
    for row, n in list(enumerate(np.flatnonzero(halved)))[:3]:
        for half, ks in zip((first, second), train.halves(groups.rewards[n]), strict=True):
            expected = autograd_sketch(moved, groups, (n, ks), matrices)
            assert (half[row] - expected).norm() <= 1e-4 * expected.norm() + 1e-7


@pytest.mark.parametrize("change", ["order", "padding", "slices", "long"])
def test_batching_changes_nothing(moved, ragged, change, monkeypatch):
    sketcher = GradientSketcher(copy.deepcopy(moved), k=K, sparse_ratio=0.1, seed=1)
    live = live_pieces(ragged)
    batch = collate(ragged, live, moved.device)
    whole, _ = sketcher.sketch(batch, TEMPERATURE)
    whole = dict(zip(batch.prompt_index, whole, strict=True))
    batches = [collate(ragged, live[::-1], moved.device) if change == "order" else batch]
    if change == "padding":  # three more columns of it on the left
        for name, value in (("ids", 0), ("position", 0), ("segment", -1)):
            setattr(batch, name, nn.functional.pad(getattr(batch, name), (3, 0), value=value))
    if change == "long":  # rows alone, two calls of attention
        monkeypatch.setattr(train, "LONG", 1)
        batches = [collate(ragged, [piece], moved.device) for piece in live]
    if change == "slices":  # weight gradients of one prompt at a time
        sketcher.MATRIX_ELEMENTS = 1
    for other in batches:
        for i, row in zip(other.prompt_index, sketcher.sketch(other, TEMPERATURE)[0], strict=True):
            assert (row - whole[i]).norm() <= 1e-4 * whole[i].norm()


@pytest.mark.parametrize("sparse_ratio", [0.3, 1.0])
def test_inner_products_have_the_mean_and_the_variance_of_theory(sparse_ratio):
    """Over 4,000 seeds, for two gradients that resemble each other and have a few large coordinates."""
    torch.manual_seed(0)
    sizes, k, seeds = {"a": 20, "b": 150, "c": 330}, 64, 4000
    first = torch.randn(500) * torch.where(torch.rand(500) < 0.05, 4.0, 1.0)
    g = torch.stack([first, first + 0.5 * torch.randn(500)])
    keep = project.keep_probability(sizes, sparse_ratio)
    assert sum(keep[name] * size for name, size in sizes.items()) == pytest.approx(sparse_ratio * 500)
    products, kept = np.zeros(seeds), torch.zeros(500)
    for seed in range(seeds):
        projection = SparseProjection(sizes, keep, k, seed, torch.device("cpu"))
        sketch = torch.zeros(2, k)
        for name, block in zip(sizes, g.split(list(sizes.values()), 1), strict=True):
            projection.add(sketch, name, block.clone())
        products[seed] = sketch[0] @ sketch[1]
        kept += torch.cat([sign.abs() for sign, _, _ in projection.blocks.values()])
    x, y = g.double().numpy()
    p = np.concatenate([np.full(size, keep[name]) for name, size in sizes.items()])
    lap = np.concatenate([number * 100 + np.arange(size) // k for number, size in enumerate(sizes.values())])
    pairs = np.triu((np.outer(x, y) + np.outer(y, x)) ** 2 * (lap[:, None] != lap), 1)
    variance = ((1 / p - 1) * x**2 * y**2).sum() + pairs.sum() / k
    error = (variance / seeds) ** 0.5
    assert abs(products.mean() - x @ y) < 4 * error
    assert x @ y > 20 * error  # so that the line above can fail
    assert products.var() == pytest.approx(variance, rel=0.1)  # its standard error is 2 to 3%
    assert (abs(kept.numpy() / seeds - p) <= 5 * (p * (1 - p) / seeds) ** 0.5).all()


def test_coordinates_meet_as_the_head_of_the_file_says():
    meetings, seeds = np.zeros((12, 12)), 4000
    for seed in range(seeds):
        sizes = {"a": 4, "b": 8}
        blocks = SparseProjection(sizes, dict.fromkeys(sizes, 1.0), 5, seed, torch.device("cpu")).blocks
        place = np.array([(j + shifts[j // 5]) % 5 for sign, _, shifts in blocks.values() for j in range(len(sign))])
        meetings += place[:, None] == place
    lap = np.array([0] * 4 + [1] * 5 + [2] * 3)
    assert (meetings[(lap[:, None] == lap) & ~np.eye(12, dtype=bool)] == 0).all()
    assert abs(meetings[lap[:, None] != lap] / seeds - 1 / 5).max() < 5 * (1 / 5 * 4 / 5 / seeds) ** 0.5


def test_a_tensor_with_fewer_coordinates_than_buckets_keeps_its_inner_products():
    """One lap, in which no two coordinates meet."""
    sizes = {"a": 40}
    projection = SparseProjection(sizes, project.keep_probability(sizes, 1.0), 64, 3, torch.device("cpu"))
    g = torch.randn(3, 40)
    sketch = torch.zeros(3, 64)
    projection.add(sketch, "a", g.clone())
    torch.testing.assert_close(sketch @ sketch.T, g @ g.T)


def test_completions_of_a_single_token(moved, toy):
    """Then there is no second pass through the cache."""
    rows = rollout.load_prompts(rollout.TOY / "train.jsonl")
    live = [i for i, row in enumerate(rows) if row["family"] == "rnd"][:6]  # answers of one digit
    engine = rollout.TransformersEngine(*toy)
    trajectories = sample(engine, toy[1], rows, live, [0], samples=16, max_tokens=1)
    assert set(trajectories.length.flatten().tolist()) == {1}
    groups = live_pieces(trajectories)
    assert groups
    sketcher = GradientSketcher(copy.deepcopy(moved), k=K, sparse_ratio=0.1, seed=1)
    matrices = dense_projection(sketcher)
    sketch, _ = sketcher.sketch(collate(trajectories, groups, moved.device), TEMPERATURE)
    for row, piece in enumerate(groups):
        expected = autograd_sketch(moved, trajectories, piece, matrices)
        assert (sketch[row] - expected).norm() <= 1e-4 * expected.norm()


def test_models_with_other_weight_matrices_are_refused():
    tiny = {"n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": 41, "n_positions": 64}
    with pytest.raises(rollout.BadInput, match=r"transformer\.h\.0\.attn"):
        GradientSketcher(GPT2LMHeadModel(GPT2Config(**tiny)), k=K, sparse_ratio=0.1, seed=0)  # its layers are Conv1D


def test_pass_rate_norm_and_sample_size_belong_to_their_prompt(small_world):
    world, out, data = small_world, small_world / "g", str(small_world / "train.jsonl")
    rollout.rollout(out=world / "t", data=data)
    project.project(trajectories=world / "t", out=out, k=256, sparse_ratio=1.0)
    tensors, rewards = load_folder(out, "gradients"), load_all(world / "t").rewards
    rates = rewards.mean(1)
    assert tensors["prompt_index"].tolist() == [i for i in range(60) if 0 < rates[i] < 1]
    for row, i in enumerate(tensors["prompt_index"].tolist()):
        assert tensors["pass_rate"][row] == pytest.approx(rates[i])
        assert tensors["grad_norm"][row] == pytest.approx(np.linalg.norm(tensors["sketch"][row]), rel=1e-5)
        assert tensors["ess_token"][row] == pytest.approx(1, abs=1e-4)  # θ is still β
    for stored, gradients in zip(sorted((world / "t").iterdir()), sorted(out.iterdir()), strict=True):
        assert stored.name == gradients.name
        recipe = rollout.peek(gradients)["recipe"]
        assert recipe["inputs"] == {
            "model": rollout.model_identity(TOY / "model"),
            "data": rollout.load_prompts(data).digest,
        }
        made_from = rollout.peek(stored)
        assert recipe["shard"] == made_from["recipe"]["shard"] | {"trajectories": made_from["identity"]}


@pytest.mark.parametrize("batch_tokens", [1, 60])  # trajectories one by one; groups in pieces, and whole ones
def test_micro_batches_change_nothing(small_world, moved, toy, batch_tokens):
    w, files = small_world, {}
    rollout.rollout(out=w / "t", data=str(w / "train.jsonl"), samples=6)
    save_descendant(w / "model", moved, toy[1])
    for name, options in {"whole": {}, "pieces": {"batch_tokens": batch_tokens}}.items():
        project.project(trajectories=w / "t", out=w / name, model=w / "model", k=256, halves=25, **options)
        files[name] = load_folder(w / name, "gradients")
    whole, pieces = files["whole"], files["pieces"]
    assert set(whole) == set(pieces) and 5 < len(whole["half_index"]) < len(whole["prompt_index"])
    for name in whole:  # the same rows in the same order
        exact = 0 if name.endswith("_index") else 1
        np.testing.assert_allclose(whole[name], pieces[name], rtol=2e-3 * exact, atol=2e-5 * exact, err_msg=name)


def near(ours: np.ndarray, theirs: np.ndarray) -> bool:
    """Rows (N, k) equal to 1e-5 of their norm."""
    return (np.linalg.norm(ours - theirs, axis=1) <= 1e-5 * np.linalg.norm(theirs, axis=1)).all()


def test_another_size_of_shards_changes_no_gradient(small_world, moved, toy):
    w, files = small_world, []
    save_descendant(w / "model", moved, toy[1])
    for size in (512, 7):
        rollout.rollout(out=w / f"t-{size}", data=str(w / "train.jsonl"), shard=size)
        project.project(trajectories=w / f"t-{size}", out=w / f"g-{size}", model=w / "model", k=256, halves=30)
        files.append(load_folder(w / f"g-{size}", "gradients"))
        assert len(list((w / f"g-{size}").iterdir())) == {512: 4, 7: 9}[size]
    default, small = files
    assert set(default) == set(small)
    for name in ("prompt_index", "half_index", "pass_rate"):
        np.testing.assert_array_equal(default[name], small[name], err_msg=name)
    assert len(default["half_index"]) > 5
    assert near(small["sketch"], default["sketch"]) and near(small["half_sketch"], default["half_sketch"])
    for name in set(default) - {"sketch", "half_sketch", "prompt_index", "half_index", "pass_rate"}:
        np.testing.assert_allclose(small[name], default[name], rtol=1e-4, atol=1e-5, err_msg=name)


def test_which_prompts_are_halved_hangs_on_seed_and_prompt_alone(small_world, moved, toy):
    """Not on the model, the trajectories, the shards, or which prompts happen to be live."""
    w, data = small_world, str(small_world / "train.jsonl")
    save_descendant(w / "model", moved, toy[1])
    for name, options in {"a": {}, "b": {"samples": 16, "seed": 7, "shard": 11}}.items():
        rollout.rollout(out=w / name, data=data, **options)
    made, halved = {}, {}
    for name, stored, options in (
        ("first", "a", {}),
        ("moved", "a", {"model": w / "model"}),
        ("fresh", "b", {}),
        ("seed", "a", {"seed": 1}),
    ):
        project.project(trajectories=w / stored, out=w / f"g-{name}", k=64, halves=30, **options)
        tensors = load_folder(w / f"g-{name}", "gradients")
        made[name], halved[name] = (set(tensors[of].tolist()) for of in ("prompt_index", "half_index"))
        assert 5 < len(halved[name]) < 30 and halved[name] < made[name]
    assert halved["first"] == halved["moved"]
    both = made["first"] & made["fresh"]
    assert made["first"] != made["fresh"] and len(both) > 10
    assert halved["first"] & both == halved["fresh"] & both
    assert halved["first"] != halved["seed"]
    project.project(trajectories=w / "a", out=w / "g-all", k=64, halves=60)
    everything = load_folder(w / "g-all", "gradients")
    assert everything["half_index"].tolist() == everything["prompt_index"].tolist() == sorted(made["first"])


def test_an_odd_number_of_trajectories_has_no_halves(small_world):
    rollout.rollout(out=small_world / "t", data=str(small_world / "train.jsonl"), samples=5)
    project.project(trajectories=small_world / "t", out=small_world / "g", k=64)
    tensors = load_folder(small_world / "g", "gradients")
    assert (
        len(tensors["sketch"]) > 5 and tensors["half_sketch"].shape == (0, 64) and tensors["half_index"].shape == (0,)
    )


@pytest.mark.parametrize("script", ["project", "train"])
def test_models_are_let_go_of(small_world, monkeypatch, script):
    """Without help of the cyclic garbage collector, which may come late: a model is gigabytes."""
    w, models, data = small_world, [], str(small_world / "train.jsonl")
    rollout.rollout(out=w / "t", data=data)
    load = rollout.load_model

    def watched(*args):
        model, tokenizer = load(*args)
        models.append(weakref.ref(model))
        return model, tokenizer

    monkeypatch.setattr(rollout, "load_model", watched)
    gc.collect()
    gc.disable()
    try:
        if script == "project":
            project.project(trajectories=w / "t", out=w / "g", k=64)
        else:
            save_selection(w / "s", data, range(20))
            train.train(selection=w / "s", out=w / "o", data=data, steps=1, dtype="bfloat16")
        assert models and all(model() is None for model in models)
    finally:
        gc.enable()


def test_bfloat16_gives_nearly_the_same_directions(small_world):
    w = small_world
    rollout.rollout(out=w / "t", data=str(w / "train.jsonl"))
    found = []
    for dtype in ("float32", "bfloat16"):
        project.project(trajectories=w / "t", out=w / dtype, k=256, dtype=dtype, halves=0)
        found.append(load_folder(w / dtype, "gradients")["sketch"])
    cosine = (found[0] * found[1]).sum(1) / np.linalg.norm(found[0], axis=1) / np.linalg.norm(found[1], axis=1)
    assert found[1].dtype == np.float32 and cosine.min() > 0.97 and cosine.max() < 1 - 1e-7


def test_worked_examples_of_the_docstrings():
    results = doctest.testmod(project, optionflags=doctest.ELLIPSIS)
    assert results.attempted >= 4 and results.failed == 0


def test_diagnostics_by_brute_force(small_world, moved, toy):
    """Of a policy that has moved; against log-probs that transformers computes one trajectory at a time."""
    world, out = small_world, small_world / "g"
    rollout.rollout(out=world / "t", data=str(world / "train.jsonl"))
    stored = load_all(world / "t")
    save_descendant(world / "moved", moved, toy[1])
    project.project(trajectories=world / "t", model=world / "moved", out=out, k=64, halves=15)
    tensors = load_folder(out, "gradients")
    names = ("token_kl", "mean_change", "largest_change", "ess_token", "ess_trajectory")
    expected: dict[str, list[float]] = {name: [] for name in names}
    live = [n for n in range(60) if np.ptp(stored.rewards[n]) > 0]
    for n in live:
        group = []
        for k in range(8):
            ids, start, behavior = sequence(stored, n, k)
            with torch.no_grad():
                logps = torch.log_softmax(moved(ids[None]).logits[0], -1)[start - 1 : -1]
            group.append(logps.gather(1, ids[start:, None])[:, 0].double().numpy() - behavior)
        change, product = np.concatenate(group), np.exp([x.sum() for x in group])
        rho = np.exp(change)
        expected["token_kl"].append(np.mean(rho - 1 - change))
        expected["mean_change"].append(abs(change).mean())
        expected["largest_change"].append(abs(change).max())
        expected["ess_token"].append(rho.sum() ** 2 / len(rho) / (rho**2).sum())
        expected["ess_trajectory"].append(product.sum() ** 2 / len(product) / (product**2).sum())
    assert tensors["prompt_index"].tolist() == live
    for name, values in expected.items():
        assert tensors[name].tolist() == pytest.approx(values, rel=1e-3, abs=1e-6), name
    means = {name: np.mean(values) for name, values in expected.items()}
    means |= {"largest_change": max(expected["largest_change"]), "live_prompts": len(live)}
    assert cropi.select.of_gradients(out, {}, 60)[1] == pytest.approx(means, rel=1e-3)
    count = len(tensors["half_index"])
    assert 0 < count < 15 and tensors["half_sketch"].shape == (count, 64) and set(tensors["half_index"]) < set(live)


MEMORY = """
import resource, sys
from pathlib import Path
import project
peaks = []
for name in sys.argv[1:]:
    project.project(trajectories=Path(name), out=Path(f"{name}-gradients"), k=32768)
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
print(*peaks)
"""


def test_peak_memory_does_not_grow_with_the_number_of_prompts(tmp_path):
    """90 and 1,000 live prompts and more, in shards of one size; held in memory, the sketches of the latter would take
    130 MB."""
    lines = (rollout.TOY / "train.jsonl").read_text().splitlines(keepends=True)[:200]
    (tmp_path / "few.jsonl").write_text("".join(lines))
    for name, data in (("few", tmp_path / "few.jsonl"), ("many", rollout.TOY / "train.jsonl")):
        rollout.rollout(out=tmp_path / name, data=str(data), shard=25)
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, tmp_path / "few", tmp_path / "many"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    few, many = map(int, done.stdout.splitlines()[-1].split())
    unit = 1 if sys.platform == "darwin" else 1024
    assert sum(path.stat().st_size for path in (tmp_path / "many-gradients").iterdir()) > 125e6
    assert (many - few) * unit < 40e6


def test_weights_too_large_for_float32_are_refused_and_a_cap_helps(moved, ragged):
    batch = collate(ragged, live_pieces(ragged)[:2], moved.device)
    batch.behavior_logps = batch.behavior_logps - 60  # as after a very long answer
    for cap, finite in ((None, False), (5.0, True)):
        sketcher = GradientSketcher(copy.deepcopy(moved), K, 1.0, seed=1, ratio="sequence", cap=cap)
        assert torch.isfinite(sketcher.sketch(batch, TEMPERATURE)[0]).all() == finite


def test_a_ratio_that_keeps_nothing_is_refused(small_world):
    rollout.rollout(out=small_world / "t", data=str(small_world / "train.jsonl"))
    with pytest.raises(rollout.BadInput, match="--sparse-ratio 1e-09 keeps no coordinate"):
        project.project(trajectories=small_world / "t", out=small_world / "g", k=64, sparse_ratio=1e-9)
    assert not (small_world / "g").exists()


def test_an_embedding_that_scales_is_refused_where_its_weight_is_tied():
    """As Gemma's: the output head has the same weight, but the embedding's part of the gradient would be lost."""
    tiny = {"vocab_size": 41, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 8}
    config = GemmaConfig(**tiny, num_attention_heads=2, num_key_value_heads=1)
    with pytest.raises(rollout.BadInput, match=r"embed_tokens\.weight: per-prompt gradients support only"):
        GradientSketcher(GemmaForCausalLM(config), k=K, sparse_ratio=1.0, seed=0)


def test_layers_derived_from_linear_ones_are_refused(toy):
    """What they do after the product is not known."""
    model = copy.deepcopy(toy[0])

    class Scaled(nn.Linear):
        pass

    model.lm_head.__class__ = Scaled
    with pytest.raises(rollout.BadInput, match=r"lm_head"):
        GradientSketcher(model, k=K, sparse_ratio=1.0, seed=0)
