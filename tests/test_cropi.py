"""The whole loop: what it writes, that it repeats itself, goes on where it stopped, and finds what helps."""

import json
import shlex
import subprocess
import sys

import matplotlib.image
import numpy as np
import pytest
from conftest import ROOT, digests
from transformers import AutoModelForCausalLM

import cropi
import rollout
from rollout import TOY, BadInput, load_json, load_prompts, open_tensors

SMALL = ["train.steps=2", "train.batch_prompts=8", "valid.samples=8", "test.samples=2", "project.k=256"]


def run_small(world, out, **options):
    defaults = {
        "pool": world / "train.jsonl",
        "valid": [world / "valid-rev.jsonl", world / "valid-srt.jsonl"],
        "test": [world / "test-rev.jsonl", world / "test-untargeted.jsonl"],
        "stages": 2,
        "assignments": SMALL,
        "out": world / out,
    }
    return cropi.run(**defaults | options)


def test_a_run_writes_what_its_head_lists(small_world, capsys):
    report = run_small(small_world, "a")
    out = small_world / "a"
    assert sorted(path.name for path in out.iterdir()) == [
        *(".lock", "curve.png", "report.json", "rollouts", "run.json", "selection.png", "stage-00", "stage-01"),
    ]
    assert sorted(path.name for path in (out / "stage-01").iterdir()) == sorted(
        [f"gradients-{name}.safetensors" for name in ("train", "valid-rev", "valid-srt")]
        + [f"test-{name}.safetensors" for name in ("rev", "untargeted")]
        + [
            "journal.json",
            "metrics.jsonl",
            "model",
            "optimizer.safetensors",
            "selection.csv",
            "selection.safetensors",
            "summary.json",
        ]
    )
    AutoModelForCausalLM.from_pretrained(out / "stage-01" / "model")
    assert report == load_json(out / "report.json")
    assert [e["steps"] for e in report["evaluations"]] == [0, 2, 4]
    assert report["targeted"] == ["rev"]
    lines = [json.loads(line) for line in (out / "stage-01" / "metrics.jsonl").read_text().splitlines()]
    assert [line.get("step") for line in lines] == [0, 1, None, None]
    assert {line["evaluation"]: line["accuracy"] for line in lines[2:]} == report["evaluations"][-1]["accuracy"]
    # accuracy is the mean reward of the evaluation's trajectories
    rewards = open_tensors(out / "stage-01" / "test-rev.safetensors", "trajectories")[0]["rewards"]
    assert report["evaluations"][-1]["accuracy"]["rev"] == pytest.approx(float(rewards.mean()))
    for picture in ("curve.png", "selection.png"):
        pixels = matplotlib.image.imread(out / picture)
        assert pixels.shape[0] > 300 and pixels.std() > 0.05
    assert "stage 2 of 2" in capsys.readouterr().out


def test_the_printed_commands_do_the_same(small_world, capsys):
    """Each script as a user would run it, in a process of its own: byte-identical gradients and selections."""
    run_small(
        small_world, "a", stages=1, valid=[small_world / "valid-rev.jsonl"], test=[small_world / "test-rev.jsonl"]
    )
    commands = [line[2:] for line in capsys.readouterr().out.splitlines() if line.startswith("$ ")]
    commands = [shlex.split(command.replace(str(small_world / "a"), str(small_world / "b"))) for command in commands]
    assert [words[1] for words in commands] == [
        *("rollout.py", "rollout.py", "rollout.py", "project.py", "project.py", "select.py", "train.py", "rollout.py"),
    ]
    for words in commands[:2] + commands[3:7]:  # all but the evaluations
        done = subprocess.run([sys.executable, *words[1:]], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    for pattern in ("rollouts/train*", "stage-00/gradients*", "stage-00/selection*"):
        assert digests(small_world / "a", pattern) == digests(small_world / "b", pattern) != {}
    lines = [(small_world / name / "stage-00" / "metrics.jsonl").read_text().splitlines() for name in "ab"]
    for ours, theirs in zip(*lines, strict=False):
        assert json.loads(ours)["reward"] == json.loads(theirs)["reward"]


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(small_world):
    for out, seed in (("a", 5), ("b", 5), ("c", 6)):
        run_small(small_world, out, seed=seed)
    selections = [digests(small_world / out, "stage-*/selection.safetensors") for out in "abc"]
    assert len(selections[0]) == 2
    assert selections[0] == selections[1] != selections[2]
    assert digests(small_world / "a", "stage-*/model/model*") == digests(small_world / "b", "stage-*/model/model*")


def test_a_run_goes_on_after_its_last_whole_stage(small_world):
    run_small(small_world, "whole")
    run_small(small_world, "part", stages=1)
    before = {path: path.stat().st_mtime_ns for path in (small_world / "part" / "stage-00").rglob("*")}
    # as if killed while stage 2 was training: some of its files stand, its summary does not
    (small_world / "part" / "stage-01").mkdir()
    (small_world / "part" / "stage-01" / "selection.safetensors").write_bytes(b"half a file")
    (
        small_world / "part" / "rollouts" / "summary.json"
    ).unlink()  # and killed before that: done again, with equal bytes
    run_small(small_world, "part")
    assert before == {path: path.stat().st_mtime_ns for path in (small_world / "part" / "stage-00").rglob("*")}
    patterns = ("rollouts/t*", "stage-*/selection.*", "stage-*/model/model.safetensors")
    for pattern in patterns:
        assert digests(small_world / "whole", pattern) == digests(small_world / "part", pattern)
    (small_world / "part" / "stage-01" / "summary.json").unlink()  # as if killed between training and summary
    run_small(small_world, "part")
    for pattern in patterns:
        assert digests(small_world / "whole", pattern) == digests(small_world / "part", pattern)


def test_refreshed_trajectories_are_not_sampled_twice(small_world):
    run_small(small_world, "a", refresh_every=1)
    folder = small_world / "a" / "stage-01"
    before = {path: path.stat().st_mtime_ns for path in (folder / "rollouts").iterdir()}
    report = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").unlink()  # as if killed between the refresh and the end of the stage
    run_small(small_world, "a", refresh_every=1)
    assert before == {path: path.stat().st_mtime_ns for path in (folder / "rollouts").iterdir()}
    again = json.loads((folder / "summary.json").read_text())
    assert again["seconds_rollout"] == report["seconds_rollout"]  # the first attempt's cost


def test_other_settings_are_refused_by_name(small_world):
    run_small(small_world, "a", stages=1)
    for options, name in (({"seed": 1}, "seed 0"), ({"frac": 0.2}, "frac 0.1"), ({"assignments": []}, "set.")):
        with pytest.raises(BadInput, match=f"was begun with {name}.*, now .*; choose a new --out, or --force"):
            run_small(small_world, "a", **options)
    with open(small_world / "train.jsonl", "a") as file:
        file.write('{"prompt": "cpy(abc)=", "answer": "abc"}\n')
    with pytest.raises(BadInput, match=r"was begun with train .*, now "):
        run_small(small_world, "a")


@pytest.mark.parametrize("every, sampled", [(0, []), (1, [1, 2]), (2, [2])])
def test_refresh(small_world, every, sampled):
    report = run_small(small_world, "a", stages=3, refresh_every=every)
    out, files = small_world / "a", ("train", "valid-rev", "valid-srt")
    assert [stage for stage in range(3) if (out / f"stage-0{stage}" / "rollouts").exists()] == sampled
    latest = out / "rollouts"
    for stage in range(3):
        folder, summary = out / f"stage-0{stage}", report["evaluations"][stage + 1]
        if stage in sampled:
            latest = folder / "rollouts"
            policy = rollout.digest(out / f"stage-0{stage - 1}" / "model")
            assert all(open_tensors(latest / f"{f}.safetensors", "trajectories")[1]["model"] == policy for f in files)
            assert summary["trajectories_offline"] == 60 * 8 + 2 * 12 * 8
            assert summary["seconds_rollout"] > 0
        assert ("trajectories_offline" in summary) == (stage in sampled)
        for f in files:  # scored with the latest, and on-policy where they are new
            metadata = open_tensors(folder / f"gradients-{f}.safetensors", "gradients")[1]
            assert metadata["trajectories"] == rollout.digest(latest / f"{f}.safetensors")
            assert (metadata["diagnostics"]["largest_change"] < 1e-4) == (stage == 0 or stage in sampled)
        assert summary["diagnostics"]["live_prompts"] > 0
        assert ("overlap_previous" in summary["diagnostics"]) == (stage > 0)


@pytest.mark.parametrize("selector", ["full", "random", "pass-rate", "learnability"])
def test_every_selector_runs(small_world, selector):
    report = run_small(small_world, selector, selector=selector, stages=1)
    assert report["evaluations"][1]["chosen"] == (60 if selector == "full" else 6)
    assert (small_world / selector / "rollouts" / "train.safetensors").exists() == (selector not in ("full", "random"))


@pytest.mark.parametrize("selector", ["influence", "random"])
def test_static_chooses_once(small_world, selector):
    report = run_small(small_world, "a", selector=selector, static=True)
    once, anew = (run_small(small_world, "b", selector=selector, stages=stages) for stages in (1, 2))
    first, second = (sorted(path.name for path in (small_world / "a" / f"stage-0{s}").iterdir()) for s in (0, 1))
    assert [name for name in first if name not in second] == [n for n in first if n.startswith(("gradi", "select"))]
    file = "stage-00/selection.safetensors"
    assert digests(small_world / "a", file) == digests(small_world / "b", file) != {}
    assert report["evaluations"][1]["accuracy"] == once["evaluations"][1]["accuracy"]
    assert report["evaluations"][2]["chosen"] == anew["evaluations"][2]["chosen"]
    assert report["evaluations"][2]["seconds_scoring"] < 1e-3
    with pytest.raises(BadInput, match="--static chooses once"):
        run_small(small_world, "c", static=True, refresh_every=1)
    with pytest.raises(BadInput, match="was begun with static True, now False"):
        run_small(small_world, "a", selector=selector)


def test_settings_reach_their_stage():
    settings = cropi.parse_settings(
        ["train.lr=1e-4", "rollout.temperature=0.5", "valid.samples=4", "train.max-tokens=9"]
    )
    assert settings["train"] == {"lr": 1e-4, "temperature": 0.5, "max_tokens": 9}
    assert settings["valid"] == {"samples": 4, "temperature": 0.5}
    assert settings["test"] == {"samples": 4, "temperature": 0.5}
    assert settings["rollout"] == {"temperature": 0.5}


def test_influence_finds_the_target_families(tmp_path):
    """A shortened loop on the bundled world: two stages of 10 steps."""
    settings = ["train.steps=10", "test.samples=1", "valid.samples=16"]
    report = cropi.run(stages=2, out=tmp_path / "run", assignments=settings)
    pool = load_prompts(TOY / "train.jsonl")
    share = np.mean([row["family"] in ("rev", "srt") for row in pool])
    for stage in (0, 1):
        chosen = open_tensors(tmp_path / "run" / f"stage-0{stage}" / "selection.safetensors", "selection")[0]["ranked"]
        assert len(chosen) == 240
        assert np.mean([pool[i]["family"] in ("rev", "srt") for i in chosen]) >= 2 * share
    start, _, end = (np.mean([e["accuracy"][name] for name in ("rev", "srt")]) for e in report["evaluations"])
    assert end > start + 0.1


def test_a_start_that_failed_can_be_mended(small_world):
    """Settings are binding once the first rollouts are whole."""
    with pytest.raises(BadInput, match="exceed the model's 64"):
        run_small(small_world, "a", assignments=[*SMALL, "rollout.max_tokens=60"])
    run_small(small_world, "a", stages=1)
    (small_world / "a" / "run.json").write_text("{")
    with pytest.raises(BadInput, match=r"run\.json is not as it was written"):
        run_small(small_world, "a", stages=1)
