"""Train: one stage of GRPO on the prompts that a selection file names.

    python train.py --selection runs/mine/stage-00/selection.safetensors --out runs/mine/stage-00

Reads   a model folder, the data, the selection and (from the second stage on) the optimizer state before it.
Writes  into the folder --out: `model/` (a Hugging Face checkpoint), `optimizer.safetensors` (AdamW's moments) and
        `metrics.jsonl` (a line per step).

A step samples K completions for a batch of P prompts and ascends

    J = 1/(PK) Σ_k 1/|τ_k| Σ_t [ min(ρ_kt Â_k, clip(ρ_kt, 1-ε, 1+ε) Â_k) - c_KL k3_kt + c_H H_kt ]         (6)

    Â_k   = (R_k - mean R) / (std R + 1e-6)       over the K completions of the prompt; std divides by K - 1
    ρ_kt  = π_θ(a_kt|h_kt) / π_sampling(a_kt|h_kt)
    k3_kt = q - log q - 1 with q = π_initial(a_kt|h_kt) / π_θ(a_kt|h_kt)
    H_kt  = entropy of π_θ(.|h_kt)

Completions come from the policy itself, or from vLLM (`--engine`), which takes over its weights after every step; then
its log-probs are compared with the policy's, and a difference stops the run. Weights are float32; where --dtype says
bfloat16, as on CUDA, matrix products are autocast.

The first term is the one whose gradient `project.py` takes prompt by prompt: what is ranked is what is ascended.

Deviations from the paper's RL stage:
 1. Groups whose rewards are all equal cost no forward pass. Their policy gradient is exactly 0; their KL and entropy
    terms are left out. They still count in the mean 1/(PK).
 2. The prompts of a step are drawn from the selection without replacement, anew at each step (no epochs).
 3. Toy defaults: 64 prompts a step (paper: 128), learning rate 5e-5 (paper: 1e-6, for a 1.5B model), 40 steps a stage
    (released code: 10; at equal steps 40 are as accurate here, and scoring is paid less often: docs/results.md).
 4. One temperature for everything, 1 by default (paper: stored trajectories at 0.5).
"""

import functools
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from tqdm import tqdm
from transformers import PreTrainedModel

from rollout import (
    TOY,
    BadInput,
    BatchTokens,
    Chat,
    Data,
    Dtype,
    Engine,
    GpuMemory,
    Limit,
    MaxErrors,
    MaxPromptTokens,
    MaxTokens,
    Reward,
    RewardSeconds,
    SaveEvery,
    Seed,
    Source,
    System,
    Temperature,
    Trajectories,
    Unfinished,
    above_zero,
    check_out,
    command_line,
    device,
    digest,
    encode_prompts,
    fitting_prompts,
    lineage,
    load_model,
    load_prompts,
    model_folder,
    named,
    new_app,
    open_engine,
    open_tensors,
    pack,
    pad_left,
    pick_dtype,
    prefill,
    require,
    sample_trajectories,
    save_tensors,
    settings_of,
    whole_file,
)

# ---------------------------------------------------------------------------------------------------------------------
# The formulas


def group_advantages(rewards: torch.Tensor) -> torch.Tensor:
    """Â_k = (R_k - mean R) / (std R + 1e-6): (P, K) -> (P, K). Equation 2; std is the sample's (divided by K - 1).

    >>> group_advantages(torch.tensor([[1.0, 0.0, 0.0, 0.0]]))  # mean 1/4, std 1/2
    tensor([[ 1.5000, -0.5000, -0.5000, -0.5000]])
    """
    return (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-6)


def policy_objective(
    logps: torch.Tensor, behavior_logps: torch.Tensor, advantages: torch.Tensor, clip: float
) -> torch.Tensor:
    """min(ρ Â, clip(ρ, 1-ε, 1+ε) Â) per token (6). Its gradient, where nothing is clipped, is ρ Â ∇log π (2).

    Args:
        logps, behavior_logps: (B, C) log-probs of the tokens under π_θ and under the policy that sampled them.
        advantages: (B,).
    """
    ratio = torch.exp(logps - behavior_logps)
    return torch.minimum(ratio * advantages[:, None], ratio.clamp(1 - clip, 1 + clip) * advantages[:, None])


def k3_kl(logps: torch.Tensor, initial_logps: torch.Tensor) -> torch.Tensor:
    """Schulman's low-variance estimate of KL(π_θ ‖ π_initial) per token: q - log q - 1 >= 0, q = π_initial / π_θ."""
    log_q = initial_logps - logps
    return torch.exp(log_q) - log_q - 1


def sequence_mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """1/|τ| Σ_t of (B, C) over the tokens of each completion: (B,). Equations 2 and 6."""
    return (values * mask).sum(1) / mask.sum(1)


# ---------------------------------------------------------------------------------------------------------------------
# From trajectories to log-probs


@dataclass
class Batch:
    """P groups of K trajectories. Row p*K + k of a (P*K, ...) tensor is completion k of prompt p."""

    prompt_index: list[int]  # P
    prompt_ids: torch.Tensor  # (P, L) padded on the left
    prompt_mask: torch.Tensor  # (P, L)
    completion_ids: torch.Tensor  # (P*K, C) padded on the right
    mask: torch.Tensor  # (P*K, C) float, 1 at the tokens of a completion
    behavior_logps: torch.Tensor  # (P*K, C)
    advantages: torch.Tensor  # (P*K,)


def collate(trajectories: Trajectories, groups: Sequence[tuple[int, range]], device: torch.device) -> Batch:
    """Pad the given groups (prompt_index, rows (K,)), or parts of groups, into a batch."""
    prompt_ids, prompt_mask = pad_left([trajectories.prompt(rows[0]) for _, rows in groups], device)
    rows = np.concatenate([rows for _, rows in groups])  # (P*K,)
    length = trajectories.completion_length[rows]
    column = np.arange(length.max())
    mask = column < length[:, None]  # (P*K, C)
    first_token = trajectories.offsets[rows] + trajectories.prompt_length[rows]
    completion_ids, behavior_logps = np.zeros(mask.shape, np.int64), np.zeros(mask.shape, np.float32)
    completion_ids[mask] = trajectories.tokens[(first_token[:, None] + column)[mask]]
    behavior_logps[mask] = trajectories.behavior_logps[(trajectories.logp_offsets[rows][:, None] + column)[mask]]
    whole = [trajectories.group_of(rows[0]) for _, rows in groups]  # advantages belong to it, whatever the part
    rewards = torch.from_numpy(trajectories.rewards[np.stack(whole)])  # (P, K)
    advantages = group_advantages(rewards).numpy()
    advantages = [
        of[np.array(part) - all_.start] for of, (_, part), all_ in zip(advantages, groups, whole, strict=True)
    ]
    return Batch(
        prompt_index=[i for i, _ in groups],
        prompt_ids=prompt_ids,
        prompt_mask=prompt_mask,
        completion_ids=torch.from_numpy(completion_ids).to(device),
        mask=torch.from_numpy(mask).float().to(device),
        behavior_logps=torch.from_numpy(behavior_logps).to(device),
        advantages=torch.from_numpy(np.concatenate(advantages)).to(device),
    )


def micro_batches(
    trajectories: Trajectories,
    groups: dict[int, range],
    batch_tokens: int,
    *,
    parts: int = 1,
    repeat_prompt: bool = False,
) -> Iterator[list[tuple[int, range]]]:
    """Groups (prompt_index, rows (K,)) in batches of at most `batch_tokens` padded tokens.

    A group with more is cut, and its pieces follow each other as batches of their own, of one trajectory at least.

    Args:
        parts: so many equal parts of a group, none of which shares a piece with another.
        repeat_prompt: each completion comes with its prompt.
    """
    items = sorted(groups.items())
    sizes = []  # (longest completion, prompt)
    for _, rows in items:
        longest, prompt = int(trajectories.completion_length[rows].max()), int(trajectories.prompt_length[rows[0]])
        sizes.append((longest + prompt, 0) if repeat_prompt else (longest, prompt))
    samples = len(items[0][1]) if items else 1
    for batch in pack(sizes, samples, batch_tokens):
        longest, prompt = sizes[batch[0]]
        i, rows = items[batch[0]]
        if len(batch) > 1 or samples == 1 or prompt + samples * longest <= batch_tokens:
            yield [items[i] for i in batch]
            continue
        most = max(1, (batch_tokens - prompt) // longest)
        for part in range(parts):
            own = rows[part * samples // parts : (part + 1) * samples // parts]
            for start in range(0, len(own), most):
                yield [(i, own[start : start + most])]


def completion_logps(model: PreTrainedModel, batch: Batch, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs of the tempered policy over the vocabulary, (P*K, C, V), and of the batch's tokens, (P*K, C).

    Each prompt is computed once: its keys and values serve its K completions, and gradients flow back through them.
    On the toy that halves a forward + backward (`bench/speed.py`). Padding has log-prob 0.

    Raises:
        BadInput: NaN or infinity, naming the prompts.
    """
    samples = len(batch.completion_ids) // len(batch.prompt_ids)
    inputs = batch.completion_ids[:, :-1]  # (P*K, C-1): the last token predicts nothing
    if model.is_gradient_checkpointing and torch.is_grad_enabled():
        # Layers are computed twice, which a cache does not survive: here each completion comes with its prompt.
        ids, mask = (x.repeat_interleave(samples, 0) for x in (batch.prompt_ids, batch.prompt_mask))
        ids, mask = torch.cat([ids, inputs], 1), torch.cat([mask, torch.ones_like(inputs)], 1)  # (P*K, L+C-1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        model.train()  # layers ask for it; the models here have no dropout
        logits = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            use_cache=False,
            logits_to_keep=batch.completion_ids.shape[1],
        ).logits  # (P*K, C, V)
        model.eval()
    else:
        logits, cache, mask, position = prefill(model, batch.prompt_ids, batch.prompt_mask, samples)
        if inputs.shape[1]:
            rest = model(
                input_ids=inputs,
                attention_mask=torch.cat([mask, torch.ones_like(inputs)], 1),
                position_ids=position + torch.arange(inputs.shape[1], device=inputs.device),
                past_key_values=cache,
                use_cache=True,
            ).logits
            logits = torch.cat([logits, rest], 1)  # (P*K, 1, V), (P*K, C-1, V) -> (P*K, C, V)
    all_logps = torch.log_softmax(logits.float() / temperature, -1)
    logps = all_logps.gather(2, batch.completion_ids[:, :, None])[:, :, 0].masked_fill(batch.mask == 0, 0.0)
    finite = torch.isfinite(logps.detach()).all(1).view(-1, samples).all(1)  # (P*K, C) -> (P,)
    bad = [i for i, ok in zip(batch.prompt_index, finite.tolist(), strict=True) if not ok]
    require(not bad, f"logits are not finite at prompt {', '.join(map(str, bad))}")
    return all_logps, logps


# ---------------------------------------------------------------------------------------------------------------------
# One step


def grpo_step(
    model: PreTrainedModel,
    initial: PreTrainedModel | None,
    trajectories: Trajectories,
    *,
    temperature: float,
    clip: float,
    kl: float,
    entropy: float,
    batch_tokens: int,
) -> dict[str, float]:
    """Add the gradient of -J (6) to the parameters' `.grad`, micro-batch by micro-batch.

    Returns J, and means over the tokens of live groups: the KL, the entropy, the share of ratios outside 1 ± ε.

    Every sequence weighs 1/(PK) whichever micro-batch it is in, so their size changes nothing beyond rounding.
    """
    sequences = len(trajectories.rewards)  # P*K, dead groups included
    sums = dict.fromkeys(["objective", "kl", "entropy", "outside_clip", "tokens"], 0.0)
    live, repeated = trajectories.live_groups(), model.is_gradient_checkpointing
    for groups in micro_batches(trajectories, live, batch_tokens, repeat_prompt=repeated):
        batch = collate(trajectories, groups, model.device)
        all_logps, logps = completion_logps(model, batch, temperature)
        with torch.set_grad_enabled(entropy > 0):
            token_entropy = -(all_logps.exp() * all_logps).sum(-1)  # (P*K, C, V) -> (P*K, C)
        value = policy_objective(logps, batch.behavior_logps, batch.advantages, clip) + entropy * token_entropy
        if initial is not None:
            with torch.no_grad():
                initial_logps = completion_logps(initial, batch, temperature)[1]  # all (P*K, C, V) would stay for long
            token_kl = k3_kl(logps, initial_logps)
            value = value - kl * token_kl
            sums["kl"] += (token_kl.detach() * batch.mask).sum().item()
        objective = sequence_mean(value, batch.mask).sum() / sequences
        (-objective).backward()
        outside = ((logps - batch.behavior_logps).exp() - 1).abs() > clip
        sums["objective"] += objective.item()
        sums["entropy"] += (token_entropy.detach() * batch.mask).sum().item()
        sums["outside_clip"] += (outside * batch.mask).sum().item()
        sums["tokens"] += batch.mask.sum().item()
    tokens = max(sums["tokens"], 1)
    return {name: sums[name] / tokens for name in ("kl", "entropy", "outside_clip")} | {"objective": sums["objective"]}


def warn_of_collapse(log: list[dict], patience: int = 10) -> None:
    """Say once when nothing is left to learn from: an entropy near zero, or no live group for `patience` steps."""
    step, live = log[-1]["step"], [line["live_prompts"] > 0 for line in log]
    if len(log) >= patience and not any(live[-patience:]) and (len(log) == patience or live[-patience - 1]):
        tqdm.write(f"step {step}: no live prompt for {patience} steps; there is nothing to learn from these prompts")
    low = [line["entropy"] < LOW_ENTROPY for line in log if line["live_prompts"]]
    if live[-1] and low[-1] and not any(low[:-1]):
        tqdm.write(f"step {step}: entropy below {LOW_ENTROPY:g} nats per token; the policy has all but collapsed")


LOW_ENTROPY = 1e-3


# ---------------------------------------------------------------------------------------------------------------------
# Optimizer state on disk

MOMENTS = ("exp_avg", "exp_avg_sq")


def moments(optimizer: torch.optim.AdamW, model: PreTrainedModel) -> dict[str, np.ndarray]:
    """AdamW's moments, as `NAME.exp_avg` and `NAME.exp_avg_sq`."""
    state = {name: optimizer.state[parameter] for name, parameter in model.named_parameters()}
    return {f"{name}.{moment}": state[name][moment].cpu().numpy() for name in state for moment in MOMENTS}


def optimizer_steps(optimizer: torch.optim.AdamW) -> int:
    return int(next(iter(optimizer.state.values()))["step"])


def load_moments(
    tensors: dict[str, np.ndarray], optimizer: torch.optim.AdamW, model: PreTrainedModel, steps: int
) -> None:
    for name, parameter in model.named_parameters():
        state = {moment: torch.from_numpy(np.array(tensors[f"{name}.{moment}"])) for moment in MOMENTS}
        state["step"] = torch.tensor(float(steps))
        # on the parameter's device, where a fused optimizer wants the step too
        optimizer.state[parameter] = {key: value.to(parameter.device) for key, value in state.items()}


def load_weights(tensors: dict[str, np.ndarray], model: PreTrainedModel) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(np.array(tensors[name])))


def save_optimizer(path: Path, optimizer: torch.optim.AdamW, model: PreTrainedModel, model_digest: str) -> None:
    """The moments, tied by digest to the model they belong to."""
    metadata = {"model": model_digest, "steps": optimizer_steps(optimizer)}
    save_tensors(path, "optimizer", moments(optimizer, model), metadata)


def load_optimizer(path: Path, optimizer: torch.optim.AdamW, model: PreTrainedModel, model_path: Path) -> None:
    tensors, metadata = open_tensors(path, "optimizer")
    same = metadata["model"] == digest(model_path)
    require(same, f"{path} is the optimizer state of another model than {model_path}")
    load_moments(tensors, optimizer, model, metadata["steps"])


# ---------------------------------------------------------------------------------------------------------------------
# The command

app = new_app()


@app.command(help=__doc__.splitlines()[0])
def train(
    selection: Annotated[Path, typer.Option(help="Selection file that select.py wrote.")],
    out: Annotated[Path, typer.Option(help="Folder for model/, optimizer.safetensors and metrics.jsonl.")],
    model: Annotated[Path, typer.Option(help="Model folder to start from.")] = TOY / "model",
    initial_model: Annotated[Path | None, typer.Option(help="Initial policy, for KL.  [default: --model]")] = None,
    optimizer: Annotated[Path | None, typer.Option(help="Optimizer state to go on from.  [default: fresh]")] = None,
    data: Data = Source(TOY / "train.jsonl"),
    steps: Annotated[int, typer.Option(min=1, help="Batches of rollouts.")] = 40,
    batch_prompts: Annotated[int, typer.Option(min=1, help="P, prompts per step.")] = 64,
    samples: Annotated[int, typer.Option(min=2, help="K, completions per prompt.")] = 8,
    limit: Limit = None,
    iterations: Annotated[int, typer.Option(min=1, help="Updates per batch of rollouts (GRPO's mu).")] = 1,
    lr: Annotated[float, typer.Option(callback=above_zero, help="AdamW's learning rate.")] = 5e-5,
    max_grad_norm: Annotated[float, typer.Option(callback=above_zero, help="The gradient is cut to this norm.")] = 1.0,
    clip: Annotated[float, typer.Option(callback=above_zero, help="Ratios are cut to 1 - clip .. 1 + clip.")] = 0.2,
    kl: Annotated[float, typer.Option(min=0, help="Weight of the KL term; 0 loads no initial policy.")] = 0.001,
    entropy: Annotated[float, typer.Option(min=0, help="Weight of the entropy bonus.")] = 0.001,
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
    gradient_checkpointing: Annotated[
        bool,
        typer.Option(
            "--gradient-checkpointing/--no-gradient-checkpointing",
            help="Compute activations twice instead of keeping them.",
        ),
    ] = False,
    batch_tokens: BatchTokens = 16384,
    save_every: SaveEvery = 300.0,
    seed: Seed = 0,
) -> list[dict]:
    settings = settings_of(locals())
    check_out(out / "model", model, initial_model, model=True)
    rows = load_prompts(data, limit)
    tensors, metadata = open_tensors(selection, "selection")
    require(metadata["data"] == rows.digest, f"{selection} was made from other data than {data}")
    chosen = np.array(tensors["ranked"])  # (N,)
    model, precision = model_folder(model), pick_dtype(dtype)
    policy, tokenizer = load_model(model)  # float32: steps of 1e-6 would vanish in bfloat16
    half = functools.partial(torch.autocast, device().type, precision, enabled=precision != torch.float32)
    encoded = encode_prompts(tokenizer, [rows[i] for i in chosen], system, chat, str(data))
    kept = fitting_prompts(str(selection), encoded, policy, max_tokens, max_prompt_tokens)
    prompt_ids = {chosen[i]: encoded[i] for i in kept}
    chosen = chosen[kept]
    own = metadata.get("model") in (None, *lineage(policy, model))  # a baseline's selection names no model
    require(own, f"{selection} was made with another model than {model} or those it was trained from")
    # float32 as well: rounding to bfloat16 moves log-probs by more than training does at first
    initial_model = model_folder(initial_model or model)
    initial = load_model(initial_model)[0].requires_grad_(False) if kl else None
    adamw = torch.optim.AdamW(policy.parameters(), lr=lr, weight_decay=0.0, fused=True)
    if optimizer:
        load_optimizer(optimizer, adamw, policy, model)
    for parameter in policy.parameters():
        parameter.grad = torch.zeros_like(parameter)  # so that AdamW has a state even if no group is ever live
    vllm = {"batch_tokens": batch_tokens, "dtype": precision, "gpu_memory": gpu_memory, "seed": seed}
    sampler = open_engine(engine, model, policy, tokenizer, **vllm)
    allowed = max(1, max_errors * samples * batch_prompts)
    verdicts = {"seconds": reward_seconds, "allowed": allowed}
    if gradient_checkpointing:
        policy.gradient_checkpointing_enable({"use_reentrant": False})
    sampling = {"samples": samples, "max_tokens": max_tokens, "temperature": temperature}
    objective = {"temperature": temperature, "clip": clip, "kl": kl, "entropy": entropy, "batch_tokens": batch_tokens}
    random = np.random.default_rng(seed)
    log: list[dict] = []
    files = {"model": model, "initial_model": initial_model, "selection": selection, "optimizer": optimizer}
    made_from = {name: digest(path) for name, path in files.items() if path} | {"data": rows.digest}
    work = Unfinished(out / "model", made_from | {"options": settings}, save_every)
    for tensors, found in work.load("training"):
        load_weights(tensors, policy)
        load_moments(tensors, adamw, policy, found["steps"])
        random.bit_generator.state, log = found["random"], found["log"]
    resumed = len(log)

    def save(random_state: dict) -> None:
        """All that the steps to come depend on."""
        state = {"steps": optimizer_steps(adamw), "random": random_state, "log": log}
        weights = {name: parameter.detach().cpu().numpy() for name, parameter in policy.named_parameters()}
        work.save("training", weights | moments(adamw, policy), state, keep=False)

    progress = tqdm(
        range(resumed, steps), initial=resumed, total=steps, desc="train", unit="step", leave=False, disable=None
    )
    for step in progress:
        start, drawn = time.perf_counter(), random.bit_generator.state
        picked = random.choice(chosen, min(batch_prompts, len(chosen)), replace=False)
        prompts = [prompt_ids[i] for i in picked]
        if step:  # the first step of a resumed stage, too
            sampler.sync(policy)
        with named(f"step {step}"), half():
            trajectories = sample_trajectories(
                sampler,
                tokenizer,
                [rows[i] for i in picked],
                picked,
                reward,
                policy=policy,
                prompts=prompts,
                verdicts=verdicts,
                **sampling,
                seed=[seed, step],
            )
        sampled = time.perf_counter()
        for iteration in range(iterations):
            adamw.zero_grad(set_to_none=False)
            with named(f"step {step}"), half():
                measured = grpo_step(policy, initial, trajectories, **objective)
            norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), max_grad_norm).item()
            if not np.isfinite(norm):
                if log and not iteration:  # the weights are still those that the step began with
                    save(drawn)
                raise BadInput(f"step {step}: gradient is not finite at prompts {sorted(picked.tolist())}")
            adamw.step()
        log.append(
            {
                "step": step,
                "reward": float(trajectories.rewards.mean()),
                "live_prompts": len(trajectories.live_groups()),
                "prompts": len(picked),
                "trajectories": len(trajectories.rewards),
                "truncated": float(trajectories.truncated.mean()),
                "completion_tokens": int(trajectories.logp_offsets[-1]),
                **{f"reward_{name}": count for name, count in trajectories.metadata.items()},
                **measured,
                "grad_norm": norm,
                "seconds_rollout": sampled - start,
                "seconds_update": time.perf_counter() - sampled,
            }
        )
        progress.set_postfix(reward=f"{log[-1]['reward']:.2f}")
        warn_of_collapse(log)
        if step + 1 < steps and work.due():
            save(random.bit_generator.state)
    policy.config.cropi_ancestors = lineage(policy, model)
    with whole_file(out / "metrics.jsonl") as temporary:
        temporary.write_text("".join(json.dumps(line) + "\n" for line in log))
    with whole_file(out / "model") as temporary:  # comes last: where it stands, the stage has been trained
        policy.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        save_optimizer(out / "optimizer.safetensors", adamw, policy, digest(temporary))
    work.finish()
    first, last = log[0]["reward"], log[-1]["reward"]
    tqdm.write(f"{out}/model: {steps} steps on {len(chosen)} prompts, reward {first:.3f} -> {last:.3f}")
    return log


if __name__ == "__main__":
    command_line(app)
