"""Prompts that have only failures are sampled again: which, what takes their place, and what follows from groups of
different sizes. What is expected is put together from ordinary folders of trajectories, whose groups are all equal."""

import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, identities, load_folder, processes, run_script, save_descendant
from test_cropi import SAVED, chosen_of, run_small, times_of

import cropi
import project
import rollout
import train
from rollout import BadInput, Trajectories, peek

sys.path.insert(0, str(ROOT / "bench"))

import report

K, M = 4, 2


def groups(trajectories: Trajectories) -> dict[int, list[tuple]]:
    """Prompt -> its completions: (tokens, log-probs, reward, truncated), by adding up lengths."""
    found, at, t = {}, 0, trajectories
    for n, i in enumerate(t.prompt_index.tolist()):
        found[i] = []
        for k, length in enumerate(t.length[n].tolist()):
            if length:
                of = slice(at, at + length)
                about = t.tokens[of].tolist(), t.behavior_logps[of].tolist(), float(t.rewards[n, k])
                found[i].append((*about, int(t.truncated[n, k])))
            else:
                assert np.isnan(t.rewards[n, k]) and t.truncated[n, k] == 0
            at += length
    assert at == len(t.tokens)
    return found


def rewards_of(group: list[tuple]) -> list[float]:
    return [reward for _, _, reward, _ in group]


@pytest.fixture
def folders(small_world, moved, toy):
    """K trajectories of the toy model; M of a policy that came from it; and the first with its failures retried."""
    model = save_descendant(small_world / "moved", moved, toy[1])
    data = str(small_world / "train.jsonl")
    rollout.rollout(out=small_world / "stored", data=data, samples=K, shard=25)
    rollout.rollout(out=small_world / "fresh", data=data, model=model, samples=M, seed=7, shard=25)
    rollout.rollout(
        out=small_world / "retried", data=data, model=model, samples=M, seed=7, retry=small_world / "stored"
    )
    return small_world


def test_failures_give_way_to_the_first_group_with_a_success(folders, capsys):
    stored, fresh, made = (groups(load_all_ragged(folders / name)) for name in ("stored", "fresh", "retried"))
    failed = {i for i, group in stored.items() if not any(rewards_of(group))}
    won = {i for i in failed if any(rewards_of(fresh[i]))}
    assert 2 < len(won) < len(failed) < 60
    assert made == {i: fresh[i] if i in won else stored[i] for i in range(60)}
    sums = rollout.totals(folders / "retried")
    assert sums["sampled"] == M * len(failed)  # what was paid
    assert sums["trajectories"] == K * (60 - len(won)) + M * len(won)  # what there is
    assert sums["failures"] == len(failed) - len(won)
    assert sums["rewards"] == sum(sum(rewards_of(group)) for group in made.values())
    rollout.rollout(**again(folders))  # nothing is left to do, and nothing is said
    assert capsys.readouterr().out == ""
    rollout.rollout(**again(folders) | {"out": folders / "twice", "retry": folders / "retried", "seed": 8})
    assert f"of {len(failed) - len(won)} prompts with only failures have a new group" in capsys.readouterr().out
    twice = groups(load_all_ragged(folders / "twice"))
    assert all(twice[i] == made[i] for i in range(60) if any(rewards_of(made[i])))
    assert all(any(rewards_of(twice[i])) for i in range(60) if twice[i] != made[i])


def load_all_ragged(folder) -> Trajectories:
    """Shards may be of different widths, where M is larger than K."""
    return rollout.join([rollout.load_trajectories(path)[0] for path in rollout.shards(folder, "trajectories")])


def again(folders) -> dict:
    data, model = str(folders / "train.jsonl"), folders / "moved"
    about = {"out": folders / "retried", "retry": folders / "stored", "samples": M, "seed": 7}
    return about | {"data": data, "model": model}


def test_a_prompt_of_partial_rewards_is_live_and_stays(tmp_path):
    rewards = np.array([[0, 0, 0], [0.2, 0.2, 0.2], [0, 0.2, 0], [1, 1, 1], [0, 0, 1]], np.float32)
    one = np.ones((5, 3), np.int32)
    ids = np.arange(5, dtype=np.int32)
    logps = np.zeros(15, np.float32)
    made = Trajectories(
        ids, np.ones(5, np.int32), ids, one, np.zeros(15, np.int32), logps, rewards, one.astype(np.uint8)
    )
    assert made.failures().tolist() == [0, 1]


def test_advantages_are_those_of_the_groups_own_trajectories():
    whole = torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 0.0, torch.nan, torch.nan], [1.0, 0.0, 0.0, torch.nan]])
    expected = [[1.5, -0.5, -0.5, -0.5], [0.5**0.5, -(0.5**0.5), 0, 0], [2 / 3**0.5, -1 / 3**0.5, -1 / 3**0.5, 0]]
    assert torch.allclose(rollout.group_advantages(whole), torch.tensor(expected), atol=1e-5)
    centered = [[0.75, -0.25, -0.25, -0.25], [0.5, -0.5, 0, 0], [2 / 3, -1 / 3, -1 / 3, 0]]
    assert torch.allclose(rollout.group_advantages(whole, scale=False), torch.tensor(centered), atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"loss": "dr_grpo"}, {"mask_truncated": True, "ratio": "sequence"}])
def test_gradients_are_those_of_the_groups_alone(folders, options):
    """All that project.py writes of a prompt, as if the two kinds of groups stood in folders of their own."""
    made = {}
    for name in ("stored", "fresh", "retried"):
        out = folders / f"gradients-{name}"
        how = {"k": 256, "halves": 60, "batch_tokens": 150} | options
        project.project(trajectories=folders / name, model=folders / "moved", out=out, **how)
        tensors = load_folder(out, "gradients")
        halves = dict(zip(tensors.pop("half_index").tolist(), tensors.pop("half_sketch"), strict=True))
        index = tensors.pop("prompt_index").tolist()
        made[name] = {i: {key: x[n] for key, x in tensors.items()} | {"half": halves[i]} for n, i in enumerate(index)}
    stored = groups(load_all_ragged(folders / "stored"))
    failed = {i for i, group in stored.items() if not any(rewards_of(group))}
    expected = made["stored"] | {i: rows for i, rows in made["fresh"].items() if i in failed}
    assert made["retried"].keys() == expected.keys() and len(set(made["fresh"]) & failed) > 1
    for i, rows in expected.items():
        for key, values in rows.items():
            assert np.allclose(made["retried"][i][key], values, rtol=1e-4, atol=1e-5 * np.abs(values).max()), (i, key)


def test_dapo_divides_by_the_mean_length_of_what_is_there(folders):
    out = folders / "gradients"
    project.project(trajectories=folders / "retried", model=folders / "moved", out=out, k=64, loss="dapo")
    lengths = [len(tokens) for group in groups(load_all_ragged(folders / "retried")).values() for tokens, *_ in group]
    recipe = next(iter(rollout.shards(out, "gradients").values()))["recipe"]
    assert recipe["inputs"]["length"] == pytest.approx(np.mean(lengths))


def test_selectors_see_means_over_what_is_there(folders):
    seen = cropi.select.of_trajectories(folders / "retried", 60)
    for i, group in groups(load_all_ragged(folders / "retried")).items():
        means = [np.mean(values) for values in zip(*((len(t), r, cut) for t, _, r, cut in group), strict=True)]
        assert np.allclose([seen[name][i] for name in ("length", "pass_rate", "truncated")], means)


def test_more_samples_than_before(folders):
    """M may be larger than K: then the tables are wider."""
    rollout.rollout(**again(folders) | {"out": folders / "wide", "samples": 2 * K})
    rollout.rollout(**again(folders) | {"out": folders / "all", "samples": 2 * K, "retry": None, "shard": 25})
    stored, fresh, made = (groups(load_all_ragged(folders / name)) for name in ("stored", "all", "wide"))
    failed = {i for i, group in stored.items() if not any(rewards_of(group))}
    assert made == {i: fresh[i] if i in failed and any(rewards_of(fresh[i])) else stored[i] for i in range(60)}
    project.project(trajectories=folders / "wide", model=folders / "moved", out=folders / "gradients-wide", k=64)
    assert {len(group) for group in made.values()} == {K, 2 * K}


@pytest.mark.parametrize("options", [{"temperature": 0.5}, {"max_tokens": 5}, {"data": "valid-rev.jsonl"}])
def test_only_trajectories_of_the_same_data_and_options_can_be_retried(folders, options):
    options = {name: str(folders / value) if name == "data" else value for name, value in options.items()}
    with pytest.raises(BadInput, match=r"stored: .*; --retry needs trajectories of the same data and options"):
        rollout.rollout(**again(folders) | {"out": folders / "other"} | options)
    assert not (folders / "other").exists()


def test_groups_of_a_foreign_model_are_refused(folders, moved, toy):
    """Stored by a model that the current one does not come from, retried by the current one."""
    moved.save_pretrained(folders / "foreign")
    toy[1].save_pretrained(folders / "foreign")
    data = str(folders / "train.jsonl")
    rollout.rollout(out=folders / "first", data=data, model=folders / "foreign", samples=K)
    rollout.rollout(**again(folders) | {"out": folders / "second", "retry": folders / "first"})
    with pytest.raises(BadInput, match="second was sampled by another model"):
        project.project(trajectories=folders / "second", model=folders / "moved", out=folders / "gradients")


@pytest.mark.parametrize(
    "every, refresh, retried, refreshed", [(1, 0, [2, 3, 4], []), (2, 3, [3], [4]), (2, 2, [], [3])]
)
def test_when_a_run_retries(small_world, every, refresh, retried, refreshed):
    options = {"stages": 4, "retry_failed": M, "retry_every": every, "refresh_every": refresh, "static": False}
    report = run_small(small_world, "a", **options)
    current, model = small_world / "a/rollouts/train", rollout.TOY / "model"
    for s in range(1, 5):
        stage = small_world / f"a/stage-0{s}"
        assert (stage / "rollouts").exists() == (s in retried + refreshed)
        entry = report["evaluations"][s]
        if s in retried:
            recipe = peek(stage / "rollouts/train/00000.safetensors")["recipe"]
            assert recipe["inputs"]["model"] == rollout.model_identity(model)
            assert recipe["shard"]["trajectories"] == peek(current / "00000.safetensors")["identity"]
            assert [path.name for path in (stage / "rollouts").iterdir()] == ["train"]
            failed = sum(not any(rewards_of(group)) for group in groups(load_all_ragged(current)).values())
            assert entry["trajectories_offline"] == M * failed > 0
            assert entry["seconds_rollout"] > 0
        elif s in refreshed:
            assert entry["trajectories_offline"] == 8 * (60 + 12 + 12)
        else:
            assert "trajectories_offline" not in entry
        current = stage / "rollouts/train" if s in retried + refreshed else current
        used = [peek(path)["recipe"]["shard"]["trajectories"] for path in sorted(stage.glob("gradients-train/*"))]
        assert used == list(identities(current, "*.safetensors").values())
        model = stage / "model"
    before, choice = times_of(small_world / "a"), chosen_of(small_world / "a/stage-04")
    run_small(small_world, "a", **options)
    assert times_of(small_world / "a") == before and chosen_of(small_world / "a/stage-04") == choice
    assert identities(small_world / "a", SAVED)


def test_selectors_that_look_at_no_trajectories_do_not_pay_for_a_retry(small_world):
    report = run_small(small_world, "a", selector="random", retry_failed=M)
    assert not list((small_world / "a").glob("stage-*/rollouts"))
    assert all("trajectories_offline" not in entry for entry in report["evaluations"][1:])


def test_static_and_retry_contradict_each_other(small_world):
    with pytest.raises(BadInput, match="--static chooses once"):
        run_small(small_world, "a", static=True, retry_failed=M)
    assert not (small_world / "a").exists()


def test_shown_groups_end_with_their_last_completion(folders):
    shown = run_script("rollout.py", "show", folders / "retried", "--prompts", 60, "--sort", "length").stdout
    made = groups(load_all_ragged(folders / "retried"))
    blocks = {int(block.partition(":")[0]): block.splitlines()[2:] for block in shown.split("prompt ")[1:]}
    assert {i: len(lines) for i, lines in blocks.items()} == {i: len(group) for i, group in made.items()}
    assert "nan" not in shown.lower()


@pytest.mark.dist
def test_a_seed_and_a_number_of_processes_give_the_same_groups(folders):
    words = [f"--{name.replace('_', '-')}={value}" for name, value in again(folders).items() if name != "out"]
    done = processes(2, ROOT / "rollout.py", f"--out={folders / 'two'}", *words)
    assert done.returncode == 0, done.stderr
    assert identities(folders / "two", "*.safetensors") == identities(folders / "retried", "*.safetensors")


def test_pieces_hold_only_trajectories_that_are_there(folders):
    t = load_all_ragged(folders / "retried")
    halved = np.arange(60) % 2 == 0
    for limit in (1, 30, 4096):
        seen = [(n, int(k)) for batch in train.micro_batches(t, t.live(), limit, halved) for n, ks in batch for k in ks]
        assert sorted(seen) == [(n, k) for n in t.live().tolist() for k in range(t.sizes[n])]


def test_the_report_shows_the_completions_that_are_there(small_world):
    run_small(small_world, "a", retry_failed=M)
    run, rows = small_world / "a", rollout.load_prompts(small_world / "train.jsonl")
    tensors, _ = rollout.load(run / "stage-02/selection.safetensors", "selection")
    retried = groups(load_all_ragged(run / "stage-02/rollouts/train"))
    shown = [one for some in report.prompts_of(run, 2, rows, tensors, 30).values() for one in some]
    assert {len(retried[one["index"]]) for one in shown} == {M, 8}
    for one in shown:
        group = retried[one["index"]][: report.COMPLETIONS]
        assert [(right, cut) for _, right, cut in one["completions"]] == [(r == 1, cut) for _, _, r, cut in group]


def test_a_retried_pool_is_not_called_stale(small_world, capsys, monkeypatch):
    """What old trajectories lack is what they never solved; where that was retried, age alone is no reason."""
    for limit in ("STALE", "VALID_STALE"):
        monkeypatch.setattr(cropi.select, limit, 1.1)
    report = run_small(small_world, "a", stages=3, retry_failed=M)
    first, *later = capsys.readouterr().out.split("stage 1 of 3")
    assert "moved away from the stored trajectories; sample failures anew" in first
    assert len(later) == 1 and "moved away" not in later[0]
    assert [entry["diagnostics"]["samplers"] for entry in report["evaluations"][1:]] == [1, 2, 3]
