"""The whole loop: what it writes, that it repeats itself, goes on where it stopped, and finds what helps."""

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from conftest import ROOT, identities, load_all, load_folder, run_script
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

import cropi
import rollout
from rollout import TOY, BadInput, load_prompts, peek

SMALL = ["train.steps=2", "train.batch_prompts=8", "valid.samples=8", "test.samples=2", "project.k=256"]
SAVED = "*/**/[!m]*.safetensors"  # all files of a run that have a record, but for run.safetensors


def run_small(world: Path, out: str, **options) -> dict:
    """The report of a run in the folder `out`."""
    defaults = {
        "pool": str(world / "train.jsonl"),
        "valid": [str(world / f"valid-{name}.jsonl") for name in ("rev", "srt")],
        "test": [str(world / f"test-{name}.jsonl") for name in ("rev", "untargeted")],
        "stages": 2,
        "assignments": SMALL,
        "out": world / out,
    }
    cropi.run(**defaults | options)
    return json.loads((world / out / "report.json").read_text())


def bytes_of(folder: Path) -> dict[str, bytes]:
    """What is in a folder; but for the locks, whose content names the process."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in (".lock", ".writer")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def times_of(folder: Path) -> dict[str, int]:
    """When the files that have a record were written."""
    paths = [*folder.glob("**/*.safetensors"), *folder.glob("**/cropi.json")]
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in paths}


def names_of(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def chosen_of(stage: Path) -> list[int]:
    return rollout.load(stage / "selection.safetensors", "selection")[0]["ranked"].tolist()


def paste(command: str) -> subprocess.CompletedProcess:
    """As into a shell, from the project's folder."""
    python, *words = shlex.split(command)
    assert python == "python"
    return run_script(*words)


def without_seconds(report: dict) -> list[dict]:
    return [{k: value for k, value in e.items() if not k.startswith("seconds")} for e in report["evaluations"]]


def test_a_run_writes_what_its_head_lists(small_world, capsys):
    report = run_small(small_world, "a")
    out = small_world / "a"
    shown = ["curve.png", "report.json", "rollouts", "run.safetensors", "selection.png", "stage-01", "stage-02"]
    assert names_of(out) == [".lock", ".writer", *shown]
    assert names_of(out / "rollouts") == ["test-rev", "test-untargeted", "train", "valid-rev", "valid-srt"]
    folders = [*(f"gradients-{name}" for name in ("train", "valid-rev", "valid-srt")), "test-rev", "test-untargeted"]
    files = ["completions.jsonl", "metrics.jsonl", "model", "optimizer", "selection.csv", "selection.safetensors"]
    assert names_of(out / "stage-02") == sorted(folders + files)
    assert names_of(out / "stage-01") == sorted(folders + [f for f in files if not f.startswith("optimizer")])
    for stage in (1, 2):
        AutoModelForCausalLM.from_pretrained(out / f"stage-0{stage}" / "model")
    assert report["targeted"] == ["rev"]
    assert (report["selector"], report["seed"]) == ("influence", 0)
    assert [entry["stage"] for entry in report["evaluations"]] == [0, 1, 2]
    assert [entry["steps"] for entry in report["evaluations"]] == [0, 2, 4]
    for stage, entry in enumerate(report["evaluations"]):
        folder = out / (f"stage-0{stage}" if stage else "rollouts")
        for name, accuracy in entry["accuracy"].items():  # the mean reward of the evaluation's trajectories
            rewards = load_all(folder / f"test-{name}").rewards
            assert accuracy == pytest.approx(float(rewards.mean()))
            assert entry["pass_at_k"][name] == pytest.approx(np.mean([any(group) for group in rewards == 1]))
        if stage:
            lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
            assert [line["step"] for line in lines] == [0, 1]
            assert entry["reward"] == pytest.approx(np.mean([line["reward"] for line in lines]))
            assert entry["trajectories_training"] == 2 * min(8, entry["chosen"]) * 8
            assert entry["chosen"] == len(chosen_of(folder)) == 6
            said = [json.loads(line) for line in (folder / "completions.jsonl").read_text().splitlines()]
            for name, right in (("right", True), ("wrong", False)):
                last = [one for one in said if (one["reward"] == 1) == right][-1]
                assert f"{name}, in training: {last['prompt']!r} -> {last['text']!r}" in entry["answers"]
            assert entry["diagnostics"]["live_prompts"] == len(load_all(out / "rollouts" / "train").live())
    first = report["evaluations"][0]
    assert first["trajectories_offline"] == 60 * 8 + 2 * 12 * 8
    for picture in ("curve.png", "selection.png"):
        pixels = matplotlib.image.imread(out / picture)
        assert pixels.shape[0] > 300 and pixels.std() > 0.05
    printed = capsys.readouterr().out
    assert "stage 1 of 2" in printed and "stage 2 of 2" in printed and "before training" in printed
    assert "stage 0" not in printed and "resuming" not in printed


def test_the_seconds_of_the_report_are_those_of_its_files(small_world):
    report = run_small(small_world, "a", stages=1)
    out, (before, after) = small_world / "a", report["evaluations"]

    def seconds(*patterns: str) -> float:
        return sum(peek(path)["facts"]["seconds"] for pattern in patterns for path in out.glob(pattern))

    shard = "/[0-9]*.safetensors"
    offline = [f"rollouts/{name}{shard}" for name in ("train", "valid-*")]
    assert before["seconds_rollout"] == pytest.approx(seconds(*offline)) and seconds(*offline) > 0
    assert before["seconds_evaluation"] == pytest.approx(seconds(f"rollouts/test-*{shard}"))
    assert after["seconds_evaluation"] == pytest.approx(seconds(f"stage-01/test-*{shard}"))
    scoring = seconds(f"stage-01/gradients-*{shard}", "stage-01/selection.safetensors")
    assert after["seconds_scoring"] == pytest.approx(scoring) and scoring > 0
    assert after["seconds_training"] == peek(out / "stage-01/model")["facts"]["seconds"] > 0
    assert "seconds_rollout" not in after


def test_the_printed_commands_do_the_same(small_world, capsys):
    """Each script as a user would run it, in a process of its own, in another folder: the same files to the byte."""
    one = {"valid": [str(small_world / "valid-rev.jsonl")], "test": [str(small_world / "test-rev.jsonl")]}
    run_small(small_world, "a", stages=1, **one)
    commands = [line[2:] for line in capsys.readouterr().out.splitlines() if line.startswith("$ ")]
    assert [shlex.split(command)[1] for command in commands] == [
        *("rollout.py", "rollout.py", "rollout.py", "project.py", "project.py", "select.py", "train.py", "rollout.py")
    ]
    for command in commands:
        done = paste(command.replace(str(small_world / "a"), str(small_world / "b")))
        assert done.returncode == 0, done.stderr
    ours, theirs = (identities(small_world / out, SAVED) for out in "ab")
    assert ours == theirs
    kinds = {peek(small_world / "b" / path)["recipe"]["kind"] for path in theirs}
    assert kinds == {"trajectories", "gradients", "selection", "optimizer"}
    for path in [*theirs, "stage-01/model/model.safetensors"]:
        a, b = (load_file(small_world / out / path) for out in "ab")
        assert {name: x.tobytes() for name, x in a.items()} == {name: x.tobytes() for name, x in b.items()}
    lines = [(small_world / name / "stage-01" / "metrics.jsonl").read_text().splitlines() for name in "ab"]
    for ours, theirs in zip(*lines, strict=True):
        ours, theirs = ({k: v for k, v in json.loads(x).items() if "seconds" not in k} for x in (ours, theirs))
        assert ours == theirs


@pytest.mark.parametrize("selector", ["influence", "mine"])
def test_pasting_a_printed_command_changes_nothing(small_world, capsys, selector):
    """Any command that a run printed, after the run has ended: exit code 0, and all files as they were. The second
    stage's training too, which began with an optimizer state that has gone by then."""
    options = {"valid": [str(small_world / "valid-rev.jsonl")], "test": [str(small_world / "test-rev.jsonl")]}
    if selector == "mine":
        (small_world / "mine.py").write_text("def nearest(pass_rate, stage):\n    return -abs(pass_rate - stage / 4)\n")
        options |= {"selector": f"{small_world / 'mine.py'}:nearest", "refresh_every": 1}
    run_small(small_world, "a", **options)
    out = small_world / "a"
    commands = [line[2:] for line in capsys.readouterr().out.splitlines() if line.startswith("$ ")]
    assert len(commands) == (13 if selector == "influence" else 9)
    assert not (out / "stage-01" / "optimizer").exists()
    before, written = bytes_of(out), times_of(out)
    for command in commands:
        done = paste(command)
        assert done.returncode == 0, (command, done.stderr)
    assert bytes_of(out) == before and times_of(out) == written
    run_small(small_world, "a", **options)
    assert bytes_of(out) == before and times_of(out) == written
    assert "$ " not in capsys.readouterr().out


def test_the_same_seed_gives_the_same_files_and_another_does_not(small_world):
    for out, seed in (("a", 5), ("b", 5), ("c", 6)):
        run_small(small_world, out, seed=seed)
    ours, again, other = (identities(small_world / out, SAVED) for out in "abc")
    assert ours == again
    assert len(ours) == 27 and ours.keys() == other.keys() and not set(ours.values()) & set(other.values())
    weights = [(small_world / out / "stage-02" / "model" / "model.safetensors").read_bytes() for out in "abc"]
    assert weights[0] == weights[1] != weights[2]
    chosen = [chosen_of(small_world / out / "stage-02") for out in "abc"]
    assert chosen[0] == chosen[1] != chosen[2]


def test_a_run_makes_what_is_missing_and_nothing_else(small_world):
    """As it was, whatever a kill or a person took away."""
    whole = run_small(small_world, "whole", keep_states=2)
    run_small(small_world, "part", stages=1, keep_states=2)
    out = small_world / "part"
    before = times_of(out)
    for folder, name in (("stage-02/gradients-train", "00000.safetensors"), ("stage-02", "model")):
        (out / folder / f".{name}.part").mkdir(parents=True)  # killed while these were written
        (out / folder / f".{name}.part" / name).write_bytes(b"half a file")
    report = run_small(small_world, "part", keep_states=2)
    assert before.items() <= times_of(out).items()
    assert not list(out.rglob("*.part"))
    for removed in (
        [],
        ["stage-02/test-rev"],  # killed between training and the end of the evaluation
        ["stage-02/model", "stage-02/optimizer", "stage-02/test-rev", "stage-02/test-untargeted"],
        ["stage-02/model"],  # killed between its optimizer state and the model
        ["rollouts/train/00002.safetensors", "stage-02/gradients-train/00001.safetensors", "stage-02/selection.csv"],
        ["report.json", "curve.png", "selection.png", "stage-02/metrics.jsonl"],
        ["run.safetensors", "stage-01", "stage-02", "rollouts", "report.json"],
    ):
        kept = {name: time for name, time in times_of(out).items() if not name.startswith(tuple(removed) or " ")}
        if "stage-02/model" in removed:
            kept.pop("stage-02/optimizer/00000.safetensors", None)  # made again with the model
        for path in (out / name for name in removed):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        if "run.safetensors" in removed:
            for path in out.glob("*.png"):
                path.unlink()
        report = run_small(small_world, "part", keep_states=2)
        assert identities(small_world / "whole", SAVED) == identities(out, SAVED), removed
        weights = [(small_world / run / "stage-02/model/model.safetensors").read_bytes() for run in ("whole", "part")]
        assert weights[0] == weights[1]
        assert kept.items() <= times_of(out).items(), removed
        assert without_seconds(report) == without_seconds(whole), removed


def test_the_report_is_computed_from_the_files(small_world):
    """So a rerun makes the same one, and the pictures."""
    run_small(small_world, "a")
    views = [small_world / "a" / name for name in ("report.json", "curve.png", "selection.png")]
    before = [view.read_bytes() for view in views]
    run_small(small_world, "a")
    assert [view.read_bytes() for view in views] == before
    for view in views:
        view.write_text("something else")
    run_small(small_world, "a")
    assert [view.read_bytes() for view in views] == before


def test_a_rerun_first_says_what_is_there_and_what_comes_next(small_world, capsys):
    def rerun(**options) -> tuple[str, int]:
        """The line that says so, and how many commands followed it; none came before it."""
        capsys.readouterr()
        run_small(small_world, "a", **options)
        lines = capsys.readouterr().out.splitlines()
        number = [line.startswith("resuming: ") for line in lines].index(True)
        assert not any(line.startswith(("$ ", "stage ", "before ")) for line in lines[:number])
        return lines[number], sum(line.startswith("$ ") for line in lines)

    run_small(small_world, "a", stages=1)
    assert "resuming" not in capsys.readouterr().out
    assert rerun(stages=1) == ("resuming: 1 of 1 stages trained; next: nothing to train", 0)
    assert rerun(stages=2) == ("resuming: 1 of 2 stages trained; next: stage 2 (has nothing yet)", 7)
    for name in ("model", "optimizer", "test-rev", "metrics.jsonl", "completions.jsonl"):
        path = small_world / "a" / "stage-02" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    (small_world / "a" / "stage-02" / "test-untargeted").rename(small_world / "elsewhere")
    first, second = (str(small_world / "a" / f"stage-0{s}") for s in (1, 2))
    with pytest.raises(BadInput, match=f"{first}/optimizer: no such folder; .*--keep-states"):
        rerun(stages=2)
    printed = capsys.readouterr().out
    assert "resuming: 1 of 2 stages trained;" in printed
    has = "gradients-train, gradients-valid-rev, gradients-valid-srt, selection.csv, selection.safetensors"
    assert f"next: stage 2 (has {has})" in printed and f"$ python train.py --model {first}/model" in printed
    assert f"--out {second} " in printed


@pytest.mark.parametrize("keep, stages", [(1, [3]), (2, [2, 3]), (5, [1, 2, 3])])
def test_optimizer_states_that_are_kept(small_world, keep, stages):
    options = {"stages": 3, "selector": "random", "keep_states": keep}
    run_small(small_world, "a", **options)
    states = [s for s in (1, 2, 3) if (small_world / "a" / f"stage-0{s}" / "optimizer").exists()]
    assert states == stages
    before = identities(small_world / "a", "stage-*/model")
    if keep == 5:  # another number is no other run: fewer are kept from now on
        run_small(small_world, "a", **options | {"keep_states": 1})
        assert len(list((small_world / "a").glob("*/optimizer"))) == 1
        run_small(small_world, "b", **options | {"keep_states": 2})
        assert identities(small_world / "b", "stage-*/model") == before
    run_small(small_world, "a", **options | {"stages": 4})  # which needs the last one
    assert identities(small_world / "a", "stage-0[123]/model") == before
    assert (small_world / "a" / "stage-04" / "model").exists()


def test_other_settings_are_refused_by_name(small_world):
    run_small(small_world, "a", stages=1)
    before = bytes_of(small_world / "a")
    for options, name in (
        ({"seed": 1}, "options.seed 0, now 1"),
        ({"frac": 0.2}, "options.frac 0.1, now 0.2"),
        ({"selector": "random"}, "options.selector influence, now random"),
        ({"static": True}, "options.static False, now True"),
        ({"refresh_every": 1}, "options.refresh_every 0, now 1"),
        ({"assignments": [*SMALL, "train.lr=0.001"]}, "options.train.lr "),
        ({"assignments": [*SMALL, "rollout.temperature=0.5"]}, "options.rollout.temperature "),
        ({"assignments": SMALL[:-1]}, "options.project.k 256, now 4096"),
        ({"valid": [str(small_world / "valid-rev.jsonl")]}, "inputs.valid.srt "),
        ({"limit": 50}, "inputs.train "),
    ):
        ways = r"choose another --out, or remove it and what was made from it"
        with pytest.raises(BadInput, match=rf"run\.safetensors was made with .*{re.escape(name)}.*; {ways}"):
            run_small(small_world, "a", **options)
    with open(small_world / "train.jsonl", "a") as file:
        file.write('{"prompt": "cpy(abc)=", "answer": "abc"}\n')
    with pytest.raises(BadInput, match=r"was made with inputs\.train .*, now "):
        run_small(small_world, "a")
    assert bytes_of(small_world / "a") == before


def test_what_a_run_may_change_on_its_way(small_world):
    """Its extent, and what results do not depend on."""
    run_small(small_world, "a", stages=1, selector="random")
    before = times_of(small_world / "a")
    more = {"stages": 2, "selector": "random", "group_by": "none", "save_every": 0.0, "keep_states": 2}
    tests = [
        *(str(small_world / f"test-{name}.jsonl") for name in ("rev", "untargeted")),
        f"new={small_world}/valid-srt.jsonl",
    ]
    tuned = [*SMALL, "train.batch_tokens=5000", "rollout.batch_tokens=3000", "project.batch_tokens=2000"]
    report = run_small(small_world, "a", test=tests, assignments=tuned, **more)
    assert before.items() <= times_of(small_world / "a").items()
    for entry in report["evaluations"]:  # the new test set, after the old stages too
        assert list(entry["accuracy"]) == ["rev", "untargeted", "new"]
    run_small(small_world, "b", selector="random", keep_states=2)
    for pattern in ("stage-*/model", "stage-*/selection.safetensors", "stage-*/test-rev/*.safetensors"):
        assert identities(small_world / "a", pattern) == identities(small_world / "b", pattern) != {}


@pytest.mark.parametrize("every, sampled", [(0, []), (1, [2, 3]), (2, [3])])
def test_refresh(small_world, every, sampled):
    report = run_small(small_world, "a", stages=3, refresh_every=every)
    out, sets = small_world / "a", ("train", "valid-rev", "valid-srt")
    assert [s for s in (1, 2, 3) if (out / f"stage-0{s}" / "rollouts").exists()] == sampled
    latest = out / "rollouts"
    for s in (1, 2, 3):
        folder, entry = out / f"stage-0{s}", report["evaluations"][s]
        if s in sampled:
            latest = folder / "rollouts"
            policy = rollout.model_identity(out / f"stage-0{s - 1}" / "model")
            records = [peek(path) for name in sets for path in (latest / name).glob("*.safetensors")]
            assert {record["recipe"]["inputs"]["model"] for record in records} == {policy}
            assert entry["trajectories_offline"] == 60 * 8 + 2 * 12 * 8
            assert entry["seconds_rollout"] > 0
        assert ("trajectories_offline" in entry) == ("seconds_rollout" in entry) == (s in sampled)
        for name in sets:  # scored with the latest, and on-policy where they are new
            for path in (folder / f"gradients-{name}").glob("*.safetensors"):
                trajectories = peek(latest / name / path.name)["identity"]
                assert peek(path)["recipe"]["shard"]["trajectories"] == trajectories
            change = load_folder(folder / f"gradients-{name}", "gradients")["largest_change"].max()
            assert (change < 1e-4) == (s == 1 or s in sampled)
        assert entry["diagnostics"]["live_prompts"] > 0
        assert ("overlap_previous" in entry["diagnostics"]) == (s > 1)


def test_refreshed_trajectories_are_not_sampled_twice(small_world):
    report = run_small(small_world, "a", refresh_every=1, keep_states=2)
    folder = small_world / "a" / "stage-02"
    before = times_of(folder / "rollouts")
    assert before
    shutil.rmtree(folder / "model")  # as if killed between the refresh and the end of the stage
    again = run_small(small_world, "a", refresh_every=1, keep_states=2)
    assert before == times_of(folder / "rollouts")
    # the first attempt's cost
    assert again["evaluations"][2]["seconds_rollout"] == report["evaluations"][2]["seconds_rollout"]


@pytest.mark.parametrize("selector", ["full", "random", "pass-rate", "learnability"])
def test_every_selector_runs(small_world, selector):
    report = run_small(small_world, selector, selector=selector, stages=1)
    assert report["evaluations"][1]["chosen"] == (60 if selector == "full" else 6)
    assert (small_world / selector / "rollouts" / "train").exists() == (selector not in ("full", "random"))
    assert not list((small_world / selector).glob("**/gradients-*"))  # no more than it asks for
    assert not list((small_world / selector).glob("rollouts/valid-*"))


MINE = """
import json
from pathlib import Path


def hard(stage, previous, grad_norm, rows):
    file = Path(__file__).with_name("saw.jsonl")
    with open(file, "a") as calls:
        calls.write(json.dumps([stage, None if previous is None else previous.tolist(), len(rows)]) + "\\n")
    return -grad_norm
"""


def test_a_selector_of_ones_own(small_world, capsys, monkeypatch):
    """FILE.py:FUNCTION through a whole run: it is given what it asks for, and no more is made."""
    (small_world / "mine.py").write_text(MINE)
    selector, out = f"{small_world / 'mine.py'}:hard", small_world / "a"
    report = run_small(small_world, "a", selector=selector)
    chosen = [chosen_of(out / f"stage-0{s}") for s in (1, 2)]
    saw = [json.loads(line) for line in (small_world / "saw.jsonl").read_text().splitlines()]
    assert saw == [[1, None, 60], [2, chosen[0], 60]]
    for s, ranked in enumerate(chosen, 1):
        gradients = load_folder(out / f"stage-0{s}" / "gradients-train", "gradients")
        norms = np.linalg.norm(gradients["sketch"], axis=1)
        assert ranked == gradients["prompt_index"][np.argsort(norms)][:6].tolist()
        assert "overlap_previous" in report["evaluations"][2]["diagnostics"]
    assert report["selector"] == selector
    assert [path.name for path in out.glob("*/gradients-*")] == ["gradients-train"] * 2
    assert not list(out.glob("rollouts/valid-*"))
    before = bytes_of(out)
    run_small(small_world, "a", selector=selector)
    assert bytes_of(out) == before
    assert len((small_world / "saw.jsonl").read_text().splitlines()) == 2  # not called again
    (small_world / "elsewhere").mkdir()
    shutil.move(small_world / "mine.py", small_world / "elsewhere" / "mine.py")  # the same file in another place
    moved = f"{small_world / 'elsewhere' / 'mine.py'}:hard"
    run_small(small_world, "a", selector=moved, stages=2)
    with open(small_world / "elsewhere" / "mine.py", "a") as file:
        file.write("\n\ndef other(rows):\n    return range(len(rows))\n")
    before = bytes_of(out)
    with pytest.raises(BadInput, match=r"was made with options\.selector mine\.py:hard \(\w+\), now mine\.py:hard \("):
        run_small(small_world, "a", selector=moved)
    assert bytes_of(out) == before
    monkeypatch.chdir(small_world)  # a run without --out has its selector's name
    sets = {
        "pool": "train.jsonl",
        "valid": ["valid-rev.jsonl"],
        "test": ["test-rev.jsonl"],
        "model": ROOT / "toy/model",
    }
    cropi.run(**sets, selector="elsewhere/mine.py:other", seed=3, stages=1, assignments=SMALL)
    assert chosen_of(small_world / "runs/mine-other-3/stage-01") == [59, 58, 57, 56, 55, 54]


@pytest.mark.parametrize("selector", ["influence", "random"])
def test_static_chooses_once(small_world, selector):
    report = run_small(small_world, "a", selector=selector, static=True)
    once, anew = (run_small(small_world, "b", selector=selector, stages=stages) for stages in (1, 2))
    first, second = (names_of(small_world / "a" / f"stage-0{s}") for s in (1, 2))
    assert [name for name in first if name not in second] == [n for n in first if n.startswith(("gradi", "select"))]
    file = "stage-01/selection.safetensors"
    assert identities(small_world / "a", file) == identities(small_world / "b", file) != {}
    assert report["evaluations"][1]["accuracy"] == once["evaluations"][1]["accuracy"]
    assert report["evaluations"][2]["chosen"] == anew["evaluations"][2]["chosen"]
    assert report["evaluations"][2]["seconds_scoring"] < 1e-3
    with pytest.raises(BadInput, match="--static chooses once"):
        run_small(small_world, "c", static=True, refresh_every=1)
    with pytest.raises(BadInput, match=r"was made with options\.static True, now False"):
        run_small(small_world, "a", selector=selector)


def test_settings_reach_their_stage():
    settings = cropi.parse_settings(
        [
            *("train.lr=1e-4", "rollout.temperature=0.5", "valid.samples=4", "train.max-tokens=9"),
            *("rollout.dtype=float32", "rollout.limit=7", "rollout.shard=20", "project.k=9"),
        ]
    )
    shared = {"temperature": 0.5, "dtype": "float32", "limit": 7}
    assert settings["train"] == shared | {"lr": 1e-4, "max_tokens": 9}
    assert settings["rollout"] == shared | {"shard": 20}
    assert settings["valid"] == settings["test"] == shared | {"shard": 20, "samples": 4}
    assert settings["project"] == {"dtype": "float32", "k": 9}
    assert settings["select"] == {"limit": 7}


def test_influence_finds_the_target_families(tmp_path):
    """A shortened loop on a quarter of the bundled world: two stages of 10 steps."""
    settings = ["train.steps=10", "test.samples=1", "valid.samples=16"]
    cropi.run(stages=2, out=tmp_path / "run", assignments=settings, limit=600)
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    pool = load_prompts(TOY / "train.jsonl", limit=600)
    share = np.mean([row["family"] in ("rev", "srt") for row in pool])
    for stage in (1, 2):
        chosen = chosen_of(tmp_path / "run" / f"stage-0{stage}")
        assert len(chosen) == 60
        assert np.mean([pool[i]["family"] in ("rev", "srt") for i in chosen]) >= 2 * share
    start, _, end = (np.mean([e["accuracy"][name] for name in ("rev", "srt")]) for e in report["evaluations"])
    assert end > start + 0.1


def test_a_start_that_failed_can_be_mended(small_world):
    """A mistake that only shows once the model is there: the run's recipe goes, and what was made stays."""
    out = small_world / "a"
    with pytest.raises(
        BadInput, match=r"of 60 prompts dropped: .*\(the model's 64 less --max-tokens 60, or the option"
    ):
        run_small(small_world, "a", assignments=[*SMALL, "rollout.max_tokens=60"])
    with pytest.raises(
        BadInput, match=r"run\.safetensors was made with options\..*max_tokens 60, now 8.*, or remove it"
    ):
        run_small(small_world, "a", stages=1)
    (out / "run.safetensors").unlink()
    run_small(small_world, "a", stages=1)
    before, times = identities(out, "**/[!m]*.safetensors"), times_of(out)
    (out / "run.safetensors").unlink()  # every other file still knows what it was made from
    with pytest.raises(BadInput, match=r"rollouts/train/00000\.safetensors was made with options\.seed 0, now 1"):
        run_small(small_world, "a", stages=1, seed=1)
    (out / "run.safetensors").unlink()
    run_small(small_world, "a", stages=1)
    assert identities(out, "**/[!m]*.safetensors") == before
    del times["run.safetensors"]
    assert times.items() <= times_of(out).items()


def test_a_damaged_run_file_and_a_folder_of_something_else_are_refused(small_world):
    out = small_world / "a"
    run_small(small_world, "a", stages=1, selector="random")
    data = (out / "run.safetensors").read_bytes()
    for damaged in (data[:-9], data[: len(data) // 2] + b"#" + data[len(data) // 2 + 1 :], b""):
        (out / "run.safetensors").write_bytes(damaged)
        with pytest.raises(BadInput, match=r"run\.safetensors .*damaged"):
            run_small(small_world, "a", stages=1, selector="random")
    (out / "run.safetensors").write_bytes(data)
    (out / "report.html").write_text("made by bench/report.py")
    (out / "tensorboard").mkdir()  # by docs/metrics.md
    run_small(small_world, "a", stages=1, selector="random")
    (out / "run.safetensors").unlink()
    (out / "thesis.tex").write_text("precious")
    with pytest.raises(BadInput, match=r"something else than a run of this version of the scripts \(thesis\.tex\)"):
        run_small(small_world, "a", stages=1, selector="random")
    assert (out / "thesis.tex").read_text() == "precious"


def world_with(world: Path, name: str, lines: list[dict]) -> str:
    path = world / f"valid-{name}.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def test_a_solved_or_stuck_validation_set_does_not_score(small_world, capsys):
    """The toy cannot get `rev` of an answer that is none; and a reward that is always 1 solves everything."""
    stuck = world_with(small_world, "stuck", [{"prompt": "rev(123)=", "answer": "impossible"}] * 3)
    rev = str(small_world / "valid-rev.jsonl")
    run_small(small_world, "with", valid=[rev, stuck])
    printed = capsys.readouterr().out
    line = "validation set stuck does not score in this stage; stuck: no live prompt, mean reward 0.00, 0% truncated"
    assert printed.count(line) == 2
    run_small(small_world, "without", valid=[rev])
    for s in (1, 2):
        ours, theirs = (small_world / name / f"stage-0{s}/selection.safetensors" for name in ("with", "without"))
        ours, theirs = (load_file(path) for path in (ours, theirs))
        assert all(np.array_equal(ours[name], theirs[name], equal_nan=True) for name in ours)


def test_the_curriculum_ends_when_all_validation_sets_are_solved(small_world, capsys):
    (small_world / "one.py").write_text("def one(completions, valid, **columns):\n    return [float(valid[0])]\n")
    for name in ("train", "valid-rev", "test-rev"):  # validation prompts are always right, the others never
        rows = [json.loads(line) for line in (small_world / f"{name}.jsonl").read_text().splitlines()]
        rows = [row | {"valid": name == "valid-rev"} for row in rows]
        (small_world / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"valid": [str(small_world / "valid-rev.jsonl")], "test": [str(small_world / "test-rev.jsonl")]}
    options["assignments"] = [*SMALL, f"rollout.reward={small_world / 'one.py'}:one"]
    for _ in range(2):  # a rerun says the same
        report = run_small(small_world, "run", **options)
        printed = capsys.readouterr().out
        assert "done: ended before stage 1: all validation sets are solved" in printed
        assert len(report["evaluations"]) == 1
        assert {"curve.png", "selection.png", "report.json"} <= set(names_of(small_world / "run"))
        assert not (small_world / "run/stage-01/model").exists()


def test_a_run_ends_with_a_warning_when_nothing_is_left_to_choose(small_world, capsys):
    (small_world / "unsolved.py").write_text(
        "import numpy as np\ndef first(rows, stage):\n    return np.full(len(rows), 1.0 if stage == 1 else np.nan)\n"
    )
    report = run_small(small_world, "run", stages=3, selector=f"{small_world / 'unsolved.py'}:first")
    printed = capsys.readouterr().out
    assert re.search(r"warning: ended before stage 2: .*unsolved.py:first can choose no prompt\n", printed)
    assert [entry["stage"] for entry in report["evaluations"]] == [0, 1]
    (small_world / "none.py").write_text("import numpy as np\ndef none(rows):\n    return np.full(len(rows), np.nan)\n")
    with pytest.raises(BadInput, match=r"none.py:none can choose no prompt$"):  # in the first stage: bad input
        run_small(small_world, "other", selector=f"{small_world / 'none.py'}:none")
