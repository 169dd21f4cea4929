"""The GRPO step against hand-worked numbers and plain autograd."""

import copy
import doctest
import json
import math

import numpy as np
import pytest
import torch
from conftest import TEMPERATURE, sample, save_selection, sequence
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

import project
import rollout
import train
from rollout import TOY, group_advantages, load_prompts
from train import LogProbs, collate, completion_logps, k3_kl, policy_objective


def test_advantages_by_hand():
    # 3 of 4 right: mean 3/4, sample std 1/2. Rewards 0, 2, 4: mean 2, std 2. All equal: 0.
    rewards = torch.tensor([[1.0, 1.0, 1.0, 0.0]])
    torch.testing.assert_close(group_advantages(rewards), torch.tensor([[0.5, 0.5, 0.5, -1.5]]), atol=1e-5, rtol=0)
    torch.testing.assert_close(group_advantages(torch.tensor([[0.0, 2.0, 4.0]])), torch.tensor([[-1.0, 0.0, 1.0]]))
    assert group_advantages(torch.ones(1, 5)).tolist() == [[0.0] * 5]


def test_k3_by_hand():
    # q = 2: 2 - log 2 - 1; q = 1/2: 1/2 + log 2 - 1; q = 1: 0
    logps = torch.tensor([0.0, 0.0, -1.0])
    initial = torch.tensor([math.log(2), -math.log(2), -1.0])
    expected = torch.tensor([1 - math.log(2), math.log(2) - 0.5, 0.0])
    torch.testing.assert_close(k3_kl(logps, initial), expected)


@pytest.mark.parametrize(
    "ratio, advantage, clip, expected",
    [
        (1.5, 2.0, 0.2, 2.4),  # gain is capped at 1.2
        (1.5, -2.0, 0.2, -3.0),  # a loss is not
        (0.5, 2.0, 0.2, 1.0),  # min(1.0, 1.6)
        (0.5, -2.0, 0.2, -1.6),  # min(-1.0, -1.6)
    ],
)
def test_clipped_ratio_by_hand(ratio, advantage, clip, expected):
    logps, behavior = torch.tensor([math.log(ratio) - 3]), torch.tensor([-3.0])
    value = policy_objective(logps, behavior, torch.tensor([advantage]), clip)
    torch.testing.assert_close(value, torch.tensor([expected]))


@pytest.mark.parametrize("logits", [1 << 26, 4000])  # at once; some columns at a time
def test_completion_logps_are_those_of_transformers_logits(moved, ragged, logits, monkeypatch):
    """Shared prompts of several lengths, padding: against one unpadded sequence at a time."""
    monkeypatch.setattr(train, "LOGITS", logits)
    batch = collate(ragged, [(n, range(6)) for n in range(40)], moved.device)
    assert len(set((batch.segment == 0).sum(1).tolist())) > 1 and (batch.segment[:, -1] == -1).any()
    with torch.no_grad():
        found = completion_logps(moved, batch, TEMPERATURE, with_entropy=True)
    by_trajectory = list(zip(*(values.split(batch.length) for values in found), strict=True))
    assert len(by_trajectory) == 240
    for m, (logps, entropy) in enumerate(by_trajectory):
        ids, start, _ = sequence(ragged, *divmod(m, 6))
        with torch.no_grad():
            expected = torch.log_softmax(moved(ids[None]).logits[0] / TEMPERATURE, -1)[start - 1 : -1]
        torch.testing.assert_close(
            entropy, torch.distributions.Categorical(logits=expected).entropy(), atol=3e-5, rtol=0
        )
        torch.testing.assert_close(logps, expected.gather(1, ids[start:, None])[:, 0], atol=3e-5, rtol=0)


def test_a_piece_has_the_rows_and_the_advantages_of_its_group(ragged):
    """Two pieces of one group, in a batch with two of another."""
    first, second = ragged.live()[:2].tolist()
    pieces = [(first, range(3, 6)), (second, range(3)), (first, range(3)), (second, range(3, 6))]
    batch = collate(ragged, pieces, torch.device("cpu"))
    assert batch.prompt_index == [first, second, first, second]
    row, _ = batch.valid.nonzero(as_tuple=True)
    of_tokens = (row, batch.target[batch.valid], batch.behavior_logps, batch.advantages, batch.weight)
    of_tokens = zip(*(values.split(batch.length) for values in of_tokens), strict=True)
    for m, (row, tokens, logps, advantages, weight) in enumerate(of_tokens):
        n, k = [(n, k) for n, ks in pieces for k in ks][m]
        ids, start, behavior = sequence(ragged, n, k)
        assert row.unique().tolist() == [m // 3]
        assert torch.equal(tokens, ids[start:])
        in_prompt, in_completion = batch.segment[m // 3] == 0, batch.segment[m // 3] == 1 + m
        assert torch.equal(batch.ids[m // 3][in_prompt], ids[:start])
        assert torch.equal(batch.ids[m // 3][in_completion], ids[start:-1])
        both = torch.cat([batch.position[m // 3][in_prompt], batch.position[m // 3][in_completion]])
        assert torch.equal(both, torch.arange(len(ids) - 1))
        np.testing.assert_array_equal(logps, behavior)
        rewards = ragged.rewards[n].astype(np.float64)
        expected = (rewards[k] - rewards.mean()) / (rewards.std(ddof=1) + 1e-6)
        assert advantages.tolist() == pytest.approx([expected] * len(tokens), rel=1e-5)
        assert weight.tolist() == pytest.approx([1 / (6 * len(tokens))] * len(tokens))


@pytest.mark.parametrize("halved", [False, True])
@pytest.mark.parametrize("batch_tokens", [1, 60, 150, 10**6])
def test_batches_have_every_trajectory_once_and_keep_to_their_size(ragged, batch_tokens, halved):
    live, seen = ragged.live(), []
    for pieces in train.micro_batches(ragged, live, batch_tokens, np.full(40, halved)):
        seen += [(n, k) for n, ks in pieces for k in ks]
        batch = collate(ragged, pieces, torch.device("cpu"))
        assert batch.ids.numel() <= batch_tokens or len(batch.length) == 1
        for n, ks in pieces if halved else ():
            assert sum(set(ks) <= set(half) for half in train.halves(ragged.rewards[n])) == 1
    assert sorted(seen) == [(n, k) for n in live for k in range(6)]


@pytest.mark.parametrize(("long", "logits"), [(train.LONG, train.LOGITS), (1, 500)])
def test_gradient_checkpointing_changes_nothing(moved, toy, ragged, long, logits, monkeypatch):
    """Layers computed twice: the same gradients."""
    plain, measured = gradients(moved, toy[0], ragged)
    monkeypatch.setattr(train, "LONG", long)
    monkeypatch.setattr(train, "LOGITS", logits)
    model = copy.deepcopy(moved)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    twice = []
    model.model.layers[0].input_layernorm.register_forward_hook(lambda *_: twice.append(1))
    again = ascend(model, toy[0], ragged)
    assert len(twice) == 2  # forward, and in the backward pass
    assert again == pytest.approx(measured, rel=1e-4)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, plain[name], rtol=1e-3, atol=1e-6)


def test_bfloat16_autocast_is_near_float32_and_weights_stay_float32(tmp_path):
    save_selection(tmp_path / "s", TOY / "train.jsonl", range(32))
    options = {"selection": tmp_path / "s", "steps": 2, "batch_prompts": 32, "lr": 1e-4}
    log = {d: trained(out=tmp_path / d, dtype=d, **options) for d in ("float32", "bfloat16")}
    weights = {d: rollout.load_model(tmp_path / d / "model")[0].state_dict() for d in log}
    assert all(value.dtype == torch.float32 for value in weights["bfloat16"].values())
    before = rollout.load_model(TOY / "model")[0].state_dict()
    moved_by = {d: torch.cat([(w[n] - before[n]).flatten() for n in w]) for d, w in weights.items()}
    assert 0 < moved_by["bfloat16"].abs().max() <= 2.5e-4  # 2 steps of AdamW
    assert log["bfloat16"][0]["entropy"] == pytest.approx(log["float32"][0]["entropy"], rel=0.1)


OPTIONS = {"temperature": TEMPERATURE, "clip": 0.2, "kl": 0.3, "entropy": 0.2, "batch_tokens": 10**6}


def trained(out, **options) -> list[dict]:
    """Train; the lines of the log, which the model's record and metrics.jsonl both hold."""
    train.train(out=out, **options)
    log = rollout.peek(out / "model")["facts"]["log"]
    assert [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()] == log
    assert sorted(path.name for path in out.iterdir()) == ["completions.jsonl", "metrics.jsonl", "model", "optimizer"]
    return log


def ascend(model, initial, trajectories, **options) -> dict[str, float]:
    """`grpo_step` on all of them; J, and means over the tokens of live groups."""
    policies = [None if each is None else LogProbs(each) for each in (model, initial)]
    sums = train.grpo_step(*policies, trajectories, batch=trajectories.prompt_index, **OPTIONS | options)
    tokens = max(sums.pop("live_tokens"), 1)
    return {
        name: value if name in ("objective", "largest_log_ratio") else value / tokens for name, value in sums.items()
    }


def gradients(model, initial, trajectories, **options):
    model = copy.deepcopy(model)
    measured = ascend(model, initial, trajectories, **options)
    return {name: parameter.grad for name, parameter in model.named_parameters()}, measured


@pytest.mark.parametrize("long", [train.LONG, 1])  # one call of attention under a mask; sequence by sequence
@pytest.mark.parametrize("logits", [train.LOGITS, 500])  # at once; a few columns at a time
def test_gradient_is_that_of_the_formula(moved, toy, ragged, long, logits, monkeypatch):
    """J of the file's head, written out sequence by sequence, token by token, and differentiated by autograd, all in
    float64."""
    monkeypatch.setattr(train, "LONG", long)
    monkeypatch.setattr(train, "LOGITS", logits)
    moved, initial = (copy.deepcopy(m).double() for m in (moved, toy[0]))
    model = copy.deepcopy(moved)
    objective = 0.0
    for n in range(40):
        rewards = ragged.rewards[n].astype(np.float64)
        if np.ptp(rewards) == 0:
            continue
        advantages = (rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-6)
        for k, advantage in enumerate(advantages):
            ids, start, behavior = sequence(ragged, n, k)
            logits, reference = model(ids[None]).logits[0] / TEMPERATURE, initial(ids[None]).logits[0] / TEMPERATURE
            total = 0.0
            for t in range(start, len(ids)):
                p, q = torch.softmax(logits[t - 1], -1), torch.softmax(reference[t - 1], -1).detach()
                rho = p[ids[t]] / math.exp(behavior[t - start])
                ratio = q[ids[t]] / p[ids[t]]
                total += torch.minimum(rho * advantage, rho.clamp(0.8, 1.2) * advantage)
                total += -0.3 * (ratio - ratio.log() - 1) + 0.2 * -(p * p.log()).sum()
            objective += total / (len(ids) - start) / (40 * 6)
    (-objective).backward()
    ours, measured = gradients(moved, initial, ragged)
    assert measured["objective"] == pytest.approx(objective.item(), abs=1e-7)
    assert 0 < measured["outside_clip"] < 1
    for name, parameter in model.named_parameters():  # advantages and 1/(K|τ|) are float32
        assert (ours[name] - parameter.grad).norm() <= 1e-6 * parameter.grad.norm(), name


class LargestLogits(TorchDispatchMode):
    """Elements of the largest tensor over the vocabulary that any operation returns."""

    def __init__(self, vocabulary: int):
        super().__init__()
        self.vocabulary, self.elements = vocabulary, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        new = isinstance(made, torch.Tensor) and not function.is_view
        if new and made.ndim > 2 and made.shape[-1] == self.vocabulary:
            self.elements = max(self.elements, made.numel())
        return made


@pytest.mark.parametrize("script", ["train", "project"])
def test_logits_are_never_held_whole(moved, toy, ragged, script, monkeypatch):
    """Forward and backward, with KL and entropy."""
    vocabulary, model = moved.config.vocab_size, copy.deepcopy(moved)
    whole = collate(ragged, [(int(n), range(6)) for n in ragged.live()], moved.device)
    whole = whole.target.numel() * vocabulary
    found = []
    for limit in (train.LOGITS, whole // 10):
        monkeypatch.setattr(train, "LOGITS", limit)
        with LargestLogits(vocabulary) as largest:
            if script == "train":
                ascend(model, toy[0], ragged)
            else:
                sketcher = project.GradientSketcher(model, 64, 1.0, seed=1)
                groups = ragged.take(ragged.live())
                project.project_groups(sketcher, groups, np.zeros(len(groups.rewards), bool), TEMPERATURE, 10**6)
        found.append(largest.elements)
    assert found[0] == whole and 0 < found[1] <= whole // 10


def test_micro_batches_change_nothing(moved, toy, ragged):
    whole, _ = gradients(moved, toy[0], ragged)
    for batch_tokens in (1, 150):
        parts, _ = gradients(moved, toy[0], ragged, batch_tokens=batch_tokens)
        for name in whole:
            assert (parts[name] - whole[name]).norm() <= 1e-4 * whole[name].norm(), name


def test_equal_rewards_cost_no_forward_pass(moved, toy, ragged, monkeypatch):
    model, prompts = copy.deepcopy(moved), []
    monkeypatch.setattr(
        train,
        "completion_logps",
        lambda m, b, *o, **p: prompts.extend(b.prompt_index) or completion_logps(m, b, *o, **p),
    )
    ascend(model, None, ragged)
    assert sorted(prompts) == ragged.prompt_index[ragged.live()].tolist()


def test_a_stage_writes_a_checkpoint_that_goes_on_exactly(tmp_path):
    """4 steps at once are 2 steps, saved, and 2 more: weights, moments and AdamW's step count are handed on."""
    rows = load_prompts(TOY / "train.jsonl")
    chosen = [i for i, row in enumerate(rows) if row["family"] in ("fst", "swp")][:24]
    save_selection(tmp_path / "s.safetensors", TOY / "train.jsonl", chosen)
    options = {"selection": tmp_path / "s.safetensors", "batch_prompts": 24, "kl": 0.0, "lr": 1e-3}
    # both halves draw the random numbers of steps 0 and 1, so the unbroken run below repeats those too
    trained(out=tmp_path / "a", steps=2, **options)
    state = {"model": tmp_path / "a/model", "optimizer": tmp_path / "a/optimizer"}
    log = trained(out=tmp_path / "b", steps=2, **state, **options)
    train.train(out=tmp_path / "c", model=tmp_path / "a/model", steps=2, **options)  # without the optimizer's state
    loaded = {name: AutoModelForCausalLM.from_pretrained(tmp_path / name / "model") for name in "abc"}
    assert not torch.equal(loaded["b"].lm_head.weight, loaded["c"].lm_head.weight)
    # independently: plain AdamW over the gradients of the same rollouts, without a break
    model, tokenizer = rollout.load_model(TOY / "model")
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    for step in (0, 1, 0, 1):
        if step == 0:
            random = np.random.default_rng(0)
        picked = random.choice(np.array(chosen), 24, replace=False)
        engine, options = rollout.TransformersEngine(model, tokenizer), {"samples": 8, "max_tokens": 8}
        sampled = sample(engine, tokenizer, rows, picked, [0, step], temperature=1.0, **options)
        adamw.zero_grad()
        ascend(model, None, sampled, temperature=1.0, kl=0.0, entropy=0.001, batch_tokens=16384)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adamw.step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(dict(loaded["b"].named_parameters())[name], parameter, atol=1e-4, rtol=1e-3)
    assert [line["step"] for line in log] == [0, 1]
    assert all(0 <= line["reward"] <= 1 and line["grad_norm"] > 0 for line in log)
    stages = [rollout.model_identity(path) for path in (TOY / "model", tmp_path / "a/model", tmp_path / "b/model")]
    assert train.lineage(tmp_path / "b/model") == stages and len(set(stages)) == 3
    moments, record = rollout.load(tmp_path / "b/optimizer/00000.safetensors", "optimizer")
    assert set(moments) == {f"{name}.{m}" for name, _ in model.named_parameters() for m in ("exp_avg", "exp_avg_sq")}
    assert record["facts"]["adam_steps"] == 4 and record["facts"]["model"] == stages[2]
    for name, parameter in model.named_parameters():
        for m in ("exp_avg", "exp_avg_sq"):
            theirs = adamw.state[parameter][m]
            assert (torch.from_numpy(moments[f"{name}.{m}"]) - theirs).norm() <= 1e-2 * theirs.norm() + 1e-9, name


def test_a_checkpoint_goes_on_where_it_was_saved(tmp_path, monkeypatch):
    """Broken off after three steps of four, with a checkpoint after each: the same bytes as without a break."""
    save_selection(tmp_path / "s", TOY / "train.jsonl", range(32))
    options = {"selection": tmp_path / "s", "steps": 4, "batch_prompts": 16, "lr": 1e-3}
    unbroken = trained(out=tmp_path / "a", **options)
    unpatched, steps = rollout.sample_trajectories, []

    def breaking(*arguments, **checks):
        steps.append(checks["seed"][-1])  # the seed is (--seed, step)
        if steps == [0, 1, 2, 3]:
            raise KeyboardInterrupt
        return unpatched(*arguments, **checks)

    monkeypatch.setattr(rollout, "sample_trajectories", breaking)
    with pytest.raises(KeyboardInterrupt):
        train.train(out=tmp_path / "b", save_every=0, **options)
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["checkpoint"]
    log = trained(out=tmp_path / "b", save_every=10**6, **options)
    assert steps == [0, 1, 2, 3, 3]
    assert [line["reward"] for line in log] == [line["reward"] for line in unbroken]
    for name in ("model", "optimizer/00000.safetensors"):
        ours, theirs = (rollout.peek(tmp_path / folder / name) for folder in "ab")
        assert ours["identity"] == theirs["identity"]


def test_more_iterations_move_the_ratio_off_one(tmp_path):
    save_selection(tmp_path / "s.safetensors", TOY / "train.jsonl", range(32))
    options = {"selection": tmp_path / "s.safetensors", "steps": 1, "lr": 1e-3}
    once = trained(out=tmp_path / "a", iterations=1, **options)
    thrice = trained(out=tmp_path / "b", iterations=3, **options)
    assert once[0]["outside_clip"] == 0 < thrice[0]["outside_clip"]


def test_a_stage_without_a_live_group_is_saved(tmp_path):
    (tmp_path / "d.jsonl").write_text('{"prompt": "rev(123)=", "answer": "impossible"}\n' * 4)
    save_selection(tmp_path / "s", tmp_path / "d.jsonl", range(4))
    log = trained(selection=tmp_path / "s", data=str(tmp_path / "d.jsonl"), out=tmp_path / "a", steps=2)
    assert [line["live_prompts"] for line in log] == [0, 0]
    before, after = rollout.load_model(TOY / "model")[0], rollout.load_model(tmp_path / "a/model")[0]
    assert torch.equal(before.lm_head.weight, after.lm_head.weight)


def test_worked_example_of_the_docstring():
    results = doctest.testmod(train)
    assert results.attempted >= 1 and results.failed == 0
