"""What this project does on a GPU: is it right there, how fast is it, how much memory does it take?

    python bench/gpu.py    # two minutes on an H200, without a network; writes docs/gpu.json

First `pytest -m gpu` (gradients against float64 on the CPU, packed rows against single sequences, sketches, the engine
against the trainer), with vLLM installed `pytest -m "gpu or vllm"`. Then sampling, scoring and training with random
weights of the shape of Qwen2.5-1.5B and random prompts: tokens per second (a prompt counts once for its K completions),
the share of what a large matrix product in bfloat16 reaches on this device, and the peak of memory beside what plan.py
expects. vLLM, datasets, math-verify and pebble may be missing; what needs vLLM is left out then.
"""

import functools
import gc
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import plan  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
import typer  # noqa: E402
from peers import save_tokenizer  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM  # noqa: E402

import project  # noqa: E402
import rollout  # noqa: E402
import train  # noqa: E402

SAMPLES, BUCKETS = 8, 4096


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(work: Callable, rounds: int = 3) -> tuple[float, float]:
    """Median seconds after a first call, and the peak of memory in bytes (0 on a CPU)."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(rounds + 1):
        wait()
        clock = time.perf_counter()
        work()
        wait()
        seconds.append(time.perf_counter() - clock)
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return statistics.median(seconds[1:]), peak


def peak_flops() -> float:
    """FLOP/s of a large matrix product in bfloat16."""
    size = 8192 if torch.cuda.is_available() else 1024
    a = torch.randn(size, size, device=rollout.device(), dtype=torch.bfloat16)
    return 2 * size**3 / timed(lambda: a @ a, 10)[0]


def random_model(shape, dtype: torch.dtype) -> torch.nn.Module:
    torch.manual_seed(0)
    with torch.device(rollout.device()):
        model = AutoModelForCausalLM.from_config(shape, dtype=dtype, attn_implementation=rollout.our_attention())
    return model.eval()


def expected(config: Path, length: int, tokens: int, prompts: int) -> dict[str, float]:
    """Bytes, by plan.py, for each of its rows."""
    words = ["--train", "x", "--valid", "v=x", "--test", "v=x", "--selector", "influence"]
    settings = [
        f"rollout.max_tokens={tokens}",
        f"rollout.samples={SAMPLES}",
        "rollout.engine=hf",
        f"project.k={BUCKETS}",
    ]
    settings += [f"train.max_tokens={tokens}", "train.dtype=bfloat16", f"train.batch_prompts={prompts}"]
    words += [word for setting in settings for word in ("--set", setting)]
    counts = [f"train={prompts}", "valid-v=1", "test-v=1"]
    sizes = {"prompt_tokens": float(length), "completion_tokens": float(tokens)}
    rows = plan.plan(words, 200.0, 20.0, 0.5, **sizes, config=config, prompts=counts)
    return {row["what"]: row["memory"] for row in rows}


def measure(config: Path, prompts: int, length: int, tokens: int) -> dict:
    shape, random = AutoConfig.from_pretrained(config), np.random.default_rng(0)
    with torch.device("meta"):
        costs = plan.Costs(AutoModelForCausalLM.from_config(shape))
    ids = [random.integers(2, shape.vocab_size, length).tolist() for _ in range(prompts)]
    flops, peak, lines = costs.forward(length, tokens, SAMPLES), peak_flops(), {}
    memory = expected(config, length, tokens, prompts)

    def add(name: str, work: Callable, share: float, passes: float, row: str, rounds: int = 3) -> None:
        """`work` is on a share of the prompts."""
        seconds, used = timed(work, rounds)
        groups = share * prompts
        lines[name] = {
            "seconds": seconds,
            "tokens_per_second": groups * (length + SAMPLES * tokens) / seconds,
            "share_of_peak": groups * passes * flops / seconds / peak,
            "peak_bytes": used,
            "plan_bytes": memory[row],
        }
        print(name, json.dumps(lines[name]), flush=True)

    words = SimpleNamespace(eos_token_id=1, batch_decode=lambda ids, **_: [""] * len(ids))
    o = SimpleNamespace(samples=SAMPLES, max_tokens=tokens, temperature=1.0, reward="exact", reward_seconds=1.0)
    rows, made = [{"prompt": "", "answer": ""}] * prompts, []

    def sample(engine) -> Callable:
        return lambda: made.append(rollout.sample_trajectories(engine, words, rows, ids, range(prompts), o, [0]))

    model = random_model(shape, torch.bfloat16)
    add("sampling, transformers", sample(rollout.TransformersEngine(model, words)), 1, 1, "offline rollouts, pool", 1)
    trajectories = made[-1]
    trajectories.rewards[:] = np.arange(SAMPLES) % 2  # all are live
    sketcher = project.GradientSketcher(model, BUCKETS, 1.0, seed=0)
    halved, few = np.zeros(prompts // 2, bool), trajectories.take(np.arange(prompts // 2))
    score_tokens = plan.defaults("project")["batch_tokens"]
    score = functools.partial(project.project_groups, sketcher, few, halved, 1.0, score_tokens)
    add("scoring", score, len(halved) / prompts, 3, "scoring, pool")
    sketcher.close()
    if importlib.util.find_spec("vllm"):
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            save_tokenizer(Path(folder), shape.vocab_size)
            given = {"engine": "vllm", "dtype": "bfloat16", "batch_tokens": 16384, "gpu_memory": 0.3, "seed": 0}
            engine = rollout.open_engine(SimpleNamespace(model=Path(folder), **given), model, words)
            add("sampling, vLLM", sample(engine), 1, 1, "offline rollouts, pool", 2)
            lines["sampling, vLLM"] |= {"peak_bytes": None, "plan_bytes": None}  # its memory is in another process
            engine.sync(model)
            engine.check(model, made[-1], 1.0)
            rollout.close_engine()
    del model, sketcher, score
    gc.collect()  # on a GPU its memory is counted otherwise
    policy, initial = random_model(shape, torch.float32), random_model(shape, torch.float32).requires_grad_(False)
    options = plan.defaults("train") | {"dtype": "bfloat16"}
    adamw = torch.optim.AdamW(policy.parameters(), lr=1e-6, weight_decay=0.0, fused=True)
    roots = train.LogProbs(policy), train.LogProbs(initial)
    train.make_gradients(roots[0])
    step = functools.partial(train.update, *roots, adamw, few, SimpleNamespace(**options), range(len(halved)))
    add("training", step, len(halved) / prompts, 4, "training, updates", 2)
    return {
        "peak_flops": peak,
        "prompts": prompts,
        "prompt_tokens": length,
        "completion_tokens": tokens,
        "lines": lines,
    }


app = typer.Typer(**rollout.PLAIN)


@app.command(help=__doc__.splitlines()[0])
def gpu(
    config: Annotated[Path, typer.Option(help="config.json of the model.")] = (
        ROOT / "bench/configs/Qwen2.5-1.5B-Instruct.json"
    ),
    prompts: Annotated[int, typer.Option(min=2, help="To sample; half of them are scored, and trained on.")] = 64,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Of each.")] = 128,
    completion_tokens: Annotated[int, typer.Option(min=1, help="Of each.")] = 128,
    out: Annotated[Path, typer.Option("--json", help="File to write.")] = ROOT / "docs/gpu.json",
    cpu: Annotated[bool, typer.Option("--cpu", help="Run without a GPU, to try this script.")] = False,
) -> None:
    if not torch.cuda.is_available() and not cpu:
        if not out.exists():
            out.write_text(json.dumps({"device": "not run"}) + "\n")
        raise rollout.BadInput("no GPU here; --cpu tries the script without one")
    clock, marks = time.perf_counter(), "gpu or vllm" if importlib.util.find_spec("vllm") else "gpu"
    files = ["tests/test_gpu.py", *(["tests/test_vllm.py"] if "vllm" in marks else [])]
    command = [sys.executable, "-m", "pytest", "-q", "-m", marks, *files]
    tests = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    summary = tests.stdout.strip().splitlines()[-1] if tests.stdout.strip() else tests.stderr.strip()[-200:]
    print(tests.stdout[-4000:] if tests.returncode else summary, flush=True)
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "python": sys.version.split()[0]}
    found = {"device": name, **versions, "tests": summary, "tests_passed": tests.returncode == 0}
    found |= measure(config, prompts, prompt_tokens, completion_tokens)
    out.write_text(json.dumps(found | {"seconds": time.perf_counter() - clock}, indent=1) + "\n")
    sys.exit(tests.returncode)


if __name__ == "__main__":
    rollout.command_line(app)
