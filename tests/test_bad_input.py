"""Bad input: one line that names the thing, exit code 2, and nothing changed on disk."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import load_all, save_descendant
from safetensors.torch import load_file, save_file

import cropi
import project
import rollout
import train
from rollout import TOY, command_line

MODULES = {"rollout": rollout, "project": project, "select": cropi.select, "train": train, "cropi": cropi}


@pytest.fixture
def refused(monkeypatch, capsys, tmp_path):
    """Runs a command line that must be refused, with the given words in its one line."""

    def tree() -> dict[Path, bytes | None]:
        paths = [
            path for path in tmp_path.rglob("*") if path.name not in (".lock", ".writer")
        ]  # those of a run's folder
        return {path: path.read_bytes() if path.is_file() else None for path in paths}

    def run(script: str, *words: object, says: str) -> None:
        before = tree()
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            command_line(MODULES[script].app)
        error = capsys.readouterr().err
        assert stop.value.code == 2
        assert error.startswith("error: ") and error.count("\n") == 1, error
        assert says in error, error
        assert tree() == before

    return run


@pytest.fixture
def world(small_world):
    """Trajectories, gradients and a selection of the small world, and a folder that an error must leave as it is."""
    w = small_world
    rollout.rollout(out=w / "t", data=str(w / "train.jsonl"))
    rollout.rollout(out=w / "v", data=str(w / "valid-rev.jsonl"), samples=8)
    project.project(trajectories=w / "t", out=w / "g", k=64)
    project.project(trajectories=w / "v", out=w / "gv", k=64)
    cropi.select.select(
        data=str(w / "train.jsonl"),
        trajectories=w / "t",
        gradients=w / "g",
        valid_gradients=[w / "gv"],
        out=w / "s.safetensors",
    )
    (w / "out").mkdir()
    (w / "out" / "notes").write_text("what was here before")
    return w


def broken_model(folder, change):
    shutil.copytree(TOY / "model", folder)
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_rollout(refused, world, tmp_path):
    w, out = world, ("--out", world / "out")
    refused("rollout", *out, "--data", w / "no.jsonl", says="no.jsonl")
    refused("rollout", *out, "--model", w / "no-model", says="no-model")
    refused("rollout", *out, "--samples", 0, says="--samples")
    refused("rollout", *out, "--temperature", 0, says="temperature")
    refused("rollout", *out, "--temperature", "nan", says="temperature")
    refused("rollout", *out, "--reward", "guess", says="guess")
    refused("rollout", *out, "--sample", 3, says="--sample")
    refused("rollout", *out, "--shard", 0, says="--shard")
    refused("rollout", *out, "--force", says="--force")  # of an earlier version
    refused("rollout", *out, "--save-every", 60, says="--save-every")
    refused("rollout", says="--out")
    for number, (text, says) in enumerate(
        [
            ("", "no prompts"),
            ("\n\n", "no prompts"),
            ('{"prompt": "rev(12)="}\n', "'answer'"),
            ('{"prompt": "rev(12)=", "answer": ""}\n', "'answer'"),
            ('{"prompt": "rev(12)=", "answer": true}\n', "'answer'"),
            ('{"answer": "21"}\n', "'prompt'"),
            ('["rev(12)=", "21"]\n', "'prompt'"),
            ('{"prompt": "rev(12)=", "answer": "21"}\n{"prompt": \n', "line 2 is not JSON: Expecting value"),
            ('{"prompt": "???", "answer": "21"}\n', "1 of 1 prompts dropped: empty"),
        ]
    ):
        file = tmp_path / f"bad-{number}.jsonl"
        file.write_text(text)
        refused("rollout", *out, "--data", file, says=says)
    (tmp_path / "latin.jsonl").write_bytes('{"prompt": "é", "answer": "e"}'.encode("latin-1"))
    refused("rollout", *out, "--data", tmp_path / "latin.jsonl", says="latin.jsonl: cannot load")


def test_what_is_written_must_not_replace_something_else(refused, world, tmp_path):
    w, given = world, ("--data", world / "train.jsonl")
    commands = {
        "rollout": given,
        "project": ("--trajectories", w / "t"),
        "train": (*given, "--selection", w / "s.safetensors"),
    }
    (tmp_path / "file").write_text("x")
    for script, words in commands.items():  # these write into folders
        for wrong in (tmp_path / "file", w / "train.jsonl", w / "s.safetensors", tmp_path / "file" / "x", "/proc/x/y"):
            refused(script, *words, "--out", wrong, says=f"{wrong}: cannot write in ")
    # what stands under the name of a file of ours, and is not one, or was made from other things
    (tmp_path / "mine" / "model").mkdir(parents=True)
    for name in ("00000.safetensors", "model/config.json"):
        (tmp_path / "mine" / name).write_text("x")
    refused("rollout", *given, "--out", tmp_path / "mine", says="00000.safetensors is damaged, or not one of our files")
    refused("project", *commands["project"], "--out", tmp_path / "mine", says="not one of our files")
    refused(
        "train", *commands["train"], "--out", tmp_path / "mine", says=f"{tmp_path / 'mine/model/cropi.json'}: no such"
    )
    refused("rollout", *given, "--out", w / "v", says="was made with inputs.data ")
    refused("rollout", *given, "--out", w / "t", "--samples", 9, says="was made with options.samples 8, now 9")
    refused("rollout", *given, "--out", w / "t", "--shard", 7, says="shard.of 4, now 9")
    refused("rollout", *given, "--out", w / "g", says="was made with kind gradients, now trajectories")
    refused("project", *commands["project"], "--out", w / "t", says="was made with kind trajectories, now gradients")
    refused("project", *commands["project"], "--out", w / "g", says="was made with options.k 64, now 4096")
    train.train(selection=w / "s.safetensors", data=str(w / "train.jsonl"), out=tmp_path / "stage", steps=1)
    stage = ("--out", tmp_path / "stage")
    refused("train", *commands["train"], *stage, says="stage/model was made with options.steps 1, now 40")
    again = ("--model", tmp_path / "stage/model", "--steps", 1)
    refused("train", *commands["train"], *stage, *again, says="stage/model was made with inputs.model ")
    # select writes a file, and a table beside it
    shutil.copy(w / "train.jsonl", w / "x.jsonl")
    (w / "x.csv").write_text("prompt,answer\nrev(12)=,21\n")
    full = ("--selector", "full")
    refused("select", "--data", w / "x.csv", *full, "--out", w / "x.safetensors", says="x.csv")
    refused("select", *given, *full, "--out", w / "x.csv", says="x.csv")
    refused("select", *given, *full, "--out", w / "out", says="name a safetensors file")
    refused("select", *given, *full, "--out", w / "train.jsonl", says="train.jsonl")
    refused("select", *given, *full, "--out", tmp_path / "file" / "s.safetensors", says="cannot write")
    refused("select", *given, *full, "--out", w / "s.safetensors", says="was made with ")
    refused("select", *given, *full, "--out", w / "t/00000.safetensors", says="kind trajectories, now selection")
    sets = ("--train", w / "train.jsonl", "--valid", w / "valid-rev.jsonl", "--test", w / "test-rev.jsonl")
    refused("cropi", "run", *sets, "--out", w / "out", says="holds something else than a run")
    refused("cropi", "run", *sets, "--out", w / "t", says="holds something else than a run")
    refused("cropi", "run", *sets, "--out", tmp_path / "file", says="file: cannot write in ")
    refused("cropi", "run", *sets, "--out", w / "train.jsonl", says="train.jsonl: cannot write in ")
    refused("cropi", "run", *sets, "--out", "/proc/x/y", says="/proc/x/y: cannot write in ")


OLD = "cropi/3"  # the format before


def test_files_of_an_earlier_format(refused, world, tmp_path):
    """Refused by the format, and never touched."""
    w = world
    record = {"format": OLD, "kind": "trajectories", "model": "1b53a91ba91b6d8f", "data": "b677211bc204e12c"}
    record |= {"prompts": 2, "options": {"samples": 8, "max_tokens": 8, "temperature": 1.0, "seed": 0}}
    tensors = {"rewards": torch.zeros(16), "prompt_index": torch.arange(2).repeat_interleave(8)}

    def save(path: Path, kind: str) -> Path:
        """As the version before wrote it, but for most of its tensors."""
        path.parent.mkdir(exist_ok=True)
        save_file(tensors, path, {"cropi": json.dumps(record | {"kind": kind}), "digest": "e19e3a871916cea8"})
        return path

    shard = save(tmp_path / "old" / "00000.safetensors", "trajectories")
    says = f"{shard} has the format {OLD}, not {rollout.FORMAT}"
    refused("project", "--trajectories", tmp_path / "old", "--out", tmp_path / "new", says=says)
    refused("rollout", "--data", w / "train.jsonl", "--out", tmp_path / "old", says=says)
    pool = ("--data", w / "train.jsonl", "--trajectories", tmp_path / "old", "--selector", "pass-rate")
    refused("select", *pool, "--out", tmp_path / "new.safetensors", says=says)
    file = save(tmp_path / "old.safetensors", "trajectories")  # then a file, not a folder of shards
    refused("project", "--trajectories", file, "--out", tmp_path / "new", says=f"{file}: no trajectories here")
    selection = save(tmp_path / "old-selection.safetensors", "selection")
    says = f"{selection} has the format {OLD}, not {rollout.FORMAT}"
    refused("train", "--data", w / "train.jsonl", "--selection", selection, "--out", tmp_path / "new", says=says)
    refused("select", *pool[:2], "--selector", "full", "--out", selection, says=says)
    sets = ("--train", w / "train.jsonl", "--valid", w / "valid-rev.jsonl", "--test", w / "test-rev.jsonl")
    begun = save(tmp_path / "begun" / "run.safetensors", "run")
    refused("cropi", "run", *sets, "--out", tmp_path / "begun", says=f"{begun} has the format {OLD}")


@pytest.mark.parametrize("left", ["run.json", "stage-00", "both"])
def test_a_run_folder_of_an_earlier_format(refused, world, tmp_path, left):
    """It has run.json and counts its stages from 0."""
    run = tmp_path / "runs" / "old"
    shutil.copytree(TOY / "model", run / "stage-00" / "model")
    (run / "stage-00" / "selection.safetensors").write_bytes(b"not to be looked at")
    (run / "rollouts").mkdir()
    (run / "rollouts" / "train.safetensors").write_bytes(b"not to be looked at")
    (run / "run.json").write_text(json.dumps({"format": OLD, "settings": {"seed": 0}, "digest": "0" * 16}))
    if left == "run.json":
        shutil.rmtree(run / "stage-00")
    if left == "stage-00":
        (run / "run.json").unlink()
    sets = ("--train", world / "train.jsonl", "--valid", world / "valid-rev.jsonl", "--test", world / "test-rev.jsonl")
    refused("cropi", "run", *sets, "--out", run, says=f"{run} holds something else than a run of this version")


def test_models(refused, world, tmp_path):
    out = ("--data", world / "train.jsonl", "--out", world / "out")
    (tmp_path / "empty").mkdir()
    refused("rollout", *out, "--model", tmp_path / "empty", says="no config.json")
    lacking = broken_model(tmp_path / "lacking", lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"))
    refused("rollout", *out, "--model", lacking, says="model.layers.1.mlp.up_proj.weight")
    cut = broken_model(tmp_path / "cut", lambda weights: None)
    data = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(data[: len(data) // 2])
    refused("rollout", *out, "--model", cut, says="cannot load this model")
    refused("rollout", *out, "--max-tokens", 64, says="60 of 60 prompts dropped: empty, or longer than 0 tokens")


def test_project(refused, world, tmp_path):
    w, out = world, ("--out", world / "out")
    given = ("--trajectories", w / "t")
    refused("project", *out, *given, "--k", 0, says="--k")
    refused("project", *out, *given, "--sparse-ratio", 0, says="sparse")
    refused("project", *out, *given, "--sparse-ratio", 1.1, says="sparse")
    refused("project", *out, "--trajectories", w / "no", says="no: no trajectories here")
    refused(
        "project", *out, "--trajectories", w / "t/00000.safetensors", says="00000.safetensors: no trajectories here"
    )
    refused("project", *out, "--trajectories", w / "g", says="g/00000.safetensors holds gradients, where trajectories")
    shutil.copytree(w / "t", tmp_path / "cut")
    cut, data = tmp_path / "cut/00001.safetensors", (w / "t/00001.safetensors").read_bytes()
    for size in (0, 5, 100, len(data) - 1):
        cut.write_bytes(data[:size])
        refused(
            "project", *out, "--trajectories", tmp_path / "cut", says="cut/00001.safetensors is damaged, or not one"
        )
    cut.unlink()
    refused("project", *out, "--trajectories", tmp_path / "cut", says="3 of 4 shards of trajectories are there")
    other = broken_model(tmp_path / "other", lambda weights: weights["lm_head.weight"].mul_(1.01))
    refused("project", *out, *given, "--model", other, says="another model")


def test_a_flipped_bit_is_found_where_it_is_read(refused, world, tmp_path):
    """In the middle of the tensors of a shard, where only the digest tells."""
    data = bytearray((world / "t/00000.safetensors").read_bytes())
    data[-50] ^= 1
    (world / "t/00000.safetensors").write_bytes(data)
    changed = "t/00000.safetensors has been changed or damaged; remove it"
    refused("project", "--trajectories", world / "t", "--out", tmp_path / "new", says=changed)
    pool = ("--data", world / "train.jsonl", "--trajectories", world / "t")
    refused("select", *pool, "--selector", "pass-rate", "--out", tmp_path / "new.safetensors", says=changed)


def test_no_live_prompt(refused, world, tmp_path):
    """In the first stage: bad input that says why, and what helps."""
    w = world
    (tmp_path / "hopeless.jsonl").write_text('{"prompt": "rev(123)=", "answer": "impossible"}\n' * 3)
    given = {"pool": str(w / "train.jsonl"), "test": [str(w / "test-rev.jsonl")]}
    stuck = (
        r"influence can choose no prompt; stuck: no live prompt, mean reward 0.00, 0% truncated \(what helps: easier"
    )
    with pytest.raises(rollout.BadInput, match=stuck):
        cropi.run(valid=[str(tmp_path / "hopeless.jsonl")], out=tmp_path / "run", **given)
    assert not (tmp_path / "run" / "stage-01" / "selection.safetensors").exists()
    (tmp_path / "one").mkdir()
    given["pool"] = str(tmp_path / "hopeless.jsonl")
    with pytest.raises(rollout.BadInput, match=r"choose no prompt; .*rollouts/train is stuck: no live prompt, mean"):
        cropi.run(valid=[str(w / "valid-rev.jsonl")], out=tmp_path / "run-2", **given)


def test_numbers_that_are_not_finite_name_the_prompt(refused, world, tmp_path, toy):
    w = world
    rows = [json.loads(line) for line in (w / "train.jsonl").read_text().splitlines()]
    trajectories = load_all(w / "t")
    live = trajectories.prompt_index[trajectories.live()].tolist()
    letter = next(c for i in live for c in rows[i]["prompt"][4:] if c.isdigit())
    hit = [i for i in live if letter in rows[i]["prompt"]]
    assert 0 < len(hit) < len(live)
    token = toy[1](letter).input_ids[0]

    def poison(weights):
        weights["model.embed_tokens.weight"][token] = torch.nan

    poisoned, tokenizer = rollout.load_model(broken_model(tmp_path / "nan", poison))
    model = save_descendant(tmp_path / "descendant", poisoned, tokenizer)  # of the toy model, as far as one can tell
    named = [f"prompt {i}" for i in range(60) if letter in rows[i]["prompt"]]
    with pytest.raises(rollout.BadInput, match="not finite at prompt") as error:
        rollout.rollout(out=tmp_path / "x", model=model, data=str(w / "train.jsonl"))
    assert any(str(error.value).endswith(name) for name in named)
    finite = "not finite at prompt"
    refused("project", "--trajectories", w / "t", "--model", model, "--out", w / "out", says=finite)
    stage = ("--selection", w / "s.safetensors", "--data", w / "train.jsonl", "--out", w / "new")
    refused("train", *stage, "--model", model, says=finite)
    # finite logits, yet a gradient that overflows
    first = w / "t/00000.safetensors"
    trajectories, record = rollout.load_trajectories(first)
    place = trajectories.live()[0]
    trajectories.behavior_logps[trajectories.span(place, 0).start] = -200.0  # so the ratio is infinite
    rollout.save(first, trajectories.tensors(), record["recipe"], record["facts"])
    says = f"{first}: gradient is not finite at prompt {trajectories.prompt_index[place]};"
    refused("project", "--trajectories", w / "t", "--out", w / "out", says=says)


def test_select(refused, world, tmp_path):
    w, out = world, ("--out", world / "s.safetensors")  # must stay what it was
    pool = ("--data", w / "train.jsonl", "--trajectories", w / "t")
    gradients = ("--gradients", w / "g", "--valid-gradients", w / "gv")
    refused("select", *out, *pool, *gradients, "--frac", 0, says="frac")
    refused("select", *out, *pool, *gradients, "--frac", 1.5, says="frac")
    refused("select", *out, *pool, *gradients, "--stage", 0, says="--stage")
    refused("select", *out, *pool, *gradients, "--selector", "best", says="best")
    refused("select", *out, *pool, *gradients, "--method", "full", says="--method")  # of an earlier version
    refused("select", *out, *pool, says="--valid-gradients")
    refused("select", *out, *pool, *gradients[:2], says="--valid-gradients")
    refused("select", *out, "--data", w / "train.jsonl", "--selector", "pass-rate", says="--trajectories")
    refused("select", *out, "--data", w / "valid-rev.jsonl", *pool[2:], *gradients, says="other data")
    refused("select", *out, *pool, "--limit", 50, *gradients, says="other data")
    other = ("--data", w / "valid-rev.jsonl", "--trajectories", w / "v")
    refused("select", *out, *other, *gradients, says="other trajectories")
    wrong = ("--gradients", w / "t", "--valid-gradients", w / "gv")
    refused("select", *out, *pool, *wrong, says="t/00000.safetensors holds trajectories, where gradients")
    wrong = ("--gradients", w / "g", "--valid-gradients", w / "v")
    refused("select", *out, *pool, *wrong, says="v/00000.safetensors holds trajectories, where gradients")
    wrong = ("--data", w / "train.jsonl", "--trajectories", w / "g")
    refused("select", *out, *wrong, *gradients, says="g/00000.safetensors holds gradients, where trajectories")
    refused("select", *out, *pool, *gradients, "--previous", w / "no.safetensors", says="no.safetensors: no such file")
    refused("select", *out, *pool, *gradients, "--previous", w / "g/00000.safetensors", says="holds gradients, where")
    project.project(trajectories=w / "v", out=tmp_path / "k", k=32)
    refused("select", *out, *pool, *gradients[:2], "--valid-gradients", tmp_path / "k", says="other options")
    project.project(trajectories=w / "v", out=tmp_path / "seed", k=64, seed=1)
    refused("select", *out, *pool, *gradients[:2], "--valid-gradients", tmp_path / "seed", says="other options")
    train.train(selection=w / "s.safetensors", data=str(w / "train.jsonl"), out=tmp_path / "stage", steps=1)
    project.project(trajectories=w / "v", model=tmp_path / "stage/model", out=tmp_path / "moved", k=64)
    refused("select", *out, *pool, *gradients[:2], "--valid-gradients", tmp_path / "moved", says="another model")


SELECTORS = """
import numpy as np


def raises(rows):
    raise KeyError("no such\\ncolumn")


def stranger(rows, entropy, loss):
    return np.zeros(len(rows))


def column(rows):
    return np.zeros((len(rows), 1))


def number(rows):
    return 1.0


def short(rows):
    return np.zeros(len(rows) - 1)


def unknown(rows):
    return np.full(len(rows), np.nan)


def words(rows):
    return [row["prompt"] for row in rows]


def nothing(rows):
    pass


def ragged(rows):
    return [[0.0] * (i % 2) for i in range(len(rows))]


lookup = {}
"""


def test_selectors(refused, world, tmp_path):
    """FILE.py:FUNCTION by the contract at the head of select.py, through both commands that take it."""
    w, file = world, tmp_path / "mine.py"
    file.write_text(SELECTORS)
    (tmp_path / "syntax.py").write_text("def score(rows):\nreturn 1\n")
    (tmp_path / "import.py").write_text("import no_such_package\n")
    sets = ("--train", w / "train.jsonl", "--valid", w / "valid-rev.jsonl", "--test", w / "test-rev.jsonl")
    run = ("cropi", "run", *sets, "--stages", 1, "--set", "test.samples=1", "--out")
    select = ("select", "--data", w / "train.jsonl", "--out")
    for selector, says in {
        "best": f"no selector 'best'; it is one of {', '.join(cropi.select.SELECTORS)} or FILE.py:FUNCTION",
        "": "no selector ''",
        "mine.py": "no selector 'mine.py'",
        f"{tmp_path / 'no.py'}:score": f"no file {tmp_path / 'no.py'}",
        f"{tmp_path}:score": f"no file {tmp_path}",
        f"{file}:absent": f"{file} has no function absent",
        f"{file}:": f"{file} has no function",
        f"{file}:lookup": f"{file} has no function lookup",
        f"{tmp_path / 'syntax.py'}:score": "syntax.py does not run (IndentationError",
        f"{tmp_path / 'import.py'}:score": "does not run (ModuleNotFoundError: No module named 'no_such_package')",
        f"{file}:stranger": "asks for entropy, loss; there is cosine, ",
    }.items():  # before any work
        refused(*select, tmp_path / "new.safetensors", "--selector", selector, says=says)
        refused(*run, tmp_path / "new", "--selector", selector, says=says)
    for name, says in {  # these show once they are called
        "raises": "raised KeyError: 'no such",
        "column": "returned shape (60, 1), not (60,)",
        "number": "returned shape (), not (60,)",
        "short": "returned shape (59,), not (60,)",
        "unknown": "mine.py:unknown can choose no prompt",
        "words": "raised ValueError: could not convert string to float",
        "nothing": "returned ",
        "ragged": "raised ValueError",
    }.items():
        refused(*select, tmp_path / "new.safetensors", "--selector", f"{file}:{name}", says=says)
    assert not list(tmp_path.glob("new*"))


def test_a_selector_that_fails_in_a_run(world, tmp_path, monkeypatch, capsys):
    """One line that names it, and no stage is trained."""
    (tmp_path / "mine.py").write_text(SELECTORS)
    sets = ("--train", world / "train.jsonl", "--valid", world / "valid-rev.jsonl", "--test", world / "test-rev.jsonl")
    words = ("run", *sets, "--out", tmp_path / "run", "--selector", f"{tmp_path / 'mine.py'}:raises")
    for _ in range(2):  # and again on a rerun
        monkeypatch.setattr(sys, "argv", ["cropi.py", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            command_line(cropi.app)
        error = capsys.readouterr().err
        assert stop.value.code == 2
        assert error.count("\n") == 1 and "mine.py:raises' raised KeyError" in error
        assert not list((tmp_path / "run").glob("stage-01/*"))
    # the way on, with the rollouts that are there
    (tmp_path / "mine.py").write_text("def raises(rows, pass_rate):\n    return pass_rate\n")
    with pytest.raises(SystemExit):
        command_line(cropi.app)
    error = capsys.readouterr().err
    assert "run.safetensors was made with options.selector mine.py:raises (" in error and "remove it" in error
    (tmp_path / "run" / "run.safetensors").unlink()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").glob("rollouts/**/*")}
    assert before
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--stages", "1", "--set", "train.steps=1"])
    command_line(cropi.app)
    assert (
        before.items() <= {path: path.stat().st_mtime_ns for path in (tmp_path / "run").glob("rollouts/**/*")}.items()
    )
    assert (tmp_path / "run" / "stage-01" / "model" / "config.json").exists()


def test_train(refused, world, tmp_path):
    w, out = world, ("--out", world / "out")
    given = ("--selection", w / "s.safetensors", "--data", w / "train.jsonl")
    refused("train", *out, "--selection", w / "no.safetensors", "--data", w / "train.jsonl", says="no.safetensors")
    refused(
        "train", *out, "--selection", w / "t/00000.safetensors", *given[2:], says="holds trajectories, where selection"
    )
    refused("train", *out, "--selection", w / "s.safetensors", "--data", w / "valid-rev.jsonl", says="other data")
    refused("train", *out, *given, "--limit", 50, says="other data")
    refused("train", *out, *given, "--samples", 1, says="--samples")
    refused("train", *out, *given, "--lr", 0, says="lr")
    refused("train", *out, *given, "--optimizer", w / "no.safetensors", says="no.safetensors: no such folder")
    refused("train", *out, *given, "--optimizer", w / "s.safetensors", says="")
    refused("train", *out, *given, "--initial-model", w / "no-model", says="no-model")
    train.train(selection=w / "s.safetensors", data=str(w / "train.jsonl"), out=tmp_path / "one", steps=1)
    other = broken_model(tmp_path / "other", lambda weights: weights["lm_head.weight"].mul_(1.01))
    refused("train", *out, *given, "--model", other, says="made with another model")
    optimizer = tmp_path / "one/optimizer"
    refused("train", *out, *given, "--optimizer", optimizer, says="optimizer state of another model")


def test_run(refused, world, tmp_path):
    w = world
    given = ("run", "--out", tmp_path / "run")
    for words, says in [
        (("--frac", 0), "frac"),
        (("--stages", 0), "stages"),
        (("--selector", "best"), "best"),
        (("--keep-states", 0), "--keep-states"),
        (("--force", 0), "--force"),  # of an earlier version
        (("--train", w / "no.jsonl"), "no.jsonl"),
        (("--valid", w / "no.jsonl"), "no.jsonl"),
        (("--test", w / "no.jsonl"), "no.jsonl"),
        (("--train", w / "train.jsonl"), "validation and test sets of its own"),
        (("--model", w / "no-model"), "no-model"),
        (("--static", "--refresh-every", 2), "--static chooses once"),
        (("--set", "train.speed=9"), "train has no such option"),
        (("--set", "train.model=x"), "train has no such option"),
        (("--set", "select.selector=full"), "select has no such option"),
        (("--set", "fly.lr=1"), "SCRIPT.OPTION=VALUE"),
        (("--set", "train.lr"), "SCRIPT.OPTION=VALUE"),
        (("--set", "train.lr=fast"), "train.lr=fast"),
        (("--set", "project.k=0"), "project.k=0"),
        (("--set", "rollout.shard=0"), "rollout.shard=0"),
        (("--set", "project.sparse_ratio=2"), "project.sparse_ratio=2"),
        (("--valid", w / "valid-rev.jsonl", "--valid", w / "valid-rev.jsonl"), "same name"),
        (("--valid", f"a/b={w / 'valid-rev.jsonl'}"), "no name of letters"),
    ]:
        refused("cropi", *given, *words, says=says)
    assert not (tmp_path / "run").exists()
    refused("cropi", "walk", says="walk")


# Every one of these, in every format that can say it: (name of the file, its bytes)
BIG = "a" * 500_000
MALFORMED = {
    "null.jsonl": b'{"prompt": "rev(12)=", "answer": "21"}\n\x00\x00\x00\n',
    "binary.jsonl": bytes(range(256)),
    "utf16.jsonl": '{"prompt": "rev(12)=", "answer": "21"}'.encode("utf-16"),
    "number.jsonl": b"3\n4\n",
    "string.jsonl": b'"rev(12)="\n',
    "nulls.jsonl": b"null\n",
    "middle.jsonl": b'{"prompt": "rev(12)=", "answer": "21"}\nnull\n',
    "nulls.json": b"[null]",
    "cut.jsonl": b'{"prompt": "rev(12)=", "answer": "2',
    "listed.jsonl": b'{"prompt": ["rev"], "answer": "21"}\n',
    "numbered.jsonl": b'{"prompt": 12, "answer": "21"}\n',
    "nested.jsonl": b'{"prompt": {"a": "b"}, "answer": "21"}\n',
    "absent.jsonl": b'{"prompt": "rev(12)="}\n',
    "noprompt.jsonl": b'{"answer": "21"}\n',
    "emptyprompt.jsonl": b'{"prompt": "", "answer": "21"}\n',
    "nullprompt.jsonl": b'{"prompt": null, "answer": "21"}\n',
    "nullanswer.jsonl": b'{"prompt": "rev(12)=", "answer": null}\n',
    "listanswer.jsonl": b'{"prompt": "rev(12)=", "answer": ["21"]}\n',
    "boolanswer.jsonl": b'{"prompt": "rev(12)=", "answer": false}\n',
    "oneofmany.jsonl": b'{"prompt": "rev(12)=", "answer": "21"}\n' * 50 + b'{"prompt": "rev(12)=", "answer": ""}\n',
    "changing.jsonl": b'{"prompt": "rev(12)=", "answer": "21"}\n{"prompt": ["x"], "answer": {"a": 1}}\n',
    "duplicate.jsonl": b'{"prompt": "rev(12)=", "prompt": 3, "answer": "21"}\n',
    "unknowncharacters.jsonl": '{"prompt": "漢字", "answer": "21"}\n'.encode(),
    "bigprompt.jsonl": f'{{"prompt": "{BIG}", "answer": "21"}}\n'.encode(),
    "chat.jsonl": b'{"prompt": [{"role": "user", "content": "rev(12)="}], "answer": "21"}\n',
    "empty.jsonl": b"",
    "white.jsonl": b" \n\n \n",
    "empty.json": b"",
    "nothing.json": b"[]",
    "object.json": b"{}",
    "number.json": b"3",
    "cut.json": b'[{"prompt": "rev(12)=", "answer": "21"}',
    "absent.json": b'[{"prompt": "rev(12)="}]',
    "empty.csv": b"",
    "header.csv": b"prompt,answer\n",
    "absent.csv": b"prompt,other\nrev(12)=,21\n",
    "noanswer.csv": b"prompt,answer\nrev(12)=,\n",
    "null.csv": b"\x00\x00\x00\x00",
    "quote.csv": b'prompt,answer\n"rev(12)=,21\n',
    "duplicate.csv": b"prompt,prompt,other\nrev(12)=,rev(12)=,21\n",
    "ragged.csv": b"prompt,answer\nrev(12)=,21\na,b,c,d,e\n",
    "empty.parquet": b"",
    "cut.parquet": b"PAR1",
    "text.parquet": b'{"prompt": "rev(12)=", "answer": "21"}\n',
    "null.parquet": bytes(1000),
    "data.txt": b"rev(12)=\n",
    "data.pkl": b"\x80\x04K\x03.",
}
BAD_NUMBERS = {
    "rollout": {
        **{"--samples": "0 -1 1.5 x", "--temperature": "0 -1 inf nan x", "--max-tokens": "0 -3 1e9 64"},
        **{"--seed": "-1 x", "--limit": "0 -1", "--batch-tokens": "0 -5", "--shard": "0 -1 x 2.5"},
        **{
            "--max-errors": "2 -1",
            "--reward-seconds": "0 nan",
            "--max-prompt-tokens": "0 x",
            "--gpu-memory": "0 1.1 nan",
        },
        **{"--engine": "fast", "--dtype": "int8"},
    },
    "project": {
        **{"--k": "0 -1 x", "--sparse-ratio": "0 2 nan", "--cap": "0 -1 inf", "--halves": "-1", "--dtype": "int8"},
        **{"--ratio": "best", "--batch-tokens": "0"},
    },
    "select": {
        **{"--frac": "0 -1 1.01 nan inf", "--selector": "best", "--seed": "-1", "--stage": "0 -1 x", "--limit": "0"}
    },
    "train": {
        **{"--lr": "0 -1 inf nan x", "--steps": "0 -1", "--samples": "1 0", "--clip": "0 nan"},
        **{"--kl": "-1", "--entropy": "-1", "--save-every": "-1 x", "--iterations": "0", "--batch-prompts": "0"},
        **{"--max-grad-norm": "0 nan"},
    },
    "cropi": {
        **{"--stages": "0 -1 x", "--frac": "0 2 nan", "--selector": "best", "--refresh-every": "-1"},
        **{"--keep-states": "0 -1 x", "--limit": "0", "--seed": "-1"},
        **{"--set": "train.lr train.lr=x nothing.lr=1 train.nothing=1 = rollout.out=x", "--save-every": "-1"},
    },
}


def test_malformed_inputs_are_one_line_each(refused, world, tmp_path):
    w, count = world, 0
    inputs = {
        "rollout": ("--data", w / "train.jsonl"),
        "project": ("--trajectories", w / "t"),
        "select": ("--data", w / "train.jsonl", "--trajectories", w / "t", "--selector", "pass-rate"),
        "train": ("--data", w / "train.jsonl", "--selection", w / "s.safetensors"),
        "cropi": ("run",),
    }
    for script, options in BAD_NUMBERS.items():
        for option, values in options.items():
            for value in values.split():
                refused(script, *inputs[script], "--out", tmp_path / "new" / "x", f"{option}={value}", says="")
                count += 1
    for name, data in MALFORMED.items():
        (tmp_path / name).write_bytes(data)
        says = "1 of 1 prompts dropped" if name.startswith(("unknown", "big")) else name
        refused("rollout", "--out", tmp_path / "new" / "x", "--data", tmp_path / name, says=says)
        count += 1
    for name in ("nested.jsonl", "empty.csv", "cut.parquet", "nothing.json"):
        path = tmp_path / name
        refused("train", "--selection", w / "s.safetensors", "--data", path, "--out", tmp_path / "new", says=name)
        refused("select", "--data", path, "--selector", "random", "--out", tmp_path / "new" / "s", says=name)
        for option in ("--train", "--valid", "--test"):
            refused("cropi", "run", option, path, "--out", tmp_path / "new", says=name)
        count += 5
    for wrong in (
        tmp_path,
        w / "train.jsonl",
        TOY / "model" / "model.safetensors",
        w / "gv",
        w / "gv/00000.safetensors",
        "/proc/self/mem",
        "\u202e",
    ):
        new, given = tmp_path / "new", ("--data", w / "train.jsonl")
        refused("project", "--trajectories", wrong, "--out", new, says="")
        refused("train", "--selection", wrong, *given, "--out", new, says="")
        refused("train", "--selection", w / "s.safetensors", *given, "--optimizer", wrong, "--out", w / "out", says="")
        refused("rollout", "--model", wrong, "--out", new, says="")
        refused("select", *given, "--selector", "pass-rate", "--trajectories", wrong, "--out", new / "s", says="")
        refused("select", *given, "--selector", "random", "--previous", wrong, "--out", new / "s", says="")
        count += 6
    assert not (tmp_path / "new").exists()
    print(f"{count} malformed inputs refused")
    assert count >= 157
