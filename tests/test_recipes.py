"""Files say what they were made from: processes change nothing, changed code is refused, and so is every option that
bears on a file."""

import ast
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tokenize
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from conftest import ROOT, load_folder, run_script

import cropi
import project
import rollout
import train
from rollout import TOY, BadInput

sys.path.insert(0, str(ROOT / "bench"))

import kill

SCRIPTS = ("rollout", "train", "project", "select", "cropi")
SIZES = {"train": 60, "valid-rev": 12, "valid-srt": 12, "test-rev": 10, "test-untargeted": 10}


def make_world(folder: Path) -> None:
    for name, count in SIZES.items():
        lines = (TOY / f"{name}.jsonl").read_text().splitlines(keepends=True)[:count]
        (folder / f"{name}.jsonl").write_text("".join(lines))


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Rounding depends on their number."""
    number = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(number)


@pytest.fixture
def home(tmp_path):
    """A copy of the scripts and of the toy, to be edited, with a small world."""
    for name in SCRIPTS:
        shutil.copy(ROOT / f"{name}.py", tmp_path)
    shutil.copytree(TOY, tmp_path / "toy")
    make_world(tmp_path)
    return tmp_path


def command(home: Path, *words: str, processes: int | None = None) -> list[str]:
    """The command line of a run of two small stages; with torchrun, for a number of processes."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes else []
    settings = ["project.k=64", "valid.samples=4", "test.samples=2", "train.steps=3", "train.batch_prompts=8"]
    sets = ["--train", "train.jsonl", "--valid", "valid-rev.jsonl", "--test", "test-rev.jsonl", "--frac", "0.3"]
    sets += [word for setting in settings for word in ("--set", setting)]
    return [sys.executable, *launch, "cropi.py", "run", *sets, "--out", "run", *words]


def run(home: Path, words: list[str]) -> subprocess.CompletedProcess:
    if words[1] != "-m":
        return run_script(*words[1:], home=home)
    threads = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(words, cwd=home, env=threads, capture_output=True, text=True)


def contents(folder: Path) -> dict[Path, bytes]:
    """Of all files but the lock's."""
    return {path: path.read_bytes() for path in folder.rglob("[!.]*") if path.is_file()}


# ---------------------------------------------------------------------------------------------------------------------
# Processes


@pytest.mark.dist
def test_the_number_of_processes_changes_nothing(home):
    """12 shards of training prompts, 3 of validation and 2 of test prompts. Training changes by rounding
    (test_dist.py), so what comes after it does."""
    results, words = {}, ["--stages", "2", "--keep-states", "2", "--set", "rollout.shard=5"]
    for processes in (1, 2, 3):
        done = run(home, command(home, *words, "--out", f"run-{processes}", processes=processes))
        assert done.returncode == 0, done.stderr
        results[processes] = kill.result(home / f"run-{processes}")
        paths = rollout.shards(home / f"run-{processes}/stage-02/gradients-train", "gradients")
        assert len(paths) == 12 and {rollout.peek(path)["facts"]["processes"] for path in paths} == {processes}
        assert done.stdout.count("stage 2 of 2: ") == 1  # said by one of them
    before = [name for name in results[1] if re.match(r"rollouts/|stage-01/(gradients|selection)", name)]
    assert len(before) > 60
    for processes in (2, 3):
        assert [name for name in before if results[processes][name] != results[1][name]] == []
    # and another number may go on with what one has begun
    made = [*before, *(name for name in results[3] if name.startswith("stage-01/"))]
    for name in ("stage-02/gradients-train/00004.safetensors", "stage-01/test-rev/00001.safetensors"):
        (home / "run-3" / name).unlink()
        made += [name, f"{name}, identity"]
    for folder in ("stage-02/model", "stage-02/test-rev"):
        shutil.rmtree(home / "run-3" / folder)
    done = run(home, command(home, *words, "--out", "run-3"))
    assert done.returncode == 0, done.stderr
    again = kill.result(home / "run-3")
    assert [name for name in made if again[name] != results[3][name]] == []
    assert (home / "run-3/stage-02/model/cropi.json").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Code


def edit(script: Path, old: str, new: str) -> None:
    text = script.read_text()
    assert text.count(old) == 1, f"{script.name}: {old!r} stands there {text.count(old)} times"
    script.write_text(text.replace(old, new))


FORMULA = ("train.py", "torch.minimum(ratio * advantages,", "torch.maximum(ratio * advantages,")


def refuses(home: Path, words: list[str], *said: str) -> None:
    """Exit code 2, one line that says all that, and not a byte of the run is another one."""
    before = contents(home / "run")
    done = run(home, words)
    assert done.returncode == 2, (done.stdout, done.stderr)
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("error: run/"), done.stderr
    for text in said:
        assert re.search(text, done.stderr), (text, done.stderr)
    assert contents(home / "run") == before


def test_a_formula_or_a_default_that_is_changed_between_stages_is_refused(home):
    done = run(home, command(home, "--stages", "1"))
    assert done.returncode == 0, done.stderr
    first, made = kill.result(home / "run"), contents(home / "run")

    script, old, new = FORMULA
    edit(home / script, old, new)
    refuses(home, command(home, "--stages", "2"), r"run/run.safetensors was made with code\.train \w+, now \w+; ")
    printed = next(line[2:] for line in done.stdout.splitlines() if line.startswith("$ python train.py"))
    refuses(home, [sys.executable, *printed.split()[1:]], r"run/stage-01/model was made with code\.train \w+, now \w+;")
    shutil.copy(ROOT / script, home)

    edit(home / "project.py", 'ratio: Ratio = "token"', 'ratio: Ratio = "sequence"')  # a default
    said = (r"run/run\.safetensors was made with ", r"options\.project\.ratio token, now sequence", r"code\.project")
    refuses(home, command(home, "--stages", "2"), *said)
    printed = next(line[2:] for line in done.stdout.splitlines() if line.startswith("$ python project.py"))
    said = (
        r"gradients-train/00000\.safetensors was made with ",
        r"options\.ratio token, now sequence",
        r"code\.project",
    )
    refuses(home, [sys.executable, *printed.split()[1:]], *said)
    shutil.copy(ROOT / "project.py", home)

    for script in SCRIPTS:  # comments and docstrings; the first line is a docstring's everywhere
        text = (home / f"{script}.py").read_text()
        assert text.startswith('"""')
        (home / f"{script}.py").write_text(text.replace('"""', '"""Changed. ', 1) + "\n# a comment\n")
    again = run(home, command(home, "--stages", "1"))
    assert again.returncode == 0, again.stderr
    assert "$ " not in again.stdout and kill.result(home / "run") == first
    anew = {"curve.png", "selection.png"}  # drawn anew
    assert {
        path for path, data in contents(home / "run").items() if made[path] != data and path.name not in anew
    } == set()


def test_a_formula_that_is_changed_inside_a_stage_is_refused(home):
    words = command(home, "--stages", "1", "--set", "train.steps=300", "--set", "train.save_every=0")
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    saved = "run/stage-01/checkpoint/*/00000.safetensors"
    with subprocess.Popen(words, cwd=home, env=os.environ | {"OMP_NUM_THREADS": "1"}, **quiet) as process:
        while process.poll() is None and not list(home.glob(saved)):
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert list(home.glob(saved)) and not (home / "run/stage-01/model").exists()
    script, old, new = FORMULA
    edit(home / script, old, new)
    refuses(home, words, r"run/run.safetensors was made with code\.train \w+, now \w+; ")
    options = ["--data", "train.jsonl", "--selection", "run/stage-01/selection.safetensors", "--out", "run/stage-01"]
    options += ["--steps", "300", "--batch-prompts", "8"]
    said = r"run/stage-01/checkpoint/\d{5}/00000.safetensors was made with code\.train \w+, now \w+; "
    refuses(home, [sys.executable, "train.py", *options], said)


def without_comments(text: str) -> str:
    """By the tokenizer, where the scripts go by the syntax tree."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return tokenize.untokenize(token for token in tokens if token.type != tokenize.COMMENT)


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_digest_covers_the_code_and_nothing_else(tmp_path, script):
    text, path = (ROOT / f"{script}.py").read_text(), tmp_path / "script.py"

    def digest_of(text: str) -> str:
        path.write_text(text)
        return rollout.code_digest(path)

    digest = digest_of(text)
    bare = without_comments(text)
    assert bare != text and digest_of(bare) == digest
    lines = text.splitlines(keepends=True)
    documented = [
        node
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module) and ast.get_docstring(node)
    ]
    assert len(documented) > 10
    for node in documented[:: len(documented) // 8]:
        docstring = node.body[0]
        changed = [*lines[: docstring.lineno - 1], " " * docstring.col_offset, '"""Another."""\n']
        assert digest_of("".join([*changed, *lines[docstring.end_lineno :]])) == digest, node
        if len(node.body) > 1:  # without it
            assert digest_of("".join([*lines[: docstring.lineno - 1], *lines[docstring.end_lineno :]])) == digest, node
    numbers = [
        node
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Constant) and type(node.value) in (int, float) and node.lineno == node.end_lineno
    ]
    assert len(numbers) > 30
    for node in numbers[:: len(numbers) // 12]:
        line = lines[node.lineno - 1].encode()  # columns are counted in bytes
        changed = line[: node.col_offset] + b"17.25" + line[node.end_col_offset :]
        assert digest_of("".join([*lines[: node.lineno - 1], changed.decode(), *lines[node.lineno :]])) != digest, node


def test_recipes_hold_the_code_of_all_scripts_that_a_script_imports():
    modules = {"rollout": rollout, "train": train, "project": project, "select": cropi.select, "cropi": cropi}

    def imported(script: str) -> set[str]:
        tree = ast.parse((ROOT / f"{script}.py").read_text())
        nodes = list(ast.walk(tree))
        names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
        # cropi.py loads select.py by its path; no other script has anything to do with it
        names = (names & set(SCRIPTS) - {"select"}) | ({"select"} if script == "cropi" else set())
        return {script}.union(*(imported(name) for name in names))

    assert {name: set(module.CODE) for name, module in modules.items()} == {name: imported(name) for name in modules}


# ---------------------------------------------------------------------------------------------------------------------
# Options
#
# Those in a recipe, with another value for each; those that a result does not depend on, with another value; and those
# that say where, and how much, is made.

SAMPLING = {
    "temperature": 0.9,
    "max_tokens": 7,
    "max_prompt_tokens": 50,
    "system": "Be right.",
    "chat": False,
    "reward": "math",
    "reward_seconds": 9.0,
    "engine": "vllm",
    "dtype": "bfloat16",
    "seed": 1,
}
READING = {"limit": 50, "prompt_column": "family", "answer_column": "family", "skip_bad_rows": True}
RECIPE = {
    "rollout": {
        "model": "trained",
        "data": "valid-srt.jsonl",
        "samples": 3,
        **READING,
        **SAMPLING,
        "retry": "others/t",
    },
    "project": {
        **{"trajectories": "others/t", "model": "trained", "ratio": "none", "cap": 2.0, "k": 32, "sparse_ratio": 0.5},
        **{"halves": 7, "dtype": "bfloat16", "seed": 1, "loss": "dr_grpo", "mask_truncated": True},
    },
    "select": {
        **{"data": "valid-srt.jsonl", "trajectories": "others/t", "gradients": "others/g", "selector": "pass-rate"},
        **{"valid_gradients": ["others/gradients-valid-rev"], "frac": 0.2, "stage": 2, "seed": 1},
        **{"previous": "others/s.safetensors", "sign": "mean", **READING},
    },
    "train": {
        **{"selection": "others/s.safetensors", "model": "trained", "initial_model": "trained", "lr": 1e-4},
        **{"optimizer": "others/o/optimizer", "data": "valid-srt.jsonl", "steps": 3, "batch_prompts": 9},
        **{"samples": 4, **READING, "iterations": 2, "max_grad_norm": 0.5, "clip": 0.1, "kl": 0.01, "entropy": 0.01},
        **{"gradient_checkpointing": True, **SAMPLING, "loss": "dapo", "clip_high": 0.28, "mask_truncated": True},
        "dynamic_sampling": True,
    },
    "run": {
        **{"model": "trained", "pool": "valid-srt.jsonl", "valid": ["valid-srt.jsonl"], "limit": 50, "frac": 0.2},
        **{"selector": "pass-rate", "static": True, "refresh_every": 1, "seed": 1, "engine": "vllm"},
        **{"assignments": ["train.lr=1e-4"], "retry_failed": 2, "retry_every": 2},
    },
}
FREE = {
    "rollout": {"batch_tokens": 700, "gpu_memory": 0.4, "max_errors": 0.5, "shard": 7, "deterministic": True},
    "project": {"batch_tokens": 300, "deterministic": True},
    "select": {},
    "train": {"deterministic": True, "batch_tokens": 500, "gpu_memory": 0.4, "max_errors": 0.5, "save_every": 0.0}
    | {"shard_weights": "none"},
    "run": {"save_every": 0.0},
}
EXTENT = {
    **{name: {"out"} for name in ("rollout", "project", "select", "train")},
    "run": {"out", "stages", "test", "group_by", "keep_states", "processes", "max_restarts"},
}
FUNCTIONS = {
    "rollout": rollout.rollout,
    "project": project.project,
    "select": cropi.select.select,
    "train": train.train,
    "run": cropi.run,
}
# Refused before recipes are compared: the inputs do not belong together.
OTHERWISE = {
    ("project", "trajectories"): r"00000.safetensors was made with shard\.trajectories ",
    ("select", "data"): "was made from other data than",
    **{("select", name): "was made from other data than" for name in ("limit", "prompt_column", "answer_column")},
    ("select", "trajectories"): "was made from other trajectories than those given",
    ("train", "data"): "was made from other data than",
    **{("train", name): "was made from other data than" for name in ("limit", "prompt_column", "answer_column")},
    ("run", "pool"): r"run.safetensors was made with inputs\.train ",
    ("run", "assignments"): r"run.safetensors was made with options\.train.lr 5e-05, now 0.0001; ",
    ("run", "engine"): r"run.safetensors was made with options\.rollout.engine hf, now vllm",
    ("run", "limit"): r"run.safetensors was made with .*options\.rollout.limit None, now 50",
}


def options_of(name: str) -> set[str]:
    apps = {"rollout": rollout, "project": project, "select": cropi.select, "train": train, "run": cropi}
    command = typer.main.get_command(apps[name].app)
    return {parameter.name for parameter in (command.commands["run"] if name == "run" else command).params}


@pytest.fixture(autouse=True)
def as_it_was():
    """--deterministic holds for the whole process."""
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A world in which each script has run once, and `others` of the same kind; with the options of each script."""
    world = tmp_path_factory.mktemp("world")
    make_world(world)
    data, run = str(world / "train.jsonl"), rollout.rollout
    given = {
        "rollout": {"data": data, "out": world / "t"},
        "project": {"trajectories": world / "t", "out": world / "g", "k": 64},
        "select": {
            **{"data": data, "trajectories": world / "t", "gradients": world / "g", "frac": 0.3},
            **{"sign": "any", "valid_gradients": [world / "gradients-valid-rev"], "out": world / "s.safetensors"},
        },
        "train": {
            **{"data": data, "selection": world / "s.safetensors", "steps": 4, "batch_prompts": 8, "lr": 1e-3},
            **{"out": world / "o"},
        },
        "run": {
            **{"pool": data, "valid": [str(world / "valid-rev.jsonl")], "test": [str(world / "test-rev.jsonl")]},
            **{"stages": 2, "out": world / "run", "frac": 0.3},
            "assignments": ["train.steps=2", "train.batch_prompts=8", "valid.samples=6", "project.k=64"],
        },
    }
    run(**given["rollout"])
    run(data=str(world / "valid-rev.jsonl"), out=world / "v")
    run(**given["rollout"] | {"seed": 5, "out": world / "others/t"})
    project.project(**given["project"])
    for out in ("gradients-valid-rev", "others/gradients-valid-rev"):
        halves = 0 if out.startswith("others") else 512
        project.project(trajectories=world / "v", out=world / out, k=64, halves=halves)
    project.project(**given["project"] | {"halves": 5, "out": world / "others/g"})
    cropi.select.select(**given["select"])
    cropi.select.select(**given["select"] | {"frac": 0.2, "out": world / "others/s.safetensors"})
    train.train(**given["train"])
    train.train(**given["train"] | {"steps": 2, "out": world / "others/o"})
    shutil.copytree(world / "others/o/model", world / "trained")
    cropi.run(**given["run"])
    return world, given


def placed(world: Path, value: object) -> object:
    """A value of the tables above; names of files and folders become paths in the world."""
    if isinstance(value, list):
        return [placed(world, one) for one in value]
    return world / value if isinstance(value, str) and (world / value).exists() else value


def test_every_option_is_in_one_of_three_lists(made):
    for name in FUNCTIONS:
        lists = [set(RECIPE[name]), set(FREE[name]), set(EXTENT[name])]
        assert sum(map(len, lists)) == len(set.union(*lists)), name
        assert set.union(*lists) == options_of(name), name
    assert set.union(*(set(table) for table in FREE.values())) == rollout.FREE - {"out"}
    settable = set()  # with --set; the others the loop sets itself
    for use, script in cropi.USES.items():
        settable |= {(use, name) for name in options_of(script.__name__.removeprefix("cropi_")) - cropi.OURS}
    assert {name for _, name in settable} > {"lr", "ratio", "samples", "shard", "max_errors"}


CASES = [(name, option) for name, table in RECIPE.items() for option in table]


@pytest.mark.parametrize(("name", "option"), CASES, ids=[".".join(case) for case in CASES])
def test_another_value_of_an_option_is_refused(made, monkeypatch, name, option):
    world, given = made
    if option == "engine":  # vLLM need not be here for its name to stand in a recipe
        find = rollout.importlib.util.find_spec
        monkeypatch.setattr(rollout.importlib.util, "find_spec", lambda module: module == "vllm" or find(module))
    value = placed(world, RECIPE[name][option])
    value = str(value) if option in ("data", "pool") else value
    if option == "assignments":
        value = given[name][option] + value
    before = contents(world)
    with pytest.raises(BadInput) as refused:
        FUNCTIONS[name](**given[name] | {option: value})
    message = str(refused.value)
    expected = OTHERWISE.get(
        (name, option), rf"was made with .*(options|inputs)\.{option}\b.*; choose another --out, or"
    )
    assert re.search(expected, message) and "\n" not in message, message
    assert str(world) in message
    assert contents(world) == before


def test_another_value_by_set_is_refused(made, monkeypatch):
    """For every option that the loop hands on to a script, as --set gives it."""
    world, given = made
    find = rollout.importlib.util.find_spec
    monkeypatch.setattr(rollout.importlib.util, "find_spec", lambda module: module == "vllm" or find(module))
    before, cases = contents(world), 0
    for use, script in cropi.USES.items():
        name = script.__name__.removeprefix("cropi_")
        for option in sorted(options_of(name) - cropi.OURS - set(FREE[name])):
            value = RECIPE[name][option]
            text = f"{use}.{option}={str(value).lower() if isinstance(value, bool) else value}"
            message = "accepted"
            try:
                cropi.run(**given["run"] | {"assignments": [*given["run"]["assignments"], text]})
            except BadInput as error:
                message = str(error)
            # test sets are a matter of extent: those that are there are refused one by one
            expected = rf"run/rollouts/test-rev/00000.safetensors was made with .*\.{option} "
            expected = rf"run/run.safetensors was made with .*options\.{use}\.{option} " if use != "test" else expected
            assert re.search(expected, message) and "\n" not in message, (text, message)
            cases += 1
    assert cases > 50
    kept = {path: data for path, data in contents(world).items() if path in before}
    assert kept == before and len(contents(world)) == len(before)


def test_a_changed_file_of_a_reward_or_a_selector_is_refused(made, tmp_path):
    _, given = made
    file = tmp_path / "mine.py"
    file.write_text("def reward(completions, **columns):\n    return [float('1' in completions[0])]\n")
    file.write_text(file.read_text() + "def selector(pass_rate):\n    return pass_rate\n")
    rolled = given["rollout"] | {"reward": f"{file}:reward", "max_errors": 0.5, "samples": 2, "out": tmp_path / "t"}
    chosen = given["select"] | {"selector": f"{file}:selector", "out": tmp_path / "s.safetensors"}
    work = {"reward": (rollout.rollout, rolled), "selector": (cropi.select.select, chosen)}
    for function, options in work.values():
        function(**options)
    shutil.copy(file, tmp_path / "copy.py")
    (tmp_path / "elsewhere").mkdir()
    shutil.copy(file, tmp_path / "elsewhere")
    for name, (function, options) in work.items():  # it is the file that counts, not where it lies
        function(**options | {name: f"{tmp_path}/elsewhere/mine.py:{name}"})
    file.write_text(file.read_text().replace("'1'", "'2'") + "# and so on\n")
    for name, (function, options) in work.items():
        with pytest.raises(
            BadInput, match=rf"was made with options\.{name} mine\.py:{name} \(\w+\), now mine.py:{name}"
        ):
            function(**options)


DIFFERENCES = ("token_kl", "mean_change", "largest_change")


def close(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> None:
    """Equal, or up to rounding where a value is a floating point number: to 1e-5 of the largest in its row, or, where
    values are differences of log-probs, of one."""
    assert ours.keys() == theirs.keys()
    for name, values in ours.items():
        assert values.shape == theirs[name].shape and values.dtype == theirs[name].dtype, name
        if values.dtype.kind == "f":
            scale = 1.0 if name in DIFFERENCES else np.abs(values).max(-1, keepdims=True)
            assert np.all(np.abs(values - theirs[name]) <= 1e-5 * scale), name
        else:
            np.testing.assert_array_equal(values, theirs[name], err_msg=name)


@pytest.mark.parametrize("option", FREE["rollout"])
def test_free_options_of_rollout(made, tmp_path, option):
    world, given = made
    rollout.rollout(**given["rollout"] | {option: FREE["rollout"][option], "out": tmp_path / "t"})
    ours, theirs = (load_folder(folder, "trajectories") for folder in (world / "t", tmp_path / "t"))
    if option in ("batch_tokens", "shard"):
        close(ours, theirs)
        np.testing.assert_array_equal(ours["rewards"], theirs["rewards"])
    else:
        assert kill.result(world / "t") == kill.result(tmp_path / "t")


def test_free_options_of_project(made, tmp_path):
    world, given = made
    project.project(**given["project"] | FREE["project"] | {"out": tmp_path / "g"})
    close(*(load_folder(folder, "gradients") for folder in (world / "g", tmp_path / "g")))


def test_another_shard_size_chooses_the_same(made, tmp_path):
    """Gradients and selection of the same prompts in shards of 7: which prompts are halved is a matter of the seed."""
    world, given = made
    rollout.rollout(**given["rollout"] | {"shard": 7, "out": tmp_path / "t"})
    project.project(**given["project"] | {"trajectories": tmp_path / "t", "halves": 20, "out": tmp_path / "g"})
    project.project(**given["project"] | {"halves": 20, "out": tmp_path / "as-before"})
    ours, theirs = (load_folder(tmp_path / name, "gradients") for name in ("as-before", "g"))
    assert len(ours["half_index"]) > 5 and len(list((tmp_path / "g").iterdir())) == 9
    close(ours, theirs)
    inputs = {"trajectories": tmp_path / "t", "gradients": tmp_path / "g"}
    cropi.select.select(**given["select"] | inputs | {"out": tmp_path / "s.safetensors"})
    chosen = [rollout.load(folder / "s.safetensors", "selection")[0]["ranked"] for folder in (world, tmp_path)]
    np.testing.assert_array_equal(*chosen)
    with pytest.raises(BadInput, match=r"t/00000.safetensors was made with .*shard\.of 4, now 9"):
        rollout.rollout(**given["rollout"] | {"shard": 7})


@pytest.mark.parametrize("option", FREE["train"])
def test_free_options_of_train(made, tmp_path, option):
    world, given = made
    train.train(**given["train"] | {option: FREE["train"][option], "out": tmp_path / "o"})
    if option != "batch_tokens":
        assert kill.result(world / "o") == kill.result(tmp_path / "o")
        return
    models = [rollout.load_file(folder / "o/model/model.safetensors") for folder in (world, tmp_path)]
    start = rollout.load_file(TOY / "model/model.safetensors")
    changes = {}
    for name, values in models[0].items():  # up to rounding, compared with how far training went
        changes[name] = np.linalg.norm(values - models[1][name]) / np.linalg.norm(values - start[name])
        # Attention hardly depends on a bias of the keys: its gradient is near rounding, and AdamW scales it up.
        assert changes[name] <= (1e-2 if name.endswith("k_proj.bias") else 1e-3), name
    assert np.median(list(changes.values())) <= 5e-5


def test_free_options_of_a_run_and_its_extent(made, tmp_path):
    """More is made, or seen otherwise, and what is there stays."""
    world, given = made
    shutil.copytree(world / "run", tmp_path / "run")
    shutil.rmtree(tmp_path / "run/stage-02/model")  # so that there is something to train
    with pytest.raises(
        BadInput, match=r"stage-01/optimizer: no such folder; .*--keep-states.* remove the models of all"
    ):
        cropi.run(**given["run"] | {"out": tmp_path / "run"})
    shutil.rmtree(tmp_path / "run/stage-01/model")
    free = [f"{use}.{option}={value}" for use in ("rollout", "project", "train") for option, value in FREE[use].items()]
    free = [text for text in free if not re.search("shard|train.save_every", text)]
    assignments = given["run"]["assignments"] + free
    assignments += ["train.lr=5e-05", "valid.engine=hf"]  # what holds anyway, said aloud
    options = given["run"] | {"out": tmp_path / "run", "save_every": 0.0, "assignments": assignments, "engine": "hf"}
    rounded = {"assignments": [text for text in assignments if "batch_tokens" not in text]}
    cropi.run(**options | rounded)
    expected = kill.result(world / "run")
    assert kill.result(tmp_path / "run") == expected
    before = contents(tmp_path / "run")
    tests = [str(world / f"test-{name}.jsonl") for name in ("rev", "untargeted")]
    cropi.run(**options | {"stages": 3, "test": tests, "group_by": "column", "keep_states": 2})
    anew = {"curve.png", "selection.png", "report.json"}
    changed = {path.name for path, data in before.items() if path.read_bytes() != data}
    assert changed == anew
    after = {str(path.relative_to(tmp_path / "run")) for path in contents(tmp_path / "run")}
    assert {"stage-03/model/cropi.json", "stage-01/test-untargeted/00000.safetensors"} <= after
    assert "stage-02/optimizer/00000.safetensors" in after  # two are kept
    cropi.run(**given["run"] | {"out": tmp_path / "run", "stages": 1})  # fewer stages: nothing is lost
    assert {path.name for path, data in before.items() if path.read_bytes() != data} == anew
