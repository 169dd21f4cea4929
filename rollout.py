"""Rollout: sample K completions for every prompt, verify them, and store the trajectories.

    python rollout.py --data toy/train.jsonl --out runs/mine/rollouts/train.safetensors
    python rollout.py --data toy/test-rev.jsonl --samples 4 --out runs/mine/test-rev.safetensors   # evaluation

Reads   a causal language model and a data set, each a local path or the name of one on the Hugging Face Hub.
Writes  one safetensors file of M = N*K trajectories, end to end, the K of a prompt side by side:

    tokens         int32   (T,)    prompt + completion ids of every trajectory; never re-tokenised text
    offsets        int64   (M+1,)  trajectory m is tokens[offsets[m]:offsets[m+1]]
    prompt_length  int32   (M,)    its first prompt_length[m] tokens are the prompt
    behavior_logps float32 (T',)   log β(a_t|h_t), one per completion token
    rewards        float32 (M,)    the verifier's verdict
    prompt_index   int32   (M,)    row of the data file
    truncated      uint8   (M,)    1 where max_tokens cut the completion off before its end token

This is the first script of five (rollout -> train -> project -> select -> cropi) and the only one that all the others
import, so it also holds what they share: the error for bad input, the files, the model, the verifiable rewards.

The policy is softmax(logits / temperature) everywhere: here, in the GRPO step and in the influence estimate. There is
no top-p and no top-k, since both would bend the ratios π/β that the off-policy gradient is made of (equation 2).

A completion depends on model, temperature, seed, data file, K, token limit and prompt alone: not on batch size or the
order of the prompts, beyond rounding. (With vLLM it is another one every time.)

Evaluation is this script on a test set: accuracy is the mean reward of a trajectory file.
"""

import atexit
import errno
import functools
import hashlib
import importlib.util
import itertools
import json
import logging
import multiprocessing
import multiprocessing.resource_tracker
import os
import re
import shlex
import shutil
import signal
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
import typer
from filelock import FileLock, Timeout
from jinja2 import TemplateError
from pebble import ProcessPool
from safetensors import SafetensorError, safe_open
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

disable_progress_bar()  # transformers' own bars, one per file read or written
logging.getLogger("huggingface_hub").setLevel("ERROR")  # it says of every try that it will try again
FORMAT = "cropi/3"  # version of every file that the five scripts write
TOY = Path(os.path.relpath(Path(__file__).resolve().parent / "toy"))  # the bundled world: the default paths


# ---------------------------------------------------------------------------------------------------------------------
# Bad input, and other ways to end early


class BadInput(Exception):
    """The user can mend this: one line that names the thing and the way out, exit code 2, nothing overwritten."""


class Stopped(Exception):
    """Somebody asked the process to end, and all that is whole has been saved."""


_asked: list[int] = []  # signals


def _ask_to_stop(signum: int, frame: object) -> None:
    _asked.append(signum)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the next one ends at once
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.write(2, b"\nending at the next safe point; once more ends at once\n")


def safe_point() -> None:
    """Where ending loses nothing."""
    if _asked:
        raise Stopped


def command_line(app: typer.Typer) -> None:
    """Run a script's command line. Bad input, usage errors too, becomes one line; a bug keeps its traceback. The first
    Ctrl-C or SIGTERM ends at the next safe point, the second at once."""
    command = typer.main.get_command(app)
    usage_error = typer.BadParameter.__base__  # unknown and missing options too
    _asked.clear()
    before = {number: signal.signal(number, _ask_to_stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with command.make_context(Path(sys.argv[0]).name, sys.argv[1:]) as context:
            command.invoke(context)
        return
    except typer.Exit as done:  # --help
        sys.exit(done.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except Stopped:
        words = re.sub(r" --force[ =]\d+", "", shlex.join(["python", *sys.argv]))  # once is enough
        print(f"stopped; to go on: {words}", file=sys.stderr)
        sys.exit(128 + _asked[0])
    except usage_error as error:
        message = error.format_message()
    except BadInput as error:
        message = str(error)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    print("error:", *message.split(), file=sys.stderr)  # one line, whatever a library has said
    sys.exit(2)


def new_app(**options) -> typer.Typer:
    return typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None, **options)


def above_zero(value: float | None) -> float | None:
    """Check of an option, where typer's own `min` would let 0 and nan through."""
    if value is not None and not 0 < value < float("inf"):
        raise typer.BadParameter(f"{value} is not above 0")
    return value


@contextmanager
def named(what: str) -> Iterator[None]:
    """Bad input that comes up in the block is that of `what`."""
    try:
        yield
    except BadInput as error:
        raise BadInput(f"{what}: {error}") from None


def require(condition: bool, message: str) -> None:
    if not condition:
        raise BadInput(message)


# ---------------------------------------------------------------------------------------------------------------------
# Files: what is written is whole, says what it was made from, and is checked when it is read


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yields a temporary name beside `path` (file or folder). If the block ends without an error, it is flushed to disk
    and renamed to `path`; else it is removed.

    Raises:
        BadInput: the disk is full, or may not be written to.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        if temporary.is_dir():
            (temporary / DIGEST).write_text(digest(temporary))
        for part in (*(temporary.iterdir() if temporary.is_dir() else ()), temporary):
            _flush(part)
        if path.is_dir():  # a folder cannot be replaced in one step: move it aside first
            shutil.rmtree(old, ignore_errors=True)
            os.replace(path, old)
        os.replace(temporary, path)
        _flush(path.parent)
        shutil.rmtree(old, ignore_errors=True)  # only now: had the line above failed, it would be the last copy
    except Exception as error:  # some libraries put what the system says into exceptions of their own
        number = getattr(error, "errno", None) or next(
            map(int, re.findall(r"(?:os error|code:) (\d+)", str(error))), None
        )
        full = number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        require(not full, f"{path}: no room to write it ({os.strerror(number or 0)}); make some and run the same again")
        denied = isinstance(error, OSError) and number in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT)
        require(not denied, f"{path}: cannot write it ({os.strerror(number or 0)})")
        raise
    finally:
        shutil.rmtree(temporary) if temporary.is_dir() else temporary.unlink(missing_ok=True)
        if old.exists() and not path.exists():
            os.replace(old, path)


def _flush(path: Path) -> None:
    """To disk, a folder's entries too."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def check_out(out: Path, *inputs: Path | None, model: bool = False) -> None:
    """Before any work: `out` can be written, and nothing else is lost by it.

    Raises:
        BadInput: it is one of the inputs, stands below a file, or is a folder (but for a model that replaces a model).
    """
    require(out.resolve() not in [path.resolve() for path in inputs if path], f"{out} is an input too; choose another")
    require(not out.is_dir() or (model and (out / "config.json").is_file()), f"{out} is a folder; choose another name")
    parent = next(path for path in out.absolute().parents if path.exists())
    require(parent.is_dir(), f"{out}: {parent} is not a folder")
    try:
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        raise BadInput(f"{out}: cannot write in {parent} ({error.strerror})") from None


DIGEST = ".digest"  # of the model folder that it lies in


def digest(path: Path) -> str:
    """SHA-256 of a file, or of all files of a model folder."""
    files = [path] if path.is_file() else sorted(f for f in path.glob("[!.]*") if f.is_file())
    sha = hashlib.sha256()
    for file in files:
        with open(file, "rb") as f:
            sha.update(file.name.encode() + hashlib.file_digest(f, "sha256").digest())
    return sha.hexdigest()[:16]


def is_intact(folder: Path) -> bool:
    """Is a model folder as `whole_file` left it? One that came from elsewhere is taken as it is."""
    seal = folder / DIGEST
    return not seal.is_file() or seal.read_bytes() == digest(folder).encode()


def write_json(path: Path, content: dict) -> None:
    seal = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(content | {"digest": seal}, indent=1) + "\n")


def load_json(path: Path) -> dict | None:
    """What `write_json` wrote there; None where there is no such file.

    Raises:
        BadInput: it is not as it was written.
    """
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text())
        seal = content.pop("digest")
        whole = seal == hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
    except (OSError, ValueError, AttributeError, TypeError, KeyError):
        whole = False
    require(whole, f"{path} is not as it was written (by this version); remove it, or choose a new --out")
    return content


def save_tensors(path: Path, kind: str, tensors: dict[str, np.ndarray], metadata: dict) -> None:
    """Write a safetensors file of one of our kinds."""
    room = 512 + 2 * len(json.dumps(metadata)) + sum(200 + len(name) for name in tensors)
    with save_rows(path, kind, None, (0, 0), tensors, metadata, room):
        pass


DTYPES = {"F64": np.float64, "F32": np.float32, "I64": np.int64, "I32": np.int32, "U8": np.uint8}  # safetensors' names


@contextmanager
def save_rows(
    path: Path,
    kind: str,
    name: str | None,
    shape: tuple[int, int],
    columns: dict[str, np.ndarray],
    metadata: dict,
    room: int = 1 << 14,
) -> Iterator[Callable[[np.ndarray], None]]:
    """Stream the rows of one large float32 tensor (N, k) to a safetensors file, so that it never stands in memory.

    Yields a function that takes the next rows (n, k). What the caller puts into `columns` and `metadata` meanwhile is
    written after them. The format is an 8-byte header length, the header (JSON, padded with spaces), then the data. Our
    entry `digest` covers all of it.

    Args:
        room: bytes for the header.
    """
    names, room = {np.dtype(dtype): name for name, dtype in DTYPES.items()}, room + -room % 8
    sha = hashlib.sha256()
    with whole_file(path) as temporary, open(temporary, "wb") as file:

        def write(values: np.ndarray) -> None:
            data = np.ascontiguousarray(values).data
            file.write(data)
            sha.update(data)

        file.write(bytes(room))
        yield lambda rows: write(rows.astype(np.float32, copy=False))
        end = 4 * shape[0] * shape[1]
        about = {"cropi": json.dumps({"format": FORMAT, "kind": kind} | metadata), "digest": ""}
        header = {"__metadata__": about} | ({name: _entry("F32", shape, 0, end)} if name else {})
        for column, values in sorted(columns.items(), key=lambda item: -item[1].itemsize):  # each at a whole address
            header[column] = _entry(names[values.dtype], values.shape, end, end := end + values.nbytes)
            write(values)
        header["__metadata__"]["digest"] = _seal(sha, header)
        text = json.dumps(header).encode()
        assert file.tell() == room + end and len(text) <= room - 8
        file.seek(0)
        file.write(struct.pack("<Q", room - 8) + text.ljust(room - 8))


def _entry(dtype: str, shape: Sequence[int], start: int, end: int) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


def _seal(sha: "hashlib._Hash", header: dict) -> str:
    """Digest of a file's data, so far in `sha`, and of its header."""
    about = header["__metadata__"] | {"digest": ""}
    sha.update(json.dumps(header | {"__metadata__": about}).encode())
    return sha.hexdigest()[:16]


def open_tensors(path: Path, kind: str) -> tuple[dict[str, np.ndarray], dict]:
    """Open one of our files: its tensors, mapped into memory and read from disk as they are sliced, and its metadata.

    Raises:
        BadInput: missing, cut short, changed, not safetensors, of another kind or another format version.
    """
    require(path.is_file(), f"{path}: no such file")
    try:
        with safe_open(path, framework="np") as file:  # checks that header and length agree
            about = file.metadata() or {}
        metadata = json.loads(about.get("cropi", "{}"))
        with open(path, "rb") as file:
            start = 8 + (length := struct.unpack("<Q", file.read(8))[0])
            header = json.loads(file.read(length))
            sha = hashlib.file_digest(file, "sha256")
    except (OSError, SafetensorError, ValueError) as error:
        raise BadInput(f"{path} is not a whole safetensors file ({error}); write it again") from None
    found = f"{metadata.pop('kind', 'an unknown file')} ({metadata.pop('format', 'no format')})"
    require(found == f"{kind} ({FORMAT})", f"{path} holds {found}, where {kind} ({FORMAT}) is needed")
    require(about.get("digest") == _seal(sha, header), f"{path} is not as it was written; write it again")
    tensors = {
        name: np.memmap(path, DTYPES[entry["dtype"]], "r", start + entry["data_offsets"][0], tuple(entry["shape"]))
        for name, entry in header.items()
        if name != "__metadata__"
    }
    return tensors, metadata


def differences(before: dict, now: dict) -> dict[str, str]:
    """Where two dictionaries of dictionaries differ, in words: {"train.lr": "5e-05, now 0.0001"}."""

    def flat(content: object, name: str = "") -> dict[str, object]:
        if not isinstance(content, dict):
            return {name[1:]: content}
        return {key: value for part in content for key, value in flat(content[part], f"{name}.{part}").items()}

    was, is_ = flat(json.loads(json.dumps(before))), flat(json.loads(json.dumps(now)))
    names = [name for name in was | is_ if was.get(name) != is_.get(name)]
    return {name: f"{was.get(name, 'unset')}, now {is_.get(name, 'unset')}" for name in names}


def in_words(changes: dict[str, str]) -> str:
    return " and ".join(f"{name} {change}" for name, change in changes.items())


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """While the block runs, no other process gets the folder. The lock is the operating system's and dies with us."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=0):
            yield
    except Timeout:
        raise BadInput(f"{folder}: another process is at work here; wait for it, or choose another --out") from None


FREE = {"out", "save_every", "gpu_memory", "max_errors"}  # options that results do not depend on


def settings_of(options: dict) -> dict:
    """Of a script's options, given as its `locals()`, those that results depend on, with what `auto` stands for here.
    Files count by their digests, which the caller has."""
    found = {
        name: value for name, value in options.items() if name not in FREE and not isinstance(value, Path | Source)
    }
    if "engine" in found:
        found["engine"] = pick_engine(found["engine"])
    if "dtype" in found:
        found["dtype"] = str(pick_dtype(found["dtype"]))
    if found.get("reward", "exact") not in REWARDS:
        found["reward"] += f" ({digest(Path(found['reward'].rpartition(':')[0]))})"
    return found | {"device": device().type}


class Unfinished:
    """Parts of a file that is being made, in a folder beside it, so that the same command goes on from there.

    The folder is there from the first part that is saved to the end of the work. A part is a file of its own.

    Args:
        out: the file.
        request: what it is made from; a folder that was begun with something else is refused.
        every: seconds of work after which a part is saved.
    """

    later: ClassVar[list[Path] | None] = None  # folders that whoever calls a script removes in his own time

    def __init__(self, out: Path, request: dict, every: float):
        self.folder, self.request, self.every = self.folder_of(out), request, every
        self.clock, self.seconds = time.monotonic(), 0.0  # since the last part; of work, up to it
        self.seal = hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()[:16]
        found = load_json(self.folder / "request.json")
        different = differences(found, request) if found else {}
        ways = f"choose another --out, or remove {self.folder}"
        require(not different, f"{out} was begun with {in_words(different)}; {ways}")
        self.parts = sorted(self.folder.glob("[0-9]*.safetensors")) if found else []

    @staticmethod
    def folder_of(out: Path) -> Path:
        return out.with_name(f".{out.name}.unfinished")

    @classmethod
    def seconds_in(cls, out: Path, kind: str) -> float:
        """Work that the parts of a file stand for."""
        parts = sorted(cls.folder_of(out).glob("[0-9]*.safetensors"))
        return open_tensors(parts[-1], kind)[1].get("seconds", 0.0) if parts else 0.0

    def load(self, kind: str) -> list[tuple[dict[str, np.ndarray], dict]]:
        """Tensors and metadata of the parts that are there."""
        loaded = [open_tensors(path, kind) for path in self.parts]
        for path, (_, metadata) in zip(self.parts, loaded, strict=True):
            require(metadata.get("request") == self.seal, f"{path} is part of something else; remove {self.folder}")
        if loaded:
            self.seconds = loaded[-1][1]["seconds"]
            tqdm.write(f"{self.folder}: goes on after {self.seconds:.1f} s of work")
        return loaded

    def due(self) -> bool:
        """Is it time to save a part?"""
        return bool(_asked) or time.monotonic() - self.clock >= self.every

    def save(self, kind: str, tensors: dict[str, np.ndarray], metadata: dict, *, keep: bool = True) -> None:
        """Save a part (in place of the one before it, unless `keep`); then end, if somebody asked for that."""
        if not self.parts:
            remove_folder(self.folder)  # parts without a request, perhaps
            write_json(self.folder / "request.json", self.request)
        path = self.folder / f"{len(self.parts) if keep else 0:06d}.safetensors"
        self.seconds += time.monotonic() - self.clock
        save_tensors(path, kind, tensors, metadata | {"seconds": self.seconds, "request": self.seal})
        self.parts = [*self.parts, path] if keep else [path]
        self.clock = time.monotonic()
        safe_point()

    def finish(self) -> None:
        """The file is whole: away with its parts."""
        if self.later is None:
            remove_folder(self.folder)
        else:
            self.later.append(self.folder)


def remove_folder(folder: Path) -> None:
    """A folder, all at once: what is killed in between leaves all of it, or none under its name."""
    if folder.exists():
        gone = folder.with_name(f".{folder.name.lstrip('.')}.{os.getpid()}.old")
        shutil.rmtree(gone, ignore_errors=True)
        os.replace(folder, gone)
        shutil.rmtree(gone)


# ---------------------------------------------------------------------------------------------------------------------
# Prompts and models


class Source(str):
    """Where prompts come from: a local jsonl, json, csv or parquet file, or NAME[:CONFIG[:SPLIT]] on the Hub, SPLIT as
    `datasets` writes it, such as train[:1000]; or several of these, joined by +."""


class Prompts(list):
    """Rows of a data set: dictionaries with `prompt` (a string, or chat messages), `answer` (a string) and what other
    columns there are, for the reward function."""

    digest: str


FILES = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
COLUMNS = {"prompt": ("prompt", "problem", "question"), "answer": ("answer", "solution", "reward_model.ground_truth")}


def load_prompts(source: Source | str | Path, limit: int | None = None) -> Prompts:
    """The rows of the data set, or its first `limit`; of several, joined by +, one after another.

    Raises:
        BadInput: not there, not readable, or a row without prompt or answer.
    """
    source = str(source)
    parts = [source] if Path(source).exists() else source.split("+")
    rows = Prompts()
    digests = [] if limit is None else [str(limit)]
    for part in parts:
        require(bool(part), f"{source!r}: no name of a data set before or after +")
        path = Path(part)
        local = path.suffix in FILES
        require(not local or path.is_file(), f"{path}: no such data file")
        require(local or not path.exists(), f"{path}: not one of {', '.join(FILES)}")
        empty = local and path.stat().st_size < 100 and not path.read_bytes().strip()  # which datasets has no words for
        require(not empty, f"{path}: no prompts in it")
        if FILES.get(path.suffix) == "json":  # null, in place of an object, crashes the reader of pyarrow 26
            with open(path, "rb") as file:
                begins = file.read(100).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
            require(begins in (b"{", b"["), f"{path}: not JSON objects, one per line or in a list")
        found = _load_rows(part, path.stat().st_mtime_ns if local else None)
        text = None if local else json.dumps(found, default=str).encode()
        digests.append(digest(path) if local else hashlib.sha256(text).hexdigest()[:16])
        rows += found[:limit]
    rows.digest = digests[0] if len(digests) == 1 else hashlib.sha256(" ".join(digests).encode()).hexdigest()[:16]
    return rows


@functools.lru_cache(maxsize=32)  # a run opens its few data sets again and again
def _load_rows(source: str, written: int | None) -> list[dict]:
    import datasets  # here, since it takes a second that `--help` need not wait for

    kind = FILES.get(Path(source).suffix)
    (datasets.disable_progress_bars if kind else datasets.enable_progress_bars)()  # a download may take long
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it says of errors is in the exception
    if kind:
        columns = dict.fromkeys([name for names in COLUMNS.values() for name in names], str)  # 007 stays 007
        text = {"converters": columns} if kind == "csv" else {}
        name, options = kind, {"data_files": source, "split": "train", **text}
    else:
        name, config, split = [*source.split(":", 2), "", ""][:3]  # train[:100] has a colon, too
        options = {"name": config or None, "split": split or "train"}
    try:
        table = datasets.load_dataset(name, **options).to_list()
    except Exception as error:  # of many kinds, from pyarrow to the network
        nothing = re.search(r"corresponds to no data|BatchSize must be greater than 0", str(error))
        require(not nothing, f"{source}: no prompts in it")
        reason = str(error.__cause__ or error).strip().partition("\n")[0]
        hint = "" if kind else "; a data set of the Hub is NAME[:CONFIG[:SPLIT]], a local one ends in .jsonl, .csv ..."
        raise BadInput(f"{source}: cannot load this data set ({reason}){hint}") from None
    rows = []
    for number, row in enumerate(table, 1):
        for column, names in COLUMNS.items():
            value = next((v for v in (_look_up(row, name) for name in names) if v is not None), None)
            if column == "answer" and isinstance(value, int | float) and not isinstance(value, bool):
                value = str(value)
            whole = isinstance(value, str) or (column == "prompt" and _is_chat(value))
            require(
                bool(value) and whole,
                f"{source}, row {number}: no {column!r}, or an empty one (looked for {', '.join(names)})",
            )
            row[column] = value
        rows.append(row)
    require(bool(rows), f"{source}: no prompts in it")
    return rows


def _look_up(row: dict, name: str) -> object:
    """reward_model.ground_truth: the entry of an entry."""
    return functools.reduce(lambda at, key: at.get(key) if isinstance(at, dict) else None, name.split("."), row)


def _is_chat(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(m, dict) and {"role", "content"} <= set(m) for m in value)


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[dict],
    system: str | None = None,
    chat: bool = True,
    source: str = "data",
) -> list[list[int]]:
    """Token ids of the prompts, through the model's chat template where it has one, unless `chat` is false.

    Args:
        system: system prompt; "" for an empty one, None for what the template does by itself.
    Raises:
        BadInput: messages, or a system prompt, without a template.
    """
    template = chat and tokenizer.chat_template
    require(bool(template) or system is None, "--system needs a chat template, which is absent or switched off")
    texts = []
    for number, row in enumerate(rows, 1):
        messages = row["prompt"]
        if isinstance(messages, str) and not template:
            texts.append(messages)
            continue
        require(bool(template), f"{source}, row {number}: the prompt is a chat, and there is no chat template for it")
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        if system is not None:  # in place of the data's own
            messages = [m for m in messages if m["role"] != "system"]
            messages = [{"role": "system", "content": system}, *messages]
        try:
            texts.append(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        except TemplateError as error:  # Gemma's, for one, knows no system prompt
            raise BadInput(f"{source}, row {number}: the model's chat template refuses the prompt ({error})") from None
    return tokenizer(texts, add_special_tokens=not template).input_ids  # a template brings them along


@functools.cache
def device() -> torch.device:
    """The accelerator, if there is one; said once."""
    found = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    name = f" ({torch.cuda.get_device_name()})" if found == "cuda" else ""
    tqdm.write(f"device: {found}{name}")
    return torch.device(found)


def pick_dtype(dtype: str) -> torch.dtype:
    """float32 or bfloat16; `auto` is bfloat16 on CUDA alone."""
    return getattr(torch, {"cuda": "bfloat16"}.get(device().type, "float32") if dtype == "auto" else dtype)


def model_folder(model: Path) -> Path:
    """The model's local folder; a name on the Hub is downloaded.

    Raises:
        BadInput: neither.
    """
    if (model / "config.json").is_file():
        return model
    require(not model.exists() and len(model.parts) == 2, f"{model}: no model folder here (it has no config.json)")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(model), allow_patterns=["*.json", "*.safetensors", "*.txt", "*.jinja"]))
    except Exception as error:  # of many kinds, most of them the network's
        reason = str(error).strip().partition("\n")[0]
        raise BadInput(f"{model}: no model folder here, and the Hub did not give one ({reason})") from None


def load_model(path: Path, dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model in evaluation mode (dropout off), on the device, with its tokenizer."""
    require((path / "config.json").is_file(), f"{path}: no model folder here (it has no config.json)")
    require(is_intact(path), f"{path}: not the model that was written here, a file has been changed; train it again")
    try:  # weights as safetensors alone, and no code: neither can do anything but be wrong
        safe = {"trust_remote_code": False}
        model, found = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, output_loading_info=True, use_safetensors=True, **safe
        )
        tokenizer = AutoTokenizer.from_pretrained(path, **safe)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise BadInput(f"{path}: cannot load this model ({str(error).splitlines()[0]})") from None
    require(not found["missing_keys"], f"{path}: the weights lack {', '.join(sorted(found['missing_keys'])[:3])}")
    return model.eval().to(device()), tokenizer


def lineage(model: PreTrainedModel, path: Path) -> list[str]:
    """Digests of this model and of those it was trained from (`train.py` notes them in config.json).

    Trajectories belong to a model if they were sampled by one of these: off-policy, but not foreign.
    """
    return [*getattr(model.config, "cropi_ancestors", []), digest(path)]


# ---------------------------------------------------------------------------------------------------------------------
# Verifiable rewards, in TRL's form: reward(prompts, completions, **columns) -> list of floats


def exact(prompts: Sequence, completions: Sequence, answer: Sequence[str], **columns) -> list[float]:
    """1.0 where the completion is the answer, up to surrounding white space."""
    return [float(_text(c).strip() == a.strip()) for c, a in zip(completions, answer, strict=True)]


def math(prompts: Sequence, completions: Sequence, answer: Sequence[str], **columns) -> list[float]:
    """1.0 where the completion's final answer is mathematically equal to that of `answer`.

    The final answer is what the last \\boxed{} holds, or what follows the last `####` (GSM8K), or else, in the column
    `answer`, all of it. A completion that gives it in neither form is wrong.
    """
    return [
        float(same_answer(final_answer(a) or a, final_answer(_text(c))))
        for c, a in zip(completions, answer, strict=True)
    ]


REWARDS: dict[str, Callable[..., list[float]]] = {"exact": exact, "math": math}


def _text(completion: str | list[dict]) -> str:
    return completion if isinstance(completion, str) else completion[-1]["content"]


def final_answer(text: str) -> str | None:
    r"""What the last \boxed{} holds, braces counted, or else what follows the last `####`; None if there is neither.

    >>> final_answer(r"so \boxed{1} or \boxed{\frac{1}{2}}."), final_answer("6 * 7 = 42 #### 42"), final_answer("42")
    ('\\frac{1}{2}', '42', None)
    """
    if boxes := list(BOX.finditer(text)):
        start = boxes[-1].end()
        if text[start : start + 1] != "{":  # \boxed 5
            word = re.match(r"\s*([^\s$]+)", text[start:])
            return word[1].rstrip(".,") if word else None
        depth = 0
        for place in range(start, len(text)):
            depth += (text[place] == "{") - (text[place] == "}")
            if depth == 0:
                return text[start + 1 : place].strip()
        return None
    _, marked, rest = text.rpartition("####")
    return rest.strip().partition("\n")[0].strip(" *") if marked else None


def same_answer(gold: str, answer: str | None) -> bool:
    """Are the two equal, as text or as mathematics? What is longer than any answer, or has millions of digits, is only
    compared as text."""
    if answer is None:
        return False
    if max(len(gold), len(answer)) > 300 or HUGE.search(gold + " " + answer):
        return gold.strip() == answer.strip()
    gold, answer = _tidy(gold), _tidy(answer)
    if gold == answer:
        return True
    # What math-verify lets pass: (1,2) for {1,2}, "8 hours and 30 minutes" for 8, 4 = 5 for 5, 11_3 for 11_2.
    kinds = [BRACKET.match(text) for text in (gold, answer)]
    if all(kinds) and kinds[0][1] != kinds[1][1]:
        return False
    if answer.startswith("[") and NUMBER.fullmatch(gold):
        return False
    if MORE.search(answer) and not MORE.search(gold) and "," not in gold:
        return False
    left, equals, _ = answer.partition("=")
    if equals and "=" not in gold and NUMBER.fullmatch(left):
        return False
    bases = [BASE.fullmatch(text) for text in (gold, answer)]
    if all(bases) and bases[0][1] != bases[1][1]:
        return False
    import math_verify

    # Its own time limits are signals, which need the main thread: the worker's time limit is ours.
    parsed = [math_verify.parse(rf"\boxed{{{text}}}", parsing_timeout=None) for text in (gold, answer)]
    return math_verify.verify(*parsed, timeout_seconds=None)


def _tidy(text: str) -> str:
    """Without what a mathematician would not look at: a full stop, currency, units behind a number."""
    text = CURRENCY.sub("", text.strip().rstrip(".,;"))
    text = WRAPPED.sub(r"\1", text).strip()
    text = re.sub(r"^(-?\d+)\s+(\d+)/(\d+)$", r"\1\\frac{\2}{\3}", text)  # 11 1/2
    text = re.sub(r"^(.+?)\s*=\s*([a-z])$", r"\2=\1", text)  # 5 = x
    unit = UNIT.fullmatch(text)
    return unit[1] if unit and not MORE.search(text) else text


BOX = re.compile(r"\\(?:boxed|fbox)\s*(?=\{|\s\S)")
HUGE = re.compile(r"\d\s*\^\s*\{?\s*\d+\s*\^|\^\s*\{?\s*\d{5}|(\)|\d{4})\s*!")  # 9^{9^9}, 2^{99999}, (9^9)!
NUMBER = re.compile(r"[-+\d.,/ ]+")
BRACKET = re.compile(r"(?:\\left\s*)?\\?(\(|\[|\{)")
BASE = re.compile(r"\d+_\{?(\d+)\}?")
CURRENCY = re.compile(r"^(?:\\?\$|€|£|¥)\s*|(?:\\?\$|€|£|¥)$")
WRAPPED = re.compile(r"^\\text\{([^{}]*)\}$")
UNIT = re.compile(r"(-?(?:\d[\d,]*\.?\d*|\.\d+))(?:\\? |\s|~)*(?:\\text\{[^{}\d]*\}|[A-Za-z][A-Za-z ]+)")  # 18 dollars
MORE = re.compile(r"\b(and|or|half|third|quarter|dozen|hundred|thousand|million|billion|percent)\b")


@functools.cache
def load_reward(reward: str) -> Callable[..., list[float]]:
    """One of REWARDS, or FILE.py:FUNCTION, which runs that file.

    Raises:
        BadInput: there is no such function, or the file does not run.
    """
    if reward in REWARDS:
        return REWARDS[reward]
    path, colon, name = reward.rpartition(":")
    require(bool(colon), f"no reward {reward!r}; it is one of {', '.join(REWARDS)} or FILE.py:FUNCTION")
    require(Path(path).is_file(), f"reward {reward!r}: no file {path}")
    spec = importlib.util.spec_from_file_location("reward_of_the_user", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise BadInput(f"reward {reward!r}: {path} does not run ({type(error).__name__}: {error})") from None
    require(callable(getattr(module, name, None)), f"reward {reward!r}: {path} has no function {name}")
    return getattr(module, name)


def known_reward(reward: str) -> str:
    """Check of the option `--reward`."""
    load_reward(reward)
    return reward


def verify(
    reward: str,
    rows: Sequence[dict],
    completions: Sequence[str],
    *,
    seconds: float = 10.0,
    allowed: float | None = None,
) -> tuple[np.ndarray, dict[str, int]]:
    """Rewards (M,) float32 of M completions, `rows[m]` being the data row of completion m, and counts of the verdicts
    that could not be had, whose reward is 0: `errors` (an exception, a killed process) and `timeouts`.

    `exact` is computed here. Other rewards run in processes of their own, one completion at a time, so that one that
    hangs or crashes costs one verdict.

    Args:
        seconds: time limit of a verdict.
        allowed: how many may fail.  [default: 1%, and one in any case]
    Raises:
        BadInput: more failed, or the function returned another number of values, or one that is not finite.
    """
    counts, last = {"errors": 0, "timeouts": 0}, ""
    allowed = max(1, 0.01 * len(rows)) if allowed is None else allowed
    tasks = list(zip(rows, completions, strict=True))
    if reward == "exact":
        return np.array([_verdict(reward, *task)[0] for task in tasks], np.float32), counts
    verdicts = np.zeros(len(rows), np.float32)
    futures = [workers().schedule(_verdict, (reward, *task), timeout=seconds) for task in tasks]
    for m, future in enumerate(tqdm(futures, desc="verify", unit="verdict", leave=False, delay=5, disable=None)):
        try:
            values = future.result()
        except Exception as error:  # whatever a reward function may raise; pebble's ProcessExpired where it died
            safe_point()  # whoever asked us to end may have killed the workers
            late = isinstance(error, TimeoutError)
            counts["timeouts" if late else "errors"] += 1
            last = last if late else f"; the last error was {type(error).__name__}: {error}"
            if sum(counts.values()) > allowed:
                for left in futures[m + 1 :]:
                    left.cancel()
                said = ", ".join(f"{count} {name}" for name, count in counts.items())
                raise BadInput(
                    f"reward {reward!r}: {said} in {m + 1} of {len(rows)} verdicts, more than --max-errors{last}"
                ) from None
            continue
        number = isinstance(values, Sequence) and len(values) == 1 and isinstance(values[0], int | float | np.number)
        whole = number and np.isfinite(values[0])
        require(
            bool(whole),
            f"reward {reward!r} returned {values!r:.80} for one completion, not a list of one finite number",
        )
        verdicts[m] = values[0]
    return verdicts, counts


def _verdict(reward: str, row: dict, text: str) -> list[float]:
    """One call of a reward function, on lists of one element."""
    chat = isinstance(row["prompt"], list)  # then TRL passes completions as messages, too
    columns = {column: [value] for column, value in row.items() if column != "prompt"}
    completion = [{"role": "assistant", "content": text}] if chat else text
    return load_reward(reward)(prompts=[row["prompt"]], completions=[completion], **columns)


@functools.cache
def workers() -> "ProcessPool":
    """Processes that compute verdicts, started once and kept; one that is stuck is killed and replaced."""
    context = multiprocessing.get_context("spawn")  # a fork would copy CUDA's state, and locked locks of threads
    pool = ProcessPool(min(8, os.cpu_count() or 1), context=context, initializer=_start_worker)
    atexit.register(lambda: (pool.stop(), pool.join()))
    return pool


def _start_worker() -> None:
    """Importing this module, and math-verify's grammar, takes seconds, which are not the first verdict's."""
    os.setsid()  # signals to the whole group, such as Ctrl-C, are the main process's to answer
    logging.getLogger("math_verify").setLevel("ERROR")  # it warns that its time limits are off
    same_answer("1", "2")


# ---------------------------------------------------------------------------------------------------------------------
# The engine


# The engines: `generate` samples, `sync` takes over a policy's weights, `check` compares log-probs with a policy's.


@dataclass
class Completion:
    tokens: np.ndarray  # (C,) int32, the end token included
    logps: np.ndarray  # (C,) float32, under the tempered policy that sampled it
    truncated: bool


class TransformersEngine:
    """Batched sampling with a KV cache, on any causal language model of transformers.

    The prompt is computed once for its K completions, and a sequence that has ended leaves the batch.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_tokens: int = 16384):
        self.model, self.batch_tokens = model, batch_tokens
        ends = model.generation_config.eos_token_id
        ends = tokenizer.eos_token_id if ends is None else ends
        require(ends is not None, "neither generation_config.json nor the tokenizer names an end token (eos_token)")
        self.end_tokens = torch.tensor(ends, device=model.device).reshape(-1)

    def batches(self, prompts: Sequence[Sequence[int]], samples: int, max_tokens: int) -> list[list[int]]:
        """The prompts, by place, in the batches that `generate` makes of them."""
        return list(pack([(len(p) + max_tokens, 0) for p in prompts], samples, self.batch_tokens))

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        prompt_index: Sequence[int],
        *,
        samples: int,
        max_tokens: int,
        temperature: float,
        seed: Sequence[int],
    ) -> list[list[Completion]]:
        """`samples` completions for each of the prompts.

        Args:
            prompts: token ids.
            prompt_index: what each prompt is called; with `seed` it determines the prompt's random numbers.
            max_tokens: longest completion, in tokens, the end token included.
        Raises:
            BadInput: NaN or infinity in the logits.
        """
        done: list[list[Completion]] = [[] for _ in prompts]
        for batch in self.batches(prompts, samples, max_tokens):
            indices = [prompt_index[i] for i in batch]
            uniforms = [np.random.default_rng([*seed, i]).random((samples, max_tokens), np.float32) for i in indices]
            completions = self._generate([prompts[i] for i in batch], indices, np.stack(uniforms), temperature)
            for j, i in enumerate(batch):
                done[i] = completions[j * samples : (j + 1) * samples]
        return done

    @torch.inference_mode()
    def _generate(
        self, prompts: list[Sequence[int]], prompt_index: list[int], uniforms: np.ndarray, temperature: float
    ) -> list[Completion]:
        """One batch: P prompts, uniforms (P, K, C) in [0, 1), one for each token that may be sampled."""
        device = self.model.device
        _, samples, max_tokens = uniforms.shape
        random = torch.from_numpy(uniforms).to(device).flatten(0, 1)  # (P, K, C) -> (P*K, C)
        logits, cache, mask, position = prefill(self.model, *pad_left(prompts, device), samples)
        alive = torch.arange(len(random), device=device)  # row of each sequence that has not ended
        tokens = torch.zeros(random.shape, dtype=torch.int32, device=device)
        logps = torch.zeros(random.shape, device=device)
        length = torch.full((len(random),), max_tokens, device=device)
        truncated = torch.ones(len(random), dtype=torch.bool, device=device)
        for t in range(max_tokens):
            logp = torch.log_softmax(logits[:, -1].float() / temperature, -1)  # (A, V), A sequences alive
            cdf = logp.exp().cumsum(-1)
            bad = alive[~torch.isfinite(cdf[:, -1])]
            if len(bad):
                raise BadInput(f"logits are not finite at prompt {prompt_index[int(bad[0]) // samples]}")
            # The inverse of the cumulative distribution at a uniform number: an exact sample, whatever the batch.
            token = torch.searchsorted(cdf, random[alive, t, None] * cdf[:, -1:], right=True)  # (A, 1)
            tokens[alive, t] = token[:, 0].int()
            logps[alive, t] = logp.gather(1, token)[:, 0]
            ended = torch.isin(token[:, 0], self.end_tokens)
            length[alive[ended]] = t + 1
            truncated[alive[ended]] = False
            if t + 1 == max_tokens or ended.all():
                break
            if ended.any():
                keep = (~ended).nonzero()[:, 0]
                alive, token, mask, position = alive[keep], token[keep], mask[keep], position[keep]
                cache.batch_select_indices(keep)
            mask = torch.cat([mask, torch.ones_like(token)], 1)
            logits = self.model(
                input_ids=token, attention_mask=mask, position_ids=position, past_key_values=cache, use_cache=True
            ).logits
            position = position + 1
        parts = zip(tokens.cpu().numpy(), logps.cpu().numpy(), length.tolist(), truncated.tolist(), strict=True)
        return [Completion(ids[:n], logp[:n], cut) for ids, logp, n, cut in parts]

    def sync(self, policy: PreTrainedModel) -> None:
        """Nothing to do: it is the policy itself that samples."""

    def check(self, policy: PreTrainedModel, trajectories: "Trajectories", temperature: float) -> None:
        """Nothing to do."""


class VllmEngine:
    """vLLM with the weights of a model folder. It stays in its process, and on CUDA sleeps while it does not generate,
    so that its memory is there for scoring and training.

    Args:
        folder: where the first weights are; later ones come by `load` and `sync`.
        head: width of the model's attention heads.
        memory: share of the device's memory for weights and KV cache while it generates (on a CPU, of the RAM).
    """

    def __init__(self, folder: Path, head: int, dtype: torch.dtype, memory: float, seed: int):
        from vllm import LLM

        self.dtype, self.sleeps = dtype, device().type == "cuda"
        if device().type == "cpu":
            from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

            sizes = CPUAttentionBackend.get_supported_head_sizes()
            require(head in sizes, f"{folder}: attention heads of {head}; vLLM on a CPU has {sizes}; use --engine hf")
        if self.sleeps:
            torch.cuda.empty_cache()  # vLLM asks for free memory at the start; torch keeps what it has used
        multiprocessing.resource_tracker.ensure_running()  # now, since it would let signals through again
        # Ctrl-C is ours to answer: the engine's processes inherit what is blocked here
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self.llm = LLM(
                model=str(folder),
                dtype=str(dtype).removeprefix("torch."),
                gpu_memory_utilization=memory,
                logprobs_mode="processed_logprobs",  # of the tempered policy that samples
                enable_sleep_mode=self.sleeps,
                enforce_eager=not self.sleeps,  # no CUDA graphs to capture
                seed=seed,
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        self.rest()

    def close(self) -> None:
        """End the engine's process, so that its memory is free at once."""
        self.llm.llm_engine.engine_core.shutdown()

    def rest(self) -> None:
        if self.sleeps:
            self.llm.sleep(level=1)  # weights to the host's memory, the KV cache away

    def rise(self) -> None:
        if self.sleeps and self.llm.llm_engine.is_sleeping():
            torch.cuda.empty_cache()
            self.llm.wake_up()

    def load(self, folder: Path) -> None:
        """Take over the weights in a model folder."""
        self.rise()
        self.llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})
        self.llm.reset_prefix_cache()  # keys and values of the weights before

    def sync(self, policy: PreTrainedModel) -> None:
        """Take over the policy's weights, through a checkpoint folder, in shared memory where there is room."""
        weights = {name: value.to(self.dtype) for name, value in policy.named_parameters()}  # tied ones once
        size, memory = sum(value.nbytes for value in weights.values()), Path("/dev/shm")
        fits = memory.is_dir() and shutil.disk_usage(memory).free > 1.1 * size  # in a container it may be 64 MB
        with tempfile.TemporaryDirectory(dir=memory if fits else None) as folder:
            policy.save_pretrained(folder, state_dict=weights)
            self.load(Path(folder))

    def batches(self, prompts: Sequence[Sequence[int]], samples: int, max_tokens: int) -> list[list[int]]:
        """Thousands of completions at a time, since what vLLM returns takes much memory."""
        step = max(1, 8192 // samples)
        return [list(range(start, min(start + step, len(prompts)))) for start in range(0, len(prompts), step)]

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        prompt_index: Sequence[int],
        *,
        samples: int,
        max_tokens: int,
        temperature: float,
        seed: Sequence[int],
    ) -> list[list[Completion]]:
        """As that of TransformersEngine, but for `seed`: what vLLM samples is not repeatable."""
        from vllm import SamplingParams

        self.rise()
        options = SamplingParams(
            n=samples, temperature=temperature, max_tokens=max_tokens, top_p=1.0, top_k=-1, detokenize=False,
            logprobs=0, flat_logprobs=True,  # those of the sampled tokens alone
        )  # fmt: skip
        groups = []
        for batch in self.batches(prompts, samples, max_tokens):
            inputs = [{"prompt_token_ids": list(map(int, prompts[i]))} for i in batch]
            for request in self.llm.generate(inputs, options, use_tqdm=False):
                groups.append([self._completion(sampled) for sampled in request.outputs])
        self.rest()
        for i, group in zip(prompt_index, groups, strict=True):
            finite = all(np.isfinite(c.logps).all() for c in group)
            require(finite, f"logits are not finite at prompt {i}")
        return groups

    def _completion(self, sampled) -> Completion:
        """Of vLLM's CompletionOutput; its flat log-probs hold one for each token, that of the token."""
        logps = sampled.logprobs
        assert list(logps.token_ids) == list(sampled.token_ids)
        if sampled.finish_reason not in ("stop", "length"):  # aborted, as on a signal
            safe_point()
            raise RuntimeError(f"vLLM ended a completion with {sampled.finish_reason!r}")
        cut = sampled.finish_reason == "length"
        return Completion(np.array(sampled.token_ids, np.int32), np.array(logps.logprobs, np.float32), cut)

    @torch.inference_mode()
    def check(self, policy: PreTrainedModel, trajectories: "Trajectories", temperature: float) -> None:
        """Compare the log-probs of a few completions with the policy's own, computed in the plainest way.

        Raises:
            BadInput: they differ by more than TOLERANCE in the mean: the engine samples from other weights.
        """
        differences = []
        for m in np.linspace(0, len(trajectories.rewards) - 1, 8).round().astype(int):
            start, length = trajectories.offsets[m], trajectories.prompt_length[m]
            ids = torch.from_numpy(trajectories.tokens[start : trajectories.offsets[m + 1]].astype(np.int64))
            ids = ids.to(policy.device)[None]  # (1, L + C)
            logits = policy(input_ids=ids[:, :-1], use_cache=False).logits[0, length - 1 :]  # (C, V)
            logps = torch.log_softmax(logits.float() / temperature, -1).gather(1, ids[0, length:, None])[:, 0]
            span = slice(*trajectories.logp_offsets[m : m + 2])
            differences.append(np.abs(trajectories.behavior_logps[span] - logps.cpu().numpy()))
        found, allowed = float(np.concatenate(differences).mean()), TOLERANCE[self.dtype]
        require(
            found <= allowed,
            f"vLLM does not sample from the policy: log-probs differ by {found:.2g} in the mean, not {allowed:g}. "
            "Are its weights stale? (Tied embeddings do not follow on a CPU.) --engine hf needs no sync",
        )


TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.05}  # mean |Δ log-prob|; rounding alone: 1e-6 and 0.006 on the toy
_vllm: dict[tuple, VllmEngine] = {}  # the process's engine, by what it cannot change


def pick_engine(engine: str) -> str:
    """hf or vllm; `auto` is vllm where it is installed and CUDA is there.

    Raises:
        BadInput: vLLM is not installed.
    """
    installed = importlib.util.find_spec("vllm") is not None
    require(installed or engine != "vllm", "--engine vllm: vLLM is not installed (see requirements-vllm.txt)")
    return ("vllm" if installed and device().type == "cuda" else "hf") if engine == "auto" else engine


def close_engine() -> None:
    while _vllm:
        _vllm.popitem()[1].close()


def open_engine(
    engine: str,
    folder: Path,
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_tokens: int,
    dtype: torch.dtype,
    gpu_memory: float,
    seed: int,
) -> TransformersEngine | VllmEngine:
    """The engine, with the weights of `folder`, which `policy` has too. vLLM is started once in a process."""
    if pick_engine(engine) == "hf":
        return TransformersEngine(policy, tokenizer, batch_tokens)
    config = policy.config.to_dict() | {"cropi_ancestors": None, "_name_or_path": None, "dtype": None}
    kind = (json.dumps(config, sort_keys=True, default=str), dtype, gpu_memory)
    if kind in _vllm:
        _vllm[kind].load(folder)
    else:
        close_engine()
        shape = policy.config
        head = getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
        _vllm[kind] = VllmEngine(folder, head, dtype, gpu_memory, seed)
    return _vllm[kind]


def pack(sizes: Sequence[tuple[int, int]], samples: int, batch_tokens: int) -> Iterator[list[int]]:
    """Cut groups into batches of at most `batch_tokens` tokens, padding included, or of one group; like sizes together.

    Args:
        sizes: (longest completion, prompt) of each group; it costs its prompt once and the completion `samples` times.
    """
    batch: list[int] = []
    prompt = 0
    for i in sorted(range(len(sizes)), key=sizes.__getitem__):
        prompt = max(prompt, sizes[i][1])
        if batch and (len(batch) + 1) * (prompt + samples * sizes[i][0]) > batch_tokens:
            yield batch
            batch, prompt = [], sizes[i][1]
        batch.append(i)
    if batch:
        yield batch


def pad_left(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids (B, L) and mask (B, L), int64, of sequences that all end in the last column."""
    width = max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :] = torch.tensor(row)
        mask[i, width - len(row) :] = 1
    return ids.to(device), mask.to(device)


def prefill(
    model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor, samples: int
) -> tuple[torch.Tensor, DynamicCache, torch.Tensor, torch.Tensor]:
    """Compute each of P prompts (P, L) once for its K completions.

    Returns:
        logits of the first token (P*K, 1, V), keys and values, mask (P*K, L), position of the first token (P*K, 1).
    """
    positions = (mask.cumsum(1) - 1).clamp(min=0)  # (P, L)
    cache = DynamicCache(config=model.config)
    logits = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    ).logits  # (P, 1, V)
    cache.batch_repeat_interleave(samples)
    logits, mask, position = (x.repeat_interleave(samples, 0) for x in (logits, mask, positions[:, -1:] + 1))
    return logits, cache, mask, position


# ---------------------------------------------------------------------------------------------------------------------
# Trajectories


@dataclass
class Trajectories:
    """What a trajectory file holds (shapes at the head of this file)."""

    tokens: np.ndarray
    offsets: np.ndarray
    prompt_length: np.ndarray
    behavior_logps: np.ndarray
    rewards: np.ndarray
    prompt_index: np.ndarray
    truncated: np.ndarray
    metadata: dict

    def __post_init__(self):
        self.completion_length = np.diff(self.offsets) - self.prompt_length  # (M,)
        self.logp_offsets = np.concatenate([[0], np.cumsum(self.completion_length)])  # (M+1,) into behavior_logps
        starts = np.flatnonzero(np.diff(self.prompt_index, prepend=-1))
        self.bounds = np.append(starts, len(self.prompt_index))  # (N+1,) group n is rows bounds[n]:bounds[n+1]

    def prompt(self, m: int) -> np.ndarray:
        return self.tokens[self.offsets[m] : self.offsets[m] + self.prompt_length[m]]

    def groups(self) -> dict[int, range]:
        """prompt_index -> rows of its K trajectories, which stand side by side."""
        return {int(self.prompt_index[a]): range(a, b) for a, b in itertools.pairwise(self.bounds.tolist())}

    def group_of(self, row: int) -> range:
        """Rows of the whole group that a trajectory belongs to."""
        n = np.searchsorted(self.bounds, row, side="right")
        return range(*self.bounds[n - 1 : n + 1].tolist())

    def live_groups(self) -> dict[int, range]:
        """The groups whose rewards differ. In all others every advantage, so the gradient, is exactly 0."""
        return {i: rows for i, rows in self.groups().items() if np.ptp(self.rewards[rows.start : rows.stop]) > 0}

    def pass_rates(self) -> dict[int, float]:
        """prompt_index -> mean reward of its trajectories."""
        return {i: float(self.rewards[rows.start : rows.stop].mean()) for i, rows in self.groups().items()}


def sample_trajectories(
    engine: TransformersEngine | VllmEngine,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[dict],
    prompt_index: Sequence[int],
    reward: str,
    *,
    policy: PreTrainedModel | None = None,
    prompts: Sequence[Sequence[int]] | None = None,
    verdicts: dict | None = None,
    **sampling,
) -> Trajectories:
    """K verified trajectories for each of N prompts; `rows[n]` has the index `prompt_index[n]`.

    Args:
        policy: what the engine should sample from, for its `check`.
        prompts: token ids, where they are known.
        verdicts: options of `verify`; its counts are the metadata of what is returned.
        sampling: goes to the engine: samples, max_tokens, temperature, seed, progress.
    """
    prompts = encode_prompts(tokenizer, rows) if prompts is None else prompts
    groups = engine.generate(prompts, prompt_index, **sampling)
    samples = sampling["samples"]
    completions = [c for group in groups for c in group]  # (M,)
    texts = tokenizer.batch_decode([c.tokens for c in completions], skip_special_tokens=True)
    prompt_length = np.repeat(np.array([len(p) for p in prompts], np.int32), samples)
    lengths = prompt_length + np.array([len(c.tokens) for c in completions])
    pieces = [piece for p, group in zip(prompts, groups, strict=True) for c in group for piece in (p, c.tokens)]
    trajectories = Trajectories(
        tokens=np.concatenate(pieces).astype(np.int32),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        prompt_length=prompt_length,
        behavior_logps=np.concatenate([c.logps for c in completions]).astype(np.float32),
        rewards=np.zeros(len(completions), np.float32),
        prompt_index=np.repeat(np.asarray(prompt_index, np.int32), samples),
        truncated=np.array([c.truncated for c in completions], np.uint8),
        metadata={},
    )
    if policy is not None:
        engine.check(policy, trajectories, sampling["temperature"])
    rows = [row for row in rows for _ in range(samples)]  # (M,)
    trajectories.rewards, trajectories.metadata = verify(reward, rows, texts, **(verdicts or {}))
    return trajectories


def join_trajectories(parts: Sequence[Trajectories], order: Sequence[int]) -> Trajectories:
    """The groups of several, in the order of the given prompt indices."""
    place = {i: (part, rows) for part in parts for i, rows in part.groups().items()}
    pieces = [place[i] for i in order]

    def gather(name: str, bounds: str | None = None) -> np.ndarray:
        cuts = [
            (getattr(part, bounds)[[rows.start, rows.stop]] if bounds else (rows.start, rows.stop))
            for part, rows in pieces
        ]
        return np.concatenate([getattr(part, name)[a:b] for (part, _), (a, b) in zip(pieces, cuts, strict=True)])

    lengths = np.concatenate([np.diff(part.offsets)[rows.start : rows.stop] for part, rows in pieces])
    return Trajectories(
        tokens=gather("tokens", "offsets"),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        behavior_logps=gather("behavior_logps", "logp_offsets"),
        metadata={name: sum(part.metadata[name] for part in parts) for name in ("errors", "timeouts")},
        **{name: gather(name) for name in ("prompt_length", "rewards", "prompt_index", "truncated")},
    )


TENSORS = ("tokens", "offsets", "prompt_length", "behavior_logps", "rewards", "prompt_index", "truncated")


def open_trajectories(path: Path) -> Trajectories:
    tensors, metadata = open_tensors(path, "trajectories")
    return Trajectories(**tensors, metadata=metadata)


# ---------------------------------------------------------------------------------------------------------------------
# The command

app = new_app()

# Options that other scripts have as well.
Data = Annotated[
    Source, typer.Option(parser=Source, help="jsonl, json, csv, parquet, or NAME[:CONFIG[:SPLIT]] on the Hub.")
]
Limit = Annotated[int | None, typer.Option(min=1, help="Use only the first so many rows of each source.")]
Temperature = Annotated[float, typer.Option(callback=above_zero, help="The policy is softmax(logits / temperature).")]
MaxTokens = Annotated[int, typer.Option(min=1, help="Longest completion, in tokens.")]
MaxPromptTokens = Annotated[
    int | None, typer.Option(min=1, help="Longer prompts are dropped.  [default: what the model has room for]")
]
System = Annotated[str | None, typer.Option(help="System prompt; '' for an empty one.  [default: the template's]")]
Chat = Annotated[bool, typer.Option("--chat/--no-chat", help="Use the model's chat template, where it has one.")]
Reward = Annotated[str, typer.Option(callback=known_reward, help="exact, math, or FILE.py:FUNCTION in TRL's form.")]
RewardSeconds = Annotated[float, typer.Option(callback=above_zero, help="Time limit of a verdict.")]
MaxErrors = Annotated[float, typer.Option(min=0, max=1, help="Stop if a larger share of verdicts fails.")]
Engine = Annotated[
    Literal["auto", "hf", "vllm"], typer.Option(help="auto: vLLM where it is installed and CUDA is there.")
]
GpuMemory = Annotated[float, typer.Option(callback=above_zero, max=1, help="vLLM's share of the memory.")]
Dtype = Annotated[Literal["auto", "float32", "bfloat16"], typer.Option(help="auto: bfloat16 on CUDA, else float32.")]
BatchTokens = Annotated[int, typer.Option(min=1, help="Tokens in a batch, padding included; lower it for memory.")]
Seed = Annotated[int, typer.Option(min=0, help="Of everything random here.")]
SaveEvery = Annotated[float, typer.Option(min=0, help="Seconds after which unfinished work is saved, to go on from.")]


def fitting_prompts(
    source: str,
    encoded: Sequence[Sequence[int]],
    policy: PreTrainedModel,
    max_tokens: int,
    max_prompt_tokens: int | None,
) -> list[int]:
    """Indices of the prompts that have tokens, and not more than the model, or the option, has room for.

    Raises:
        BadInput: there is none.
    """
    limit = getattr(policy.config, "max_position_embeddings", None) or sys.maxsize
    longest = min(limit - max_tokens, max_prompt_tokens or limit)
    fit = [i for i, ids in enumerate(encoded) if 0 < len(ids) <= longest]
    dropped = f"{source}: {len(encoded) - len(fit)} of {len(encoded)} prompts dropped"
    why = f"empty, or longer than {longest} tokens"
    if longest < (max_prompt_tokens or limit):
        why += f" (with --max-tokens {max_tokens} they would exceed the model's {limit})"
    require(bool(fit), f"{dropped}: {why}")
    if len(fit) < len(encoded):
        tqdm.write(f"{dropped}: {why}")
    return fit


@app.command(help=__doc__.splitlines()[0])
def rollout(
    out: Annotated[Path, typer.Option(help="Trajectory file to write.")],
    model: Annotated[Path, typer.Option(help="Model folder, or name on the Hub, of the policy.")] = TOY / "model",
    data: Data = Source(TOY / "train.jsonl"),
    limit: Limit = None,
    samples: Annotated[int, typer.Option(min=1, help="K, completions per prompt.")] = 8,
    temperature: Temperature = 1.0,
    max_tokens: MaxTokens = 8,
    max_prompt_tokens: MaxPromptTokens = None,
    system: System = None,
    chat: Chat = True,
    reward: Reward = "exact",
    reward_seconds: RewardSeconds = 10.0,
    max_errors: MaxErrors = 0.01,
    engine: Engine = "auto",
    gpu_memory: GpuMemory = 0.3,
    dtype: Dtype = "auto",
    batch_tokens: BatchTokens = 16384,
    save_every: SaveEvery = 300.0,
    seed: Seed = 0,
) -> Trajectories:
    settings = settings_of(locals())
    check_out(out, model, Path(data))
    rows = load_prompts(data, limit)
    model, precision = model_folder(model), pick_dtype(dtype)
    policy, tokenizer = load_model(model, precision)
    encoded = encode_prompts(tokenizer, rows, system, chat, data)
    kept = fitting_prompts(data, encoded, policy, max_tokens, max_prompt_tokens)
    sampler = open_engine(
        engine, model, policy, tokenizer, batch_tokens=batch_tokens, dtype=precision, gpu_memory=gpu_memory, seed=seed
    )
    sampling = {"samples": samples, "max_tokens": max_tokens, "temperature": temperature}
    options = sampling | {"reward": reward, "seed": seed}
    made_from = {"model": digest(model), "data": rows.digest, "prompts": len(rows), "options": options}
    work = Unfinished(out, made_from | {"options": settings}, save_every)
    parts = [Trajectories(**tensors, metadata=metadata) for tensors, metadata in work.load("trajectories")]
    batches = sampler.batches([encoded[i] for i in kept], samples, max_tokens)
    done, saved = parts[-1].metadata["batches"] if parts else 0, len(parts)
    bar = tqdm(total=len(kept), desc=f"rollout {out.stem}", unit="prompt", leave=False, disable=None)
    with bar:
        bar.update(sum(map(len, batches[:done])))
        for n, batch in enumerate(batches[done:], done + 1):
            failed = sum(part.metadata["errors"] + part.metadata["timeouts"] for part in parts)
            verdicts = {"seconds": reward_seconds, "allowed": max(1, max_errors * samples * len(kept)) - failed}
            picked = [kept[j] for j in batch]
            parts.append(
                sample_trajectories(
                    sampler,
                    tokenizer,
                    [rows[i] for i in picked],
                    picked,
                    reward,
                    policy=policy,
                    prompts=[encoded[i] for i in picked],
                    verdicts=verdicts,
                    **sampling,
                    seed=[seed, int(rows.digest, 16)],
                )
            )
            bar.update(len(batch))
            if work.due() and n < len(batches):
                part = join_trajectories(parts[saved:], [i for some in parts[saved:] for i in some.groups()])
                part.metadata["batches"] = n
                parts[saved:], saved = [part], saved + 1
                work.save("trajectories", {name: getattr(part, name) for name in TENSORS}, part.metadata)
    trajectories = join_trajectories(parts, kept)
    failed = trajectories.metadata
    trajectories.metadata = made_from | ({"verdicts": failed} if any(failed.values()) else {})
    tensors = {name: getattr(trajectories, name) for name in TENSORS}
    save_tensors(out, "trajectories", tensors, trajectories.metadata)
    work.finish()
    live = len(trajectories.live_groups())
    said = "".join(f", {count} {name}" for name, count in failed.items() if count or reward != "exact")
    tqdm.write(  # prints above the progress bars of whoever called
        f"{out}: {len(kept)} prompts x {samples}, mean reward {trajectories.rewards.mean():.3f}{said}, "
        f"{live} live prompts, {trajectories.truncated.mean():.1%} truncated"
    )
    return trajectories


if __name__ == "__main__":
    command_line(app)
