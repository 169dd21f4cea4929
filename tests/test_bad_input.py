"""Bad input: one line that names the thing, exit code 2, and nothing overwritten."""

import json
import shutil
import sys

import pytest
import torch
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

    def run(script: str, *words: object, says: str) -> None:
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            command_line(MODULES[script].app)
        error = capsys.readouterr().err
        assert stop.value.code == 2
        assert error.startswith("error: ") and error.count("\n") == 1, error
        assert says in error, error
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before

    return run


@pytest.fixture
def world(small_world):
    """Trajectories, gradients and a selection of the small world, and files that an error must leave as they are."""
    w = small_world
    rollout.rollout(out=w / "t.safetensors", data=w / "train.jsonl")
    rollout.rollout(out=w / "v.safetensors", data=w / "valid-rev.jsonl", samples=8)
    project.project(trajectories=w / "t.safetensors", out=w / "g.safetensors", k=64)
    project.project(trajectories=w / "v.safetensors", out=w / "gv.safetensors", k=64)
    cropi.select.select(
        data=w / "train.jsonl",
        trajectories=w / "t.safetensors",
        gradients=w / "g.safetensors",
        valid_gradients=[w / "gv.safetensors"],
        out=w / "s.safetensors",
    )
    (w / "out").write_text("what was here before")
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
            ('{"prompt": "rev(12)=", "answer": "21"}\n{"prompt": \n', "JSON parse error"),
            ('{"prompt": "???", "answer": "21"}\n', "1 of 1 prompts dropped: empty"),
        ]
    ):
        file = tmp_path / f"bad-{number}.jsonl"
        file.write_text(text)
        refused("rollout", *out, "--data", file, says=says)
    (tmp_path / "latin.jsonl").write_bytes('{"prompt": "é", "answer": "e"}'.encode("latin-1"))
    refused("rollout", *out, "--data", tmp_path / "latin.jsonl", says="latin.jsonl: cannot load")


def test_what_is_written_must_not_replace_something_else(refused, world, tmp_path):
    w = world
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "precious").write_text("x")
    given = ("--data", w / "train.jsonl")
    refused("rollout", *given, "--out", tmp_path / "folder", says="is a folder")
    refused("rollout", *given, "--out", w / "train.jsonl", says="is an input too")
    refused("rollout", *given, "--out", w / "train.jsonl" / "x", says="is not a folder")
    refused("rollout", *given, "--out", "/proc/x/y", says="cannot write in /proc")
    refused("project", "--trajectories", w / "t.safetensors", "--out", w / "t.safetensors", says="is an input too")
    shutil.copytree(TOY / "model", tmp_path / "m")
    refused("rollout", *given, "--out", tmp_path / "m", says="is a folder")
    refused(
        "project", "--trajectories", w / "t.safetensors", "--model", tmp_path / "m", "--out", tmp_path / "m", says="m "
    )
    refused("select", "--data", w / "x.csv", "--method", "full", "--out", w / "x.safetensors", says="is an input too")
    refused("select", *given, "--method", "full", "--out", w / "x.csv", says="x.csv")
    selection = ("--selection", w / "s.safetensors", *given)
    shutil.copytree(TOY / "model", tmp_path / "mine" / "model")
    refused("train", *selection, "--model", tmp_path / "mine/model", "--out", tmp_path / "mine", says="is an input too")
    sets = ("--train", w / "train.jsonl", "--valid", w / "valid-rev.jsonl", "--test", w / "test-rev.jsonl")
    refused("cropi", "run", *sets, "--out", tmp_path / "folder", says="holds something else than a run")


def test_models(refused, world, tmp_path):
    out = ("--data", world / "train.jsonl", "--out", world / "out")
    (tmp_path / "empty").mkdir()
    refused("rollout", *out, "--model", tmp_path / "empty", says="no config.json")
    lacking = broken_model(tmp_path / "lacking", lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"))
    refused("rollout", *out, "--model", lacking, says="model.layers.1.mlp.up_proj.weight")
    cut = broken_model(tmp_path / "cut", lambda weights: None)
    whole = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    refused("rollout", *out, "--model", cut, says="cannot load this model")
    refused("rollout", *out, "--max-tokens", 64, says="exceed the model's 64")


def test_project(refused, world, tmp_path):
    w, out = world, ("--out", world / "out")
    given = ("--trajectories", w / "t.safetensors")
    refused("project", *out, *given, "--k", 0, says="--k")
    refused("project", *out, *given, "--sparse-ratio", 0, says="sparse")
    refused("project", *out, *given, "--sparse-ratio", 1.1, says="sparse")
    refused("project", *out, "--trajectories", w / "no.safetensors", says="no.safetensors")
    refused("project", *out, "--trajectories", w / "g.safetensors", says="g.safetensors holds gradients")
    cut = tmp_path / "cut.safetensors"
    for size in (0, 5, 100, (w / "t.safetensors").stat().st_size - 1):
        cut.write_bytes((w / "t.safetensors").read_bytes()[:size])
        refused("project", *out, "--trajectories", cut, says="cut.safetensors is not a whole safetensors file")
    other = broken_model(tmp_path / "other", lambda weights: weights["lm_head.weight"].mul_(1.01))
    refused("project", *out, *given, "--model", other, says="another model")


def test_no_live_prompt(refused, world, tmp_path):
    w = world
    (tmp_path / "hopeless.jsonl").write_text('{"prompt": "rev(123)=", "answer": "impossible"}\n' * 3)
    rollout.rollout(out=tmp_path / "dead.safetensors", data=tmp_path / "hopeless.jsonl")
    refused("project", "--trajectories", tmp_path / "dead.safetensors", "--out", w / "out", says="no live prompt")
    with pytest.raises(rollout.BadInput, match=r"valid-hopeless.safetensors: no live prompt"):  # names the set
        cropi.run(
            pool=w / "train.jsonl",
            valid=[tmp_path / "hopeless.jsonl"],
            test=[w / "test-rev.jsonl"],
            out=tmp_path / "run",
        )
    assert not (tmp_path / "run" / "stage-00" / "selection.safetensors").exists()


def test_numbers_that_are_not_finite_name_the_prompt(refused, world, tmp_path):
    w = world
    rows = [json.loads(line) for line in (w / "train.jsonl").read_text().splitlines()]
    live = rollout.open_trajectories(w / "t.safetensors").live_groups()
    letter = next(c for i in live for c in rows[i]["prompt"][4:] if c.isdigit())
    hit = [i for i in live if letter in rows[i]["prompt"]]
    assert 0 < len(hit) < len(live)
    token = rollout.load_model(TOY / "model")[1](letter).input_ids[0]

    def poison(weights):
        weights["model.embed_tokens.weight"][token] = torch.nan

    model = broken_model(tmp_path / "nan", poison)
    config = json.loads((model / "config.json").read_text())  # a descendant of the toy model, as far as one can tell
    (model / "config.json").write_text(json.dumps(config | {"cropi_ancestors": [rollout.digest(TOY / "model")]}))
    named = [f"prompt {i}" for i in range(60) if letter in rows[i]["prompt"]]
    with pytest.raises(rollout.BadInput, match="not finite at prompt") as error:
        rollout.rollout(out=tmp_path / "x", model=model, data=w / "train.jsonl")
    assert any(str(error.value).endswith(name) for name in named)
    refused(
        "project",
        "--trajectories",
        w / "t.safetensors",
        "--model",
        model,
        "--out",
        w / "out",
        says="not finite at prompt",
    )
    stage = ("--selection", w / "s.safetensors", "--data", w / "train.jsonl", "--out", w / "new")
    refused("train", *stage, "--model", model, says="not finite at prompt")
    # finite logits, yet a gradient that overflows
    trajectories = rollout.open_trajectories(w / "t.safetensors")
    tensors = {name: getattr(trajectories, name) for name in rollout.TENSORS}
    first = live[min(live)][0]
    logps = tensors["behavior_logps"].copy()
    logps[trajectories.logp_offsets[first]] = -200.0  # so the ratio is infinite
    rollout.save_tensors(
        tmp_path / "inf.safetensors", "trajectories", tensors | {"behavior_logps": logps}, trajectories.metadata
    )
    refused(
        "project",
        "--trajectories",
        tmp_path / "inf.safetensors",
        "--out",
        w / "out",
        says=f"not finite at prompt {min(live)} ",
    )


def test_select(refused, world, tmp_path):
    w, out = world, ("--out", world / "s.safetensors")  # must stay what it was
    pool = ("--data", w / "train.jsonl", "--trajectories", w / "t.safetensors")
    gradients = ("--gradients", w / "g.safetensors", "--valid-gradients", w / "gv.safetensors")
    refused("select", *out, *pool, *gradients, "--frac", 0, says="frac")
    refused("select", *out, *pool, *gradients, "--frac", 1.5, says="frac")
    refused("select", *out, *pool, *gradients, "--method", "best", says="best")
    refused("select", *out, *pool, says="--valid-gradients")
    refused("select", *out, "--data", w / "train.jsonl", "--method", "pass-rate", says="--trajectories")
    refused("select", *out, "--data", w / "valid-rev.jsonl", *pool[2:], *gradients, says="other data")
    refused("select", *out, "--data", w / "valid-rev.jsonl", "--trajectories", w / "v.safetensors", *gradients,
            says="other trajectories")  # fmt: skip
    project.project(trajectories=w / "v.safetensors", out=tmp_path / "k.safetensors", k=32)
    refused("select", *out, *pool, *gradients[:2], "--valid-gradients", tmp_path / "k.safetensors", says="projection")
    project.project(trajectories=w / "v.safetensors", out=tmp_path / "seed.safetensors", k=64, seed=1)
    refused(
        "select", *out, *pool, *gradients[:2], "--valid-gradients", tmp_path / "seed.safetensors", says="projection"
    )
    train.train(selection=w / "s.safetensors", data=w / "train.jsonl", out=tmp_path / "stage", steps=1)
    moved = tmp_path / "moved.safetensors"
    project.project(trajectories=w / "v.safetensors", model=tmp_path / "stage/model", out=moved, k=64)
    refused("select", *out, *pool, *gradients[:2], "--valid-gradients", moved, says="another model")


def test_train(refused, world, tmp_path):
    w, out = world, ("--out", world / "stage")
    given = ("--selection", w / "s.safetensors", "--data", w / "train.jsonl")
    refused("train", *out, "--selection", w / "no.safetensors", "--data", w / "train.jsonl", says="no.safetensors")
    refused("train", *out, "--selection", w / "s.safetensors", "--data", w / "valid-rev.jsonl", says="other data")
    refused("train", *out, *given, "--samples", 1, says="--samples")
    refused("train", *out, *given, "--lr", 0, says="lr")
    train.train(selection=w / "s.safetensors", data=w / "train.jsonl", out=tmp_path / "one", steps=1)
    other = broken_model(tmp_path / "other", lambda weights: weights["lm_head.weight"].mul_(1.01))
    refused("train", *out, *given, "--model", other, says="made with another model")
    optimizer = tmp_path / "one/optimizer.safetensors"
    refused("train", *out, *given, "--optimizer", optimizer, says="optimizer state of another model")


def test_run(refused, world, tmp_path):
    w = world
    given = ("run", "--out", tmp_path / "run")
    for words, says in [
        (("--frac", 0), "frac"),
        (("--stages", 0), "stages"),
        (("--selector", "best"), "best"),
        (("--train", w / "no.jsonl"), "no.jsonl"),
        (("--valid", w / "no.jsonl"), "no.jsonl"),
        (("--test", w / "no.jsonl"), "no.jsonl"),
        (("--train", w / "train.jsonl"), "validation and test sets of its own"),
        (("--model", w / "no-model"), "no-model"),
        (("--set", "train.speed=9"), "train has no such option"),
        (("--set", "train.model=x"), "train has no such option"),
        (("--set", "fly.lr=1"), "STAGE.OPTION=VALUE"),
        (("--set", "train.lr"), "STAGE.OPTION=VALUE"),
        (("--set", "train.lr=fast"), "train.lr=fast"),
        (("--set", "project.k=0"), "project.k=0"),
        (("--set", "project.sparse_ratio=2"), "project.sparse_ratio=2"),
        (("--valid", w / "valid-rev.jsonl", "--valid", w / "valid-rev.jsonl"), "same name"),
    ]:
        refused("cropi", *given, *words, says=says)
    assert not (tmp_path / "run").exists()
    refused("cropi", "walk", says="walk")


# Every one of these, in every format that can say it: (name of the file, its bytes)
BIG = "a" * 10_000_000
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
        **{"--seed": "-1 x", "--limit": "0 -1", "--batch-tokens": "0 -5", "--save-every": "-1 x"},
        **{"--max-errors": "2 -1", "--reward-seconds": "0 nan"},
    },
    "project": {"--k": "0 -1 x", "--sparse-ratio": "0 2 nan", "--cap": "0 -1 inf", "--halves": "-1", "--dtype": "int8"},
    "select": {"--frac": "0 -1 1.01 nan inf", "--method": "best", "--seed": "-1"},
    "train": {
        **{"--lr": "0 -1 inf nan x", "--steps": "0 -1", "--samples": "1 0", "--clip": "0 nan"},
        **{"--kl": "-1", "--entropy": "-1"},
    },
    "cropi": {
        **{"--stages": "0 -1 x", "--frac": "0 2 nan", "--selector": "best", "--refresh-every": "-1", "--force": "-1 x"},
        **{"--set": "train.lr train.lr=x nothing.lr=1 train.nothing=1 =", "--save-every": "-1"},
    },
}


def test_malformed_inputs_are_one_line_each(refused, world, tmp_path):
    w, count = world, 0
    inputs = {
        "rollout": ("--data", w / "train.jsonl"),
        "project": ("--trajectories", w / "t.safetensors"),
        "select": ("--data", w / "train.jsonl", "--trajectories", w / "t.safetensors", "--method", "pass-rate"),
        "train": ("--data", w / "train.jsonl", "--selection", w / "s.safetensors"),
        "cropi": ("run",),
    }
    for script, options in BAD_NUMBERS.items():
        for option, values in options.items():
            for value in values.split():
                out = tmp_path / "new" / "x"
                refused(script, *inputs[script], "--out", out, f"{option}={value}", says="")
                assert not (tmp_path / "new").exists(), (option, value)
                count += 1
    for name, data in MALFORMED.items():
        (tmp_path / name).write_bytes(data)
        says = "1 of 1 prompts dropped" if name.startswith(("unknown", "big")) else name
        refused("rollout", "--out", tmp_path / "new" / "x", "--data", tmp_path / name, says=says)
        assert not (tmp_path / "new").exists()
        count += 1
    for name in ("nested.jsonl", "empty.csv", "cut.parquet", "nothing.json"):
        path = tmp_path / name
        refused("train", "--selection", w / "s.safetensors", "--data", path, "--out", tmp_path / "new", says=name)
        refused("select", "--data", path, "--method", "random", "--out", tmp_path / "new" / "s", says=name)
        for option in ("--train", "--valid", "--test"):
            refused("cropi", "run", option, path, "--out", tmp_path / "new", says=name)
        count += 5
    for wrong in (
        tmp_path,
        w / "train.jsonl",
        TOY / "model" / "model.safetensors",
        w / "gv.safetensors",
        "/proc/self/mem",
        "\u202e",
    ):
        refused("project", "--trajectories", wrong, "--out", tmp_path / "new" / "x", says="")
        refused("train", "--selection", wrong, "--data", w / "train.jsonl", "--out", tmp_path / "new", says="")
        refused("rollout", "--model", wrong, "--out", tmp_path / "new" / "x", says="")
        count += 3
    assert not (tmp_path / "new").exists()
    print(f"{count} malformed inputs refused")
    assert count >= 120
