"""Select: rank the prompts by influence on the validation sets, and choose the top share.

    python select.py --data toy/train.jsonl --trajectories runs/mine/rollouts/train.safetensors \\
                     --gradients runs/mine/stage-00/gradients-train.safetensors \\
                     --valid-gradients runs/mine/stage-00/gradients-valid-rev.safetensors \\
                     --valid-gradients runs/mine/stage-00/gradients-valid-srt.safetensors \\
                     --out runs/mine/stage-00/selection.safetensors

Reads   the sketches that `project.py` wrote for the training prompts and for V validation sets.
Writes  N chosen prompts, best first, and beside it the same for people, a CSV with a line per candidate:

    ranked       int64   (N,)   rows of the data file
    score        float64 (N,)   their fused score
    score_by_set float64 (N,V)  their cosine with each validation set
    rank_by_set  int64   (N,V)  their rank among the live prompts, 1 is best

The metadata and a printed line hold `diagnostics`: how stale the trajectories are, how far two halves of the data agree
on the ranking, and what else it resembles; with a warning where it should not be trusted.

A step of size η along the gradient of x changes the validation objective by η⟨∇J_V, ∇J_x⟩ (1). In its place stand

    s_V(x)   = cos( g̃(x), mean of g̃(v) over the live prompts v of V )                                         (4)
    score(x) = Σ_V 1/rank_V(x)  over the sets in whose top N it stands,  N = frac·|D|                         (5)

N counts the whole pool, is rounded, and at least 1. (Dead validation prompts would only scale the mean.) Only live
prompts can be chosen, so fewer than N are where fewer are live. Equal fused scores are ordered by mean cosine, then by
index.

The baselines choose from the whole pool, equals in random order: `full` (everything), `random`, and by the pass rate p
of the stored trajectories `pass-rate` (p nearest to 1/2) and `learnability` (largest p(1-p)). As p(1-p) is
1/4 - (p - 1/2)², the last two are one order here, where both use the same p; the field knows both names.
"""

from __future__ import annotations  # no annotation below is evaluated when this file is asked for as `select`

if __name__ == "select":
    # The standard library's `select` was asked for (by subprocess, asyncio, pytest ...), and this folder, standing
    # first on sys.path, answered. Find the real one on a path without this folder, put it where the import looks.
    import importlib.machinery
    import importlib.util
    import os
    import sys

    _here = os.path.dirname(os.path.abspath(__file__))
    _path = [entry for entry in sys.path if os.path.abspath(entry or os.curdir) != _here]
    _spec = importlib.machinery.PathFinder.find_spec("select", _path)
    _module = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(_module)
    sys.modules["select"] = _module
else:
    import csv
    from collections.abc import Iterator
    from pathlib import Path
    from typing import Annotated, Literal

    import numpy as np
    import typer
    from tqdm import tqdm

    from rollout import (
        Data,
        Limit,
        above_zero,
        check_out,
        command_line,
        digest,
        load_prompts,
        new_app,
        open_tensors,
        open_trajectories,
        require,
        save_tensors,
        whole_file,
    )

METHODS = ("influence", "full", "random", "pass-rate", "learnability")
# Where to warn. On the bundled world (bench/drift.py; K = 8, answers of up to 8 tokens) the first is crossed after some
# 80 steps. From there on the selection shares 0.34, later 0.27 of its prompts with one from many fresh trajectories,
# where 8 fresh ones a prompt would share 0.52, later 0.43.
STALE = 0.65  # effective sample size of trajectories
NOISY = 0.2  # split-half overlap of the top 10%: twice chance; a convention, no run of the bundled world came near it
ROWS = 1024  # sketches in memory at a time


# ---------------------------------------------------------------------------------------------------------------------
# The formulas


def blocks(sketch: np.ndarray) -> Iterator[np.ndarray]:
    """Some rows (n, k) at a time of sketches (N, k) that may be larger than memory, in float64."""
    for start in range(0, len(sketch), ROWS):
        yield np.array(sketch[start : start + ROWS], np.float64)


def mean_sketch(sketch: np.ndarray) -> np.ndarray:
    """Mean of g̃ over the rows, in equation 4: (N, k) -> (k,)."""
    return sum(block.sum(0) for block in blocks(sketch)) / len(sketch)


def cosines(sketch: np.ndarray, directions: np.ndarray) -> np.ndarray:
    """Equation 4: cosine of every sketch (N, k) with V directions (V, k): (N, V). With a zero vector it is 0."""
    directions = directions / np.maximum(np.linalg.norm(directions, axis=1, keepdims=True), 1e-30)
    scores = []
    for block in blocks(sketch):
        norms = np.maximum(np.linalg.norm(block, axis=1, keepdims=True), 1e-30)
        scores.append(block @ directions.T / norms)  # (n, k) x (k, V) -> (n, V)
    return np.concatenate(scores)


def ranks(scores: np.ndarray) -> np.ndarray:
    """Rank of each row within each column, 1 for the largest, equals in row order: (N, V) -> (N, V) int64.

    >>> ranks(np.array([[0.1, 0.9], [0.5, 0.2]])).tolist()
    [[2, 1], [1, 2]]
    """
    return np.argsort(np.argsort(-scores, axis=0, kind="stable"), axis=0, kind="stable") + 1


def reciprocal_rank_fusion(rank_by_set: np.ndarray, top: int) -> np.ndarray:
    """Equation 5: Σ 1/rank over the sets where the rank is at most `top`: (N, V) -> (N,).

    >>> reciprocal_rank_fusion(np.array([[2, 1], [1, 3], [3, 2]]), top=2).tolist()  # 1/2 + 1/1, 1/1, 1/2
    [1.5, 1.0, 0.5]
    """
    return np.where(rank_by_set <= top, 1.0 / rank_by_set, 0.0).sum(1)


# ---------------------------------------------------------------------------------------------------------------------
# Diagnostics: is the ranking more than noise, and what else does it resemble?


def overlap(one: np.ndarray, other: np.ndarray) -> float:
    """Share of the first array's elements that are in the second.

    >>> overlap(np.array([3, 1, 4, 5]), np.array([5, 9, 2, 4]))
    0.5
    """
    return float(np.isin(one, other).mean())


def top_overlap(one: np.ndarray, other: np.ndarray, share: float = 0.1) -> float:
    """Overlap of the best `share` of N prompts in two tables of scores (N, V), mean over the V sets."""
    top = max(1, round(share * len(one)))
    best = [np.argsort(-scores, axis=0, kind="stable")[:top] for scores in (one, other)]
    return float(np.mean([overlap(a, b) for a, b in zip(best[0].T, best[1].T, strict=True)]))


def split_half(train: dict[str, np.ndarray], directions: np.ndarray) -> dict[str, float]:
    """Agreement of two rankings from separate halves of the data: of the trajectories of some H training prompts, and
    of the prompts of each validation set, whose mean sketches are `directions` (V, 2, k).

    `noise` is the standard deviation of a cosine over draws of that data. With the halves written as g ± e and d ± f,
    the difference of their inner products is 2(⟨e,d⟩ + ⟨g,f⟩): twice what ⟨g,d⟩ varies by.
    """
    if len(train.get("half_sketch", ())) < 20 or not directions.any((1, 2)).all():
        return {}
    row = {i: row for row, i in enumerate(train["prompt_index"].tolist())}
    whole = train["sketch"][[row[i] for i in train["half_index"].tolist()]].astype(np.float64)  # (H, k)
    one = train["half_sketch"].astype(np.float64)
    products = np.stack([one @ directions[:, 0].T, (2 * whole - one) @ directions[:, 1].T])  # (2, H, V)
    norms = np.linalg.norm(whole, axis=1)[:, None] * np.linalg.norm(directions.mean(1), axis=1)  # (H, V)
    noise = float(((products[0] - products[1]) / np.maximum(norms, 1e-30)).std(0).mean() / 2)
    scores = cosines(one, directions[:, 0]), cosines(2 * whole - one, directions[:, 1])
    return {"split_half": top_overlap(*scores), "noise": noise}


def margin(score_by_set: np.ndarray, top: int) -> dict[str, float]:
    """By how much the cosine (N, V) of rank `top` exceeds the next one, mean over the sets."""
    if len(score_by_set) <= top:
        return {}  # all are chosen
    ordered = -np.sort(-score_by_set, axis=0)
    return {"margin": float((ordered[top - 1] - ordered[top]).mean())}


def sentence(diagnostics: dict[str, float], chance: float) -> str:
    """The diagnostics as one line; `chance` is the overlap of a random choice from the live prompts."""
    parts = {
        "live_prompts": "{} live prompts",
        "token_kl": "KL(β‖π) {:.3f} a token",
        "valid_token_kl": "{:.3f} in validation",
        "mean_change": "log-probs moved by {:.2f}",
        "largest_change": "at most {:.1f}",
        "ess_token": "effective sample size {:.2f} of tokens",
        "valid_ess_token": "{:.2f} in validation",
        "ess_trajectory": "{:.2f} of trajectories",
        "valid_ess_trajectory": "{:.2f} in validation",
        "split_half": "split-half top 10% {:.2f} (chance 0.10)",
        "margin": "margin at the cut {:.4f}",
        "noise": "noise {:.3f}",
        "overlap_previous": "overlap with the stage before {:.2f}",
        "overlap_learnability": f"with the p(1-p) pick {{:.2f}} (chance {chance:.2f})",
        "length_correlation": "correlation with answer length {:+.2f}",
    }
    return ", ".join(text.format(diagnostics[name]) for name, text in parts.items() if name in diagnostics)


def warnings(diagnostics: dict[str, float]) -> list[str]:
    """In plain words, where the ranking is not to be trusted."""
    found = []
    if diagnostics.get("ess_trajectory", 1.0) < STALE:
        found.append(
            f"warning: the policy has moved away from the stored trajectories (effective sample size of trajectories "
            f"below {STALE}); sample them anew, as cropi.py run --refresh-every does"
        )
    if diagnostics.get("split_half", 1.0) < NOISY:
        found.append(
            f"warning: rankings from two halves of the data share less than {NOISY:.0%} of their top 10%, so the "
            "ranking is mostly noise; sample more completions per prompt, or take more validation prompts"
        )
    return found


# ---------------------------------------------------------------------------------------------------------------------
# The methods


def by_influence(
    gradients: Path, valid_gradients: list[Path], sources: dict, top: int
) -> tuple[dict[str, np.ndarray], dict]:
    """All candidates, best first, with the tensors of a selection file; the metadata of the training gradients.

    To the diagnostics of `project.py` in the metadata come those of the scores.
    """
    train, metadata = open_tensors(gradients, "gradients")
    same = metadata["trajectories"] == sources["trajectories"]
    require(same, f"{gradients} was made from other trajectories than those given; run project.py again")
    directions, halves, stale = [], [], {}
    for path in valid_gradients:
        valid, found = open_tensors(path, "gradients")
        for key, thing in (("model", "model"), ("options", "projection")):
            same = found[key] == metadata[key]
            require(same, f"{path} was made with another {thing} than {gradients}; run project.py again for both")
        directions.append(mean_sketch(valid["sketch"]))
        split = len(valid["sketch"]) > 1  # else no halves, which zeros stand for
        halves.append([mean_sketch(valid["sketch"][start::2]) if split else 0 * directions[-1] for start in (0, 1)])
        for name, worst in (("token_kl", max), ("ess_token", min), ("ess_trajectory", min)):
            value = found["diagnostics"][name]
            stale[f"valid_{name}"] = worst(value, stale.get(f"valid_{name}", value))
    prompt_index = train["prompt_index"].astype(np.int64)
    by_index = np.argsort(prompt_index)  # file order is a matter of batching; the last tie-break is the index
    score_by_set = cosines(train["sketch"], np.stack(directions))[by_index]
    rank_by_set = ranks(score_by_set)
    score = reciprocal_rank_fusion(rank_by_set, top)
    order = np.lexsort((-score_by_set.mean(1), -score))  # by score, then by mean cosine
    metadata["diagnostics"] |= stale | margin(score_by_set, top) | split_half(train, np.array(halves))
    return {
        "ranked": prompt_index[by_index][order],
        "score": score[order],
        "score_by_set": score_by_set[order],
        "rank_by_set": rank_by_set[order],
    }, metadata


def by_baseline(method: str, pass_rate: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """The whole pool, best first; `pass_rate` is (|D|,)."""
    random = np.random.default_rng(seed).random(len(pass_rate))
    score = {
        "full": np.zeros_like(pass_rate),
        "random": random,
        "pass-rate": -np.abs(pass_rate - 0.5),
        "learnability": pass_rate * (1 - pass_rate),
    }[method].round(6)  # so that 1/3 and 2/3 are equals
    ranked = np.lexsort((random, -score))
    return {"ranked": ranked, "score": score[ranked]}


# ---------------------------------------------------------------------------------------------------------------------
# The command


def select(
    out: Annotated[Path, typer.Option(help="Selection file to write; the CSV goes beside it.")],
    data: Data,
    trajectories: Annotated[Path | None, typer.Option(help="The pool's trajectories (not for full, random).")] = None,
    gradients: Annotated[Path | None, typer.Option(help="The pool's gradients (influence only).")] = None,
    valid_gradients: Annotated[list[Path] | None, typer.Option(help="The same of a validation set; repeat.")] = None,
    method: Annotated[Literal[METHODS], typer.Option(help="How to choose.")] = "influence",
    frac: Annotated[float, typer.Option(callback=above_zero, max=1, help="Share of the pool to choose.")] = 0.1,
    limit: Limit = None,
    previous: Annotated[Path | None, typer.Option(help="Selection of the stage before, to compare with.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the baselines' random order.")] = 0,
) -> np.ndarray:
    require(out.suffix != ".csv", f"--out {out}: name the safetensors file; the CSV goes beside it")
    for written in (out, out.with_suffix(".csv")):
        check_out(written, Path(data), trajectories, gradients, previous, *(valid_gradients or []))
    rows = load_prompts(data, limit)
    sources = {"data": rows.digest}
    rates = dict.fromkeys(range(len(rows)), float("nan"))  # unknown
    if method not in ("full", "random"):
        require(trajectories is not None, f"{method} needs --trajectories, what rollout.py wrote for {data}")
        stored = open_trajectories(trajectories)
        require(stored.metadata["data"] == sources["data"], f"{trajectories} was sampled from other data than {data}")
        sources["trajectories"] = digest(trajectories)
        rates = stored.pass_rates()
    if previous:
        before, found = open_tensors(previous, "selection")
        require(found["data"] == sources["data"], f"{previous} was made from other data than {data}")
    top = len(rows) if method == "full" else max(1, round(frac * len(rows)))
    names: list[str] = []
    diagnostics: dict[str, float] = {}
    pass_rate = np.array([rates[i] for i in range(len(rows))])
    if method == "influence":
        require(bool(gradients and valid_gradients), "influence needs --gradients and at least one --valid-gradients")
        table, metadata = by_influence(gradients, valid_gradients, sources, top)
        sources["model"], diagnostics = metadata["model"], metadata["diagnostics"]
        names = [path.stem.removeprefix("gradients-").removeprefix("valid-") for path in valid_gradients]
    else:
        table = by_baseline(method, pass_rate, seed)
    with whole_file(out.with_suffix(".csv")) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.writer(file)
        by_set = [f"{column}_{name}" for name in names for column in ("cosine", "rank")]
        writer.writerow(["place", "chosen", "prompt_index", "pass_rate", "score", *by_set, "prompt", "answer"])
        for place, i in enumerate(table["ranked"].tolist()):
            sets = [
                value
                for v in range(len(names))
                for value in (f"{table['score_by_set'][place, v]:.4f}", table["rank_by_set"][place, v])
            ]
            score = f"{table['score'][place]:.5f}"
            texts = rows[i]["prompt"], rows[i]["answer"]
            writer.writerow([place + 1, int(place < top), i, f"{rates[i]:.3f}", score, *sets, *texts])
    chosen = {name: np.ascontiguousarray(values[:top]) for name, values in table.items()}
    if previous:
        diagnostics["overlap_previous"] = overlap(chosen["ranked"], before["ranked"])
    if method == "influence":
        learnable = by_baseline("learnability", pass_rate, seed)["ranked"][: len(chosen["ranked"])]
        diagnostics["overlap_learnability"] = overlap(chosen["ranked"], learnable)
        groups = stored.groups()
        length = np.array([stored.completion_length[groups[i]].mean() for i in table["ranked"].tolist()])
        cosine = table["score_by_set"].mean(1)
        if np.ptp(length) > 0 and np.ptp(cosine) > 0:
            diagnostics["length_correlation"] = float(np.corrcoef(cosine, length)[0, 1])
    options = {"method": method, "frac": frac, "seed": seed, "sets": names}
    metadata = sources | {"prompts": len(rows), "options": options, "diagnostics": diagnostics}
    save_tensors(out, "selection", chosen, metadata)
    tqdm.write(f"{out}: {len(chosen['ranked'])} of {len(rows)} prompts by {method}")
    if diagnostics:
        chance = len(chosen["ranked"]) / len(table["ranked"])
        tqdm.write("\n".join([sentence(diagnostics, chance), *warnings(diagnostics)]))
    return chosen["ranked"]


if __name__ != "select":
    app = new_app()
    app.command(help=__doc__.splitlines()[0])(select)

if __name__ == "__main__":
    command_line(app)
