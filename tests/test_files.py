"""What is whole is kept, what is not is named: kills, corruption, locks, Ctrl-C, full disks, hostile files, NaN."""

import functools
import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
import traceback
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch
from conftest import ROOT, load_all, run_script
from hypothesis import given, settings
from hypothesis import strategies as st

import cropi
import project
import rollout
import train
from rollout import TOY, BadInput, Trajectories

sys.path.insert(0, str(ROOT / "bench"))

import kill

SETTINGS = ["train.steps=2", "train.batch_prompts=8", "valid.samples=4", "test.samples=2", "project.k=1024"]
SETTINGS += ["project.halves=10"]


def options(world, out, **others):
    return {
        "pool": str(world / "train.jsonl"),
        "valid": [str(world / "valid-rev.jsonl")],
        "test": [str(world / "test-rev.jsonl")],
        "stages": 2,
        "keep_states": 2,
        "assignments": SETTINGS,
        "out": out,
    } | others


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Rounding depends on their number, and forked processes have one."""
    number = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(number)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A world and a whole run of it; to be left as it is."""
    world = tmp_path_factory.mktemp("world")
    for name, count in {"train": 60, "valid-rev": 12, "test-rev": 10}.items():
        lines = (TOY / f"{name}.jsonl").read_text().splitlines(keepends=True)[:count]
        (world / f"{name}.jsonl").write_text("".join(lines))
    cropi.run(**options(world, world / "run"))
    return world


def training(world: Path, out: Path, **others) -> dict:
    """Options of train.py, for the first stage of that run."""
    return {
        "selection": world / "run/stage-01/selection.safetensors",
        "data": str(world / "train.jsonl"),
        "steps": 5,
        "batch_prompts": 8,
        "out": out,
    } | others


@pytest.fixture(scope="module")
def checkpoint(whole):
    """What training leaves when it is interrupted after its second checkpoint."""
    with pytest.MonkeyPatch.context() as patch:
        interrupt_after(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            train.train(**training(whole, whole / "interrupted", save_every=0.0))
    return whole / "interrupted/checkpoint/00002/00000.safetensors"


def interrupt_after(patch: pytest.MonkeyPatch, files: int) -> None:
    """As if Ctrl-C had been pressed just after so many files were written."""
    save, saved = rollout.save, []

    def interrupted(*args, **kwargs):
        save(*args, **kwargs)
        saved.append(args)
        if len(saved) == files:
            raise KeyboardInterrupt

    patch.setattr(rollout, "save", interrupted)


def contents(folder: Path) -> dict[Path, bytes]:
    """Of all files but the lock's."""
    return {path: path.read_bytes() for path in folder.rglob("[!.]*") if path.is_file()}


def left_over(folder: Path) -> list[Path]:
    """What no command leaves behind."""
    return [path for path in folder.rglob(".*") if path.name not in (".lock", ".writer")]


# ---------------------------------------------------------------------------------------------------------------------
# Kills


def test_killed_runs_end_as_undisturbed_ones():
    """A few here; `python bench/kill.py` tries a hundred, and prints what was hit."""
    met, _ = kill.survive(kills=3, seed=1)
    assert met.total() == 3


def test_each_script_goes_on_after_its_last_file(whole, tmp_path, monkeypatch):
    """Interrupted after its second file, and refuses to go on with other options."""
    data = str(whole / "train.jsonl")
    work = [
        (rollout.rollout, {"data": data, "out": tmp_path / "t"}, "samples", 4, "00001.safetensors"),
        (
            project.project,
            {"trajectories": whole / "run/rollouts/train", "k": 64, "halves": 10, "out": tmp_path / "g"},
            "k",
            128,
            "00001.safetensors",
        ),
        (
            train.train,
            training(whole, tmp_path / "o", save_every=0.0),
            "lr",
            2e-3,
            "checkpoint/00002/00000.safetensors",
        ),
    ]
    for script, given_, option, value, last in work:
        out, undisturbed = given_["out"], tmp_path / "undisturbed" / given_["out"].name
        script(**given_ | {"out": undisturbed})
        with monkeypatch.context() as patch:
            interrupt_after(patch, 2)
            with pytest.raises(KeyboardInterrupt):
                script(**given_)
        before = contents(out)
        assert out / last in before and len(before) <= 2 and not left_over(out)
        with pytest.raises(BadInput, match=rf"was made with options.{option} .*, now {value}; choose another --out"):
            script(**given_ | {option: value})
        assert contents(out) == before
        damaged = bytearray(before[out / last])
        damaged[-1] ^= 1
        (out / last).write_bytes(damaged)
        if script is train.train:  # it is read; shards are not, until the next script reads them
            with pytest.raises(BadInput, match=f"{out / last} has been changed or damaged"):
                script(**given_)
        (out / last).write_bytes(before[out / last])
        script(**given_)
        assert kill.result(out) == kill.result(undisturbed)
        if script is not train.train:
            assert {path: path.read_bytes() for path in before} == before  # not made again
        else:
            assert not (out / last).exists()


def test_what_a_kill_leaves_is_cleared_away(whole, tmp_path):
    """The folders of temporary files, of every target, before and after the target got its name."""
    shutil.copytree(whole / "run", tmp_path / "run")
    paths = [path for path in (tmp_path / "run").rglob("[!.]*") if path.suffix or path.name == "model"]
    paths = [path for path in paths if path.parent.name not in ("model", "optimizer")]
    paths += [tmp_path / "run" / name for name in ("stage-01/checkpoint", "stage-02/checkpoint", "stage-02/optimizer")]
    for path in paths:
        part = path.with_name(f".{path.name}.part")
        part.mkdir()
        (part / ".tmpAbCdEf").write_bytes(b"half a file")
    gone = ["rollouts/train/00002.safetensors", "stage-02/selection.safetensors", "stage-02/model"]
    for name in gone:
        path = tmp_path / "run" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    cropi.run(**options(whole, tmp_path / "run"))
    assert not left_over(tmp_path / "run")
    assert kill.result(tmp_path / "run") == kill.result(whole / "run")


# ---------------------------------------------------------------------------------------------------------------------
# Corruption

ANEW = {
    "curve.png",
    "selection.png",
    "report.json",
    "selection.csv",
    "metrics.jsonl",
    "completions.jsonl",
}  # each run writes them anew


def readers(run: Path, path: Path, out: Path):
    """The command that reads the contents of a file of a run next, with its options."""
    stage, data = run / path.relative_to(run).parts[0], str(run.parent / "train.jsonl")
    before = TOY / "model" if stage.name == "stage-01" else run / "stage-01/model"
    kinds = path.relative_to(run).parts
    if path.name == "run.safetensors":
        return lambda: cropi.run(**options(run.parent, run))
    if path.parent.name.startswith("test-"):  # for people: no command reads more than the facts
        return lambda: rollout.load(path, "trajectories")
    if kinds[0] == "rollouts":
        return lambda: project.project(trajectories=path.parent, k=16, out=out)
    if path.parent.name.startswith("gradients-"):
        valid = [stage / "gradients-valid-rev"]
        given_ = {"trajectories": run / "rollouts/train", "gradients": stage / "gradients-train", "data": data}
        return lambda: cropi.select.select(**given_, valid_gradients=valid, out=out / "s.safetensors")
    if path.name == "selection.safetensors":
        return lambda: train.train(selection=path, data=data, model=before, steps=1, out=out)
    if path.parent.name == "optimizer":
        given_ = {"selection": stage / "selection.safetensors", "data": data, "optimizer": path.parent, "steps": 1}
        return lambda: train.train(**given_, model=stage / "model", out=out)
    assert path.parent.name == "model"
    return lambda: rollout.rollout(model=path.parent, data=data, limit=1, samples=1, out=out)


def wrong_versions(path: Path, rng: np.random.Generator) -> list[bytes]:
    """A bit flipped in header and body, and truncations, the first of which is empty."""
    data = path.read_bytes()
    header = min(len(data), 8 + struct.unpack("<Q", data[:8])[0] if path.suffix == ".safetensors" else 64)
    versions = [data[: len(data) * part // 10] for part in range(10)] + [data[:-1]]
    for place in (*rng.integers(0, header, 3), *rng.integers(0, len(data), 3)):
        flipped = bytearray(data)
        flipped[place] ^= 1 << int(rng.integers(8))
        versions.append(bytes(flipped))
    return versions


def refused(work, **given_) -> str:
    with pytest.raises(BadInput) as error:
        work(**given_)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_corruption_is_named_and_nothing_else_changes(whole, tmp_path):
    """Every artefact of a run but those that each run writes anew, read by the command that reads it next."""
    shutil.copytree(whole, tmp_path / "world")
    run, out, cases, rng = tmp_path / "world/run", tmp_path / "out", 0, np.random.default_rng(0)
    artefacts = sorted(path for path in contents(run) if path.name not in ANEW)
    assert len(artefacts) == 1 + 4 + 1 + 1 + 2 * (4 + 1 + 1 + 6 + 1 + 1)
    for path in artefacts:
        data, read = path.read_bytes(), readers(run, path, out)
        for wrong in wrong_versions(path, rng):
            path.write_bytes(wrong)
            before = contents(run)
            assert str(path) in refused(read), path
            assert contents(run) == before
            shutil.rmtree(out, ignore_errors=True)
            cases += 1
        path.write_bytes(data)
    print(f"{cases} corrupted files refused")
    assert cases == 17 * len(artefacts) > 500
    cropi.run(**options(run.parent, run))  # all is as it was
    assert kill.result(run) == kill.result(whole / "run")


def test_a_run_refuses_another_file_in_the_place_of_its_own(whole, tmp_path):
    """A whole file of the same kind: the next shard, or that of the other stage."""
    run, swapped = tmp_path / "run", 0
    shutil.copytree(whole / "run", run)
    artefacts = [path for path in sorted(run.rglob("*.safetensors")) if path.parent.name != "model"]
    for path in artefacts:
        data = path.read_bytes()
        others = [other for other in artefacts if other.name == path.name or other.parent == path.parent]
        others = [other for other in others if other.read_bytes() != data]
        # an optimizer's state is compared with nothing before it is read, which only the next stage does
        stages = 3 if path.parent.name == "optimizer" else 2
        if not others or path == run / "stage-01/optimizer/00000.safetensors":
            continue
        path.write_bytes(others[0].read_bytes())
        before = contents(run)
        assert str(path) in refused(cropi.run, **options(whole, run, stages=stages))
        for other, content in contents(run).items():
            new = other.is_relative_to(run / "stage-03") or other.name in ANEW
            assert new or content == before[other], other
        shutil.rmtree(run / "stage-03", ignore_errors=True)
        path.write_bytes(data)
        swapped += 1
    assert swapped > 15
    for name in ("model.safetensors", "cropi.json"):  # of the other stage's model
        path = run / "stage-02/model" / name
        data = path.read_bytes()
        shutil.copy(run / "stage-01/model" / name, path)
        assert str(path.parent) in refused(cropi.run, **options(whole, run, stages=3))
        shutil.rmtree(run / "stage-03", ignore_errors=True)
        path.write_bytes(data)


def test_a_shard_in_the_place_of_another_is_refused_by_every_reader(whole, tmp_path):
    """Copied by hand, from another place of the same folder, or from the same place of a folder of another seed."""
    run, data = whole / "run", str(whole / "train.jsonl")
    rollout.rollout(data=data, seed=7, out=tmp_path / "other/t")
    given_ = {"trajectories": tmp_path / "other/t", "k": 1024, "halves": 10, "seed": 7}
    project.project(**given_, out=tmp_path / "other/g")
    shutil.copytree(run / "rollouts/train", tmp_path / "t")
    shutil.copytree(run / "stage-01/gradients-train", tmp_path / "g")
    chosen = {"data": data, "trajectories": tmp_path / "t", "out": tmp_path / "s/s.safetensors"}
    valid = {"gradients": tmp_path / "g", "valid_gradients": [run / "stage-01/gradients-valid-rev"]}
    for folder, work in {
        "t": [
            (project.project, {"trajectories": tmp_path / "t", "k": 64, "out": tmp_path / "new"}),
            (cropi.select.select, chosen | {"selector": "pass-rate"}),
        ],
        "g": [(cropi.select.select, chosen | valid)],
    }.items():
        path = tmp_path / folder / "00002.safetensors"
        data_ = path.read_bytes()
        for other in (tmp_path / folder / "00001.safetensors", tmp_path / "other" / folder / path.name):
            shutil.copy(other, path)
            for script, options_ in work:
                assert str(path.parent) in refused(script, **options_)
        path.write_bytes(data_)
        for script, options_ in work:
            script(**options_)
            shutil.rmtree(options_["out"] if script is project.project else options_["out"].parent)


def test_a_flip_that_a_rerun_passes_over_is_found_by_the_next_reader(whole, tmp_path):
    """A rerun reads no tensors of the shards that it skips; what it makes from them, it makes of whole ones."""
    run = tmp_path / "run"
    shutil.copytree(whole / "run", run)
    for name, gone in {
        "rollouts/train/00003.safetensors": "stage-02/gradients-train/00003.safetensors",
        "rollouts/valid-rev/00000.safetensors": "stage-02/gradients-valid-rev/00000.safetensors",
        "stage-02/gradients-train/00002.safetensors": "stage-02/selection.safetensors",
        "stage-01/model/model.safetensors": "stage-02/gradients-valid-rev/00000.safetensors",
        "stage-01/optimizer/00000.safetensors": "stage-02/model",
        "stage-02/model/tokenizer.json": "stage-02/test-rev/00000.safetensors",
    }.items():
        path, data = run / name, (run / name).read_bytes()
        path.write_bytes(data[:-2] + bytes([data[-2] ^ 4]) + data[-1:])
        cropi.run(**options(whole, run))  # nothing to do, nothing read
        shutil.move(run / gone, tmp_path / "gone")
        before = contents(run)
        assert str(path) in refused(cropi.run, **options(whole, run))
        assert contents(run) == before and not left_over(run)
        path.write_bytes(data)
        cropi.run(**options(whole, run))
        shutil.rmtree(tmp_path / "gone") if (tmp_path / "gone").is_dir() else (tmp_path / "gone").unlink()
    assert kill.result(run) == kill.result(whole / "run")


FILES = {
    "trajectories": "run/rollouts/train/00001.safetensors",
    "gradients": "run/stage-01/gradients-train/00000.safetensors",
    "selection": "run/stage-01/selection.safetensors",
    "optimizer": "run/stage-01/optimizer/00000.safetensors",
    "checkpoint": "interrupted/checkpoint/00002/00000.safetensors",
    "run": "run/run.safetensors",
    "model": "run/stage-01/model/cropi.json",
}


@pytest.mark.parametrize("kind", FILES)
def test_each_reader_refuses_every_flip(whole, checkpoint, tmp_path, kind):
    source = whole / FILES[kind]
    data, path, rng = source.read_bytes(), tmp_path / source.name, np.random.default_rng(0)
    read = (lambda: rollout.peek(tmp_path)) if kind == "model" else (lambda: rollout.load(path, kind))
    places = {0, 7, 8, 9, len(data) - 1, *rng.integers(0, min(len(data), 4000), 40), *rng.integers(0, len(data), 20)}
    for place in places:
        for mask in (255, 1):
            flipped = bytearray(data)
            flipped[place] ^= mask
            path.write_bytes(flipped)
            assert str(path) in refused(read)
    path.write_bytes(data)
    assert read()
    if kind != "model":
        assert f"holds {kind}, where something else is needed" in refused(lambda: rollout.load(path, "something else"))


def test_a_digit_that_changes_no_number_is_noticed(tmp_path):
    """0.30000000000000004 and 0.30000000000000005 are the same double."""
    path = tmp_path / "x.safetensors"
    rollout.save(path, {"x": np.zeros(1)}, {"format": rollout.FORMAT, "kind": "x"}, {"seconds": 0.1 + 0.2})
    rollout.load(path, "x")
    data = path.read_bytes()
    assert data.count(b"0.30000000000000004") == 1
    path.write_bytes(data.replace(b"0.30000000000000004", b"0.30000000000000005"))
    assert str(path) in refused(lambda: rollout.load(path, "x"))


def test_a_changed_model_is_refused(whole, tmp_path):
    shutil.copytree(whole / "run/stage-01/model", tmp_path / "m")
    rollout.load_model(tmp_path / "m")
    files = sorted(path.name for path in (tmp_path / "m").iterdir())
    assert {"config.json", "cropi.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= set(files)
    for name in files:
        data = (tmp_path / "m" / name).read_bytes()
        (tmp_path / "m" / name).write_bytes(data[:-3] + bytes([data[-3] ^ 1]) + data[-2:])
        assert str(tmp_path / "m" / name) in refused(lambda: rollout.load_model(tmp_path / "m"))
        (tmp_path / "m" / name).unlink()
        if name != "cropi.json":  # without its record it is somebody's model
            assert str(tmp_path / "m") in refused(lambda: rollout.load_model(tmp_path / "m"))
        (tmp_path / "m" / name).write_bytes(data)
    rollout.load_model(tmp_path / "m")


# ---------------------------------------------------------------------------------------------------------------------
# Locks, Ctrl-C

CHILD = """
import sys, time
sys.path.insert(0, {root!r})
import cropi
with cropi.locked(cropi.Path({folder!r})):
    print("locked", flush=True)
    time.sleep(60)
"""


def test_one_run_has_one_writer(whole, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole / "run", out)
    command = [sys.executable, "-c", CHILD.format(root=str(ROOT), folder=str(out))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "locked\n"
        before = contents(out)
        said = refused(cropi.run, **options(whole, out))
        assert f"{out}: process {other.pid} on {os.uname().nodename} is at work here" in said
        assert contents(out) == before
        other.kill()
    cropi.run(**options(whole, out))  # a dead process holds no lock


def test_ctrl_c_ends_with_the_command_that_goes_on(whole, tmp_path):
    """During training, which saves its state after every step."""
    settings = [*SETTINGS, "train.steps=40", "train.save_every=0"]
    cropi.run(**options(whole, tmp_path / "undisturbed", assignments=settings, stages=1))
    words = ["cropi.py", "run", "--out", str(tmp_path / "run"), "--train", str(whole / "train.jsonl"), "--stages", "1"]
    words += ["--valid", str(whole / "valid-rev.jsonl"), "--test", str(whole / "test-rev.jsonl")]
    words += [word for setting in settings for word in ("--set", setting)]
    where = {"cwd": ROOT, "env": os.environ | {"OMP_NUM_THREADS": "1"}}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    heard = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs ignore it
    process = subprocess.Popen([sys.executable, *words], **where, **pipes, preexec_fn=heard)
    saved = "stage-01/checkpoint/*/00000.safetensors"
    while process.poll() is None and not list((tmp_path / "run").glob(saved)):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 130
    assert error == f"interrupted; the same command resumes: python {' '.join(words)}\n"
    assert not left_over(tmp_path / "run") and not (tmp_path / "run/stage-01/model").exists()
    checkpoint = max((tmp_path / "run").glob(saved))
    log = rollout.load(checkpoint, "checkpoint")[1]["facts"]["log"]
    assert 0 < len(log) < 40
    again = run_script(*error.split(": ", 1)[1].split()[1:])
    assert again.returncode == 0, again.stderr
    assert f"resuming after step {len(log)} of 40" in again.stdout
    assert kill.result(tmp_path / "run") == kill.result(tmp_path / "undisturbed")


# ---------------------------------------------------------------------------------------------------------------------
# Full disks


def _limited(work, size: int, pipe) -> None:
    """In a process of its own: files may not grow beyond `size` bytes, as on a full disk."""
    torch.set_num_threads(1)
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    try:
        work()
        pipe.send("done")
    except BadInput as error:
        pipe.send(f"refused: {error}")
    except BaseException:
        pipe.send(traceback.format_exc())


def limited(work, size: int) -> str:
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=_limited, args=(work, size, theirs))
    process.start()
    assert ours.poll(120)
    said = ours.recv()
    process.join()
    return said


@pytest.mark.parametrize(
    ("first", "largest"),
    [  # each is larger than all that is made before it
        ("run.safetensors", "run.safetensors"),
        ("rollouts/train/00000.safetensors", "rollouts/train/00000.safetensors"),
        ("stage-01/gradients-train/00000.safetensors", "stage-01/gradients-train/00000.safetensors"),
        ("stage-01/model", "stage-01/model/model.safetensors"),
        ("stage-01/optimizer/00000.safetensors", "stage-01/optimizer/00000.safetensors"),
    ],
)
def test_a_full_disk_is_one_line_and_loses_nothing(whole, tmp_path, first, largest):
    out, expected = tmp_path / "run", kill.result(whole / "run")
    # A file's facts (seconds and so on) differ by some digits from try to try: so 40 bytes less, and any of the shards.
    size = (whole / "run" / largest).stat().st_size - 40
    said = limited(lambda: cropi.run(**options(whole, out)), size)
    named = re.escape(str(out / first)).replace("00000", r"\d{5}")
    assert re.match(rf"refused: {named}: cannot write it \(.*", said) and "\n" not in said, said
    assert "make room, or choose another --out" in said and len(said) < 500
    found = kill.result(out)
    assert found == {name: expected[name] for name in found} and not left_over(out)
    assert (first == "run.safetensors") == (not found)
    assert limited(lambda: cropi.run(**options(whole, out)), 1 << 30) == "done"  # there is room again
    assert kill.result(out) == expected and not left_over(out)


def test_full_disk_for_each_script_alone(whole, tmp_path):
    run, data = whole / "run", str(whole / "train.jsonl")
    chosen = {"trajectories": run / "rollouts/train", "selector": "pass-rate", "out": tmp_path / "s/s.safetensors"}
    for work in (
        lambda: rollout.rollout(out=tmp_path / "t", data=data),
        lambda: project.project(out=tmp_path / "g", trajectories=run / "rollouts/train", k=64),
        lambda: cropi.select.select(**chosen, data=data),
        lambda: train.train(**training(whole, tmp_path / "o", steps=1)),
        lambda: train.train(**training(whole, tmp_path / "p", steps=3, save_every=0.0)),
    ):
        said = limited(work, 500)
        assert said.startswith("refused: ") and "cannot write it (" in said and "\n" not in said, said
        assert not contents(tmp_path) and not left_over(tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# The format


@st.composite
def tables(draw) -> Trajectories:
    prompts, samples = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    prompt_length = draw(st.lists(st.integers(1, 6), min_size=prompts, max_size=prompts))
    length = draw(st.lists(st.integers(1, 7), min_size=prompts * samples, max_size=prompts * samples))
    return Trajectories(
        prompt_index=rng.permutation(100)[:prompts].astype(np.int32),
        prompt_length=np.array(prompt_length, np.int32),
        prompt_tokens=rng.integers(0, 2**31 - 1, sum(prompt_length)).astype(np.int32),
        length=np.array(length, np.int32).reshape(prompts, samples),
        tokens=rng.integers(0, 2**31 - 1, sum(length)).astype(np.int32),
        behavior_logps=rng.standard_normal(sum(length)).astype(np.float32),
        rewards=rng.random((prompts, samples)).astype(np.float32),
        truncated=rng.integers(0, 2, (prompts, samples)).astype(np.uint8),
    )


@settings(max_examples=100, deadline=None)
@given(tables(), st.text(max_size=20))
def test_trajectories_are_read_as_they_were_written(tmp_path_factory, trajectories, text):
    path = tmp_path_factory.mktemp("t") / "t.safetensors"
    recipe = rollout.make_recipe("trajectories", {}, {"reward": "exact", "system": text}, data="0")
    rollout.save(path, trajectories.tensors(), recipe, {"text": text, "number": 0.1})
    back, record = rollout.load_trajectories(path)
    theirs = safetensors.numpy.load_file(path)  # the library's own reader
    assert set(theirs) == set(rollout.TENSORS)
    for name, values in trajectories.tensors().items():
        for read in (getattr(back, name), theirs[name]):
            assert read.dtype == values.dtype
            np.testing.assert_array_equal(read, values)
    assert record["recipe"] == recipe and record["facts"] == {"text": text, "number": 0.1}
    assert record == rollout.peek(path) | {"identity": record["identity"]}
    # every trajectory by lists, one after the other
    tokens, logps, prompts = (list(x) for x in (back.tokens, back.behavior_logps, back.prompt_tokens))
    for n, row in enumerate(back.length.tolist()):
        assert list(back.prompt(n)) == [prompts.pop(0) for _ in range(back.prompt_length[n])]
        for k, length in enumerate(row):
            span = back.span(n, k)
            assert list(back.tokens[span]) == [tokens.pop(0) for _ in range(length)]
            assert list(back.behavior_logps[span]) == [logps.pop(0) for _ in range(length)]
    assert not tokens and not logps and not prompts
    # some prompts, and all: the same trajectories of each
    some = back.take(np.arange(len(back.length))[::2])
    for place, n in enumerate(range(0, len(back.length), 2)):
        np.testing.assert_array_equal(some.prompt(place), back.prompt(n))
        for k in range(back.samples):
            np.testing.assert_array_equal(some.tokens[some.span(place, k)], back.tokens[back.span(n, k)])
    for name, values in back.take(np.arange(len(back.length))).tensors().items():
        np.testing.assert_array_equal(values, getattr(back, name))


def test_a_file_made_again_is_the_same_file(whole, tmp_path):
    """The identity is of recipe and tensors: not of the facts, nor of the order in which tensors or options come."""
    tensors, record = rollout.load(whole / FILES["gradients"], "gradients")
    recipe = dict(reversed(record["recipe"].items()))
    rollout.save(tmp_path / "a.safetensors", dict(reversed(tensors.items())), recipe, {"seconds": 99.0})
    again = rollout.load(tmp_path / "a.safetensors", "gradients")[1]
    assert again["identity"] == record["identity"] and again["facts"] != record["facts"]
    for other in (
        (tensors | {"grad_norm": np.nextafter(tensors["grad_norm"], np.float32(9))}, recipe),
        (tensors | {"grad_norm": tensors["grad_norm"][None]}, recipe),
        (tensors | {"grad_norm": tensors["grad_norm"].view(np.int32)}, recipe),
        ({name: values for name, values in tensors.items() if name != "grad_norm"}, recipe),
        (tensors, recipe | {"kind": "other"}),
    ):
        rollout.save(tmp_path / "b.safetensors", *other, {})
        assert rollout.peek(tmp_path / "b.safetensors")["identity"] != record["identity"]


def test_what_is_no_record_is_refused(whole, tmp_path):
    shutil.copytree(whole / "run/stage-01/model", tmp_path / "m")
    path = tmp_path / "m/cropi.json"
    record = json.loads(path.read_text())
    old = record | {"recipe": record["recipe"] | {"format": "cropi/3"}}
    for text in ("", "[]", "3", "null", '{"a": 1}', "{", "\x00", '{"recipe": 3}', '{"recipe": {"format": "cropi/4"}}'):
        path.write_text(text)
        assert str(path) in refused(lambda: rollout.peek(tmp_path / "m"))
    path.write_text(json.dumps(old))
    assert f"{path} has the format cropi/3, not {rollout.FORMAT}" in refused(lambda: rollout.peek(tmp_path / "m"))
    path.write_bytes(b"\xff\xfe\x00")
    assert str(path) in refused(lambda: rollout.peek(tmp_path / "m"))
    foreign = tmp_path / "foreign.safetensors"
    for metadata in (None, {"cropi": "3"}, {"format": "pt"}, {"cropi": "{}"}):
        safetensors.numpy.save_file({"x": np.zeros(3)}, foreign, metadata)
        assert str(foreign) in refused(lambda: rollout.load(foreign, "gradients"))


# ---------------------------------------------------------------------------------------------------------------------
# Numbers, hostile files


def test_nan_stops_with_step_and_prompts_and_keeps_the_last_good_weights(whole, tmp_path, monkeypatch):
    grpo_step, steps = train.grpo_step, []

    def poisoned(policy, *args, **kwargs):
        steps.append(1)
        measured = grpo_step(policy, *args, **kwargs)
        if len(steps) == 3:
            next(policy.parameters()).grad.fill_(float("nan"))
        return measured

    with monkeypatch.context() as patch:
        patch.setattr(train, "grpo_step", poisoned)
        with pytest.raises(BadInput, match=r"step 2: gradient is not finite at prompts \[\d+, "):
            train.train(**training(whole, tmp_path / "o", save_every=0.0))
    tensors, record = rollout.load(tmp_path / "o/checkpoint/00002/00000.safetensors", "checkpoint")
    assert len(record["facts"]["log"]) == 2 and all(np.isfinite(values).all() for values in tensors.values())
    train.train(**training(whole, tmp_path / "o"))
    train.train(**training(whole, tmp_path / "p"))
    assert kill.result(tmp_path / "o") == kill.result(tmp_path / "p")


def test_collapse_is_said_once(capsys):
    log = []
    for step in range(30):
        live, entropy = (0, 0.0) if 3 <= step < 20 else (4, 1e-5 if step >= 25 else 0.5)
        log.append({"step": step, "live_prompts": live, "entropy": entropy})
        train.warn_of_collapse(log)
    said = capsys.readouterr()
    lines = (said.out + said.err).splitlines()
    assert [line for line in lines if "no live prompt for 10 steps" in line] == [lines[0]] and "step 12" in lines[0]
    assert len(lines) == 2 and "step 25: entropy below" in lines[1]


class Evil:
    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return (os.system, (f"touch {self.mark}",))


def test_hostile_models_and_files_are_refused_or_harmless(tmp_path):
    mark = tmp_path / "cropi-was-here"

    def model(name: str) -> Path:
        shutil.copytree(TOY / "model", tmp_path / name)
        return tmp_path / name

    pickled = model("pickled")
    torch.save(Evil(mark), pickled / "model.safetensors")
    with pytest.raises(BadInput, match="pickled: cannot load this model"):
        rollout.load_model(pickled)
    binary = model("bin")
    (binary / "model.safetensors").unlink()
    torch.save(Evil(mark), binary / "pytorch_model.bin")
    with pytest.raises(BadInput, match="bin: cannot load this model"):
        rollout.load_model(binary)
    remote = model("remote")
    config = json.loads((remote / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoModelForCausalLM": "evil.Model", "AutoConfig": "evil.Config"}}
    (remote / "config.json").write_text(json.dumps(config))
    (remote / "evil.py").write_text(f"open({str(mark)!r}, 'w')\nclass Model: pass\nclass Config: pass\n")
    with pytest.raises(BadInput, match="remote: cannot load this model"):
        rollout.load_model(remote)
    huge = tmp_path / "huge.safetensors"
    header = json.dumps({"x": {"dtype": "F32", "shape": [1 << 38], "data_offsets": [0, 1 << 40]}}).encode()
    for length in (len(header), 1 << 40):
        huge.write_bytes(struct.pack("<Q", length) + header)
        with pytest.raises(BadInput, match=re.escape(f"{huge} is damaged, or not one of our files")):
            rollout.load(huge, "trajectories")
        shutil.copy(huge, pickled / "model.safetensors")
        with pytest.raises(BadInput, match="pickled: cannot load this model"):
            rollout.load_model(pickled)
    torch.save(Evil(mark), tmp_path / "0.safetensors")
    with pytest.raises(BadInput, match=r"0\.safetensors is damaged, or not one of our files"):
        rollout.load(tmp_path / "0.safetensors", "checkpoint")
    rows = [{"prompt": "../../etc/passwd rev(12)= $(id)", "answer": f"$(touch {mark})"}]
    (tmp_path / "d.jsonl").write_text(json.dumps(rows[0]) + "\n")
    rollout.rollout(out=tmp_path / "t", data=str(tmp_path / "d.jsonl"), samples=2)
    assert load_all(tmp_path / "t").rewards.shape == (1, 2)
    for answer in (f"__import__('os').system('touch {mark}')", f"exec(open('{mark}', 'w'))", f"1+open('{mark}','w')"):
        assert not rollout.same_answer("5", answer) and not rollout.same_answer("5", rf"\text{{{answer}}}")
    assert not mark.exists()
