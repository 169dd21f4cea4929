"""Sketches from the batched hooks against plain autograd, one prompt at a time."""

import copy
import doctest
import gc
import itertools
import math
import os
import subprocess
import sys
import weakref
from functools import partial
from typing import get_args

import numpy as np
import pytest
import torch
from conftest import ROOT, TEMPERATURE, TOY, load_all, load_folder, sample, save_descendant, save_selection, sequence
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GemmaConfig, GemmaForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import cropi
import project
import rollout
import train
from project import GradientSketcher, SparseProjection, project_groups
from train import collate

BUCKETS = 512


def live_pieces(trajectories) -> list[train.Piece]:
    """Every live group, whole."""
    return [(int(n), range(trajectories.samples)) for n in trajectories.live()]


def dense_projection(sketcher: GradientSketcher) -> dict[str, torch.Tensor]:
    """Φ M as explicit matrices (k, d) for each parameter tensor, from the description at the head of project.py."""
    matrices, k = {}, sketcher.projection.k
    q = max(n for n in range(2, k + 1) if all(n % i for i in range(2, n)))
    for name, (row, column, kept, scale, shift) in sketcher.projection.blocks.items():
        d = len(row) * len(column)
        values = torch.tensor([[r * c * scale for c in column.tolist()] for r in row[:, 0].tolist()])
        matrices[name] = torch.zeros(k, d)
        matrices[name][(shift + torch.arange(d)) % q, torch.arange(d)] = (
            values if kept is None else values * kept
        ).view(d)
    return matrices


def autograd_sketch(
    model, trajectories, piece, matrices, ratio="token", weights=None, scale: bool = True
) -> torch.Tensor:
    """Φ M ĝ of equation 2 for one piece, with the advantages of its group, by plain autograd, one trajectory at a
    time. `weights`: of a token of each trajectory, in place of 1/|τ|."""
    n, ks = piece
    rewards = trajectories.rewards[n].astype(np.float64)
    advantages = (rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-6 if scale else 1)
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
        each = 1 / len(logps) if weights is None else weights[k]
        (advantages[k] * each * (weight * logps).sum() / len(ks)).backward()
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
    sketcher = GradientSketcher(copy.deepcopy(case), k=BUCKETS, sparse_ratio=sparse_ratio, seed=1)
    matrices = dense_projection(sketcher)
    left_out = {name for name, _ in case.named_parameters()} - set(matrices)
    assert all("norm" in name for name in left_out)
    live = live_pieces(ragged)
    batch = collate(ragged, live, case.device)
    assert len(set((batch.segment == 0).sum(1).tolist())) > 1 and (batch.segment[:, -1] == -1).any()
    sketch, logps = sketcher.sketch(batch, TEMPERATURE)
    assert (logps - batch.behavior_logps).abs().max() > 0.1  # π_θ ≠ β
    for row, piece in enumerate(live):  # every position in the batch
        expected = autograd_sketch(case, ragged, piece, matrices)
        assert (sketch[row] - expected).norm() <= 1e-4 * expected.norm()


@pytest.mark.parametrize("ratio", ["none", "prefix", "sequence"])
def test_other_estimators_equal_autograd(moved, ragged, ratio):
    live = live_pieces(ragged)[:5]
    batch = collate(ragged, live, moved.device)
    token, _ = GradientSketcher(copy.deepcopy(moved), BUCKETS, 1.0, seed=1).sketch(batch, TEMPERATURE)
    sketcher = GradientSketcher(copy.deepcopy(moved), BUCKETS, 1.0, seed=1, ratio=ratio)
    sketch, _ = sketcher.sketch(batch, TEMPERATURE)
    matrices = dense_projection(sketcher)
    for row, piece in enumerate(live):
        expected = autograd_sketch(moved, ragged, piece, matrices, ratio)
        assert (sketch[row] - expected).norm() <= 1e-4 * expected.norm()
    assert (token - sketch).norm() > 1e-2 * sketch.norm()  # another estimate than the default


def test_estimators_agree_while_the_policy_is_still_beta(toy, ragged):
    """The engine's log-probs aside: β's are computed here as π's are."""
    batch = collate(ragged, live_pieces(ragged), toy[0].device)
    sketcher = GradientSketcher(copy.deepcopy(toy[0]), BUCKETS, 1.0, seed=1)
    _, batch.behavior_logps = sketcher.sketch(batch, TEMPERATURE)
    sketches = []
    for sketcher.ratio in get_args(project.Ratio):
        sketches.append(sketcher.sketch(batch, TEMPERATURE)[0])
        assert ((sketches[-1] - sketches[0]).norm(dim=1) <= 1e-6 * sketches[0].norm(dim=1)).all()
    assert len(sketches) == 4


def test_released_formula_by_hand():
    """Two trajectories of 2 tokens and 1, rewards 1 and 0: token ratio, group mean and standard deviation, mean over
    the sequence, no clipping. ∂/∂log π of what ĝ is the gradient of is ρ_it Â_i / (K |τ_i|), ∇log π being the rest."""
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


@pytest.mark.parametrize("size", [4, 8])
def test_neither_half_has_the_better_trajectories(size):
    """Over all groups with so many right answers: a right answer too many is in each half equally often."""
    for right in range(1, size):
        differences = []
        for places in itertools.combinations(range(size), right):
            rewards = np.isin(np.arange(size), places).astype(np.float32)
            first, second = train.halves(rewards)
            assert sorted([*first, *second]) == list(range(size))
            differences.append(rewards[first].sum() - rewards[second].sum())
        assert max(np.abs(differences)) == right % 2 and sum(differences) == 0


@pytest.mark.parametrize("batch_tokens", [60, 10**6])  # groups in pieces; all at once
def test_halves_are_those_of_the_trajectories(moved, ragged, batch_tokens):
    """Half by half for every second prompt, whole for the others."""
    sketcher, groups = GradientSketcher(copy.deepcopy(moved), BUCKETS, 1.0, seed=1), ragged.take(ragged.live())
    halved = np.arange(len(groups.rewards)) % 2 == 0
    whole, _ = sketcher.sketch(collate(groups, live_pieces(groups), moved.device), TEMPERATURE)
    tensors = project_groups(sketcher, groups, halved, TEMPERATURE, batch_tokens)
    sketch, first = (torch.from_numpy(tensors[name]) for name in ("sketch", "half_sketch"))
    assert ((sketch - whole).norm(dim=1) <= 1e-5 * whole.norm(dim=1)).all()
    assert tensors["half_index"].tolist() == groups.prompt_index[::2].tolist()
    assert first.shape == (halved.sum(), BUCKETS)
    second, matrices = 2 * sketch[halved] - first, dense_projection(sketcher)
    for row, n in list(enumerate(np.flatnonzero(halved)))[:3]:
        for half, ks in zip((first, second), train.halves(groups.rewards[n]), strict=True):
            expected = autograd_sketch(moved, groups, (n, ks), matrices)
            assert (half[row] - expected).norm() <= 1e-4 * expected.norm() + 1e-7


@pytest.mark.parametrize("change", ["order", "padding", "slices", "long", "logits"])
def test_batching_changes_nothing(moved, ragged, change, monkeypatch):
    sketcher = GradientSketcher(copy.deepcopy(moved), k=BUCKETS, sparse_ratio=0.1, seed=1)
    live = live_pieces(ragged)
    batch = collate(ragged, live, moved.device)
    whole, _ = sketcher.sketch(batch, TEMPERATURE)
    whole = dict(zip(batch.prompt_index, whole, strict=True))
    batches = [collate(ragged, live[::-1], moved.device) if change == "order" else batch]
    if change == "padding":  # three more columns of it
        for name, value in (("ids", 0), ("position", 0), ("segment", -1)):
            setattr(batch, name, nn.functional.pad(getattr(batch, name), (0, 3), value=value))
    if change == "long":  # attention sequence by sequence
        monkeypatch.setattr(train, "LONG", 1)
    if change == "logits":  # those of a few columns at a time
        monkeypatch.setattr(train, "LOGITS", 5000)
    if change == "slices":  # weight gradients of one prompt at a time
        sketcher.together = 1
    for other in batches:
        for i, row in zip(other.prompt_index, sketcher.sketch(other, TEMPERATURE)[0], strict=True):
            assert (row - whole[i]).norm() <= 1e-4 * whole[i].norm()


def project_all(gradients: torch.Tensor, shapes: dict, keep: dict, k: int, seed: int) -> torch.Tensor:
    """Sketches (P, k) of gradients (P, all coordinates)."""
    projection, sketch = SparseProjection(shapes, keep, k, seed, gradients), torch.zeros(len(gradients), k)
    blocks = gradients.split([math.prod(shape) for shape in shapes.values()], 1)
    for (name, shape), block in zip(shapes.items(), blocks, strict=True):
        projection.add(sketch, name, block.clone().view(len(block), shape[0], -1))
    return sketch


MANY = {"a": (20,), "b": (10, 15), "c": (40, 4), "d": (3, 50)}


@pytest.mark.parametrize(
    ("shapes", "sparse_ratio", "share"),  # of the variance that pairs with equal signs add
    [(MANY, 0.3, 0), (MANY, 1.0, 0.02), ({"tall": (62, 6)}, 1.0, 0.15), ({"wide": (6, 62)}, 1.0, 0.15)],
)
def test_inner_products_have_the_mean_and_the_variance_of_theory(shapes, sparse_ratio, share):
    """Over 6,000 seeds, for two gradients that resemble each other and have a few large coordinates, by enumeration of
    all pairs of coordinates. Some tensors have more rows or columns than there are buckets."""
    torch.manual_seed(0)
    k, q, seeds, d = 32, 31, 6000, sum(math.prod(shape) for shape in shapes.values())
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    first = torch.randn(d) * torch.where(torch.rand(d) < 0.05, 4.0, 1.0) + 2
    g = torch.stack([first, first + 0.5 * torch.randn(d)])
    keep = project.keep_probability(sizes, sparse_ratio)
    assert sum(keep[name] * size for name, size in sizes.items()) == pytest.approx(sparse_ratio * d)
    products = np.array([float(torch.prod(project_all(g, shapes, keep, k, seed), 0).sum()) for seed in range(seeds)])
    x, y = g.double().numpy()
    place = [(name, *divmod(j, sizes[name] // shapes[name][0]), j) for name in shapes for j in range(sizes[name])]
    p = np.array([keep[name] for name, *_ in place])
    variance, signs = ((1 / p - 1) * x**2 * y**2).sum(), {}
    for (i, (tensor, o, c, at)), (j, (other, o2, c2, at2)) in itertools.combinations(enumerate(place), 2):
        both = x[i] * y[j] + x[j] * y[i]
        if tensor != other:
            variance += both**2 / q
        elif at % q == at2 % q:
            variance += both**2
            sign = (tensor, frozenset({o, o2} if o != o2 else ()), frozenset({c, c2} if c != c2 else ()))
            signs.setdefault(sign, []).append(keep[tensor] * both)  # all four coordinates have to be kept
    same = [sum(of) ** 2 - sum(v**2 for v in of) for of in signs.values()]
    variance += sum(same)
    error = (variance / seeds) ** 0.5
    assert abs(products.mean() - x @ y) < 4 * error
    assert x @ y > 20 * error  # so that the line above can fail
    assert products.var() == pytest.approx(variance, rel=0.08)  # its standard error is 2 to 3%
    assert sum(same) > share * variance


def test_a_share_of_the_coordinates_is_kept():
    shapes, keep, seeds = {"a": (4, 5), "b": (30,)}, {"a": 0.3, "b": 1.0}, 2000
    found = torch.zeros(20)
    for seed in range(seeds):
        projection = SparseProjection(shapes, keep, 64, seed, torch.zeros(1))
        kept = projection.blocks["a"][2]
        found += kept.flatten()
        assert projection.coordinates == kept.sum() + 30 and projection.blocks["b"][2] is None
    assert (abs(found / seeds - 0.3) <= 5 * (0.21 / seeds) ** 0.5).all()


def test_coordinates_meet_as_the_head_of_the_file_says():
    """Unit vectors: where their sketches overlap."""
    meetings, seeds, shapes = np.zeros((20, 20)), 4000, {"a": (2, 4), "b": (12,)}
    for seed in range(seeds):
        place = project_all(torch.eye(20), shapes, dict.fromkeys(shapes, 1.0), 6, seed).abs().numpy()
        assert (place.sum(1) == 1).all() and (place[:, 5] == 0).all()  # q = 5
        meetings += place @ place.T
    tensor, at = np.repeat([0, 1], [8, 12]), np.concatenate([np.arange(8), np.arange(12)])
    same = tensor[:, None] == tensor
    assert (meetings[same] == (seeds * (at[:, None] % 5 == at % 5))[same]).all()
    assert abs(meetings[~same] / seeds - 1 / 5).max() < 5 * (1 / 5 * 4 / 5 / seeds) ** 0.5


def laps(gradients: torch.Tensor, k: int, seed: int) -> torch.Tensor:
    """Sketches as they were made before: a sign for each coordinate, laps of k, a random shift for each lap."""
    generator, d = torch.Generator().manual_seed(seed), gradients.shape[1]
    sign = torch.randint(0, 2, (d,), generator=generator) * 2 - 1
    shift = torch.randint(0, k, (math.ceil(d / k),), generator=generator)
    j = torch.arange(d)
    return torch.zeros(len(gradients), k).index_add_(1, (j + shift[j // k]) % k, gradients * sign)


@pytest.mark.parametrize("width", [512, 1536])  # share a large factor with k
def test_a_large_input_feature_does_not_fill_few_buckets(width):
    """Weight gradients of a layer with one input feature 30 times the others: cosines between twelve prompts."""
    k, errors = 4096, {"here": [], "laps": []}
    for seed in range(6):
        torch.manual_seed(seed)
        inputs, delta = torch.randn(12, 40, width), torch.randn(12, 40, width) + torch.randn(width)
        inputs[:, :, 7] *= 30
        g = (delta.mT @ inputs).flatten(1)
        cosines = [nn.functional.normalize(values) for values in (g, laps(g, k, seed))]
        cosines.append(nn.functional.normalize(project_all(g, {"w": (width, width)}, {"w": 1.0}, k, seed)))
        exact, before, here = (values @ values.T for values in cosines)
        errors["here"].append((here - exact).square().mean())
        errors["laps"].append((before - exact).square().mean())
    here, before = (torch.stack(values).mean().sqrt() for values in errors.values())
    assert here <= 1.1 * before


class Launches(TorchDispatchMode):
    """Counts operations, apart from views, which launch nothing."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += not function.is_view
        return function(*args, **(kwargs or {}))


def test_a_sketch_takes_few_launches_whatever_the_size():
    """Qwen2.5-1.5B's shapes at the paper's k; today's laps would be some 94,000."""
    shapes = {"embedding": (151936, 1536), "q": (1536, 1536), "q.bias": (1536,), "k": (256, 1536), "up": (8960, 1536)}
    shapes |= {"down": (1536, 8960)}
    for r in (0.1, 1.0):
        keep = project.keep_probability({name: math.prod(shape) for name, shape in shapes.items()}, r)
        with torch.device("meta"):
            gradients = {name: torch.empty(1, shape[0], *shape[1:] or (1,)) for name, shape in shapes.items()}
            sketch = torch.empty(1, 32768)
        projection = SparseProjection({}, {}, 32768, 0, sketch)
        for name, gradient in gradients.items():
            kept = torch.empty(gradient.shape[1:], dtype=torch.bool, device="meta") if keep[name] < 1 else None
            row, column = gradient[0, :, :1], gradient[0, 0]
            projection.blocks[name] = (row, column, kept, 1.0, 5)
            with Launches() as launches:
                projection.add(sketch, name, gradient)
            assert 3 <= launches.count <= 8, name


def test_a_tensor_with_fewer_coordinates_than_buckets_keeps_its_inner_products():
    """One lap, in which no two coordinates meet."""
    g = torch.randn(3, 40)
    sketch = project_all(g, {"a": (5, 8)}, {"a": 1.0}, 64, 3)
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
    sketcher = GradientSketcher(copy.deepcopy(moved), k=BUCKETS, sparse_ratio=0.1, seed=1)
    matrices = dense_projection(sketcher)
    sketch, _ = sketcher.sketch(collate(trajectories, groups, moved.device), TEMPERATURE)
    for row, piece in enumerate(groups):
        expected = autograd_sketch(moved, trajectories, piece, matrices)
        assert (sketch[row] - expected).norm() <= 1e-4 * expected.norm()


def test_models_with_other_weight_matrices_are_refused():
    tiny = {"n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": 41, "n_positions": 64}
    with pytest.raises(rollout.BadInput, match=r"transformer\.h\.0\.attn"):
        GradientSketcher(
            GPT2LMHeadModel(GPT2Config(**tiny)), k=BUCKETS, sparse_ratio=0.1, seed=0
        )  # its layers are Conv1D


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
            "length": None,
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
    """50 and 300 live prompts and more, in shards of one size; held in memory, the sketches of the latter would take
    40 MB."""
    for name, count in (("few", 120), ("many", 720)):
        rollout.rollout(out=tmp_path / name, limit=count, shard=25)
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
    assert sum(path.stat().st_size for path in (tmp_path / "many-gradients").iterdir()) > 40e6
    assert (many - few) * unit < 15e6


def test_weights_too_large_for_float32_are_refused_and_a_cap_helps(moved, ragged):
    batch = collate(ragged, live_pieces(ragged)[:2], moved.device)
    batch.behavior_logps = batch.behavior_logps - 60  # as after a very long answer
    for cap, finite in ((None, False), (5.0, True)):
        sketcher = GradientSketcher(copy.deepcopy(moved), BUCKETS, 1.0, seed=1, ratio="sequence", cap=cap)
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
        GradientSketcher(GemmaForCausalLM(config), k=BUCKETS, sparse_ratio=1.0, seed=0)


def test_layers_derived_from_linear_ones_are_refused(toy):
    """What they do after the product is not known."""
    model = copy.deepcopy(toy[0])

    class Scaled(nn.Linear):
        pass

    model.lm_head.__class__ = Scaled
    with pytest.raises(rollout.BadInput, match=r"lm_head"):
        GradientSketcher(model, k=BUCKETS, sparse_ratio=1.0, seed=0)
