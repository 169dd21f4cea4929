"""The study: runs are reused, gone on with and never mixed; the formulas of the comparison against worked numbers."""

import copy
import doctest
import importlib
import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import scipy.stats
import torch
import typer
from conftest import ROOT, digests
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(ROOT / "bench"))

import ablate
import compare
import plan
import tries

import cropi
import rollout
import train
from rollout import BadInput, open_tensors


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


def test_a_killed_study_goes_on_and_nothing_else_is_mixed_in(small_world):
    out = small_world / "study"
    killed = subprocess.Popen(study(small_world), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (out / "full-0" / "rollouts" / "summary.json").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    before = digests(out / "influence-0", "stage-*/*")
    assert "stage-01/summary.json" in before and not (out / "full-0" / "report.json").exists()

    done = subprocess.run(study(small_world), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    runs = ["full-0", "full-1", "influence-0", "influence-1"]
    assert sorted(path.parent.name for path in out.glob("*/report.json")) == runs
    assert digests(out / "influence-0", "stage-*/*") == before
    assert "stage 2 of 2 (done before)" in (out / "influence-0.log").read_text()

    rows = compare.compare([out])
    assert {row["arm"]: row["seeds"] for row in rows} == {"full": 2, "influence": 2}
    reports = {run: rollout.load_json(out / run / "report.json") for run in runs}
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
    rewards = rollout.open_trajectories(out / "full-1" / "stage-01" / "test-rev.safetensors").rewards.reshape(-1, 2)
    assert written["curves"]["full"]["standard_errors"][1][2] == pytest.approx(scipy.stats.sem(rewards.mean(1)))

    everything = digests(out, "**/*")
    refused = subprocess.run(study(small_world, "--stages", "1"), cwd=ROOT, capture_output=True, text=True)
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
    ):
        with pytest.raises(BadInput, match=says):
            ablate.ablate(options, arms, seeds=2, stages=2, out=out)
    assert digests(out, "**/*") == everything
    # a run of another making in an arm's place
    about = rollout.load_json(out / "full-1" / "run.json")
    about["settings"]["frac"] = 0.3
    rollout.write_json(out / "full-1" / "run.json", about)
    about = json.dumps(rollout.load_json(out / "influence-1" / "run.json"))
    about = json.loads(about.replace("valid-rev.jsonl", "valid-srt.jsonl"))
    rollout.write_json(out / "influence-1" / "run.json", about)
    with pytest.raises(BadInput, match=r"full-1 was begun with frac 0.3, now 0.1;"):
        ablate.ablate(common, ["full=--selector full"], seeds=2, stages=2, out=out)
    with pytest.raises(BadInput, match=r"full-1 and .*full-0 differ in more than the seed: --frac"):
        compare.compare([out])
    with pytest.raises(BadInput, match=r"influence-1 and .*influence-0 differ in more than the seed: --valid"):
        compare.compare([out / "influence-0", out / "influence-1"])
    report = reports["full-0"] | {"targeted": ["untargeted"]}
    rollout.write_json(out / "full-0" / "report.json", report)
    with pytest.raises(BadInput, match="cannot be compared: another choice of targeted test sets"):
        compare.compare([out / "influence-0", out / "full-0"])
    (out / "influence-1" / "report.json").unlink()
    with pytest.raises(BadInput, match="influence-1 is not finished"):
        compare.compare([out / "influence-0", out / "influence-1"])
    with pytest.raises(BadInput, match="--base fast: no such arm; there is influence"):
        compare.compare([out / "influence-0"], base="fast")
    with pytest.raises(BadInput, match="no run here"):
        compare.compare([small_world])


def test_groups_of_two_files_become_one(small_world):
    data, files = small_world / "train.jsonl", [small_world / name for name in ("a", "b", "c")]
    one, other = (rollout.rollout(out=files[seed], data=data, seed=seed, samples=3) for seed in (0, 1))
    groups = {i: (stored, stored.groups()[i]) for i, stored in ((7, other), (2, one), (59, one))}
    groups[3] = one, one.groups()[3][:1]
    tries.save_groups(files[2], groups, one.metadata)
    made = rollout.open_trajectories(files[2])
    assert {i: len(rows) for i, rows in made.groups().items()} == {2: 3, 3: 1, 7: 3, 59: 3}
    for i, rows in made.groups().items():
        stored, before = groups[i]
        for m, n in zip(rows, before, strict=True):
            for name, offsets in (("tokens", "offsets"), ("behavior_logps", "logp_offsets")):
                ours, theirs = (
                    getattr(t, name)[getattr(t, offsets)[row] : getattr(t, offsets)[row + 1]]
                    for t, row in ((made, m), (stored, n))
                )
                assert len(ours) and np.array_equal(ours, theirs)
            for name in ("prompt_length", "rewards", "prompt_index", "truncated"):
                assert getattr(made, name)[m] == getattr(stored, name)[n]


@pytest.mark.parametrize("name", list(tries.VARIANTS))
def test_every_try_scores_what_it_says(small_world, monkeypatch, name):
    monkeypatch.setattr(cropi, "Curriculum", tries.VARIANTS[name][0])
    monkeypatch.setattr(train, "sample_trajectories", tries.keep_latest(train.sample_trajectories))
    files = {kind: [small_world / f"{kind}-rev.jsonl"] for kind in ("valid", "test")}
    out, pool = small_world / "run", small_world / "train.jsonl"
    options = {"pool": pool, **files, "stages": 2, "refresh_every": 1, "assignments": SETTINGS, "out": out}
    cropi.run(**options)
    monkeypatch.setattr(cropi, "Curriculum", tries.Curriculum)
    with pytest.raises(BadInput, match=r"was begun with curriculum .*, now Curriculum;"):
        cropi.run(**options)
    first, second = (rollout.open_trajectories(out / f / "rollouts/train.safetensors") for f in (".", "stage-01"))
    valid = [rollout.digest(out / f / "rollouts/valid-rev.safetensors") for f in (".", "stage-01")]
    assert (valid[0] == valid[1]) == (name != "fresh-validation")
    if name in ("screened", "random-half"):
        whole = rollout.open_trajectories(out / "rollouts" / "all.safetensors")
        live = [set(t.live_groups()) for t in (whole, first, second)]
        assert live[1] < live[0] and live[2] < live[0]
        assert (live[1] == live[2]) == (name == "screened")
        if name == "screened":
            off = {i: abs(rate - 0.5) for i, rate in whole.pass_rates().items()}
            assert len(live[1]) == len(live[0]) // 2
            assert max(off[i] for i in live[1]) <= min(off[i] for i in live[0] - live[1])
    else:
        chosen = open_tensors(out / "stage-00" / "selection.safetensors", "selection")[0]["ranked"].tolist()
        logps = [
            {i: t.behavior_logps[t.logp_offsets[r.start] : t.logp_offsets[r.stop]] for i, r in t.groups().items()}
            for t in (first, second)
        ]
        changed = [i for i in range(60) if not np.array_equal(logps[0][i], logps[1][i])]
        assert sorted(changed) == (sorted(chosen) if name == "own-trajectories" else [])


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


@pytest.mark.parametrize(("size", "weights"), [("1.5B", 1.54e9), ("7B", 7.61e9)])  # as the model cards say
def test_the_plan_of_a_preset_needs_no_weights(tmp_path, size, weights):
    config = ROOT / "bench" / "configs" / f"Qwen2.5-{size}-Instruct.json"
    names = {"train": 1000, "valid-a": 10, "test-a": 20}
    options = ["--train", "x", "--valid", "a=y", "--test", "a=z", "--set", "project.k=1024", "--stages", "2"]
    rows = plan.plan(options, config=config, prompts=[f"{n}={c}" for n, c in names.items()], live=0.5)
    rows = {row["what"]: row for row in rows}
    assert rows["scoring, pool"]["disk"] == 2 * 500 * 1024 * 4
    assert rows["training, updates"]["disk"] == pytest.approx(2 * 12 * weights, rel=0.01)
    assert rows["offline rollouts, pool"]["tokens"] == 1000 * (128 + 8 * 8)
    assert rows["all"]["hours"] == pytest.approx(sum(row["hours"] for row in rows.values()) / 2)
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
    pool = rollout.open_trajectories(small_world / "run/rollouts/train.safetensors")
    live = len(pool.live_groups()) / 60
    lengths = {"prompt_tokens": pool.prompt_length.mean(), "completion_tokens": pool.completion_length.mean()}
    rows = {row["what"]: row for row in plan.plan(run, live=live, **lengths)}
    assert rows["offline rollouts, pool"]["tokens"] == pytest.approx(
        len(pool.tokens) - 7 * pool.prompt_length[::8].sum(), rel=1e-6
    )
    written = (small_world / "run/stage-00/gradients-train.safetensors").stat().st_size
    assert rows["scoring, pool"]["disk"] == 60 * live * 64 * 4 < written
