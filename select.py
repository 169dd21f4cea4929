"""Select: rank the prompts by influence on the validation sets, and choose the top share.

    python select.py --data toy/train.jsonl --trajectories runs/mine/rollouts/train \\
                     --gradients runs/mine/stage-01/gradients-train \\
                     --valid-gradients runs/mine/stage-01/gradients-valid-rev \\
                     --valid-gradients runs/mine/stage-01/gradients-valid-srt \\
                     --out runs/mine/stage-01/selection.safetensors

Reads   the sketches that `project.py` wrote for the training prompts and for V validation sets.
Writes  the chosen of the pool's N prompts, and the scores of all, NaN where there are none; beside it a CSV for people,
        with a line for every prompt that has a score:

    ranked    int64   (top,)  the chosen rows of the data set, best first; fewer than `top` if no more can be chosen
    score     float64 (N,)    the selector's score, higher is better
    pass_rate float64 (N,)    mean reward of the stored trajectories
    cosine    float64 (N,V)   with each validation set that has a live prompt, if the selector asks for gradients
    rank      int64   (N,V)   by this cosine among the live prompts, 1 is best, 0 marks a prompt that is not live

The facts and a printed table hold `diagnostics`: how stale the trajectories are, how far two halves of them agree on
the ranking, and which simpler rankings it resembles. A warning says if it should not be trusted. (The halves of a group
share the mean and the standard deviation of its rewards, so they are not quite independent.)

J_x is the expected reward on prompt x, J_v its mean over validation set v. A small step of size η along ∇J_x changes
J_v by η⟨∇J_v, ∇J_x⟩ (1), to first order. (This holds for a plain gradient step; training uses AdamW.) Sketches stand
for these gradients, and cosines for the inner products, so that long gradients do not win:

    cosine_v(x) = cos( g̃(x), mean of g̃ over the live prompts of v )                                           (4)
    score(x)    = Σ_v 1/rank_v(x)  over the sets v with rank_v(x) <= top  and  cosine_v(x) > 0 (deviation 4)  (5)

and the `top` = max(1, round(frac·N)) best are chosen, N being the whole pool. Only live prompts have a gradient. If
fewer than `top` are live and have a positive cosine, all of these are chosen. (Validation prompts that are not live
would only scale the mean.) Equal fused scores are ordered by mean cosine, then by index.

Deviations from the paper (and from its released code):
 1. Equal fused scores are ordered by mean cosine (released: the prompt of the first set comes first).
 2. `top` is rounded (released: rounded down), and counts over one pool (released: over each training data set).
 3. All live validation prompts count (released: at most 100).
 4. A rank counts only if the cosine is positive: `--sign set`. With `any`, the paper's rule, every rank counts. So if
    fewer than `top` prompts are live, `any` also takes those that point away from every set. `mean` asks for a positive
    mean cosine. Targeted accuracy on the toy (docs/results.md):

        frac    any    set   mean
         0.1   0.82   0.82   0.81
         0.5   0.70   0.76   0.78

 5. A validation set without a live prompt is not used for scoring: it is solved if its mean reward is at least 0.95,
    else stuck. (The stored trajectories decide; new ones may change it.) If no set is left, or no prompt can be chosen,
    the curriculum ends; in the first stage this is an error, unless all sets are solved.

A selector is a function of any of these parameters, by name. Files that none of its parameters needs are not made. N is
the whole pool; NaN stands for unknown, or not live:

    rows      the N rows of the data     random    numpy's generator, seeded       frac, sign   the options
    stage     1, 2, ...                  previous  rows chosen in the stage before, best first, or None
    pass_rate      (N,)   mean reward of the stored trajectories of a prompt
    length         (N,)   their mean length in tokens, the end token included
    truncated      (N,)   the share that max_tokens cut off
    cosine, inner  (N,V)  of its sketch with the mean sketch of each of the V validation sets that have a live prompt
    grad_norm      (N,)   norm of its sketch

It returns scores (N,): higher is better, NaN is never chosen, equals are ordered by index. `--selector` takes one of
SELECTORS below, or FILE.py:FUNCTION.
"""

from __future__ import annotations  # no annotation below is evaluated when this file is asked for as `select`

if __name__ == "select":
    # Python has imported this file by mistake. Someone asked for the standard library's `select` (subprocess, asyncio,
    # pytest ...), and this folder comes first on sys.path. Find the real one on a path without such folders.
    import importlib.machinery
    import importlib.util
    import os
    import sys

    _path = [entry for entry in sys.path if not os.path.exists(os.path.join(entry, "select.py"))]
    _spec = importlib.machinery.PathFinder.find_spec("select", _path)
    assert _spec and _spec.loader
    _module = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(_module)
    sys.modules["select"] = _module
else:
    import copy
    import csv
    import inspect
    import time
    from collections.abc import Callable
    from pathlib import Path
    from types import SimpleNamespace
    from typing import Annotated, Any, Literal

    import numpy as np
    import typer

    import rollout
    from rollout import RANK, Array, BadInput, require

# Where to warn. On the bundled world (bench/drift.py; K = 8, answers of up to 8 tokens) a run crosses VALID_STALE after
# some 40 steps and STALE after some 80. Share of prompts in common with a selection from many fresh trajectories:
#
#     after steps                        0      20      40      80     160
#     selection from stored ones      0.68    0.53    0.40    0.28    0.23
#     ... from 8 fresh ones a prompt  0.67    0.64    0.56    0.48    0.43
STALE = 0.65  # effective sample size of trajectories
VALID_STALE = 0.4  # ... of the worst validation set
ALL_SOLVED = "all validation sets are solved"  # the one good reason to end a curriculum early
SOLVED = 0.95  # a validation set without a live prompt is solved from this mean reward on
NOISY = 0.2  # split-half overlap of the top 10%: twice chance; the bundled world begins at 0.7 and falls to some 0.3


# ---------------------------------------------------------------------------------------------------------------------
# The formulas


def cosines(sketch: Array, directions: Array) -> Array:
    """Equation 4: cosine of every sketch (N, k) with V directions (V, k): (N, V). With a zero vector it is 0."""
    directions = directions / np.maximum(np.linalg.norm(directions, axis=1, keepdims=True), 1e-30)
    norms = np.maximum(np.linalg.norm(sketch, axis=1, keepdims=True), 1e-30)
    return sketch @ directions.T / norms  # (N, k) x (k, V) -> (N, V)


def ranks(scores: Array) -> Array:
    """Rank of each row within each column, 1 for the largest, equals in row order, NaN last: (N, V) -> (N, V) int64.

    >>> ranks(np.array([[0.1, 0.9], [0.5, 0.2]])).tolist()
    [[2, 1], [1, 2]]
    """
    return np.argsort(np.argsort(-scores, axis=0, kind="stable"), axis=0, kind="stable") + 1


def reciprocal_rank_fusion(rank: Array, top: int) -> Array:
    """Equation 5: Σ_v 1/rank_v over the sets where the rank is at most `top`: (N, V) -> (N,).

    >>> reciprocal_rank_fusion(np.array([[2, 1], [1, 3], [3, 2]]), top=2).tolist()  # 1/2 + 1/1, 1/1, 1/2
    [1.5, 1.0, 0.5]
    """
    return np.where(rank <= top, 1.0 / rank, 0.0).sum(1)


def top_count(frac: float, pool: int) -> int:
    """`top` of equation 5."""
    return max(1, round(frac * pool))


# ---------------------------------------------------------------------------------------------------------------------
# The selectors

CLOSE = 1e-9  # scores closer than this are equal; ties are broken by adding less than it


def influence(cosine: Array, frac: float, sign: str) -> Array:
    """Equation 5; ties by mean cosine. `sign` says which prompts may be chosen. any: all (the paper's). set: those with
    a positive cosine with some set, and only ranks of positive cosines count. mean: those with a positive mean."""
    rank, mean = ranks(cosine), cosine.mean(1)
    rank = np.where((cosine > 0) | (sign != "set"), rank, len(rank) + 1)  # too low to count
    allowed = {"set": cosine.max(1), "mean": mean}
    fused = reciprocal_rank_fusion(rank, top_count(frac, len(cosine)))
    tie = 1 - ranks(mean[:, None])[:, 0] / len(cosine)  # in [0, 1), larger for a larger mean cosine
    return np.where(np.isnan(mean) | (allowed.get(sign, 1) <= 0), np.nan, fused + CLOSE * tie)


def inner_product(inner: Array, frac: float, sign: str) -> Array:
    """Inner products in place of cosines: long gradients come first."""
    return influence(inner, frac, sign)


def gradient_norm(grad_norm: Array) -> Array:
    return grad_norm


def full(rows: list[dict]) -> Array:
    """Everything: `frac` is ignored."""
    return np.zeros(len(rows))


def random_prompts(rows: list[dict], random: np.random.Generator) -> Array:
    return random.random(len(rows))


def nearest_pass_rate(pass_rate: Array, random: np.random.Generator) -> Array:
    """The pass rate p nearest to 1/2; equals in random order."""
    return -np.abs(pass_rate - 0.5).round(6) - CLOSE * random.random(len(pass_rate))  # rounded: 1/3 and 2/3 are equals


def learnability(pass_rate: Array, random: np.random.Generator) -> Array:
    """The largest p(1-p), which is 1/4 - (p - 1/2)²: the same order as above, for rewards from 0 to 1."""
    return (pass_rate * (1 - pass_rate)).round(6) - CLOSE * random.random(len(pass_rate))


def hardest(pass_rate: Array, random: np.random.Generator) -> Array:
    """The lowest pass rate above 0; equals in random order."""
    return np.where(pass_rate > 0, -pass_rate.round(6), np.nan) - CLOSE * random.random(len(pass_rate))


SELECTORS: dict[str, Callable[..., Array]] = {
    "influence": influence,
    "inner": inner_product,
    "grad-norm": gradient_norm,
    "full": full,
    "random": random_prompts,
    "pass-rate": nearest_pass_rate,
    "learnability": learnability,
    "hardest": hardest,
}
# The parameters of a selector, and the files that each needs. Each level needs those before it, too: the data, the
# pool's trajectories, the pool's gradients, the validation sets' trajectories and gradients.
DATA, TRAJECTORIES, GRADIENTS, VALIDATION = range(4)
NEEDS = dict.fromkeys(("rows", "random", "stage", "previous", "frac", "sign"), DATA)
NEEDS |= dict.fromkeys(("pass_rate", "length", "truncated"), TRAJECTORIES)
NEEDS |= {"grad_norm": GRADIENTS, "cosine": VALIDATION, "inner": VALIDATION}


def asks_for(selector: str) -> set[str]:
    """The parameters of a selector.

    Raises:
        BadInput: there is no such selector, or it has a parameter of another name.
    """
    names = set(inspect.signature(rollout.load_function(selector, SELECTORS, "selector")).parameters)
    strange = ", ".join(sorted(names - NEEDS.keys()))
    require(not strange, f"selector {selector!r} asks for {strange}; there is {', '.join(sorted(NEEDS))}")
    return names


def needs(selector: str) -> int:
    """The files that a selector needs: the largest of its parameters' NEEDS."""
    return max((NEEDS[name] for name in asks_for(selector)), default=DATA)


def known_selector(selector: str) -> str:
    """Check of the option `--selector`."""
    asks_for(selector)
    return selector


def scores_of(selector: str, known: dict) -> Array:
    """Call a selector with the arguments that it asks for: scores (N,).

    Raises:
        BadInput: it raises, or returns something else than N numbers.
    """
    count = len(known["rows"])
    try:
        given = copy.deepcopy({name: known[name] for name in asks_for(selector)})  # it may write into them
        score = np.array(rollout.load_function(selector, SELECTORS, "selector")(**given), np.float64)
    except Exception as error:  # whatever a selector may raise
        raise BadInput(f"selector {selector!r} raised {type(error).__name__}: {error}") from error
    require(score.shape == (count,), f"selector {selector!r} returned shape {score.shape}, not ({count},)")
    return score


# ---------------------------------------------------------------------------------------------------------------------
# The arguments of the selectors


def spread(values: Array, rows: Array, count: int) -> Array:
    """Put the values of some rows of the data into a table of all `count` rows: (N, ...), NaN elsewhere."""
    everything = np.full((count, *values.shape[1:]), np.nan)
    everything[rows] = values
    return everything


def join(parts: list[dict[str, Array]]) -> dict[str, Array]:
    """Tables with the same columns, one below the other."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def of_trajectories(folder: Path, count: int) -> dict[str, Array]:
    """pass_rate, length, truncated: means over the stored trajectories of each of N prompts, (N,) each."""
    columns = {"pass_rate": "rewards", "length": "length", "truncated": "truncated"}
    parts = []
    for path in rollout.shards(folder, "trajectories"):
        stored, _ = rollout.load(path, "trajectories")
        means = {name: stored[of].mean(1, where=stored["length"] > 0) for name, of in columns.items()}
        parts.append(means | {"prompt_index": stored["prompt_index"]})
    joined = join(parts)
    return {name: spread(joined[name], joined["prompt_index"], count) for name in columns}


def read_gradients(folder: Path, directions: Array | None = None) -> tuple[dict[str, Array], Array, Array]:
    """Read a set's gradients shard by shard, since the sketches of many prompts do not fit into memory.

    Returns the columns, one row for each live prompt, with cosine and inner (rows, V) for directions (V, k); the mean
    of the sketches (k,); and the sketches of both halves, (2, Q, k).
    """
    columns, halves, total = [], [], np.zeros(())
    for path in rollout.shards(folder, "gradients"):
        tensors, _ = rollout.load(path, "gradients")
        halves.append(halves_of(tensors))
        sketch = tensors.pop("sketch").astype(np.float64)  # (live prompts of the shard, k)
        total = total + sketch.sum(0)
        if directions is not None and len(directions):
            tensors |= {"cosine": cosines(sketch, directions), "inner": sketch @ directions.T}
        columns.append({name: values for name, values in tensors.items() if not name.startswith("half_")})
    columns = join(columns)
    return columns, total / max(1, len(columns["prompt_index"])), np.concatenate(halves, 1)


def of_gradients(gradients: Path, valid_gradients: dict[str, Path], count: int) -> tuple[dict[str, Array], dict]:
    """cosine, inner (N,V) and grad_norm (N,) of the pool's N prompts, V being the number of validation sets with a live
    prompt; and the diagnostics that are computed from sketches."""
    sets = [read_gradients(folder) for folder in valid_gradients.values()]
    valid, directions = [columns for columns, _, _ in sets], np.array([mean for _, mean, _ in sets])  # (4)
    valid_halves = np.array([halves.sum(1) for _, _, halves in sets])
    pool, _, (first, second) = read_gradients(gradients, directions)
    diagnostics: dict[str, float] = {"live_prompts": len(pool["prompt_index"])}
    for name in STALENESS if diagnostics["live_prompts"] else ():
        summary, worst = np.max if name == "largest_change" else np.mean, min if name.startswith("ess") else max
        diagnostics[name] = float(summary(pool[name]))
        if valid:
            diagnostics[f"valid_{name}"] = float(worst(summary(tensors[name]) for tensors in valid))
    diagnostics |= split_half((first + second) / 2, first, valid_halves)
    names = ("grad_norm", "cosine", "inner") if valid else ("grad_norm",)
    return {name: spread(pool[name], pool["prompt_index"], count) for name in names}, diagnostics


def why_not_live(folder: Path) -> str:
    """Say why a set has no live prompt, and what helps; empty if it has one."""
    sums = rollout.totals(folder)
    if sums["live"]:
        return ""
    reward, cut = (sums[name] / max(1, sums["trajectories"]) for name in ("rewards", "truncated"))
    kind, ways = ("solved", "harder prompts") if reward >= SOLVED else ("stuck", "easier prompts, more rollout.samples")
    ways += ", a larger rollout.max_tokens" if cut > 0.1 else ""
    return f"{kind}: no live prompt, mean reward {reward:.2f}, {cut:.0%} truncated (what helps: {ways})"


def halves_of(tensors: dict[str, Array]) -> tuple[Array, Array]:
    """Sketches (Q, k) from each half of the trajectories, for the Q prompts of a shard that have halves."""
    first, halved = tensors["half_sketch"].astype(np.float64), np.isin(tensors["prompt_index"], tensors["half_index"])
    return first, 2 * tensors["sketch"][halved] - first


STALENESS = ("token_kl", "mean_change", "largest_change", "ess_token", "ess_trajectory")


# ---------------------------------------------------------------------------------------------------------------------
# Diagnostics: is the ranking more than noise, and which simpler ranking does it resemble?


def overlap(one: Array, other: Array) -> float:
    """Share of the first array's elements that are in the second.

    >>> overlap(np.array([3, 1, 4, 5]), np.array([5, 9, 2, 4]))
    0.5
    """
    return float(np.isin(one, other).mean())


def top_overlap(one: Array, other: Array, share: float = 0.1) -> float:
    """Overlap of the best `share` of N prompts in two tables of scores (N, V), mean over the V sets."""
    best = [np.argsort(-scores, axis=0, kind="stable")[: top_count(share, len(one))] for scores in (one, other)]
    return float(np.mean([overlap(a, b) for a, b in zip(best[0].T, best[1].T, strict=True)]))


def split_half(sketch: Array, first: Array, valid_halves: Array) -> dict[str, float]:
    """Agreement of two rankings from separate halves of the trajectories. `sketch` (Q, k) holds the sketches of Q
    training prompts, `first` (Q, k) those from the first half, `valid_halves` (V, 2, k) those of the validation sets.

    `noise` estimates the standard deviation of a cosine over draws of the trajectories; root mean square over prompts.
    With the halves of a training prompt written as g ± e, and those of a validation set as b ± f, the error of
    ⟨g,b⟩/(‖g‖‖b‖) is, to first order in e and f,
    (⟨e,b⟩ + ⟨g,f⟩)/(‖g‖‖b‖) - cos (⟨e,g⟩/‖g‖² + ⟨f,b⟩/‖b‖²): an error along g or b changes only the length.
    """
    if len(first) < 20 or not len(valid_halves) or not valid_halves.any(2).all():
        return {}
    direction = valid_halves.mean(1)  # (V, k)
    e, f = first - sketch, valid_halves[:, 0] - direction
    lengths = np.maximum(np.linalg.norm(sketch, axis=1, keepdims=True), 1e-30)  # (Q, 1)
    widths = np.maximum(np.linalg.norm(direction, axis=1), 1e-30)  # (V,)
    along = (e * sketch).sum(1)[:, None] / lengths**2 + (f * direction).sum(1) / widths**2  # (Q, V)
    error = (e @ direction.T + sketch @ f.T) / (lengths * widths) - cosines(sketch, direction) * along
    rankings = cosines(first, valid_halves[:, 0]), cosines(sketch - e, valid_halves[:, 1])
    return {"split_half": top_overlap(*rankings), "noise": float(np.sqrt((error**2).mean(0)).mean())}


def margin(cosine: Array, top: int) -> dict[str, float]:
    """How far the cosine (N, V) of rank `top` is above the next one, mean over the sets; empty if all are chosen."""
    gaps = -np.diff(-np.sort(-cosine, axis=0), axis=0)[top - 1 : top]  # (1, V)
    return {"margin": float(gaps.mean())} if len(gaps) else {}


def resemblance(chosen: Array, known: dict) -> dict[str, float]:
    """Does the choice look like one by p(1-p), p being the pass rate, or by the length of the answers?"""
    learnable = np.argsort(-learnability(known["pass_rate"], known["random"]), kind="stable")[: len(chosen)]
    diagnostics = {"overlap_learnability": overlap(chosen, learnable)}
    cosine, length = known["cosine"].mean(1), known["length"]
    live = ~np.isnan(cosine)
    if np.ptp(length[live]) > 0 and np.ptp(cosine[live]) > 0:
        diagnostics["length_correlation"] = float(np.corrcoef(cosine[live], length[live])[0, 1])
    return diagnostics


MEANINGS = {
    "live_prompts": "whose rewards differ",
    "samplers": "policies that sampled the groups, more than one where failures were retried",
    "token_kl": "KL(β‖π_θ) per token; right column: the worst validation set",
    "mean_change": "of a token's log-prob",
    "largest_change": "the largest of these",
    "ess_token": "effective sample size of tokens, 1 while θ is β",
    "ess_trajectory": "the same of trajectories",
    "split_half": "agreement on the top 10% between two halves of the trajectories; chance is 0.10",
    "margin": "cosine of rank `top` less that of the next, mean over the sets",
    "noise": "standard deviation of a cosine",
    "overlap_previous": "with what the stage before chose",
    "overlap_learnability": "with what p(1-p) would choose, p being the pass rate",
    "length_correlation": "of the cosine with the length of the answers",
}


def table(diagnostics: dict[str, float]) -> str:
    """The diagnostics by name, for people."""
    lines = []
    for name in [name for name in MEANINGS if name in diagnostics]:
        values = [f"{diagnostics[n]:.4g}" if n in diagnostics else "" for n in (name, f"valid_{name}")]
        lines.append(f"    {name:21}{values[0]:>10} {values[1]:>10}   {MEANINGS[name]}")
    return "\n".join(lines)


def warnings(diagnostics: dict[str, float]) -> list[str]:
    """Say in plain words where the ranking should not be trusted. Old trajectories mostly lack the prompts that the
    policy has learned to solve since (bench/why.py). So where failures were retried, age alone is no reason to warn."""
    retried = diagnostics.get("samplers", 1) > 1
    ways = "sample failures anew (cropi.py run --retry-failed 4), or all (--refresh-every 1)"
    stale = f"the policy has moved away from the stored trajectories; {ways}"
    noisy = "the ranking is mostly noise; sample more completions per prompt, or take more validation prompts"
    limits = {
        "ess_trajectory": (0.0 if retried else STALE, stale),
        "valid_ess_trajectory": (0.0 if retried else VALID_STALE, stale),
        "split_half": (NOISY, noisy),
    }
    below = {name: (limit, text) for name, (limit, text) in limits.items() if diagnostics.get(name, 1.0) < limit}
    return [f"warning: {name} is below {limit}: {text}" for name, (limit, text) in below.items()]


# ---------------------------------------------------------------------------------------------------------------------
# The command


def select(
    out: rollout.Given,
    data: rollout.GivenText,
    trajectories: Path | None = None,
    gradients: Path | None = None,
    valid_gradients: list[Path] = [],
    selector: Selector = "influence",
    frac: rollout.Share = 0.1,
    sign: Literal["any", "set", "mean"] = "set",
    limit: rollout.MaybeCount = None,
    prompt_column: str | None = None,
    answer_column: str | None = None,
    skip_bad_rows: bool = False,
    previous: Path | None = None,
    stage: rollout.Count = 1,
    seed: rollout.Natural = 0,
) -> None:
    """Options that rollout.py has as well are documented there.

    Args:
        out: Selection file to write; a CSV goes beside it.
        trajectories: The pool's trajectories (not for full, random).
        gradients: The pool's gradients (for influence, inner, grad-norm).
        valid_gradients: The same of a validation set; repeat.
        selector: influence, inner, grad-norm, full, random, pass-rate, learnability, hardest, or FILE.py:FUNCTION.
        frac: Share of the pool to choose.
        sign: Choose any; only with a positive cosine with some set; or only with a positive mean cosine.
        previous: Selection of the stage before, for a comparison.
        stage: Number of the stage: for selectors that ask; an empty selection is an error in the first.
    """
    o, beside, before = SimpleNamespace(**locals()), out.with_suffix(".csv"), None
    clear = beside not in (out, Path(data)) and not out.is_dir()
    require(clear, f"--out {out}: name a safetensors file beside which {beside} may be written")
    rows = rollout.load_prompts(data, limit, prompt_column, answer_column, skip_bad_rows)
    files = needs(selector)
    o.valid_gradients = valid_gradients = valid_gradients if files == VALIDATION else []
    inputs: dict[str, Any] = dict.fromkeys(("trajectories", "gradients", "valid_gradients", "model", "previous"))
    inputs["data"] = rows.digest
    if files >= TRAJECTORIES:
        if trajectories is None:
            raise BadInput(f"{selector} needs --trajectories, which rollout.py wrote for {data}")
        inputs["trajectories"], recipe = identities(trajectories, "trajectories")
        of_data = recipe["inputs"]["data"] == rows.digest
        require(of_data, f"{trajectories} was made from other data than --data; run rollout.py again")
    if files >= GRADIENTS:
        if gradients is None or not (valid_gradients or files < VALIDATION):
            raise BadInput(f"{selector} needs --gradients and at least one --valid-gradients")
        inputs |= check_gradients(gradients, valid_gradients, inputs["trajectories"])
    if previous:
        tensors, record = rollout.load(previous, "selection")
        of_data = record["recipe"]["inputs"]["data"] == rows.digest
        require(of_data, f"{previous} was made from other data than {data}")
        inputs["previous"], before = record["identity"], tensors["ranked"]
    rollout.check_out(out.parent)
    recipe = rollout.make_recipe("selection", CODE, vars(o), **inputs)
    if RANK == 0 and not rollout.is_made(out, recipe):
        known = {"rows": rows, "random": np.random.default_rng(seed), "previous": before}
        known |= {"stage": stage, "frac": frac, "sign": sign}
        known["pass_rate"] = np.full(len(rows), np.nan)  # unknown
        choose(o, recipe, known)
    if RANK == 0:
        write_csv(out, rows)
    rollout.gather()


def identities(folder: Path, kind: str) -> tuple[list[str], dict]:
    """Identities of the shards of a folder; and the recipe of the first one."""
    records = list(rollout.shards(folder, kind).values())
    return [record["identity"] for record in records], records[0]["recipe"]


def check_gradients(gradients: Path, valid_gradients: list[Path], trajectories: list[str]) -> dict:
    """The gradients' part of the recipe: identities.

    Raises:
        BadInput: they are not gradients of the pool's trajectories (identities), or cannot be compared with each other.
    """
    made_from = [r["recipe"]["shard"]["trajectories"] for r in rollout.shards(gradients, "gradients").values()]
    others = f"{gradients} was made from other trajectories than those given; run project.py again"
    require(made_from == trajectories, others)
    (ids, recipe), valid = identities(gradients, "gradients"), {}
    model, projection = recipe["inputs"]["model"], recipe["options"]
    for folder in valid_gradients:
        name = folder.name.removeprefix("gradients-").removeprefix("valid-")
        require(name not in valid, f"{folder}: two validation sets are called {name}; rename one")
        valid[name], recipe = identities(folder, "gradients")
        options = recipe["options"] | {"halves": projection["halves"]}
        comparable = (recipe["inputs"]["model"], options) == (model, projection)
        wrong = f"{folder} was made with another model or other options than {gradients}"
        require(comparable, f"{wrong}; run project.py again for both")
    return {"gradients": ids, "valid_gradients": valid, "model": model}


def choose(o: SimpleNamespace, recipe: dict, known: dict) -> None:
    """Score the pool, write the selection, and say what it looks like. An empty one ends the curriculum. `o` holds the
    options of `select`, `known` what a selector may ask for.

    Raises:
        BadInput: nothing can be chosen in the first stage, unless all validation sets are solved.
    """
    clock, count, without_live = time.perf_counter(), len(known["rows"]), {}
    diagnostics: dict[str, float] = {}
    if recipe["inputs"]["trajectories"]:
        known |= of_trajectories(o.trajectories, count)
    valid = dict(zip(recipe["inputs"]["valid_gradients"] or (), o.valid_gradients, strict=True))
    if recipe["inputs"]["gradients"]:
        without_live = {name: why for name, folder in valid.items() if (why := why_not_live(folder))}
        valid = {name: folder for name, folder in valid.items() if name not in without_live}
        columns, diagnostics = of_gradients(o.gradients, valid, count)
        known |= columns
        sampled = identities(o.trajectories, "trajectories")[1]["inputs"]
        diagnostics["samplers"] = len({sampled["model"], *(sampled["retry"] or ())})
        for name, why in without_live.items():
            rollout.say(f"validation set {name} does not score in this stage; {why}")
    no_set_left = without_live and not valid
    score = np.full(count, np.nan) if no_set_left else scores_of(o.selector, known)
    top = count if o.selector == "full" else top_count(o.frac, count)
    ranked = np.argsort(-score, kind="stable")[: min(top, np.count_nonzero(~np.isnan(score)))]  # NaN comes last
    solved = no_set_left and all(why.startswith("solved") for why in without_live.values())
    ended = "" if len(ranked) else ALL_SOLVED if solved else f"{o.selector} can choose no prompt"
    if ended and not solved:
        why = why_not_live(o.trajectories) if o.trajectories else ""
        ended = "; ".join([ended, *([f"{o.trajectories} is {why}"] if why else []), *without_live.values()])
        require(o.stage > 1, ended)
    tensors = {"ranked": ranked, "score": score, "pass_rate": known["pass_rate"]}
    if known["previous"] is not None and len(ranked):
        diagnostics["overlap_previous"] = overlap(ranked, known["previous"])
    if "cosine" in known and len(ranked):
        cosine, live = known["cosine"], ~np.isnan(known["cosine"]).any(1)
        tensors |= {"cosine": cosine, "rank": np.where(live[:, None], ranks(cosine), 0)}
        diagnostics |= margin(cosine[live], top) | resemblance(ranked, known)
    about = {"diagnostics": diagnostics, "valid": list(valid), "ended": ended}
    rollout.save(o.out, tensors, recipe, rollout.facts(time.perf_counter() - clock, **about))
    rollout.say(f"{o.out}: {len(ranked)} of {count} prompts by {o.selector}")
    if diagnostics:
        rollout.say("\n".join([table(diagnostics), *warnings(diagnostics)]))


def write_csv(path: Path, rows: rollout.Prompts) -> None:
    """A selection file for people: every prompt with a score, best first."""
    tensors, record = rollout.load(path, "selection")
    score, chosen = tensors["score"], tensors["ranked"]
    order = np.argsort(-score, kind="stable")[: np.count_nonzero(~np.isnan(score))]
    table: dict[str, Any] = {"place": 1 + np.arange(len(order))}
    table |= {"chosen": np.isin(order, chosen).astype(int), "prompt_index": order}
    table |= {"pass_rate": tensors["pass_rate"][order].round(3), "score": score[order].round(5)}
    for v, name in enumerate(record["facts"]["valid"] if "cosine" in tensors else ()):
        table |= {f"cosine_{name}": tensors["cosine"][order, v].round(4), f"rank_{name}": tensors["rank"][order, v]}
    table |= {column: [rows[n][column] for n in order] for column in ("prompt", "answer")}
    with rollout.new_file(path.with_suffix(".csv")) as temporary, open(temporary, "w", newline="") as file:
        csv.writer(file).writerows([list(table), *zip(*table.values(), strict=True)])


if __name__ != "select":
    Selector = Annotated[str, typer.Option(callback=known_selector)]
    CODE = rollout.CODE | {"select": rollout.code_digest(__file__)}
    app = typer.Typer(**rollout.PLAIN)
    app.command(help=__doc__.splitlines()[0])(select)

if __name__ == "__main__":
    rollout.command_line(app)
