"""Project: the off-policy policy gradient of every prompt, sketched to k dimensions.

    python project.py --model runs/mine/stage-01/model --trajectories runs/mine/rollouts/train \\
                      --out runs/mine/stage-02/gradients-train

Reads   the current model θ and a folder of trajectories, which the behavior policy β sampled.
Writes  a folder with a shard for each shard of trajectories. It has one row for each of its N live prompts (those whose
        rewards differ; all other gradients are exactly 0), by prompt_index:

    sketch         float32 (N,k)  g̃(x;θ), equation 3
    prompt_index   int32   (N,)   row of the data file that the trajectories belong to
    grad_norm      float32 (N,)   ‖g̃‖, which estimates ‖ĝ‖
    pass_rate      float32 (N,)   mean reward under β
    ess_token      float32 (N,)   effective sample size of the prompt's n tokens: (Σρ)²/(nΣρ²), in (0, 1]
    ess_trajectory float32 (N,)   the same of its K trajectories, with the products Π_t ρ_t
    token_kl, mean_change, largest_change  float32 (N,)   KL(β‖π_θ) and |log ρ|, mean and largest, over its tokens
    half_sketch    float32 (H,k)  g̃ from the first half of the trajectories, for some of the prompts (if K is even):
    half_index     int32   (H,)   their rows of the data file. How far the halves agree says how far to trust the ranks.

For prompt x with K trajectories τ_k ~ β, tokens a_kt and histories h_kt, the gradient is that of the first term of the
objective in `train.py` without clipping, with the stored trajectories in place of fresh ones:

    ĝ(x;θ) = 1/K Σ_k 1/ℓ_k Σ_t w_kt Â_k ∇log π_θ(a_kt|h_kt)                                                    (2)
    g̃(x;θ) = P M ĝ(x;θ)                                                                                       (3)

ℓ_k is |τ_k|; `--loss` and `--mask-truncated` are those of training (train.py), with the mean length of the whole set's
completions for dapo.

With ρ_kt = π_θ(a_kt|h_kt) / β(a_kt|h_kt), `--ratio` sets the weight w_kt, and `--cap` an upper bound on it:

    none 1       token ρ_kt (the paper's)       prefix Π_{s<=t} ρ_ks       sequence Π_s ρ_ks

M keeps each coordinate of a parameter tensor with d coordinates with probability p = min(1, n/d), and divides it by √p;
n is such that a share r of all coordinates is kept. P (k × all coordinates) has a single ±1 per column: the product of
a sign of the coordinate's row and one of its column in the tensor. Coordinate j of a tensor, counted row by row, goes
to bucket (j + shift) mod q, with q the largest prime up to k and a random shift for each tensor. So a tensor is added
up in laps of q, and two of its coordinates meet only if they are a multiple of q apart; a width of the tensor that
shares a factor with the lap would bring whole columns together, hence the prime. Over what is covered,
E⟨g̃, g̃'⟩ = ⟨ĝ, ĝ'⟩, and with x_ij = g_i g'_j + g_j g'_i

    Var⟨g̃, g̃'⟩ = Σ_j (1/p_j - 1) g_j² g'_j²  +  Σ_{i<j meet} x_ij²  +  1/q Σ_{i<j of different tensors} x_ij²

(for tensors of at most q rows and columns: in others, x_ij of pairs with the same two rows in each column, or the same
two columns in each row, are added before they are squared). That is like Weinberger et al., Feature Hashing for Large
Scale Multitask Learning (2009), lemma 2, which has 1/k Σ_{i<j} x_ij² in place of both.

Per-prompt gradients from one batch of many prompts: the weight gradient of a linear layer
y = Wa + b is Σ_t δ_t a_tᵀ (and Σ_t δ_t for the bias), a sum over tokens of the layer's input a_t and the objective's
gradient δ_t at its output; that of an embedding is Σ_t δ_t in the row of token t. Hooks catch both for the whole batch,
and one batched matrix product sums them prompt by prompt, (P, O, T) x (P, T, I) -> (P, O, I). The weights are frozen,
so that product replaces the one with which autograd would have made the summed weight gradient, and a gradient per
prompt costs little more than the backward pass it rides on (`bench/speed.py`).

What is covered: every nn.Linear and nn.Embedding. Other parameters of one dimension, the norms' gains, are left out. A
model with other weight matrices (fused experts, convolutions, layers derived from those two) is refused.

Why this one (`bench/projection.py`: the toy after two stages, precision of the top 10% against exact full gradients):

                              k = 4096   r = 0.1    r = 1       k = 32768   r = 0.1    r = 1
    here                                  0.94       0.93                    0.95       0.98
    same p for every tensor               0.87       0.93                    0.90       0.98
    dense Gaussian                        0.89       0.94                    0.92       0.98
    √r of rows, √r of columns             0.81       0.93                    0.85       0.98
    the first coordinates                 0.81       0.95                    0.82       0.98

With exact cosines it is 1.00 over what is covered, 0.96 over the linear layers alone. Time does not depend on r.

Deviations:
 1. The paper's P is dense. One ±1 per column costs O(d) instead of O(dk) with the same expectation.
 2. The paper keeps a share r of 0.1. Here r is 1 by default, which costs the same: M is the identity.
 3. Below r = 1 every tensor keeps the same number n of coordinates (or all it has) instead of the same share of them:
    gradients of small tensors have larger coordinates.
 4. k is 4096 by default (paper: 32768), so that a run of the toy stays small on disk.
 5. The released code keeps the first coordinates it comes to. Ours are random over all that is covered. Its default
    keeps 15 million of 1.5 billion, a share of 0.01.
 6. The norms' gains are left out of the gradient.
 7. Sketches are float32 (released: float16).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
import torch
import typer
from torch import Tensor, nn

import rollout
import train
from rollout import TOY, Array, Count, Dtype, Given, Natural, Share, Trajectories, require
from train import LOSSES, Batch, Loss, collate, completion_logps, k3_kl, micro_batches

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CODE = train.CODE | {"project": rollout.code_digest(__file__)}
app = typer.Typer(**rollout.PLAIN)
RATIOS = ("token", "none", "prefix", "sequence")

# ---------------------------------------------------------------------------------------------------------------------
# The objective


def importance_weights(
    logps: Tensor, behavior_logps: Tensor, length: list[int], ratio: str, cap: float | None = None
) -> Tensor:
    """w_kt of equation 2, without a gradient: (T,) log-probs of trajectories of these lengths -> (T,).

    >>> pi, beta = torch.tensor([0.5, 0.5, 0.3]).log(), torch.tensor([0.25, 0.5, 0.6]).log()  # ρ = 2, 1, 1/2
    >>> torch.stack([importance_weights(pi, beta, [3], ratio) for ratio in ("none", "token", "prefix", "sequence")])
    tensor([[1.0000, 1.0000, 1.0000],
            [2.0000, 1.0000, 0.5000],
            [2.0000, 2.0000, 1.0000],
            [1.0000, 1.0000, 1.0000]])
    """
    over_time = {  # of the log ρ of one trajectory
        "none": torch.zeros_like,
        "token": lambda x: x,
        "prefix": lambda x: x.cumsum(0),
        "sequence": lambda x: x.sum().expand_as(x),
    }[ratio]
    weights = torch.cat([over_time(x) for x in (logps - behavior_logps).detach().split(length)]).exp()
    return weights if cap is None else weights.clamp(max=cap)


def off_policy_objective(logps: Tensor, batch: Batch, ratio: str, cap: float | None = None) -> Tensor:
    """Summed over the batch; ĝ (2) is its gradient. The value itself has no meaning."""
    weights = importance_weights(logps, batch.behavior_logps, batch.length, ratio, cap)
    return (batch.weight * weights * batch.advantages * logps).sum()


def staleness(log_ratio: Array, length: Array) -> dict[str, Array]:
    """How far π_θ has moved from β on the tokens of each of N prompts, (N,) each.

    `token_kl` estimates KL(β‖π_θ), as the tokens are β's: the mean of ρ - 1 - log ρ.

    Args:
        log_ratio: (T,) log ρ of all tokens, trajectory after trajectory, prompt after prompt.
        length: (N, K) tokens of each trajectory, 0 where there is none.
    """
    tokens, log_ratio, there = length.sum(1), log_ratio.astype(np.float64), length.flatten() > 0
    starts = np.cumsum(tokens) - tokens
    by_trajectory = np.add.reduceat(log_ratio, (np.cumsum(length) - length.flatten())[there])
    change, k3 = np.abs(log_ratio), k3_kl(torch.zeros(1), torch.from_numpy(log_ratio)).clamp(min=0).numpy()
    return {
        "token_kl": np.add.reduceat(k3, starts) / tokens,
        "mean_change": np.add.reduceat(change, starts) / tokens,
        "largest_change": np.maximum.reduceat(change, starts),
        "ess_token": effective_sample_size(log_ratio, tokens),
        "ess_trajectory": effective_sample_size(by_trajectory, np.count_nonzero(length, axis=1)),
    }


def effective_sample_size(log_weights: Array, counts: Array) -> Array:
    """Kish's (Σw)²/(nΣw²) in (0, 1] for each of N groups, (N,), of n = counts[i] weights that stand one group after
    another.

    >>> effective_sample_size(np.log([1.0, 1.0, 2.0, 9.0]), np.array([3, 1]))  # 4² / (3·6), and a weight alone
    array([0.88888889, 1.        ])
    """
    starts = np.cumsum(counts) - counts
    largest = np.maximum.reduceat(log_weights, starts)
    weights = np.exp(log_weights - np.repeat(largest, counts))  # a common factor changes nothing
    return np.add.reduceat(weights, starts) ** 2 / (counts * np.add.reduceat(weights**2, starts))


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
        shapes: of each parameter tensor.
        keep: probability with which a coordinate of each tensor is kept.
        k: buckets.
        seed: draws M and P; the same on every device.
        like: a tensor with the device and the dtype of the gradients.
    """

    def __init__(self, shapes: dict[str, torch.Size], keep: dict[str, float], k: int, seed: int, like: Tensor):
        self.k = k
        self.q = next(q for q in range(k, 0, -1) if all(q % n for n in range(2, math.isqrt(q) + 1)))
        self.coordinates, generator = 0, torch.Generator().manual_seed(seed)
        # name -> (±1 for each row (O, 1) and column (I,), M as 0 and 1 or none if all is kept, 1/√p, the shift)
        self.blocks: dict[str, tuple[Tensor, Tensor, Tensor | None, float, int]] = {}
        for name, shape in shapes.items():
            rows, columns, p = shape[0], math.prod(shape[1:]), keep[name]
            row, column = (torch.randint(0, 2, (n,), generator=generator).to(like) * 2 - 1 for n in (rows, columns))
            kept = (torch.rand(rows, columns, generator=generator) < p).to(like.device) if p < 1 else None
            shift = int(torch.randint(0, self.q, (), generator=generator))
            self.blocks[name] = (row[:, None], column, kept, p**-0.5, shift)
            self.coordinates += rows * columns if kept is None else int(kept.count_nonzero())

    def add(self, sketch: Tensor, name: str, gradient: Tensor) -> None:
        """Add P gradients (P, O, I) of tensor `name` to their sketches (P, k) float32; overwrites the gradients."""
        row, column, kept, scale, shift = self.blocks[name]
        gradient.mul_(row).mul_(column)
        if kept is not None:
            gradient.mul_(kept)
        lap = flat = gradient.flatten(1)  # (P, d)
        laps, rest = divmod(flat.shape[1], self.q)
        if laps:
            lap = flat[:, : laps * self.q].unflatten(1, (laps, self.q)).sum(1, dtype=torch.float32)  # (P, q)
            lap[:, :rest] += flat[:, laps * self.q :]
        before, after = lap[:, : self.q - shift], lap[:, self.q - shift :]  # past the last bucket comes the first
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
        parameters = [parameter for module in layers for parameter in module.parameters()]
        self.weights = {names[id(p)]: p for p in sorted(parameters, key=lambda p: -p.ndim)}  # and after them biases
        rest = [module for module in model.modules() if module not in layers]  # a derived one may hold a tied weight
        others = [names[id(p)] for module in rest for p in module.parameters(recurse=False) if p.ndim > 1]
        only = "per-prompt gradients support only nn.Linear and nn.Embedding layers"
        require(not others, f"{', '.join(others[:3])}: {only}")
        sizes = {name: parameter.numel() for name, parameter in self.weights.items()}
        self.covered = sum(sizes.values())
        shapes, keep = {n: p.shape for n, p in self.weights.items()}, keep_probability(sizes, sparse_ratio)
        # Per-prompt weight gradients are made here, some prompts at a time; fresh memory each time takes longer.
        largest = max(sizes.values())
        self.workspace = torch.empty(max(largest, self.MATRIX_ELEMENTS), device=model.device, dtype=model.dtype)
        self.projection = SparseProjection(shapes, keep, k, seed, self.workspace)
        self.sketches = torch.empty(0, k)  # (P, k) of the batch under way
        self.hooks = [
            module.register_forward_hook(self._catch([names[id(p)] for p in module.parameters()])) for module in layers
        ]

    def close(self) -> None:
        """Let go of the model: a hook and what it belongs to would keep each other in memory."""
        for hook in self.hooks:
            hook.remove()

    def _catch(self, names: list[str]) -> Callable:
        def forward_hook(module: nn.Module, inputs: tuple, output: Tensor) -> None:
            taken = inputs[0].detach()  # activations, or an embedding's token ids
            output.requires_grad_()  # with frozen weights, nothing before the first layers would need a gradient

            def backward_hook(delta: Tensor) -> None:
                if getattr(module, "padding_idx", None) is not None:  # the row that is never trained
                    delta = delta * (taken != module.padding_idx)[..., None]
                for name in names:
                    self._add(name, taken, delta)

            output.register_hook(backward_hook)

        return forward_hook

    def sketch(self, batch: Batch, temperature: float) -> tuple[Tensor, Tensor]:
        """g̃(x;θ) of the batch's P pieces, (P, k) float32, and log π_θ of its tokens, (T,)."""
        self.sketches = torch.zeros(len(batch.ids), self.projection.k, device=batch.ids.device)
        logps, _ = completion_logps(self.model, batch, temperature)
        # A sum over prompts: they do not meet in the network, so δ of each stays its own.
        off_policy_objective(logps, batch, self.ratio, self.cap).backward()
        return self.sketches, logps.detach()

    def _add(self, name: str, taken: Tensor, delta: Tensor) -> None:
        """Add to the sketches the gradient of a weight or bias, from one call of its layer: its input, which is
        (P, W, I), or token ids (P, W), and δ (P, W, O)."""
        weight, prompts = self.weights[name], len(self.sketches)
        layout = delta.ndim == 3 and len(delta) == prompts
        require(layout, f"{name} does not see its tokens prompt by prompt; this kind of model is not covered")
        step = max(1, self.MATRIX_ELEMENTS // weight.numel())
        for sketch, a, d in zip(*(x.split(step) for x in (self.sketches, taken, delta)), strict=True):
            gradient = self.workspace[: len(d) * weight.numel()].view(len(d), *weight.shape)
            if weight.ndim == 1:
                torch.sum(d, 1, out=gradient)
            elif a.is_floating_point():
                torch.bmm(d.mT, a, out=gradient)  # (P, O, W) x (P, W, I)
            else:  # in float32: a frequent token's is a long sum, which bfloat16 would lose
                row = a + len(weight) * torch.arange(len(a), device=a.device)[:, None]
                gradient = gradient.float().zero_()
                gradient.flatten(0, 1).index_add_(0, row.flatten(), d.flatten(0, 1).float())
            self.projection.add(sketch, name, gradient.view(len(d), len(weight), -1))


# ---------------------------------------------------------------------------------------------------------------------
# One shard


def project_groups(
    sketcher: GradientSketcher,
    groups: Trajectories,
    halved: Array,
    temperature: float,
    batch_tokens: int,
    loss: Loss = Loss(),
) -> dict[str, Array]:
    """The tensors of a shard for N live groups, of which `halved` (N,) bool are sketched half by half.

    A gradient is the sum over the pieces of its group: a token weighs 1/(Kℓ_k), K counting the whole group.

    Raises:
        BadInput: NaN or infinity, naming the prompts.
    """
    device, k = sketcher.model.device, sketcher.projection.k
    sketch, first_half = (torch.zeros(len(halved), k, device=device) for _ in range(2))
    log_ratio = np.zeros(len(groups.tokens), np.float32)
    for pieces in micro_batches(groups, range(len(halved)), batch_tokens, halved):
        batch = collate(groups, pieces, device, loss)
        sketches, logps = sketcher.sketch(batch, temperature)  # (P, k), (T,)
        log_ratio[batch.stored] = (logps - batch.behavior_logps).cpu().numpy()
        for (n, ks), piece in zip(pieces, sketches, strict=True):
            sketch[n] += piece
            if halved[n] and np.isin(ks, train.halves(groups.rewards[n])[0]).all():
                first_half[n] += 2 * piece  # the mean over K/2
    norm = sketch.norm(dim=1).cpu().numpy()
    bad = groups.prompt_index[~np.isfinite(norm)]
    which = f"gradient is not finite at prompt {', '.join(map(str, bad))}"
    require(not len(bad), f"{which}; if its weights have grown too large, set --cap")
    return {
        "sketch": sketch.cpu().numpy(),
        "prompt_index": groups.prompt_index,
        "grad_norm": norm,
        "pass_rate": np.nanmean(groups.rewards, 1),
        "half_sketch": first_half[torch.from_numpy(halved)].cpu().numpy(),
        "half_index": groups.prompt_index[halved],
        **staleness(log_ratio, groups.length),
    }


# ---------------------------------------------------------------------------------------------------------------------
# The command


@app.command(help=__doc__.splitlines()[0])
def project(
    trajectories: Given,
    out: Given,
    model: Path = TOY / "model",
    ratio: Literal[RATIOS] = "token",
    cap: Annotated[float | None, typer.Option(callback=rollout.above_zero)] = None,
    loss: Literal[LOSSES] = "grpo",
    mask_truncated: bool = False,
    k: Count = 4096,
    sparse_ratio: Share = 1.0,
    halves: Natural = 512,
    dtype: Dtype = "auto",
    deterministic: bool = False,
    batch_tokens: Count = 4096,
    seed: Natural = 0,
) -> None:
    """Options that rollout.py has as well are documented there.

    Args:
        trajectories: Folder of trajectories that rollout.py wrote.
        model: Model folder of the current policy.
        ratio: Importance weight of a token; token is the paper's.
        cap: Upper bound on these weights.  [default: none]
        loss: The loss of training, whose gradient is wanted: see train.py.
        mask_truncated: As in train.py.
        k: Dimensions of the sketch; the paper's is 32768.
        sparse_ratio: r, the share of gradient coordinates kept.
        halves: So many prompts of the set are, if live, also sketched half by half, as a check.
        seed: Of the projection; all gradients of one selection need the same.
    """
    options, model = dict(locals()), rollout.model_folder(model)
    shards = rollout.shards(trajectories, "trajectories")
    sampled = next(iter(shards.values()))["recipe"]
    foreign = f"{trajectories} was sampled by another model than {model} or those it was trained from"
    samplers = {sampled["inputs"]["model"], *(sampled["inputs"]["retry"] or ())}
    require(samplers <= set(train.lineage(model)), f"{foreign}; run rollout.py again")
    sums, count = rollout.totals(trajectories), sampled["shard"]["count"]
    rollout.use_deterministic(deterministic)
    rollout.check_out(out)
    inputs = {"model": rollout.model_identity(model), "data": sampled["inputs"]["data"]}
    options["temperature"] = temperature = sampled["options"]["temperature"]
    live, longest = sums["live"], sampled["options"]["max_tokens"]
    kept = sums["tokens"] - mask_truncated * sums["truncated"] * longest  # a truncated one has so many
    inputs["length"] = (kept or 1) / sums["trajectories"] if loss == "dapo" else None  # of the whole set
    weighing = Loss(loss, inputs["length"] or longest, mask_truncated)
    recipe = rollout.make_recipe("gradients", CODE, options, **inputs)
    of_shards = [record["recipe"]["shard"] | {"trajectories": record["identity"]} for record in shards.values()]
    if missing := rollout.unmade(out, [recipe | {"shard": shard} for shard in of_shards]):
        clock, policy = time.perf_counter(), rollout.load_model(model, rollout.pick_dtype(dtype))[0]
        sketcher = GradientSketcher(policy, k, sparse_ratio, seed, ratio, cap)
        kept, size = sketcher.projection.coordinates, live * k * 4 / 1e6
        require(kept > 0, f"--sparse-ratio {sparse_ratio:g} keeps no coordinate; take a larger one")
        said = f"{live} live prompts of {count}; {kept:,} of {sketcher.covered:,} coordinates kept"
        rollout.say(f"{trajectories}: {said} ({policy.num_parameters():,} parameters) -> k = {k:,}; {size:.1f} MB")
        chosen = np.random.default_rng(seed).permutation(count)[:halves]  # a matter of seed and prompt alone
        for path, made_from in rollout.progress(missing.items(), f"project {trajectories.name}", "shard"):
            groups, record = rollout.load_trajectories(trajectories / path.name)
            groups = groups.take(groups.live())
            halved = np.isin(groups.prompt_index, chosen) & (groups.sizes % 2 == 0)  # an odd K has no halves
            with train.named(str(trajectories / path.name)):
                tensors = project_groups(sketcher, groups, halved, temperature, batch_tokens, weighing)
            seconds, clock = time.perf_counter() - clock, time.perf_counter()
            counts = {name: record["facts"][name] for name in ("trajectories", "rewards", "truncated", "live")}
            rollout.save(path, tensors, made_from, rollout.facts(seconds, **counts))
        sketcher.close()
    rollout.gather()


if __name__ == "__main__":
    rollout.command_line(app)
