"""Train: one stage of GRPO on the prompts that a selection file names.

    python train.py --selection runs/mine/stage-01/selection.safetensors --out runs/mine/stage-01

Reads   a model folder, the data, the selection and (from the second stage on) the optimizer state before it.
Writes  into the folder --out:

    model/                   a Hugging Face checkpoint; cropi.json in it holds, among the facts, a line per step
    optimizer/               shards with AdamW's moments, NAME.exp_avg and NAME.exp_avg_sq for every parameter NAME
    metrics.jsonl            the lines once more, for other tools (docs/metrics.md)
    completions.jsonl        for people: of each step the best and the worst completion of a prompt
    checkpoint/STEPS/        every --save-every seconds, until the model is there: weights, moments, lines so far

A step samples K completions for each of B prompts and ascends the objective

    1/(BK) Σ_x Σ_i 1/ℓ_i Σ_t [ min(ρ_it Â_i, clip(ρ_it, 1-ε, 1+ε) Â_i) - c_KL KL_it + c_H H_it ]           (6)

    x     one of the step's B prompts; τ_i one of its K completions; a_it one of its |τ_i| tokens, after history h_it
    ℓ_i   = |τ_i|, the paper's; `--loss` has others
    Â_i   = (R_i - mean R) / (std R + 1e-6)       over the K completions of the prompt; the variance divides by K - 1
    ρ_it  = π_θ(a_it|h_it) / β(a_it|h_it), β being what sampled this step;  ε is `--clip`, above 1 `--clip-high`
    KL_it = u - log u - 1 with u = π_θ0(a_it|h_it) / π_θ(a_it|h_it), Schulman's estimate known as k3;  c_KL is `--kl`
    H_it  = entropy of π_θ(.|h_it);  c_H is `--entropy`

Completions come from the policy itself, or from vLLM (`--engine`), which takes over the policy's weights after every
step. Then its log-probs are compared with the policy's, and a difference stops the run. Weights are float32; with
`--dtype bfloat16`, the default on CUDA, matrix products are autocast.

`project.py` takes the gradient of the first term prompt by prompt, without clipping. So prompts are ranked by this part
of the gradient that training follows. For ablations, `--loss` sets the weight of a token, here and there:

    grpo     ℓ_i = |τ_i|: every completion weighs the same
    dapo     ℓ_i = the mean |τ| of the step's completions: every token weighs the same (Yu et al., 2503.14476)
    dr_grpo  ℓ_i = --max-tokens, and Â_i = R_i - mean R: a token's weight depends neither on the completion's length nor
             on the standard deviation of the rewards (Liu et al., 2503.20783)

Deviations from the paper's RL stage (and from the released code, whose RL is verl's):
 1. Groups whose rewards are all equal cost no forward pass. Their policy gradient is exactly 0; their KL and entropy
    terms are left out. They still count in the mean 1/(BK).
 2. The prompts of a step are drawn from the selection without replacement, anew at each step (no epochs).
 3. Toy defaults: 64 prompts a step (paper: 128), learning rate 5e-5 (paper: 1e-6, for a 1.5B model), 40 steps a stage
    (released code: 10; at equal steps 40 are as accurate here, and scoring is paid less often: docs/results.md).
 4. In a run of cropi.py the KL term's reference is θ_0 in every stage (released: the first policy of each stage).
 5. The loss averages over the tokens of a sequence, then over sequences (released: over all tokens of a batch; on the
    toy the two gradients have a cosine of 0.97). So the released code ranks by another gradient than it trains with.
 6. There AdamW's moments are kept between stages, too (released: reset); its weight decay is 0 (verl: 0.01).
 7. Weights are float32 (released: bfloat16).
 8. The standard deviation of Â has 1e-6 added, here and in project.py (released influence code: 1e-4).
 9. Ratios use the log-probs that the sampling engine reported (verl recomputes them with the trainer).
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import torch
import torch.distributed as dist
import typer
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint

import rollout
from rollout import RANK, TOY, WORLD, Array, BadInput, Count, Natural, Positive, Trajectories, Weight, require

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CODE = rollout.CODE | {"train": rollout.code_digest(__file__)}
app = typer.Typer(**rollout.PLAIN)

# ---------------------------------------------------------------------------------------------------------------------
# The formulas

LossName = Literal["grpo", "dapo", "dr_grpo"]


@dataclass(frozen=True)
class Loss:
    """The weight of a token in the objective (6), and in the gradient of project.py (2).

    Args:
        length: ℓ of dapo and dr_grpo.
        mask_truncated: truncated completions have weight 0, and length 0 in dapo's mean; their rewards stay in the Â
            of the others.
    """

    name: LossName = "grpo"
    length: float = 1.0
    mask_truncated: bool = False

    def weights(self, length: Array, truncated: Array, samples: Array | int) -> Array:
        """1/(Kℓ_i) for the tokens of trajectories of these lengths, in an array of the same shape."""
        return (1 - truncated * self.mask_truncated) / (samples * (length if self.name == "grpo" else self.length))

    def advantages(self, rewards: Array) -> Tensor:
        """Â_i: (N, K) -> (N, K)."""
        return rollout.group_advantages(torch.from_numpy(rewards), scale=self.name != "dr_grpo")


def policy_objective(
    logps: Tensor, behavior_logps: Tensor, advantages: Tensor, clip: float, clip_high: float | None = None
) -> Tensor:
    """min(ρ Â, clip(ρ, 1-ε, 1+ε) Â) per token (6). Its gradient, where nothing is clipped, is ρ Â ∇log π (2).

    Args:
        logps, behavior_logps: (T,) log-probs of the tokens under π_θ and under the policy that sampled them.
        advantages: (T,) Â_i of the trajectory that a token belongs to.
        clip_high: ε of the upper bound.  [default: clip]
    """
    ratio = torch.exp(logps - behavior_logps)
    return torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + (clip_high or clip)) * advantages)


def k3_kl(logps: Tensor, initial_logps: Tensor) -> Tensor:
    """Schulman's low-variance estimate of KL(π_θ ‖ π_θ0) per token: u - log u - 1 >= 0, with u = π_θ0 / π_θ."""
    log_u = initial_logps - logps
    return torch.exp(log_u) - log_u - 1


# ---------------------------------------------------------------------------------------------------------------------
# From trajectories to log-probs

Piece = tuple[int, Sequence[int] | Array]  # a prompt n, and those of its K trajectories i that are computed together


@dataclass
class Batch:
    """P pieces, one to a row of W tokens, padded on the right. A row holds a prompt and some of its completions, one
    after another. Completions do not see each other, so the prompt is computed once for all of them. The last token of
    a completion predicts nothing, so it is no input. The T tokens to predict are in the order of the rows."""

    prompt_index: list[int]  # P
    ids: Tensor  # (P, W)
    position: Tensor  # (P, W) in the token's own sequence
    segment: Tensor  # (P, W) 0 in the prompt, a number of its own in each completion, -1 at padding
    target: Tensor  # (P, C) the tokens to predict
    source: Tensor  # (P, C) the column of the token before it
    valid: Tensor  # (P, C) False at padding; T of them are True
    behavior_logps: Tensor  # (T,)
    advantages: Tensor  # (T,) Â_i of its trajectory
    weight: Tensor  # (T,) 1/(Kℓ_i), K being the size of the whole group
    length: list[int]  # |τ_i| of each trajectory; T in all
    stored: Array  # (T,) place of the token among those of all trajectories


def collate(trajectories: Trajectories, pieces: Sequence[Piece], device: torch.device, loss: Loss = Loss()) -> Batch:
    """Lay the pieces out in rows. A trajectory's advantage is that in its whole group, whatever the piece."""
    groups, samples = [n for n, _ in pieces], trajectories.samples
    m = np.concatenate([n * samples + np.asarray(part) for n, part in pieces])  # (S,) the trajectories, n*K + i
    piece = np.repeat(np.arange(len(pieces)), [len(part) for _, part in pieces])  # (S,) the row of each
    length, sizes = trajectories.length.flatten()[m], trajectories.sizes[groups][piece]  # (S,), K of its group
    fed = length - 1  # (S,) all tokens but the last are inputs
    ahead = np.cumsum(fed) - fed  # (S,) inputs of the trajectories before it, in the batch ...
    ahead -= ahead[np.searchsorted(piece, piece)]  # ... and in its row
    owner = np.repeat(np.arange(len(m)), length)  # (T,) the trajectory of a token
    t = np.arange(len(owner)) - (np.cumsum(length) - length)[owner]  # (T,) its place in there
    stored = trajectories.offsets[m][owner] + t  # (T,)
    row, prompt = piece[owner], trajectories.prompt_length[groups].astype(int)  # (T,), (P,)
    start = prompt[row]  # (T,) the first column behind the prompt
    shape = len(pieces), int((prompt + np.bincount(piece, fed)).max())  # (P, W)
    ids, position, segment = np.zeros(shape, int), np.zeros(shape, int), np.full(shape, -1)
    for p, n in enumerate(groups):
        place = np.s_[p, : prompt[p]]
        ids[place], position[place], segment[place] = trajectories.prompt(n), np.arange(prompt[p]), 0
    inputs = np.flatnonzero(t < fed[owner])  # tokens that are inputs, too
    place = row[inputs], (start + ahead[owner] + t)[inputs]
    ids[place], position[place] = trajectories.tokens[stored[inputs]], (start + t)[inputs]
    segment[place] = 1 + owner[inputs]
    place = row, np.arange(len(owner)) - np.searchsorted(row, row)  # (T,) among the tokens of the piece
    target, source = np.zeros((2, len(pieces), int(place[1].max()) + 1), int)  # (P, C)
    target[place], source[place] = trajectories.tokens[stored], start - 1 + np.where(t > 0, ahead[owner] + t, 0)
    valid = np.zeros(target.shape, bool)
    valid[place] = True
    advantages = loss.advantages(trajectories.rewards[groups])[piece, m % samples]  # (P, K) -> (S,)
    to = functools.partial(torch.as_tensor, device=device)
    return Batch(
        prompt_index=trajectories.prompt_index[groups].tolist(),
        **{"ids": to(ids), "position": to(position), "segment": to(segment)},
        **{"target": to(target), "source": to(source), "valid": to(valid)},
        behavior_logps=to(trajectories.behavior_logps[stored]),
        advantages=advantages[owner].to(device),
        weight=to(loss.weights(length, trajectories.truncated.flatten()[m], sizes)[owner], dtype=torch.float32),
        length=length.tolist(),
        stored=stored,
    )


def halves(rewards: Array) -> list[Array]:
    """Split the trajectories of a group (K,) into two halves with the same rewards, as far as possible. Advantages use
    the mean of the whole group. So a half with more right answers would have another gradient for that reason alone.

    >>> [half.tolist() for half in halves(np.array([1.0, 0.0, 0.0, 1.0]))]
    [[1, 0], [2, 3]]
    """
    order = np.argsort(rewards, kind="stable")[: np.count_nonzero(~np.isnan(rewards))]  # NaN: no trajectory
    one, other = order[::2], order[1::2]  # the second has the higher rewards, if they are not equal
    return [one, other] if one.sum() % 2 else [other, one]  # their numbers toss a fixed coin for which is first


def micro_batches(
    trajectories: Trajectories, prompts: Iterable[int], batch_tokens: int, halved: Array | None = None
) -> Iterator[list[Piece]]:
    """The groups of some prompts n, in batches of at most `batch_tokens` tokens, padding included. A group that is too
    long for a batch is cut, down to single trajectories. On a CPU batches are smaller, unless a group is longer.

    Args:
        halved: (N,) bool, groups that are cut in two in any case.
    """
    pieces: list[Piece] = []
    sizes: list[int] = []
    for n in map(int, prompts):
        prompt, fed = int(trajectories.prompt_length[n]), trajectories.length[n] - 1
        group = np.arange(trajectories.sizes[n])
        for part in halves(trajectories.rewards[n]) if halved is not None and halved[n] else [group]:
            while len(part):
                fitting = max(1, np.searchsorted(np.cumsum(fed[part]), batch_tokens - prompt, side="right"))
                pieces.append((n, part[:fitting]))
                sizes.append(prompt + int(fed[part[:fitting]].sum()))
                part = part[fitting:]
    most = min(batch_tokens, CACHE) if rollout.device().type == "cpu" else batch_tokens
    yield from ([pieces[i] for i in batch] for batch in rollout.pack(sizes, most))


CACHE = 1024  # tokens whose activations stay in a CPU's cache; bench/speed.py tries other sizes
LONG = 256  # in rows of more tokens, attention is computed sequence by sequence


def completion_logps(
    model: PreTrainedModel, batch: Batch, temperature: float, with_entropy: bool = False
) -> tuple[Tensor, Tensor]:
    """Log-probs of the batch's tokens under the tempered policy, (T,), and its entropies, (T,); 0 if not asked for.

    Raises:
        BadInput: NaN or infinity, naming the prompts.
    """
    segment, (rows, width), options = batch.segment, batch.ids.shape, {}
    if width > LONG:
        model.set_attn_implementation(rollout.our_attention())
        options["sequences"] = attention_sequences(segment)
        seen = segment.new_zeros(rows, 0, 0).bool()  # not used
    else:
        before = torch.ones(width, width, dtype=torch.bool, device=segment.device).tril()
        seen = before & ((segment[:, :, None] == segment[:, None]) | (segment[:, None] == 0))  # (P, W, W): query, key
    hidden = model.base_model(
        input_ids=batch.ids, attention_mask=seen[:, None], position_ids=batch.position, use_cache=False, **options
    ).last_hidden_state  # (P, W, hidden)
    hidden = hidden[torch.arange(rows, device=hidden.device)[:, None], batch.source]  # (P, C, hidden)
    # Logits over the vocabulary, some columns at a time: all of them would take more memory than everything else.
    step = max(1, LOGITS // (rows * model.config.vocab_size))
    function = functools.partial(token_logps, model.get_output_embeddings(), temperature, with_entropy)
    if step < hidden.shape[1]:  # then they are computed once more in the backward pass
        function = functools.partial(checkpoint, function, use_reentrant=False, preserve_rng_state=False)
    chunks = map(function, hidden.split(step, 1), batch.target.split(step, 1))
    logps, entropy = (torch.cat(values, 1) for values in zip(*chunks, strict=True))  # (P, C)
    bad = sorted({batch.prompt_index[p] for p in (~torch.isfinite(logps) & batch.valid).nonzero()[:, 0].tolist()})
    require(not bad, f"logits are not finite at prompt {', '.join(map(str, bad))}")
    return logps[batch.valid], entropy[batch.valid]


def attention_sequences(segment: Tensor) -> rollout.Sequences:
    """The prompts and completions in the rows of a batch; `segment` (P, W) is the batch's."""
    queries: list[Array] = []
    keys: list[Array] = []
    for first, row in zip(range(0, segment.numel(), segment.shape[1]), segment.cpu().numpy(), strict=True):
        widths = np.unique(row[row >= 0], return_counts=True)[1]
        prompt, *completions = np.split(first + np.arange(widths.sum()), np.cumsum(widths)[:-1])
        queries += [prompt, *completions]
        keys += [prompt, *(np.concatenate([prompt, completion]) for completion in completions)]
    few, many = list(map(len, queries)), list(map(len, keys))
    ends = np.cumsum([[0, *few], [0, *many]], 1, dtype=np.int32)
    to = functools.partial(torch.as_tensor, device=segment.device)
    places = to(np.concatenate(queries)), to(np.concatenate(keys))
    return rollout.Sequences(*places, list(zip(few, many, strict=True)), to(ends))


def token_logps(
    head: torch.nn.Module, temperature: float, with_entropy: bool, hidden: Tensor, target: Tensor
) -> tuple[Tensor, Tensor]:
    """Log-probs of the tokens that hidden states (P, some of C, hidden) predict, and entropies, (P, some of C)."""
    logits = head(hidden)  # (P, some of C, vocabulary); in float32 from here on
    all_logps = torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature, -1)
    entropy = -(all_logps.exp() * all_logps).sum(-1) if with_entropy else all_logps.new_zeros(target.shape)
    return all_logps.gather(-1, target[..., None])[..., 0], entropy


LOGITS = 1 << 26  # numbers of logits computed at a time, at most


# ---------------------------------------------------------------------------------------------------------------------
# Many processes: each computes its share of a step's prompts. It holds all weights, or a share of each of them (FSDP2).


def decoder_layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The layers that gradient checkpointing and FSDP handle one at a time."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


class LogProbs(torch.nn.Module):
    """`completion_logps` of a model as a module, since FSDP gathers weights while a module's forward runs."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(self, batch: Batch, temperature: float, with_entropy: bool = False) -> tuple[Tensor, Tensor]:
        return completion_logps(self.model, batch, temperature, with_entropy)

    def start(self) -> None:
        """FSDP finds the layers of its root when the root is first called. Sampling calls only the layers."""


def shard_weights(model: PreTrainedModel, precision: torch.dtype) -> LogProbs:
    """Cut each parameter into WORLD shares, one for each process. A layer is put together while it computes, in
    `precision`, and its gradient is summed over the processes, in float32.

    The precision is FSDP's, not autocast's: autocast keeps bfloat16 copies of float32 weights whose memory FSDP reuses,
    and from the second micro-batch on gradients would be wrong.
    """
    root, rounded = LogProbs(model), precision == torch.bfloat16
    policy = MixedPrecisionPolicy(precision, reduce_dtype=torch.float32) if rounded else MixedPrecisionPolicy()
    for layer in [*decoder_layers(model), root]:
        module = fully_shard(layer, mp_policy=policy)
        module.set_gradient_divide_factor(1.0)  # the sum of all processes, not the mean ...
        module.set_force_sum_reduction_for_comms(True)  # ... whatever the backend
    register_fsdp_forward_method(root, "start")
    root.start()
    module.reshard()  # that of the root, which came last
    return root


def make_gradients(root: LogProbs) -> None:
    """Gradients of 0, so that AdamW has a state even if no group is ever live. Those of whole weights lie side by side,
    to be summed over the processes in one call: on the toy, one for each tensor made updates 1.6 times as long."""
    parameters = list(root.parameters())
    if isinstance(root, FSDPModule):
        parts = map(torch.zeros_like, parameters)
    else:
        root.gradient = torch.cat([torch.zeros_like(parameter).flatten() for parameter in parameters])
        parts = root.gradient.split([parameter.numel() for parameter in parameters])
    for parameter, part in zip(parameters, parts, strict=True):
        parameter.grad = part.view_as(parameter)


@contextmanager
def gathered(root: LogProbs) -> Iterator[None]:
    """While the block runs every process has all weights, so that it can sample without the others."""
    layers = [module for module in root.modules() if isinstance(module, FSDPModule)]
    for layer in layers:
        layer.set_reshard_after_forward(False, recurse=False)
        layer.unshard()
    yield
    for layer in layers:
        layer.set_reshard_after_forward(layer is not root, recurse=False)
        layer.reshard()


def owned(tensors: dict[str, Tensor], owner: Callable[[int], int]) -> dict[str, Array]:
    """The tensors that this process owns, whole and in the host's memory. `owner(number)` says which process owns a
    tensor. All processes must call at once."""
    ours = {}
    for number, (name, values) in enumerate(tensors.items()):
        values = values.full_tensor() if isinstance(values, DTensor) else values
        if owner(number) == RANK:
            ours[name] = values.detach().cpu().numpy()
    return ours


def too_large(model: PreTrainedModel, o: SimpleNamespace) -> bool:
    """Should the weights be sharded? `auto`: if weights, gradients and moments, all float32, and the initial policy
    would take more than 0.6 of the device's memory. Activations and sampling need the rest."""
    if o.shard_weights == "auto" and WORLD > 1 and rollout.device().type == "cuda":
        need = (16 + 4 * (o.kl > 0)) * model.num_parameters() / 1e9
        memory = torch.cuda.get_device_properties(rollout.device()).total_memory / 1e9
        large = need > 0.6 * memory
        rollout.say(f"weights, gradients, moments: {need:.1f} GB on a device of {memory:.0f} GB; sharded: {large}")
        return large
    return WORLD > 1 and o.shard_weights == "full"


# ---------------------------------------------------------------------------------------------------------------------
# One step


def grpo_step(
    policy: LogProbs,
    initial: LogProbs | None,
    trajectories: Trajectories,
    *,
    batch: Sequence[int],
    temperature: float,
    clip: float,
    kl: float,
    entropy: float,
    batch_tokens: int,
    loss: Loss = Loss(),
    clip_high: float | None = None,
) -> dict[str, float]:
    """Add the gradient of minus the objective (6) to the parameters' `.grad`, micro-batch by micro-batch.

    Returns this process's part of the objective; sums over the tokens of live groups (the KL, the entropy, ratios
    outside 1 ± ε, |log ρ|, the number of tokens); and the largest |log ρ|.

    A token weighs 1/(BKℓ_i) whichever micro-batch it is in, so their size changes nothing beyond rounding.

    Args:
        trajectories: those of this process.
        batch: the step's B prompts, of all processes; trajectories of other prompts do not count.
    """
    live = np.intersect1d(trajectories.live(), np.flatnonzero(np.isin(trajectories.prompt_index, list(batch))))
    batches, largest = [(1, p) for p in micro_batches(trajectories, live, batch_tokens)], 0.0
    sums: Counter = Counter()
    if isinstance(policy, FSDPModule):  # needs as many passes in every process: those with fewer add some of weight 0
        batches += [(0, [(0, [0])])] * (max(rollout.gather(len(batches))) - len(batches))
    for real, pieces in batches:
        laid = collate(trajectories, pieces, rollout.device(), loss)
        logps, token_entropy = policy(laid, temperature, with_entropy=True)
        value = policy_objective(logps, laid.behavior_logps, laid.advantages, clip, clip_high)
        token_kl = torch.zeros_like(logps)
        if initial is not None:
            with torch.no_grad():
                initial_logps, _ = initial(laid, temperature)
            token_kl = k3_kl(logps, initial_logps)
        value = value + entropy * token_entropy - kl * token_kl
        objective = real * (laid.weight * value).sum() / len(batch)
        (-objective).backward()
        log_ratio = (logps - laid.behavior_logps).detach()
        outside = (ratio := log_ratio.exp()) != ratio.clamp(1 - clip, 1 + (clip_high or clip))
        means = {"kl": token_kl, "entropy": token_entropy, "outside_clip": outside, "log_ratio": log_ratio.abs()}
        sums.update({name: real * values.detach().sum().item() for name, values in means.items()})
        sums.update(objective=objective.item(), live_tokens=real * len(logps))
        largest = max(largest, real * log_ratio.abs().max().item())
    return dict(sums) | {"largest_log_ratio": largest}


DRAWS = 3  # at most, with dynamic sampling


def draw_batch(
    sample: Callable[[Array], Trajectories], order: Array, prompts: int, o: SimpleNamespace
) -> tuple[Trajectories, list[int], Loss, float]:
    """Sample the first B prompts of the order. With dynamic sampling (DAPO), while fewer than B groups are live, sample
    B more, up to 3 B in all; the batch is the live groups, B at most. Every process samples its share.

    Returns this process's trajectories, the batch's prompts, the weights of tokens, and the seconds spent sampling.
    """
    parts, batch, seconds = [], order[:prompts].tolist(), 0.0
    for first in range(0, len(order), prompts):
        start = time.perf_counter()
        parts.append(sample(order[first : first + prompts][RANK::WORLD]))
        seconds += time.perf_counter() - start  # without the wait for other processes
        trajectories = rollout.join(parts)
        if o.dynamic_sampling:
            live = set().union(*rollout.gather(trajectories.prompt_index[trajectories.live()].tolist()))
            batch = [n for n in order.tolist() if n in live][:prompts]
        if len(batch) == prompts:
            break
    loss = Loss(o.loss, o.max_tokens, o.mask_truncated)
    if o.loss == "dapo":
        weights = replace(loss, length=1).weights(trajectories.length, trajectories.truncated, o.samples)
        tokens = trajectories.length * weights  # (N, K), divided by K; 0 where masked
        means = rollout.gather(tokens[np.isin(trajectories.prompt_index, batch)].sum())
        loss = replace(loss, length=(sum(means) or 1) / max(1, len(batch)))
    return trajectories, batch, loss, seconds


def to_read(trajectories: Trajectories, loss: Loss, tokenizer: PreTrainedTokenizerBase, step: int) -> list[dict]:
    """The best and the worst completion of the first live group, for people."""
    n = int([*trajectories.live(), 0][0])
    rewards, read = trajectories.rewards[n], functools.partial(tokenizer.decode, skip_special_tokens=True)
    about = {"step": step, "prompt_index": int(trajectories.prompt_index[n]), "prompt": read(trajectories.prompt(n))}
    advantages = loss.advantages(rewards[None])[0].tolist()
    return [
        about
        | {"text": read(trajectories.tokens[trajectories.span(n, i)]), "reward": float(rewards[i])}
        | {"advantage": advantages[i], "truncated": bool(trajectories.truncated[n, i])}
        for i in (int(rewards.argmax()), int(rewards.argmin()))
    ]


def warn_of_collapse(log: list[dict], patience: int = 10) -> None:
    """Say once when nothing is left to learn from: an entropy near zero, or no live group for `patience` steps."""
    step = f"step {log[-1]['step']}"
    dead = next((n for n, line in enumerate(reversed(log)) if line["live_prompts"]), len(log))  # steps in a row
    if dead == patience:
        rollout.say(f"{step}: no live prompt for {patience} steps; there is nothing to learn from these prompts")
    if [line for line in log if line["live_prompts"] and line["entropy"] < LOW_ENTROPY] == log[-1:]:  # the first one
        rollout.say(f"{step}: entropy below {LOW_ENTROPY:g} nats per token; the policy has all but collapsed")


LOW_ENTROPY = 1e-3


# ---------------------------------------------------------------------------------------------------------------------
# One stage

MOMENTS = ("exp_avg", "exp_avg_sq")


def save_state(folder: Path, tensors: dict[str, Tensor], recipe: dict, facts: dict) -> None:
    """Write a folder with a shard from each process. Process number % WORLD owns a tensor, and no other holds it."""
    ours, path = owned(tensors, lambda number: number % WORLD), folder / f"{RANK:05d}.safetensors"
    if RANK == 0:
        remove(folder)  # left by a killed try
    rollout.gather()
    rollout.save(path, ours, recipe | {"shard": {"number": RANK, "of": WORLD}}, facts)
    rollout.gather()  # now it is whole


def moments_of(policy: PreTrainedModel, adamw: torch.optim.AdamW) -> dict[str, Tensor]:
    """AdamW's moments as NAME.exp_avg and NAME.exp_avg_sq."""
    return {f"{name}.{m}": adamw.state[parameter][m] for name, parameter in policy.named_parameters() for m in MOMENTS}


@torch.no_grad()
def restore(policy: PreTrainedModel, adamw: torch.optim.AdamW, folder: Path, kind: str) -> dict:
    """Load a state of AdamW, and the weights if they are among the tensors; returns its facts. Any number of processes
    may have written it."""
    parameters, records = dict(policy.named_parameters()), rollout.shards(folder, kind)
    for path in records:
        for name, values in rollout.load(path, kind)[0].items():
            owner, _, moment = name.rpartition(".")
            parameter = parameters[owner if moment in MOMENTS else name]
            values = torch.from_numpy(values).to(parameter.device)
            if isinstance(parameter, DTensor):  # each process takes its share, without communication
                values = distribute_tensor(values, parameter.device_mesh, parameter.placements, src_data_rank=None)
            if moment in MOMENTS:
                adamw.state[parameter][moment] = values
            else:
                parameter.copy_(values)
    facts = next(iter(records.values()))["facts"]
    for parameter in parameters.values():  # the count of steps as a fused AdamW wants it
        adamw.state[parameter]["step"] = torch.tensor(float(facts["adam_steps"]), device=parameter.device)
    return facts


def load_policies(o: SimpleNamespace) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, LogProbs, LogProbs | None]:
    """The policy, its tokenizer, and the modules that compute log-probs of the policy and of the initial policy."""
    policy, tokenizer = rollout.load_model(o.model)  # float32: steps of 1e-6 would vanish in bfloat16
    cut = functools.partial(shard_weights, precision=rollout.pick_dtype(o.dtype)) if too_large(policy, o) else LogProbs
    # The initial policy is float32, too: rounding to bfloat16 moves log-probs by more than training does at first.
    root, initial = cut(policy), cut(rollout.load_model(o.initial_model)[0].requires_grad_(False)) if o.kl else None
    return policy, tokenizer, root, initial


def run_stage(out: Path, recipe: dict, o: SimpleNamespace, rows: rollout.Prompts, chosen: Array) -> None:
    """Train on the chosen rows, from the checkpoint if there is one, and write the model and its optimizer. `o` holds
    the options of `train`."""
    clock, _ = time.perf_counter(), rollout.gather()  # the wait for other processes counts
    policy, tokenizer, root, initial = load_policies(o)
    encoded = rollout.encode_prompts(tokenizer, [rows[n] for n in chosen], o.system, o.chat, o.data)
    kept = rollout.fitting_prompts(str(o.selection), encoded, policy, o.max_tokens, o.max_prompt_tokens)
    prompt_ids = {int(chosen[place]): encoded[place] for place in kept}
    prompts = min(o.batch_prompts, len(prompt_ids))  # B
    require(prompts >= WORLD, f"{prompts} prompts a step for {WORLD} processes; start {max(1, prompts)} or fewer")
    if len(kept) < o.batch_prompts / 4:
        rollout.say(f"warning: {len(kept)} prompts are chosen, and a batch has room for {o.batch_prompts}")
    adamw = torch.optim.AdamW(policy.parameters(), lr=o.lr, weight_decay=0.0, fused=True)
    random = np.random.default_rng(o.seed)
    facts: dict[str, Any] = {"adam_steps": 0, "log": [], "completions": [], "seconds": 0.0}
    unfinished = recipe | {"kind": "checkpoint"}
    if begun := last_checkpoint(out / "checkpoint", unfinished):
        facts = restore(policy, adamw, begun, "checkpoint")
        random.bit_generator.state = facts["random"]
        rollout.say(f"{begun}: resuming after step {len(facts['log'])} of {o.steps}")
    elif o.optimizer:
        facts["adam_steps"] = restore(policy, adamw, o.optimizer, "optimizer")["adam_steps"]
    make_gradients(root)
    engine = rollout.open_engine(o, policy, tokenizer)
    if o.gradient_checkpointing:
        policy.gradient_checkpointing_enable({"use_reentrant": False})
    log, saved, allowed = facts["log"], time.monotonic(), max(1, o.max_errors * o.samples * o.batch_prompts)
    bar = rollout.progress(range(len(log), o.steps), "train", "step", len(log))
    for step in bar:
        most = min(len(prompt_ids), prompts * (DRAWS if o.dynamic_sampling else 1))
        order = random.choice(list(prompt_ids), most, replace=False)
        with named(f"step {step}"):
            start, seed = time.perf_counter(), [o.seed, step]
            with gathered(root), autocast(root, o.dtype):
                if step:  # at step 0 the engine has the weights of the folder
                    engine.sync(policy)
                how = {"o": o, "seed": seed, "policy": policy, "allowed": allowed}
                sample = functools.partial(rollout.sample_trajectories, engine, tokenizer, rows, prompt_ids, **how)
                trajectories, batch, loss, sampling = draw_batch(sample, order, prompts, o)
            sampled = time.perf_counter() - start
            counts = update(root, initial, adamw, trajectories, o, batch, loss)
        counts |= {"seconds_rollout": sampled, "sampling": sampling, "save": time.monotonic() - saved >= o.save_every}
        each = rollout.gather(counts)
        log.append({"step": step, "prompts": len(batch)} | metrics(each))
        facts["completions"] += to_read(trajectories, loss, tokenizer, step)
        bar.set_postfix(reward=f"{log[-1]['reward']:.2f}")
        warn_of_collapse(log)
        facts["adam_steps"] += o.iterations
        facts["seconds"], clock = facts["seconds"] + time.perf_counter() - clock, time.perf_counter()
        if step + 1 < o.steps and each[0]["save"]:
            state = dict(policy.named_parameters()) | moments_of(policy, adamw)
            about = facts | {"random": random.bit_generator.state}
            save_state(out / f"checkpoint/{len(log):05d}", state, unfinished, about)
            saved = time.monotonic()  # from the end of the save: a slow disk must not take all the time
            for old in sorted((out / "checkpoint").iterdir())[:-1] if RANK == 0 else ():
                remove(old)
    save_stage(out, recipe, o, policy, tokenizer, adamw, facts)
    rewards = [log[step]["reward"] for step in (0, -1)]
    rollout.say(f"{out}/model: {o.steps} steps on {len(kept)} prompts, reward {rewards[0]:.3f} -> {rewards[1]:.3f}")


def save_stage(
    out: Path,
    recipe: dict,
    o: SimpleNamespace,
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    adamw: torch.optim.AdamW,
    facts: dict,
) -> None:
    """The model, by process 0, and the optimizer state. The model comes last: then the stage is trained."""
    weights, identity = owned(dict(policy.named_parameters()), lambda number: 0), None
    with rollout.new_file(out / "model") if RANK == 0 else nullcontext() as temporary:
        if temporary:
            policy.save_pretrained(temporary, state_dict={name: torch.from_numpy(x) for name, x in weights.items()})
            tokenizer.save_pretrained(temporary)
            kept = {name: facts[name] for name in ("log", "completions")}
            about = kept | {"ancestors": lineage(o.model), "model": str(o.model), "data": o.data}
            identity = write_record(temporary, recipe, rollout.facts(facts["seconds"], **about))
        about = {"model": rollout.gather(identity)[0], "adam_steps": facts["adam_steps"]}
        save_state(out / "optimizer", moments_of(policy, adamw), recipe | {"kind": "optimizer"}, about)


def last_checkpoint(folder: Path, recipe: dict) -> Path | None:
    """The newest checkpoint of a stage in which no shard is missing. Any number of processes may have written it.

    Raises:
        BadInput: it is a checkpoint of another stage, or damaged.
    """
    for saved in sorted(folder.glob("[0-9]*"), reverse=True):
        paths = sorted(saved.glob("[0-9]*.safetensors"))
        shard = rollout.peek(paths[0])["recipe"]["shard"] if paths else {"of": 1}
        if len(paths) == shard["of"]:
            rollout.is_made(paths[0], recipe | {"shard": shard})
            return saved
    return None


def autocast(root: LogProbs, dtype: str) -> torch.autocast:
    """Enter it anew for every use: until it is left, it keeps its bfloat16 copies of the weights. Copies made while
    sampling would carry no gradient, and copies made before an update would be stale. Sharded weights need none."""
    precision = rollout.pick_dtype(dtype)
    off = precision == torch.float32 or isinstance(root, FSDPModule)
    return torch.autocast(rollout.device().type, precision, enabled=not off)


def update(
    root: LogProbs,
    initial: LogProbs | None,
    adamw: torch.optim.AdamW,
    trajectories: Trajectories,
    o: SimpleNamespace,
    batch: Sequence[int],
    loss: Loss = Loss(),
) -> dict:
    """Ascend the objective on a step's batch of prompts; each process has the trajectories of some. Returns what
    `metrics` needs.

    Raises:
        BadInput: NaN or infinity in the gradient.
    """
    clock, busy = time.perf_counter(), 0.0
    first: dict[str, float] = {}
    options = {name: getattr(o, name) for name in ("temperature", "clip", "clip_high", "kl", "entropy", "batch_tokens")}
    for _ in range(o.iterations):
        adamw.zero_grad(set_to_none=False)
        layers = decoder_layers(root)
        for layer in layers:  # checkpointing asks for this flag; modules inside would take it for dropout
            layer.training = o.gradient_checkpointing
        start = time.perf_counter()
        with autocast(root, o.dtype):
            sums = grpo_step(root, initial, trajectories, batch=batch, loss=loss, **options)
        first = first or sums
        busy += time.perf_counter() - start
        for layer in layers:
            layer.training = False
        if WORLD > 1 and not isinstance(root, FSDPModule):
            dist.all_reduce(root.gradient)  # the sum
        norm = torch.nn.utils.clip_grad_norm_(root.parameters(), o.max_grad_norm).item()
        require(np.isfinite(norm), f"gradient is not finite at prompts {sorted(trajectories.prompt_index.tolist())}")
        adamw.step()
    groups = {name: getattr(trajectories, name) for name in ("rewards", "length", "truncated")}
    counts = {"sums": sums | {"log_ratio": first.get("log_ratio", 0.0)} | trajectories.failed, "grad_norm": norm}
    counts["largest_log_ratio"] = first["largest_log_ratio"]  # before the first update: engine against trainer
    return counts | groups | {"seconds_update": time.perf_counter() - clock, "seconds_busy": busy}


def metrics(each: list[dict]) -> dict[str, float | None]:
    """A line of the log, from each process's part of a step; docs/metrics.md explains the names."""
    sums: Counter = Counter()
    busy = [known["sampling"] + known["seconds_busy"] for known in each]
    for known in each:
        sums.update(known["sums"])
    names = ("rewards", "length", "truncated")
    rewards, length, truncated = (np.concatenate([known[name] for known in each]) for name in names)  # (N, K) each
    right, tokens = rewards >= rollout.RIGHT, max(1, sums["live_tokens"])
    return {
        **{"reward": rewards.mean(dtype=float), "reward_std": rewards.std(dtype=float)},
        "live_prompts": int(np.count_nonzero(np.ptp(rewards, axis=1))),
        **{"all_right": right.all(1).mean(), "all_wrong": (~right).all(1).mean()},
        **{"trajectories": rewards.size, "truncated": truncated.mean(), "completion_tokens": int(length.sum())},
        **{"length": length.mean(), "length_min": int(length.min()), "length_max": int(length.max())},
        "length_right": length[right].mean() if right.any() else None,
        "length_wrong": length[~right].mean() if not right.all() else None,
        **{"reward_errors": sums["errors"], "reward_timeouts": sums["timeouts"], "objective": sums["objective"]},
        **{name: sums[name] / tokens for name in ("kl", "entropy", "outside_clip", "log_ratio")},
        "largest_log_ratio": max(known["largest_log_ratio"] for known in each),
        **{name: each[0][name] for name in ("grad_norm", "seconds_rollout", "seconds_update")},
        "imbalance": max(busy) / (sum(busy) / len(each)),
    }


# ---------------------------------------------------------------------------------------------------------------------
# Files, and which model belongs to which


@contextmanager
def named(what: str) -> Iterator[None]:
    """Put `what` before the message of bad input that comes up in the block."""
    try:
        yield
    except BadInput as error:
        raise BadInput(f"{what}: {error}") from None


def lineage(folder: Path) -> list[str]:
    """Identities of a model and of those it was trained from. Trajectories belong to a model if one of these sampled
    them: then they are off-policy, but not foreign."""
    ancestors = rollout.peek(folder)["facts"]["ancestors"] if (folder / "cropi.json").exists() else []
    return [*ancestors, rollout.model_identity(folder)]


def write_record(folder: Path, recipe: dict, facts: dict) -> str:
    """Write cropi.json, the record of a model folder, with the digests of its files; returns the identity."""
    files = rollout.file_digests(folder)
    identity = rollout.digest(json.dumps([recipe, files]))
    record = {"recipe": recipe, "facts": facts, "identity": identity, "files": files}
    (folder / "cropi.json").write_text(rollout.seal(record))
    return identity


def remove(folder: Path) -> None:
    """Delete a folder atomically: rename it first, so that a crash never leaves half of it. Also delete what a killed
    try to write it has left."""
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    with suppress(FileNotFoundError):
        os.replace(folder, part)
    shutil.rmtree(part, ignore_errors=True)


# ---------------------------------------------------------------------------------------------------------------------
# The command


@app.command(help=__doc__.splitlines()[0])
def train(
    selection: rollout.Given,
    out: rollout.Given,
    model: Path = TOY / "model",
    initial_model: Path | None = None,
    optimizer: Path | None = None,
    data: str = str(TOY / "train.jsonl"),
    steps: Count = 40,
    batch_prompts: Count = 64,
    samples: Annotated[int, typer.Option(min=2)] = 8,
    limit: rollout.MaybeCount = None,
    prompt_column: str | None = None,
    answer_column: str | None = None,
    skip_bad_rows: bool = False,
    iterations: Count = 1,
    lr: Positive = 5e-5,
    max_grad_norm: Positive = 1.0,
    loss: LossName = "grpo",
    clip: Positive = 0.2,
    clip_high: Annotated[float | None, typer.Option(callback=rollout.above_zero)] = None,
    mask_truncated: bool = False,
    dynamic_sampling: bool = False,
    kl: Weight = 0.001,
    entropy: Weight = 0.001,
    temperature: Positive = 1.0,
    max_tokens: Count = 8,
    max_prompt_tokens: rollout.MaybeCount = None,
    system: str | None = None,
    chat: bool = True,
    reward: rollout.Reward = "exact",
    reward_seconds: Positive = 10.0,
    max_errors: Annotated[float, typer.Option(min=0, max=1)] = 0.01,
    engine: rollout.Engine = "auto",
    gpu_memory: rollout.Share = 0.3,
    dtype: rollout.Dtype = "auto",
    deterministic: bool = False,
    gradient_checkpointing: bool = False,
    batch_tokens: Count = 16384,
    save_every: Weight = 300.0,
    shard_weights: Literal["auto", "none", "full"] = "auto",
    seed: Natural = 0,
) -> None:
    """Options that rollout.py has as well are documented there.

    Args:
        selection: Selection file that select.py wrote.
        out: Folder for model/, optimizer/ and metrics.jsonl.
        model: Model folder to start from.
        initial_model: Initial policy, for KL.  [default: --model]
        optimizer: Folder of the optimizer state to start from.  [default: fresh]
        steps: Training steps, each with a batch of rollouts of its own.
        batch_prompts: B, prompts per step.
        iterations: Updates per batch of rollouts (μ in the GRPO paper).
        lr: AdamW's learning rate.
        max_grad_norm: The gradient is clipped to this norm.
        loss: Divide a completion's sum over tokens by its length, the mean length (dapo), or max_tokens (dr_grpo).
        clip: Ratios are clipped to 1 - clip .. 1 + clip.
        clip_high: Upper bound 1 + clip_high, so that rare tokens can grow faster (DAPO: 0.28).  [default: clip]
        mask_truncated: Learn nothing from completions that max_tokens cut off; their rewards stay in the baseline.
        dynamic_sampling: Replace groups of equal rewards by new prompts, in up to 3 draws a step (DAPO).
        kl: Weight of the KL term; 0 loads no initial policy.
        entropy: Weight of the entropy bonus.
        gradient_checkpointing: Compute activations twice instead of keeping them.
        save_every: Save a checkpoint every N seconds.
        shard_weights: none: each process holds all weights, gradients and moments; full: a share; auto: what fits.
    """
    o = SimpleNamespace(**locals())
    rows = rollout.load_prompts(data, limit, prompt_column, answer_column, skip_bad_rows)
    tensors, record = rollout.load(selection, "selection")
    o.model, o.initial_model = rollout.model_folder(model), rollout.model_folder(initial_model or model)
    made_from = record["recipe"]["inputs"]
    require(len(tensors["ranked"]) > 0, f"{selection} chooses no prompt: {record['facts'].get('ended')}")
    require(made_from["data"] == rows.digest, f"{selection} was made from other data than {data}")
    ours = made_from["model"] in (None, *lineage(o.model))  # a baseline's selection names no model
    require(ours, f"{selection} was made with another model than {model} or those it was trained from")
    rollout.use_deterministic(deterministic)
    rollout.check_out(out)
    inputs = {"data": rows.digest, "selection": record["identity"], "model": rollout.model_identity(o.model)}
    inputs["initial_model"] = rollout.model_identity(o.initial_model)
    inputs["optimizer"] = inputs["model"] if optimizer else None  # the state that belongs to the model
    recipe = rollout.make_recipe("model", CODE, vars(o), **inputs)
    if not rollout.is_made(out / "model", recipe):
        ways = "cropi.py deletes older states (--keep-states): remove the models of all stages before this one, too"
        require(not optimizer or optimizer.exists(), f"{optimizer}: no such folder; {ways}")
        states = rollout.shards(optimizer, "optimizer").values() if optimizer else ()
        fits = all(state["facts"]["model"] == inputs["model"] for state in states)
        require(fits, f"{optimizer} is the optimizer state of another model than {model}")
        run_stage(out, recipe, o, rows, tensors["ranked"])
    rollout.gather()
    if RANK == 0:
        remove(out / "checkpoint")
        made = rollout.peek(out / "model")["facts"]
        for name, lines in (("metrics", made["log"]), ("completions", made["completions"])):
            with rollout.new_file(out / f"{name}.jsonl") as temporary:
                temporary.write_text("".join(json.dumps(line) + "\n" for line in lines))
    rollout.gather()


if __name__ == "__main__":
    rollout.command_line(app)
