"""The parts whose numbers hang on the device: `pytest -m gpu`. They run on a CPU, too; bench/gpu.py runs them on a GPU.
Nothing is needed but torch, transformers, numpy, safetensors, typer and pytest."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import random_trajectories
from transformers import Qwen2Config, Qwen2ForCausalLM

import project
import rollout
import train

pytestmark = pytest.mark.gpu
PROMPTS, SAMPLES, WORDS = 8, 4, 1000
LONG = {False: (3, 20), True: (100, 140)}  # lengths of prompts and of completions; True: attention by sequences


@pytest.fixture(scope="module")
def policy() -> Qwen2ForCausalLM:
    """Random, float32, on the device."""
    torch.manual_seed(0)
    shape = {"vocab_size": WORDS, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}
    ends = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    config = Qwen2Config(**shape, **heads, **ends, attn_implementation=rollout.our_attention())
    model = Qwen2ForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():  # so that tokens differ in their probability
            parameter.mul_(2 if parameter.dim() > 1 else 1)
    return model.eval().to(rollout.device())


def some_trajectories(long: bool) -> rollout.Trajectories:
    return random_trajectories((PROMPTS, SAMPLES), WORDS, LONG[long], LONG[long], -7)


def exact_gradients(policy: Qwen2ForCausalLM, trajectories: rollout.Trajectories) -> torch.Tensor:
    """ĝ(x;θ) of each prompt by autograd, in float64 on the CPU, a sequence at a time: (PROMPTS, d) float64. Over
    what project.py covers: all but the norms' gains."""
    model = copy.deepcopy(policy).cpu().double().requires_grad_(True)
    parameters = [p for name, p in model.named_parameters() if "norm" not in name]
    advantages = rollout.group_advantages(torch.from_numpy(trajectories.rewards)).double()
    rows = []
    for n in range(PROMPTS):
        objective = 0.0
        for k in range(SAMPLES):
            logps = single_logps(model, trajectories, n, k)
            ratio = (logps - torch.from_numpy(trajectories.behavior_logps[trajectories.span(n, k)])).detach().exp()
            objective = objective + (ratio * logps).mean() * advantages[n, k] / SAMPLES
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(objective, parameters)]))
    return torch.stack(rows)


def single_logps(model: Qwen2ForCausalLM, trajectories: rollout.Trajectories, n: int, k: int) -> torch.Tensor:
    """Log-probs of one completion, (C,), by the library's own forward pass."""
    prompt, tokens = trajectories.prompt(n), trajectories.tokens[trajectories.span(n, k)]
    ids = torch.from_numpy(np.concatenate([prompt, tokens]).astype(np.int64)).to(model.device)[None]
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits[0, len(prompt) - 1 :]
    logps = torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), -1)
    return logps.gather(1, ids[0, len(prompt) :, None])[:, 0]


def objective_gradient(policy: Qwen2ForCausalLM, trajectories: rollout.Trajectories, dtype: str) -> torch.Tensor:
    """Of one training step without clipping of ratios, by train.py: (d,) float64."""
    model = copy.deepcopy(policy).requires_grad_(True)
    options = {
        "temperature": 1.0,
        "clip": 1e9,
        "kl": 0.0,
        "entropy": 0.0,
        "batch_tokens": 2048,
        "iterations": 1,
        "clip_high": None,
    }
    o = SimpleNamespace(max_grad_norm=1e9, dtype=dtype, gradient_checkpointing=False, **options)
    adamw = torch.optim.AdamW(model.parameters(), lr=0.0)
    root = train.LogProbs(model)
    train.make_gradients(root)
    train.update(root, None, adamw, trajectories, o, range(PROMPTS))
    named = [p for name, p in model.named_parameters() if "norm" not in name]
    return -torch.cat([p.grad.flatten() for p in named]).double().cpu()


@pytest.mark.parametrize("long", [False, True])
def test_gradients_are_those_of_float64_on_the_cpu(policy, long):
    trajectories = some_trajectories(long)
    exact = exact_gradients(policy, trajectories).mean(0)
    for dtype, allowed in (("float32", 1e-4), ("bfloat16", 0.05)):
        found = objective_gradient(policy, trajectories, dtype)
        assert (found - exact).norm() < allowed * exact.norm(), (dtype, float((found - exact).norm() / exact.norm()))


@pytest.mark.parametrize("long", [False, True])
def test_packed_log_probs_are_those_of_single_sequences(policy, long):
    trajectories = some_trajectories(long)
    for dtype, allowed in ((torch.float32, 1e-4), (torch.bfloat16, 0.2)):
        model = copy.deepcopy(policy).to(dtype)
        for pieces in train.micro_batches(trajectories, range(PROMPTS), 4096):
            batch = train.collate(trajectories, pieces, model.device)
            with torch.no_grad():
                packed, _ = train.completion_logps(model, batch, 1.0)
                single = torch.cat([single_logps(model, trajectories, n, k) for n, ks in pieces for k in ks])
            assert packed.dtype == torch.float32 and (packed - single).abs().max() < allowed, dtype


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 1e-3), (torch.bfloat16, 0.05)])
def test_sketches_keep_inner_products(policy, dtype, allowed):
    """Those of the device are the CPU's, computed from exact gradients; and their inner products are the gradients'."""
    trajectories, k = some_trajectories(False), 32768
    model = copy.deepcopy(policy).to(dtype)
    sketcher = project.GradientSketcher(model, k, 1.0, seed=0)
    halved = np.zeros(PROMPTS, bool)
    found = project.project_groups(sketcher, trajectories, halved, 1.0, 2048)["sketch"].astype(np.float64)
    sketcher.close()
    gradients = exact_gradients(policy, trajectories)
    inner, exact = found @ found.T, (gradients @ gradients.T).numpy()
    norms = np.sqrt(np.outer(exact.diagonal(), exact.diagonal()))
    assert np.abs(inner - exact).max() < 6 / np.sqrt(k) * norms.max()  # six standard deviations of a sketch
    names = [name for name, _ in policy.named_parameters() if "norm" not in name]
    shapes = [dict(policy.named_parameters())[name].shape for name in names]
    theirs = torch.zeros(PROMPTS, k, dtype=torch.float64)
    sizes = [shape.numel() for shape in shapes]
    for name, shape, part in zip(names, shapes, gradients.split(sizes, 1), strict=True):
        blocks = sketcher.projection.blocks[name]
        sketcher.projection.blocks[name] = tuple(x.cpu().double() if torch.is_tensor(x) else x for x in blocks)
        sketcher.projection.add(theirs, name, part.clone().view(PROMPTS, shape[0], -1))
    assert np.linalg.norm(found - theirs.numpy()) < allowed * theirs.norm()


def test_deterministic_gives_the_same_bytes(policy, monkeypatch):
    """Gradients of training and sketches, a second time."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    rollout.use_deterministic(True)
    try:
        trajectories, halved = some_trajectories(True), np.zeros(PROMPTS, bool)
        first, second = (objective_gradient(policy, trajectories, "bfloat16") for _ in range(2))
        assert torch.equal(first, second)
        sketcher = project.GradientSketcher(copy.deepcopy(policy).bfloat16(), 512, 1.0, seed=0)
        one, two = (project.project_groups(sketcher, trajectories, halved, 1.0, 2048)["sketch"] for _ in range(2))
        sketcher.close()
        assert np.array_equal(one, two)
    finally:
        torch.use_deterministic_algorithms(False)


def test_the_engine_samples_with_the_trainers_log_probs(policy):
    """That of transformers; for vLLM there is test_vllm.py."""
    random = np.random.default_rng(1)
    prompts = [random.integers(2, WORDS, n).tolist() for n in (5, 9, 30, 150)]
    rows = [{"prompt": "", "answer": ""}] * 4
    words = SimpleNamespace(eos_token_id=1, batch_decode=lambda ids, **_: [""] * len(ids))
    o = SimpleNamespace(samples=6, max_tokens=40, temperature=1.0, reward="exact", reward_seconds=1.0)
    for dtype, mean, largest in ((torch.float32, 1e-5, 1e-3), (torch.bfloat16, 0.05, 0.5)):
        model = copy.deepcopy(policy).to(dtype)
        engine = rollout.TransformersEngine(model, words)
        trajectories = rollout.sample_trajectories(engine, words, rows, prompts, range(4), o, [0])
        differences = []
        for pieces in train.micro_batches(trajectories, range(4), 4096):
            batch = train.collate(trajectories, pieces, model.device)
            with torch.no_grad():
                logps, _ = train.completion_logps(model, batch, 1.0)
            differences.append((logps - batch.behavior_logps).abs())
        found = torch.cat(differences)
        assert found.mean() < mean and found.max() < largest, (dtype, float(found.mean()), float(found.max()))
