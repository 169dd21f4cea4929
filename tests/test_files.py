"""What is whole is kept, what is not is named: corruption, full disks, locks, signals, hostile files."""

import json
import multiprocessing
import os
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
import traceback

import numpy as np
import pytest
import safetensors.numpy
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

import cropi
import project
import rollout
import train
from rollout import (
    TOY,
    BadInput,
    Source,
    Trajectories,
    Unfinished,
    join_trajectories,
    load_json,
    open_tensors,
    write_json,
)

sys.path.insert(0, str(ROOT / "bench"))

import kill

SETTINGS = ["train.steps=2", "train.batch_prompts=8", "valid.samples=4", "test.samples=2", "project.k=1024"]


def options(world, out, **others):
    return {
        "pool": Source(world / "train.jsonl"),
        "valid": [str(world / "valid-rev.jsonl")],
        "test": [str(world / "test-rev.jsonl")],
        "stages": 2,
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


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---------------------------------------------------------------------------------------------------------------------
# Kills


def test_killed_runs_end_as_undisturbed_ones():
    """A few here; `python bench/kill.py --kills 100` prints what was hit."""
    assert kill.survive(kills=6, seed=1).total() >= 6


# ---------------------------------------------------------------------------------------------------------------------
# Corruption


def test_corruption_is_named_and_nothing_else_changes(whole, tmp_path):
    """Every artefact of a run but the pictures and the report, which each run writes anew."""
    out = tmp_path / "run"
    shutil.copytree(whole / "run", out)
    anew = {"curve.png", "selection.png", "report.json", ".lock"}
    artefacts = sorted(path for path in out.rglob("*") if path.is_file() and path.name not in anew)
    assert len(artefacts) > 35
    cases = 0
    rng = np.random.default_rng(0)
    for number, path in enumerate(artefacts):
        data = path.read_bytes()
        header = min(len(data), 8 + struct.unpack("<Q", data[:8])[0] if path.suffix == ".safetensors" else 64)
        changed = []
        for place in (*rng.integers(0, header, 3), *rng.integers(0, len(data), 3)):
            flipped = bytearray(data)
            flipped[place] ^= 255
            changed.append(bytes(flipped))
        changed += [data[: len(data) * part // 20] for part in range(20)]  # the first one is empty
        same_kind = [other for other in artefacts if other.suffix == path.suffix and other.read_bytes() != data]
        changed += [same_kind[number % len(same_kind)].read_bytes()] if same_kind else []
        for wrong in changed:
            path.write_bytes(wrong)
            before = contents(out)
            try:
                cropi.run(**options(whole, out))
            except BadInput as error:
                refused = str(error)
            else:
                pytest.fail(f"{path}: not refused")
            name = path if path.parent.name != "model" else path.parent
            assert str(name) in refused and "\n" not in refused, (path, refused)
            assert contents(out) == before
            cases += 1
        path.write_bytes(data)
    cropi.run(**options(whole, out))  # all is as it was
    print(f"{cases} corrupted files refused")
    assert cases > 700


@pytest.mark.parametrize("kind", ["gradients", "trajectories", "selection", "optimizer", "json"])
def test_each_reader_refuses_every_flip(whole, tmp_path, kind):
    files = {
        "gradients": "stage-00/gradients-valid-rev.safetensors",
        "trajectories": "rollouts/test-rev.safetensors",
        "selection": "stage-00/selection.safetensors",
        "optimizer": "stage-00/optimizer.safetensors",
        "json": "run.json",
    }
    data = (whole / "run" / files[kind]).read_bytes()
    path = tmp_path / "file"
    rng = np.random.default_rng(0)
    for place in {
        0,
        7,
        8,
        9,
        len(data) - 1,
        *rng.integers(0, min(len(data), 4000), 40),
        *rng.integers(0, len(data), 20),
    }:
        for mask in (255, 1):
            flipped = bytearray(data)
            flipped[place] ^= mask
            path.write_bytes(flipped)
            with pytest.raises(BadInput, match=str(path)):
                load_json(path) if kind == "json" else open_tensors(path, kind)
    path.write_bytes(data)
    assert load_json(path) if kind == "json" else open_tensors(path, kind)


def test_a_changed_model_is_refused(whole, tmp_path):
    shutil.copytree(whole / "run/stage-00/model", tmp_path / "m")
    rollout.load_model(tmp_path / "m")
    for name in ("model.safetensors", "config.json", "tokenizer.json", "generation_config.json"):
        data = (tmp_path / "m" / name).read_bytes()
        (tmp_path / "m" / name).write_bytes(data[:-3] + bytes([data[-3] ^ 1]) + data[-2:])
        with pytest.raises(BadInput, match="not the model that was written here"):
            rollout.load_model(tmp_path / "m")
        (tmp_path / "m" / name).write_bytes(data)


# ---------------------------------------------------------------------------------------------------------------------
# Parts, journals, locks


def test_parts_of_work_are_gone_on_with_and_never_mixed(whole, tmp_path, monkeypatch):
    """Interrupted after its second batch, each script goes on there, and refuses to with other options."""
    w, run = whole, whole / "run"
    work = {
        "rollout": (rollout.rollout, {"data": w / "train.jsonl", "batch_tokens": 1500}, "t", "samples", 4),
        "project": (
            project.project,
            {"trajectories": run / "rollouts/train.safetensors", "k": 64, "halves": 10, "batch_tokens": 300},
            "g",
            "k",
            128,
        ),
        "train": (
            train.train,
            {"selection": run / "stage-00/selection.safetensors", "data": w / "train.jsonl", "steps": 5, "lr": 1e-3},
            "o/model",
            "lr",
            2e-3,
        ),
    }
    for name, (script, given_, out, option, value) in work.items():
        target = {"out": tmp_path / ("o" if name == "train" else out)}
        script(**given_, out=tmp_path / "whole" / target["out"].name)
        saves, save = [], Unfinished.save

        def interrupted(self, *args, saves=saves, save=save, **kwargs):
            save(self, *args, **kwargs)
            saves.append(self.folder)
            if len(saves) == 2:
                raise KeyboardInterrupt

        monkeypatch.setattr(Unfinished, "save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            script(**given_, **target, save_every=0.0)
        folder = saves[0]
        assert folder == Unfinished.folder_of(tmp_path / out) and not (tmp_path / out).exists()
        before = contents(folder)
        with pytest.raises(BadInput, match=rf"was begun with options.{option} .*, now {value}; choose another --out"):
            script(**given_ | {option: value}, **target)
        assert contents(folder) == before
        part = max(folder.glob("[0-9]*"))
        data = part.read_bytes()
        part.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        with pytest.raises(BadInput, match=part.name):
            script(**given_, **target)
        part.write_bytes(data)
        script(**given_, **target, save_every=0.0)
        assert not folder.exists() and len(saves) > 2
        monkeypatch.setattr(Unfinished, "save", save)
        a, b = tmp_path / out, tmp_path / "whole" / out
        assert rollout.digest(a / "model.safetensors" if name == "train" else a).__len__() == 16
        if name == "train":
            assert (a / "model.safetensors").read_bytes() == (b / "model.safetensors").read_bytes()
            assert (a.parent / "optimizer.safetensors").read_bytes() == (
                b.parent / "optimizer.safetensors"
            ).read_bytes()
        else:
            assert a.read_bytes() == b.read_bytes()


def test_changed_options_name_the_difference_and_two_ways_on(whole, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole / "run", out)
    before = contents(out)
    changed = {"assignments": [*SETTINGS, "train.lr=1e-4"], "frac": 0.2}
    with pytest.raises(
        BadInput, match=r"begun with frac 0.1, now 0.2 and set.train.lr unset, now 0.0001; choose a new --out,"
    ):
        cropi.run(**options(whole, out, **changed))
    with pytest.raises(BadInput, match=r"that bears on what came before; use --force 0"):
        cropi.run(**options(whole, out, seed=1, force=1))
    assert contents(out) == before
    cropi.run(**options(whole, out, **changed, force=1))
    kept = {path for path in before if "stage-01" not in str(path) and path.parent != out}
    assert {path for path in kept if path.read_bytes() != before[path]} == set()
    assert (out / "stage-01/model/model.safetensors").read_bytes() != before[out / "stage-01/model/model.safetensors"]
    assert load_json(out / "run.json")["changes"][0]["from_stage"] == 1
    assert len(open_tensors(out / "stage-01/selection.safetensors", "selection")[0]["ranked"]) == 12
    cropi.run(**options(whole, out, **changed))  # and from now on without --force
    cropi.run(**options(whole, out, force=0))
    assert rollout.digest(out / "stage-01/model") == rollout.digest(whole / "run/stage-01/model")


def test_force_gives_up_once_and_only_what_it_says(whole, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole / "run", out)
    shutil.rmtree(out / "stage-01")
    with pytest.raises(BadInput, match=r"stage-01 is not whole yet; choose an earlier stage"):
        cropi.run(**options(whole, out, frac=0.2, force=2))
    shutil.copytree(whole / "run/stage-01", out / "stage-01")
    (out / "stage-00/summary.json").unlink()
    with pytest.raises(BadInput, match=r"stage-00 is not whole, but stage-01 came after it; --force 00"):
        cropi.run(**options(whole, out))
    cropi.run(**options(whole, out, force=0, stages=1))
    first = (out / "rollouts/train.safetensors").stat().st_mtime_ns
    (out / "stage-00/summary.json").unlink()  # as if killed on the way
    cropi.run(**options(whole, out, force=0, stages=1))  # the same command
    assert (out / "rollouts/train.safetensors").stat().st_mtime_ns == first
    cropi.run(**options(whole, out, force=0, stages=1))  # and once it is whole, a new wish
    assert (out / "rollouts/train.safetensors").stat().st_mtime_ns != first


def test_a_changed_reward_file_is_another_setting(whole, tmp_path):
    reward = tmp_path / "mine.py"
    reward.write_text("def f(completions, **columns):\n    return [float('1' in completions[0])]\n")
    settings = [*SETTINGS, f"rollout.reward={reward}:f", "rollout.max_errors=0.5"]
    cropi.run(**options(whole, tmp_path / "run", assignments=settings, selector="random", stages=1))
    reward.write_text("def f(completions, **columns):\n    return [float('2' in completions[0])]\n")
    rollout.load_reward.cache_clear()
    with pytest.raises(BadInput, match=r"was begun with as.rollout.reward .*mine.py:f \(.*\), now .*mine.py:f \("):
        cropi.run(**options(whole, tmp_path / "run", assignments=settings, selector="random", stages=2))


def test_parts_belong_to_their_request(tmp_path):
    one, other = (Unfinished(tmp_path / name, {"seed": seed}, 0.0) for seed, name in enumerate("ab"))
    for work in (one, other):
        work.save("gradients", {"x": np.zeros(3, np.float32)}, {})
    shutil.copy(one.parts[0], other.parts[0])
    with pytest.raises(BadInput, match="is part of something else"):
        Unfinished(tmp_path / "b", {"seed": 1}, 0.0).load("gradients")
    rollout.save_tensors(other.parts[0], "gradients", {"x": np.zeros(3, np.float32)}, {})  # one of no request at all
    assert Unfinished.seconds_in(tmp_path / "b", "gradients") == 0
    with pytest.raises(BadInput, match="is part of something else"):
        Unfinished(tmp_path / "b", {"seed": 1}, 0.0).load("gradients")
    (one.folder / "request.json").unlink()  # then nobody knows what they are parts of
    again = Unfinished(tmp_path / "a", {"seed": 5}, 0.0)
    assert again.load("gradients") == []
    again.save("gradients", {"x": np.ones(3, np.float32)}, {})
    assert len(list(again.folder.glob("*.safetensors"))) == 1


def test_what_may_change_on_the_way(whole, tmp_path, capsys):
    shutil.copytree(whole / "run", tmp_path / "run")
    free = ["rollout.gpu_memory=0.4", "rollout.max_errors=0.5", "project.batch_tokens=500"]
    cropi.run(**options(whole, tmp_path / "run", assignments=[*SETTINGS, *free], save_every=7.0))
    assert "goes on: 2 of 2 stages are whole" in capsys.readouterr().out


CHILD = """
import sys, time
sys.path.insert(0, {root!r})
import rollout
with rollout.locked(rollout.Path({folder!r})):
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
        with pytest.raises(BadInput, match="another process is at work here"):
            cropi.run(**options(whole, out))
        assert contents(out) == before
        other.kill()
    cropi.run(**options(whole, out))  # a dead process holds no lock


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_at_a_safe_point_with_the_command_that_goes_on(whole, tmp_path, number):
    words = ["cropi.py", "run", "--out", str(tmp_path / "run"), "--train", str(whole / "train.jsonl"), "--stages", "2"]
    words += ["--valid", str(whole / "valid-rev.jsonl"), "--test", str(whole / "test-rev.jsonl")]
    words += [word for setting in [*SETTINGS, "train.steps=400"] for word in ("--set", setting)]
    process = subprocess.Popen(
        [sys.executable, *words], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    for line in process.stdout:
        if line.startswith("$ python train.py"):
            break
    time.sleep(1.0)
    process.send_signal(number)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 128 + number
    assert "ending at the next safe point" in error
    assert error.splitlines()[-1] == f"stopped; to go on: python {' '.join(words)}"
    (part,) = (tmp_path / "run/stage-00/.model.unfinished").glob("[0-9]*.safetensors")
    assert 0 < len(open_tensors(part, "training")[1]["log"]) < 400


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
    ("size", "first"),
    [
        (2_000, "rollouts/train.safetensors"),
        (100_000, "stage-00/gradients-train.safetensors"),
        (600_000, "stage-00/model"),
        (2_000_000, "stage-00/optimizer.safetensors"),
    ],
)
def test_a_full_disk_is_one_line_and_loses_nothing(whole, tmp_path, size, first):
    out = tmp_path / "run"
    said = limited(lambda: cropi.run(**options(whole, out)), size)
    assert said.startswith(f"refused: {out / first}: no room to write it") and "\n" not in said, said
    whole_files = [path for path in out.rglob("*.safetensors") if "unfinished" not in str(path)]
    for path in whole_files:
        assert path.read_bytes() == (whole / "run" / path.relative_to(out)).read_bytes(), path
    assert not [path for path in out.rglob(".*") if path.name not in (".lock", ".digest")]
    assert limited(lambda: cropi.run(**options(whole, out)), 1 << 30) == "done"  # there is room again
    assert rollout.digest(out / "stage-01/model") == rollout.digest(whole / "run/stage-01/model")


def test_full_disk_for_each_script_alone(whole, tmp_path):
    run = whole / "run"
    for work in (
        lambda: rollout.rollout(out=tmp_path / "t", data=whole / "train.jsonl"),
        lambda: project.project(out=tmp_path / "g", trajectories=run / "rollouts/train.safetensors", k=64),
        lambda: cropi.select.select(
            out=tmp_path / "s.safetensors",
            data=whole / "train.jsonl",
            trajectories=run / "rollouts/train.safetensors",
            method="pass-rate",
        ),
        lambda: train.train(
            out=tmp_path / "o", selection=run / "stage-00/selection.safetensors", data=whole / "train.jsonl", steps=1
        ),
        lambda: train.train(
            out=tmp_path / "p",
            selection=run / "stage-00/selection.safetensors",
            data=whole / "train.jsonl",
            steps=3,
            save_every=0.0,
        ),
    ):
        said = limited(work, 500)
        assert said.startswith("refused: ") and "no room to write it" in said and "\n" not in said, said
        assert not [
            path
            for path in tmp_path.rglob("*")
            if path.is_file() and path.name not in ("request.json", "metrics.jsonl")
        ]


# ---------------------------------------------------------------------------------------------------------------------
# The format


@st.composite
def ragged(draw) -> Trajectories:
    prompts, samples = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    prompt_length = np.repeat(draw(st.lists(st.integers(1, 6), min_size=prompts, max_size=prompts)), samples)
    lengths = draw(st.lists(st.integers(1, 7), min_size=prompts * samples, max_size=prompts * samples))
    offsets = np.concatenate([[0], np.cumsum(prompt_length + lengths)])
    return Trajectories(
        tokens=rng.integers(0, 2**31 - 1, offsets[-1]).astype(np.int32),
        offsets=offsets.astype(np.int64),
        prompt_length=prompt_length.astype(np.int32),
        behavior_logps=rng.standard_normal(sum(lengths)).astype(np.float32),
        rewards=rng.random(prompts * samples).astype(np.float32),
        prompt_index=np.repeat(rng.permutation(100)[:prompts], samples).astype(np.int32),
        truncated=rng.integers(0, 2, prompts * samples).astype(np.uint8),
        metadata={"errors": 0, "timeouts": 0, "text": draw(st.text(max_size=20))},
    )


@settings(max_examples=100, deadline=None)
@given(ragged())
def test_trajectories_are_read_as_they_were_written(tmp_path_factory, trajectories):
    path = tmp_path_factory.mktemp("t") / "t.safetensors"
    tensors = {name: getattr(trajectories, name) for name in rollout.TENSORS}
    rollout.save_tensors(path, "trajectories", tensors, trajectories.metadata)
    back = rollout.open_trajectories(path)
    theirs = safetensors.numpy.load_file(path)  # the library's own reader
    for name, values in tensors.items():
        for read in (getattr(back, name), theirs[name]):
            assert read.dtype == values.dtype
            np.testing.assert_array_equal(read, values)
    assert back.metadata == trajectories.metadata
    order = list(trajectories.groups())[::-1]
    twice = join_trajectories([join_trajectories([trajectories], order)], order[::-1])  # there and back
    for name, values in tensors.items():
        np.testing.assert_array_equal(getattr(twice, name), values)


def test_json_is_read_as_it_was_written(tmp_path):
    content = {"a": [1, 2.5, None, "ü"], "b": {"c": float("inf")}}
    write_json(tmp_path / "x.json", content)
    assert load_json(tmp_path / "x.json") == content
    assert load_json(tmp_path / "none.json") is None
    for text in ("", "[]", "3", '{"a": 1}', "{", json.dumps({"a": 1, "digest": "0" * 16}), "\x00"):
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(BadInput, match=r"x\.json"):
            load_json(tmp_path / "x.json")


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

    monkeypatch.setattr(train, "grpo_step", poisoned)
    given_ = {"selection": whole / "run/stage-00/selection.safetensors", "data": whole / "train.jsonl", "steps": 5}
    with pytest.raises(BadInput, match=r"step 2: gradient is not finite at prompts \[\d+, "):
        train.train(out=tmp_path / "o", **given_)
    (part,) = (tmp_path / "o/.model.unfinished").glob("[0-9]*.safetensors")
    tensors, metadata = open_tensors(part, "training")
    assert len(metadata["log"]) == 2 and all(np.isfinite(values).all() for values in tensors.values())
    monkeypatch.setattr(train, "grpo_step", grpo_step)
    train.train(out=tmp_path / "o", **given_)
    train.train(out=tmp_path / "p", **given_)
    assert rollout.digest(tmp_path / "o/model") == rollout.digest(tmp_path / "p/model")


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
    def __reduce__(self):
        return (os.system, ("touch /tmp/cropi-was-here",))


def test_hostile_models_and_files_are_refused_or_harmless(tmp_path):
    mark = rollout.Path("/tmp/cropi-was-here")
    mark.unlink(missing_ok=True)

    def model(name: str) -> rollout.Path:
        shutil.copytree(TOY / "model", tmp_path / name)
        return tmp_path / name

    pickled = model("pickled")
    torch.save(Evil(), pickled / "model.safetensors")
    with pytest.raises(BadInput, match="pickled: cannot load this model"):
        rollout.load_model(pickled)
    binary = model("bin")
    (binary / "model.safetensors").unlink()
    torch.save(Evil(), binary / "pytorch_model.bin")
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
        with pytest.raises(BadInput, match=r"huge\.safetensors is not a whole safetensors file"):
            open_tensors(huge, "trajectories")
        shutil.copy(huge, pickled / "model.safetensors")
        with pytest.raises(BadInput, match="pickled: cannot load this model"):
            rollout.load_model(pickled)
    rows = [{"prompt": f"../../etc/passwd rev(12)= {mark}", "answer": "$(touch /tmp/cropi-was-here)"}]
    (tmp_path / "d.jsonl").write_text(json.dumps(rows[0]) + "\n")
    rolled = rollout.rollout(out=tmp_path / "t", data=tmp_path / "d.jsonl", samples=2)
    assert len(rolled.rewards) == 2
    for answer in (f"__import__('os').system('touch {mark}')", f"exec(open('{mark}', 'w'))", f"1+open('{mark}','w')"):
        assert not rollout.same_answer("5", answer) and not rollout.same_answer("5", rf"\text{{{answer}}}")
    assert not mark.exists()
