"""The bundled world: string tasks with checkable answers, and a small model that mostly gets them wrong.

    python toy/make.py                # data and model, about two minutes on two cores
    python toy/make.py --data-only    # only the jsonl files

A prompt is `rev(4831)=`, its answer `1384`. Twelve families of prompts share one 341k-parameter Qwen2 model:

  * two are *targets* (`rev`, `srt`): they have validation and test sets of their own;
  * eight more measure transfer: the untargeted test set is drawn from them;
  * `cpy` is solved from the start, so most of its groups carry no gradient;
  * `rnd` is noise: the answer is a random digit that nobody can learn, yet some samples are rewarded.

The model is warm-started on demonstrations of which only 25% follow the right rule. The others follow plausible
wrong rules (sorting the wrong way, rotating to the wrong side, copying), so the model *can* do most tasks but mostly
does not: what reinforcement learning with verifiable rewards repairs.

Writes toy/train.jsonl (2,400), toy/valid-{rev,srt}.jsonl (128 each), toy/valid-mixed.jsonl (128, of the eight others),
toy/test-{rev,srt}.jsonl (400 each), toy/test-untargeted.jsonl (320) and toy/model/. The data is byte-identical every
time; the model's weights depend in their last digits on the machine's arithmetic. Prints each family's starting pass
rate.
"""

import argparse
import json
import random
import string
from collections.abc import Callable, Iterable
from pathlib import Path

HERE = Path(__file__).parent
SHARE_RIGHT = 0.25  # of the demonstrations
LENGTHS = (3, 4, 5, 6)
PAD, EOS = "<pad>", "<|endoftext|>"  # the latter is what transformers expects of a Qwen2 tokenizer


def shift(alphabet: str, by: int):
    return lambda s: "".join(alphabet[(alphabet.index(c) + by) % len(alphabet)] for c in s)


def swap_ends(s: str) -> str:
    return s[-1] + s[1:-1] + s[0]


def copy(s: str) -> str:
    return s


def reverse(s: str) -> str:
    return s[::-1]


DIGITS, LETTERS = string.digits, string.ascii_lowercase
# family: (alphabet, the right rule, plausible wrong rules)
FAMILIES = {
    "rev": (DIGITS, reverse, [copy, swap_ends]),
    "srt": (DIGITS, lambda s: "".join(sorted(s)), [lambda s: "".join(sorted(s, reverse=True)), copy]),
    "rot": (DIGITS, lambda s: s[1:] + s[0], [lambda s: s[-1] + s[:-1], copy]),
    "inc": (DIGITS, shift(DIGITS, 1), [shift(DIGITS, -1), copy]),
    "neg": (DIGITS, lambda s: "".join(str(9 - int(c)) for c in s), [shift(DIGITS, 5), copy]),
    "shf": (LETTERS, shift(LETTERS, 1), [shift(LETTERS, -1), copy]),
    "swp": (LETTERS, swap_ends, [copy, reverse]),
    "max": (DIGITS, lambda s: max(s) * len(s), [lambda s: min(s) * len(s), lambda s: s[0] * len(s)]),
    "fst": (LETTERS, lambda s: s[0] * len(s), [lambda s: s[-1] * len(s), copy]),
    "odd": (LETTERS, lambda s: s[::2], [lambda s: s[1::2], copy]),
    "cpy": (LETTERS, copy, []),
    "rnd": (LETTERS, None, []),  # the answer is drawn with the prompt
}
TARGETS = ["rev", "srt"]
UNTARGETED = [f for f in FAMILIES if f not in (*TARGETS, "cpy", "rnd")]


def draw(rng: random.Random, family: str) -> tuple[str, str]:
    """A prompt's argument and its right answer."""
    alphabet, rule, _ = FAMILIES[family]
    argument = "".join(rng.choice(alphabet) for _ in range(rng.choice(LENGTHS)))
    return argument, rule(argument) if rule else rng.choice("0123")


def draw_unseen(rng: random.Random, family: str, n: int, seen: set[str]) -> list[dict]:
    rows = []
    while len(rows) < n:
        argument, answer = draw(rng, family)
        prompt = f"{family}({argument})="
        if prompt not in seen:
            seen.add(prompt)
            rows.append({"prompt": prompt, "answer": answer, "family": family})
    return rows


def write_data() -> None:
    """Every file draws from one set of unseen prompts, so no prompt stands in two files or twice in one."""
    rng, seen = random.Random(0), set()
    files = {}
    for family in TARGETS:
        files[f"test-{family}"] = draw_unseen(rng, family, 200, seen)
        files[f"valid-{family}"] = draw_unseen(rng, family, 128, seen)
    files["test-untargeted"] = [row for f in UNTARGETED for row in draw_unseen(rng, f, 40, seen)]
    files["train"] = [row for f in FAMILIES for row in draw_unseen(rng, f, 200, seen)]
    rng.shuffle(files["train"])
    for family in TARGETS:  # drawn last, so that larger test sets leave every other file as it is
        files[f"test-{family}"] += draw_unseen(rng, family, 200, seen)
    files["valid-mixed"] = [row for f in UNTARGETED for row in draw_unseen(rng, f, 16, seen)]
    for name, rows in files.items():
        (HERE / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        print(f"toy/{name}.jsonl: {len(rows)} prompts")


def make_tokenizer(marks: str = ""):
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {c: i for i, c in enumerate([PAD, EOS, *DIGITS, *LETTERS, "(", ")", "=", *marks])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS)


def demonstration(rng: random.Random) -> tuple[str, str]:
    family = rng.choice(list(FAMILIES))
    argument, answer = draw(rng, family)
    wrong = FAMILIES[family][2]
    if wrong and rng.random() > SHARE_RIGHT:
        answer = rng.choice(wrong)(argument)
    return f"{family}({argument})=", answer


def warm_start(
    steps: int,
    batch: int = 256,
    folder: Path = HERE / "model",
    lr: float = 3e-3,
    demonstrate: Callable[[random.Random], tuple[str, str]] = demonstration,
    marks: str = "",
    **shape: int,
) -> None:
    """Supervised learning on the demonstrations; the loss counts answer tokens (and the end token) only.

    Args:
        demonstrate: draws a prompt and an answer.
        marks: more characters of the vocabulary.
        shape: options of Qwen2Config: `bench/projection.py` trains a wider model this way.
    """
    import torch
    from tqdm import trange
    from transformers import Qwen2Config, Qwen2ForCausalLM

    tokenizer = make_tokenizer(marks)
    torch.manual_seed(0)
    sizes = {"hidden_size": 96, "intermediate_size": 288, "num_hidden_layers": 3, "num_attention_heads": 4}
    model = Qwen2ForCausalLM(
        Qwen2Config(
            **sizes | {"num_key_value_heads": 2} | shape,
            vocab_size=len(tokenizer),
            max_position_embeddings=64,
            tie_word_embeddings=False,  # vLLM's CPU backend does not follow a tied matrix on weight reload
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        )
    )
    print(f"{folder}: {sum(p.numel() for p in model.parameters()):,} parameters")
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    rng = random.Random(1)
    for _ in trange(steps, desc="warm start", disable=None):
        pairs = [demonstrate(rng) for _ in range(batch)]
        ids = [[*tokenizer.encode(p + a), tokenizer.eos_token_id] for p, a in pairs]
        width = max(map(len, ids))
        tokens = torch.tensor([row + [0] * (width - len(row)) for row in ids])
        labels = tokens.clone()
        for i, (prompt, _) in enumerate(pairs):
            labels[i, : len(prompt)] = labels[i, len(ids[i]) :] = -100
        loss = model(tokens, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    print(f"warm start: last loss {loss.item():.3f}")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def print_pass_rates(world: Path = HERE, families: Iterable[str] = FAMILIES, max_tokens: int = 8) -> None:
    """Of a world's training pool, 8 samples a prompt at temperature 1, by family."""
    import sys
    import tempfile

    import numpy as np

    sys.path.insert(0, str(HERE.parent))
    import rollout

    data = str(world / "train.jsonl")
    rows = rollout.load_prompts(data)
    with tempfile.TemporaryDirectory() as folder:
        rollout.rollout(out=Path(folder) / "train", model=world / "model", data=data, max_tokens=max_tokens)
        shards = [rollout.load_trajectories(path)[0] for path in rollout.shards(Path(folder) / "train", "trajectories")]
    rewards = np.concatenate([shard.rewards for shard in shards])  # (N, K), prompt by prompt: none is dropped
    for family in families:
        some = rewards[[row["family"] == family for row in rows]]
        print(f"{family:10} pass rate {some.mean():.3f}  live {(np.ptp(some, axis=1) > 0).mean():.0%}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-only", action="store_true")
    parser.add_argument("--steps", type=int, default=900, help="of the warm start")
    arguments = parser.parse_args()
    write_data()
    if not arguments.data_only:
        warm_start(arguments.steps)
    print_pass_rates()
