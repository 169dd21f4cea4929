"""Sketches from the batched hooks against plain autograd, one prompt at a time."""

import copy
import doctest
import gc
import subprocess
import sys
import weakref

import numpy as np
import pytest
import torch
from conftest import ROOT, TEMPERATURE, TOY
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import project
import rollout
import train
from project import GradientSketcher, SparseProjection
from train import Batch, collate, group_advantages

K = 512


def dense_projection(sketcher: GradientSketcher) -> dict[str, torch.Tensor]:
    """P M as explicit matrices (k, d) for each parameter tensor, from the description at the head of project.py."""
    matrices, k = {}, sketcher.projection.k
    for name, (sign, scale, shifts) in sketcher.projection.blocks.items():
        matrices[name] = torch.zeros(k, len(sign))
        for j, value in enumerate(sign.tolist()):
            matrices[name][(j + shifts[j // k]) % k, j] = value * scale
    return matrices


def autograd_sketch(model, trajectories, rows, matrices, ratio="token", advantage_rows=None) -> torch.Tensor:
    """P M ĝ of equation 2 for one prompt, trajectory by trajectory, by plain autograd."""
    rewards = trajectories.rewards[rows if advantage_rows is None else advantage_rows].astype(np.float64)
    advantages = (trajectories.rewards[rows] - rewards.mean()) / (rewards.std(ddof=1) + 1e-6)
    model = copy.deepcopy(model).requires_grad_(True)
    for m, advantage in zip(rows, advantages, strict=True):
        ids = torch.tensor(trajectories.tokens[trajectories.offsets[m] : trajectories.offsets[m + 1]].astype(np.int64))
        n = int(trajectories.prompt_length[m])
        logps = torch.log_softmax(model(ids[None]).logits[0] / TEMPERATURE, -1)[n - 1 : -1]
        logps = logps.gather(1, ids[n:, None])[:, 0]
        behavior = trajectories.behavior_logps[trajectories.logp_offsets[m] : trajectories.logp_offsets[m + 1]]
        rho = (logps.detach() - torch.tensor(behavior)).exp()
        weight = {
            "none": 1.0,
            "token": rho,
            "prefix": torch.stack([rho[: t + 1].prod() for t in range(len(rho))]),
            "sequence": rho.prod(),
        }[ratio]
        (advantage * (weight * logps).mean() / len(rows)).backward()
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
    live = list(ragged.live_groups().items())
    batch = collate(ragged, live, case.device)
    assert (batch.prompt_mask == 0).any() and (batch.mask == 0).any()
    sketch, logps = sketcher.sketch(batch, TEMPERATURE)
    assert ((logps - batch.behavior_logps) * batch.mask).abs().max() > 0.1  # π_θ ≠ β
    for row, (_, rows) in enumerate(live):  # every position in the batch
        expected = autograd_sketch(case, ragged, rows, matrices)
        assert (sketch[row] - expected).norm() <= 1e-4 * expected.norm()


@pytest.mark.parametrize("ratio", ["none", "prefix", "sequence"])
def test_other_estimators_equal_autograd(moved, ragged, ratio):
    live = list(ragged.live_groups().items())[:5]
    batch = collate(ragged, live, moved.device)
    token, _ = GradientSketcher(copy.deepcopy(moved), K, 1.0, seed=1).sketch(batch, TEMPERATURE)
    sketcher = GradientSketcher(copy.deepcopy(moved), K, 1.0, seed=1, ratio=ratio)
    sketch, _ = sketcher.sketch(batch, TEMPERATURE)
    matrices = dense_projection(sketcher)
    for row, (_, rows) in enumerate(live):
        expected = autograd_sketch(moved, ragged, rows, matrices, ratio)
        assert (sketch[row] - expected).norm() <= 1e-4 * expected.norm()
    assert (token - sketch).norm() > 1e-2 * sketch.norm()  # another estimate than the default


def test_estimators_agree_while_the_policy_is_still_beta(toy, ragged):
    """The engine's log-probs aside: β's are computed here as π's are."""
    batch = collate(ragged, list(ragged.live_groups().items()), toy[0].device)
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
    pi = torch.tensor([[0.9, 0.2], [0.5, 1.0]]).log().requires_grad_(True)  # the last one is padding
    beta = torch.tensor([[0.3, 0.4], [0.25, 1.0]]).log()  # ratios 3, 1/2 and 2: far outside 1 ± 0.2
    batch = Batch(
        prompt_index=[0],
        prompt_ids=torch.zeros(1, 1),
        prompt_mask=torch.ones(1, 1),
        completion_ids=torch.zeros(2, 2),
        mask=torch.tensor([[1.0, 1.0], [1.0, 0.0]]),
        behavior_logps=beta,
        advantages=group_advantages(torch.tensor([[1.0, 0.0]]))[0],  # ±(1/2) / √(1/2) = ±0.70711
    )
    project.off_policy_objective(pi, batch, "token").sum().backward()
    # 3 · 0.70711 / 4, 0.5 · 0.70711 / 4; -2 · 0.70711 / 2
    torch.testing.assert_close(pi.grad, torch.tensor([[0.53033, 0.08839], [-0.70711, 0.0]]), rtol=1e-4, atol=1e-6)


def test_cap_bounds_the_weights():
    pi, beta = torch.tensor([[0.9, 0.2]]).log(), torch.tensor([[0.3, 0.4]]).log()
    assert project.importance_weights(pi, beta, "token", cap=2.0)[0].tolist() == pytest.approx([2.0, 0.5])
    assert project.importance_weights(pi, beta, "prefix", cap=1.6)[0].tolist() == pytest.approx([1.6, 1.5])


def test_halves_are_those_of_the_trajectories(moved, ragged):
    sketcher = GradientSketcher(copy.deepcopy(moved), K, 1.0, seed=1)
    live = list(ragged.live_groups().items())
    batch = collate(ragged, live, moved.device)
    whole, _ = sketcher.sketch(batch, TEMPERATURE)
    halves = sketcher.sketch(project.split_groups(batch, 2), TEMPERATURE)[0].view(len(live), 2, K)
    assert ((halves.mean(1) - whole).norm(dim=1) <= 1e-5 * whole.norm(dim=1)).all()
    matrices = dense_projection(sketcher)
    for row, (_, rows) in list(enumerate(live))[:3]:
        for half, some in enumerate((rows[:3], rows[3:])):
            expected = autograd_sketch(moved, ragged, some, matrices, advantage_rows=rows)
            assert (halves[row, half] - expected).norm() <= 1e-4 * expected.norm() + 1e-7


@pytest.mark.parametrize("change", ["order", "padding", "slices"])
def test_batching_changes_nothing(moved, ragged, change):
    sketcher = GradientSketcher(copy.deepcopy(moved), k=K, sparse_ratio=0.1, seed=1)
    live = ragged.live_groups()
    batch = collate(ragged, list(live.items()), moved.device)
    whole, _ = sketcher.sketch(batch, TEMPERATURE)
    whole = dict(zip(batch.prompt_index, whole, strict=True))
    batches = [collate(ragged, list(live.items())[::-1], moved.device) if change == "order" else batch]
    if change == "padding":  # three more columns of it on either side
        for name, side in (("prompt_ids", (3, 0)), ("prompt_mask", (3, 0))):
            setattr(batch, name, nn.functional.pad(getattr(batch, name), side))
        for name in ("completion_ids", "mask", "behavior_logps"):
            setattr(batch, name, nn.functional.pad(getattr(batch, name), (0, 3)))
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
    trajectories = rollout.sample_trajectories(
        rollout.TransformersEngine(*toy), toy[1], [rows[i] for i in live], live, "exact",
        samples=16, max_tokens=1, temperature=TEMPERATURE, seed=[0],
    )  # fmt: skip
    assert set(trajectories.completion_length.tolist()) == {1}
    groups = list(trajectories.live_groups().items())
    assert groups
    sketcher = GradientSketcher(copy.deepcopy(moved), k=K, sparse_ratio=0.1, seed=1)
    matrices = dense_projection(sketcher)
    sketch, _ = sketcher.sketch(collate(trajectories, groups, moved.device), TEMPERATURE)
    for row, (_, rows) in enumerate(groups):
        expected = autograd_sketch(moved, trajectories, rows, matrices)
        assert (sketch[row] - expected).norm() <= 1e-4 * expected.norm()


def test_models_with_other_weight_matrices_are_refused():
    tiny = {"n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": 41, "n_positions": 64}
    with pytest.raises(rollout.BadInput, match=r"transformer\.h\.0\.attn"):
        GradientSketcher(GPT2LMHeadModel(GPT2Config(**tiny)), k=K, sparse_ratio=0.1, seed=0)  # its layers are Conv1D


def test_pass_rate_norm_and_sample_size_belong_to_their_prompt(small_world):
    world, out = small_world, small_world / "g.safetensors"
    rolled = rollout.rollout(out=world / "t.safetensors", data=world / "train.jsonl")
    project.project(trajectories=world / "t.safetensors", out=out, k=256, sparse_ratio=1.0)
    tensors, metadata = rollout.open_tensors(out, "gradients")
    assert sorted(tensors["prompt_index"]) == sorted(rolled.live_groups())
    rates = rolled.pass_rates()
    for row, i in enumerate(tensors["prompt_index"].tolist()):
        assert tensors["pass_rate"][row] == pytest.approx(rates[i])
        assert tensors["grad_norm"][row] == pytest.approx(np.linalg.norm(tensors["sketch"][row]), rel=1e-5)
        assert tensors["ess_token"][row] == pytest.approx(1, abs=1e-4)  # θ is still β
    assert metadata["data"] == rollout.digest(world / "train.jsonl")


@pytest.mark.parametrize("batch_tokens", [1, 60])  # trajectories one by one; groups in pieces, and whole ones
def test_micro_batches_change_nothing(small_world, moved, batch_tokens):
    w = small_world
    rollout.rollout(out=w / "t", data=w / "train.jsonl", samples=6)
    moved.config.cropi_ancestors = [rollout.digest(TOY / "model")]
    moved.save_pretrained(w / "model")
    rollout.load_model(TOY / "model")[1].save_pretrained(w / "model")
    files = {}
    for name, options in {"whole": {}, "pieces": {"batch_tokens": batch_tokens}}.items():
        project.project(trajectories=w / "t", out=w / name, model=w / "model", k=256, halves=9, **options)
        files[name], _ = rollout.open_tensors(w / name, "gradients")
    whole, pieces = files["whole"], files["pieces"]
    assert set(whole) == set(pieces) and len(whole["half_index"]) == 9
    assert sorted(whole["half_index"]) == sorted(pieces["half_index"])
    for name in set(whole) - {"half_index", "half_sketch"}:
        a, b = (tensors[name][np.argsort(tensors["prompt_index"])] for tensors in (whole, pieces))
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-5, err_msg=name)
    a, b = (tensors["half_sketch"][np.argsort(tensors["half_index"])] for tensors in (whole, pieces))
    np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-5)


@pytest.mark.parametrize("script", ["project", "train"])
def test_models_are_let_go_of(small_world, monkeypatch, script):
    """Without help of the cyclic garbage collector, which may come late: a model is gigabytes."""
    w, models = small_world, []
    rollout.rollout(out=w / "t", data=w / "train.jsonl")
    module = {"project": project, "train": train}[script]
    load = rollout.load_model

    def watched(*args):
        model, tokenizer = load(*args)
        models.append(weakref.ref(model))
        return model, tokenizer

    monkeypatch.setattr(module, "load_model", watched)
    gc.collect()
    gc.disable()
    try:
        if script == "project":
            project.project(trajectories=w / "t", out=w / "g", k=64)
        else:
            tensors = {"ranked": np.arange(20), "score": np.zeros(20)}
            rollout.save_tensors(w / "s", "selection", tensors, {"data": rollout.digest(w / "train.jsonl")})
            train.train(selection=w / "s", out=w / "o", data=w / "train.jsonl", steps=1, dtype="bfloat16")
        assert models and all(model() is None for model in models)
    finally:
        gc.enable()


def test_bfloat16_gives_nearly_the_same_directions(small_world):
    w = small_world
    rollout.rollout(out=w / "t", data=w / "train.jsonl")
    found = []
    for dtype in ("float32", "bfloat16"):
        project.project(trajectories=w / "t", out=w / dtype, k=256, dtype=dtype, halves=0)
        tensors, _ = rollout.open_tensors(w / dtype, "gradients")
        found.append(tensors["sketch"][np.argsort(tensors["prompt_index"])])
    cosine = (found[0] * found[1]).sum(1) / np.linalg.norm(found[0], axis=1) / np.linalg.norm(found[1], axis=1)
    assert found[1].dtype == np.float32 and cosine.min() > 0.97 and cosine.max() < 1 - 1e-7


def test_worked_examples_of_the_docstrings():
    results = doctest.testmod(project, optionflags=doctest.ELLIPSIS)
    assert results.attempted >= 4 and results.failed == 0


def test_diagnostics_by_brute_force(small_world, moved, toy):
    """Of a policy that has moved; against log-probs that transformers computes one trajectory at a time."""
    world, out = small_world, small_world / "g.safetensors"
    stored = rollout.rollout(out=world / "t.safetensors", data=world / "train.jsonl")
    moved.config.cropi_ancestors = [rollout.digest(rollout.TOY / "model")]
    moved.save_pretrained(world / "moved")
    del moved.config.cropi_ancestors
    toy[1].save_pretrained(world / "moved")
    found = project.project(trajectories=world / "t.safetensors", model=world / "moved", out=out, k=64, halves=7)
    tensors, metadata = rollout.open_tensors(out, "gradients")
    expected: dict[str, dict[int, float]] = {name: {} for name in project.STALENESS}
    for i, rows in stored.live_groups().items():
        group = []
        for m in rows:
            ids = torch.tensor(stored.tokens[stored.offsets[m] : stored.offsets[m + 1]].astype(np.int64))
            n = int(stored.prompt_length[m])
            with torch.no_grad():
                logps = torch.log_softmax(moved(ids[None]).logits[0], -1)[n - 1 : -1].gather(1, ids[n:, None])[:, 0]
            behavior = stored.behavior_logps[stored.logp_offsets[m] : stored.logp_offsets[m + 1]]
            group.append(logps.double().numpy() - behavior)
        change, product = np.concatenate(group), np.exp([x.sum() for x in group])
        rho = np.exp(change)
        expected["token_kl"][i] = np.mean(rho - 1 - change)
        expected["mean_change"][i] = abs(change).mean()
        expected["largest_change"][i] = abs(change).max()
        expected["ess_token"][i] = rho.sum() ** 2 / len(rho) / (rho**2).sum()
        expected["ess_trajectory"][i] = product.sum() ** 2 / len(product) / (product**2).sum()
    index = tensors["prompt_index"].tolist()
    means = {name: np.mean(list(values.values())) for name, values in expected.items()}
    means |= {"largest_change": max(expected["largest_change"].values()), "live_prompts": len(index)}
    for name, values in expected.items():
        assert tensors[name].tolist() == pytest.approx([values[i] for i in index], rel=1e-3, abs=1e-6)
    assert found == metadata["diagnostics"] == pytest.approx(means, rel=1e-3)
    assert tensors["half_sketch"].shape == (7, 64) and set(tensors["half_index"]) < set(index)


MEMORY = """
import resource, sys
from pathlib import Path
import project
peaks = []
for name in sys.argv[1:]:
    project.project(trajectories=Path(name), out=Path("big.safetensors"), k=32768)
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
print(*peaks)
"""


def test_peak_memory_does_not_grow_with_the_number_of_prompts(tmp_path):
    """90 and 1,000 live prompts and more; held in memory, the sketches of the latter would take 130 MB."""
    rollout.rollout(out=tmp_path / "many.safetensors")
    lines = (rollout.TOY / "train.jsonl").read_text().splitlines(keepends=True)[:200]
    (tmp_path / "few.jsonl").write_text("".join(lines))
    rollout.rollout(out=tmp_path / "few.safetensors", data=tmp_path / "few.jsonl")
    names = [tmp_path / "few.safetensors", tmp_path / "many.safetensors"]
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, *names],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    few, many = map(int, done.stdout.splitlines()[-1].split())
    unit = 1 if sys.platform == "darwin" else 1024
    assert (tmp_path / "big.safetensors").stat().st_size > 125e6
    assert (many - few) * unit < 40e6


def test_weights_too_large_for_float32_are_refused_and_a_cap_helps(moved, ragged):
    live = list(ragged.live_groups().items())[:2]
    batch = collate(ragged, live, moved.device)
    batch.behavior_logps = batch.behavior_logps - 60  # as after a very long answer
    for cap, finite in ((None, False), (5.0, True)):
        sketcher = GradientSketcher(copy.deepcopy(moved), K, 1.0, seed=1, ratio="sequence", cap=cap)
        assert torch.isfinite(sketcher.sketch(batch, TEMPERATURE)[0]).all() == finite


def test_a_ratio_that_keeps_nothing_is_refused(small_world):
    rollout.rollout(out=small_world / "t.safetensors", data=small_world / "train.jsonl")
    with pytest.raises(rollout.BadInput, match="--sparse-ratio 1e-09 keeps no coordinate"):
        project.project(
            trajectories=small_world / "t.safetensors", out=small_world / "g.safetensors", k=64, sparse_ratio=1e-9
        )
    assert not (small_world / "g.safetensors").exists()


def test_layers_derived_from_linear_ones_are_refused(toy):
    """What they do after the product is not known."""
    model = copy.deepcopy(toy[0])

    class Scaled(nn.Linear):
        pass

    model.lm_head.__class__ = Scaled
    with pytest.raises(rollout.BadInput, match=r"lm_head"):
        GradientSketcher(model, k=K, sparse_ratio=1.0, seed=0)
