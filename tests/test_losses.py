"""Losses for ablation: against numbers worked out by hand, against TRL's own loss, and gradient by gradient."""

import copy
import json
import time
from collections import defaultdict
from types import SimpleNamespace
from typing import get_args

import numpy as np
import pytest
import torch
from conftest import TEMPERATURE, TOY, identities, random_trajectories, save_selection, sequence
from test_project import BUCKETS, autograd_sketch, dense_projection

import cropi
import project
import rollout
import train
from project import GradientSketcher, project_groups
from train import Loss, LossName, policy_objective


def options(**given) -> SimpleNamespace:
    """What `draw_batch` asks for."""
    defaults = {"loss": "grpo", "mask_truncated": False, "dynamic_sampling": False, "max_tokens": 5}
    return SimpleNamespace(**defaults | {"samples": 6} | given)


def weights(loss: Loss, groups: rollout.Trajectories) -> np.ndarray:
    return loss.weights(groups.length, groups.truncated, groups.samples)


def test_weights_worked_by_hand():
    """Two groups of two; lengths 1, 3, 2, 2; the second completion was cut off at 3 tokens."""
    groups = random_trajectories((2, 2), 9, (2, 3), (1, 4), -1.0)
    groups.length = np.array([[1, 3], [2, 2]], np.int32)
    groups.truncated = np.array([[0, 1], [0, 0]], np.uint8)
    expected = {
        "grpo": [[1 / 2, 1 / 6], [1 / 4, 1 / 4]],  # 1/(K|τ|)
        "dapo": [[1 / 4, 1 / 4], [1 / 4, 1 / 4]],  # 8 tokens, 2 a completion
        "dr_grpo": [[1 / 6, 1 / 6], [1 / 6, 1 / 6]],  # at most 3 tokens
    }
    for name, by_hand in expected.items():
        loss = train.draw_batch(lambda _: groups, np.arange(2), 2, options(loss=name, samples=2, max_tokens=3))[2]
        np.testing.assert_allclose(weights(loss, groups), by_hand)
    o = options(loss="dapo", samples=2, max_tokens=3, mask_truncated=True)
    loss = train.draw_batch(lambda _: groups, np.arange(2), 2, o)[2]
    np.testing.assert_allclose(weights(loss, groups), [[2 / 5, 0], [2 / 5, 2 / 5]])  # 5 tokens: 1/2 of 4/5
    np.testing.assert_allclose(weights(Loss("grpo", 1.0, True), groups), [[1 / 2, 0], [1 / 4, 1 / 4]])
    rewards = np.array([[1.0, 0.0, 0.0, 0.0]], np.float32)
    torch.testing.assert_close(Loss("dr_grpo").advantages(rewards), torch.tensor([[0.75, -0.25, -0.25, -0.25]]))


def test_clip_high_worked_by_hand():
    """Ratios 1.25 and 0.7: a rise counts up to 1.28, a fall up to 0.8, as far as it serves the advantage."""
    logps = torch.tensor([1.25, 1.25, 1.5, 0.7, 0.7]).log().requires_grad_()
    advantages = torch.tensor([1.0, -1.0, 1.0, 1.0, -1.0])
    value = policy_objective(logps, torch.zeros(5), advantages, 0.2, 0.28)
    torch.testing.assert_close(value, torch.tensor([1.25, -1.25, 1.28, 0.7, -0.8]))
    value.sum().backward()
    torch.testing.assert_close(logps.grad, torch.tensor([1.25, -1.25, 0.0, 0.7, 0.0]))
    one = policy_objective(logps, torch.zeros(5), advantages, 0.2)
    torch.testing.assert_close(one, torch.tensor([1.2, -1.25, 1.2, 0.7, -0.8]))


# ---------------------------------------------------------------------------------------------------------------------
# TRL's own loss


def trl_gradient(model, trajectories, name: str, clip_high: float, mask: bool) -> dict[str, torch.Tensor]:
    """Of all sequences as one batch; log-probs by transformers' own forward pass, one sequence at a time."""
    from trl.trainer.grpo_trainer import GRPOTrainer

    model, rewards = copy.deepcopy(model), torch.from_numpy(trajectories.rewards).double()
    advantages = rewards - rewards.mean(1, keepdim=True)
    if name != "dr_grpo":
        advantages = advantages / (rewards.std(1, keepdim=True) + 1e-6)
    rows, olds = [], []
    for n, k in np.ndindex(trajectories.rewards.shape):
        ids, start, behavior = sequence(trajectories, n, k)
        logps = torch.log_softmax(model(ids[None]).logits[0] / TEMPERATURE, -1)[start - 1 : -1]
        rows.append(logps.gather(1, ids[start:, None])[:, 0])
        olds.append(torch.tensor(behavior))
    pad = torch.nn.utils.rnn.pad_sequence
    logps, old, seen = (pad(x, True) for x in (rows, olds, [torch.ones(len(row)) for row in rows]))
    if mask:  # as _generate_and_score_completions does
        seen = seen * (1 - torch.from_numpy(trajectories.truncated).flatten().float())[:, None]
    nothing = torch.zeros(len(rows), 0, dtype=torch.long)
    inputs = {"prompt_ids": nothing, "prompt_mask": nothing, "completion_ids": seen.long(), "completion_mask": seen}
    inputs |= {"advantages": advantages.flatten(), "old_per_token_logps": old, "num_items_in_batch": seen.sum()}
    accelerator = SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x)
    args = SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1)
    fake = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (logps, torch.zeros_like(logps), None),
        **{"aux_loss_enabled": False, "top_entropy_quantile": 1.0, "off_policy_mask_threshold": None, "beta": 0.0},
        **{"importance_sampling_level": "token", "loss_type": name, "epsilon_low": 0.2, "epsilon_high": clip_high},
        **{"use_vllm": False, "vllm_importance_sampling_correction": False, "_entropy_bonus_enabled": False},
        **{"max_completion_length": 5, "current_gradient_accumulation_steps": 1, "accelerator": accelerator},
        **{"model": SimpleNamespace(training=True), "args": args, "_metrics": {"train": defaultdict(list)}},
    )
    GRPOTrainer._compute_loss(fake, model, inputs).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("name", get_args(LossName))
def test_gradients_are_those_of_trl(moved, ragged, name, mask):
    moved = copy.deepcopy(moved).double()
    theirs = trl_gradient(moved, ragged, name, 0.28, mask)
    o = options(loss=name, mask_truncated=mask)
    trajectories, batch, loss, _ = train.draw_batch(lambda _: ragged, ragged.prompt_index, 40, o)
    terms = {"temperature": TEMPERATURE, "clip": 0.2, "clip_high": 0.28, "kl": 0.0, "entropy": 0.0}
    sums = train.grpo_step(train.LogProbs(moved), None, trajectories, batch=batch, batch_tokens=500, loss=loss, **terms)
    assert 0 < sums["outside_clip"] < sums["live_tokens"]
    for name, parameter in moved.named_parameters():
        assert (parameter.grad - theirs[name]).norm() <= 1e-5 * theirs[name].norm(), name


# ---------------------------------------------------------------------------------------------------------------------
# What is ranked is what is ascended


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("name", get_args(LossName))
def test_sketches_follow_the_loss(moved, ragged, name, mask):
    """Prompt by prompt, against autograd."""
    sketcher = GradientSketcher(copy.deepcopy(moved), k=BUCKETS, sparse_ratio=1.0, seed=1)
    matrices, groups = dense_projection(sketcher), ragged.take(ragged.live()[:6])
    loss = Loss(name, 3.7, mask)
    found = project_groups(sketcher, groups, np.zeros(6, bool), TEMPERATURE, 500, loss)["sketch"]
    for n in range(6):
        divide = [3.7 if name != "grpo" else int(length) for length in groups.length[n]]
        weights = [(1 - mask * bool(groups.truncated[n, k])) / divide[k] for k in range(6)]
        expected = autograd_sketch(moved, groups, (n, range(6)), matrices, weights=weights, scale=name != "dr_grpo")
        assert (torch.from_numpy(found[n]) - expected).norm() <= 1e-4 * expected.norm()


def test_project_takes_the_mean_length_of_the_whole_set(tmp_path):
    """dapo's sketches are those of dr_grpo's divisor with the advantages of grpo; the mean is over all shards."""
    rollout.rollout(out=tmp_path / "t", limit=64, max_tokens=5, shard=32)
    for name, more in {"dapo": {}, "masked": {"mask_truncated": True}, "grpo": {"loss": "grpo"}}.items():
        project.project(tmp_path / "t", tmp_path / name, k=64, **{"loss": "dapo"} | more)
    shards = [rollout.load_trajectories(path)[0] for path in sorted((tmp_path / "t").glob("[0-9]*"))]
    assert len(shards) > 1
    tokens = [shard.length for shard in shards], [shard.length * (1 - shard.truncated) for shard in shards]
    for name, lengths in zip(("dapo", "masked"), tokens, strict=True):
        recipe = rollout.peek(tmp_path / name / "00000.safetensors")["recipe"]
        assert recipe["inputs"]["length"] == pytest.approx(np.concatenate(lengths).mean())
        assert recipe["options"]["loss"] == "dapo"
    assert rollout.peek(tmp_path / "grpo/00000.safetensors")["recipe"]["inputs"]["length"] is None


def test_scoring_takes_the_loss_of_training():
    settings = cropi.parse_settings(["train.loss=dapo", "train.mask_truncated=true", "train.clip_high=0.28"])
    assert settings["project"] == {"loss": "dapo", "mask_truncated": True}
    assert cropi.parse_settings(["train.loss=dapo", "project.loss=grpo"])["project"]["loss"] == "grpo"


# ---------------------------------------------------------------------------------------------------------------------
# Dynamic sampling


def test_dynamic_sampling_draws_until_the_batch_is_live():
    """Prompts of an even number are live: of the order 1, 3, 5, ... the batch is found in the last of three draws."""
    asked = []

    def sample(picked):
        asked.append(picked.tolist())
        groups = random_trajectories((len(picked), 6), 9, (2, 3), (1, 4), -1.0)
        groups.prompt_index = picked.astype(np.int32)
        groups.rewards[:] = np.where((picked % 2 == 0)[:, None], np.arange(6) % 2, 1)
        return groups

    order = np.array([1, 3, 2, 5, 7, 4, 6, 8, 10])
    trajectories, batch, loss, _ = train.draw_batch(sample, order, 3, options(dynamic_sampling=True))
    assert asked == [[1, 3, 2], [5, 7, 4], [6, 8, 10]]
    assert batch == [2, 4, 6] and len(trajectories.rewards) == 9  # all are booked
    assert train.draw_batch(sample, order[:6], 3, options(dynamic_sampling=True))[1] == [2, 4]  # fewer, then
    assert train.draw_batch(sample, np.array([2, 4, 1, 3]), 2, options(dynamic_sampling=True))[1] == [2, 4]
    assert asked[-1] == [2, 4]  # no further draw
    o = options(dynamic_sampling=True, loss="dapo")
    trajectories, batch, loss, _ = train.draw_batch(sample, order, 3, o)
    used = np.isin(trajectories.prompt_index, batch)
    assert loss.length == pytest.approx(trajectories.length[used].mean())


def test_waiting_for_others_is_not_sampling(monkeypatch):
    """`imbalance` compares the work of the processes."""
    groups, gather = random_trajectories((2, 6), 9, (2, 3), (1, 4), -1.0), rollout.gather
    monkeypatch.setattr(rollout, "gather", lambda *given: time.sleep(0.3) or gather(*given))

    def sample(_):
        time.sleep(0.1)
        return groups

    seconds = train.draw_batch(sample, groups.prompt_index, 2, options(loss="dapo", dynamic_sampling=True))[3]
    assert 0.1 <= seconds < 0.3
    known = {"sums": {}, "largest_log_ratio": 0.0, "grad_norm": 0.0, "seconds_rollout": 5.0, "seconds_update": 5.0}
    known |= {name: getattr(groups, name) for name in ("rewards", "length", "truncated")}
    each = [known | {"sampling": s, "seconds_busy": b} for s, b in ((1.0, 2.0), (0.5, 0.5))]
    assert train.metrics(each)["imbalance"] == 3 / 2


def test_gradient_of_a_batch_leaves_out_what_else_was_sampled(moved, ragged):
    """The normaliser is the number of prompts used."""
    live = ragged.live()
    used, terms = live[:4], {"temperature": TEMPERATURE, "clip": 0.2, "kl": 0.0, "entropy": 0.0, "batch_tokens": 500}
    found = []
    for trajectories in (ragged, ragged.take(used)):
        model = copy.deepcopy(moved)
        batch = ragged.prompt_index[used].tolist()
        train.grpo_step(train.LogProbs(model), None, trajectories, batch=batch, **terms)
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(*found)


def test_training_with_dynamic_sampling_books_all(tmp_path):
    save_selection(tmp_path / "s", TOY / "train.jsonl", range(100))
    given = {"selection": tmp_path / "s", "steps": 2, "batch_prompts": 16, "seed": 3}
    train.train(out=tmp_path / "plain", **given)
    train.train(out=tmp_path / "dynamic", dynamic_sampling=True, **given)
    log = {name: rollout.peek(tmp_path / name / "model")["facts"]["log"] for name in ("plain", "dynamic")}
    for line in log["dynamic"]:
        assert line["trajectories"] in (256, 384) and line["prompts"] == min(16, line["live_prompts"])
    assert all(line["prompts"] == 16 and line["trajectories"] == 128 for line in log["plain"])
    assert log["dynamic"][0]["live_prompts"] > log["plain"][0]["live_prompts"]


# ---------------------------------------------------------------------------------------------------------------------
# Metrics, and completions to read


def test_metrics_by_brute_force(tmp_path):
    """Of the first step, whose policy is the toy model: every number from the same trajectories, sampled again."""
    save_selection(tmp_path / "s", TOY / "train.jsonl", range(40))
    train.train(selection=tmp_path / "s", out=tmp_path / "o", steps=1, batch_prompts=40, temperature=1.2)
    line = json.loads((tmp_path / "o/metrics.jsonl").read_text())
    model, tokenizer = rollout.load_model(TOY / "model")
    rows, o = rollout.load_prompts(TOY / "train.jsonl")[:40], SimpleNamespace(reward="exact", reward_seconds=1.0)
    o.samples, o.max_tokens, o.temperature = 8, 8, 1.2
    engine, prompts = rollout.TransformersEngine(model, tokenizer), rollout.encode_prompts(tokenizer, rows)
    t = rollout.sample_trajectories(engine, tokenizer, rows, prompts, range(40), o, [0, 0])
    flat, right = t.length.flatten().tolist(), [reward == 1 for reward in t.rewards.flatten()]
    rights, wrongs = ([n for n, r in zip(flat, right, strict=True) if r == which] for which in (True, False))
    assert line["length"] == pytest.approx(sum(flat) / 320)
    assert (line["length_min"], line["length_max"]) == (min(flat), max(flat))
    assert line["length_right"] == pytest.approx(sum(rights) / len(rights))
    assert line["length_wrong"] == pytest.approx(sum(wrongs) / len(wrongs))
    assert line["reward_std"] == pytest.approx(np.std(right))
    assert line["all_right"] == sum(all(group) for group in t.rewards == 1) / 40
    assert line["all_wrong"] == sum(not any(group) for group in t.rewards == 1) / 40
    assert 0 <= line["log_ratio"] < 1e-6 < 1e-3 and line["log_ratio"] <= line["largest_log_ratio"] < 1e-4


def test_kept_advantages_are_those_of_the_loss(toy, ragged):
    n = ragged.live()[0]
    for name in get_args(LossName):
        best, worst = train.to_read(ragged, Loss(name, 3.0), toy[1], 0)
        centered = ragged.rewards[n].max() - ragged.rewards[n].mean()
        expected = centered if name == "dr_grpo" else centered / (ragged.rewards[n].std(ddof=1) + 1e-6)
        assert best["advantage"] == pytest.approx(expected, rel=1e-5) and worst["advantage"] < 0


def test_completions_are_kept(tmp_path):
    save_selection(tmp_path / "s", TOY / "train.jsonl", range(40))
    train.train(selection=tmp_path / "s", out=tmp_path / "o", steps=3, batch_prompts=20)
    lines = [json.loads(line) for line in (tmp_path / "o/completions.jsonl").read_text().splitlines()]
    rows = rollout.load_prompts(TOY / "train.jsonl")
    assert [line["step"] for line in lines] == [0, 0, 1, 1, 2, 2]
    for best, worst in zip(lines[::2], lines[1::2], strict=True):
        assert best["prompt"] == worst["prompt"] == rows[best["prompt_index"]]["prompt"]
        assert best["reward"] == 1 > worst["reward"] == 0 and best["advantage"] > 0 > worst["advantage"]
        assert best["text"] == rows[best["prompt_index"]]["answer"] != worst["text"]
        assert best["truncated"] is False


def test_show(tmp_path, capsys):
    rollout.rollout(out=tmp_path / "t", limit=30, samples=3, max_tokens=5)
    t = rollout.load_trajectories(tmp_path / "t/00000.safetensors")[0]
    capsys.readouterr()
    rollout.show(tmp_path / "t", prompts=2, sort="length")
    lines = capsys.readouterr().out.splitlines()
    longest = np.argsort(-t.length[: len(t.length)].mean(1), kind="stable")[:2]
    rows = rollout.load_prompts(TOY / "train.jsonl")
    heads = [line for line in lines if line.startswith("prompt ")]
    assert len(lines) == 2 * 5 and len(heads) == 2
    assert heads[0].startswith("prompt ") and rows[int(heads[0].split()[1][:-1])]["prompt"] in heads[0]
    assert t.length[longest[0]].max() == 5 and "[truncated]" in "\n".join(lines)
    rollout.show(tmp_path / "t", prompts=30, sort="reward")
    shown = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("  ") and "Â" not in line]
    means = [sum(float(line[0]) for line in shown[i : i + 3]) for i in range(0, 90, 3)]
    assert means == sorted(means, reverse=True) and means[0] > means[-1]
    assert identities(tmp_path / "t", "*.safetensors")  # nothing was changed
