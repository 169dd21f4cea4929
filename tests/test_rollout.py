"""Rollouts against transformers' own logits, against themselves in another batch or shard; and the files' one rule."""

import os
import re
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import ROOT, TEMPERATURE, every, load_all, load_folder, sample, sequence
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, GraniteConfig, Lfm2Config, MambaConfig, MistralConfig, MistralForCausalLM

import rollout
import train
from rollout import TOY, BadInput, TransformersEngine, load_prompts, load_trajectories


def test_logps_are_those_of_transformers_logits(toy, ragged):
    model, _ = toy
    for place in list(every(ragged))[::7]:
        ids, start, stored = sequence(ragged, *place)
        with torch.no_grad():
            logps = torch.log_softmax(model(ids[None]).logits[0] / TEMPERATURE, -1)
        expected = logps[start - 1 : -1].gather(1, ids[start:, None])[:, 0].numpy()
        np.testing.assert_allclose(stored, expected, atol=2e-5)


def test_completions_end_at_the_end_token_or_are_truncated(toy, ragged):
    end = toy[1].eos_token_id
    for place in every(ragged):
        ids, start, _ = sequence(ragged, *place)
        completion = ids[start:].tolist()
        assert 1 <= len(completion) <= 5
        assert end not in completion[:-1]
        assert (completion[-1] != end) == bool(ragged.truncated[place])


def test_rewards_are_verdicts_on_the_decoded_completion(toy, ragged):
    rows = load_prompts(TOY / "train.jsonl")
    for place in every(ragged):
        ids, start, _ = sequence(ragged, *place)
        row = rows[ragged.prompt_index[place[0]]]
        assert ragged.rewards[place] == (toy[1].decode(ids[start:], skip_special_tokens=True) == row["answer"])
        assert toy[1].decode(ids[:start]) == toy[1].decode(ragged.prompt(place[0])) == row["prompt"]


def test_a_table_knows_where_its_rows_are(ragged):
    for n, k in every(ragged):
        ids, start, logps = sequence(ragged, n, k)
        np.testing.assert_array_equal(ragged.tokens[ragged.span(n, k)], ids[start:])
        np.testing.assert_array_equal(ragged.behavior_logps[ragged.span(n, k)], logps)
    assert ragged.live().tolist() == [n for n in range(40) if len(Counter(ragged.rewards[n].tolist())) > 1]


def test_some_prompts_of_a_table_are_a_table(ragged):
    """`take`: in the order of the file, all of a prompt's rows and nothing else's."""
    for kept in (ragged.live(), np.array([3]), np.array([17, 2, 39]), np.arange(40), np.array([], int)):
        taken, order = ragged.take(kept), sorted(kept.tolist())
        assert set(taken.tensors()) == set(ragged.tensors())
        assert taken.samples == 6 and len(taken.rewards) == len(order)
        for place, n in enumerate(order):
            for name in ("prompt_index", "prompt_length", "length", "rewards", "truncated"):
                np.testing.assert_array_equal(getattr(taken, name)[place], getattr(ragged, name)[n], err_msg=name)
            for k in range(6):
                (ids, start, logps), (expected, at, stored) = sequence(taken, place, k), sequence(ragged, n, k)
                assert start == at and torch.equal(ids, expected)
                np.testing.assert_array_equal(logps, stored)
        assert len(taken.tokens) == len(taken.behavior_logps) == taken.length.sum() == taken.offsets[-1]
        assert len(taken.prompt_tokens) == taken.prompt_length.sum()
        for name, values in taken.tensors().items():
            assert values.dtype == getattr(ragged, name).dtype, name


@pytest.mark.parametrize("batch_tokens, reverse", [(1, False), (700, True)])
def test_batching_and_order_change_nothing(toy, ragged, batch_tokens, reverse):
    indices = list(range(40))[:: -1 if reverse else 1]
    rows = load_prompts(TOY / "train.jsonl")
    engine = TransformersEngine(*toy, batch_tokens=batch_tokens)
    again = sample(engine, toy[1], rows, indices, [3], samples=6, max_tokens=5)
    assert again.prompt_index.tolist() == indices
    for place, i in enumerate(indices):
        for k in range(6):
            (before, _, stored), (after, _, logps) = sequence(ragged, i, k), sequence(again, place, k)
            assert torch.equal(before, after)
            np.testing.assert_allclose(stored, logps, atol=2e-5)


def test_another_size_of_shards_changes_nothing(small_world):
    data = str(small_world / "train.jsonl")
    for size in (512, 7, 60):
        rollout.rollout(out=small_world / f"by-{size}", data=data, shard=size, seed=4)
    folders = {size: sorted(path.name for path in (small_world / f"by-{size}").iterdir()) for size in (512, 7, 60)}
    assert folders[512] == folders[60] == [f"{number:05d}.safetensors" for number in range(4)]  # of 16 at most
    assert folders[7] == [f"{number:05d}.safetensors" for number in range(9)]
    default, small = load_all(small_world / "by-512"), load_all(small_world / "by-7")
    assert default.prompt_index.tolist() == small.prompt_index.tolist() == list(range(60))
    for name in set(rollout.TENSORS) - {"behavior_logps"}:
        np.testing.assert_array_equal(getattr(default, name), getattr(small, name), err_msg=name)
    assert np.ptp(default.rewards) == 1
    np.testing.assert_allclose(default.behavior_logps, small.behavior_logps, rtol=0, atol=1e-5)
    with pytest.raises(BadInput, match=r"00000\.safetensors was made with .*shard\.of 9, now 4"):
        rollout.rollout(out=small_world / "by-7", data=data, seed=4)


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


def test_files_hold_what_the_head_says(small_world):
    data = small_world / "train.jsonl"
    rollout.rollout(out=small_world / "t", data=str(data), samples=3)
    [*paths, last] = sorted((small_world / "t").iterdir())
    for path, count in [*((path, 16) for path in paths), (last, 12)]:
        plain = load_file(path)  # the library reads what we describe
        assert {name: str(array.dtype) for name, array in plain.items()} == {
            "prompt_index": "int32",
            "prompt_length": "int32",
            "prompt_tokens": "int32",
            "length": "int32",
            "tokens": "int32",
            "behavior_logps": "float32",
            "rewards": "float32",
            "truncated": "uint8",
        }
        assert plain["prompt_index"].shape == plain["prompt_length"].shape == (count,)
        assert plain["length"].shape == plain["rewards"].shape == plain["truncated"].shape == (count, 3)
        assert len(plain["tokens"]) == len(plain["behavior_logps"]) == plain["length"].sum()
        assert len(plain["prompt_tokens"]) == plain["prompt_length"].sum()
        opened, record = load_trajectories(path)
        for name in rollout.TENSORS:
            np.testing.assert_array_equal(plain[name], getattr(opened, name))
        assert record == rollout.peek(path)
        facts, first = record["facts"], plain["prompt_index"][0]
        assert facts["trajectories"] == 3 * count and facts["tokens"] == len(plain["tokens"])
        assert facts["rewards"] == plain["rewards"].sum() and facts["truncated"] == plain["truncated"].sum()
        assert facts["live"] == sum(0 < n < 3 for n in plain["rewards"].sum(1))
        assert facts["seconds"] > 0 and facts["versions"]["torch"] == torch.__version__
        expected = {"number": first // 16, "of": 4, "first": first, "last": first + count - 1, "count": 60}
        assert record["recipe"]["shard"] == expected
        assert record["recipe"]["inputs"]["data"] == load_prompts(data).digest
    assert load_folder(small_world / "t", "trajectories")["prompt_index"].tolist() == list(range(60))


def test_nothing_is_left_of_a_write_that_fails(tmp_path):
    target = tmp_path / "f.txt"
    target.write_text("old")
    with pytest.raises(ZeroDivisionError), rollout.new_file(target) as temporary:
        temporary.write_text("half")
        _ = 1 / 0
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_folder_appears_whole_and_survives_a_rename_that_fails(tmp_path, monkeypatch):
    target, part = tmp_path / "model", tmp_path / ".model.part"
    part.mkdir()
    (part / "left").write_text("by a kill")
    with rollout.new_file(target) as temporary:
        temporary.mkdir()
        (temporary / "weights").write_text("first")
        assert not target.exists()
    assert [path.name for path in target.iterdir()] == ["weights"]
    assert list(tmp_path.iterdir()) == [target]
    rename = os.replace

    def failing(source, destination):
        if destination == target:
            raise OSError("disk")
        rename(source, destination)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(BadInput, match=r"model: cannot write it \(disk\)"), rollout.new_file(target) as temporary:
        temporary.mkdir()
    assert [path.read_text() for path in tmp_path.rglob("weights")] == ["first"]
    assert list(tmp_path.iterdir()) == [target]


def data_that_make_writes(world, folder, monkeypatch):
    """Name -> prompts, once they have been found to be those of the repository, all of them different."""
    import importlib.util

    spec = importlib.util.spec_from_file_location("world_make", world / "make.py")
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    monkeypatch.setattr(make, "HERE", folder)
    make.write_data()
    files = sorted(folder.glob("*.jsonl"))
    assert [file.name for file in files] == sorted(file.name for file in world.glob("*.jsonl"))
    for file in files:
        assert file.read_bytes() == (world / file.name).read_bytes()
    prompts = {file.stem: [row["prompt"] for row in load_prompts(file)] for file in files}
    everything = [prompt for some in prompts.values() for prompt in some]
    assert len(everything) == len(set(everything))
    return {name: len(some) for name, some in prompts.items()}


def test_toy_data_is_apart_and_is_what_make_writes(tmp_path, monkeypatch):
    counts = data_that_make_writes(TOY, tmp_path, monkeypatch)
    assert counts["train"] == 2400 and len(counts) == 7
    assert counts["valid-rev"] == counts["valid-srt"] == counts["valid-mixed"] == 128
    assert counts["test-rev"] == counts["test-srt"] == 400


def test_programs_of_the_second_world_by_hand(tmp_path, monkeypatch):
    counts = data_that_make_writes(TOY / "curriculum", tmp_path, monkeypatch)
    assert counts["valid-irn"] == counts["valid-sl"] == counts["valid-w"] == 96
    first = {row["family"]: row for row in reversed(load_prompts(TOY / "curriculum/train.jsonl"))}
    for family in ("irn", "sl", "w", "r-letters"):
        steps = first[family]["prompt"].partition(":")[2][:-1]
        answer = []
        for letter in family if family != "r-letters" else "c":
            if letter == "i":
                steps = "".join(str((int(digit) + 1) % 10) for digit in steps)
            elif letter == "n":
                steps = "".join(str(9 - int(digit)) for digit in steps)
            elif letter == "s":
                steps = "".join(sorted(steps))
            elif letter in "rlw":
                steps = {"r": steps[::-1], "l": steps[1:] + steps[:1], "w": steps[-1] + steps[1:-1] + steps[:1]}[letter]
            answer.append(steps)
        assert first[family]["answer"] == "=".join(answer)
    size = sum(path.stat().st_size for path in (TOY / "curriculum").rglob("*") if path.is_file())
    assert size < 4e6


def test_any_of_several_end_tokens_ends_a_completion(toy):
    model, tokenizer = toy
    engine = TransformersEngine(model, tokenizer)
    ids = tokenizer("cpy(abcabc)=").input_ids
    b = tokenizer("b").input_ids[0]
    engine.end_tokens = torch.tensor([tokenizer.eos_token_id, b])
    [completions] = engine.generate([ids], [0], samples=50, max_tokens=8, temperature=1.0, seed=[0])
    assert any(c.tokens[-1] == b for c in completions)
    assert all(b not in c.tokens[:-1] for c in completions)


def test_recurrent_and_convolutional_models_are_refused(toy, tmp_path):
    """A prompt and its completions share a row (train.py), which only attention can keep apart."""
    for name, config in {
        "mamba": MambaConfig(vocab_size=41, hidden_size=16, num_hidden_layers=1, state_size=4),
        "lfm2": Lfm2Config(
            **{"vocab_size": 41, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2},
            **{"num_attention_heads": 2, "num_key_value_heads": 1, "layer_types": ["conv", "full_attention"]},
        ),
    }.items():
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / name)
        toy[1].save_pretrained(tmp_path / name)
        kinds = "conv|linear_attention|layers of its own kind"
        with pytest.raises(rollout.BadInput, match=f"{name}: this model has ({kinds}); only attention"):
            rollout.load_model(tmp_path / name)


def test_models_that_change_their_logits_are_refused(toy, tmp_path):
    """Granite divides them by a constant."""
    shape = {"vocab_size": 41, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    shape |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    for scale in (1.0, 2.0):
        folder = tmp_path / f"granite-{scale:g}"
        AutoModelForCausalLM.from_config(GraniteConfig(**shape, logits_scaling=scale)).save_pretrained(folder)
        toy[1].save_pretrained(folder)
    assert rollout.load_model(tmp_path / "granite-1")
    with pytest.raises(
        rollout.BadInput, match="granite-2: the logits of this model are not the output of its last layer"
    ):
        rollout.load_model(tmp_path / "granite-2")


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_attention_of_a_new_token_is_that_of_sdpa(groups):
    """With heads that share keys and values, and padding."""
    torch.manual_seed(0)
    query, (key, value) = torch.randn(3, 4, 1, 8), torch.randn(2, 3, 4 // groups, 6, 8)
    mask = torch.arange(6) >= torch.tensor([0, 2, 4])[:, None]  # (B, T)
    found, _ = rollout.attention(None, query, key, value, mask[:, None, None], scaling=0.3)
    assert found.shape == (3, 1, 4, 8)
    for b, h in np.ndindex(3, 4):
        k, v = (x[b, h // groups, mask[b]] for x in (key, value))
        expected = torch.softmax(0.3 * k @ query[b, h, 0], 0) @ v
        torch.testing.assert_close(found[b, 0, h], expected)


def test_prompts_fit_into_an_attention_window_with_their_answers(toy, tmp_path, capsys):
    """Within it, the log-probs of a packed group are the model's own."""
    config = MistralConfig(
        **{"vocab_size": 41, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "sliding_window": 17},
        **{"num_attention_heads": 2, "num_key_value_heads": 1, "eos_token_id": toy[0].config.eos_token_id},
    )
    torch.manual_seed(0)
    MistralForCausalLM(config).save_pretrained(tmp_path / "m")
    toy[1].save_pretrained(tmp_path / "m")
    data = str(TOY / "train.jsonl")
    rollout.rollout(out=tmp_path / "t", model=tmp_path / "m", data=data, limit=200, samples=4)
    assert re.search(r"prompts dropped: empty, or longer than 9 tokens .the model's 17 less", capsys.readouterr().out)
    model, stored = rollout.load_model(tmp_path / "m")[0], load_all(tmp_path / "t")
    assert 0 < len(stored.rewards) < 200 and set(stored.prompt_length.tolist()) == {9}
    batch = train.collate(stored, [(n, range(4)) for n in range(len(stored.rewards))], model.device)
    with torch.no_grad():
        logps = train.completion_logps(model, batch, 1.0)[0]
    torch.testing.assert_close(logps, batch.behavior_logps, atol=3e-5, rtol=0)


def test_answers_that_have_no_room_are_warned_of(small_world, capsys):
    options = {"data": str(small_world / "train.jsonl"), "samples": 2}
    rollout.rollout(out=small_world / "t", max_tokens=1, **options)
    assert "warning: more than half of the answers were cut off: raise --max-tokens" in capsys.readouterr().out
    rollout.rollout(out=small_world / "u", **options)
    assert "warning" not in capsys.readouterr().out


def test_deterministic_algorithms_are_asked_for(tmp_path):
    """In a process of its own, since it holds for all of it."""
    options = ["--data", "toy/test-rev.jsonl", "--limit", "3", "--out", tmp_path / "t", "--deterministic"]
    code = "import torch, rollout as r; r.command_line(r.app); print(torch.are_deterministic_algorithms_enabled())"
    done = subprocess.run([sys.executable, "-c", code, *options], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "True"
