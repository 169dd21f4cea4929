"""Rollouts against transformers' own logits, and against themselves in another batch."""

import json
import os

import numpy as np
import pytest
import torch
from conftest import TEMPERATURE
from safetensors.numpy import load_file

import rollout
from rollout import (
    TOY,
    TransformersEngine,
    load_prompts,
    open_tensors,
    open_trajectories,
    sample_trajectories,
    save_rows,
)


def test_logps_are_those_of_transformers_logits(toy, ragged):
    model, _ = toy
    for m in range(0, len(ragged.rewards), 7):
        ids = torch.tensor(ragged.tokens[ragged.offsets[m] : ragged.offsets[m + 1]].astype(np.int64))
        n = int(ragged.prompt_length[m])
        with torch.no_grad():
            logps = torch.log_softmax(model(ids[None]).logits[0] / TEMPERATURE, -1)
        expected = logps[n - 1 : -1].gather(1, ids[n:, None])[:, 0].numpy()
        stored = ragged.behavior_logps[ragged.logp_offsets[m] : ragged.logp_offsets[m + 1]]
        np.testing.assert_allclose(stored, expected, atol=2e-5)


def test_completions_end_at_the_end_token_or_are_truncated(toy, ragged):
    end = toy[1].eos_token_id
    for m in range(len(ragged.rewards)):
        completion = ragged.tokens[ragged.offsets[m] + ragged.prompt_length[m] : ragged.offsets[m + 1]]
        assert 1 <= len(completion) <= 5
        assert end not in completion[:-1]
        assert (completion[-1] != end) == bool(ragged.truncated[m])


def test_rewards_are_verdicts_on_the_decoded_completion(toy, ragged):
    rows = load_prompts(TOY / "train.jsonl")
    for m in range(len(ragged.rewards)):
        completion = ragged.tokens[ragged.offsets[m] + ragged.prompt_length[m] : ragged.offsets[m + 1]]
        row = rows[ragged.prompt_index[m]]
        assert ragged.rewards[m] == (toy[1].decode(completion, skip_special_tokens=True) == row["answer"])
        assert toy[1].decode(ragged.prompt(m)) == row["prompt"]


@pytest.mark.parametrize("batch_tokens, reverse", [(1, False), (700, True)])
def test_batching_and_order_change_nothing(toy, ragged, batch_tokens, reverse):
    indices = list(range(40))[:: -1 if reverse else 1]
    rows = load_prompts(TOY / "train.jsonl")
    again = sample_trajectories(
        TransformersEngine(*toy, batch_tokens=batch_tokens),
        toy[1],
        [rows[i] for i in indices],
        indices,
        samples=6,
        max_tokens=5,
        temperature=TEMPERATURE,
        reward="exact",
        seed=[3],
    )
    groups, groups_again = ragged.groups(), again.groups()
    for i in indices:
        for m, n in zip(groups[i], groups_again[i], strict=True):
            before, after = slice(*ragged.offsets[m : m + 2]), slice(*again.offsets[n : n + 2])
            np.testing.assert_array_equal(ragged.tokens[before], again.tokens[after])
            before, after = slice(*ragged.logp_offsets[m : m + 2]), slice(*again.logp_offsets[n : n + 2])
            np.testing.assert_allclose(ragged.behavior_logps[before], again.behavior_logps[after], atol=2e-5)


def test_samples_follow_the_policy(toy):
    """Frequencies of 8,000 first tokens against the tempered softmax, by a chi-square statistic."""
    model, tokenizer = toy
    ids = tokenizer("fst(pzb)=").input_ids
    engine = TransformersEngine(model, tokenizer)
    [completions] = engine.generate([ids], [0], samples=8000, max_tokens=1, temperature=TEMPERATURE, seed=[0])
    counts = np.bincount([c.tokens[0] for c in completions], minlength=len(tokenizer))
    with torch.no_grad():
        expected = 8000 * torch.softmax(model(torch.tensor([ids])).logits[0, -1] / TEMPERATURE, -1).numpy()
    common = expected > 5
    statistic = ((counts - expected)[common] ** 2 / expected[common]).sum()
    freedom = common.sum() - 1
    assert freedom >= 3
    assert statistic < freedom + 4 * np.sqrt(2 * freedom)  # mean + 4 standard deviations


def test_finished_sequences_leave_the_batch(toy, monkeypatch):
    model, tokenizer = toy
    sizes = []
    monkeypatch.setattr(model, "forward", lambda _f=model.forward, **k: (sizes.append(len(k["input_ids"])), _f(**k))[1])
    rows = load_prompts(TOY / "valid-rev.jsonl")[:16]
    prompts = tokenizer([row["prompt"] for row in rows]).input_ids
    engine = TransformersEngine(model, tokenizer)
    groups = engine.generate(prompts, range(16), samples=4, max_tokens=12, temperature=1.0, seed=[0])
    lengths = np.array([len(c.tokens) for group in groups for c in group])
    # after the prefill of 16 prompts, step t feeds just the sequences longer than t tokens
    assert sizes == [16] + [int((lengths > t).sum()) for t in range(1, lengths.max())]


def test_file_holds_what_its_head_says(small_world):
    out = small_world / "t.safetensors"
    made = rollout.rollout(out=out, data=small_world / "test-rev.jsonl", samples=3)
    plain = load_file(out)  # the library reads what we describe
    assert {name: str(array.dtype) for name, array in plain.items()} == {
        "tokens": "int32",
        "offsets": "int64",
        "prompt_length": "int32",
        "behavior_logps": "float32",
        "rewards": "float32",
        "prompt_index": "int32",
        "truncated": "uint8",
    }
    assert len(plain["tokens"]) == plain["offsets"][-1]
    assert len(plain["behavior_logps"]) == plain["offsets"][-1] - plain["prompt_length"].sum()
    opened = open_trajectories(out)
    for name in rollout.TENSORS:
        np.testing.assert_array_equal(plain[name], getattr(made, name))
        np.testing.assert_array_equal(plain[name], getattr(opened, name))
    assert opened.metadata == json.loads(json.dumps(made.metadata))


def test_streamed_rows_are_a_safetensors_file(tmp_path):
    rows = np.random.default_rng(0).normal(size=(7, 5)).astype(np.float32)
    columns = {}
    with save_rows(tmp_path / "g.safetensors", "gradients", "sketch", (7, 5), columns, {"a": [1, "x"]}) as write:
        write(rows[:3])
        write(rows[3:])
        columns["prompt_index"] = np.arange(7, dtype=np.int32)
    plain = load_file(tmp_path / "g.safetensors")
    np.testing.assert_array_equal(plain["sketch"], rows)
    np.testing.assert_array_equal(plain["prompt_index"], np.arange(7))
    mapped, metadata = open_tensors(tmp_path / "g.safetensors", "gradients")
    np.testing.assert_array_equal(mapped["sketch"], rows)
    assert metadata == {"a": [1, "x"]}


def test_nothing_is_left_of_a_write_that_fails(tmp_path):
    target = tmp_path / "f.txt"
    target.write_text("old")
    with pytest.raises(ZeroDivisionError), rollout.whole_file(target) as temporary:
        temporary.write_text("half")
        _ = 1 / 0
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_folder_is_replaced_whole_and_survives_a_rename_that_fails(tmp_path, monkeypatch):
    target = tmp_path / "model"
    for content in ("first", "second"):
        with rollout.whole_file(target) as temporary:
            temporary.mkdir()
            (temporary / "weights").write_text(content)
    assert (target / "weights").read_text() == "second"
    assert list(tmp_path.iterdir()) == [target]
    rename = os.replace

    def failing(source, destination):
        if destination == target:
            raise OSError("disk")
        rename(source, destination)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(OSError, match="disk"), rollout.whole_file(target) as temporary:
        temporary.mkdir()
    assert [path.read_text() for path in tmp_path.rglob("weights")] == ["second"]


def test_toy_data_is_apart_and_is_what_make_writes(tmp_path, monkeypatch):
    import importlib.util

    spec = importlib.util.spec_from_file_location("toy_make", TOY / "make.py")
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    monkeypatch.setattr(make, "HERE", tmp_path)
    make.write_data()
    files = sorted(tmp_path.glob("*.jsonl"))
    assert len(files) == 6
    for file in files:
        assert file.read_bytes() == (TOY / file.name).read_bytes()
    prompts = {file.stem: [row["prompt"] for row in load_prompts(file)] for file in files}
    everything = [prompt for some in prompts.values() for prompt in some]
    assert len(everything) == len(set(everything))
    assert len(prompts["train"]) == 2400
    assert len(prompts["valid-rev"]) == len(prompts["valid-srt"]) == 128
    assert len(prompts["test-rev"]) == len(prompts["test-srt"]) == 400


def test_any_of_several_end_tokens_ends_a_completion(toy):
    model, tokenizer = toy
    engine = TransformersEngine(model, tokenizer)
    ids = tokenizer("cpy(abcabc)=").input_ids
    b = tokenizer("b").input_ids[0]
    engine.end_tokens = torch.tensor([tokenizer.eos_token_id, b])
    [completions] = engine.generate([ids], [0], samples=50, max_tokens=8, temperature=1.0, seed=[0])
    assert any(c.tokens[-1] == b for c in completions)
    assert all(b not in c.tokens[:-1] for c in completions)
