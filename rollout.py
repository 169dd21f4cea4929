"""Rollout: sample K completions for every prompt, verify them, and store the trajectories.

    python rollout.py --data toy/train.jsonl --out runs/mine/rollouts/train.safetensors
    python rollout.py --data toy/test-rev.jsonl --samples 4 --out runs/mine/test-rev.safetensors   # evaluation

Reads   a Hugging Face model folder and a jsonl file with the columns `prompt` and `answer`.
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
order of the prompts, beyond rounding. Evaluation is this script on a test set: accuracy is the mean reward of a
trajectory file.
"""

import hashlib
import json
import os
import shutil
import struct
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import typer
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

logging.disable_progress_bar()  # transformers' own bars, one per file read or written
FORMAT = "cropi/2"  # version of every file that the five scripts write
TOY = Path(os.path.relpath(Path(__file__).resolve().parent / "toy"))  # the bundled world: the default paths


# ---------------------------------------------------------------------------------------------------------------------
# Bad input


class BadInput(Exception):
    """The user can mend this: one line that names the thing and the way out, exit code 2, nothing overwritten."""


def command_line(app: typer.Typer) -> None:
    """Run a script's command line. Bad input, usage errors too, becomes one line; a bug keeps its traceback."""
    command = typer.main.get_command(app)
    usage_error = typer.BadParameter.__base__  # unknown and missing options too
    try:
        with command.make_context(Path(sys.argv[0]).name, sys.argv[1:]) as context:
            command.invoke(context)
        return
    except typer.Exit as done:  # --help
        sys.exit(done.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except usage_error as error:
        message = error.format_message()
    except BadInput as error:
        message = str(error)
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def new_app(**options) -> typer.Typer:
    return typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None, **options)


def above_zero(value: float | None) -> float | None:
    """Check of an option, where typer's own `min` would let 0 through."""
    if value is not None and not value > 0:
        raise typer.BadParameter(f"{value} is not above 0")
    return value


def require(condition: bool, message: str) -> None:
    if not condition:
        raise BadInput(message)


# ---------------------------------------------------------------------------------------------------------------------
# Files: what is written is whole, and says what it was made from


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yields a temporary name beside `path` (file or folder), renamed to `path` if the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    try:
        yield temporary
        if path.is_dir():  # a folder cannot be replaced in one step: move it aside first
            os.replace(path, old)
        os.replace(temporary, path)
        shutil.rmtree(old, ignore_errors=True)  # only now: had the line above failed, it would be the last copy
    finally:
        shutil.rmtree(temporary) if temporary.is_dir() else temporary.unlink(missing_ok=True)


def check_out(out: Path, *inputs: Path | None, model: bool = False) -> None:
    """Before any work: `out` can be written, and nothing else is lost by it.

    Raises:
        BadInput: it is one of the inputs, stands below a file, or is a folder (but for a model that replaces a model).
    """
    require(out.resolve() not in [path.resolve() for path in inputs if path], f"{out} is an input too; choose another")
    require(not out.is_dir() or (model and (out / "config.json").is_file()), f"{out} is a folder; choose another name")
    parent = next(path for path in out.absolute().parents if path.exists())
    require(parent.is_dir(), f"{out}: {parent} is not a folder")


def digest(path: Path) -> str:
    """SHA-256 of a file, or of all files of a model folder."""
    files = [path] if path.is_file() else sorted(f for f in path.glob("[!.]*") if f.is_file())
    sha = hashlib.sha256()
    for file in files:
        with open(file, "rb") as f:
            sha.update(file.name.encode() + hashlib.file_digest(f, "sha256").digest())
    return sha.hexdigest()[:16]


def save_tensors(path: Path, kind: str, tensors: dict[str, np.ndarray], metadata: dict) -> None:
    """Write a safetensors file of one of our kinds."""
    with whole_file(path) as temporary:
        save_file(tensors, temporary, file_metadata(kind, metadata))


def file_metadata(kind: str, metadata: dict) -> dict[str, str]:
    """One entry of JSON: with several, safetensors would write them in another order every time."""
    return {"cropi": json.dumps({"format": FORMAT, "kind": kind} | metadata)}


HEADER_BYTES = 1 << 14
DTYPES = {"F64": np.float64, "F32": np.float32, "I64": np.int64, "I32": np.int32, "U8": np.uint8}  # safetensors' names


@contextmanager
def save_rows(
    path: Path, kind: str, name: str, shape: tuple[int, int], columns: dict[str, np.ndarray], metadata: dict
) -> Iterator[Callable[[np.ndarray], None]]:
    """Stream the rows of one large float32 tensor (N, k) to a safetensors file, so that it never stands in memory.

    Yields a function that takes the next rows (n, k). What the caller puts into `columns` and `metadata` meanwhile is
    written after them. The format is an 8-byte header length, the header (JSON, padded with spaces), then the data.
    """
    names = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
    with whole_file(path) as temporary, open(temporary, "wb") as file:
        file.write(bytes(HEADER_BYTES))
        yield lambda rows: file.write(rows.astype(np.float32).tobytes())
        end = 4 * shape[0] * shape[1]
        header = {name: {"dtype": "F32", "shape": shape, "data_offsets": (0, end)}}
        for column, values in columns.items():
            header[column] = {"dtype": names[values.dtype], "shape": values.shape}
            header[column]["data_offsets"] = (end, end := end + values.nbytes)
            file.write(values.tobytes())
        text = json.dumps({"__metadata__": file_metadata(kind, metadata)} | header).encode()
        assert file.tell() == HEADER_BYTES + end and len(text) <= HEADER_BYTES - 8
        file.seek(0)
        file.write(struct.pack("<Q", HEADER_BYTES - 8) + text.ljust(HEADER_BYTES - 8))


def open_tensors(path: Path, kind: str) -> tuple[dict[str, np.ndarray], dict]:
    """Open one of our files: its tensors, mapped into memory and read from disk as they are sliced, and its metadata.

    Raises:
        BadInput: missing, cut short, not safetensors, of another kind or another format version.
    """
    require(path.is_file(), f"{path}: no such file")
    try:
        with safe_open(path, framework="np") as file:  # checks that header and length agree
            metadata = json.loads((file.metadata() or {}).get("cropi", "{}"))
    except SafetensorError as error:
        raise BadInput(f"{path} is not a whole safetensors file ({error}); write it again") from None
    found = f"{metadata.pop('kind', 'an unknown file')} ({metadata.pop('format', 'no format')})"
    require(found == f"{kind} ({FORMAT})", f"{path} holds {found}, where {kind} ({FORMAT}) is needed")
    with open(path, "rb") as file:
        start = 8 + (length := struct.unpack("<Q", file.read(8))[0])
        header = json.loads(file.read(length))
    tensors = {
        name: np.memmap(path, DTYPES[entry["dtype"]], "r", start + entry["data_offsets"][0], tuple(entry["shape"]))
        for name, entry in header.items()
        if name != "__metadata__"
    }
    return tensors, metadata


# ---------------------------------------------------------------------------------------------------------------------
# Prompts and models


def load_prompts(path: Path) -> list[dict]:
    """Rows of a jsonl file. Each has the strings `prompt` and `answer`; other columns go to the reward function."""
    require(path.is_file(), f"{path}: no such data file")
    rows = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise BadInput(f"{path}, line {number}: not JSON ({error})") from None
        for column in ("prompt", "answer"):
            given = isinstance(row, dict) and isinstance(row.get(column), str) and row[column] != ""
            require(given, f"{path}, line {number}: no {column!r} (a string that is not empty)")
        rows.append(row)
    require(bool(rows), f"{path}: no prompts in it")
    return rows


def load_model(path: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model in float32 and evaluation mode (dropout off), with its tokenizer."""
    require((path / "config.json").is_file(), f"{path}: no model folder here (it has no config.json)")
    try:
        model, found = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, SafetensorError) as error:
        raise BadInput(f"{path}: cannot load this model ({str(error).splitlines()[0]})") from None
    require(not found["missing_keys"], f"{path}: the weights lack {', '.join(sorted(found['missing_keys'])[:3])}")
    return model.eval(), tokenizer


def lineage(model: PreTrainedModel, path: Path) -> list[str]:
    """Digests of this model and of those it was trained from (`train.py` notes them in config.json).

    Trajectories belong to a model if they were sampled by one of these: off-policy, but not foreign.
    """
    return [*getattr(model.config, "cropi_ancestors", []), digest(path)]


# ---------------------------------------------------------------------------------------------------------------------
# Verifiable rewards, in TRL's form: reward(prompts, completions, **columns) -> list of floats


def exact(prompts: Sequence[str], completions: Sequence[str], answer: Sequence[str], **columns) -> list[float]:
    """1.0 where the completion is the answer, up to surrounding white space."""
    return [float(c.strip() == a.strip()) for c, a in zip(completions, answer, strict=True)]


REWARDS: dict[str, Callable[..., list[float]]] = {"exact": exact}


def verify(reward: str, rows: Sequence[dict], completions: Sequence[str]) -> np.ndarray:
    """Rewards (M,) float32 of M completions, `rows[m]` being the data row of completion m.

    Raises:
        BadInput: the reward function returned another number of values, or one that is not finite.
    """
    names = dict.fromkeys(name for row in rows for name in row)
    columns = {name: [row.get(name) for row in rows] for name in names}
    verdicts = np.array(REWARDS[reward](columns.pop("prompt"), completions, **columns), np.float32)
    whole = verdicts.shape == (len(rows),) and np.isfinite(verdicts).all()
    require(whole, f"reward {reward!r} did not return one finite number for each of {len(rows)} completions")
    return verdicts


# ---------------------------------------------------------------------------------------------------------------------
# The engine


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

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        prompt_index: Sequence[int],
        *,
        samples: int,
        max_tokens: int,
        temperature: float,
        seed: Sequence[int],
        progress: str | None = None,
    ) -> list[list[Completion]]:
        """`samples` completions for each of the prompts.

        Args:
            prompts: token ids.
            prompt_index: what each prompt is called; with `seed` it determines the prompt's random numbers.
            max_tokens: longest completion, in tokens, the end token included.
            progress: title of the progress bar, if there is to be one.
        Raises:
            BadInput: a prompt that is empty or too long for the model; NaN or infinity in the logits.
        """
        limit = getattr(self.model.config, "max_position_embeddings", None) or float("inf")
        for i, prompt in zip(prompt_index, prompts, strict=True):
            require(len(prompt) > 0, f"prompt {i} has no tokens for this tokenizer; take it out of the data")
            fits = len(prompt) + max_tokens <= limit
            require(fits, f"prompt {i}: {len(prompt)} tokens and --max-tokens {max_tokens} exceed the model's {limit}")
        done: list[list[Completion]] = [[] for _ in prompts]
        disable = None if progress else True  # None: where output is no terminal
        with tqdm(total=len(prompts), desc=progress, unit="prompt", leave=False, disable=disable) as bar:
            for batch in pack([(len(p) + max_tokens, 0) for p in prompts], samples, self.batch_tokens):
                indices = [prompt_index[i] for i in batch]
                uniforms = [
                    np.random.default_rng([*seed, i]).random((samples, max_tokens), np.float32) for i in indices
                ]
                completions = self._generate([prompts[i] for i in batch], indices, np.stack(uniforms), temperature)
                for j, i in enumerate(batch):
                    done[i] = completions[j * samples : (j + 1) * samples]
                bar.update(len(batch))
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

    def prompt(self, m: int) -> np.ndarray:
        return self.tokens[self.offsets[m] : self.offsets[m] + self.prompt_length[m]]

    def groups(self) -> dict[int, range]:
        """prompt_index -> rows of its K trajectories, which stand side by side."""
        starts = np.flatnonzero(np.diff(self.prompt_index, prepend=-1)).tolist()
        stops = [*starts[1:], len(self.prompt_index)]
        return {int(self.prompt_index[a]): range(a, b) for a, b in zip(starts, stops, strict=True)}

    def live_groups(self) -> dict[int, range]:
        """The groups whose rewards differ. In all others every advantage, so the gradient, is exactly 0."""
        return {i: rows for i, rows in self.groups().items() if np.ptp(self.rewards[rows.start : rows.stop]) > 0}

    def pass_rates(self) -> dict[int, float]:
        """prompt_index -> mean reward of its trajectories."""
        return {i: float(self.rewards[rows.start : rows.stop].mean()) for i, rows in self.groups().items()}


def sample_trajectories(
    engine: TransformersEngine,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[dict],
    prompt_index: Sequence[int],
    reward: str,
    **sampling,
) -> Trajectories:
    """K verified trajectories for each of N prompts; `rows[n]` has the index `prompt_index[n]`.

    `sampling` goes to the engine: samples, max_tokens, temperature, seed, progress.
    """
    prompts = tokenizer([row["prompt"] for row in rows], add_special_tokens=False).input_ids
    groups = engine.generate(prompts, prompt_index, **sampling)
    samples = sampling["samples"]
    completions = [c for group in groups for c in group]  # (M,)
    texts = tokenizer.batch_decode([c.tokens for c in completions], skip_special_tokens=True)
    prompt_length = np.repeat(np.array([len(p) for p in prompts], np.int32), samples)
    lengths = prompt_length + np.array([len(c.tokens) for c in completions])
    pieces = [piece for p, group in zip(prompts, groups, strict=True) for c in group for piece in (p, c.tokens)]
    return Trajectories(
        tokens=np.concatenate(pieces).astype(np.int32),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        prompt_length=prompt_length,
        behavior_logps=np.concatenate([c.logps for c in completions]).astype(np.float32),
        rewards=verify(reward, [row for row in rows for _ in range(samples)], texts),
        prompt_index=np.repeat(np.asarray(prompt_index, np.int32), samples),
        truncated=np.array([c.truncated for c in completions], np.uint8),
        metadata={},
    )


TENSORS = ("tokens", "offsets", "prompt_length", "behavior_logps", "rewards", "prompt_index", "truncated")


def open_trajectories(path: Path) -> Trajectories:
    tensors, metadata = open_tensors(path, "trajectories")
    return Trajectories(**tensors, metadata=metadata)


# ---------------------------------------------------------------------------------------------------------------------
# The command

app = new_app()

# Options that other scripts have as well.
Temperature = Annotated[float, typer.Option(callback=above_zero, help="The policy is softmax(logits / temperature).")]
MaxTokens = Annotated[int, typer.Option(min=1, help="Longest completion, in tokens.")]
Reward = Annotated[Literal[tuple(REWARDS)], typer.Option(help="Verifiable reward.")]
BatchTokens = Annotated[int, typer.Option(min=1, help="Tokens in a batch, padding included; lower it for memory.")]
Seed = Annotated[int, typer.Option(min=0, help="Of everything random here.")]


@app.command(help=__doc__.splitlines()[0])
def rollout(
    out: Annotated[Path, typer.Option(help="Trajectory file to write.")],
    model: Annotated[Path, typer.Option(help="Model folder of the policy that samples.")] = TOY / "model",
    data: Annotated[Path, typer.Option(help="jsonl file with the columns prompt and answer.")] = TOY / "train.jsonl",
    samples: Annotated[int, typer.Option(min=1, help="K, completions per prompt.")] = 8,
    temperature: Temperature = 1.0,
    max_tokens: MaxTokens = 8,
    reward: Reward = "exact",
    batch_tokens: BatchTokens = 16384,
    seed: Seed = 0,
) -> Trajectories:
    check_out(out, model, data)
    rows = load_prompts(data)
    policy, tokenizer = load_model(model)
    data_digest = digest(data)
    options = {"samples": samples, "max_tokens": max_tokens, "temperature": temperature}
    trajectories = sample_trajectories(
        TransformersEngine(policy, tokenizer, batch_tokens),
        tokenizer,
        rows,
        range(len(rows)),
        reward,
        **options,
        seed=[seed, int(data_digest, 16)],
        progress=f"rollout {data.stem}",
    )
    options |= {"reward": reward, "seed": seed}
    trajectories.metadata = {"model": digest(model), "data": data_digest, "prompts": len(rows), "options": options}
    tensors = {name: getattr(trajectories, name) for name in TENSORS}
    save_tensors(out, "trajectories", tensors, trajectories.metadata)
    live = len(trajectories.live_groups())
    tqdm.write(  # prints above the progress bars of whoever called
        f"{out}: {len(rows)} prompts x {samples}, mean reward {trajectories.rewards.mean():.3f}, "
        f"{live} live prompts, {trajectories.truncated.mean():.1%} truncated"
    )
    return trajectories


if __name__ == "__main__":
    command_line(app)
