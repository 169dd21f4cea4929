"""Project: the off-policy policy gradient of every prompt, sketched to k dimensions.

    python project.py --model runs/mine/stage-00/model --trajectories runs/mine/rollouts/train.safetensors \\
                      --out runs/mine/stage-01/gradients-train.safetensors

Reads   the current model θ and a trajectory file, whose trajectories the behavior policy β sampled.
Writes  one row per live prompt (one whose rewards differ; all other gradients are exactly 0):

    sketch       float32 (N,k)  g̃(x;θ), equation 3
    prompt_index int32   (N,)   row of the data file that the trajectories belong to
    grad_norm    float32 (N,)   ‖g̃‖/√r, which estimates ‖ĝ‖
    pass_rate    float32 (N,)   mean reward under β
    ess          float32 (N,)   effective sample size of the ratios, (Σρ)²/(nΣρ²) over the prompt's n tokens, in (0, 1]

For prompt x with K trajectories τ_k ~ β, tokens a_kt and histories h_kt, the gradient is that of the objective in
`train.py` without clipping, with the stored trajectories in place of fresh ones:

    ĝ(x;θ) = 1/K Σ_k 1/|τ_k| Σ_t ρ_kt Â_k ∇log π_θ(a_kt|h_kt),    ρ_kt = π_θ(a_kt|h_kt) / β(a_kt|h_kt)           (2)
    g̃(x;θ) = P M ĝ(x;θ)                                                                                       (3)

M keeps every coordinate with probability r, independently. P (k × d) has a single ±1 per column: kept coordinate j is
added to bucket b(j) with sign s(j). Then E⟨g̃, g̃'⟩ = r⟨ĝ, ĝ'⟩, and a common factor changes no cosine.

How many prompts share a batch though each needs a gradient of its own: the weight gradient of a linear layer
y = Wa + b is Σ_t δ_t a_tᵀ (and Σ_t δ_t for the bias), a sum over tokens of the layer's input a_t and the objective's
gradient δ_t at its output. Hooks catch both for the whole batch, and one batched matrix product sums them prompt by
prompt, (P, O, T) x (P, T, I) -> (P, O, I). The weights are frozen, so that product replaces the one with which autograd
would have made the summed weight gradient, and a gradient per prompt costs little more than the backward pass it rides
on (`bench/speed.py`).

What is covered: weights and biases of every nn.Linear. The token embedding and the norms' gains are left out: 1.4% of
the toy's parameters, and their gradients are no products of this kind. A head tied to the embedding is covered as a
head. A model with other weight matrices (fused experts, convolutions) is refused.

Deviations:
 1. The paper's P is dense. One ±1 per column costs O(d) instead of O(dk) with the same expectation.
 2. Buckets are dealt: the kept coordinates of a weight are put in random order and go to the buckets one after the
    other, from a random one on. So every bucket is as likely as any other; two coordinates of different weights meet
    with probability 1/k, as with independent hashing; two of the same meet less often, or never while there are no more
    than k. Dealing needs no table of buckets and adds to contiguous memory, where a scatter jumps.
 3. k is 4096 by default (paper: 32768), enough for the toy.
 4. The released code keeps the first coordinates it comes to. Ours are random over all that is covered.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel

from rollout import (
    TOY,
    BatchTokens,
    above_zero,
    check_out,
    command_line,
    digest,
    lineage,
    load_model,
    new_app,
    open_trajectories,
    require,
    save_rows,
)
from train import Batch, collate, completion_logps, micro_batches, policy_objective, sequence_mean

# ---------------------------------------------------------------------------------------------------------------------
# The projection


class SparseProjection:
    """P M of equation 3, for parameters that are visited block by block.

    Args:
        sizes: number of coordinates of each block (a weight or a bias).
        k: buckets.
        sparse_ratio: r, the probability with which a coordinate is kept.
        seed: draws M and P; the same on every device.
    """

    def __init__(self, sizes: dict[str, int], k: int, sparse_ratio: float, seed: int, device: torch.device):
        self.k = k
        generator = torch.Generator().manual_seed(seed)
        # block -> (its kept coordinates in dealing order, their signs, the bucket of the first one)
        self.blocks: dict[str, tuple[torch.Tensor, torch.Tensor, int]] = {}
        for name, size in sizes.items():
            kept = (torch.rand(size, generator=generator) < sparse_ratio).nonzero()[:, 0]
            kept = kept[torch.randperm(len(kept), generator=generator)]
            sign = torch.randint(0, 2, (len(kept),), generator=generator) * 2.0 - 1.0
            first = int(torch.randint(0, k, (), generator=generator))
            self.blocks[name] = (kept.int().to(device), sign.to(device), first)
        self.coordinates = sum(len(kept) for kept, _, _ in self.blocks.values())

    def add(self, sketch: torch.Tensor, name: str, gradient: torch.Tensor) -> None:
        """Add block `name` of P gradients, (P, d_block), to their sketches, (P, k) float32, in place."""
        kept, sign, bucket = self.blocks[name]
        values = gradient.index_select(1, kept)  # (P, d_block) -> (P, n)
        start = 0
        while start < len(kept):  # deal until the block is empty; past the last bucket comes the first
            stop = min(start + self.k - bucket, len(kept))
            sketch[:, bucket : bucket + stop - start].addcmul_(values[:, start:stop], sign[start:stop])
            start, bucket = stop, 0


# ---------------------------------------------------------------------------------------------------------------------
# Gradients of many prompts at once


class GradientSketcher:
    """Sketches of ĝ(x;θ), equations 2 and 3, for batches of prompts. Freezes the model's weights and hooks its layers.

    Raises:
        BadInput: the model has weight matrices outside nn.Linear and its embeddings.
    """

    MATRIX_ELEMENTS = 1 << 20  # of per-prompt weight gradients held at a time (or those of one prompt)

    def __init__(self, model: PreTrainedModel, k: int, sparse_ratio: float, seed: int):
        self.model = model.requires_grad_(False)
        self.linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        known = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear | nn.Embedding)}
        others = [name for name, weight in model.named_parameters() if weight.ndim > 1 and id(weight) not in known]
        require(not others, f"no gradients per prompt for {', '.join(others[:3])}: only nn.Linear layers are covered")
        sizes = {}
        for name, module in self.linears.items():
            sizes[f"{name}.weight"] = module.weight.numel()
            if module.bias is not None:
                sizes[f"{name}.bias"] = module.bias.numel()
        self.covered = sum(sizes.values())
        self.projection = SparseProjection(sizes, k, sparse_ratio, seed, model.device)
        # Per-prompt weight gradients are made here, some prompts at a time; fresh memory each time takes longer.
        largest = max(module.weight.numel() for module in self.linears.values())
        self.workspace = torch.empty(max(largest, self.MATRIX_ELEMENTS), device=model.device)
        # (input a, output gradient δ) of each call of each layer; the prompt and its completions are two calls
        self.caught: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        for name, module in self.linears.items():
            module.register_forward_hook(self._catch(name))

    def _catch(self, name: str) -> Callable:
        def forward_hook(module: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
            activation = inputs[0].detach()
            output.requires_grad_()  # with frozen weights, nothing before the first linear layers would need a gradient
            output.register_hook(lambda delta: self.caught.setdefault(name, []).append((activation, delta)))

        return forward_hook

    def sketch(self, batch: Batch, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
        """g̃(x;θ) of the batch's P prompts, (P, k) float32, and the ratios ρ of their tokens, (P*K, C)."""
        prompts = len(batch.prompt_ids)
        _, logps = completion_logps(self.model, batch, temperature)
        objective = policy_objective(logps, batch.behavior_logps, batch.advantages, clip=None)
        # (P*K, C) -> (P*K,) -> (P,), then a sum: prompts do not meet in the network, so δ of each stays its own
        sequence_mean(objective, batch.mask).view(prompts, -1).mean(1).sum().backward()
        sketch = torch.zeros(prompts, self.projection.k, device=logps.device)
        for name, calls in self.caught.items():
            # (P, L, .) of the prompt and (P*K, C-1, .) of the completions -> (P, T, .) with T = L or K(C-1)
            layout = all(a.ndim == 3 and len(a) in (prompts, len(batch.mask)) for a, _ in calls)
            require(layout, f"layer {name} does not see its tokens prompt by prompt; this kind of model is not covered")
            calls = [tuple(x.reshape(prompts, -1, x.shape[-1]) for x in call) for call in calls]
            weight, bias = self.linears[name].weight, self.linears[name].bias
            step = max(1, self.MATRIX_ELEMENTS // weight.numel())
            for some in (slice(start, start + step) for start in range(0, prompts, step)):
                rows = len(sketch[some])
                gradient = self.workspace[: rows * weight.numel()].view(rows, *weight.shape)  # (P, O, I)
                for number, (activation, delta) in enumerate(calls):  # (P, O, T) x (P, T, I), summed over the calls
                    gradient.baddbmm_(delta[some].mT, activation[some], beta=float(number > 0))
                self.projection.add(sketch[some], f"{name}.weight", gradient.flatten(1))
            if bias is not None:
                self.projection.add(sketch, f"{name}.bias", sum(delta.sum(1) for _, delta in calls))
        self.caught.clear()
        return sketch, (logps.detach() - batch.behavior_logps).exp()


def effective_sample_size(ratio: torch.Tensor, mask: torch.Tensor, prompts: int) -> torch.Tensor:
    """(Σρ)²/(nΣρ²) over the n tokens of each prompt's completions: (P*K, C) -> (P,)."""
    ratio, mask = (ratio * mask).view(prompts, -1), mask.view(prompts, -1)
    return ratio.sum(1) ** 2 / (mask.sum(1) * (ratio**2).sum(1))


# ---------------------------------------------------------------------------------------------------------------------
# The command

app = new_app()


@app.command(help=__doc__.splitlines()[0])
def project(
    trajectories: Annotated[Path, typer.Option(help="Trajectory file that rollout.py wrote.")],
    out: Annotated[Path, typer.Option(help="Gradient file to write.")],
    model: Annotated[Path, typer.Option(help="Model folder of the current policy.")] = TOY / "model",
    k: Annotated[int, typer.Option(min=1, help="Dimensions of the sketch; the paper's is 32768.")] = 4096,
    sparse_ratio: Annotated[
        float, typer.Option(callback=above_zero, max=1, help="r, the share of gradient coordinates kept.")
    ] = 0.1,
    batch_tokens: BatchTokens = 2048,
    seed: Annotated[int, typer.Option(min=0, help="Of the projection; all files of one selection need the same.")] = 0,
) -> int:
    check_out(out, trajectories, model)
    stored = open_trajectories(trajectories)
    live = stored.live_groups()
    require(
        bool(live),
        f"{trajectories}: no live prompt, every group's rewards are equal; take more samples or easier prompts",
    )
    policy, _ = load_model(model)
    require(
        stored.metadata["model"] in lineage(policy, model),
        f"{trajectories} was sampled by another model than {model} or those it was trained from; run rollout.py again",
    )
    sketcher = GradientSketcher(policy, k, sparse_ratio, seed)
    tqdm.write(
        f"{trajectories}: {len(live)} live prompts of {stored.metadata['prompts']}; "
        f"{sketcher.projection.coordinates:,} of {sketcher.covered:,} covered coordinates kept "
        f"({policy.num_parameters():,} parameters) -> k = {k:,}; {len(live) * k * 4 / 1e6:.1f} MB"
    )
    temperature = stored.metadata["options"]["temperature"]
    metadata = {
        "model": digest(model),
        "trajectories": digest(trajectories),
        "data": stored.metadata["data"],
        "prompts": stored.metadata["prompts"],
        "options": {"k": k, "sparse_ratio": sparse_ratio, "seed": seed, "temperature": temperature},
    }
    order: list[int] = []
    norms, ess, columns = [], [], {}
    with (
        save_rows(out, "gradients", "sketch", (len(live), k), columns, metadata) as write,
        tqdm(total=len(live), desc=f"project {trajectories.stem}", unit="prompt", leave=False, disable=None) as bar,
    ):
        for groups in micro_batches(stored, live, batch_tokens):
            batch = collate(stored, groups, policy.device)
            sketch, ratio = sketcher.sketch(batch, temperature)
            norm = sketch.norm(dim=1) / sparse_ratio**0.5
            bad = [i for i, ok in zip(batch.prompt_index, torch.isfinite(norm).tolist(), strict=True) if not ok]
            require(not bad, f"gradient is not finite at prompt {', '.join(map(str, bad))} of {trajectories}")
            write(sketch.cpu().numpy())
            order += batch.prompt_index
            norms.append(norm.cpu())
            ess.append(effective_sample_size(ratio, batch.mask, len(groups)).cpu())
            bar.update(len(groups))
        columns["prompt_index"] = np.array(order, np.int32)
        columns["grad_norm"] = torch.cat(norms).numpy()
        rates = stored.pass_rates()
        columns["pass_rate"] = np.array([rates[i] for i in order], np.float32)
        columns["ess"] = torch.cat(ess).numpy()
    tqdm.write(f"{out}: effective sample size {columns['ess'].mean():.2f} of 1")
    return len(live)


if __name__ == "__main__":
    command_line(app)
