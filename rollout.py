"""Rollout: sample K completions for every prompt, verify them, and store the trajectories.

    python rollout.py --data toy/train.jsonl --out runs/mine/rollouts/train
    python rollout.py --data toy/test-rev.jsonl --samples 4 --out runs/mine/test-rev   # evaluation: the mean reward
    python rollout.py show runs/mine/test-rev                                          # what the model said
    python rollout.py --retry runs/mine/rollouts/train --model runs/mine/stage-01/model --out runs/mine/again

Reads   a causal language model and a data set, each a local path or the name of one on the Hugging Face Hub.
Writes  a folder of shards, 00000.safetensors, 00001.safetensors ..., each with the K trajectories of its N prompts:

    prompt_index   int32   (N,)    row of the data set
    prompt_length  int32   (N,)    number of tokens of the prompt
    prompt_tokens  int32   (sum,)  the prompts' ids, one prompt after another
    length         int32   (N,K)   |τ_i|, tokens of completion i, the end token included; 0: the group has fewer than K
    tokens         int32   (T,)    the completions' ids as they were sampled, one after another; never re-tokenised
    behavior_logps float32 (T,)    log β(a_it|h_it) of each of these tokens
    rewards        float32 (N,K)   R_i, the verifier's verdict; NaN: the group has fewer than K
    truncated      uint8   (N,K)   1 if max_tokens cut the completion off before its end token

The README has a table of the symbols. This is the first script of five. Each imports from those before it: rollout,
train, project, select, cropi. What all five share (bad input, processes, files) stands at its end; skip that on first
reading, and the section on rewards.

The policy is softmax(logits / temperature) everywhere: here, in the GRPO step and in the influence estimate. There is
no top-p and no top-k, because both would change the ratios π/β in the off-policy gradient (equation 2).

Numbers are float32. On CUDA, rollouts and scoring have bfloat16 weights by default, and training has float32 weights
with bfloat16 products (`--dtype`); log-softmax, advantages, AdamW's moments and sketches stay float32. Attention is
torch's scaled_dot_product_attention ("sdpa"), or its varlen_attn. On CPUs, the same command gives the same bytes with
the same number of threads. On GPUs, `--deterministic` asks torch for algorithms that give the same bytes, too.

Deviations from the paper (and from its released code):
 1. Log-probs of β are stored when they are sampled (released: recomputed by the base model at temperature 1).
 2. An end token that was sampled is always a token of its completion (released: not always).
 3. One temperature, 1 by default (paper: 0.5 for stored trajectories, which the released code scores at 1).

With transformers a completion depends only on model, temperature, seed, data, K, token limit and prompt: not on batch
size, shard size, number of processes or order of the prompts, beyond rounding. vLLM's sampling is not repeatable.
"""

from __future__ import annotations  # the types of the options stand at the end of the file

import ast
import atexit
import functools
import gc
import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import torch
import torch.distributed as dist
import typer
from jinja2 import TemplateError
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_tensors
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

if TYPE_CHECKING:  # imported where they are needed: transformers takes two seconds that `--help` need not wait for
    from pebble import ProcessPool
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# The Hub's library would announce every retry, transformers everything that is refused below in one line.
os.environ |= {"HF_HUB_VERBOSITY": "error", "TRANSFORMERS_VERBOSITY": "error"} | dict(os.environ)
TOY = Path(os.path.relpath(Path(__file__).resolve().parent / "toy"))  # the bundled world: the default paths
Array = np.ndarray
PLAIN: dict[str, Any] = {"add_completion": False, "pretty_exceptions_enable": False, "rich_markup_mode": None}
app = typer.Typer(**PLAIN)


# ---------------------------------------------------------------------------------------------------------------------
# Trajectories


@dataclass
class Trajectories:
    """K trajectories for each of N prompts; the shapes stand at the head of this file."""

    prompt_index: Array
    prompt_length: Array
    prompt_tokens: Array
    length: Array
    tokens: Array
    behavior_logps: Array
    rewards: Array
    truncated: Array
    failed: dict[str, int] = field(default_factory=dict, kw_only=True)  # verdicts that failed: `errors`, `timeouts`

    def __post_init__(self):
        self.samples = self.rewards.shape[1]  # K, the size of the largest group
        self.sizes = np.count_nonzero(self.length, axis=1)  # (N,) size of each group
        self.prompt_offsets = np.concatenate([[0], np.cumsum(self.prompt_length, dtype=np.int64)])  # (N+1,)
        # Trajectory i of prompt n has tokens[offsets[m] : offsets[m+1]], and these log-probs, with m = n*K + i.
        self.offsets = np.concatenate([[0], np.cumsum(self.length, dtype=np.int64)])  # (N*K+1,)

    def tensors(self) -> dict[str, Array]:
        return {name: value for name, value in vars(self).items() if name in TENSORS}

    def prompt(self, n: int) -> Array:
        return self.prompt_tokens[self.prompt_offsets[n] : self.prompt_offsets[n + 1]]

    def span(self, n: int, i: int) -> slice:
        """Place of trajectory i of prompt n in `tokens` and `behavior_logps`."""
        m = n * self.samples + i
        return slice(int(self.offsets[m]), int(self.offsets[m + 1]))

    def live(self) -> Array:
        """The prompts n whose trajectories did not all get the same reward. All other gradients are exactly 0."""
        return np.flatnonzero(np.nanmax(self.rewards, 1) > np.nanmin(self.rewards, 1))

    def failures(self) -> Array:
        """The prompts n with nothing but failures: all rewards are equal, and none is that of a right answer."""
        return np.setdiff1d(np.flatnonzero(~self.right().any(1)), self.live())

    def right(self) -> Array:
        """Is completion i of prompt n right? (N, K) bool."""
        return self.rewards >= RIGHT

    def counts(self) -> dict[str, float]:
        """Facts of a shard that add up over shards. `solved` are the prompts with a right completion (pass@K)."""
        counts = {"trajectories": int(self.sizes.sum()), "tokens": len(self.tokens), "live": len(self.live())}
        counts |= {"solved": int(self.right().any(1).sum()), "failures": len(self.failures())}
        sums = {name: np.nansum(getattr(self, name), dtype=float) for name in ("rewards", "truncated")}
        return counts | sums | self.failed

    def take(self, kept: Array) -> Trajectories:
        """The trajectories of some prompts, in the same order: `kept` holds their places n."""
        prompts = np.isin(np.arange(len(self.length)), kept)  # (N,)
        tokens = np.repeat(prompts, self.length.sum(1))
        of = {"tokens": tokens, "behavior_logps": tokens, "prompt_tokens": np.repeat(prompts, self.prompt_length)}
        return Trajectories(*(getattr(self, name)[of.get(name, prompts)] for name in TENSORS))


RIGHT = 1.0  # the reward of a right answer; custom rewards may be larger
TENSORS = tuple(name for name in Trajectories.__dataclass_fields__ if name != "failed")


def join(parts: Sequence[Trajectories]) -> Trajectories:
    """Trajectories of different prompts, one part after another; the tables (N, K) become as wide as the widest."""

    def wide(part: Trajectories, name: str) -> Array:
        values, absent = getattr(part, name), np.nan if name == "rewards" else 0
        missing = max(other.samples for other in parts) - part.samples
        return np.pad(values, ((0, 0), (0, missing)), constant_values=absent) if values.ndim == 2 else values

    joined = Trajectories(*(np.concatenate([wide(part, name) for part in parts]) for name in TENSORS))
    joined.failed = dict(sum((Counter(part.failed) for part in parts), Counter()))
    return joined


def group_advantages(rewards: Tensor, scale: bool = True) -> Tensor:
    """Â_i = (R_i - mean R) / (std R + 1e-6): (N, K) -> (N, K), for equations 2 and 6. The variance of a group is the
    sum of squared deviations, divided by its size - 1.

    Args:
        rewards: NaN where a group has fewer than K trajectories; Â is 0 there.
        scale: divide by the standard deviation (Dr. GRPO does not).

    >>> group_advantages(torch.tensor([[1.0, 0.0, 0.0, 0.0]]))  # mean 1/4, std 1/2
    tensor([[ 1.5000, -0.5000, -0.5000, -0.5000]])
    """
    sizes = (~rewards.isnan()).sum(1, keepdim=True)
    centered = (rewards - rewards.nanmean(1, keepdim=True)).nan_to_num()
    std = (centered.square().sum(1, keepdim=True) / (sizes - 1).clamp(min=1)).sqrt()
    return centered / (std + 1e-6) if scale else centered


def load_trajectories(path: Path) -> tuple[Trajectories, dict]:
    """The trajectories of one shard, and its record (recipe, facts, identity)."""
    tensors, record = load(path, "trajectories")
    return Trajectories(*(tensors[name] for name in TENSORS)), record


def sample_trajectories(
    engine: TransformersEngine | VllmEngine,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[dict],
    prompts: Sequence[Sequence[int]] | Mapping[int, Sequence[int]],
    picked: Sequence[int],
    o: SimpleNamespace,
    seed: Sequence[int],
    *,
    policy: PreTrainedModel | None = None,
    allowed: float | None = None,
) -> Trajectories:
    """K verified trajectories for each of N rows of the data.

    Args:
        prompts: token ids, `prompts[n]` for `rows[n]`.
        picked: these rows n.
        o: options of `rollout`: samples (K), max_tokens, temperature, reward, reward_seconds.
        seed: with n it determines the random numbers of a row.
        policy: the policy that the engine should sample from, for its `check`.
        allowed: how many verdicts may fail; see `verify`.
    """
    ids, sampling = [prompts[n] for n in picked], {"samples": o.samples, "max_tokens": o.max_tokens, "seed": seed}
    groups = engine.generate(ids, picked, temperature=o.temperature, **sampling) if ids else []
    completions = [c for group in groups for c in group]  # (N*K,)
    trajectories = Trajectories(
        prompt_index=np.array(picked, np.int32),
        prompt_length=np.array([len(p) for p in ids], np.int32),
        prompt_tokens=np.concatenate([*ids, []]).astype(np.int32),
        length=np.array([len(c.tokens) for c in completions], np.int32).reshape(-1, o.samples),  # (N*K,) -> (N, K)
        tokens=np.concatenate([*(c.tokens for c in completions), []]).astype(np.int32),
        behavior_logps=np.concatenate([*(c.logps for c in completions), []]).astype(np.float32),
        rewards=np.zeros((len(ids), o.samples), np.float32),
        truncated=np.array([c.truncated for c in completions], np.uint8).reshape(-1, o.samples),
    )
    if policy is not None and ids:
        engine.check(policy, trajectories, o.temperature)
    texts = tokenizer.batch_decode([c.tokens.tolist() for c in completions], skip_special_tokens=True) if ids else []
    repeated = [rows[n] for n in picked for _ in range(o.samples)]  # (N*K,)
    rewards, trajectories.failed = verify(o.reward, repeated, texts, seconds=o.reward_seconds, allowed=allowed)
    trajectories.rewards[:] = rewards.reshape(-1, o.samples)
    return trajectories


# ---------------------------------------------------------------------------------------------------------------------
# The command


@app.command(help=f"{__doc__.splitlines()[0]} `rollout.py show FOLDER` prints them.")
def rollout(
    out: Given,
    model: Path = TOY / "model",
    data: str = str(TOY / "train.jsonl"),
    limit: MaybeCount = None,
    prompt_column: str | None = None,
    answer_column: str | None = None,
    skip_bad_rows: bool = False,
    retry: Path | None = None,
    samples: Count = 8,
    temperature: Positive = 1.0,
    max_tokens: Count = 8,
    max_prompt_tokens: MaybeCount = None,
    system: str | None = None,
    chat: bool = True,
    reward: Reward = "exact",
    reward_seconds: Positive = 10.0,
    max_errors: Annotated[float, typer.Option(min=0, max=1)] = 0.01,
    engine: Engine = "auto",
    gpu_memory: Share = 0.3,
    dtype: Dtype = "auto",
    deterministic: bool = False,
    batch_tokens: Count = 16384,
    shard: Count = 512,
    seed: Natural = 0,
) -> None:
    """The options are documented here, for all scripts that have them.

    Args:
        out: Folder for the shards.
        model: The policy: a model folder, or a name on the Hub.
        data: jsonl, json, csv, parquet, or NAME[:CONFIG[:SPLIT]] on the Hub.
        limit: Use only the first N rows of each source.
        prompt_column: Column of the prompt: a string, or chat messages.  [default: prompt, problem, question, messages]
        answer_column: Column of the answer.  [default: answer, solution, reward_model.ground_truth]
        skip_bad_rows: Drop rows without prompt or answer.
        retry: Folder of trajectories: sample only prompts that have nothing but failures there, keep the rest.
        samples: K, completions per prompt.
        temperature: The policy is softmax(logits / temperature).
        max_tokens: Longest completion, in tokens.
        max_prompt_tokens: Longer prompts are dropped.  [default: what the model has room for]
        system: System prompt; '' for an empty one.  [default: the template's]
        chat: Use the model's chat template, where it has one.
        reward: exact, math, or FILE.py:FUNCTION in TRL's form.
        reward_seconds: Time limit of a verdict.
        max_errors: Stop if a larger share of verdicts fails.
        engine: auto: vLLM where it is installed and CUDA is there.
        gpu_memory: vLLM's share of the memory.
        dtype: auto: bfloat16 on CUDA, else float32.
        deterministic: Only algorithms that give the same bytes each time, on GPUs, too; slower.
        batch_tokens: Tokens in a batch, padding included; lower it for memory. On CUDA, 8 times as many are sampled.
        shard: Most prompts of a shard; small sets have smaller ones.
        seed: Seed for all random numbers.
    """
    o = SimpleNamespace(**locals())
    rows = load_prompts(data, limit, prompt_column, answer_column, skip_bad_rows)
    o.model = model_folder(model)
    use_deterministic(deterministic)
    check_out(out)
    recipe = make_recipe("trajectories", CODE, vars(o), model=model_identity(o.model), data=rows.digest, retry=None)
    recipes = retry_recipes(recipe, retry) if retry else shard_recipes(recipe, len(rows), shard)
    missing = unmade(out, recipes)
    if missing:
        make_shards(missing, rows, o)
    gather()
    if missing and RANK == 0 and retry:
        sums, before = totals(out), totals(retry)
        won = f"{before['failures'] - sums['failures']} of {before['failures']} prompts with only failures"
        say(f"{out}: {won} have a new group, {before['live']} -> {sums['live']} live prompts")
    elif missing and RANK == 0:
        sums = totals(out)
        mean, cut, solved = (sums[name] / sums["trajectories"] for name in ("rewards", "truncated", "solved"))
        said = f"{sums['trajectories'] // samples} prompts x {samples}, pass@{samples} {solved * samples:.3f}"
        ways = "more than half of the answers were cut off: raise --max-tokens (--set rollout.max_tokens=N)"
        failed = f", {sums['errors']} verdict errors, {sums['timeouts']} timeouts" if reward != "exact" else ""
        failed += f"\nwarning: {ways}" if cut > 0.5 else ""
        say(f"{out}: {said}, mean reward {mean:.3f}, {sums['live']} live prompts, {cut:.1%} truncated{failed}")


def make_shards(missing: dict[Path, dict], rows: Prompts, o: SimpleNamespace) -> None:
    """Sample and write the shards with these recipes; `o` holds the options of `rollout`."""
    clock = time.perf_counter()
    policy, tokenizer = load_model(o.model, pick_dtype(o.dtype))
    encoded = encode_prompts(tokenizer, rows, o.system, o.chat, o.data)
    kept = set(fitting_prompts(o.data, encoded, policy, o.max_tokens, o.max_prompt_tokens))
    engine = open_engine(o, policy, tokenizer)
    allowed, seed = max(1, o.max_errors * o.samples * len(kept)), [o.seed, int(rows.digest, 16)]
    for path, recipe in progress(missing.items(), f"rollout {o.out.name}", "shard"):
        picked = [n for n in range(recipe["shard"]["first"], recipe["shard"]["last"] + 1) if n in kept]
        if o.retry:
            stored = load_trajectories(o.retry / path.name)[0]
            picked = stored.prompt_index[stored.failures()].tolist()
        checks = {"policy": policy, "allowed": allowed}
        trajectories = sample_trajectories(engine, tokenizer, rows, encoded, picked, o, seed, **checks)
        allowed -= sum(trajectories.failed.values())
        sampled = trajectories.rewards.size  # what it cost; the shard may hold more
        trajectories = replace_failures(stored, trajectories) if o.retry else trajectories
        seconds, clock = time.perf_counter() - clock, time.perf_counter()
        made = facts(seconds, model=str(o.model), data=o.data, sampled=sampled, **trajectories.counts())
        save(path, trajectories.tensors(), recipe, made)


def replace_failures(stored: Trajectories, fresh: Trajectories) -> Trajectories:
    """The stored groups. A group with nothing but failures is replaced by the fresh one, if that has anything else. (So
    the fresh groups are no fair sample of the policy: they are kept because of their rewards.)"""
    won = np.setdiff1d(np.arange(len(fresh.sizes)), fresh.failures())
    kept = np.flatnonzero(~np.isin(stored.prompt_index, fresh.prompt_index[won]))
    made = join([stored.take(kept), fresh.take(won)])
    made.failed = fresh.failed
    return made


def retry_recipes(recipe: dict, folder: Path) -> list[dict]:
    """The recipes of the shards that take the place of those in a folder of trajectories.

    Raises:
        BadInput: they are of other data, or were sampled with other options.
    """
    records, free = shards(folder, "trajectories"), dict.fromkeys(("samples", "seed", "engine", "dtype"))
    stored = next(iter(records.values()))["recipe"]
    made, now = ([r["options"] | free, r["inputs"]["data"]] for r in (stored, recipe))
    ways = "--retry needs trajectories of the same data and options"
    require(made == now, f"{folder}: {' and '.join(differences(stored, recipe)[:5])}; {ways}")
    models = {"retry": [stored["inputs"]["model"], *(stored["inputs"]["retry"] or [])]}  # all before
    recipe = recipe | {"inputs": recipe["inputs"] | models}
    return [recipe | {"shard": r["recipe"]["shard"] | {"trajectories": r["identity"]}} for r in records.values()]


showing = typer.Typer(**PLAIN)
# A callback makes `show` a subcommand. `show | head` ends quietly.
showing.callback()(lambda: signal.signal(signal.SIGPIPE, signal.SIG_DFL))


@showing.command(help="Print what a model said: prompts, and completions with reward, advantage Â and tokens.")
def show(
    folder: Annotated[Path, typer.Argument(help="Folder of trajectories that rollout.py wrote.")],
    prompts: Count = 5,
    sort: Literal["reward", "length", "prompt"] = "prompt",
    model: Path | None = None,
) -> None:
    """
    Args:
        prompts: How many prompts.
        sort: Order of the prompts: highest mean reward first, longest completions first, or as in the data.
        model: Model folder with the tokenizer.  [default: the one that sampled]
    """
    from transformers import AutoTokenizer

    records = shards(folder, "trajectories")
    t = join([load_trajectories(path)[0] for path in records])
    advantages, folder = group_advantages(torch.from_numpy(t.rewards)), next(iter(records.values()))["facts"]["model"]
    tokenizer = AutoTokenizer.from_pretrained(model_folder(model or Path(folder)), trust_remote_code=False)
    read = functools.partial(tokenizer.decode, skip_special_tokens=True)
    key = {"reward": -np.nanmean(t.rewards, 1), "length": -t.length.sum(1) / t.sizes, "prompt": t.prompt_index}[sort]
    for n in np.argsort(key, kind="stable")[:prompts]:
        typer.secho(f"prompt {t.prompt_index[n]}: {read(t.prompt(n))}\n  reward      Â  tokens", bold=True)
        for i in range(t.sizes[n]):
            about = f"{t.rewards[n, i]:8.2f} {advantages[n, i]:+6.2f} {t.length[n, i]:7d}  "
            text = read(t.tokens[t.span(n, i)]) + " [truncated]" * int(t.truncated[n, i])
            typer.secho(about + text.replace("\n", "\n" + " " * len(about)), fg="green" if t.right()[n, i] else "red")


# ---------------------------------------------------------------------------------------------------------------------
# Prompts and models


class Prompts(list):
    """Rows of a data set: dictionaries with `prompt` (a string, or chat messages), `answer` (a string) and the other
    columns, for the reward function. `digest` is that of the rows, wherever they came from."""

    digest: str


FILES = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
COLUMNS = {
    "prompt": ("prompt", "problem", "question", "messages"),
    "answer": ("answer", "solution", "reward_model.ground_truth"),
}


def load_prompts(
    source: str | Path,
    limit: int | None = None,
    prompt_column: str | None = None,
    answer_column: str | None = None,
    skip_bad_rows: bool = False,
) -> Prompts:
    """The rows of a data set, or its first `limit`; of several, joined by +, one after another.

    Args:
        source: a local jsonl, json, csv or parquet file, or NAME[:CONFIG[:SPLIT]] on the Hub, SPLIT as `datasets`
            writes it, such as train[:1000]; or several of these, joined by +.
        prompt_column, answer_column: in place of COLUMNS; a.b is entry b of column a.
        skip_bad_rows: drop rows without prompt or answer.
    Raises:
        BadInput: not there, not readable, or a row without prompt or answer.
    """
    rows, source = Prompts(), str(source)
    names = {"prompt": prompt_column, "answer": answer_column}
    names = tuple((column, (name,) if name else COLUMNS[column]) for column, name in names.items())
    for part in [source] if Path(source).exists() else source.split("+"):
        require(bool(part), f"{source!r}: no name of a data set before or after +")
        path = Path(part)
        local = path.suffix in FILES
        require(not local or path.is_file(), f"{path}: no such data file")
        require(local or not path.exists(), f"{path}: not one of {', '.join(FILES)}")
        rows += _load_rows(part, path.stat().st_mtime_ns if local else None, names, skip_bad_rows)[:limit]
    rows.digest = digest(json.dumps(rows, sort_keys=True, default=str))
    return rows


@functools.lru_cache(maxsize=32)  # a run opens its few data sets again and again
def _load_rows(source: str, written: int | None, names: tuple, skip_bad_rows: bool) -> list[dict]:
    try:
        table = _read_json(Path(source)) if FILES.get(Path(source).suffix) == "json" else _read_table(source, names)
    except Exception as error:  # of many kinds, from pyarrow to the network
        reason = str(error.__cause__ or error).strip().partition("\n")[0]
        hint = "; a data set of the Hub is NAME[:CONFIG[:SPLIT]], a local one ends in .jsonl, .csv ..."
        hint = "" if Path(source).suffix in FILES else hint
        raise BadInput(f"{source}: cannot load this data set ({reason}){hint}") from None
    usable = [{column: _usable(row, looked_for, column) for column, looked_for in names} for row in table]
    rows = [row | parts for row, parts in zip(table, usable, strict=True) if all(parts.values())]
    bad = [(number, column) for number, parts in enumerate(usable, 1) for column in parts if not parts[column]]
    if bad and not skip_bad_rows:
        looked = "; ".join(f"{column}: {', '.join(looked_for)}" for column, looked_for in names)
        ways = "--prompt-column and --answer-column name others, --skip-bad-rows drops such rows"
        no = "row {}: no {!r}, or an empty one".format(*bad[0])
        raise BadInput(f"{source}, {no} (looked for {looked}); {ways}")
    require(bool(rows), f"{source}: no prompts in it")
    if bad:
        say(f"{source}: {len(table) - len(rows)} of {len(table)} rows dropped, which lack a prompt or an answer")
    return rows


class _Float(float):
    """A number of a JSON file that keeps its text: 72.50."""

    text: str

    def __new__(cls, text: str) -> _Float:
        number = super().__new__(cls, text)
        number.text = str(text)
        return number

    def __str__(self) -> str:
        return self.text


def _read_json(path: Path) -> list:
    """A list, or one object per line. (If one answer is 72.5, `datasets` would turn 72 into 72.0.)"""
    text, parse, rows = path.read_text("utf-8-sig"), functools.partial(json.loads, parse_float=_Float), []
    if text.lstrip().startswith("["):
        return parse(text)
    for number, line in enumerate(text.split("\n"), 1):
        try:
            rows += [parse(line)] if line.strip() else []
        except ValueError as error:
            raise ValueError(f"line {number} is not JSON: {error}") from None
    return rows


def _read_table(source: str, names: tuple) -> list[dict]:
    import datasets  # here, since it takes a second

    kind = FILES.get(Path(source).suffix)
    (datasets.disable_progress_bars if kind else datasets.enable_progress_bars)()  # a download may take long
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # its errors are in the exception
    if kind:
        text = {name: str for _, looked_for in names for name in looked_for}  # 007 stays 007
        options = {"converters": text} if kind == "csv" else {}
        return datasets.load_dataset(kind, data_files=source, split="train", **options).to_list()
    name, config, split = [*source.split(":", 2), "", ""][:3]  # train[:100] has a colon, too
    return datasets.load_dataset(name, name=config or None, split=split or "train").to_list()


def _usable(row: Any, names: Sequence[str], column: str) -> str | list | None:
    """The prompt or the answer of a row: the first of these columns that has one; None if it cannot be used."""
    value = next((v for v in (_look_up(row, name) for name in names) if v is not None), None)
    if column == "answer":
        return str(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else None
    while _is_chat(value) and value and value[-1]["role"] == "assistant":  # `messages` that end with a solution
        value = value[:-1]
    return value if isinstance(value, str) or _is_chat(value) else None


def _look_up(row: Any, name: str) -> Any:
    """reward_model.ground_truth: the entry of an entry."""
    return functools.reduce(lambda at, key: at.get(key) if isinstance(at, dict) else None, name.split("."), row)


def _is_chat(value: Any) -> bool:
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
        system: system prompt; "" for an empty one, None for the template's default.
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
    encode = functools.partial(tokenizer, add_special_tokens=not template)  # a template adds them itself
    lacking = {c for c in set("".join(texts)) if not c.isspace() and c not in tokenizer.decode(encode(c).input_ids)}
    if lacking:
        count = sum(bool(lacking & set(text)) for text in texts)
        shown = "".join(sorted(lacking)[:20])
        say(f"warning: {source}: the tokenizer lacks {shown!r}, which {count} of {len(texts)} prompts have")
    return encode(texts).input_ids


def fitting_prompts(
    source: str,
    encoded: Sequence[Sequence[int]],
    policy: PreTrainedModel,
    max_tokens: int,
    max_prompt_tokens: int | None,
) -> list[int]:
    """Places of the prompts that have tokens, and fit into the model and the option.

    Raises:
        BadInput: no prompt does.
    """
    limits = [getattr(policy.config, name, None) for name in ROOM]
    limit = min((limit for limit in limits if limit), default=sys.maxsize)
    longest = min(limit - max_tokens, max_prompt_tokens or limit)
    fit = [i for i, ids in enumerate(encoded) if 0 < len(ids) <= longest]
    count = f"{source}: {len(encoded) - len(fit)} of {len(encoded)} prompts dropped"
    why = f"empty, or longer than {longest} tokens (the model's {limit} less --max-tokens {max_tokens}, or the option)"
    shortest = min(map(len, encoded), default=0)
    require(bool(fit), f"{count}: {why}; the shortest has {shortest}")
    if len(fit) < len(encoded):
        say(f"{count}: {why}")
    return fit


ROOM = ("max_position_embeddings", "sliding_window", "window_size", "attention_chunk_size")  # not in train.py's masks


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
    """A causal language model in evaluation mode (dropout off), on the device, with its tokenizer.

    Raises:
        BadInput: no model, one that lacks weights, or one that train.py wrote and that has been changed since.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    require((path / "config.json").is_file(), f"{path}: no model folder here (it has no config.json)")
    model_identity(path, check=True)
    disable_progress_bar()  # one per file read or written
    try:  # weights from safetensors only, and no code that comes with the model: so a model can run nothing
        safe, form = {"trust_remote_code": False}, {"dtype": dtype, "attn_implementation": our_attention()}
        model, report = AutoModelForCausalLM.from_pretrained(
            path, output_loading_info=True, use_safetensors=True, **form, **safe
        )
        tokenizer = AutoTokenizer.from_pretrained(path, **safe)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise BadInput(f"{path}: cannot load this model ({str(error).splitlines()[0]})") from None
    layers = set(getattr(model.config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    kinds = ", ".join(sorted(layers)) or "layers of its own kind"  # train.py puts a prompt and its completions in a row
    plain = not layers and not model._is_stateful and model._supports_attention_backend
    require(plain, f"{path}: this model has {kinds}; only attention is supported")
    require(not report["missing_keys"], f"{path}: the weights lack {', '.join(sorted(report['missing_keys'])[:3])}")
    model.eval().to(device())
    with torch.inference_mode():  # train.py computes logits from the hidden states, some at a time
        token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
        logits = model.get_output_embeddings()(model.base_model(token, use_cache=False).last_hidden_state)
        same = torch.allclose(logits, model(token, use_cache=False).logits)
    require(same, f"{path}: the logits of this model are not the output of its last layer alone; it is not supported")
    return model, tokenizer


@functools.cache
def device() -> torch.device:
    """This process's accelerator, if there is one; said once."""
    if torch.cuda.is_available():
        number = int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count()
        say(f"device: cuda ({torch.cuda.get_device_name(number)})")
        torch.cuda.set_device(number)
        return torch.device("cuda", number)
    kind = "mps" if torch.backends.mps.is_available() else "cpu"
    say(f"device: {kind}")
    return torch.device(kind)


def use_deterministic(wanted: bool) -> None:
    """The option `--deterministic`, for the whole process from now on."""
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch asks for it
        torch.use_deterministic_algorithms(True)


def pick_dtype(dtype: str) -> torch.dtype:
    """float32 or bfloat16; `auto` is bfloat16 on CUDA alone."""
    return getattr(torch, {"cuda": "bfloat16"}.get(device().type, "float32") if dtype == "auto" else dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Verifiable rewards, in TRL's form: reward(prompts, completions, **columns) -> list of floats


def exact(prompts: Sequence, completions: Sequence, answer: Sequence[str], **columns: Any) -> list[float]:
    """1.0 where the completion is the answer, up to surrounding white space."""
    return [float(_text(c).strip() == a.strip()) for c, a in zip(completions, answer, strict=True)]


def math(prompts: Sequence, completions: Sequence, answer: Sequence[str], **columns: Any) -> list[float]:
    """1.0 where the completion's final answer is mathematically equal to that of `answer`.

    The final answer is the content of the last \\boxed{}, or the text after the last `####` (GSM8K). In the column
    `answer` it may also be the whole text. A completion with neither form is wrong.
    """
    return [
        float(same_answer(final_answer(a) or a, final_answer(_text(c))))
        for c, a in zip(completions, answer, strict=True)
    ]


REWARDS: dict[str, Callable[..., list[float]]] = {"exact": exact, "math": math}


def _text(completion: str | list[dict]) -> str:
    return completion if isinstance(completion, str) else completion[-1]["content"]


def final_answer(text: str) -> str | None:
    r"""The content of the last \boxed{}, or else the text after the last `####`; None if there is neither.

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
    return LABEL.sub("", rest, count=1).partition("\n")[0].strip(" *") if marked else None


def same_answer(gold: str, answer: str | None) -> bool:
    """Are the two equal, as text or as mathematics? Texts longer than any answer, and numbers with millions of digits,
    are compared as text only."""
    if answer is None:
        return False
    if max(len(gold), len(answer)) > 300 or HUGE.search(gold + " " + answer):
        return gold.strip() == answer.strip()
    gold, answer = _tidy(gold), _tidy(answer)
    if gold.casefold() == answer.casefold():
        return True
    if NUMBER.fullmatch(gold) and MORE.search(answer):  # math-verify would drop the words
        return False
    import math_verify

    # Its own time limits are signals, which need the main thread. The pool of `workers` has a time limit of ours.
    parsed = [math_verify.parse(rf"\boxed{{{text}}}", parsing_timeout=None) for text in (gold, answer)]
    return math_verify.verify(*parsed, timeout_seconds=None, allow_set_relation_comp=True)  # x > 1 is (1, ∞)


def _tidy(text: str) -> str:
    """Remove a full stop, currency, and units behind a number."""
    text = re.sub(r"(?<!\\)[.,;]+$", "", text.strip())  # the comma of 18\, is a space
    text = PERCENT.sub(r"\%", WRAPPED.sub(r"\1", CURRENCY.sub("", text))).strip()
    unit = UNIT.fullmatch(text)
    return unit[1] if unit and not MORE.search(text) else text


BOX = re.compile(r"\\(?:boxed|fbox)\s*(?=\{|\s\S)")
LABEL = re.compile(r"[\s*]*(?:(?:the\s+)?(?:final\s+)?answer\b(?:\s+is\b)?)?[\s*:]*", re.I)  # The final answer is: 18
HUGE = re.compile(r"\d\s*\^\s*\{?\s*\d+\s*\^|\^\s*\{?\s*\d{5}|(\)|\d{4})\s*!")  # 9^{9^9}, 2^{99999}, (9^9)!
NUMBER = re.compile(r"-?(?:\d{1,3}(?:,\d{3})+|\d*)(?:\.\d+)?")
CURRENCY = re.compile(r"^(?:\\?\$|€|£|¥)\s*|(?:\\?\$|€|£|¥)$")
WRAPPED = re.compile(r"^\\text\{([^{}]*\d[^{}]*)\}$")  # not around words: math-verify takes bare ones for products
PERCENT = re.compile(r"\s*(?:\\text\{\s*percent\s*\}|\bpercent\b)")
UNIT = re.compile(r"(-?(?:\d[\d,]*\.?\d*|\.\d+))(?:\\ |\s|~)*(?:\\text\{[^{}\d]*\}|[A-Za-z][A-Za-z ]+)")  # 18 dollars
# 7 or 8, 9 and a half, 5 thousand, 8 hours 30 minutes
MORE = re.compile(
    r"\b(?:or|half|third|quarter|dozen|hundred|thousand|million|billion)\b"
    r"|\d[\s~]*(?:\\text\{[^{}]*\}|[a-z]{3,}[a-z ]*)[\s~]*\d"
)


@functools.cache
def _load_file(path: str, written: int, name: str) -> Any:
    spec = importlib.util.spec_from_file_location("file_of_the_user", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name, None)


def load_function(text: str, builtin: dict[str, Callable], kind: str) -> Callable:
    """A built-in reward or selector by its name, or FILE.py:FUNCTION, which runs that file.

    Raises:
        BadInput: there is no such function, or the file does not run.
    """
    if text in builtin:
        return builtin[text]
    path, colon, name = text.rpartition(":")
    require(bool(colon), f"no {kind} {text!r}; it is one of {', '.join(builtin)} or FILE.py:FUNCTION")
    require(Path(path).is_file(), f"{kind} {text!r}: no file {path}")
    try:
        function = _load_file(path, Path(path).stat().st_mtime_ns, name)
    except Exception as error:
        raise BadInput(f"{kind} {text!r}: {path} does not run ({type(error).__name__}: {error})") from None
    require(callable(function), f"{kind} {text!r}: {path} has no function {name}")
    return function


def known_reward(reward: str) -> str:
    """Check of the option `--reward`."""
    load_function(reward, REWARDS, "reward")
    return reward


def verify(
    reward: str,
    rows: Sequence[dict],
    completions: Sequence[str],
    *,
    seconds: float = 10.0,
    allowed: float | None = None,
) -> tuple[Array, dict[str, int]]:
    """Rewards of the completions, float32, and counts of the verdicts that failed: `errors` (an exception, a killed
    process) and `timeouts`. A verdict that failed is a reward of 0.

    `exact` is computed here. Other rewards run in processes of their own, one completion at a time, so that a call that
    hangs or crashes costs one verdict.

    Args:
        rows: the data row of each completion.
        seconds: time limit of a verdict.
        allowed: how many may fail.  [default: 1%, and one in any case]
    Raises:
        BadInput: more failed, or the function did not return one finite number.
    """
    counts, last = {"errors": 0, "timeouts": 0}, "a timeout"
    allowed = max(1, 0.01 * len(rows)) if allowed is None else allowed
    if reward == "exact":
        return np.array(exact([], completions, [row["answer"] for row in rows]), np.float32), counts
    verdicts = np.zeros(len(rows), np.float32)
    futures = [
        workers().schedule(_verdict, (reward, *task), timeout=seconds) for task in zip(rows, completions, strict=True)
    ]
    for place, future in enumerate(tqdm(futures, desc="verify", unit="verdict", leave=False, delay=5, disable=None)):
        try:
            values = future.result()
        except Exception as error:  # whatever a reward function may raise; pebble's ProcessExpired where it died
            counts["timeouts" if isinstance(error, TimeoutError) else "errors"] += 1
            last = last if isinstance(error, TimeoutError) else f"{type(error).__name__}: {error}"
            if sum(counts.values()) <= allowed:
                continue
            for left in futures[place + 1 :]:
                left.cancel()
            said = f"{counts['errors']} errors, {counts['timeouts']} timeouts in {place + 1} of {len(rows)} verdicts"
            raise BadInput(f"reward {reward!r}: {said}, more than --max-errors; the last error was {last}") from None
        number = isinstance(values, Sequence) and len(values) == 1 and isinstance(values[0], int | float | np.number)
        wrong = f"reward {reward!r} returned {values!r:.80} for one completion, not a list of one finite number"
        require(bool(number and np.isfinite(values[0])), wrong)
        verdicts[place] = values[0]
    return verdicts, counts


def _verdict(reward: str, row: dict, text: str) -> list[float]:
    """One call of a reward function, on lists of one element."""
    chat = isinstance(row["prompt"], list)  # then TRL passes completions as messages, too
    ours = ("prompt", "prompts", "completions")  # the arguments' names, whatever columns the data has
    columns = {column: [value] for column, value in row.items() if column not in ours}
    completion = [{"role": "assistant", "content": text}] if chat else text
    return load_function(reward, REWARDS, "reward")(prompts=[row["prompt"]], completions=[completion], **columns)


@functools.cache
def workers() -> ProcessPool:
    """Processes that compute verdicts, started once and kept. A process that hangs is killed and replaced."""
    from pebble import ProcessPool

    context = multiprocessing.get_context("forkserver")  # a plain fork would copy CUDA's state and threads' locks
    context.set_forkserver_preload(["__main__", "rollout", "math_verify"])  # imports once what every worker needs
    share = (os.cpu_count() or 1) // HERE  # of this machine's cores
    pool = ProcessPool(max(1, min(8, share)), context=context, initializer=_start_worker)
    atexit.register(lambda: (pool.stop(), pool.join()))
    return pool


def _start_worker() -> None:
    """Import this module and math-verify's grammar, which takes seconds, before the first verdict's clock starts."""
    logging.getLogger("math_verify").setLevel("ERROR")  # it warns that its time limits are off
    same_answer("1", "2")


# ---------------------------------------------------------------------------------------------------------------------
# The engines: `generate` samples, `sync` takes over a policy's weights, `check` compares log-probs with a policy's.


@dataclass
class Completion:
    tokens: Array  # (|τ|,) int32, the end token included
    logps: Array  # (|τ|,) float32, under the tempered policy that sampled it
    truncated: bool


@dataclass
class Sequences:
    """P rows of W tokens, each a prompt and completions of it, as the S sequences that attention computes: each prompt,
    which sees itself, and each completion, which sees [its prompt; itself]."""

    queries: Tensor  # (T,) the tokens, one sequence after another: their places among the P*W
    keys: Tensor  # (U,) the tokens that they see, likewise
    widths: list[tuple[int, int]]  # (S,) numbers of queries and of keys
    ends: Tensor  # (2, S+1) int32: 0 and the sums of these


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    sequences: Sequences | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """sdpa's attention, (rows, heads, W, head size) -> (rows, W, heads, head size). Two things are different.

    On a CPU, heads that share keys and values read the same ones. transformers' own function copies them for each head
    where there is a mask, and sampling takes 1.7 times as long (bench/speed.py).

    In train.py a row holds a prompt and its completions. The mask of a long row would have W² elements, most of them
    empty. So there, long rows are computed sequence by sequence.
    """
    if sequences is not None:
        return sequence_attention(module, query, key, value, sequences, **others), None
    if query.device.type != "cpu":
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, mask, **others)
    options = {"is_causal": mask is None and query.shape[2] > 1, "scale": others["scaling"], "enable_gqa": True}
    return scaled_dot_product_attention(query, key, value, mask, **options).transpose(1, 2), None


def sequence_attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, s: Sequences, **others: Any
) -> Tensor:
    """`attention` of the sequences. bfloat16 on CUDA takes one call for all of them: with a call for each, scoring took
    2.3 and training 3.4 times as long on an H200 (bench/gpu.py; the shape of Qwen2.5-1.5B, 8 completions a prompt)."""
    rows = [x.transpose(1, 2).flatten(0, 1).to(value.dtype) for x in (query, key, value)]  # (P*W, heads, head size)
    q, k, v = (x.index_select(0, places) for x, places in zip(rows, (s.queries, s.keys, s.keys), strict=True))
    few, many = zip(*s.widths, strict=True)
    modern = q.is_cuda and q.dtype == torch.bfloat16 and torch.cuda.get_device_capability(q.device) >= (8, 0)
    if modern and q.shape[2] % 8 == 0 and q.shape[2] <= 256:  # what torch's kernel asks for
        from torch.nn.attention.varlen import varlen_attn

        options = {"scale": others["scaling"], "enable_gqa": True, "window_size": (-1, 0)}  # causal: the last sees all
        output: Any = varlen_attn(q, k, v, s.ends[0], s.ends[1], max(few), max(many), **options)
    else:
        parts = [x.transpose(0, 1)[None].split(widths, 2) for x, widths in ((q, few), (k, many), (v, many))]
        masks = [None if n == m else q.new_ones(n, m, dtype=torch.bool).tril(m - n) for n, m in s.widths]
        output = torch.cat([attention(module, *part, **others)[0][0] for part in zip(*parts, masks, strict=True)])
    filled = torch.zeros_like(rows[0]).index_copy(0, s.queries, output)  # 0 at padding
    return filled.unflatten(0, (len(query), -1))


@functools.cache
def our_attention() -> str:
    """The name by which transformers knows `attention` from now on."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register("cropi", attention)
    AttentionMaskInterface.register("cropi", sdpa_mask)
    return "cropi"


# A batch that is sampled on CUDA has so many times the tokens. A step of many sequences takes as long there as one of
# few, and sampling keeps no activations: on an H200 it was 10 times as fast (bench/gpu.py).
WIDER = 8


class TransformersEngine:
    """Batched sampling with a KV cache, on any causal language model of transformers.

    The prompt is computed once for its K completions, and a sequence that has ended leaves the batch.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_tokens: int = 16384):
        self.model, self.batch_tokens = model, batch_tokens * (WIDER if model.device.type == "cuda" else 1)
        ends = model.generation_config.eos_token_id
        ends = tokenizer.eos_token_id if ends is None else ends
        require(ends is not None, "neither generation_config.json nor the tokenizer names an end token (eos_token)")
        self.end_tokens = torch.tensor(ends, device=model.device).reshape(-1)

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
            prompt_index: each prompt's number; with `seed` it determines the prompt's random numbers.
            max_tokens: longest completion, in tokens, the end token included.
        Raises:
            BadInput: NaN or infinity in the logits.
        """
        groups: list[list[Completion]] = [[] for _ in prompts]
        for batch in pack([samples * (len(p) + max_tokens) for p in prompts], self.batch_tokens):
            indices = [prompt_index[n] for n in batch]
            uniforms = [np.random.default_rng([*seed, i]).random((samples, max_tokens), np.float32) for i in indices]
            completions = self._generate([prompts[n] for n in batch], indices, np.stack(uniforms), temperature)
            for place, n in enumerate(batch):
                groups[n] = completions[place * samples : (place + 1) * samples]
        return groups

    @torch.inference_mode()
    def _generate(
        self, prompts: list[Sequence[int]], prompt_index: list[int], uniforms: Array, temperature: float
    ) -> list[Completion]:
        """Sample one batch: N prompts, uniforms (N, K, max_tokens) in [0, 1), one for each token."""
        from transformers import DynamicCache

        device = self.model.device
        _, samples, max_tokens = uniforms.shape
        random = torch.from_numpy(uniforms).to(device).flatten(0, 1)  # (N, K, max_tokens) -> (N*K, max_tokens)
        ids, mask = pad_left(prompts, device)  # (N, W)
        position, cache = (mask.cumsum(1) - 1).clamp(min=0), DynamicCache(config=self.model.config)
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": position, "past_key_values": cache}
        logits = self.model(**inputs, use_cache=True, logits_to_keep=1).logits  # (N, 1, vocabulary): each prompt once
        cache.batch_repeat_interleave(samples)  # and then K times
        logits, mask, position = (x.repeat_interleave(samples, 0) for x in (logits, mask, position[:, -1:] + 1))
        alive = torch.arange(len(random), device=device)  # row of each sequence that has not ended
        tokens = torch.zeros(random.shape, dtype=torch.int32, device=device)
        logps = torch.zeros(random.shape, device=device)
        length = torch.full((len(random),), max_tokens, device=device)
        truncated = torch.ones(len(random), dtype=torch.bool, device=device)
        for t in range(max_tokens):
            logp = torch.log_softmax(logits[:, -1].float() / temperature, -1)  # (alive, vocabulary)
            cdf = logp.exp().cumsum(-1)
            bad = alive[~torch.isfinite(cdf[:, -1])]
            if len(bad):
                raise BadInput(f"logits are not finite at prompt {prompt_index[int(bad[0]) // samples]}")
            # The inverse of the cumulative distribution at a uniform number: an exact sample, whatever the batch.
            token = torch.searchsorted(cdf, random[alive, t, None] * cdf[:, -1:], right=True)  # (alive, 1)
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

    def check(self, policy: PreTrainedModel, trajectories: Trajectories, temperature: float) -> None:
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
            alone = WORLD == 1 or torch.cuda.device_count() == 1  # vLLM takes the first device that it sees
            require(alone, "vLLM in many processes: each must see its own GPU alone; torchrun --virtual-local-rank")
            torch.cuda.empty_cache()  # vLLM asks for free memory at the start; torch keeps what it has used
        self.llm = LLM(
            model=str(folder),
            dtype=str(dtype).removeprefix("torch."),
            gpu_memory_utilization=memory,
            logprobs_mode="processed_logprobs",  # of the tempered policy that samples
            enable_sleep_mode=self.sleeps,
            enforce_eager=not self.sleeps,  # no CUDA graphs to capture
            seed=seed,
        )
        files, self.proven = map(load_tensors, folder.glob("*.safetensors")), False
        self.exact = set().union(*(self.same(tensors.items()) for tensors in files))  # to compare after a sync
        self.wake(False)

    def wake(self, awake: bool) -> None:
        """On CUDA: weights to the device and room for the KV cache; or weights to the host's memory, the cache away."""
        if self.sleeps and awake and self.llm.llm_engine.is_sleeping():
            torch.cuda.empty_cache()
            self.llm.wake_up()
        elif self.sleeps and not awake:
            self.llm.sleep(level=1)

    def load(self, folder: Path) -> None:
        """Take over the weights in a model folder."""
        self.wake(True)
        self.llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})
        self.llm.reset_prefix_cache()  # keys and values of the weights before

    def sync(self, policy: PreTrainedModel) -> None:
        """Take over the policy's weights, through a checkpoint folder, in shared memory where there is room. The first
        process of each machine writes it; all must call at once."""
        size, memory = policy.num_parameters() * self.dtype.itemsize, Path("/dev/shm")
        fits = memory.is_dir() and shutil.disk_usage(memory).free > 1.1 * size  # in a container it may be 64 MB
        with tempfile.TemporaryDirectory(dir=memory if fits else None) as folder:
            if RANK % HERE == 0:
                # Tied ones once. A copy, since FSDP cannot free what numpy or safetensors have seen.
                weights = {name: w.to("cpu", self.dtype, copy=True) for name, w in policy.named_parameters()}
                policy.save_pretrained(folder, state_dict=weights)
            self.load(Path(gather(folder)[RANK - RANK % HERE]))
            gather()
        if not self.proven:
            stale = self.exact - self.same(policy.named_parameters())
            require(not stale, f"vLLM does not have the policy's weights: {len(stale)} tensors differ; use --engine hf")
            self.proven = True

    def same(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Names of those weights that the engine has to the bit. Some it joins or pads, on a CPU it repacks some."""
        (sums,) = self.llm.collective_rpc("compute_weight_checksums")
        sums = {name.rpartition(":")[2]: value for name, value in sums.items()}  # SHA-256
        rounded = ((name, w.detach().to("cpu", self.dtype, copy=True)) for name, w in weights if name in sums)
        held = ((name, w.flatten().view(torch.uint8).numpy().data) for name, w in rounded)
        return {name for name, data in held if sums[name] == hashlib.sha256(data).hexdigest()}

    def generate(
        self,
        prompts: Sequence,
        prompt_index: Sequence[int],
        *,
        samples: int,
        max_tokens: int,
        temperature: float,
        **_: Any,
    ) -> list[list[Completion]]:
        """As that of TransformersEngine, but for `seed`: vLLM's samples are not repeatable."""
        from vllm import SamplingParams

        self.wake(True)
        options = {"n": samples, "temperature": temperature, "max_tokens": max_tokens, "top_p": 1.0, "top_k": -1}
        options |= {"detokenize": False, "logprobs": 0, "flat_logprobs": True}  # of the sampled tokens alone
        inputs = [{"prompt_token_ids": list(map(int, prompt))} for prompt in prompts]
        groups: list[list[Completion]] = []
        requests = self.llm.generate(inputs, SamplingParams(**options), use_tqdm=False)
        for i, request in zip(prompt_index, requests, strict=True):
            groups.append([])
            for sampled in request.outputs:
                ids, logps = np.array(sampled.token_ids, np.int32), np.array(sampled.logprobs.logprobs, np.float32)
                ended = sampled.finish_reason in ("stop", "length")
                if not ended or list(sampled.logprobs.token_ids) != list(sampled.token_ids):
                    raise RuntimeError(f"vLLM ended a completion with {sampled.finish_reason!r}")
                require(bool(np.isfinite(logps).all()), f"logits are not finite at prompt {i}")
                groups[-1].append(Completion(ids, logps, sampled.finish_reason == "length"))
        self.wake(False)
        return groups

    @torch.inference_mode()
    def check(self, policy: PreTrainedModel, trajectories: Trajectories, temperature: float) -> None:
        """Compare the log-probs of a few completions with the policy's own, computed in the plainest way.

        Raises:
            BadInput: they differ by more than TOLERANCE in the mean: the engine samples from other weights.
        """
        changes = []
        for m in np.linspace(0, trajectories.rewards.size - 1, 8).round().astype(int):
            n, i = divmod(int(m), trajectories.samples)
            prompt, span = trajectories.prompt(n), trajectories.span(n, i)
            ids = torch.from_numpy(np.concatenate([prompt, trajectories.tokens[span]]).astype(np.int64))
            ids = ids.to(policy.device)[None]  # (1, W)
            logits = policy(input_ids=ids[:, :-1], use_cache=False).logits[0, len(prompt) - 1 :]  # (|τ|, vocabulary)
            logps = torch.log_softmax(logits.float() / temperature, -1).gather(1, ids[0, len(prompt) :, None])[:, 0]
            changes.append(np.abs(trajectories.behavior_logps[span] - logps.cpu().numpy()))
        change, allowed = float(np.concatenate(changes).mean()), TOLERANCE[self.dtype]
        stale = f"vLLM does not sample from the policy: log-probs differ by {change:.2g} in the mean, not {allowed:g}"
        ways = "Are its weights stale? (Tied embeddings do not follow on a CPU.) --engine hf needs no sync"
        require(change <= allowed, f"{stale}. {ways}")


TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.05}  # mean |Δ log-prob|; rounding alone: 1e-6 and 0.006 on the toy
_vllm: dict[tuple, VllmEngine] = {}  # the process's engine, by the settings that are fixed when it starts


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
        _vllm.popitem()[1].llm.llm_engine.engine_core.shutdown()  # its process ends, so its memory is free at once


def open_engine(
    o: SimpleNamespace, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> TransformersEngine | VllmEngine:
    """The engine that the options `o` ask for (engine, dtype, batch_tokens, gpu_memory, seed), with the weights of the
    folder `o.model`, which `policy` has too. vLLM is started once in a process."""
    if pick_engine(o.engine) == "hf":
        return TransformersEngine(policy, tokenizer, o.batch_tokens)
    shape, dtype = policy.config, pick_dtype(o.dtype)
    kind = (json.dumps(shape.to_dict() | {"_name_or_path": None, "dtype": None}, default=str), dtype, o.gpu_memory)
    if kind in _vllm:
        _vllm[kind].load(o.model)
    else:
        close_engine()
        head = getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
        _vllm[kind] = VllmEngine(o.model, head, dtype, o.gpu_memory, o.seed)
        atexit.register(close_engine)  # only now: it must run before multiprocessing waits for vLLM's process to end
    _vllm[kind].proven = False  # the first sync of a stage is checked to the bit: for 1.5B weights that takes seconds
    return _vllm[kind]


def pack(sizes: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Sort groups by size and fill batches of at most `batch_tokens` tokens, padding included. A larger group gets a
    batch of its own."""
    batch: list[int] = []
    for i in sorted(range(len(sizes)), key=sizes.__getitem__):
        if batch and (len(batch) + 1) * sizes[i] > batch_tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def pad_left(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids (N, W) and mask (N, W), int64, of N sequences that all end in the last column."""
    ids = [torch.tensor(row, dtype=torch.long) for row in rows]
    pad = functools.partial(pad_sequence, batch_first=True, padding_side="left")
    return pad(ids).to(device), pad([torch.ones_like(row) for row in ids]).to(device)


# ---------------------------------------------------------------------------------------------------------------------
# Shared by all five scripts. Skip this section on first reading.
# ---------------------------------------------------------------------------------------------------------------------
# Bad input


class BadInput(Exception):
    """The user can mend this: one line that names the thing and the way out, exit code 2, nothing overwritten."""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise BadInput(message)


UsageError: Any = typer.BadParameter.__base__


def above_zero(value: float | None) -> float | None:
    """Check of an option, where typer's own `min` would let 0 and nan through."""
    if value is not None and not 0 < value < float("inf"):
        raise typer.BadParameter(f"{value} is not above 0")
    return value


def command_line(app: typer.Typer) -> None:
    """Run a script's command line. Bad input, usage errors too, becomes one line; a bug keeps its traceback."""
    gc.freeze()  # what the imports have made need not be looked through at the end, which takes a second
    command = typer.main.get_command(app)
    for each in [command, *getattr(command, "commands", {}).values()]:
        texts = dict(re.findall(r"^ {8}(\w+): (.*)", f"{rollout.__doc__}\n{each.callback.__doc__}", re.M))
        for option in each.params:
            option.help = getattr(option, "help", None) or texts.get(option.name)
    try:
        with command.make_context(Path(sys.argv[0]).name, sys.argv[1:]) as context:
            command.invoke(context)
        return
    except typer.Exit as ended:  # --help
        sys.exit(ended.exit_code)
    except KeyboardInterrupt:
        message, code = f"interrupted; the same command resumes: {shlex.join(['python', *sys.argv])}", 130
    except UsageError as error:  # unknown and missing options, too
        message, code = f"error: {error.format_message()}", 2
    except BadInput as error:
        message, code = f"error: {error}", 2
    message = " ".join(message.split())  # one line, whatever a library has said
    if told := os.environ.get("TORCHELASTIC_ERROR_FILE"):  # the launcher prints what the first process to fail has said
        Path(told).write_text(json.dumps({"message": message, "timestamp": int(time.time())}))
    else:
        print(message, file=sys.stderr)
    sys.exit(code)


# Types of options; typer takes a bare parameter without a default for an argument
Given = Annotated[Path, typer.Option()]
GivenText = Annotated[str, typer.Option()]
Count = Annotated[int, typer.Option(min=1)]
MaybeCount = Annotated[int | None, typer.Option(min=1)]
Natural = Annotated[int, typer.Option(min=0)]
Positive = Annotated[float, typer.Option(callback=above_zero)]
Weight = Annotated[float, typer.Option(min=0)]
Share = Annotated[float, typer.Option(callback=above_zero, max=1)]
Reward = Annotated[str, typer.Option(callback=known_reward)]
Engine = Literal["auto", "hf", "vllm"]
Dtype = Literal["auto", "float32", "bfloat16"]


# ---------------------------------------------------------------------------------------------------------------------
# Processes, started by torchrun or by cropi.py. A process makes the shards RANK, RANK + WORLD, ... of a folder, and
# takes the prompts RANK, RANK + WORLD, ... of a training step. One process alone is RANK 0 of WORLD 1. If a process
# fails, its launcher stops the others.

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
HERE = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # processes on this machine; their ranks are consecutive


def gather(value: object = None) -> list:
    """The values of all processes, in order of rank. All wait here for the last of them."""
    values = [value] * WORLD
    if WORLD > 1:
        if not dist.is_initialized():
            backend = "cpu:gloo,cuda:nccl" if device().type == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=timedelta(days=30))  # sampling a big shard may take long
            # What FSDP leaves goes first: else one exit in three aborts.
            atexit.register(lambda: (gc.collect(), dist.destroy_process_group()))
        dist.all_gather_object(values, value)
    return values


def say(text: str) -> None:
    """Print once, above the progress bars."""
    if RANK == 0:
        tqdm.write(text)


def progress(items: Iterable, label: str, unit: str, initial: int = 0, total: int | None = None) -> tqdm:
    """A progress bar over the items of this process, on a terminal."""
    total = initial + len(items) if isinstance(items, Sized) else total
    off = True if RANK else None
    return tqdm(items, label, total, initial=initial, unit=unit, leave=False, disable=off)


# ---------------------------------------------------------------------------------------------------------------------
# Files. The one rule: a file that exists is whole, and says what it was made from. So a command goes through the files
# that it should make: one that is there with this recipe is skipped, one with another recipe is refused, the rest are
# made. Nothing else is remembered between commands.
#
# A file's record is {recipe, facts, identity}. The recipe is everything that bears on the tensors; facts (seconds,
# counts, versions) do not. The identity covers recipe and tensors, so a file that is made again is the same file.

FORMAT = "cropi/8"  # raised whenever a formula's result changes
# Results do not depend on these, beyond rounding.
FREE = {"out", "deterministic", "batch_tokens", "gpu_memory", "max_errors", "save_every", "shard", "shard_weights"}


def digest(*parts: str | bytes | memoryview) -> str:
    sha = hashlib.sha256()
    for part in parts:
        sha.update(part.encode() if isinstance(part, str) else part)
    return sha.hexdigest()[:16]


def code_digest(script: str) -> str:
    """Digest of a script's code, comments and docstrings aside."""
    tree = ast.parse(Path(script).read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
            node.body = node.body[1:] or [ast.Pass()]
    return digest(ast.unparse(tree))


CODE = {"rollout": code_digest(__file__)}  # now, not when a file is written: the script may be edited meanwhile


def make_recipe(kind: str, code: dict[str, str], options: dict, **inputs: object) -> dict:
    """What a file is made from: every option that bears on it, given as the `locals()` of its command, defaults
    included and `auto` resolved; and the identities of the inputs, under the names of the options that name them."""
    resolve = {"engine": pick_engine, "dtype": lambda dtype: str(pick_dtype(dtype)), "reward": named_file}
    resolve["selector"] = named_file
    kept = {name: v for name, v in options.items() if name not in FREE | inputs.keys() and not isinstance(v, Path)}
    kept = {name: resolve[name](value) if name in resolve else value for name, value in kept.items()}
    recipe = {"format": FORMAT, "kind": kind, "device": device().type, "code": code, "inputs": inputs, "options": kept}
    return json.loads(json.dumps(recipe))


def named_file(text: str) -> str:
    """FILE.py:FUNCTION by the file's name and digest, wherever it lies."""
    path, colon, function = text.rpartition(":")
    return f"{Path(path).name}:{function} ({digest(Path(path).read_bytes())})" if colon else text


def differences(made: object, now: object, name: str = "") -> list[str]:
    """Where two recipes differ, in words: ["options.lr 5e-05, now 0.0001", "code.train 1f0c, now 77ab"]."""
    if not isinstance(made, dict) or not isinstance(now, dict):
        return [f"{name[1:]} {made}, now {now}"] if made != now else []
    return [text for key in made | now for text in differences(made.get(key), now.get(key), f"{name}.{key}")]


def facts(seconds: float, **others: object) -> dict:
    """How a file was made: what is worth knowing and does not bear on its tensors."""
    name = torch.cuda.get_device_name() if device().type == "cuda" else device().type
    about = {"seconds": seconds, "device": name, "processes": WORLD, "threads": torch.get_num_threads()}
    return about | {"versions": VERSIONS} | others


VERSIONS = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "numpy", "safetensors")}
VERSIONS["python"] = sys.version.partition(" ")[0]


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yields a temporary name, for a file or a folder, which becomes `path` once the block has ended and all is on
    disk. A kill leaves nothing but the folder `.NAME.part`, which the next try empties.

    Raises:
        BadInput: the disk is full, or may not be written to.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        yield part / path.name
        os.umask(mask := os.umask(0))
        for made in part.rglob("*"):
            made.chmod((0o777 if made.is_dir() else 0o666) & ~mask)  # safetensors' own files are for the owner alone
            flush(made)
        os.replace(part / path.name, path)
        flush(path.parent)
    except (OSError, SafetensorError) as error:
        raise BadInput(f"{path}: cannot write it ({error}); make room, or choose another --out") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def flush(path: Path) -> None:
    """Flush a file, or a folder's entries, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def save(path: Path, tensors: dict[str, Array], recipe: dict, facts: dict) -> None:
    """Write a safetensors file with its record, under one metadata key: several would be written in random order."""
    tensors = {name: np.ascontiguousarray(values) for name, values in tensors.items()}
    record = {"recipe": recipe, "facts": facts, "identity": identity(tensors, recipe)}
    with new_file(path) as temporary:
        save_file(tensors, temporary, {"cropi": seal(record)})


def identity(tensors: dict[str, Array], recipe: dict) -> str:
    named = [(name, tensors[name]) for name in sorted(tensors)]
    parts = [part for name, x in named for part in (f"{name} {x.dtype} {x.shape}", x.data)]
    return digest(json.dumps(recipe, sort_keys=True), *parts)


def seal(record: dict) -> str:
    return json.dumps(record | {"checksum": digest(json.dumps(record))})


def peek(path: Path) -> dict:
    """The record of a file, or of a model folder that train.py wrote, without reading its tensors.

    Raises:
        BadInput: missing, not one of our files, of another format, or damaged.
    """
    source = path / "cropi.json" if path.is_dir() else path
    require(source.is_file(), f"{source}: no such file")
    try:
        if path.is_dir():
            text = source.read_text()
        else:
            with safe_open(path, framework="np") as file:  # checks that header and length agree
                text = file.metadata()["cropi"]
        record = json.loads(text)
        version, _ = record.get("recipe", record)["format"], record.pop("checksum", None)
    except (OSError, SafetensorError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise BadInput(f"{source} is damaged, or not one of our files ({error!r}); remove it or name another") from None
    require(version == FORMAT, f"{source} has the format {version}, not {FORMAT}; make it anew in another place")
    require(seal(record) == text, f"{source} {CHANGED}")  # as text: "0.30000000000000004" and "...3" are one number
    return record


CHANGED = "has been changed or damaged; remove it, and the command that made it makes it again"


def load(path: Path, kind: str) -> tuple[dict[str, Array], dict]:
    """The tensors of a file, and its record.

    Raises:
        BadInput: as `peek`; or the file is of another kind, or its tensors have been changed.
    """
    record = peek(path)
    held = record["recipe"]["kind"]
    require(held == kind, f"{path} holds {held}, where {kind} is needed")
    tensors = load_file(path)
    require(identity(tensors, record["recipe"]) == record["identity"], f"{path} {CHANGED}")
    return tensors, record


def is_made(path: Path, recipe: dict) -> bool:
    """Is a file or model folder there, with this recipe? Only the process that would make it may ask.

    Raises:
        BadInput: it is there with another recipe.
    """
    if not path.exists():
        return False
    made = peek(path)["recipe"]
    ways = "choose another --out, or remove it and what was made from it"
    require(made == recipe, f"{path} was made with {' and '.join(differences(made, recipe)[:5])}; {ways}")
    shutil.rmtree(path.with_name(f".{path.name}.part"), ignore_errors=True)  # left if we were killed just after it
    return True


def shard_recipes(recipe: dict, count: int, size: int) -> list[dict]:
    """The recipes of the shards of a set of `count` prompts."""
    size = min(size, max(16, -(-count // 8)))
    firsts = range(0, count, size)
    parts = [{"number": n, "first": first, "last": min(first + size, count) - 1} for n, first in enumerate(firsts)]
    return [recipe | {"shard": part | {"of": len(firsts), "count": count}} for part in parts]


def unmade(out: Path, recipes: list[dict]) -> dict[Path, dict]:
    """The shards of a folder that this process has to make, with their recipes; `recipes` are those of all its shards.

    Raises:
        BadInput: one is there with another recipe.
    """
    mine = {out / f"{recipe['shard']['number']:05d}.safetensors": recipe for recipe in recipes[RANK::WORLD]}
    return {path: recipe for path, recipe in mine.items() if not is_made(path, recipe)}


def shards(folder: Path, kind: str) -> dict[Path, dict]:
    """The shards of a folder, in order, with their records.

    Raises:
        BadInput: some or all are missing; or they are of another kind, or do not belong together.
    """
    records = {path: peek(path) for path in sorted(folder.glob("[0-9]*.safetensors"))}
    require(bool(records), f"{folder}: no {kind} here (a folder of shards, 00000.safetensors ...)")
    first = next(iter(records))
    for path, record in records.items():
        recipe = record["recipe"]
        require(recipe["kind"] == kind, f"{path} holds {recipe['kind']}, where {kind} is needed")
        shard = recipe["shard"]
        together = records[first]["recipe"] | {"shard": shard} == recipe and f"{shard['number']:05d}" == path.stem
        require(together, f"{path} is a shard of something else than {first}; remove it, and it is made again")
    total, ways = shard["of"], "the command that makes them resumes"
    require(len(records) == total, f"{folder}: {len(records)} of {total} shards of {kind} are there; {ways}")
    return records


def totals(*folders: Path) -> Counter:
    """Sums of the numbers among the facts of all shards: seconds, and the counts of trajectories."""
    sums: Counter = Counter()
    for path in [path for folder in folders for path in folder.glob("[0-9]*.safetensors")]:
        sums.update({name: x for name, x in peek(path)["facts"].items() if isinstance(x, int | float)})
    return sums


def check_out(out: Path) -> None:
    """Check before any work that the folder `out` can be written, or made.

    Raises:
        BadInput: it cannot.
    """
    parent = next(path for path in (out, *out.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        raise BadInput(f"{out}: cannot write in {parent} ({error.strerror}); choose another --out") from None


@functools.cache
def _file_digest(path: Path, written: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def file_digests(folder: Path) -> dict[str, str]:
    """Digests of the files of a model folder, read once per process."""
    files = sorted(path for path in folder.glob("[!.]*") if path.is_file() and path.name != "cropi.json")
    return {path.name: _file_digest(path.resolve(), path.stat().st_mtime_ns) for path in files}


def model_identity(folder: Path, check: bool = False) -> str:
    """Identity of a model folder: from its record if train.py wrote it, else the digest of its files.

    Raises:
        BadInput: with `check`, if a file of a model that train.py wrote has been changed.
    """
    if not (folder / "cropi.json").exists():
        return digest(json.dumps(file_digests(folder)))
    record = peek(folder)
    if check:
        now = file_digests(folder)
        changed = [str(folder / name) for name, value in record["files"].items() if now.get(name) != value]
        require(not changed, f"{', '.join(changed)} {CHANGED}")
    return record["identity"]


if __name__ == "__main__":
    command_line(showing if sys.argv[1:2] == ["show"] else app)
