"""Sketches from the batched hooks against plain autograd, one prompt at a time."""

import copy
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, TEMPERATURE
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import project
import rollout
from project import GradientSketcher, SparseProjection
from train import collate, micro_batches

K = 512


def block_sizes(sketcher: GradientSketcher) -> dict[str, int]:
    sizes = {f"{name}.weight": m.weight.numel() for name, m in sketcher.linears.items()}
    return sizes | {f"{name}.bias": m.bias.numel() for name, m in sketcher.linears.items() if m.bias is not None}


def dense_projection(projection: SparseProjection, sizes: dict[str, int]) -> dict[str, torch.Tensor]:
    """P M as explicit matrices (k, d_block), from the description at the head of project.py."""
    matrices = {}
    for name, size in sizes.items():
        kept, sign, first = projection.blocks[name]
        matrices[name] = torch.zeros(projection.k, size)
        for j, coordinate in enumerate(kept.tolist()):
            matrices[name][(first + j) % projection.k, coordinate] = sign[j]
    return matrices


def autograd_sketch(model, trajectories, rows, matrices) -> torch.Tensor:
    """P M ĝ of equation 2 for one prompt, trajectory by trajectory, by plain autograd."""
    rewards = trajectories.rewards[rows].astype(np.float64)
    advantages = (rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-6)
    model = copy.deepcopy(model).requires_grad_(True)
    for m, advantage in zip(rows, advantages, strict=True):
        ids = torch.tensor(trajectories.tokens[trajectories.offsets[m] : trajectories.offsets[m + 1]].astype(np.int64))
        n = int(trajectories.prompt_length[m])
        logps = torch.log_softmax(model(ids[None]).logits[0] / TEMPERATURE, -1)[n - 1 : -1]
        logps = logps.gather(1, ids[n:, None])[:, 0]
        behavior = trajectories.behavior_logps[trajectories.logp_offsets[m] : trajectories.logp_offsets[m + 1]]
        rho = (logps.detach() - torch.tensor(behavior)).exp()
        (advantage * (rho * logps).mean() / len(rows)).backward()
    parameters = dict(model.named_parameters())
    return sum(matrix @ parameters[name].grad.flatten() for name, matrix in matrices.items())


@pytest.fixture(scope="module", params=["toy", "tied"])
def case(request, moved):
    """The moved toy model (biases, untied), and a small Llama (no biases, output head tied to the embedding)."""
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


def test_hooks_equal_autograd_prompt_by_prompt(case, ragged):
    sketcher = GradientSketcher(copy.deepcopy(case), k=K, sparse_ratio=0.1, seed=1)
    matrices = dense_projection(sketcher.projection, block_sizes(sketcher))
    oracle = case
    if case.config.tie_word_embeddings:  # the head's share of the tied gradient alone is covered
        oracle = copy.deepcopy(case)
        oracle.lm_head.weight = nn.Parameter(case.lm_head.weight.detach().clone())
    live = list(ragged.live_groups().items())
    batch = collate(ragged, live, case.device)
    assert (batch.prompt_mask == 0).any() and (batch.mask == 0).any()
    sketch, ratio = sketcher.sketch(batch, TEMPERATURE)
    assert (ratio * batch.mask - batch.mask).abs().max() > 0.1  # π_θ ≠ β
    for row, (_, rows) in enumerate(live):  # every position in the batch
        expected = autograd_sketch(oracle, ragged, rows, matrices)
        assert (sketch[row] - expected).norm() <= 1e-4 * expected.norm()


@pytest.mark.parametrize("change", ["batch size", "order", "padding", "slices"])
def test_batching_changes_nothing(moved, ragged, change):
    sketcher = GradientSketcher(copy.deepcopy(moved), k=K, sparse_ratio=0.1, seed=1)
    live = ragged.live_groups()
    batch = collate(ragged, list(live.items()), moved.device)
    whole, _ = sketcher.sketch(batch, TEMPERATURE)
    whole = dict(zip(batch.prompt_index, whole, strict=True))
    if change == "batch size":
        batches = [collate(ragged, groups, moved.device) for groups in micro_batches(ragged, live, 1)]
    elif change == "order":
        batches = [collate(ragged, list(live.items())[::-1], moved.device)]
    else:
        batches = [batch]
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


def test_projection_keeps_inner_products_on_average():
    """E⟨g̃, g̃'⟩ = r⟨g, g'⟩ over 400 seeds, within 4 standard errors, for gradients that resemble each other."""
    torch.manual_seed(0)
    sizes = {"a": 300, "b": 700}
    first = {name: torch.randn(size) + 0.5 for name, size in sizes.items()}
    g = {name: torch.stack([x, x + 0.3 * torch.randn(len(x))]) for name, x in first.items()}
    products, kept = [], torch.zeros(1000)
    for seed in range(400):
        projection = SparseProjection(sizes, 64, 0.3, seed, torch.device("cpu"))
        sketch = torch.zeros(2, 64)
        for name in sizes:
            projection.add(sketch, name, g[name])
            kept[(0 if name == "a" else 300) + projection.blocks[name][0].long()] += 1
        products.append((sketch[0] @ sketch[1]).item())
    truth = 0.3 * sum((g[name][0] @ g[name][1]).item() for name in sizes)
    error = np.std(products) / 20
    assert abs(np.mean(products) - truth) < 4 * error
    assert truth > 20 * error  # so that the line above can fail
    assert abs(kept / 400 - 0.3).max() < 5 * (0.3 * 0.7 / 400) ** 0.5  # every coordinate, with probability r


def test_coordinates_of_different_weights_meet_with_probability_one_in_k():
    meetings, buckets = 0, torch.zeros(8)
    for seed in range(4000):
        blocks = SparseProjection({"a": 3, "b": 5}, 8, 1.0, seed, torch.device("cpu")).blocks
        place = {}
        for name, (kept, _, first) in blocks.items():
            dealt = (first + torch.arange(len(kept))) % 8
            assert len(set(dealt.tolist())) == len(kept)  # no two of one weight meet, there being at most k
            place[name] = dealt[kept.long() == 0].item()
        meetings += place["a"] == place["b"]
        buckets[place["a"]] += 1
    error = (1 / 8 * 7 / 8 / 4000) ** 0.5
    assert abs(meetings / 4000 - 1 / 8) < 4 * error
    assert (buckets / 4000 - 1 / 8).abs().max() < 4 * error


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
    matrices = dense_projection(sketcher.projection, block_sizes(sketcher))
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
        assert tensors["ess"][row] == pytest.approx(1, abs=1e-4)  # θ is still β
    assert metadata["data"] == rollout.digest(world / "train.jsonl")


def test_effective_sample_size_by_hand():
    # ratios 1, 1, 2 on three tokens: 4² / (3·6); ratio 3 on one token: 1
    ratio, mask = torch.tensor([[1.0, 1.0], [2.0, 9.0], [3.0, 9.0]]), torch.tensor([[1.0, 1.0], [1.0, 0.0], [1.0, 0.0]])
    found = project.effective_sample_size(ratio[[0, 1]], mask[[0, 1]], 1)
    assert found.item() == pytest.approx(16 / 18)
    assert project.effective_sample_size(ratio[[2]], mask[[2]], 1).item() == pytest.approx(1)


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
