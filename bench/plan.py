"""What a run will need: prompts, tokens, FLOPs, hours, memory and disk, from its options and the model's config alone.

    python bench/plan.py                                                         # the bundled world, at the defaults
    python bench/plan.py --tflops 300 --live 0.5 --completion-tokens 400 -- RUN  # RUN: the options of cropi.py run

Nothing is loaded but the config (the model stands on the meta device) and, to count prompts, the data. Where data
cannot be opened, `--prompts NAME=COUNT` says how many there are, NAME being train, valid-SET or test-SET.

Time is that of the FLOPs, or that of starting small operations if it is longer. Sketches start some for every weight
tensor. On an H200, with Qwen2.5-1.5B's shape and short completions, this is what scoring waits for (bench/gpu.py).

A forward pass costs, per token, 2 FLOPs for each weight of a linear layer and 4 · layers · width for each token that it
looks back on; a backward pass twice that. Guesses are options: the mean lengths (by default, completions are as long as
they may be), the shares of prompts that are live and that have only failures, and the FLOP/s that are sustained: fewer
in sampling, which waits for memory, than in scoring and training.

Memory is that of the largest batch, of `batch_tokens` tokens, or of one trajectory if that is longer:
- activations: in scoring 2.5 bytes for each input and output of a linear layer, and token, in training 3.3. With these
  the plan is 1.20 and 1.07 times what an H200 held at most (bench/gpu.py, shape of Qwen2.5-1.5B). With gradient
  checkpointing it is one layer's share, and 4 bytes times the width for each of the others.
- log-probs over the vocabulary, 12 bytes in scoring and 20 in training for each token and entry, of `train.LOGITS`
  entries at most,
- training: float32 weights, gradients, AdamW's two moments and the initial policy (20 bytes a weight), and copies in
  bfloat16 that autocast keeps (2),
- scoring: weights, a sign for each row and column of a matrix (with r below 1 also a byte a coordinate), the gradient
  of the largest tensor, the sketches of a shard, twice,
- vLLM, while it samples: its share of the device (`gpu_memory`) beside what the scripts hold. With transformers: keys
  and values in bfloat16, and 20 bytes for each sequence and entry of the vocabulary.

With `--gpus N`, each of N processes has a GPU and computes an N-th of everything. Memory is that of one GPU. Training
is planned twice: with all weights on each GPU, and with a share of them (`train.shard_weights`). Then a GPU holds,
beside an N-th of those 20 bytes a weight,
- in updates: of embedding and head, which stay together, 8 bytes a weight (bfloat16, its gradient, and that in float32
  for the sum); of one layer the same, and 2 more for the next one, which is on its way,
- in sampling: all weights in bfloat16,
- at the start: all weights in float32, until they are cut, the initial policy's after the policy's.
`pytest -m dist` compares these with what FSDP2 allocates for small models: within 15%.
Sent and received by a GPU in a step: for all weights, a sum of gradients, 2 (N-1)/N · 4 bytes a weight; for a share, an
(N-1)/N of 2 bytes a weight to sample, and in each batch twice 2 to compute, 2 for the initial policy, 4 for the sum.

Disk is that at the fullest moment: the models of all stages, 4 bytes a weight; the optimizer states of the last
`--keep-states` stages and of the one that has just been trained, 8; a checkpoint and the one that replaces it, 12 each.
"""

import math
import sys
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import cropi  # noqa: E402
import rollout  # noqa: E402
from cropi import select  # noqa: E402
from project import GradientSketcher  # noqa: E402
from rollout import BadInput, above_zero, command_line, require  # noqa: E402
from train import LOGITS, decoder_layers  # noqa: E402

SKETCH = 8  # operations for each weight tensor and prompt, at most, beside the one that makes its gradient
LAUNCH = 4e-5  # seconds of an operation that has next to nothing to do (an H200)


def defaults(script: str) -> dict:
    """The default of every option of a script."""
    return {p.name: p.default for p in typer.main.get_command(cropi.USES[script].app).params}


class Costs:
    """Parameters and FLOPs of a model on the meta device."""

    def __init__(self, model: nn.Module):
        config = model.config
        self.weights = sum({id(p): p.numel() for p in model.parameters()}.values())  # tied ones once
        self.matrices = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
        self.layers, self.width, self.vocabulary = config.num_hidden_layers, config.hidden_size, config.vocab_size
        self.largest = max(p.numel() for p in model.parameters())
        blocks = decoder_layers(model)
        self.layer = max((sum(p.numel() for p in block.parameters()) for block in blocks), default=0)
        self.ends = self.weights - sum(p.numel() for block in blocks for p in block.parameters())
        layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Embedding)]
        called = [p for m in layers for p in m.parameters()]  # a tied weight twice
        self.sketched = [p.numel() for p in called]
        self.sketch_launches = (1 + SKETCH) * len(called)  # of a batch that holds one prompt
        self.signs = sum(p.shape[0] + math.prod(p.shape[1:]) for p in {id(p): p for p in called}.values())
        features = sum(m.in_features + m.out_features for m in model.modules() if isinstance(m, nn.Linear))
        self.activations = 2.5 * (
            features - config.hidden_size - config.vocab_size
        )  # bytes a token, but for the head's
        heads = config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // heads
        self.attention = 4 * self.layers * heads * size
        self.cached = 4 * self.layers * size * (getattr(config, "num_key_value_heads", None) or heads)  # bytes a token

    def forward(self, prompt: float, completion: float, samples: int) -> float:
        """FLOPs of a prompt and its K completions, the prompt computed once.

        A token at place t looks back on t tokens, so a span from a to b costs attention (b² - a²)/2.
        """
        back = prompt**2 / 2 + samples * ((prompt + completion) ** 2 - prompt**2) / 2
        return 2 * self.matrices * (prompt + samples * completion) + self.attention * back


def held(costs: Costs, per_weight: int, rounded: bool, gpus: int) -> dict[str, dict[str, float]]:
    """Bytes that training holds on a GPU, activations aside, with all weights ("none") or a share of them ("full").

    Args:
        per_weight: bytes for a weight, its gradient, its moments and that of the initial policy.
        rounded: computes in bfloat16.
    """
    all_of_it, wide = per_weight * costs.weights, 2 if rounded else 4
    loaded = 4 * costs.weights * (1 + (per_weight == 20) / gpus)
    update = (4 + 2 * wide) * costs.ends + (4 + 3 * wide) * costs.layer
    return {
        "none": {"loading": loaded, "sampling": all_of_it, "updates": all_of_it + 2 * rounded * costs.weights},
        "full": {
            "loading": loaded,
            "sampling": all_of_it / gpus + wide * costs.weights,
            "updates": all_of_it / gpus + update,
        },
    }


def human(value: float, unit: str = "") -> str:
    for prefix in ("", "k", "M", "G", "T", "P", "E"):
        if abs(value) < 1000 or prefix == "E":
            return f"{value:.3g} {prefix}{unit}".strip()
        value /= 1000
    raise AssertionError


app = typer.Typer(**rollout.PLAIN)


@app.command(help=__doc__.splitlines()[0])
def plan(
    options: Annotated[list[str] | None, typer.Argument(help="After --: the options of cropi.py run.")] = None,
    tflops: Annotated[float, typer.Option(callback=above_zero, help="Sustained in scoring and training.")] = 200.0,
    rollout_tflops: Annotated[float, typer.Option(callback=above_zero, help="Sustained in sampling.")] = 20.0,
    live: Annotated[float, typer.Option(min=0, max=1, help="Share of prompts that are live.")] = 0.5,
    failures: Annotated[
        float, typer.Option(min=0, max=1, help="Share of prompts with only failures, for --retry-failed.")
    ] = 0.25,
    prompt_tokens: Annotated[float, typer.Option(callback=above_zero, help="Mean length of a prompt.")] = 128,
    completion_tokens: Annotated[
        float | None, typer.Option(callback=above_zero, help="Mean length of a completion.  [default: --max-tokens]")
    ] = None,
    device_memory: Annotated[
        float, typer.Option(callback=above_zero, help="Of the GPU, in GB, for vLLM's share.")
    ] = 80,
    config: Annotated[
        Path | None, typer.Option(help="config.json to plan with.  [default: that of --model, from the Hub too]")
    ] = None,
    gpus: Annotated[
        int | None, typer.Option(min=1, help="Processes, each with a GPU.  [default: --processes of the run]")
    ] = None,
    disk_speed: Annotated[float, typer.Option(callback=above_zero, help="GB/s, of all processes together.")] = 1.0,
    prompts: Annotated[list[str] | None, typer.Option(help="NAME=COUNT, in place of opening the data; repeat.")] = None,
) -> list[dict]:
    command = typer.main.get_command(cropi.app).commands["run"]
    try:
        run = command.make_context("run", list(options or [])).params
    except rollout.UsageError as error:
        raise BadInput(error.format_message()) from None
    gpus = gpus or run["processes"]
    ours = [f"rollout.limit={run['limit']}"] if run["limit"] else []
    ours += [f"rollout.engine={run['engine']}"] if run["engine"] != "auto" else []
    chosen = cropi.parse_settings([*ours, *(run["assignments"] or [])])
    settings = {name: defaults(name) | options for name, options in chosen.items()}
    given = dict(text.split("=", 1) for text in prompts or [] if "=" in text)
    require(len(given) == len(prompts or []), "--prompts is NAME=COUNT")

    def count(name: str, source: str) -> int:
        if name in given:
            require(given[name].isdigit(), f"--prompts {name}={given[name]}: not a number")
            return int(given[name])
        if not Path(source).exists():
            print(f"{source}: asking the Hub", file=sys.stderr)
        try:
            return len(cropi.read(settings, "rollout" if name == "train" else name.partition("-")[0], source))
        except BadInput as error:
            raise BadInput(f"{error}; or say how many prompts it has: --prompts {name}=COUNT") from None

    pool = count("train", run["pool"])
    sets = {kind: cropi.set_names(run[kind], f"{kind}-").items() for kind in ("valid", "test")}
    valid, test = (sum(count(f"{kind}-{name}", source) for name, source in sets[kind]) for kind in ("valid", "test"))
    files = select.needs(run["selector"])  # what it does not need is not made
    scored_too = files >= select.GRADIENTS
    offline = pool if files >= select.TRAJECTORIES else 0
    valid = valid if files == select.VALIDATION else 0
    require(config is None or config.exists(), f"{config}: no such file")
    unknown = set(given) - {"train", *(f"{kind}-{name}" for kind in sets for name, _ in sets[kind])}
    require(not unknown, f"--prompts {', '.join(sorted(unknown))}: no such set in this run")
    try:
        shape = AutoConfig.from_pretrained(config or run["model"])
    except (OSError, ValueError) as error:
        raise BadInput(f"{config or run['model']}: no config ({str(error).splitlines()[0]})") from None
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape)
    costs, stages = Costs(model), run["stages"]
    roll, check, score, step = (settings[name] for name in ("rollout", "valid", "project", "train"))
    c = completion_tokens or roll["max_tokens"]
    p = prompt_tokens
    rows = []

    def add(
        what: str,
        groups: float,
        samples: int,
        passes: float,
        speed: float,
        memory: float,
        disk: float,
        launches: float = 0,
    ) -> None:
        """`groups` prompts with K samples, each so many forward passes and launches."""
        flops, tokens = groups * passes * costs.forward(p, c, samples), groups * (p + samples * c)
        row = {"what": what, "prompts": groups, "tokens": tokens, "flops": flops}
        hours = max(flops / speed / 3.6e15, groups * launches * LAUNCH / 3600) / gpus
        rows.append(row | {"hours": hours, "memory": memory, "disk": disk})

    weights = (4 if roll["dtype"] == "float32" else 2) * costs.weights
    vllm = 0 if roll["engine"] == "hf" else roll["gpu_memory"] * device_memory * 1e9
    if not vllm:  # a batch on CUDA
        vllm = rollout.WIDER * roll["batch_tokens"] * (costs.cached + 20 * costs.vocabulary / (p + c))

    def add_rollouts(what: str, groups: int, samples: int) -> None:
        # bytes: prompt_index and prompt_length, ids; of each sample length, reward, truncated; ids and log-probs
        stored = groups * (8 + 4 * p + samples * (9 + 8 * c))
        add(what, groups, samples, 1, rollout_tflops, weights + vllm, stored)

    refreshes = 1 + ((stages - 1) // run["refresh_every"] if run["refresh_every"] else 0)
    add_rollouts("offline rollouts, pool", refreshes * offline, roll["samples"])
    add_rollouts("offline rollouts, validation", refreshes * valid, check["samples"])
    if run["retry_failed"]:
        later = [s for s in range(1, stages) if not (run["refresh_every"] and s % run["refresh_every"] == 0)]
        retries = sum(s % run["retry_every"] == 0 for s in later)
        add_rollouts("failures sampled again", retries * failures * offline, run["retry_failed"])
    if scored_too:
        passes = 1 if run["static"] else stages
        for what, groups, samples in (("pool", pool, roll["samples"]), ("validation", valid, check["samples"])):
            scored, tokens = passes * live * groups, max(score["batch_tokens"], p + roll["max_tokens"])
            signs = 4 * costs.signs + (costs.weights if score["sparse_ratio"] < 1 else 0)
            memory = weights + signs + 6 * costs.largest + 8 * score["k"] * min(roll["shard"], groups)
            memory += tokens * costs.activations + 12 * min(tokens * costs.vocabulary, LOGITS)
            halved = passes * live * min(score["halves"], groups) if samples % 2 == 0 else 0
            disk = (scored + halved) * 4 * score["k"]
            batch, most = max(1, tokens // (p + samples * c)), max(costs.largest, GradientSketcher.MATRIX_ELEMENTS)
            shared = (min(batch, most // size) for size in costs.sketched)  # prompts a launch
            launches = (1 + SKETCH) * sum(1 / together for together in shared)
            add(f"scoring, {what}", scored, samples, 3, tflops, memory, disk, launches)
        seconds = costs.sketch_launches * LAUNCH
        print(
            f"sketches: at most {costs.sketch_launches:,} launches a prompt ({1e3 * seconds:.0f} ms), signs of ", end=""
        )
        print(human(signs, "B"))
    chosen = pool if run["selector"] == "full" else max(1, round(run["frac"] * pool))
    drawn = stages * step["steps"] * min(step["batch_prompts"], chosen)
    per_weight = 20 if step["kl"] else 16
    activations, passes = 3.3 / 2.5 * costs.activations, 3
    if step["gradient_checkpointing"]:  # one more pass forward
        activations, passes = activations / costs.layers + 4 * costs.layers * costs.width, 4
    passes = passes * step["iterations"] + (step["iterations"] if step["kl"] else 0)
    tokens = max(step["batch_tokens"], p + step["max_tokens"])
    batch = tokens * activations + 20 * min(tokens * costs.vocabulary, LOGITS)
    mine = live * step["batch_prompts"] * (p + step["samples"] * c) / gpus  # tokens of a process in a step
    batches = step["iterations"] * max(1, math.ceil(mine / tokens))
    away = (gpus - 1) / gpus * costs.weights
    sent = {  # bytes in a step
        "none": 8 * step["iterations"] * away,
        "full": (2 + batches * (8 + 2 * (per_weight == 20))) * away,
    }
    ways = held(costs, per_weight, step["dtype"] != "float32", gpus)
    large = per_weight * costs.weights > 0.6 * device_memory * 1e9
    way = step["shard_weights"] if step["shard_weights"] != "auto" else "full" if gpus > 1 and large else "none"
    add("training, sampling", drawn, step["samples"], 1, rollout_tflops, ways[way]["sampling"] + vllm, 0)
    kept = 4 * stages + 8 * min(stages, run["keep_states"] + 1) + 24  # bytes a weight
    disk = kept * costs.weights
    add("training, updates", live * drawn, step["samples"], passes, tflops, ways[way]["updates"] + batch, disk)
    add_rollouts("evaluation", (stages + 1) * test, settings["test"]["samples"])
    total = {key: sum(row[key] for row in rows) for key in ("prompts", "tokens", "flops", "hours", "disk")}
    rows.append({"what": "all", **total, "memory": max(row["memory"] for row in rows)})
    print(
        f"{config or run['model']}: {human(costs.weights)} parameters; "
        f"{stages} stages of {step['steps']} steps, {chosen:,} prompts chosen"
    )
    print("| | prompts | tokens | FLOPs | hours | memory | disk |\n|---|---|---|---|---|---|---|")
    for row in rows:
        cells = [human(row["prompts"]), human(row["tokens"]), human(row["flops"]), f"{row['hours']:.2g}"]
        print(f"| {' | '.join([row['what'], *cells, human(row['memory'], 'B'), human(row['disk'], 'B')])} |")
    if gpus > 1:
        print("\n| training, a GPU | loading | sampling | updates | sent per step |\n|---|---|---|---|---|")
        for name, more in ways.items():
            memory = (more["loading"], more["sampling"] + vllm, more["updates"] + batch, sent[name])
            label = {"none": "all weights", "full": "a share"}[name] + " (this run)" * (name == way)
            print(f"| {' | '.join([label, *(human(x, 'B') for x in memory)])} |")
    state = 12 * costs.weights
    said = f"a checkpoint: {human(state, 'B')}, {state / disk_speed / 1e9:.0f} s"
    host = max(state / gpus, 4 * costs.weights)
    print(f"\n{said}; the host needs {human(state, 'B')} for it, {human(host, 'B')} in one process")
    return rows


if __name__ == "__main__":
    command_line(app)
