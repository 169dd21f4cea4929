"""Project: the off-policy policy gradient of every prompt, sketched to k dimensions.

    python project.py --model runs/mine/stage-01/model --trajectories runs/mine/rollouts/train \\
                      --out runs/mine/stage-02/gradients-train

Reads   the current model θ and a folder of trajectories, which the behavior policy β sampled (several policies, if
        failures were retried).
Writes  a folder with a shard for each shard of trajectories, with one row for each of the N live prompts in it. (A
        prompt is live if its trajectories did not all get the same reward. All other gradients are exactly 0.)

    sketch         float32 (N,k)  g̃(x;θ), equation 3
    prompt_index   int32   (N,)   row of the data set
    grad_norm      float32 (N,)   ‖g̃‖, which estimates ‖ĝ‖
    pass_rate      float32 (N,)   mean reward under β
    ess_token      float32 (N,)   effective sample size of the prompt's tokens: (Σρ)² / (their number · Σρ²), in (0, 1]
    ess_trajectory float32 (N,)   the same of its K trajectories, with the products Π_t ρ_it
    token_kl, mean_change, largest_change  float32 (N,)   KL(β‖π_θ) and |log ρ|, mean and largest, over its tokens
    half_sketch    float32 (Q,k)  g̃ from one half of the trajectories (train.halves), for Q of the prompts, K even
    half_index     int32   (Q,)   their rows of the data set. If the halves disagree on the ranking, do not trust it.

Prompt x has K trajectories τ_i ~ β with tokens a_it and histories h_it. With w = ρ, its gradient is that of its part of
the first term of the objective (6) in `train.py`, without clipping, with stored trajectories in place of fresh ones:

    ĝ(x;θ) = 1/K Σ_i 1/ℓ_i Σ_t w_it Â_i ∇log π_θ(a_it|h_it)                                                    (2)
    g̃(x;θ) = Φ M ĝ(x;θ)                                                                                       (3)

ℓ_i is |τ_i|; `--loss` changes it, and dr_grpo Â_i, too. `--mask-truncated` gives truncated completions weight 0, as in
training. The mean length of dapo is that of the whole set's completions.

With ρ_it = π_θ(a_it|h_it) / β(a_it|h_it), `--ratio` sets the importance weight w_it, and `--cap` its upper bound:

    none 1       token ρ_it (the paper's)       prefix Π_{t'<=t} ρ_it'     sequence Π_t' ρ_it'

M, the mask, keeps coordinate j of the gradient with probability κ_j, and divides it by √κ_j. κ is the same within a
tensor: min(1, quota / its size), with a quota such that a share r of all coordinates is kept.

Φ, the random projection (k × all coordinates), has a single ±1 in each column: coordinate j is added, with its sign, to
one of k buckets. The sign is the product of a sign of the coordinate's row and a sign of its column in its tensor. The
bucket is (j + shift) mod q, with j counted row by row in the tensor. The shift is random for each tensor. q is the
largest prime up to k; buckets from q on stay 0. So the flattened tensor is cut into laps of q numbers, which are added
up: two coordinates of a tensor meet in a bucket only if they are a multiple of q apart. (The lap is prime because, if
it shared a factor with the width of a tensor, large parts of a column would meet.)

Over the parameters that are covered E⟨g̃, g̃'⟩ = ⟨ĝ, ĝ'⟩, and with z_jm = g_j g'_m + g_m g'_j

    Var⟨g̃, g̃'⟩ = Σ_j (1/κ_j - 1) g_j² g'_j²  +  Σ_{j<m in one bucket of a tensor} z_jm²
                  +  1/q Σ_{j<m of different tensors} z_jm²

This holds for tensors with at most q rows and fewer than q columns. In larger ones some pairs share their sign, and
their z are added before they are squared. Compare Weinberger et al., Feature Hashing for Large Scale Multitask Learning
(2009), lemma 2, which has 1/k Σ_{j<m} z_jm² in place of the last two sums.

Per-prompt gradients from one batch of many prompts: the weight gradient of a linear layer is Σ_t δ_t input_tᵀ, a sum
over tokens of the layer's input and the objective's gradient δ_t at its output; that of its bias is Σ_t δ_t. The
gradient of an embedding adds δ_t to the row of token t. Hooks catch input and δ for the whole batch, and one batched
matrix product sums them prompt by prompt, (P, O, W) x (P, W, I) -> (P, O, I), for P prompts in rows of W tokens, O
outputs and I inputs. The weights are frozen, so this product replaces the one with which autograd would make the summed
weight gradient. So a gradient per prompt costs little more than the backward pass it comes from (`bench/speed.py`).

Covered are all nn.Linear and nn.Embedding layers. Other parameters of one dimension, the norms' gains, are left out. A
model with other weight matrices (fused experts, convolutions, layers derived from those two) is refused.

Why this projection (`bench/projection.py`: the toy after two stages, precision of the top 10% against exact gradients):

    k                                    4096    4096   32768   32768
    r                                     0.1       1     0.1       1
    here                                 0.94    0.93    0.95    0.98
    the same κ for every tensor          0.87    0.93    0.90    0.98
    dense Gaussian                       0.89    0.94    0.92    0.98
    √r of the rows, √r of the columns    0.81    0.93    0.85    0.98
    the first coordinates                0.81    0.95    0.82    0.98

Without a projection, precision is 1.00 over the covered parameters and 0.96 over the linear layers alone. Time does not
depend on r. M and Φ are drawn anew in each stage, from its seed.

Deviations from the paper (and from its released code):
 1. The paper's Φ is dense. One ±1 per column has the same expectation, and costs one addition per coordinate, not k.
 2. The paper keeps a share r of 0.1. Here r is 1 by default, which costs the same: M is the identity.
 3. Below r = 1 every tensor keeps the same number of coordinates (or all it has) instead of the same share of them:
    gradients of small tensors have larger coordinates.
 4. k is 4096 by default (paper: 32768), so that a run of the toy stays small on disk.
 5. The released code keeps the first coordinates it comes to. Ours are random over all that is covered. Its default
    keeps 15 million of 1.5 billion, a share of 0.01.
 6. The norms' gains are left out of the gradient.
 7. Sketches are float32 (released: float16).
(As in the paper, the KL term, the entropy bonus, clipping and AdamW's scaling of coordinates play no part in ranking.)
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
from train import Batch, Loss, LossName, collate, completion_logps, k3_kl, micro_batches

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CODE = train.CODE | {"project": rollout.code_digest(__file__)}
app = typer.Typer(**rollout.PLAIN)
Ratio = Literal["token", "none", "prefix", "sequence"]

# ---------------------------------------------------------------------------------------------------------------------
# The objective


def importance_weights(
    logps: Tensor, behavior_logps: Tensor, length: list[int], ratio: str, cap: float | None = None
) -> Tensor:
    """w_it of equation 2, without a gradient: (T,) log-probs of trajectories of these lengths -> (T,).

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
    importance = importance_weights(logps, batch.behavior_logps, batch.length, ratio, cap)
    return (batch.weight * importance * batch.advantages * logps).sum()


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
    change, kl = np.abs(log_ratio), k3_kl(torch.zeros(1), torch.from_numpy(log_ratio)).clamp(min=0).numpy()
    return {
        "token_kl": np.add.reduceat(kl, starts) / tokens,
        "mean_change": np.add.reduceat(change, starts) / tokens,
        "largest_change": np.maximum.reduceat(change, starts),
        "ess_token": effective_sample_size(log_ratio, tokens),
        "ess_trajectory": effective_sample_size(by_trajectory, np.count_nonzero(length, axis=1)),
    }


def effective_sample_size(log_weights: Array, counts: Array) -> Array:
    """Kish's (Σw)² / (count · Σw²) in (0, 1] for each of N groups, (N,), of `counts` weights each, stored one group
    after another.

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
    """κ = min(1, quota / size) for each tensor, with one quota for all, such that a share `sparse_ratio` is kept.

    >>> keep_probability({"bias": 10, "small": 100, "large": 890}, 0.31)  # 310 of 1000: 10 + 100 + 200
    {'bias': 1.0, 'small': 1.0, 'large': 0.2247...}
    """
    quota, left = 0.0, sparse_ratio * sum(sizes.values())
    for place, size in enumerate(sorted(sizes.values())):
        quota = left / (len(sizes) - place)  # an even share of the coordinates that are left to keep
        if size >= quota:
            break
        left -= size  # smaller tensors are kept whole
    return {name: min(1.0, quota / size) for name, size in sizes.items()}


class SparseProjection:
    """Φ M of equation 3, for parameters that are visited tensor by tensor.

    Args:
        shapes: of each parameter tensor.
        keep: κ of each tensor, the probability with which a coordinate is kept.
        k: number of buckets.
        seed: draws M and Φ; the same on every device.
        like: a tensor with the device and the dtype of the gradients.
    """

    def __init__(self, shapes: dict[str, torch.Size], keep: dict[str, float], k: int, seed: int, like: Tensor):
        self.k = k
        self.q = next(q for q in range(k, 0, -1) if all(q % n for n in range(2, math.isqrt(q) + 1)))
        self.coordinates, generator = 0, torch.Generator().manual_seed(seed)
        # name -> (±1 for each row (O, 1) and column (I,), M as 0 and 1 or None if all are kept, 1/√κ, the shift)
        self.blocks: dict[str, tuple[Tensor, Tensor, Tensor | None, float, int]] = {}
        for name, shape in shapes.items():
            rows, columns, kappa = shape[0], math.prod(shape[1:]), keep[name]
            row, column = (torch.randint(0, 2, (n,), generator=generator).to(like) * 2 - 1 for n in (rows, columns))
            kept = (torch.rand(rows, columns, generator=generator) < kappa).to(like.device) if kappa < 1 else None
            shift = int(torch.randint(0, self.q, (), generator=generator))
            self.blocks[name] = (row[:, None], column, kept, kappa**-0.5, shift)
            self.coordinates += rows * columns if kept is None else int(kept.count_nonzero())

    def add(self, sketch: Tensor, name: str, gradient: Tensor) -> None:
        """Add P gradients (P, O, I) of tensor `name` to their sketches (P, k) float32; overwrites the gradients."""
        row, column, kept, scale, shift = self.blocks[name]
        gradient.mul_(row).mul_(column)
        if kept is not None:
            gradient.mul_(kept)
        lap = flat = gradient.flatten(1)  # (P, O*I)
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

    MATRIX_ELEMENTS = 1 << 20  # numbers of per-prompt weight gradients made at a time on a CPU (or those of one prompt)

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
        self.weights = {names[id(p)]: p for p in sorted(parameters, key=lambda p: -p.ndim)}  # biases last
        rest = [module for module in model.modules() if module not in layers]  # derived ones may hold tied weights
        others = [names[id(p)] for module in rest for p in module.parameters(recurse=False) if p.ndim > 1]
        only = "per-prompt gradients support only nn.Linear and nn.Embedding layers"
        require(not others, f"{', '.join(others[:3])}: {only}")
        sizes = {name: parameter.numel() for name, parameter in self.weights.items()}
        self.covered = sum(sizes.values())
        shapes, keep = {n: p.shape for n, p in self.weights.items()}, keep_probability(sizes, sparse_ratio)
        # Per-prompt weight gradients are made in this memory, some prompts at a time; fresh memory each time is slower.
        largest = max(sizes.values())
        self.workspace = torch.empty(max(largest, self.MATRIX_ELEMENTS), device=model.device, dtype=model.dtype)
        self.together = self.MATRIX_ELEMENTS if model.device.type == "cpu" else len(self.workspace)
        self.projection = SparseProjection(shapes, keep, k, seed, self.workspace)
        self.sketches = torch.empty(0, k)  # (P, k) of the batch under way
        self.hooks = [
            module.register_forward_hook(self._catch([names[id(p)] for p in module.parameters()])) for module in layers
        ]

    def close(self) -> None:
        """Remove the hooks: they and the model would keep each other in memory."""
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
        """The share in g̃(x;θ) of each of the batch's P pieces, (P, k) float32, and log π_θ of its tokens, (T,)."""
        self.sketches = torch.zeros(len(batch.ids), self.projection.k, device=batch.ids.device)
        logps, _ = completion_logps(self.model, batch, temperature)
        # A sum over prompts. They do not meet in the network, so each has a δ of its own.
        off_policy_objective(logps, batch, self.ratio, self.cap).backward()
        return self.sketches, logps.detach()

    def _add(self, name: str, taken: Tensor, delta: Tensor) -> None:
        """Add to the sketches the gradient of a weight or bias, from one call of its layer: its input, which is
        (P, W, I), or token ids (P, W), and δ (P, W, O)."""
        weight, prompts = self.weights[name], len(self.sketches)
        layout = delta.ndim == 3 and len(delta) == prompts
        require(layout, f"{name} does not see its tokens prompt by prompt; this kind of model is not covered")
        step = max(1, self.together // weight.numel())
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

    A gradient is the sum over the pieces of its group: a token weighs 1/(Kℓ_i), K counting the whole group.

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
        for (n, part), piece in zip(pieces, sketches, strict=True):
            sketch[n] += piece
            if halved[n] and np.isin(part, train.halves(groups.rewards[n])[0]).all():
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
    ratio: Ratio = "token",
    cap: Annotated[float | None, typer.Option(callback=rollout.above_zero)] = None,
    loss: LossName = "grpo",
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
        halves: Sketch N prompts of the set also half by half, if they are live, as a check.
        seed: Seed of the projection; all gradients of one selection need the same.
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
    trained = sums["tokens"] - mask_truncated * sums["truncated"] * longest  # a truncated one has this length
    inputs["length"] = (trained or 1) / sums["trajectories"] if loss == "dapo" else None  # the mean over the whole set
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
        chosen = np.random.default_rng(seed).permutation(count)[:halves]  # depends only on seed and prompt
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
