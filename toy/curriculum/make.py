"""The second world: programs of one, two or three steps, whose parts must be learned before the whole.

    python toy/curriculum/make.py                # data and model, some seven minutes on two cores
    python toy/curriculum/make.py --data-only    # only the jsonl files

A prompt is `irn:4831=`: apply i, then r, then n. The answer shows each step, `5942=2495=7504`. One 341k-parameter Qwen2
answers all of it. It is warm-started on demonstrations in which each step follows the right rule with the share of its
letter (SHARES), and a plausible wrong one otherwise. So the whole is right as often as all of its steps are.

Each family of prompts is a program, an alphabet and some lengths. There are

  * three *targets* with validation and test sets of their own, 3% of the pool each: `irn` begins near 0.05, most of its
    groups are dead; `sl` near 0.25; `w`, whose arguments are long, near 0.6;
  * their parts (`i`, `r`, `n`, `ir`, `rn`, `s`, `l`), and relatives that share a step with them;
  * `r` on letters, where to copy is right: the opposite of what `irn` needs of the same letter;
  * `c`, solved from the start, and `z`, noise: its answer is a random digit;
  * programs that have nothing to do with the targets (`d`, `m`, `u`, `f`, `o`, `x`, `k` and pairs of them).

So what helps should change on the way: the parts first, then the whole; the short before the long. When this world was
made, nothing was looked at but the untrained model, full data, random prompts and the oracles (oracle.py). Before this
one there were two: in one the model had hardly learned its demonstrations, in the other, with larger shares and fewer
families that do not matter, full data ended at 0.93, which left nothing to win.

Writes train.jsonl (1,980), valid-*.jsonl (96 each), valid-mixed.jsonl (168, of all families but the targets, `c` and
`z`), test-*.jsonl (200 each), test-untargeted.jsonl (480) and model/, beside this file. The data is byte-identical each
time; the model's weights depend in their last digits on the machine's arithmetic. Prints each family's starting pass
rate.
"""

import argparse
import json
import random
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import make as toy  # noqa: E402
from make import DIGITS, LETTERS, copy, reverse, shift, swap_ends  # noqa: E402

TARGETS = ["irn", "sl", "w"]
SHARES = {"i": 0.3, "r": 0.3, "n": 0.3, "s": 0.52, "l": 0.52, "w": 0.6}  # of steps that follow the right rule
OTHER_SHARE = 0.35  # of the other letters
# letter: (the right rule, plausible wrong rules)
RULES = {
    "i": (shift(DIGITS, 1), [shift(DIGITS, -1), copy]),
    "r": (reverse, [copy, swap_ends]),
    "n": (lambda s: "".join(str(9 - int(c)) for c in s), [shift(DIGITS, 5), copy]),
    "s": (lambda s: "".join(sorted(s)), [lambda s: "".join(sorted(s, reverse=True)), copy]),
    "l": (lambda s: s[1:] + s[0], [lambda s: s[-1] + s[:-1], copy]),
    "w": (swap_ends, [copy, reverse]),
    "d": (shift(DIGITS, 2), [shift(DIGITS, -2), copy]),
    "m": (lambda s: max(s) * len(s), [lambda s: min(s) * len(s), lambda s: s[0] * len(s)]),
    "u": (shift(LETTERS, 1), [shift(LETTERS, -1), copy]),
    "f": (lambda s: s[0] * len(s), [lambda s: s[-1] * len(s), copy]),
    "o": (lambda s: s[::2], [lambda s: s[1::2], copy]),
    "x": (swap_ends, [copy, reverse]),
    "k": (lambda s: s[-1] + s[:-1], [lambda s: s[1:] + s[0], copy]),
    "c": (copy, []),
    "z": (None, []),  # the answer is drawn with the prompt
}
ON_LETTERS = {"r": (copy, [reverse])}  # the contradiction
LONG, MIDDLE, SHORT = (5, 6, 7, 8), (4, 5), (3, 4)  # of arguments, for one, two and three steps
# family: (program, alphabet, prompts in the pool)
FAMILIES = {
    **{name: (name, DIGITS, 60) for name in TARGETS},
    **{name: (name, DIGITS, 30) for name in ("i", "r", "n", "ir", "rn", "s", "l")},
    **{name: (name, DIGITS, 30) for name in ("is", "ln", "wr", "sw")},
    "r-letters": ("r", LETTERS, 150),
    **{name: (name, DIGITS, 100) for name in ("d", "m", "md", "dm")},
    **{name: (name, LETTERS, 90) for name in ("u", "f", "o", "x", "k", "uf", "xk", "ko")},
    "c": ("c", LETTERS, 120),
    "z": ("z", LETTERS, 80),
}
UNTARGETED = [family for family in FAMILIES if family not in (*TARGETS, "c", "z")]


def apply(rng: random.Random, family: str, argument: str, right: bool) -> str:
    """The steps of a program, each from the one before; unless `right`, each follows its right rule with its share."""
    program, alphabet, _ = FAMILIES[family]
    steps = []
    for letter in program:
        rule, wrong = ON_LETTERS[letter] if alphabet == LETTERS and letter in ON_LETTERS else RULES[letter]
        if wrong and not right and rng.random() > SHARES.get(letter, OTHER_SHARE):
            rule = rng.choice(wrong)
        argument = rule(argument) if rule else rng.choice("0123")
        steps.append(argument)
    return "=".join(steps)


def draw_argument(rng: random.Random, family: str) -> str:
    program, alphabet, _ = FAMILIES[family]
    length = rng.choice({1: LONG, 2: MIDDLE, 3: SHORT}[len(program)])
    return "".join(rng.choice(alphabet) for _ in range(length))


def draw_unseen(rng: random.Random, family: str, n: int, seen: set[str]) -> list[dict]:
    rows = []
    while len(rows) < n:
        argument = draw_argument(rng, family)
        prompt = f"{FAMILIES[family][0]}:{argument}="
        if prompt not in seen:
            seen.add(prompt)
            rows.append({"prompt": prompt, "answer": apply(rng, family, argument, True), "family": family})
    return rows


def write_data() -> None:
    """Every file draws from one set of unseen prompts, so no prompt stands in two files or twice in one."""
    rng, seen = random.Random(0), set()
    files = {f"test-{family}": draw_unseen(rng, family, 200, seen) for family in TARGETS}
    files |= {f"valid-{family}": draw_unseen(rng, family, 96, seen) for family in TARGETS}
    files["valid-mixed"] = [row for f in UNTARGETED for row in draw_unseen(rng, f, 7, seen)]
    files["test-untargeted"] = [row for f in UNTARGETED for row in draw_unseen(rng, f, 20, seen)]
    files["train"] = [row for f, (_, _, count) in FAMILIES.items() for row in draw_unseen(rng, f, count, seen)]
    rng.shuffle(files["train"])
    for name, rows in files.items():
        (HERE / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        print(f"{name}.jsonl: {len(rows)} prompts")


def demonstration(rng: random.Random) -> tuple[str, str]:
    family = rng.choice(list(FAMILIES))
    argument = draw_argument(rng, family)
    return f"{FAMILIES[family][0]}:{argument}=", apply(rng, family, argument, False)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-only", action="store_true")
    parser.add_argument("--steps", type=int, default=2800, help="of the warm start")
    arguments = parser.parse_args()
    write_data()
    if not arguments.data_only:
        toy.warm_start(arguments.steps, 128, folder=HERE / "model", demonstrate=demonstration, marks=":")
    toy.print_pass_rates(HERE, FAMILIES, max_tokens=16)
