"""This project beside its peers: a GRPO step, scoring, and the plain forward + backward pass. For CPUs.

    python3.11 -m venv .venv-peers
    .venv-peers/bin/pip install -r requirements.txt --extra-index-url https://download.pytorch.org/whl/cpu
    .venv-peers/bin/pip install --no-deps -r bench/requirements-peers.txt
    .venv-peers/bin/python bench/peers.py              # under an hour on two cores; resumes row by row
    .venv-peers/bin/python bench/peers.py --only step  # or scoring, precision, plain, vocabulary
    .venv-peers/bin/python bench/peers.py --page       # only docs/peers.md from docs/peers.json

step       One GRPO step, sampling and update apart. TRL runs at the micro-batch that suits it best.
scoring    Milliseconds per prompt of influence gradients (`bench/scorers.py`). "autograd" goes prompt by prompt and
           does not project; "fe01f78" is an earlier commit of this project.
precision  Of those on the toy: overlap of the top 10% of the prompts, by cosine with the mean validation gradient, with
           that from exact gradients; means over both validation sets. The policy is 40 steps from the one that sampled.
plain      Forward + backward of all live groups, parameter gradients summed. "shared" is train.py's own layout,
           "repeated" has a row for each completion with its prompt; each way runs at its best batch size.
vocabulary Scoring and training with a vocabulary of 151,936: logits in pieces, or at once.

Worlds: `toy` is the bundled one; `mid` a random Qwen2 with prompts of 50 to 150 tokens and answers to 64; `long` the
same model with two prompts of about 500 tokens and answers to 512, whose times per prompt are extrapolations.

Each way runs in a process of its own, which does one round whenever its turn comes: only one computes at a time, and a
ratio is that of two rounds side by side. The first round warms up and does not count. Peak memory is the process's own
(RssAnon), sampled by the parent. Writes docs/peers.json after each row, and docs/peers.md.
"""

from __future__ import annotations  # the worker of OLD lacks some of the types

import argparse
import functools
import importlib.metadata
import inspect
import itertools
import json
import os
import platform
import selectors  # imports the standard library's `select`, before ours stands in its way
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, os.environ.get("PEERS_CODE", str(ROOT)))  # the worker of OLD runs that commit's scripts

import numpy as np  # noqa: E402
import torch  # noqa: E402
from safetensors.numpy import load_file, save_file  # noqa: E402

import project  # noqa: E402
import rollout  # noqa: E402
import train  # noqa: E402

OLD = "fe01f78"  # an earlier commit of this project
FILE, PAGE = ROOT / "docs" / "peers.json", ROOT / "docs" / "peers.md"
CORES = int(os.environ.get("OMP_NUM_THREADS", os.cpu_count()))
PEERS = ("trl", "prefix_grouper", "dattri_llm", "bergson", "dattri", "traker", "torch", "transformers")
CPU = torch.device("cpu")


def logps_of(model, batch: train.Batch) -> torch.Tensor:
    """Log-probs of the batch's tokens, (T,)."""
    return train.completion_logps(model, batch, 1.0)[0]


# ---------------------------------------------------------------------------------------------------------------------
# Worlds: a folder with model/, data.jsonl, trajectories.safetensors. Made once, kept in --work.

REWARD = '''def parity(prompts, completions, **columns):
    """Is the last digit even? A random policy is right half of the time, so nearly all groups are live."""
    return [float(text[-1:] in list("02468")) for text in completions]
'''
STEP = {  # a GRPO step of each world
    "toy": {"batch_prompts": 64, "samples": 8, "max_tokens": 8},
    "mid": {"batch_prompts": 8, "samples": 8, "max_tokens": 64},
    "long": {"batch_prompts": 2, "samples": 8, "max_tokens": 512},
}


def load_trajectories(world: Path, name: str = "trajectories") -> rollout.Trajectories:
    return rollout.Trajectories(**load_file(world / f"{name}.safetensors"))


def first_live(trajectories: rollout.Trajectories, count: int | None = None) -> rollout.Trajectories:
    return trajectories.take(trajectories.live()[:count])


def join(parts: list[rollout.Trajectories]) -> rollout.Trajectories:
    tensors = [part.tensors() for part in parts]
    return rollout.Trajectories(**{name: np.concatenate([x[name] for x in tensors]) for name in tensors[0]})


def make_toy(world: Path) -> None:
    """The pool and both validation sets, sampled by the bundled model; and a policy 40 steps away from it."""
    shutil.copytree(rollout.TOY / "model", world / "model")
    shutil.copy(rollout.TOY / "train.jsonl", world / "data.jsonl")
    for data, name in (("train", "trajectories"), ("valid-rev", "valid-rev"), ("valid-srt", "valid-srt")):
        folder = world / "rollouts" / data
        rollout.rollout(out=folder, data=str(rollout.TOY / f"{data}.jsonl"))
        parts = [rollout.load_trajectories(path)[0] for path in rollout.shards(folder, "trajectories")]
        save_file(join(parts).tensors(), world / f"{name}.safetensors")
    step, policy, tokenizer = our_step(world)
    for _ in range(40):
        step()
    policy.save_pretrained(world / "policy")
    tokenizer.save_pretrained(world / "policy")


def save_tokenizer(folder: Path, vocabulary: int) -> None:
    """A word to a token."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<|endoftext|>", *"0123456789", *(f"w{n}" for n in range(12, vocabulary))]
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=words[0], eos_token=words[1]).save_pretrained(folder)


def random_model(folder: Path, vocabulary: int, width: int, layers: int) -> None:
    """A random Qwen2, of whose tokens transformers' Qwen2 tokenizer reads the digits alone."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    save_tokenizer(folder, vocabulary)
    torch.manual_seed(0)
    shape = {"hidden_size": width, "num_hidden_layers": layers, "intermediate_size": 11 * width // 4}
    shape["vocab_size"] = vocabulary
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2, "tie_word_embeddings": False}
    ends = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    Qwen2ForCausalLM(Qwen2Config(**shape, **heads, **ends, max_position_embeddings=2048)).save_pretrained(folder)


def make_random(
    world: Path,
    prompt: tuple[int, int],
    longest: int,
    live: int,
    prompts: int,
    samples: int = 8,
    vocabulary: int = 6000,
    width: int = 512,  # 23 million parameters
    layers: int = 6,
) -> None:
    """`prompts` prompts, and for the first `live` of them K random answers of 1 to `longest` tokens, with rewards that
    differ in each group, off-policy by a little noise."""
    random_model(world / "model", vocabulary, width, layers)
    (world / "reward.py").write_text(REWARD)
    random = np.random.default_rng(0)
    rows = [random.integers(2, vocabulary, random.integers(prompt[0], prompt[1] + 1)) for _ in range(prompts)]
    lines = [{"prompt": "".join(str(token % 10) for token in row), "answer": "-"} for row in rows]
    (world / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    length = random.integers(1, longest + 1, (live, samples)).astype(np.int32)
    rewards = np.argsort(random.random((live, samples)), 1) < random.integers(1, samples, (live, 1))
    trajectories = rollout.Trajectories(
        prompt_index=np.arange(live, dtype=np.int32),
        prompt_length=np.array([len(row) for row in rows[:live]], np.int32),
        prompt_tokens=np.concatenate(rows[:live]).astype(np.int32),
        length=length,
        tokens=random.integers(2, vocabulary, length.sum()).astype(np.int32),
        behavior_logps=random.normal(0, 0.05, length.sum()).astype(np.float32),
        rewards=rewards.astype(np.float32),
        truncated=np.zeros_like(length, np.uint8),
    )
    model = rollout.load_model(world / "model")[0]
    for pieces in train.micro_batches(trajectories, range(live), 2048):
        batch = train.collate(trajectories, pieces, CPU)
        with torch.no_grad():
            trajectories.behavior_logps[batch.stored] += logps_of(model, batch).numpy()
    save_file(trajectories.tensors(), world / "trajectories.safetensors")


MAKE = {
    "toy": make_toy,
    "mid": functools.partial(make_random, prompt=(50, 150), longest=64, live=16, prompts=64),
    "long": functools.partial(make_random, prompt=(480, 520), longest=512, live=2, prompts=2),
    "vocabulary": functools.partial(
        make_random, prompt=(50, 150), longest=256, live=4, prompts=4, vocabulary=151_936, width=64, layers=2
    ),
}


def make_world(work: Path, name: str) -> None:
    """Make it under another name first, so that a killed try leaves no half of it."""
    if not (work / name).exists():
        print(f"making {work / name}", flush=True)
        part = work / f".{name}"
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        MAKE[name](part)
        part.rename(work / name)


def groups_of(trajectories: rollout.Trajectories) -> list[dict]:
    """The live groups as most libraries take them: a row for each completion, with its prompt, padded on the right."""
    groups, samples = [], trajectories.samples
    for n in map(int, trajectories.live()):
        prompt, length = trajectories.prompt(n), trajectories.length[n]
        advantages = rollout.group_advantages(torch.from_numpy(trajectories.rewards[n : n + 1]))[0]
        shape = samples, len(prompt) + int(length.max())  # (K, W)
        ids, mask, completion = (torch.zeros(shape, dtype=torch.long) for _ in range(3))
        behavior_logps, weight = torch.zeros(shape), torch.zeros(shape)
        for k in range(samples):
            span, end = trajectories.span(n, k), len(prompt) + int(length[k])
            ids[k, :end] = torch.from_numpy(np.concatenate([prompt, trajectories.tokens[span]]))
            mask[k, :end], completion[k, len(prompt) : end] = 1, 1
            behavior_logps[k, len(prompt) : end] = torch.from_numpy(trajectories.behavior_logps[span])
            weight[k, len(prompt) : end] = advantages[k] / (samples * int(length[k]))
        group = {"ids": ids, "attention_mask": mask, "completion": completion.bool(), "weight": weight}
        groups.append(group | {"behavior_logps": behavior_logps})
    return groups


# ---------------------------------------------------------------------------------------------------------------------
# (a) One GRPO step


def step_options(world: Path) -> SimpleNamespace:
    """The defaults of train.py, with the sizes of the world's step."""
    defaults = {name: option.default for name, option in inspect.signature(train.train).parameters.items()}
    folder = {"model": world / "model", "initial_model": world / "model", "data": str(world / "data.jsonl")}
    reward = "exact" if (name := world.name.lstrip(".")) == "toy" else f"{world / 'reward.py'}:parity"
    return SimpleNamespace(**defaults | folder | STEP[name] | {"reward": reward, "engine": "hf"})


def our_step(world: Path) -> tuple[Callable[[], dict], object, object]:
    """A step as `train.run_stage` does it; and the policy with its tokenizer."""
    o = step_options(world)
    policy, tokenizer = rollout.load_model(o.model)
    root, first = map(train.LogProbs, (policy, rollout.load_model(o.initial_model)[0].requires_grad_(False)))
    rows = rollout.load_prompts(o.data)
    encoded = rollout.encode_prompts(tokenizer, rows)
    adamw = torch.optim.AdamW(policy.parameters(), lr=o.lr, weight_decay=0.0, fused=True)
    train.make_gradients(root)
    engine, random, numbers = rollout.open_engine(o, policy, tokenizer), np.random.default_rng(0), itertools.count()

    def step() -> dict:
        picked, clock = random.choice(len(rows), o.batch_prompts, replace=False), time.perf_counter()
        trajectories = rollout.sample_trajectories(
            engine, tokenizer, rows, encoded, picked, o, [o.seed, next(numbers)], policy=policy
        )
        sampled = time.perf_counter()
        line = train.update(root, first, adamw, trajectories, o, picked)
        times = {"sampling": sampled - clock, "update": time.perf_counter() - sampled}
        return times | {"tokens": int(line["length"].sum()), "live": len(trajectories.live())}

    return step, policy, tokenizer


def trl_steps(world: Path, batch: int, answer: Callable[[dict], None]) -> None:
    """TRL's trainer drives itself; here it waits for its turn before each step, and answers after it."""
    from datasets import load_dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    o, spent = step_options(world), {}
    policy, tokenizer = rollout.load_model(o.model)
    policy.set_attn_implementation("sdpa")  # transformers' own, not rollout.py's

    class Turns(TrainerCallback):
        def on_train_begin(self, *_, **__) -> None:
            answer({})

        def on_step_begin(self, *_, **__) -> None:
            if not sys.stdin.readline():
                sys.exit()
            spent.update(sampling=0.0, clock=time.perf_counter())

        def on_step_end(self, *_, **__) -> None:
            update = time.perf_counter() - spent["clock"] - spent["sampling"]
            seconds = {"sampling": spent["sampling"], "update": update, "seconds": spent["sampling"] + update}
            answer(seconds | {"tokens": spent["tokens"], "live": spent["live"]})

    class Trainer(GRPOTrainer):
        def _generate(self, prompts):
            clock = time.perf_counter()
            made = super()._generate(prompts)
            spent["sampling"] += time.perf_counter() - clock
            spent["tokens"] = sum(map(len, made[1]))
            return made

        def _calculate_rewards(self, *given):
            clock = time.perf_counter()
            rewards = super()._calculate_rewards(*given)
            spent["sampling"] += time.perf_counter() - clock
            spent["live"] = int((rewards.view(-1, o.samples).std(1) > 0).sum())
            return rewards

    parts = o.batch_prompts * o.samples // batch
    sizes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": parts, "steps_per_generation": parts}
    sampling = {"num_generations": o.samples, "max_completion_length": o.max_tokens, "temperature": o.temperature}
    loss = {"beta": o.kl, "epsilon": o.clip, "entropy_coef": o.entropy, "loss_type": "grpo", "scale_rewards": "group"}
    adam = {"learning_rate": o.lr, "lr_scheduler_type": "constant", "max_grad_norm": o.max_grad_norm}
    quiet = {"logging_strategy": "no", "save_strategy": "no", "report_to": "none", "disable_tqdm": True}
    plain = {"bf16": False, "use_cpu": True, "gradient_checkpointing": False, "num_iterations": 1}
    wide = {"top_k": 0, "top_p": 1.0, "optim": "adamw_torch_fused", "weight_decay": 0.0, "max_steps": 10**6}
    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(folder, **sizes, **sampling, **loss, **adam, **quiet, **plain, **wide)
        reward = rollout.load_function(o.reward, rollout.REWARDS, "reward")
        data = load_dataset("json", data_files=o.data, split="train", cache_dir=folder)
        Trainer(policy, reward, config, data, processing_class=tokenizer, callbacks=[Turns()]).train()


# ---------------------------------------------------------------------------------------------------------------------
# (b) Scoring: SCORERS[name](model, trajectories, k, seed) sets up once; each call of the result scores all live groups


def ours(model, trajectories, k: int, seed: int) -> Callable[[], torch.Tensor]:
    sketcher = project.GradientSketcher(model, k, 1.0, seed)
    groups = trajectories.take(trajectories.live())
    batch_tokens = inspect.signature(project.project).parameters["batch_tokens"].default
    none = np.zeros(len(groups.length), bool)
    return lambda: torch.from_numpy(project.project_groups(sketcher, groups, none, 1.0, batch_tokens)["sketch"])


def old(model, trajectories, k: int, seed: int) -> Callable[[], None]:
    """The scripts here are that commit's; only their time is asked for."""
    sketcher = project.GradientSketcher(model, k, 1.0, seed)
    batch_tokens = inspect.signature(project.project).parameters["batch_tokens"].default

    def score() -> None:
        for groups in train.micro_batches(trajectories, trajectories.live_groups(), batch_tokens):
            sketcher.sketch(train.collate(trajectories, groups, CPU), 1.0)

    return score


def old_trajectories(tensors: dict) -> rollout.Trajectories:
    """The same trajectories in the class of commit OLD."""
    samples, length = tensors["length"].shape[1], tensors["length"].flatten()
    prompts = np.split(tensors["prompt_tokens"], np.cumsum(tensors["prompt_length"])[:-1])
    completions = np.split(tensors["tokens"], np.cumsum(length)[:-1])
    pieces = [piece for m, tokens in enumerate(completions) for piece in (prompts[m // samples], tokens)]
    prompt_length = np.repeat(tensors["prompt_length"], samples)
    return rollout.Trajectories(
        tokens=np.concatenate(pieces).astype(np.int32),
        offsets=np.concatenate([[0], np.cumsum(prompt_length + length)]).astype(np.int64),
        prompt_length=prompt_length,
        behavior_logps=tensors["behavior_logps"],
        rewards=tensors["rewards"].flatten(),
        prompt_index=np.repeat(tensors["prompt_index"], samples),
        truncated=tensors["truncated"].flatten(),
        metadata={},
    )


def exact_gradients(model, trajectories) -> Iterator[tuple[torch.Tensor, ...]]:
    """Equation 2 by plain autograd, for all parameters, prompt by prompt."""
    for n in map(int, trajectories.live()):
        batch = train.collate(trajectories, [(n, range(trajectories.samples))], CPU)
        value = project.off_policy_objective(logps_of(model, batch), batch, "token")
        yield torch.autograd.grad(value, list(model.parameters()))


def autograd(model, trajectories, k: int, seed: int) -> Callable[[], None]:
    """No projection: k has no part in it, and only the norms stay."""
    return lambda: [torch._foreach_norm(tensors) for tensors in exact_gradients(model, trajectories)] and None


def exact(model, trajectories, k: int, seed: int) -> Callable[[], torch.Tensor]:
    return lambda: torch.stack([torch.cat([g.flatten() for g in x]) for x in exact_gradients(model, trajectories)])


def peer(name: str) -> Callable:
    """One of the functions in bench/scorers.py, which take the groups as dictionaries of padded rows."""

    def set_up(model, trajectories, k: int, seed: int) -> Callable[[], torch.Tensor]:
        import scorers  # only here, where the libraries are needed

        model.set_attn_implementation("sdpa")  # transformers' own, not rollout.py's
        return getattr(scorers, name)(model, groups_of(trajectories), k, seed)

    return set_up


SCORERS = {"ours": ours, OLD: old, "autograd": autograd, "exact": exact}
SCORERS |= {name: peer(name.replace("-", "_")) for name in ("dattri-llm", "bergson", "dattri", "traker")}


def score_work(spec: dict, world: Path) -> Callable[[], dict]:
    tensors = load_file(world / f"first-{spec['prompts']}.safetensors")
    trajectories = old_trajectories(tensors) if spec["way"] == OLD else rollout.Trajectories(**tensors)
    score = SCORERS[spec["way"]](rollout.load_model(world / "model")[0], trajectories, spec["k"], 0)

    def work() -> dict:
        score()
        return {"prompts": spec["prompts"]}

    return work


def precision_work(spec: dict, world: Path) -> Callable[[], dict]:
    """Each round has the next seed, and writes its gradients: those of the pool, then of both validation sets."""
    pool = load_trajectories(world)
    sets = [pool.take(pool.live()[::2])]
    sets += [first_live(load_trajectories(world, name)) for name in ("valid-rev", "valid-srt")]
    trajectories, seeds = join(sets), itertools.count()

    def work() -> dict:
        model = rollout.load_model(world / "policy")[0]
        gradients = SCORERS[spec["way"]](model, trajectories, spec["k"], next(seeds))()
        np.save(spec["save"], gradients.numpy())
        return {"sets": [len(part.length) for part in sets], "dimensions": gradients.shape[1]}

    return work


# ---------------------------------------------------------------------------------------------------------------------
# (c) The plain forward + backward pass


def train_py_logps(model, trajectories, pieces: list[train.Piece]) -> tuple[torch.Tensor, train.Batch]:
    batch = train.collate(trajectories, pieces, CPU)
    return logps_of(model, batch), batch


def prefix_grouper_logps(model, trajectories, pieces: list[train.Piece]) -> tuple[torch.Tensor, train.Batch]:
    """As its README does it, but for the output head, which here sees only hidden states that predict a completion."""
    from prefix_grouper import PrefixGrouper

    batch = train.collate(trajectories, pieces, CPU)  # for the objective; the layout is the library's
    prompts = [torch.from_numpy(trajectories.prompt(n)).long() for n, _ in pieces]
    completions = [torch.from_numpy(trajectories.tokens[trajectories.span(n, int(k))]) for n, ks in pieces for k in ks]
    pad = functools.partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
    masks = [pad([torch.ones_like(row) for row in rows]) for rows in (prompts, completions)]
    grouper = PrefixGrouper.from_ungrouped_masks(*masks, group_sizes=[len(ks) for _, ks in pieces], device=CPU)
    grouper.attention_masks = [visible(grouper.prefix_attn_mask, 0)]  # made once for all layers
    grouper.attention_masks.append(visible(grouper.suffix_attn_mask, grouper.prefix_attn_mask.shape[1]))
    completions = pad(completions).long()
    ids = grouper.concat_input(pad(prompts), masks[0], completions, masks[1])
    position = torch.zeros_like(ids)
    for row, info in zip(position, grouper.group_info, strict=True):
        parts = [torch.arange(info.prefix_len), *(info.prefix_len + torch.arange(n) for n in info.suffix_lens)]
        row[: info.total_len] = torch.cat(parts)
    hidden = model.model(input_ids=ids, position_ids=position, use_cache=False, prefix_grouper=grouper)[0]
    hidden, mask = grouper.split_output(hidden, include_prefix_last=1)[2:]
    predicts = mask[:, 1:]
    logits = model.lm_head(hidden[:, :-1][predicts])  # (T, V)
    return torch.log_softmax(logits, -1).gather(1, completions[predicts][:, None])[:, 0], batch


def visible(mask: torch.Tensor, prefix: int) -> torch.Tensor:
    """The library's padding mask (B, W) as SDPA wants it, causal: (B, 1, Q, W), for the queries behind `prefix`. A
    padded query sees itself, since SDPA makes NaN of one that sees nothing."""
    width = mask.shape[1]
    causal = torch.ones(width, width, dtype=torch.bool).tril()
    return ((causal & mask[:, None]) | torch.eye(width, dtype=torch.bool))[:, None, prefix:]


def grouped_attention(module, query, key, value, _, prefix_grouper, **others):
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    masks = iter(prefix_grouper.attention_masks)  # the library's order: the prompts, then the completions

    def attention(q, k, v, padding, *_) -> torch.Tensor:  # its own SDPA adapter would hand over the padding mask alone
        return sdpa_attention_forward(module, q, k, v, next(masks), **others)[0]

    return prefix_grouper.forward(attention, query, key, value), None


def plain_work(spec: dict, world: Path) -> Callable[[], dict]:
    trajectories = rollout.Trajectories(**load_file(world / f"first-{spec['prompts']}.safetensors"))
    model, find = rollout.load_model(world / "model")[0], train_py_logps
    train.CACHE = sys.maxsize  # the batch is spec's
    batches = [*train.micro_batches(trajectories, trajectories.live(), spec["batch"])]
    if spec["way"] == "repeated":
        batches = [[(n, range(k, k + 1)) for n, ks in pieces for k in ks] for pieces in batches]
    if spec["way"] == "prefix-grouper":
        from transformers import AttentionInterface

        AttentionInterface.register("grouped_attention", grouped_attention)
        with torch.no_grad():
            expected = train_py_logps(model, trajectories, batches[0])[0]
            model.set_attn_implementation("grouped_attention")
            torch.testing.assert_close(prefix_grouper_logps(model, trajectories, batches[0])[0], expected, **NEAR)
        find = prefix_grouper_logps

    def work() -> dict:
        model.zero_grad()
        objective = 0.0
        for pieces in batches:
            value = project.off_policy_objective(*find(model, trajectories, pieces), "token")
            value.backward()
            objective += value.item()
        return {"prompts": spec["prompts"], "objective": objective}

    return work


NEAR = {"atol": 1e-4, "rtol": 0.0}


# ---------------------------------------------------------------------------------------------------------------------
# (d) A vocabulary of 150,000: logits in pieces, or at once


def vocabulary_work(spec: dict, world: Path) -> Callable[[], dict]:
    trajectories = rollout.Trajectories(**load_file(world / f"first-{spec['prompts']}.safetensors"))
    model, script = rollout.load_model(world / "model")[0], spec["way"].partition(",")[0]
    if spec["way"].endswith("at once"):
        train.LOGITS = sys.maxsize
    if script == "scoring":
        score = ours(model, trajectories, 4096, 0)
    options = {"temperature": 1.0, "clip": 0.2, "kl": 0.0, "entropy": 0.001, "batch_tokens": 4096}
    options["batch"] = trajectories.prompt_index

    def work() -> dict:
        score() if script == "scoring" else train.grpo_step(train.LogProbs(model), None, trajectories, **options)
        return {"prompts": spec["prompts"]}

    return work


# ---------------------------------------------------------------------------------------------------------------------
# A worker: one way, one round for each line on its standard input


def serve(spec: dict) -> None:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print; only replies go to the parent
    torch.set_num_threads(CORES)

    def answer(numbers: dict) -> None:
        print(json.dumps(numbers), file=replies, flush=True)

    world = Path(spec["world"])
    if spec["way"] == "TRL":
        return trl_steps(world, spec["batch"], answer)
    if spec["part"] == "step":
        work = our_step(world)[0]
    else:
        works = {"scoring": score_work, "precision": precision_work, "plain": plain_work, "vocabulary": vocabulary_work}
        work = works[spec["part"]](spec, world)
    answer({})  # ready
    for _ in sys.stdin:
        clock = time.perf_counter()
        numbers = work()
        answer(numbers | {"seconds": time.perf_counter() - clock})


class Failed(Exception):
    pass


class Worker:
    def __init__(self, spec: dict, work: Path):
        self.log = work / "logs" / f"{spec['way']}.log"
        self.log.parent.mkdir(exist_ok=True)
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"}
        if spec["way"] == OLD:
            environment["PEERS_CODE"] = str(work / OLD)
        command = [sys.executable, str(Path(__file__).resolve()), "--worker", json.dumps(spec)]
        with open(self.log, "w") as log:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": log}
            self.process = subprocess.Popen(command, env=environment, text=True, cwd=work, **pipes)
        self.peak = 0.0
        self.answer()  # it is ready, or it has ended
        self.before = self.memory()

    def memory(self) -> float:
        """MB of its own, not the pages of files that are mapped."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon")), 0.0)

    def answer(self) -> dict:
        with selectors.DefaultSelector() as ready:
            ready.register(self.process.stdout, selectors.EVENT_READ)
            while not ready.select(0.02):
                self.peak = max(self.peak, self.memory())
        line = self.process.stdout.readline()
        if not line:
            said = self.log.read_text().strip().rpartition("\n")[2]
            raise Failed(f"exit status {self.process.wait()}: {said}")
        return json.loads(line)

    def round(self) -> dict:
        with suppress(BrokenPipeError):  # it has ended; `answer` says how
            self.process.stdin.write("\n")
            self.process.stdin.flush()
        return self.answer()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_) -> None:
        self.process.kill()
        self.process.wait()


# ---------------------------------------------------------------------------------------------------------------------
# Rows: {"part", "world", "rounds", "ways": {way: {"batches" to try, and what else its worker needs}}}, ours first

ROUNDS = {"toy": 7, "mid": 5, "long": 2, "vocabulary": 2}
MICRO = {"toy": (64, 128, 256, 512), "mid": (8, 16, 32, 64), "long": (4,)}  # completions in TRL's micro-batch
SIZES = {"toy": (1024, 2048, 4096, 8192), "mid": (512, 1024, 2048, 4096), "long": (1024, 8192)}  # tokens
PROMPTS = {
    "toy": (256, 64),
    "mid": (16, 4),
    "long": (2,),
    "vocabulary": (4,),
}  # in a round of scoring; with a dense projection
KS = {"toy": (4096, 32768), "mid": (4096, 32768), "long": (4096,)}
ANY = (None,)  # nothing to choose
PLAIN, SKETCHES = ("shared", "repeated", "prefix-grouper"), ("dattri-llm", "bergson")
VOCABULARY = ("scoring", "scoring, logits at once", "training", "training, logits at once")
SCORING = ("ours", OLD, "autograd", *SKETCHES)
DENSE = {
    "toy": {"dattri": 4096, "traker": 4096},
    "mid": {"dattri": 32, "traker": 32},
}  # 3 GB each; 4096 would take minutes


def wanted() -> Iterator[tuple[str, dict]]:
    """The rows and their names."""
    for world in KS:
        common, prompts = {"world": world, "rounds": ROUNDS[world]}, PROMPTS[world][0]
        ways = {"ours": {"batches": ANY}, "TRL": {"batches": MICRO[world]}}
        yield f"step/{world}", common | {"part": "step", "ways": ways}
        ways = {way: {"batches": SIZES[world], "prompts": prompts} for way in PLAIN}
        yield f"plain/{world}", common | {"part": "plain", "ways": ways}
        for k in KS[world]:
            ways = {way: {"batches": ANY, "prompts": prompts, "k": k} for way in SCORING}
            dense = DENSE.get(world, {}) if k == min(KS[world]) else {}
            ways |= {way: {"batches": ANY, "prompts": PROMPTS[world][-1], "k": size} for way, size in dense.items()}
            yield f"scoring/{world}/{k}", common | {"part": "scoring", "ways": ways}
    ways = {way: {"batches": ANY, "prompts": 4} for way in VOCABULARY}
    yield "vocabulary", {"part": "vocabulary", "world": "vocabulary", "rounds": ROUNDS["vocabulary"], "ways": ways}
    for k in KS["toy"]:
        for way in ("ours", *SKETCHES, *(DENSE["toy"] if k == 4096 else ())):
            common = {"part": "precision", "world": "toy", "rounds": 1 if way in DENSE["toy"] else 3}  # seeds
            yield f"precision/{way}/{k}", common | {"ways": {way: {"k": k}}}


def best_batch(spec: dict, batches: tuple, work: Path) -> tuple[object, dict[str, float]]:
    """The batch size of the fastest round, each tried in a process of its own; and the seconds of each."""
    if len(batches) == 1:
        return batches[0], {}
    seconds = {}
    for batch in batches:
        with Worker(spec | {"batch": batch}, work) as worker:
            worker.round()  # warms up
            seconds[batch] = worker.round()["seconds"]
    return min(seconds, key=seconds.get), seconds


def timed_row(row: dict, work: Path) -> dict:
    """The ways of a row, each at its best batch size, take turns."""
    workers, results = {}, {}
    with ExitStack() as stack:
        for way, options in row["ways"].items():
            spec = {"part": row["part"], "way": way, "world": str(work / row["world"])} | options
            try:
                batch, tried = best_batch(spec, options["batches"], work)
                workers[way] = stack.enter_context(Worker(spec | {"batch": batch}, work))
                results[way] = {"batch": batch, "tried": tried, "k": spec.get("k"), "rounds": []}
            except Failed as failed:
                if not workers:  # the first one, to which all are compared
                    raise
                results[way] = {"failed": str(failed)}
        for number in range(row["rounds"] + 1):
            for way, worker in [*workers.items()]:
                try:
                    measured = worker.round()
                except Failed as failed:
                    del workers[way]
                    results[way] = {"failed": str(failed)}
                    continue
                if number:  # the first one warms up
                    results[way]["rounds"].append(measured)
        for way, worker in workers.items():
            results[way] |= {"before_MB": round(worker.before), "peak_MB": round(worker.peak)}
    found = [result["rounds"][0].get("objective", 1.0) for result in results.values() if "rounds" in result]
    rollout.require(max(abs(x / found[0] - 1) for x in found) < 1e-3, f"the objectives differ: {found}")
    return results


def precision_row(row: dict, work: Path) -> dict:
    (way, options), world = next(iter(row["ways"].items())), work / row["world"]
    spec = {"part": "precision", "world": str(world), "way": way, "save": str(world / "sketch.npy")} | options
    truth, precision = world / "exact.npy", []
    if not truth.exists():
        with Worker(spec | {"way": "exact", "save": str(world / "part.npy")}, work) as worker:
            worker.round()
        (world / "part.npy").rename(truth)
    try:
        with Worker(spec, work) as worker:
            for _ in range(row["rounds"]):
                facts = worker.round()
                precision.append(overlap(*(cosines(path, facts["sets"]) for path in (truth, spec["save"]))))
    except Failed as failed:
        return {way: {"failed": str(failed)}}
    return {way: {"precision": precision, "pool": facts["sets"][0], "dimensions": facts["dimensions"]}}


def cosines(path: Path, sets: list[int]) -> np.ndarray:
    """(N, V): of the pool's gradients with the mean one of each validation set."""
    pool, *valid = np.split(np.load(path, mmap_mode="r"), np.cumsum(sets)[:-1])
    means = np.stack([x.mean(0, dtype=np.float64) for x in valid])  # (V, D)
    norms = np.array([np.linalg.norm(x) for x in pool])  # row by row: exact gradients are large
    return (pool @ means.T.astype(np.float32)) / norms[:, None] / np.linalg.norm(means, axis=1)


def overlap(truth: np.ndarray, found: np.ndarray) -> float:
    """Share of the exact top 10% that is in the other one, mean over the validation sets."""
    top = round(0.1 * len(truth))
    best = [np.argsort(-x, axis=0, kind="stable")[:top] for x in (truth, found)]
    return float(np.mean([len(np.intersect1d(a, b)) / top for a, b in zip(best[0].T, best[1].T, strict=True)]))


# ---------------------------------------------------------------------------------------------------------------------
# The page


def costs(part: str, result: dict, of: str = "seconds") -> list[float]:
    """Of each round: seconds, or milliseconds per prompt."""
    return [x[of] if part == "step" else 1e3 * x[of] / x["prompts"] for x in result["rounds"]]


def ratio(part: str, result: dict, base: dict, of: str = "seconds") -> str:
    pairs = zip(costs(part, result, of), costs(part, base, of), strict=True)
    found = [a / b for a, b in pairs]
    return f"{statistics.median(found):.2f} [{min(found):.2f}, {max(found):.2f}]"


def median(values: Iterable[float]) -> str:
    value = statistics.median(values)
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def lines_of(row: dict, precision: dict[str, str]) -> Iterator[str]:
    part, base = row["part"], next(iter(row["results"].values()))
    for way, result in row["results"].items():
        if "failed" in result:
            yield f"| {way} | failed: {result['failed'][:80]} |"
            continue
        cells = [way + (f", batch {result['batch']}" if result["batch"] else "")]
        for of in ("seconds", "sampling", "update") if part == "step" else ("seconds",):
            cells += [median(costs(part, result, of)), ratio(part, result, base, of)]
        if part == "step":
            cells += [median(x[name] for x in result["rounds"]) for name in ("tokens", "live")]
        elif part == "scoring":
            cells += [str(result["rounds"][0]["prompts"]), str(result["k"]), precision.get(way, "")]
        yield f"| {' | '.join([*cells, str(result['before_MB']), str(result['peak_MB'])])} |"


TABLES = {  # part: its text, the head of its tables
    "step": (
        "One GRPO step. Sampling includes the rewards, update the reference policy's log-probs. TRL's batch is its "
        "micro-batch, in completions.",
        "| way | s per step | / ours | sampling, s | / ours | update, s | / ours | tokens | live prompts |",
    ),
    "scoring": (
        "Influence gradients. autograd goes prompt by prompt and does not project; dattri and traker project densely.",
        "| way | ms per prompt | / ours | prompts a round | k | top-10% precision |",
    ),
    "plain": (
        "Forward + backward of the same trajectories, parameter gradients summed. Batches are in tokens.",
        "| way | ms per prompt | / shared |",
    ),
    "vocabulary": (
        "A small model with 151,936 tokens, answers to 256: log-probs from some logits at a time, as in train.py, and "
        "from all logits of a batch at once.",
        "| way | ms per prompt | / scoring |",
    ),
}


def fastest(rows: dict[str, dict]) -> Iterator[str]:
    """A table with the fastest way that is not ours, of steps, scoring and plain passes."""
    yield "| | fastest other | / ours |\n|---|---|---|"
    for name, row in rows.items():
        base, *others = row["results"].items()
        if row["part"] in ("step", "scoring", "plain"):
            theirs = [
                (way, result) for way, result in others if "failed" not in result and way not in (OLD, "repeated")
            ]
            ratios = {way: ratio(row["part"], result, base[1]) for way, result in theirs}
            way = min(ratios, key=lambda way: float(ratios[way].split()[0]))
            yield f"| {name} | {way}{', without a projection' * (way == 'autograd')} | {ratios[way]} |"


def write_page(stored: dict) -> None:
    versions = ", ".join(f"{name} {version}" for name, version in stored["versions"].items())
    text = [
        "# How fast are other libraries at the same work?\n",
        "The fastest of them, in times of ours (above 1: ours is faster):\n",
        *fastest(stored["rows"]),
        "",
        "`toy` is the bundled world. `mid` is a random Qwen2 of 23 million parameters with prompts of 50 to 150 tokens "
        "and answers to 64. `long` is the same model with prompts of about 500 tokens and answers to 512. Numbers are "
        "medians. A ratio is the median of paired rounds [least, most]. Each library runs in a process of its own; "
        "memory is that of this process, at its start and at its peak. fe01f78 is an earlier commit of this project. "
        "Made by `python bench/peers.py`, whose head says how to install the peers, from `peers.json`. "
        f"{stored['cores']} cores, Python {stored['python']}, {versions}.\n",
    ]
    precision: dict[str, dict[str, str]] = {}
    for name, row in stored["rows"].items():
        for way, result in row["results"].items() if row["part"] == "precision" else ():
            if "failed" in result:
                continue
            said = f"{np.mean(result['precision']):.2f}, {result['dimensions']} dimensions"
            precision.setdefault(f"scoring/toy/{name.rpartition('/')[2]}", {})[way] = said
    for part, (about, head) in TABLES.items():
        text.append(f"## {part.capitalize()}\n\n{about}\n")
        head += " MB at start | MB at peak |"
        for name, row in stored["rows"].items():
            if row["part"] == part:
                note = "; two prompts: a time per prompt is an extrapolation" if row["world"] == "long" else ""
                text += [f"{name}, {row['rounds']} rounds{note}\n", head, "|---" * (head.count("|") - 1) + "|"]
                text += [*lines_of(row, precision.get(name, {})), ""]
    PAGE.write_text("\n".join(text))


# ---------------------------------------------------------------------------------------------------------------------
# The command


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def prepare(work: Path) -> None:
    """The worlds, the trajectories that the ways score, and the scripts of commit OLD."""
    for name, counts in PROMPTS.items():
        make_world(work, name)
        for count in set(counts):
            some = first_live(load_trajectories(work / name), count)
            save_file(some.tensors(), work / name / f"first-{count}.safetensors")
    if not (work / OLD).exists():
        (work / OLD).mkdir()
        archive = subprocess.run(["git", "archive", OLD], cwd=ROOT, check=True, capture_output=True).stdout
        subprocess.run(["tar", "-x", "-C", str(work / OLD)], input=archive, check=True)


def main(only: str | None, again: bool, work: Path) -> None:
    absent = [name for name in PEERS if version(name) is None]
    if absent:
        sys.exit(f"error: {', '.join(absent)} not installed: bench/requirements-peers.txt (--page needs none)")
    torch.set_num_threads(CORES)
    stored = json.loads(FILE.read_text()) if FILE.exists() else {"rows": {}}
    versions = {name: version(name) for name in PEERS}
    stored |= {"cores": CORES, "python": platform.python_version(), "versions": versions}
    scorers = rollout.code_digest(Path(__file__).with_name("scorers.py"))
    digests = {
        name: rollout.digest(json.dumps([project.CODE, versions, CORES, scorers, row])) for name, row in wanted()
    }
    missing = {
        name: row
        for name, row in wanted()
        if only in (None, row["part"]) and (again or stored["rows"].get(name, {}).get("digest") != digests[name])
    }
    work = work / rollout.digest(json.dumps(project.CODE), rollout.code_digest(__file__))
    if missing:
        prepare(work)
    for name, row in missing.items():
        clock = time.perf_counter()
        results = (precision_row if row["part"] == "precision" else timed_row)(row, work)
        about = {name: row[name] for name in ("part", "world", "rounds")}
        seconds = time.perf_counter() - clock
        stored["rows"][name] = about | {"digest": digests[name], "seconds": seconds, "results": results}
        stored["rows"] = {name: stored["rows"][name] for name in digests if name in stored["rows"]}
        FILE.write_text(json.dumps(stored, indent=1) + "\n")
        write_page(stored)
        print(f"{name}: {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["step", "scoring", "precision", "plain", "vocabulary"], help="one part")
    parser.add_argument("--again", action="store_true", help="measure anew what is there")
    parser.add_argument("--page", action="store_true", help="only write the page")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "cropi-peers", help="for its worlds")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        serve(json.loads(arguments.worker))
    elif arguments.page:
        write_page(json.loads(FILE.read_text()))
    else:
        try:
            main(arguments.only, arguments.again, arguments.work)
        except KeyboardInterrupt:
            sys.exit(130)
