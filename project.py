"""Project: the off-policy policy gradient of every prompt, sketched to k dimensions.

    python project.py --model runs/mine/stage-00/model --trajectories runs/mine/rollouts/train.safetensors \\
                      --out runs/mine/stage-01/gradients-train.safetensors

Reads   the current model θ and a trajectory file, whose trajectories the behavior policy β sampled.
Writes  one row per live prompt (one whose rewards differ; all other gradients are exactly 0):

    sketch         float32 (N,k)  g̃(x;θ), equation 3
    prompt_index   int32   (N,)   row of the data file that the trajectories belong to
    grad_norm      float32 (N,)   ‖g̃‖, which estimates ‖ĝ‖
    pass_rate      float32 (N,)   mean reward under β
    ess_token      float32 (N,)   effective sample size of the prompt's n tokens: (Σρ)²/(nΣρ²), in (0, 1]
    ess_trajectory float32 (N,)   the same of its K trajectories, with the products Π_t ρ_t
    token_kl, mean_change, largest_change  float32 (N,)   KL(β‖π_θ) and |log ρ|, mean and largest, over its tokens
    half_sketch    float32 (H,k)  g̃ from the first half of the trajectories, for some of the prompts (if K is even):
    half_index     int32   (H,)   their rows of the data file. How far the halves agree says how far to trust the ranks.

The metadata hold as `diagnostics` the means of ess_*, token_kl and mean_change over the live prompts, and the largest
of largest_change.

For prompt x with K trajectories τ_k ~ β, tokens a_kt and histories h_kt, the gradient is that of the objective in
`train.py` without clipping, with the stored trajectories in place of fresh ones:

    ĝ(x;θ) = 1/K Σ_k 1/|τ_k| Σ_t w_kt Â_k ∇log π_θ(a_kt|h_kt)                                                  (2)
    g̃(x;θ) = P M ĝ(x;θ)                                                                                       (3)

With ρ_kt = π_θ(a_kt|h_kt) / β(a_kt|h_kt), `--ratio` sets the weight w_kt, and `--cap` an upper bound on it:

    none 1       token ρ_kt (the paper's)       prefix Π_{s<=t} ρ_ks       sequence Π_s ρ_ks

M keeps each coordinate of a parameter tensor with d coordinates with probability p = min(1, n/d), and divides it by √p;
n is such that a share r of all coordinates is kept. P (k × all coordinates) has a single ±1 per column. A tensor's
coordinates go to the k buckets in laps: k consecutive ones to k different buckets, each lap turned by a random shift,
so that coordinates of one lap never meet, and any two others do with probability 1/k. Then, over what is covered,
E⟨g̃, g̃'⟩ = ⟨ĝ, ĝ'⟩, and

    Var⟨g̃, g̃'⟩ = Σ_j (1/p_j - 1) g_j² g'_j²  +  1/k Σ_{i<j of different laps} (g_i g'_j + g_j g'_i)²

The second sum is that of Weinberger et al., Feature Hashing for Large Scale Multitask Learning (2009), lemma 2, which
has all pairs.

How many prompts share a batch though each needs a gradient of its own: the weight gradient of a linear layer
y = Wa + b is Σ_t δ_t a_tᵀ (and Σ_t δ_t for the bias), a sum over tokens of the layer's input a_t and the objective's
gradient δ_t at its output; that of an embedding is Σ_t δ_t in the row of token t. Hooks catch both for the whole batch,
and one batched matrix product sums them prompt by prompt, (P, O, T) x (P, T, I) -> (P, O, I). The weights are frozen,
so that product replaces the one with which autograd would have made the summed weight gradient, and a gradient per
prompt costs little more than the backward pass it rides on (`bench/speed.py`).

What is covered: every nn.Linear and nn.Embedding. Other parameters of one dimension, the norms' gains, are left out. A
model with other weight matrices (fused experts, convolutions, layers derived from those two) is refused.

Why these (`bench/projection.py`: the toy after two stages, precision of the top 10% against exact full gradients):

                              k = 4096   r = 0.1    r = 1       k = 32768   r = 0.1    r = 1
    here                                  0.86       0.92                    0.93       0.96
    same p for every tensor               0.83       0.92                    0.86       0.96
    dense Gaussian                        0.82       0.88                    0.88       0.96
    √r of rows, √r of columns             0.80       0.92                    0.80       0.96
    the first coordinates                 0.75       0.90                    0.76       0.97

With exact cosines it is 0.99 over what is covered, 0.93 over the linear layers alone. Time does not depend on r.

Deviations:
 1. The paper's P is dense. One ±1 per column costs O(d) instead of O(dk) with the same expectation.
 2. The paper keeps a share r of 0.1. Here r is 1 by default, which costs the same: M is the identity.
 3. Below r = 1 every tensor keeps the same number n of coordinates (or all it has) instead of the same share of them:
    gradients of small tensors have larger coordinates.
 4. k is 4096 by default (paper: 32768), so that a run of the toy stays small on disk.
 5. The released code keeps the first coordinates it comes to. Ours are random over all that is covered.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import typer
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel

from rollout import (
    TOY,
    BatchTokens,
    Dtype,
    SaveEvery,
    Unfinished,
    above_zero,
    check_out,
    command_line,
    digest,
    lineage,
    load_model,
    model_folder,
    new_app,
    open_tensors,
    open_trajectories,
    pick_dtype,
    require,
    save_rows,
    settings_of,
)
from train import Batch, collate, completion_logps, k3_kl, micro_batches, sequence_mean

RATIOS = ("token", "none", "prefix", "sequence")
STALENESS = ("token_kl", "mean_change", "largest_change", "ess_token", "ess_trajectory")

# ---------------------------------------------------------------------------------------------------------------------
# The objective


def importance_weights(
    logps: torch.Tensor, behavior_logps: torch.Tensor, ratio: str, cap: float | None = None
) -> torch.Tensor:
    """w_kt of equation 2, without a gradient: (B, C) log-probs, 0 at padding -> (B, C).

    >>> pi, beta = torch.tensor([[0.5, 0.5, 0.3]]).log(), torch.tensor([[0.25, 0.5, 0.6]]).log()  # ρ = 2, 1, 1/2
    >>> torch.cat([importance_weights(pi, beta, ratio) for ratio in ("none", "token", "prefix", "sequence")])
    tensor([[1.0000, 1.0000, 1.0000],
            [2.0000, 1.0000, 0.5000],
            [2.0000, 2.0000, 1.0000],
            [1.0000, 1.0000, 1.0000]])
    """
    log_ratio = (logps - behavior_logps).detach()
    log_weight = {
        "none": torch.zeros_like,
        "token": lambda x: x,
        "prefix": lambda x: x.cumsum(1),
        "sequence": lambda x: x.sum(1, keepdim=True).expand_as(x),
    }[ratio](log_ratio)
    return log_weight.exp() if cap is None else log_weight.exp().clamp(max=cap)


def off_policy_objective(logps: torch.Tensor, batch: Batch, ratio: str, cap: float | None = None) -> torch.Tensor:
    """What ĝ (2) is the gradient of, for each prompt: (P*K, C) -> (P,). Its value means nothing."""
    weights = importance_weights(logps, batch.behavior_logps, ratio, cap)
    value = weights * batch.advantages[:, None] * logps
    return sequence_mean(value, batch.mask).view(len(batch.prompt_ids), -1).mean(1)  # (P*K,) -> (P, K) -> (P,)


def staleness(log_ratio: torch.Tensor, mask: torch.Tensor, prompts: int) -> dict[str, torch.Tensor]:
    """How far π_θ has moved from β on the tokens of each of P prompts: log ρ and mask (P*K, C) -> (P,) each.

    `token_kl` estimates KL(β‖π_θ), as the tokens are β's: the mean of ρ - 1 - log ρ.
    """
    by_trajectory = log_ratio.sum(1).view(prompts, -1)  # (P*K, C) -> (P, K), 0 at padding
    log_ratio, mask = log_ratio.view(prompts, -1), mask.view(prompts, -1)
    tokens = mask.sum(1)
    return {
        "token_kl": k3_kl(torch.zeros_like(log_ratio), log_ratio).sum(1).clamp(min=0) / tokens,
        "mean_change": log_ratio.abs().sum(1) / tokens,
        "largest_change": log_ratio.abs().amax(1),
        "ess_token": effective_sample_size(log_ratio, mask),
        "ess_trajectory": effective_sample_size(by_trajectory, torch.ones_like(by_trajectory)),
    }


def effective_sample_size(log_weights: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Kish's (Σw)²/(nΣw²), over the n weights of each row where the mask is 1: (P, .) -> (P,), in (0, 1].

    >>> effective_sample_size(torch.tensor([[1.0, 1.0, 2.0, 9.0]]).log(), torch.tensor([[1, 1, 1, 0]]))  # 4² / (3·6)
    tensor([0.8889])
    """
    log_weights = log_weights.masked_fill(mask == 0, -math.inf)
    weights = (log_weights - log_weights.amax(1, keepdim=True)).exp()  # a common factor changes nothing
    return weights.sum(1) ** 2 / (mask.sum(1) * (weights**2).sum(1))


# ---------------------------------------------------------------------------------------------------------------------
# The projection


def keep_probability(sizes: dict[str, int], sparse_ratio: float) -> dict[str, float]:
    """p = min(1, n/d) for tensors of d coordinates, with n such that a share `sparse_ratio` of all is kept.

    >>> keep_probability({"bias": 10, "small": 100, "large": 890}, 0.31)  # 310 of 1000: 10 + 100 + 200
    {'bias': 1.0, 'small': 1.0, 'large': 0.2247...}
    """
    n, left = 0.0, sparse_ratio * sum(sizes.values())
    for place, size in enumerate(sorted(sizes.values())):
        n = left / (len(sizes) - place)  # an even share of what is left to keep
        if size >= n:
            break
        left -= size  # tensors smaller than that are kept whole
    return {name: min(1.0, n / size) for name, size in sizes.items()}


class SparseProjection:
    """P M of equation 3, for parameters that are visited tensor by tensor.

    Args:
        sizes: number of coordinates of each parameter tensor.
        keep: probability with which a coordinate of each tensor is kept.
        k: buckets.
        seed: draws M and P; the same on every device.
    """

    def __init__(self, sizes: dict[str, int], keep: dict[str, float], k: int, seed: int, device: torch.device):
        self.k = k
        generator = torch.Generator().manual_seed(seed)
        # name -> (±1 for each coordinate, 0 where it is dropped; 1/√p; the shift of each lap)
        self.blocks: dict[str, tuple[torch.Tensor, float, list[int]]] = {}
        for name, size in sizes.items():
            sign = torch.randint(0, 2, (size,), generator=generator, dtype=torch.int8) * 2 - 1
            sign *= torch.rand(size, generator=generator) < keep[name]
            shifts = torch.randint(0, k, (math.ceil(size / k),), generator=generator)
            self.blocks[name] = (sign.to(device), keep[name] ** -0.5, shifts.tolist())
        self.coordinates = sum(int(sign.count_nonzero()) for sign, _, _ in self.blocks.values())

    def add(self, sketch: torch.Tensor, name: str, gradient: torch.Tensor) -> None:
        """Add P gradients (P, d) of tensor `name` to their sketches (P, k) float32; overwrites the gradients."""
        sign, scale, shifts = self.blocks[name]
        gradient.mul_(sign)
        for lap, shift in zip(gradient.split(self.k, 1), shifts, strict=True):  # (P, k), the last one narrower
            before, after = lap[:, : self.k - shift], lap[:, self.k - shift :]  # past the last bucket comes the first
            sketch[:, shift : shift + before.shape[1]].add_(before, alpha=scale)
            sketch[:, : after.shape[1]].add_(after, alpha=scale)


# ---------------------------------------------------------------------------------------------------------------------
# Gradients of many prompts at once


class GradientSketcher:
    """Sketches of ĝ(x;θ), equations 2 and 3, for batches of prompts. Freezes the model's weights and hooks its layers.

    Raises:
        BadInput: the model has weight matrices outside nn.Linear and nn.Embedding.
    """

    MATRIX_ELEMENTS = 1 << 20  # of per-prompt weight gradients held at a time (or those of one prompt)

    def __init__(
        self,
        model: PreTrainedModel,
        k: int,
        sparse_ratio: float,
        seed: int,
        ratio: str = "token",
        cap: float | None = None,
    ):
        self.model, self.ratio, self.cap = model.requires_grad_(False), ratio, cap
        names = {id(parameter): name for name, parameter in model.named_parameters()}  # a tied weight has one name
        layers = [module for module in model.modules() if type(module) in (nn.Linear, nn.Embedding)]
        self.weights = {names[id(module.weight)]: module.weight for module in layers}
        self.biases = {
            names[id(module.bias)]: module.bias for module in layers if getattr(module, "bias", None) is not None
        }
        others = [name for name, p in model.named_parameters() if p.ndim > 1 and name not in self.weights]
        require(not others, f"no gradients per prompt for {', '.join(others[:3])}: only nn.Linear and nn.Embedding are")
        sizes = {name: parameter.numel() for name, parameter in (self.weights | self.biases).items()}
        self.covered = sum(sizes.values())
        self.projection = SparseProjection(sizes, keep_probability(sizes, sparse_ratio), k, seed, model.device)
        # Per-prompt weight gradients are made here, some prompts at a time; fresh memory each time takes longer.
        largest = max(weight.numel() for weight in self.weights.values())
        self.workspace = torch.empty(max(largest, self.MATRIX_ELEMENTS), device=model.device, dtype=model.dtype)
        # weight or bias -> (the layer's input, output gradient δ) of each call; a prompt and its completions are two
        self.caught: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        self.hooks = [
            module.register_forward_hook(self._catch([names[id(p)] for p in module.parameters()])) for module in layers
        ]

    def close(self) -> None:
        """Let go of the model: a hook and what it belongs to would keep each other in memory."""
        for hook in self.hooks:
            hook.remove()

    def _catch(self, names: list[str]) -> Callable:
        def forward_hook(module: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
            taken = inputs[0].detach()  # activations, or an embedding's token ids
            output.requires_grad_()  # with frozen weights, nothing before the first layers would need a gradient

            def backward_hook(delta: torch.Tensor) -> None:
                if getattr(module, "padding_idx", None) is not None:  # the row that is never trained
                    delta = delta * (taken != module.padding_idx)[..., None]
                for name in names:
                    self.caught.setdefault(name, []).append((taken, delta))

            output.register_hook(backward_hook)

        return forward_hook

    def sketch(self, batch: Batch, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
        """g̃(x;θ) of the batch's P prompts, (P, k) float32, and log π_θ of its tokens, (P*K, C)."""
        prompts = len(batch.prompt_ids)
        _, logps = completion_logps(self.model, batch, temperature)
        # A sum over prompts: they do not meet in the network, so δ of each stays its own.
        off_policy_objective(logps, batch, self.ratio, self.cap).sum().backward()
        sketch = torch.zeros(prompts, self.projection.k, device=logps.device)
        for name, calls in self.caught.items():
            # (P, L, .) of the prompt and (P*K, C-1, .) of the completions -> (P, T, .) with T = L or K(C-1)
            layout = all(delta.ndim == 3 and len(delta) in (prompts, len(batch.mask)) for _, delta in calls)
            require(layout, f"{name} does not see its tokens prompt by prompt; this kind of model is not covered")
            calls = [[x.reshape(prompts, -1, *x.shape[2:]) for x in call] for call in calls]
            if name in self.biases:
                self.projection.add(sketch, name, sum(delta.sum(1) for _, delta in calls))
                continue
            step = max(1, self.MATRIX_ELEMENTS // self.weights[name].numel())
            for start in range(0, prompts, step):
                some = slice(start, start + step)
                gradient = self._weight_gradient(name, [(a[some], delta[some]) for a, delta in calls])
                self.projection.add(sketch[some], name, gradient.flatten(1))
        self.caught.clear()
        return sketch, logps.detach()

    def _weight_gradient(self, name: str, calls: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
        """Prompt by prompt, summed over the calls: (P, O, I) of a linear layer, (P, V, H) of an embedding."""
        weight, prompts = self.weights[name], len(calls[0][0])
        gradient = self.workspace[: prompts * weight.numel()].view(prompts, *weight.shape)
        for number, (taken, delta) in enumerate(calls):
            if taken.is_floating_point():  # (P, O, T) x (P, T, I); with beta = 0 what stood there is ignored
                gradient.baddbmm_(delta.mT, taken, beta=float(number > 0))
            else:  # token ids (P, T), δ (P, T, H)
                gradient = gradient if number else gradient.zero_()
                row = taken + len(weight) * torch.arange(prompts, device=taken.device)[:, None]
                rows = gradient.flatten(0, 1)  # a frequent token's is a long sum, which bfloat16 would lose
                summed = rows if rows.dtype == torch.float32 else rows.float()
                summed.index_add_(0, row.flatten(), delta.flatten(0, 1).to(summed.dtype))
                if summed is not rows:
                    rows.copy_(summed)
        return gradient


def split_groups(batch: Batch, parts: int) -> Batch:
    """P groups of K trajectories as P*parts groups of K/parts, their advantages as they were; (P*K, .) stays."""
    return replace(
        batch,
        prompt_index=[i for i in batch.prompt_index for _ in range(parts)],
        prompt_ids=batch.prompt_ids.repeat_interleave(parts, 0),
        prompt_mask=batch.prompt_mask.repeat_interleave(parts, 0),
    )


def join_pieces(
    pieces: list[tuple[range, torch.Tensor, torch.Tensor, torch.Tensor]], samples: int, parts: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A group computed in pieces of n trajectories: rows (n,), sketch (k,), log ratios and mask (n, C) of each.

    Returns the sketches of its `parts` equal parts, (parts, k), each the mean over its trajectories, and the log ratios
    and the mask of all, (K, C).
    """
    start, width = pieces[0][0].start, max(mask.shape[1] for *_, mask in pieces)
    sketch = torch.zeros(parts, len(pieces[0][1]), device=pieces[0][1].device)
    for rows, of_piece, _, _ in pieces:
        sketch[(rows.start - start) * parts // samples] += of_piece * (len(rows) * parts / samples)
    change, mask = (
        torch.cat([nn.functional.pad(piece[n], (0, width - piece[n].shape[1])) for piece in pieces]) for n in (2, 3)
    )
    return sketch, change, mask


MOST_BYTES = 1 << 26  # of sketches in memory; then they go to disk


def join_rows(parts: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Tables with the same columns, one below the other."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


# ---------------------------------------------------------------------------------------------------------------------
# The command

app = new_app()


@app.command(help=__doc__.splitlines()[0])
def project(
    trajectories: Annotated[Path, typer.Option(help="Trajectory file that rollout.py wrote.")],
    out: Annotated[Path, typer.Option(help="Gradient file to write.")],
    model: Annotated[Path, typer.Option(help="Model folder of the current policy.")] = TOY / "model",
    ratio: Annotated[
        Literal[RATIOS], typer.Option(help="Importance weight of a token; token is the paper's.")
    ] = "token",
    cap: Annotated[
        float | None, typer.Option(callback=above_zero, help="Upper bound on these weights.  [default: none]")
    ] = None,
    k: Annotated[int, typer.Option(min=1, help="Dimensions of the sketch; the paper's is 32768.")] = 4096,
    sparse_ratio: Annotated[
        float, typer.Option(callback=above_zero, max=1, help="r, the share of gradient coordinates kept.")
    ] = 1.0,
    halves: Annotated[
        int, typer.Option(min=0, help="Prompts whose trajectories are also sketched half by half, as a check.")
    ] = 256,
    dtype: Dtype = "auto",
    batch_tokens: BatchTokens = 4096,
    save_every: SaveEvery = 300.0,
    seed: Annotated[int, typer.Option(min=0, help="Of the projection; all files of one selection need the same.")] = 0,
) -> dict[str, float]:
    settings = settings_of(locals())
    check_out(out, trajectories, model)
    stored = open_trajectories(trajectories)
    live = stored.live_groups()
    require(
        bool(live),
        f"{trajectories}: no live prompt, every group's rewards are equal; take more samples or easier prompts",
    )
    model = model_folder(model)
    policy, _ = load_model(model, pick_dtype(dtype))
    require(
        stored.metadata["model"] in lineage(policy, model),
        f"{trajectories} was sampled by another model than {model} or those it was trained from; run rollout.py again",
    )
    sketcher = GradientSketcher(policy, k, sparse_ratio, seed, ratio, cap)
    require(
        sketcher.projection.coordinates > 0, f"--sparse-ratio {sparse_ratio:g} keeps no coordinate; take a larger one"
    )
    tqdm.write(
        f"{trajectories}: {len(live)} live prompts of {stored.metadata['prompts']}; "
        f"{sketcher.projection.coordinates:,} of {sketcher.covered:,} covered coordinates kept "
        f"({policy.num_parameters():,} parameters) -> k = {k:,}; {len(live) * k * 4 / 1e6:.1f} MB"
    )
    temperature = stored.metadata["options"]["temperature"]
    options = {"k": k, "sparse_ratio": sparse_ratio, "seed": seed, "ratio": ratio, "cap": cap}
    metadata = {
        "model": digest(model),
        "trajectories": digest(trajectories),
        "data": stored.metadata["data"],
        "prompts": stored.metadata["prompts"],
        "options": options | {"temperature": temperature},
    }
    even = stored.metadata["options"]["samples"] % 2 == 0  # an odd number of trajectories has no halves
    halved = set(np.random.default_rng(seed).permutation(list(live))[: halves if even else 0].tolist())
    samples = len(next(iter(live.values())))
    plan = []  # (into how many parts each group is cut, the batch)
    for parts in (2, 1):
        some = {i: group for i, group in live.items() if (i in halved) == (parts == 2)}
        plan += [(parts, groups) for groups in micro_batches(stored, some, batch_tokens, parts=parts)]
    work = Unfinished(out, metadata | {"options": settings}, save_every)
    saved = work.load("gradients")
    done, fresh, pieces = saved[-1][1]["batches"] if saved else 0, [], []
    with tqdm(total=len(live), desc=f"project {trajectories.stem}", unit="prompt", leave=False, disable=None) as bar:
        bar.update(sum(len(tensors["prompt_index"]) for tensors, _ in saved))
        for n, (parts, groups) in enumerate(plan[done:], done + 1):
            batch = collate(stored, groups, policy.device)
            cut = len(groups[0][1]) < samples
            sketch, logps = sketcher.sketch(batch if cut else split_groups(batch, parts), temperature)
            change, mask = logps - batch.behavior_logps, batch.mask
            if cut:
                pieces.append((groups[0][1], sketch[0], change, mask))
                if groups[0][1].stop < live[groups[0][0]].stop:
                    continue
                sketch, change, mask = join_pieces(pieces, samples, parts)
                pieces.clear()
            sketch = sketch.view(len(groups), parts, k)
            half = sketch[: len(groups) * (parts - 1), 0]  # (P, k), or none
            sketch = sketch.mean(1)  # the gradient is the mean over trajectories, so over halves
            found = {"sketch": sketch, "half_sketch": half, "grad_norm": sketch.norm(dim=1)}
            finite = torch.isfinite(found["grad_norm"]).tolist()
            bad = [i for i, ok in zip(batch.prompt_index, finite, strict=True) if not ok]
            which = f"prompt {', '.join(map(str, bad))} of {trajectories}"
            require(not bad, f"gradient is not finite at {which}; if its weights have grown too large, set --cap")
            found |= staleness(change, mask, len(groups))
            fresh.append({name: values.cpu().numpy() for name, values in found.items()})
            fresh[-1]["prompt_index"] = np.array(batch.prompt_index, np.int32)
            bar.update(len(groups))
            full = sum(tensors["sketch"].nbytes for tensors in fresh) > MOST_BYTES
            if n < len(plan) and (full or work.due()):
                work.save("gradients", join_rows(fresh), {"batches": n})
                fresh = []
    sources = [*(open_tensors(path, "gradients")[0] for path in work.parts), *([join_rows(fresh)] if fresh else [])]
    columns = join_rows([{name: x for name, x in source.items() if name != "sketch"} for source in sources])
    rates = stored.pass_rates()
    columns["pass_rate"] = np.array([rates[i] for i in columns["prompt_index"].tolist()], np.float32)
    if halved:
        columns["half_index"] = columns["prompt_index"][: len(halved)]
    else:
        del columns["half_sketch"]
    means = {name: float(values.mean()) for name, values in columns.items() if name in STALENESS}
    means["largest_change"] = float(columns["largest_change"].max())
    metadata["diagnostics"] = {"live_prompts": len(live)} | means
    with save_rows(out, "gradients", "sketch", (len(live), k), columns, metadata) as write:
        for source in sources:
            write(source["sketch"])
    work.finish()
    sketcher.close()
    return metadata["diagnostics"]


if __name__ == "__main__":
    command_line(app)
