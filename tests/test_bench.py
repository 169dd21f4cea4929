"""The study: runs are reused, resumed and never mixed; the formulas of the comparison against worked numbers."""

import copy
import doctest
import importlib
import json
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import scipy.stats
import torch
import typer
from conftest import ROOT, identities, load_all, load_folder, run_script
from safetensors.numpy import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen2Config

sys.path.insert(0, str(ROOT / "bench"))

import ablate
import compare
import gpu
import lines
import peers
import plan
import scorers
import tries
import why

import cropi
import project
import rollout
import train
from rollout import BadInput


def test_worked_examples():
    assert doctest.testmod(compare).attempted == 4
    assert doctest.testmod(compare).failed == 0


def arm(curves, seconds=10.0, offline=0.0, scoring=0.0):
    """Runs whose stages have 20 steps and cost the given seconds each."""
    curves = np.atleast_2d(curves)
    evaluations = [{"steps": 0, "seconds_rollout": offline, "trajectories_offline": 500 * (offline > 0)}]
    for stage in range(1, curves.shape[1]):
        evaluations.append({"steps": 20 * stage, "seconds_scoring": scoring, "seconds_training": seconds})
        evaluations[-1]["trajectories_training"] = 1000
    costs = {axis: np.array([compare.cost(evaluations, axis)] * len(curves)) for axis in compare.COSTS}
    return compare.Arm(list(range(len(curves))), curves, 0 * curves, np.nan * curves, costs)


def test_acceleration_by_hand():
    full = arm([0.2, 0.3, 0.4, 0.5, 0.6])  # reaches its best, 0.6, at step 80, after 40 s and 4,000 trajectories
    # 0.6 is half-way between 0.4 and 0.8: 10 steps into the second stage, at 30; 3 + 2 (4 + 10) less 5 s; 2,000
    fast = arm([0.2, 0.4, 0.8, 0.8, 0.9], offline=3, scoring=4)
    every = np.arange(1), np.arange(1)
    found = compare.accelerations(full, fast, every)
    assert found == pytest.approx({"steps": 80 / 30, "trajectories": 4000 / 2000, "seconds": 40 / 26})
    assert compare.accelerations(full, full, every) == pytest.approx(dict.fromkeys(compare.COSTS, 1.0))
    slow = arm([0.2, 0.3, 0.4, 0.4, 0.5])
    assert set(compare.accelerations(full, slow, every).values()) == {0.0}
    assert "never" in compare.as_markdown(compare.table({"full": full, "slow": slow}, "full"), "full")


def test_a_level_counts_where_it_is_kept():
    """0.62 on the way to 0.5 is not 0.6 reached; the least-squares non-decreasing curve is worked by hand."""
    np.testing.assert_allclose(compare.smoothed(np.array([0.2, 0.62, 0.5, 0.5, 0.7])), [0.2, 0.54, 0.54, 0.54, 0.7])
    full = arm([0.2, 0.3, 0.4, 0.5, 0.6])
    lucky = arm([0.2, 0.62, 0.5, 0.5, 0.7])  # 0.6 is 0.06 / 0.16 of the way in the last stage
    found = compare.accelerations(full, lucky, (np.arange(1), np.arange(1)))
    assert found["steps"] == pytest.approx(80 / (60 + 20 * 0.06 / 0.16))


def test_intervals_are_those_of_scipy():
    random = np.random.default_rng(1)
    rewards = [random.integers(0, 2, (prompts, 4)).astype(float) for prompts in (30, 50)]
    independent = np.hypot(*(scipy.stats.sem(r.mean(1)) for r in rewards)) / 2
    assert compare.standard_error(rewards) == pytest.approx(independent)
    values = random.normal(0.5, 0.02, (5, 3))
    mean, half = compare.mean_interval(values)
    for column in range(3):
        low, high = scipy.stats.ttest_1samp(values[:, column], 0).confidence_interval(0.95)
        assert (mean[column] - half[column], mean[column] + half[column]) == pytest.approx((low, high))
    base = arm(np.linspace(0.2, 0.5, 5) + random.normal(0, 0.02, (5, 5)))
    fast = arm(np.linspace(0.2, 1.0, 5) + random.normal(0, 0.02, (5, 5)), offline=5)

    def acceleration(one, other):
        return compare.accelerations(base, fast, (one, other))["seconds"]

    # the tail of five seeds: normal beyond 2.776 sqrt(5/4) = 3.104 standard deviations, from tables of t and normal
    options = {"confidence_level": 1 - 2 * 0.00095, "vectorized": False, "method": "percentile", "rng": 2}
    low, high = scipy.stats.bootstrap(
        (np.arange(5), np.arange(5)), acceleration, n_resamples=4000, **options
    ).confidence_interval
    point, ours_low, ours_high = compare.with_interval(base, fast)["seconds"]
    assert low < point < high
    assert (ours_low, ours_high) == pytest.approx((low, high), rel=0.03)
    again = arm(np.tile(base.targeted[:1], (3, 1))), arm(np.tile(fast.targeted[:1], (3, 1)))
    point, low, high = compare.with_interval(*again)["steps"]  # seeds that agree leave nothing to doubt
    assert point == pytest.approx(low) == pytest.approx(high)
    for seeds in (1, 2):  # too few for an interval
        assert len(compare.with_interval(base, arm(fast.targeted[:seeds]))["steps"]) == 1


def test_no_acceleration_where_there_is_nothing_to_reach():
    flat, better = arm([0.5, 0.48, 0.5, 0.4]), arm([0.6, 0.7, 0.8, 0.8])
    rows = compare.table({"flat": flat, "better": better}, "flat")
    assert [row["acceleration"]["steps"] for row in rows] == [[None], [None]]
    assert "| – |" in compare.as_markdown(rows, "flat")
    slow = arm([0.2, 0.25, 0.3, 0.3])
    rows = compare.table({"full": arm([0.5, 0.6, 0.7, 0.8]), "slow": slow, "better": better}, "full")
    assert [row["acceleration"]["seconds"] for row in rows] == [[1.0], [0.0], [30 / 20]]
    mostly = arm(np.array([[0.2, 0.3, 0.4, 0.5]] * 4 + [[0.5, 0.2, 0.2, 0.2]]))  # one of its seeds unlearns
    fast = arm(np.array([[0.2, 0.4, 0.6, 0.8]] * 5))
    point, low, high = compare.with_interval(mostly, fast)["steps"]  # 1 of 3,125 draws has nothing to reach
    assert 0 < low < point < high < np.inf
    never = arm(np.array([[0.5, 0.4, 0.3, 0.2]] * 4 + [[0.2, 0.3, 0.4, 0.5]]))
    assert len(compare.with_interval(never, fast)["steps"]) == 1


def test_the_beginning_of_runs():
    full, fast = arm([0.2, 0.3, 0.4, 0.4, 0.6]), arm([0.2, 0.4, 0.8, 0.8, 0.9])
    every = np.arange(1), np.arange(1)
    found = compare.accelerations(full.first(2), fast.first(2), every)
    assert found["steps"] == pytest.approx(40 / 20)  # 0.4 is the best of the first two stages
    assert compare.accelerations(full.first(None), fast.first(None), every)["steps"] == pytest.approx(80 / 30)


SETTINGS = ["train.steps=1", "train.batch_prompts=8", "valid.samples=4", "test.samples=2", "project.k=64"]


def study(world, *words):
    """The command line of a study of seconds."""
    files = [f"--{kind}={world}/{kind}-{name}.jsonl" for kind, name in (("valid", "rev"), ("test", "rev"))]
    run = [f"--train={world}/train.jsonl", *files, f"--test={world}/test-untargeted.jsonl"]
    run += [word for setting in SETTINGS for word in ("--set", setting)]
    ours = ["--seeds", "2", "--stages", "2", "--arm", "influence=", "--arm", "full=--selector full"]
    return [sys.executable, "bench/ablate.py", *ours, "--out", str(world / "study"), *words, "--", *run]


def contents(folder, pattern="**/*"):
    """Bytes of the files, and when they were written."""
    files = [path for path in sorted(folder.glob(pattern)) if path.is_file()]
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def remake(path, change):
    """Write one of our files anew, as if it had been made from something else: change(recipe)."""
    tensors, record = load_file(path), rollout.peek(path)
    change(record["recipe"])
    rollout.save(path, tensors, record["recipe"], record["facts"])


def test_a_killed_study_goes_on_and_nothing_else_is_mixed_in(small_world):
    out = small_world / "study"
    killed = subprocess.Popen(study(small_world), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (out / "full-0" / "run.safetensors").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    before = contents(out / "influence-0", "stage-*/**/*.safetensors")
    assert "stage-02/model/model.safetensors" in before and not (out / "full-0" / "report.json").exists()

    again = run_script(*study(small_world)[1:])
    assert again.returncode == 0, again.stderr
    runs = ["full-0", "full-1", "influence-0", "influence-1"]
    assert sorted(path.parent.name for path in out.glob("*/report.json")) == runs
    assert contents(out / "influence-0", "stage-*/**/*.safetensors") == before
    assert "resuming: 2 of 2 stages trained" in (out / "influence-0.log").read_text()

    rows = compare.compare([out])
    assert {row["arm"]: row["seeds"] for row in rows} == {"full": 2, "influence": 2}
    reports = {run: json.loads((out / run / "report.json").read_text()) for run in runs}
    for row in rows:
        finals = [reports[f"{row['arm']}-{seed}"]["evaluations"][-1]["accuracy"]["rev"] for seed in (0, 1)]
        assert row["final"][0] == pytest.approx(np.mean(finals))
        # 2 steps of 8 prompts x 8; or offline ones, then 2 steps of the 6 prompts that are 10% of 60
        trajectories = 2 * 8 * 8 if row["arm"] == "full" else 60 * 8 + 12 * 4 + 2 * 6 * 8
        assert row["trajectories"][0] == trajectories
        spent = [
            sum(e.get(f"seconds_{what}", 0) for e in reports[f"{row['arm']}-{seed}"]["evaluations"] for what in booked)
            for seed in (0, 1)
            for booked in [("rollout", "scoring", "training")]
        ]
        assert row["seconds"][0] == pytest.approx(np.mean(spent))
    assert (out / "comparison.png").stat().st_size > 10_000
    written = json.loads((out / "comparison.json").read_text())
    assert written["table"] == rows
    rewards = load_folder(out / "full-1" / "stage-02" / "test-rev", "trajectories")["rewards"]
    assert rewards.shape == (10, 2)
    assert written["curves"]["full"]["standard_errors"][1][2] == pytest.approx(scipy.stats.sem(rewards.mean(1)))

    everything = contents(out)
    refused = run_script(*study(small_world, "--stages", "1")[1:])
    assert refused.returncode == 2 and "study was begun with --stages 2" in refused.stderr
    command = study(small_world)
    common = command[command.index("--") + 1 :]
    for options, arms, says in (
        (["--frac", "0.2"], ["full=--selector full"], "study was begun with .* for all runs"),
        (common, ["full=--selector random"], "its arm full was begun as '--selector full'"),
        (common, ["full=", "full="], "not NAME=OPTIONS with a new NAME"),
        (common, ["a/b="], "not NAME=OPTIONS"),
        (common, ["x='"], "No closing quotation"),
        (common, ["x=--seed=3"], "are set here"),
        (common, ["x=--set train.nothing=1"], "arm x: .*no such option"),
    ):
        with pytest.raises(BadInput, match=says):
            ablate.ablate(options, arms, seeds=2, stages=2, out=out)
    assert contents(out) == everything


def test_a_report_that_was_kept_stands_for_its_run(small_world, capsys):
    out, kept = small_world / "study", small_world / "kept"
    command = study(small_world)
    common = command[command.index("--") + 1 :]
    arms, how = ["influence=", "full=--selector full"], {"seeds": 2, "first_seed": 1, "stages": 1, "reports": kept}
    ablate.ablate(common, arms, out=out, **how)
    names = [f"toy-{arm}-{seed}" for arm in ("full", "influence") for seed in (1, 2)]
    files = sorted(kept.iterdir())
    assert [file.stem for file in files] == names and all(file.stat().st_size < 10_000 for file in files)
    runs = [out / name.removeprefix("toy-") for name in names]
    by_folder, by_file = (compare.compare(paths, against=["full"]) for paths in (runs, files))
    assert capsys.readouterr().out.count("| final, less full |") == 2

    def leaves(value):
        values = list(value.values()) if isinstance(value, dict) else value
        return [x for one in values for x in leaves(one)] if isinstance(value, dict | list) else [float(value or 0)]

    assert [row.pop("arm") for row in by_file] == [row.pop("arm") for row in by_folder]
    assert leaves(by_file) == pytest.approx(leaves(by_folder), rel=1e-4, abs=1e-5)  # spreads of six-digit seconds
    before = contents(kept)
    shutil.rmtree(out)
    ablate.ablate(common, arms, out=out, **how)
    assert contents(kept) == before and not list(out.glob("*-*"))
    with pytest.raises(BadInput, match=r"toy-full-1\.json was made with '.*--selector full'"):
        ablate.ablate(common, ["full=--selector random"], out=small_world / "other", **how)


def test_differences_are_paired_by_seed():
    one, other = arm([[0.2, 0.5], [0.2, 0.7], [0.2, 0.9]]), arm([[0.2, 0.4], [0.2, 0.5], [0.2, 0.1]])
    one.seeds, other.seeds = [3, 4, 5], [5, 3, 6]  # 0.5 - 0.5 and 0.9 - 0.4
    mean, half = compare.difference(one, other)
    low, high = scipy.stats.ttest_rel([0.5, 0.9], [0.5, 0.4]).confidence_interval(0.95)
    assert (mean - half, mean + half) == pytest.approx((low, high))
    assert compare.difference(one, one) == []


def test_runs_that_differ_are_not_compared(small_world):
    """A run of another making in an arm's place, and arms whose accuracies are not of the same thing."""
    out = small_world / "study"
    command = study(small_world)
    common = command[command.index("--") + 1 :]
    ablate.ablate(common, ["influence=", "full=--selector full"], seeds=2, stages=1, out=out)
    pair = [out / "influence-0", out / "full-0"]
    assert {row["arm"] for row in compare.compare(pair)} == {"influence", "full"}
    kept = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}

    def refused(runs, says, **options):
        with pytest.raises(BadInput, match=says):
            compare.compare(runs, **options)
        for path, content in kept.items():
            path.write_bytes(content)

    remake(out / "full-1" / "run.safetensors", lambda recipe: recipe["options"].update(frac=0.3))
    with pytest.raises(BadInput, match=r"full-1.* was made with .*frac 0\.3, now 0\.1"):
        ablate.ablate(common, ["full=--selector full"], seeds=2, stages=1, out=out)
    refused([out], r"full-1 and .*full-0 differ in more than the seed: --frac$")
    for change, says in (
        (lambda recipe: recipe["inputs"].update(valid={"srt": "1"}), "--valid"),
        (lambda recipe: recipe["options"].update({"train.lr": "1"}), "--set train.lr"),
        (lambda recipe: recipe["code"].update(train="1"), "code of train.py"),
    ):
        remake(out / "influence-1" / "run.safetensors", change)
        two = [out / "influence-0", out / "influence-1"]
        refused(two, f"influence-1 and .*influence-0 differ in more than the seed: {says}$")
    report = json.loads((out / "full-0" / "report.json").read_text())
    (out / "full-0" / "report.json").write_text(json.dumps(report | {"targeted": ["untargeted"]}))
    refused(pair, "cannot be compared: another choice of targeted test sets")
    remake(out / "full-0" / "run.safetensors", lambda recipe: recipe["inputs"].update(model="1"))
    refused(pair, "cannot be compared: another --model")
    test = out / "full-0" / "rollouts" / "test-untargeted" / "00000.safetensors"
    remake(test, lambda recipe: recipe["inputs"].update(data="1"))
    refused(pair, "cannot be compared: another --test$")
    remake(test, lambda recipe: recipe["options"].update(temperature=0.5))
    refused(pair, "cannot be compared: another --set test$")
    shutil.move(test.parent, out / "elsewhere")
    with pytest.raises(BadInput, match="test-untargeted is gone"):
        compare.compare(pair)
    shutil.move(out / "elsewhere", test.parent)
    (out / "influence-1" / "report.json").unlink()
    refused([out / "influence-0", out / "influence-1"], "influence-1 is not finished")
    refused(pair[:1], "--base fast: no such arm; there is influence", base="fast")
    refused([small_world / "nothing"], "no run here")
    shutil.rmtree(out / "full-0" / "stage-01" / "test-rev")  # its accuracy is known, its standard error is not
    compare.compare(pair)
    errors = json.loads((out / "comparison.json").read_text())["curves"]["full"]["standard_errors"]
    assert errors[0][0] > 0 and errors[0][1] is None


def test_groups_of_two_tables_become_one(small_world):
    places = []
    for seed in (0, 1):
        rollout.rollout(out=small_world / f"{seed}", data=str(small_world / "train.jsonl"), seed=seed, samples=3)
        shards = rollout.shards(small_world / f"{seed}", "trajectories")
        tables = [rollout.load_trajectories(path)[0] for path in shards]
        places.append({int(i): (table, n) for table in tables for n, i in enumerate(table.prompt_index)})
    groups = [places[1][7], places[0][2], places[0][59]]
    made = tries.join(groups, groups[0][0])
    assert made.prompt_index.tolist() == [7, 2, 59]
    for n, (stored, m) in enumerate(groups):
        assert np.array_equal(made.prompt(n), stored.prompt(m)) and len(made.prompt(n))
        for name in ("prompt_length", "length", "rewards", "truncated"):
            assert np.array_equal(getattr(made, name)[n], getattr(stored, name)[m])
        for k in range(3):
            for name in ("tokens", "behavior_logps"):
                ours, theirs = getattr(made, name)[made.span(n, k)], getattr(stored, name)[stored.span(m, k)]
                assert len(ours) and np.array_equal(ours, theirs)


def follow(world, out, name, *settings, stages=2):
    """A run of a variant on the small world."""
    files = {kind: [str(world / f"{kind}-rev.jsonl")] for kind in ("valid", "test")}
    assignments = (*SETTINGS, *settings)
    tries.follow(name, out, 0, stages, pool=str(world / "train.jsonl"), **files, assignments=assignments)


def live_prompts(folder):
    table = load_all(folder)
    return set(table.prompt_index[table.live()].tolist())


@pytest.mark.parametrize("name", list(tries.VARIANTS))
def test_every_try_scores_what_it_says(small_world, name):
    out, pool = small_world / f"{name}-0", str(small_world / "train.jsonl")
    follow(small_world, out, name)
    before = contents(out, "*/**/*.safetensors")
    follow(small_world, out, name)  # nothing is made twice
    assert contents(out, "*/**/*.safetensors") == before
    files = {kind: [str(small_world / f"{kind}-rev.jsonl")] for kind in ("valid", "test")}
    with pytest.raises(BadInput, match=f"variant {name}, now None"):
        cropi.run(pool=pool, **files, stages=2, assignments=SETTINGS, out=out)

    stages = [out / "stage-01", out / "stage-02"]
    whole, own = out / "rollouts" / "train", [stage / "rollouts" / "train" for stage in stages]
    scored = [folder if folder.exists() else whole for folder in own]
    live = [live_prompts(folder) for folder in (whole, *scored)]
    for stage, folder, prompts in zip(stages, scored, live[1:], strict=True):
        gradients = load_folder(stage / "gradients-train", "gradients")
        assert set(gradients["prompt_index"].tolist()) == prompts
        made_of = [rollout.peek(path)["recipe"]["shard"] for path in sorted((stage / "gradients-train").iterdir())]
        assert [shard["trajectories"] for shard in made_of] == list(identities(folder, "*.safetensors").values())
    valid = [stage / "rollouts" / "valid-rev" for stage in stages]
    assert [folder.exists() for folder in valid] == [False, name == "fresh-validation"]
    used = valid[1] if name == "fresh-validation" else out / "rollouts" / "valid-rev"
    shard = rollout.peek(stages[1] / "gradients-valid-rev" / "00000.safetensors")["recipe"]["shard"]
    assert shard["trajectories"] == rollout.peek(used / "00000.safetensors")["identity"]

    evaluations = json.loads((out / "report.json").read_text())["evaluations"]
    offline = [evaluation.get("trajectories_offline") for evaluation in evaluations]
    assert offline[0] == 60 * 8 + 12 * 4
    if name in ("screened", "random-half"):
        assert offline[1:] == [0, 0]
        assert live[1] < live[0] and live[2] < live[0]
        assert (live[1] == live[2]) == (name == "screened")
        if name == "screened":
            table = load_all(whole)
            off = dict(zip(table.prompt_index.tolist(), abs(table.rewards.mean(1) - 0.5), strict=True))
            assert len(live[1]) == len(live[0]) // 2
            assert max(off[i] for i in live[1]) <= min(off[i] for i in live[0] - live[1])
        else:
            assert [len(load_all(folder).prompt_index) for folder in own] == [30, 30]
    elif name == "fresh-validation":
        assert offline[1:] == [None, 12 * 4]
        recipe = rollout.peek(valid[1] / "00000.safetensors")["recipe"]
        assert recipe["inputs"]["model"] == rollout.peek(stages[0] / "model")["identity"]
    elif name == "retry-thinned":
        failed = np.count_nonzero(load_all(whole).rewards.max(1) == 0)
        assert offline[1:] == [None, 4 * failed] and failed > 0  # the first time all
        tried = np.array([[tries.due(0, i, stage) for i in range(2000)] for stage in (2, 3, 4)])
        assert tried.mean(1) == pytest.approx([1, 1 / 2, 1 / 4 + 1 / 6], abs=0.03)
    else:
        assert offline[1:] == [None, 0]
        tables = [load_all(folder) for folder in (whole, scored[1], stages[0] / "trained")]
        logps = [
            {int(i): t.behavior_logps[t.span(n, 0).start : t.span(n, 7).stop] for n, i in enumerate(t.prompt_index)}
            for t in tables
        ]
        changed = [i for i in range(60) if not np.array_equal(logps[0][i], logps[1][i])]
        chosen = rollout.load(stages[0] / "selection.safetensors", "selection")[0]["ranked"].tolist()
        assert sorted(changed) == sorted(chosen) == sorted(logps[2])  # a step takes all 6 that are chosen
        assert all(np.array_equal(logps[1][i], logps[2][i]) for i in changed)
    assert compare.read_arms([out])[name].targeted.shape == (1, 3)


def test_own_trajectories_survive_a_kill(small_world, monkeypatch):
    """A stage that is resumed from its checkpoint still has what it sampled before."""
    settings = ("train.steps=4", "train.batch_prompts=2", "train.save_every=0")
    follow(small_world, small_world / "whole", "own-trajectories", *settings)
    sample = rollout.sample_trajectories

    def killed(*given, **checks):
        if checks.get("seed") == [0, 3]:  # the seed of the last step of the first stage
            raise KeyboardInterrupt
        return sample(*given, **checks)

    monkeypatch.setattr(rollout, "sample_trajectories", killed)
    with pytest.raises(KeyboardInterrupt):
        follow(small_world, small_world / "killed", "own-trajectories", *settings)
    monkeypatch.setattr(rollout, "sample_trajectories", sample)
    assert list((small_world / "killed" / "stage-01" / "checkpoint").glob("*/00000.safetensors"))
    follow(small_world, small_world / "killed", "own-trajectories", *settings)
    assert rollout.sample_trajectories is sample
    for pattern in ("stage-01/trained/*.safetensors", "stage-02/**/0*.safetensors", "stage-*/selection.safetensors"):
        made = [identities(small_world / name, pattern) for name in ("whole", "killed")]
        assert made[0] == made[1] != {}


def test_the_table_has_its_place(tmp_path):
    file = tmp_path / "results.md"
    assert "".join(compare.place_for(file, "tries")) == "<!-- tries -->\n<!-- /tries -->\n"
    file.write_text("before\n<!-- tries -->\nold\n<!-- /tries -->\nafter\n")
    assert compare.place_for(file, "tries") == ("before\n<!-- tries -->\n", "<!-- /tries -->\nafter\n")
    with pytest.raises(BadInput, match="has no place for the table: the lines <!-- other --> and <!-- /other -->"):
        compare.place_for(file, "other")


@pytest.mark.parametrize("bench", sorted(path.stem for path in (ROOT / "bench").glob("*.py")))
def test_every_bench_can_start(bench):
    assert f"bench/{bench}.py" in importlib.import_module(bench).__doc__


def test_the_plan_counts_what_torch_counts(toy):
    """FLOPs against torch's own counter, which does not know that attention is causal."""
    costs, length, model = plan.Costs(toy[0]), 40, copy.deepcopy(toy[0])
    model.set_attn_implementation("eager")  # of the fused one it counts nothing on a CPU
    ids = torch.randint(2, 41, (1, length))
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        model(ids)
    assert counted.get_total_flops() == 2 * costs.matrices * length + costs.attention * length**2
    causal = costs.forward(length, 0, 0)
    assert causal == 2 * costs.matrices * length + costs.attention * length**2 / 2
    assert costs.forward(10, 15, 2) == costs.forward(10, 0, 0) + 2 * (costs.forward(25, 0, 0) - costs.forward(10, 0, 0))
    assert costs.weights == toy[0].num_parameters()


def test_the_plan_counts_launches_and_signs_as_scoring_needs_them(toy, ragged, monkeypatch):
    class Launches(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            counted.append(function)
            return function(*args, **(kwargs or {}))

    costs, counted, add = plan.Costs(toy[0]), [], project.GradientSketcher._add

    def watched(*args):
        with Launches():
            add(*args)

    monkeypatch.setattr(project.GradientSketcher, "_add", watched)
    sketcher = project.GradientSketcher(copy.deepcopy(toy[0]), 64, 0.1, seed=0)
    n = int(ragged.live()[0])
    sketcher.sketch(train.collate(ragged, [(n, range(6))], torch.device("cpu")), 1.0)
    launches = sum(not function.is_view for function in counted)
    assert 0.6 * costs.sketch_launches < launches <= costs.sketch_launches
    assert costs.signs == sum(row.numel() + column.numel() for row, column, *_ in sketcher.projection.blocks.values())


@pytest.mark.parametrize(("size", "weights"), [("1.5B", 1.54e9), ("7B", 7.61e9)])  # as the model cards say
def test_the_plan_of_a_preset_needs_no_weights(tmp_path, size, weights):
    config = ROOT / "bench" / "configs" / f"Qwen2.5-{size}-Instruct.json"
    names = {"train": 1000, "valid-a": 10, "test-a": 20}
    options = ["--train", "x", "--valid", "a=y", "--test", "a=z", "--set", "project.k=1024", "--stages", "2"]
    rows = plan.plan(options, config=config, prompts=[f"{n}={c}" for n, c in names.items()], live=0.5)
    rows = {row["what"]: row for row in rows}
    assert rows["scoring, pool"]["disk"] == 2 * (500 + 256) * 1024 * 4  # of 512 prompts half are live, and halved
    # two models, two optimizer states before the older one goes, a checkpoint and its successor
    assert rows["training, updates"]["disk"] == pytest.approx((2 * 4 + 2 * 8 + 2 * 12) * weights, rel=0.01)
    assert rows["offline rollouts, pool"]["tokens"] == 1000 * (128 + 8 * 8)
    assert rows["all"]["hours"] == pytest.approx(sum(row["hours"] for row in rows.values()) / 2)
    counts = [f"{n}={c}" for n, c in names.items()]
    # before stages 2 to 8: every second one retries, the fifth refreshes all, so stages 3 and 7 retry
    refreshed = [*options, "--stages=8", "--retry-failed=4", "--retry-every=2", "--refresh-every=4"]
    rows = {row["what"]: row for row in plan.plan(refreshed, config=config, prompts=counts, failures=0.3)}
    assert rows["offline rollouts, pool"]["prompts"] == 2 * 1000
    assert rows["failures sampled again"]["prompts"] == pytest.approx(2 * 0.3 * 1000)
    assert rows["failures sampled again"]["tokens"] == pytest.approx(600 * (128 + 4 * 8))
    one, four = (plan.plan([*options, f"--processes={n}"], config=config, prompts=counts)[-1] for n in (1, 4))
    assert one["hours"] == pytest.approx(4 * four["hours"])
    with pytest.raises(BadInput, match="no config"):
        plan.plan(options, config=tmp_path, prompts=[f"{n}={c}" for n, c in names.items()])
    with pytest.raises(BadInput, match="test-b: no such set"):
        plan.plan(options, config=config, prompts=["train=5", "valid-a=5", "test-a=5", "test-b=5"])


def test_the_plan_is_what_a_run_writes(small_world):
    """Tokens and bytes of a small run, planned from its mean lengths and its share of live prompts."""
    files = [f"--{kind}={small_world}/{kind}-rev.jsonl" for kind in ("valid", "test")]
    run = [f"--train={small_world}/train.jsonl", *files, "--stages=1"]
    run += [word for setting in SETTINGS for word in ("--set", setting)]
    command = typer.main.get_command(cropi.app).commands["run"]
    command.invoke(command.make_context("cropi.py", [*run, "--out", str(small_world / "run")]))
    pool = load_all(small_world / "run/rollouts/train")
    live = len(pool.live()) / 60
    lengths = {"prompt_tokens": pool.prompt_length.mean(), "completion_tokens": pool.length.mean()}
    rows = {row["what"]: row for row in plan.plan(run, live=live, **lengths)}
    tokens = len(pool.tokens) + len(pool.prompt_tokens)
    assert rows["offline rollouts, pool"]["tokens"] == pytest.approx(tokens, rel=1e-6)
    tensors = sum(tensor.nbytes for tensor in pool.tensors().values())
    assert rows["offline rollouts, pool"]["disk"] == pytest.approx(tensors, rel=1e-6)
    gradients = load_folder(small_world / "run/stage-01/gradients-train", "gradients")
    sketches = gradients["sketch"].nbytes + gradients["half_sketch"].nbytes
    assert rows["scoring, pool"]["disk"] == pytest.approx(sketches, rel=1e-6)
    files = ("model/model.safetensors", "optimizer/00000.safetensors")
    written = sum((small_world / "run/stage-01" / name).stat().st_size for name in files)
    checkpoints = 2 * 12 * 340_896  # while it trained
    assert rows["training, updates"]["disk"] - checkpoints == pytest.approx(written, rel=0.01)


def test_lines_by_hand():
    source = '''"""Head
of two lines."""

# alone
def f(x):  # trailing
    """Doc."""

    # why
    y = (x +
         1)
    return y
'''
    size = lines.measure(source)
    # code: def (half of it a comment), y = (x +, 1), return; tokens: def f ( x ) : / y = ( x + 1 ) / return y
    assert (size.lines, size.code, size.docstrings, size.comments) == (11, 3.5, 3, 2.5)
    assert size.tokens == 6 + 7 + 2
    assert size.bodies == [(3, "f")]
    assert size.share == 5.5 / 9


def test_peers_are_given_the_same_objective(toy, ragged):
    """Padded rows, one for each completion, against our own rows."""
    groups = peers.groups_of(ragged)
    assert len(groups) == len(ragged.live()) > 5
    for n, group in zip(ragged.live().tolist(), groups, strict=True):
        batch = train.collate(ragged, [(n, range(6))], torch.device("cpu"))
        with torch.no_grad():
            logps, _ = train.completion_logps(toy[0], batch, 1.0)
            expected = project.off_policy_objective(logps, batch, "token").item()
            logits = toy[0](group["ids"], attention_mask=group["attention_mask"]).logits
            found = scorers.policy_objective(logits, group["ids"], group["weight"], group["behavior_logps"]).item()
        assert found == pytest.approx(expected, abs=1e-5)
        assert group["completion"].sum() == len(logps)


def test_precision_of_peers_by_hand(tmp_path):
    """Ten prompts and one validation set of two: the top 10% is one prompt."""
    pool = np.eye(10, dtype=np.float32)
    for name, best in {"exact": 3, "same": 3, "other": 4}.items():
        valid = 3 * pool[best] + pool[:2]  # its mean points along `best`
        np.save(tmp_path / f"{name}.npy", np.concatenate([pool, valid]).astype(np.float32))
    exact, same, other = (peers.cosines(tmp_path / f"{name}.npy", [10, 2]) for name in ("exact", "same", "other"))
    assert exact.shape == (10, 1) and exact[3, 0] == pytest.approx(3 / (9 + 0.5) ** 0.5)
    assert peers.overlap(exact, same) == 1 and peers.overlap(exact, other) == 0


def test_the_older_scripts_are_given_the_same_trajectories(ragged, monkeypatch):
    """In the layout of that commit: every prompt once more for each of its completions."""
    made = {}
    monkeypatch.setattr(rollout, "Trajectories", lambda **tensors: made.update(tensors))
    peers.old_trajectories(ragged.tensors())
    for m, (n, k) in enumerate(np.ndindex(ragged.rewards.shape)):
        span = slice(*made["offsets"][m : m + 2])
        expected = np.concatenate([ragged.prompt(n), ragged.tokens[ragged.span(n, k)]])
        np.testing.assert_array_equal(made["tokens"][span], expected)
    assert made["prompt_length"].tolist() == np.repeat(ragged.prompt_length, 6).tolist()


def test_the_bench_for_a_gpu_runs_without_one(tmp_path):
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    shape |= {"num_key_value_heads": 2, "vocab_size": 500, "max_position_embeddings": 512, "tie_word_embeddings": True}
    Qwen2Config(**shape, bos_token_id=None, eos_token_id=1, pad_token_id=0).save_pretrained(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu.importlib.util, "find_spec", lambda name: None)  # without vLLM
        found = gpu.measure(tmp_path / "config.json", 8, 20, 10)
    assert found["lines"].keys() == {"sampling, transformers", "scoring", "training"}
    for line in found["lines"].values():
        assert line["tokens_per_second"] > 0 and 0 < line["share_of_peak"] < 1 and line["plan_bytes"] > 0


def test_groups_are_mixed_by_prompt(small_world):
    """bench/why.py: what its estimators are made of."""
    assert doctest.testmod(why).attempted == 2 and doctest.testmod(why).failed == 0
    for seed in (0, 1):
        data, out = str(small_world / "train.jsonl"), small_world / f"{seed}"
        rollout.rollout(out=out, data=data, seed=seed, samples=3, shard=25)
    mixed = why.mix(small_world / "mixed", small_world / "0", small_world / "1", taken=[3, 40], dropped=[7])
    tables = [why.pool_of(folder) for folder in (small_world / "0", small_world / "1", mixed)]
    stored, fresh, made = (
        {int(i): [t.tokens[t.span(n, k)].tolist() for k in range(3)] for n, i in enumerate(t.prompt_index)}
        for t in tables
    )
    assert made == {i: fresh[i] if i in (3, 40) else stored[i] for i in range(60) if i != 7}
    project.project(trajectories=mixed, out=small_world / "gradients", k=64)


def test_worlds_are_read_as_the_command_line_reads_them():
    first, second = why.World("toy"), why.World("curriculum")
    assert list(first.sets) == ["train", "valid-rev", "valid-srt"] and len(first.rows) == 2400
    assert list(second.sets) == ["train", "valid-irn", "valid-sl", "valid-w"] and len(second.rows) == 1980
    assert second.settings["rollout"]["max_tokens"] == second.settings["train"]["max_tokens"] == 16
    assert second.model != first.model


def test_estimators_of_a_small_run(small_world):
    world, run = why.World("toy"), small_world / "a"
    world.sets = {name: str(small_world / f"{name}.jsonl") for name in world.sets}
    world.rows = rollout.load_prompts(world.sets["train"])
    world.settings["project"]["k"] = 64
    valid = [world.sets[f"valid-{name}"] for name in ("rev", "srt")]
    files = {"pool": world.sets["train"], "valid": valid, "test": [str(small_world / "test-rev.jsonl")]}
    cropi.run(**files, stages=1, assignments=[*SETTINGS, "valid.samples=8"], out=run)
    found = why.estimators(world, run, 1, small_world / "why", fresh=16)
    assert len(found) == 8 and found["truth"]["gain"] == 1.0
    assert all(0 <= values["found"] <= 1 and np.isfinite(values["gain"]) for values in found.values())
    assert found == why.estimators(world, run, 1, small_world / "why", fresh=16)  # what was made is used
