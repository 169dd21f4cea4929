"""How runs of cropi.py compare: accuracy against steps, trajectories and seconds, and the acceleration over full data.

    python bench/compare.py runs/study                                # a folder of runs, as bench/ablate.py leaves it
    python bench/compare.py runs/full-* runs/influence-* --out here   # or the runs themselves, ARM-SEED each
    python bench/compare.py runs/influence-0 runs/random-0            # two runs: and who chose what
    python bench/compare.py docs/study/toy-*.json --against static    # reports that bench/ablate.py --reports has kept

Runs that differ in nothing but their seed are an *arm*. Accuracy is the mean over the targeted test sets (untargeted:
over the others). Steps, trajectories sampled (offline and in training) and seconds are what it cost: the seconds of
offline rollouts, of scoring and selection, and of training; not those of evaluation, nor of starting Python, in no arm.
Seconds are the working time of all processes, added up: compare runs that had equally many.
What a stage needs before its first step moves the clock on while the accuracy stands still. Within training, cost and
accuracy are taken to be linear between two evaluations.

    smoothed      the mean curve over the seeds, made non-decreasing (isotonic regression): a peak counts only as far as
                  what follows it keeps the average up; the last point, which nothing follows, counts as it is
    target        the best, that is the last, of the base arm's (full data's) smoothed curve
    acceleration  cost at which the base arm first reaches the target / cost at which the arm does

A curve that bends downwards lies above its chords: the coarser the evaluations of an arm, the later it seems to reach a
level. And the target moves with the length of the runs: `--stages` looks at their beginning.

Intervals are meant to be 95%: of means over seeds by Student's t; of accelerations by bootstrap, from 10,000 draws of
each arm's seeds with replacement, the arms independently (which is wide for seconds, where an hour of the machine is
slow for all arms of a seed). The plain percentile interval is too narrow for a few seeds, so its tails are those of
Student's t as well (the expanded percentile interval of Hesterberg, What Teachers Should Know About the Bootstrap,
2015): nearly the lowest and the highest of all draws. In simulations with normal noise that covers 92 to 97% with five
seeds, 75 to 91% with three; with two there is none. An arm that does not reach the target within its steps has "never",
which counts as an acceleration of 0. The test prompts are the same for all seeds: what another choice of them would
change is in no interval but the standard error of a point. "Best, smoothed" is the mean of the seeds' own.

With `--against ARM`, the table also has each arm's final accuracy less that ARM's, paired by seed: the mean over the
seeds that both have, and its interval by Student's t.

Of two arms, it also says which prompts only one of them ever chose: OUT-chosen.csv has how many times each arm did.

Prints the table and writes OUT.json (the table, and the curves seed by seed), OUT.png and OUT.md. The table stands
between the lines `<!-- NAME -->` and `<!-- /NAME -->`, NAME being that of OUT, and in a file that is there already only
what is between them is replaced.
"""

import itertools
import json
import os
import re
import shlex
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import pandas
import typer
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from scipy.optimize import isotonic_regression
from scipy.stats import norm
from scipy.stats import t as student

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import rollout  # noqa: E402
from rollout import require  # noqa: E402

DRAWS = 10_000
# axis -> what a stage pays before its first step, and what it pays while it trains
COSTS = {
    "steps": ((), "steps"),
    "trajectories": (("trajectories_offline",), "trajectories_training"),
    "seconds": (("seconds_rollout", "seconds_scoring"), "seconds_training"),
}
LABELS = {"steps": "training steps", "trajectories": "trajectories sampled", "seconds": "seconds, evaluation left out"}


# ---------------------------------------------------------------------------------------------------------------------
# The formulas


@dataclass
class Arm:
    """R runs of S stages that differ in their seed."""

    seeds: list[int]
    targeted: np.ndarray  # (R, S+1) accuracy before the first stage and after each
    untargeted: np.ndarray  # (R, S+1)
    standard_errors: np.ndarray  # (R, S+1) of the targeted accuracies; NaN where the evaluation's files are gone
    costs: dict[str, np.ndarray]  # axis -> (R, S, 2) at the first and after the last step of each stage, from the start

    def first(self, stages: int | None) -> "Arm":
        """The same runs up to a stage."""
        until = None if stages is None else stages + 1
        curves = (curve[:, :until] for curve in (self.targeted, self.untargeted, self.standard_errors))
        return Arm(self.seeds, *curves, {axis: values[:, :stages] for axis, values in self.costs.items()})


def cost(evaluations: list[dict], axis: str) -> np.ndarray:
    """(S, 2): what a run had cost when a stage's training began and when it ended.

    >>> first = {"steps": 0, "seconds_rollout": 3.0}
    >>> cost([first, {"steps": 20, "seconds_scoring": 4.0, "seconds_training": 5.0}], "seconds").tolist()
    [[7.0, 12.0]]
    """
    before, during = COSTS[axis]
    now, rows = sum(evaluations[0].get(name, 0) for name in before), []
    for last, stage in itertools.pairwise(evaluations):
        begin = now + sum(stage.get(name, 0) for name in before)
        now = begin + stage[during] - (last[during] if axis == "steps" else 0)  # steps are counted from the start
        rows.append((begin, now))
    return np.array(rows)


def smoothed(curve: np.ndarray) -> np.ndarray:
    """The non-decreasing curve (S+1,) nearest to the given one in least squares."""
    return isotonic_regression(curve).x


def cost_at(target: float, curve: np.ndarray, cost: np.ndarray) -> float:
    """Where a smoothed curve (S+1,) first reaches the target, in the cost (S, 2) of its stages; infinity if nowhere.

    >>> cost_at(0.5, np.array([0.2, 0.4, 0.6]), np.array([[3.0, 10.0], [14.0, 20.0]]))
    17.0
    """
    reached = np.flatnonzero(curve >= target - 1e-12)
    if not len(reached):
        return float("inf")
    if (stage := reached[0] - 1) < 0:
        return 0.0
    share = (target - curve[stage]) / (curve[stage + 1] - curve[stage])
    begin, end = cost[stage]
    return float(begin + share * (end - begin))


def accelerations(base: Arm, arm: Arm, picked: tuple[np.ndarray, np.ndarray]) -> dict[str, float]:
    """Axis -> acceleration, on the means over the given rows of the base arm and of the arm; NaN if the base has not
    learned anything, infinity if the arm was there from the start."""
    one, other = smoothed(base.targeted[picked[0]].mean(0)), smoothed(arm.targeted[picked[1]].mean(0))
    found = {}
    for axis in COSTS:
        spent = cost_at(one[-1], one, base.costs[axis][picked[0]].mean(0))
        needed = cost_at(one[-1], other, arm.costs[axis][picked[1]].mean(0))
        found[axis] = np.nan if not spent else spent / needed if needed else np.inf
    return found


def with_interval(base: Arm, arm: Arm) -> dict[str, list[float]]:
    """Axis -> acceleration and its interval; without one for less than three seeds, for the base arm itself, and where
    the base has not learned anything in more than 1% of the draws."""
    every = np.arange(len(base.seeds)), np.arange(len(arm.seeds))
    found = {axis: [value] for axis, value in accelerations(base, arm, every).items()}
    runs = min(map(len, every))
    if runs > 2 and base is not arm:
        random = np.random.default_rng(0)
        draws = [accelerations(base, arm, tuple(random.choice(a, len(a)) for a in every)) for _ in range(DRAWS)]
        tail = norm.cdf(-student.ppf(0.975, runs - 1) * (runs / (runs - 1)) ** 0.5)  # towards 0.025 for many runs
        for axis, values in found.items():
            drawn = [draw[axis] for draw in draws if not np.isnan(draw[axis])]
            if len(drawn) > 0.99 * DRAWS:
                values += np.quantile(drawn, [tail, 1 - tail], method="nearest").tolist()
    return found


def standard_error(rewards: list[np.ndarray]) -> float:
    """Of an accuracy, the mean over the test sets' means, from rewards (prompts, samples) of each set. What varies are
    the prompts: the samples of one are not independent.

    >>> round(standard_error([np.array([[1.0, 1.0], [0.0, 0.0]])]), 3)
    0.5
    """
    return float(sum(np.var(r.mean(1), ddof=1) / len(r) for r in rewards) ** 0.5 / len(rewards))


def mean_interval(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean over R seeds and half the width of its 95% interval, (R, .) -> (.,) twice; NaN with a single seed."""
    runs = len(values)
    spread = values.std(0, ddof=1) if runs > 1 else np.full(values.shape[1:], np.nan)
    return values.mean(0), student.ppf(0.975, max(runs - 1, 1)) * spread / runs**0.5


# ---------------------------------------------------------------------------------------------------------------------
# From folders to arms

RUN = "run.safetensors"  # cropi.py's, which holds what the run was made from
KEPT = '"cropi run"'  # the mark of a report that was kept


def find_runs(paths: list[Path]) -> list[Path]:
    """The run folders among the paths and directly below them, and reports that were kept of runs; other files (a
    study's logs) are passed over."""
    runs = []
    for path in paths:
        if path.is_file() and path.suffix == ".json" and KEPT in path.read_text():
            runs.append(path)
            continue
        files = [path / RUN] if (path / RUN).is_file() else sorted(path.glob(f"*/{RUN}"))
        require(bool(files) or path.is_file(), f"{path}: no run here (a folder with {RUN})")
        runs += [file.parent for file in files]
    require(bool(runs), f"no run among {', '.join(map(str, paths))}")
    return list(dict.fromkeys(runs))


@dataclass
class Finished:
    """A run whose report is there."""

    path: Path
    name: str  # ARM-SEED
    seed: int
    made_from: dict[str, object]  # option or input, as one would give it to cropi.py -> its value, or its digest
    tests: dict[str, dict]  # name of a test set -> recipe of its trajectories, but for the seed
    report: dict
    errors: list[float]  # standard errors of the targeted accuracies


def keep(path: Path, run: Path, name: str, options: list[str]) -> None:
    """Write all that is needed of a finished run into a small file."""
    finished = vars(read_run(run)) | {"name": name}
    del finished["path"]
    for entry in finished["report"]["evaluations"]:
        entry.pop("answers", None)
    short = json.loads(json.dumps(without_nan(finished)), parse_float=lambda number: float(f"{float(number):.6g}"))
    text = json.dumps({"kind": "cropi run", "options": options} | short)
    with rollout.new_file(path) as temporary:
        temporary.write_text(text.replace('{"stage": ', '\n{"stage": ') + "\n")


def read_kept(path: Path, options: list[str] | None = None) -> Finished:
    """A run from the file that `keep` wrote.

    Raises:
        BadInput: it was made with other options than these.
    """
    kept = json.loads(path.read_text())
    was = kept.pop("options")
    require(options in (None, was), f"{path} was made with '{shlex.join(was)}'; remove it, or choose another name")
    kept["errors"] = [np.nan if error is None else error for error in kept["errors"]]
    return Finished(path, **{name: value for name, value in kept.items() if name != "kind"})


def read_run(path: Path) -> Finished:
    """A run folder's recipe and report.

    Raises:
        BadInput: it is not finished, is of another format, or has no targeted test set.
    """
    if path.is_file():
        return read_kept(path)
    recipe = rollout.peek(path / RUN)["recipe"]
    again = "run its command, or that of its study, again"
    file = path / "report.json"
    require(file.is_file(), f"{path} is not finished (it has no report.json); {again}")
    report = json.loads(file.read_text())
    require(bool(report["targeted"]), f"{path} has no targeted test set (one with the name of a validation set)")
    made_from = {f"code of {script}.py": value for script, value in recipe["code"].items()}
    for name, value in (recipe["inputs"] | recipe["options"]).items():
        made_from[f"--{'set ' if '.' in name else ''}{name.replace('_', '-')}"] = value
    made_from["device"] = recipe["device"]
    tests = {}
    for name in report["evaluations"][0]["accuracy"]:
        folder = path / "rollouts" / f"test-{name}"
        require(folder.is_dir(), f"{folder} is gone, so what {path} was evaluated on is unknown; {again}")
        made = next(iter(rollout.shards(folder, "trajectories").values()))["recipe"]
        tests[name] = {"data": made["inputs"]["data"], "options": made["options"] | {"seed": None}}
    return Finished(path, path.name, made_from.pop("--seed"), made_from, tests, report, standard_errors(path, report))


def read_arms(paths: list[Path]) -> dict[str, Arm]:
    """Arms by name, the most accurate first; a folder's name is that of its arm and its seed.

    Raises:
        BadInput: a run is not finished, two runs of an arm have different options, or the same seed, or arms cannot
            be compared since their test sets, the evaluation or the initial model differ.
    """
    by_name: dict[str, list[Finished]] = {}
    for run in map(read_run, paths):
        by_name.setdefault(re.sub(rf"-{run.seed}$", "", run.name), []).append(run)
    first = next(iter(by_name.values()))[0]
    arms = {}
    for name, runs in by_name.items():
        for run in runs:
            one, other = run.made_from, runs[0].made_from
            changed = ", ".join(option for option in other | one if one.get(option) != other.get(option))
            require(not changed, f"{run.path} and {runs[0].path} differ in more than the seed: {changed}")
            for thing, ours, theirs in (
                ("--model", one["--model"], first.made_from["--model"]),
                ("--test", data_of(run.tests), data_of(first.tests)),
                ("--set test", options_of(run.tests), options_of(first.tests)),
                ("choice of targeted test sets", run.report["targeted"], first.report["targeted"]),
            ):
                require(ours == theirs, f"{run.path} and {first.path} cannot be compared: another {thing}")
            stages = [[e["steps"] for e in each.report["evaluations"]] for each in (run, runs[0])]
            require(stages[0] == stages[1], f"{run.path} has other stages or steps than {runs[0].path}")
        seeds = [run.seed for run in runs]
        twice = [str(run.path) for run in runs if seeds.count(run.seed) > 1]
        require(not twice, f"{', '.join(twice)}: two runs of one arm and seed; leave one out")
        reports = [run.report for run in runs]
        arms[name] = Arm(
            seeds,
            *(np.array([accuracy(report, targeted) for report in reports]) for targeted in (True, False)),
            np.array([run.errors for run in runs]),
            {axis: np.array([cost(report["evaluations"], axis) for report in reports]) for axis in COSTS},
        )
    return dict(sorted(arms.items(), key=lambda item: -item[1].targeted[:, -1].mean()))


def data_of(tests: dict[str, dict]) -> dict[str, str]:
    return {name: made["data"] for name, made in tests.items()}


def options_of(tests: dict[str, dict]) -> dict[str, dict]:
    return {name: made["options"] for name, made in tests.items()}


def accuracy(report: dict, targeted: bool) -> list[float]:
    """Mean over the targeted or the other test sets, evaluation by evaluation; NaN if there are none."""
    names = [name for name in report["evaluations"][0]["accuracy"] if (name in report["targeted"]) == targeted]
    return [sum(e["accuracy"][name] for name in names) / (len(names) or np.nan) for e in report["evaluations"]]


def standard_errors(path: Path, report: dict) -> list[float]:
    """Of the targeted accuracy, evaluation by evaluation, from the trajectories of the run's evaluations."""
    errors = []
    for stage in range(len(report["evaluations"])):
        parent = path / (f"stage-{stage:02d}" if stage else "rollouts")
        folders = [parent / f"test-{name}" for name in report["targeted"]]
        there = all(folder.is_dir() for folder in folders)
        shards = [rollout.shards(folder, "trajectories") for folder in folders if there]
        rewards = [np.concatenate([rollout.load_trajectories(path)[0].rewards for path in paths]) for paths in shards]
        errors.append(standard_error(rewards) if there else np.nan)
    return errors


# ---------------------------------------------------------------------------------------------------------------------
# What a person looks at


def difference(arm: Arm, other: Arm) -> list[float]:
    """Final targeted accuracy less that of another arm, over the seeds that both have: mean, half its interval; [] if
    there are none."""
    seeds = [seed for seed in arm.seeds if seed in other.seeds and arm is not other]
    pairs = [arm.targeted[arm.seeds.index(s), -1] - other.targeted[other.seeds.index(s), -1] for s in seeds]
    return [float(value) for value in mean_interval(np.array(pairs))] if seeds else []


def table(arms: dict[str, Arm], base: str, against: Sequence[str] = ()) -> list[dict]:
    rows = []
    for name, arm in arms.items():
        best = np.array([smoothed(curve)[-1] for curve in arm.targeted])
        measured = {"final": arm.targeted[:, -1], "best": best, "untargeted": arm.untargeted[:, -1]}
        measured |= {axis: values[:, -1, 1] for axis, values in arm.costs.items()}
        row = {"arm": name, "seeds": len(arm.seeds)} | {key: mean_interval(values) for key, values in measured.items()}
        row["acceleration"] = with_interval(arms[base], arm) if base in arms else {}
        rows.append(row | {"against": {other: difference(arm, arms[other]) for other in against}})
    return without_nan(rows)


def without_nan(value: object) -> object:
    """NaN and infinity, which JSON lacks, as None; arrays as lists."""
    if isinstance(value, dict):
        return {key: without_nan(one) for key, one in value.items()}
    if isinstance(value, (np.ndarray, np.floating)):
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return [without_nan(one) for one in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


def as_markdown(rows: list[dict], base: str) -> str:
    def times(values: list[float | None]) -> str:
        texts = ["–" if value is None else "never" if value == 0 else f"{value:.2f}" for value in values]
        return texts[0] + (f" [{texts[1]}, {texts[2]}]" if len(set(texts)) > 1 else "") if texts else ""

    def mean(values: list[float | None], digits: int = 3) -> str:
        return " ± ".join(f"{value:,.{digits}f}" for value in values if value is not None)

    head = ["arm", "seeds", "final accuracy", "best, smoothed", "untargeted, final"]
    head += [f"final, less {other}" for other in rows[0]["against"]]
    head += [f"acceleration over {base} in steps", "in trajectories", "in seconds"]
    lines = [[*head, "steps", "trajectories", "seconds"], ["---"] * (len(head) + 3)]
    for row in rows:
        measured = [mean(row[key]) for key in ("final", "best", "untargeted")]
        measured += [mean([*values, None]) for values in row["against"].values()]
        faster = [times(row["acceleration"].get(axis, [])) for axis in COSTS]
        spent = [mean(row["steps"][:1], 0), mean(row["trajectories"], 0), mean(row["seconds"], 1)]
        lines.append([row["arm"], str(row["seeds"]), *measured, *faster, *spent])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def draw(arms: dict[str, Arm], base: str) -> Figure:
    figure = Figure(figsize=(14, 7), layout="constrained")
    colors = colormaps["tab10" if len(arms) <= 10 else "tab20"]
    axes = figure.subplots(2, 3, sharex="col", sharey="row")
    for panels, kind in zip(axes, ("targeted", "untargeted"), strict=True):
        for panel, axis in zip(panels, COSTS, strict=True):
            for color, (name, arm) in enumerate(arms.items()):
                mean, half = mean_interval(getattr(arm, kind))
                spent = np.concatenate([[0], arm.costs[axis].mean(0).flatten()])  # 0, begin, end, begin, end ...
                mean, half = mean[np.arange(len(spent)) // 2], half[np.arange(len(spent)) // 2]
                panel.plot(spent, mean, color=colors(color), label=name, linewidth=2.5 if name == base else 1.5)
                panel.fill_between(spent, mean - half, mean + half, color=colors(color), alpha=0.15, linewidth=0)
            if kind == "targeted" and base in arms:
                best = smoothed(arms[base].targeted.mean(0))[-1]
                panel.axhline(best, color="grey", linestyle=":", linewidth=1, label=f"best of {base}")
            panel.grid(alpha=0.3)
        panels[0].set_ylabel(f"accuracy, {kind} test sets")
    for panel, axis in zip(axes[-1], COSTS, strict=True):
        panel.set_xlabel(LABELS[axis])
        panel.xaxis.set_major_formatter(EngFormatter(sep=""))  # 200k
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right upper", fontsize="small")
    seeds = sorted({len(arm.seeds) for arm in arms.values()})
    figure.suptitle(f"mean and 95% interval over seeds (seeds of an arm: {' or '.join(map(str, seeds))})")
    return figure


def chosen_by(runs: list[Path], names: list[str]) -> pandas.DataFrame:
    """How many times each of two arms chose a prompt, over stages and seeds, most unequal first: columns prompt_index,
    prompt, answer, and the arms' names."""
    tables = [
        pandas.read_csv(path, dtype={"prompt": str, "answer": str})
        for run in runs
        for path in sorted(run.glob("stage-*/selection.csv"))
    ]
    arms = [name for run, name in zip(runs, names, strict=True) for _ in run.glob("stage-*/selection.csv")]
    picked = pandas.concat([table[table.chosen == 1].assign(arm=arm) for table, arm in zip(tables, arms, strict=True)])
    key = ["prompt_index", "prompt", "answer"]
    counts = (
        picked.groupby([*key, "arm"])
        .size()
        .unstack(fill_value=0)
        .reindex(columns=list(dict.fromkeys(names)), fill_value=0)
    )
    first, second = counts.columns
    order = (counts[first] - counts[second]).sort_values(ascending=False, kind="stable").index
    return counts.loc[order].reset_index()


def in_words(counts: pandas.DataFrame, most: int = 5) -> str:
    """What only one of the two arms chose, and what it chose most often."""
    first, second = counts.columns[-2:]
    lines = [f"prompts chosen by both: {int(((counts[first] > 0) & (counts[second] > 0)).sum())}"]
    for ours, theirs in ((first, second), (second, first)):
        alone = counts[counts[theirs] == 0].sort_values(ours, ascending=False, kind="stable")
        some = ", ".join(f"{row.prompt!r:.60} ({row[ours]} times)" for _, row in alone.head(most).iterrows())
        lines.append(f"only by {ours}: {len(alone)}" + (f", such as {some}" if some else ""))
    return "\n".join(lines)


def place_for(path: Path, name: str) -> tuple[str, str]:
    """What stands before and after the table in the file, the marks included."""
    begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->\n"
    before, _, rest = (path.read_text() if path.is_file() else begin + end).partition(begin)
    _, found, after = rest.partition(end)
    require(bool(found), f"{path} is there and has no place for the table: the lines {begin.strip()} and {end.strip()}")
    return before + begin, end + after


app = typer.Typer(**rollout.PLAIN)


@app.command(help=__doc__.splitlines()[0])
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs, or a folder that holds them.")],
    base: Annotated[
        str | None,
        typer.Option(help="Arm whose best is to be reached.  [default: full; of two arms without it, the last]"),
    ] = None,
    against: Annotated[list[str], typer.Option(help="Arm to take differences with, paired by seed; repeat.")] = [],
    stages: Annotated[int | None, typer.Option(min=1, help="Only the first so many of each run.")] = None,
    out: Annotated[Path | None, typer.Option(help="Name without ending.  [default: RUN/comparison]")] = None,
    markdown: Annotated[Path | None, typer.Option(help="The table's file.  [default: OUT.md]")] = None,
) -> list[dict]:
    found = find_runs(runs)
    arms = {name: arm.first(stages) for name, arm in read_arms(found).items()}
    for option, name in (("base", base), *(("against", name) for name in against)):
        require(name is None or name in arms, f"--{option} {name}: no such arm; there is {', '.join(arms)}")
    stems = [run.name.removesuffix(".json") for run in found]  # of a report, WORLD-ARM-SEED
    names = [max((name for name in arms if f"-{name}-" in f"-{stem}"), key=len) for stem in stems]
    base = base or (names[-1] if len(arms) == 2 and "full" not in arms else "full")
    if out is None:
        out = Path(runs[0] if len(runs) == 1 else os.path.commonpath([run.absolute() for run in runs])) / "comparison"
    files = [out.with_name(out.name + ending) for ending in (".json", ".png")] + [markdown or Path(f"{out}.md")]
    for file in files:
        require(not file.is_dir(), f"{file} is a folder; choose another --out")
        rollout.check_out(file.parent)
    before, after = place_for(files[2], out.name)
    rows = table(arms, base, against)
    text = as_markdown(rows, base)
    print(text)
    if base not in arms:
        print(f"no arm is called {base}, so there is no acceleration; --base takes one of {', '.join(arms)}")
    else:
        mean = arms[base].targeted.mean(0)
        print(f"target: {smoothed(mean)[-1]:.4f}, the best of {base}'s smoothed mean curve")
        if smoothed(mean)[-1] - mean[0] < 2 * np.nan_to_num(arms[base].standard_errors).max():
            print(f"warning: {base} has hardly learned (it began at {mean[0]:.4f}); its best is noise, as a target too")
    errors = np.concatenate([arm.standard_errors.flatten() for arm in arms.values()])
    if np.isfinite(errors).any():
        print(f"standard error of a point: median {np.nanmedian(errors):.4f}, largest {np.nanmax(errors):.4f}")
    curves = {name: vars(arm) for name, arm in arms.items()}
    with rollout.new_file(files[0]) as temporary:
        result = {"base": base, "table": rows, "curves": without_nan(curves)}
        temporary.write_text(json.dumps(result, indent=1) + "\n")
    with rollout.new_file(files[1]) as temporary:
        draw(arms, base).savefig(temporary, dpi=110, format="png")
    with rollout.new_file(files[2]) as temporary:
        temporary.write_text(before + text + after)
    if len(arms) == 2 and all(run.is_dir() for run in found):
        counts = chosen_by(found, names)
        files.append(out.with_name(f"{out.name}-chosen.csv"))
        with rollout.new_file(files[-1]) as temporary:
            counts.to_csv(temporary, index=False)
        print(in_words(counts))
    print(", ".join(map(str, files)))
    return rows


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `compare.py ... | head` ends quietly
    rollout.command_line(app)
