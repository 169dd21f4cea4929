"""CROPI: the curriculum loop. Each stage trains on the prompts whose gradients align best with those of validation.

    python cropi.py run --stages 8 --frac 0.1
    python cropi.py run --stages 8 --frac 0.1 --processes 2     # docs/cluster.md

The algorithm (Data-Efficient RLVR via Off-Policy Influence Guidance, arXiv 2510.26491), in the numbers of the README:

    sample K trajectories from β = π_θ0 for every training and validation prompt              rollout.py
    for each stage:
        --refresh-every: every so many stages, sample them anew from π_θ                      rollout.py
        --retry-failed: sample training prompts that have only failures again, from π_θ       rollout.py
        ĝ, g̃   <- off-policy gradients at θ from β's trajectories, sketched             (2, 3)  project.py
        score  <- cosine with each validation set, ranks fused; choose the best frac·N  (4, 5)  select.py
                  (both in the first stage only, with --static)
        θ      <- GRPO from θ on the chosen prompts                                     (6)     train.py

The lines with -- are options, off by default: then this is the paper's method, but for the deviations that the heads of
the other scripts list.

Each step is a script that also runs alone; this one calls their functions in one process (eight stages of separate
processes would spend longer importing than learning on the toy) and prints the shell command that does the same.

One run is one folder. Every file in it is whole and says what it was made from, so the same command again makes what is
missing, and nothing else. Rollouts, evaluation, scoring and training steps can be split over many processes.

    runs/NAME/
      run.safetensors                      no tensors: the run's recipe, so that a changed option is refused at once
      rollouts/{train,valid-*}/            β's trajectories;  test-*/: the evaluation before training
      stage-01/                            of stage 1
        rollouts/{train,valid-*}/              β's trajectories, where they were refreshed or retried
        gradients-{train,valid-*}/             selection.{safetensors,csv}
        model/  optimizer/                     metrics.jsonl (a line per step)  completions.jsonl (for people)
        test-*/                                the evaluation after this stage
      curve.png  selection.png  report.json    computed from the files above
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import logging
import os
import re
import shlex
import signal
import socket
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas
import typer
from filelock import FileLock, Timeout

import project
import rollout
import train
from rollout import RANK, TOY, Array, BadInput, require, say


def _load_select():
    """The script select.py, by file path: by name it could be the standard library's `select`."""
    spec = importlib.util.spec_from_file_location("cropi_select", Path(__file__).with_name("select.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


select = _load_select()
SCRIPTS = {"rollout": rollout, "project": project, "select": select, "train": train}
# The uses of scripts whose options `--set` reaches; rollout.py has two more, on validation and on test sets.
USES = {"rollout": rollout, "valid": rollout, "test": rollout, "project": project, "select": select, "train": train}
TOY_POOL = str(TOY / "train.jsonl")
TOY_VALID = [str(TOY / f"valid-{name}.jsonl") for name in ("rev", "srt")]
TOY_TEST = [str(TOY / f"test-{name}.jsonl") for name in ("rev", "srt", "untargeted")]
# Completions per prompt of a validation and of a test set; a training prompt has rollout.py's own 8.
SAMPLES = {"valid": {"samples": 32}, "test": {"samples": 4}}
DATA = ("limit", "prompt_column", "answer_column", "skip_bad_rows")
SHARED = {  # set for `rollout`, these hold for all scripts that have them
    *("temperature", "max_tokens", "max_prompt_tokens", "system", "chat", "reward", "reward_seconds", "max_errors"),
    *("engine", "gpu_memory", "dtype", "deterministic"),
    *DATA,
}
OURS = {  # options that the loop itself gives to each script
    *("out", "model", "data", "seed", "trajectories", "gradients", "valid_gradients", "selector", "frac", "help"),
    *("selection", "previous", "initial_model", "optimizer", "stage", "retry"),
}
CODE = project.CODE | select.CODE | {"cropi": rollout.code_digest(__file__)}
app = typer.Typer(**rollout.PLAIN, help=__doc__.splitlines()[0])


# ---------------------------------------------------------------------------------------------------------------------
# The loop


@dataclass
class Run:
    """The settings of a run. θ_0 is `model`."""

    out: Path
    model: Path
    pool: str
    valid: dict[str, str]  # name -> data set
    test: dict[str, str]
    selector: str
    frac: float
    static: bool
    refresh_every: int
    retry_failed: int
    retry_every: int
    seed: int
    keep_states: int
    settings: dict[str, dict]  # options of each script, beside those that are set below

    def sets(self, kind: int) -> dict[str, tuple[str, str]]:
        """Name -> (use of rollout.py, data set), for the sets of which the selector needs this kind of files."""
        needs = select.needs(self.selector)
        pool = {"train": ("rollout", self.pool)} if needs >= kind else {}
        valid = self.valid if needs == select.VALIDATION else {}
        return pool | {f"valid-{name}": ("valid", source) for name, source in valid.items()}

    def stage(self, s: int) -> Path:
        return self.out / f"stage-{s:02d}"


def curriculum(run: Run, stages: int) -> Iterator[int]:
    """The algorithm. Yields 0 before the first stage and s after stage s. Files that are there are not made again."""
    policy, optimizer = run.model, None  # θ_0
    selection: Path | None = None
    stored = sample(run, policy, run.out / "rollouts", run.seed)  # β = π_θ0
    evaluate(run, policy, run.out / "rollouts")
    yield 0
    for s in range(1, stages + 1):
        stage, seed = run.stage(s), 1000 * run.seed + s - 1
        if s > 1 and run.refresh_every and (s - 1) % run.refresh_every == 0:
            stored = sample(run, policy, stage / "rollouts", seed)  # β = π_θ
        elif s > 1 and run.retry_failed and (s - 1) % run.retry_every == 0 and "train" in stored:
            how = run.settings["rollout"] | {"samples": run.retry_failed}
            retry, stored = stored["train"], stored | {"train": stage / "rollouts" / "train"}
            call("rollout", model=policy, data=run.pool, retry=retry, out=stored["train"], seed=seed, **how)
        if s == 1 or not run.static:
            gradients = {name: stage / f"gradients-{name}" for name in run.sets(select.GRADIENTS)}
            for name, out in gradients.items():  # ĝ and its sketch g̃ (2, 3)
                call("project", model=policy, trajectories=stored[name], out=out, seed=seed, **run.settings["project"])
            previous, selection = selection, stage / "selection.safetensors"
            call(  # cosines, ranks, fusion (4, 5)
                "select",
                data=run.pool,
                trajectories=stored.get("train"),
                gradients=gradients.get("train"),
                valid_gradients=[out for name, out in gradients.items() if name != "train"],
                previous=previous,
                out=selection,
                **{"selector": run.selector, "frac": run.frac, "stage": s, "seed": seed} | run.settings["select"],
            )
        if not len(chosen_prompts(run, s)):  # nothing is left to learn from
            return
        start = {"model": policy, "initial_model": run.model, "optimizer": optimizer}
        call("train", **start, data=run.pool, selection=selection, out=stage, seed=seed, **run.settings["train"])  # (6)
        policy, optimizer = stage / "model", stage / "optimizer"  # θ_s
        evaluate(run, policy, stage)
        if RANK == 0 and s > run.keep_states:
            train.remove(run.stage(s - run.keep_states) / optimizer.name)
        yield s


def sample(run: Run, policy: Path, folder: Path, seed: int) -> dict[str, Path]:
    """Sample K trajectories for each prompt of the sets that the selector needs: name -> folder."""
    for name, (use, source) in run.sets(select.TRAJECTORIES).items():
        call("rollout", model=policy, data=source, out=folder / name, seed=seed, **run.settings[use])
    return {name: folder / name for name in run.sets(select.TRAJECTORIES)}


def evaluate(run: Run, policy: Path, folder: Path) -> None:
    """Sample the test sets, with the same random numbers every time. Accuracy is the mean reward."""
    for name, source in run.test.items():
        out = folder / f"test-{name}"
        call("rollout", model=policy, data=source, out=out, seed=run.seed, **run.settings["test"])


def call(script: str, **options: Any) -> None:
    """Call a script's main function; if there is something to do, print the command that does the same."""
    out = options["out"] / "model" if script == "train" else options["out"]
    if not is_there(out):
        words = ["python", f"{script}.py"]
        for name, value in options.items():
            for one in value if isinstance(value, list) else [value]:
                flag = name.replace("_", "-")
                if isinstance(one, bool):
                    words += [f"--{flag}"] if one else [f"--no-{flag}"]
                elif one is not None:
                    words += [f"--{flag}", str(one)]
        say(f"$ {shlex.join(words)}")
    getattr(SCRIPTS[script], script)(**options)


def is_there(out: Path) -> bool:
    """Is a file, a model, or every shard of a folder there?"""
    shards = sorted(out.glob("[0-9]*.safetensors"))
    complete = bool(shards) and len(shards) == rollout.peek(shards[0])["recipe"]["shard"]["of"]
    return out.is_file() or (out / "cropi.json").is_file() or complete


# ---------------------------------------------------------------------------------------------------------------------
# The report: computed from the files alone


def report_stage(run: Run, s: int, steps: int) -> dict:
    """Costs and results of stage s (0: before training), which begins after `steps` steps. Seconds are the work of all
    processes, added up."""
    stage = run.stage(s) if s else run.out / "rollouts"
    tests = {name: rollout.totals(stage / f"test-{name}") for name in run.test}
    accuracy = {name: sums["rewards"] / sums["trajectories"] for name, sums in tests.items()}
    entry: dict[str, Any] = {"stage": s, "steps": steps, "accuracy": accuracy}
    samples = run.settings["test"]["samples"]
    entry["pass_at_k"] = {name: sums["solved"] * samples / sums["trajectories"] for name, sums in tests.items()}
    entry["seconds_evaluation"] = sum(sums["seconds"] for sums in tests.values())
    if (fresh := stage / "rollouts" if s else stage).is_dir():
        sums = rollout.totals(*(fresh / name for name in run.sets(select.TRAJECTORIES)))
        entry |= {"seconds_rollout": sums["seconds"], "trajectories_offline": sums["sampled"]}
    if not s:
        return entry
    trained, selection = rollout.peek(stage / "model")["facts"], stage / "selection.safetensors"
    choice: dict[str, Any] = {"seconds": 0.0, "diagnostics": {}}
    choice |= rollout.peek(selection)["facts"] if selection.exists() else {}
    scored = rollout.totals(*(stage / f"gradients-{name}" for name in run.sets(select.GRADIENTS)))
    return entry | {
        "steps": steps + len(trained["log"]),
        "chosen": len(chosen_prompts(run, s)),
        "reward": float(np.mean([line["reward"] for line in trained["log"]])),
        "answers": answers(trained["completions"]),
        "diagnostics": choice["diagnostics"],
        "trajectories_training": sum(line["trajectories"] for line in trained["log"]),
        "seconds_scoring": choice["seconds"] + scored["seconds"],
        "seconds_training": trained["seconds"] * trained["processes"],
    }


def chosen_prompts(run: Run, s: int) -> Array:
    path = run.stage(1 if run.static else s) / "selection.safetensors"
    return rollout.load(path, "selection")[0]["ranked"]


def resuming(run: Run, stages: int) -> str:
    """Say which stages are there and what comes next; empty for a new folder."""
    trained = sum((run.stage(s) / "model").is_dir() for s in range(1, stages + 1))
    folders = [run.stage(trained + 1)] if trained else [run.out / "rollouts", run.stage(1)]
    has = ", ".join(sorted(path.name for folder in folders for path in folder.glob("[!.]*")))
    if not trained and not has:
        return ""
    following = f"stage {trained + 1} (has {has or 'nothing yet'})" if trained < stages else "nothing to train"
    return f"resuming: {trained} of {stages} stages trained; next: {following}"


# ---------------------------------------------------------------------------------------------------------------------
# Lines, tables and pictures for people


def accuracies(entry: dict) -> str:
    return "accuracy " + ", ".join(f"{name} {value:.3f}" for name, value in entry["accuracy"].items())


def stage_line(entry: dict, pool: list[dict], chosen: Array, column: str, most: int = 4) -> str:
    """A stage in one line: what was chosen, what came of it, what it cost; and below it a right and a wrong answer."""
    groups = Counter(str(pool[n].get(column, "all")) for n in chosen)
    shares = ", ".join(f"{name} {count / len(chosen):.0%}" for name, count in groups.most_common(most))
    costs = ", ".join(f"{part} {entry[f'seconds_{part}']:.1f} s" for part in PARTS if f"seconds_{part}" in entry)
    more = " ..." if len(groups) > most else ""
    said = f"{len(chosen)} chosen ({shares}{more}), reward {entry['reward']:.3f}; {accuracies(entry)}; {costs}"
    return "\n    ".join([said, *entry["answers"]])


def answers(completions: list[dict], most: int = 60) -> list[str]:
    """The last right and the last wrong completion of a stage: how the prompt begins and the answer ends."""
    last = {"right" if one["reward"] >= rollout.RIGHT else "wrong": one for one in completions}
    return [f"{name}, in training: {one['prompt'][:most]!r} -> {one['text'][-most:]!r}" for name, one in last.items()]


PARTS = ("rollout", "scoring", "training")


def print_table(entries: list[dict], targeted: list[str]) -> None:
    table = pandas.DataFrame([entry | entry["accuracy"] for entry in entries]).convert_dtypes()
    table["targeted"] = table[targeted].mean(axis=1)
    columns = ["stage", "steps", "chosen", "reward", *entries[0]["accuracy"], "targeted"]
    columns += [f"seconds_{part}" for part in PARTS]
    table = table.reindex(columns=columns).astype(object).fillna("")
    say(f"\n{table.to_string(index=False, float_format='{:.3f}'.format)}")


@contextmanager
def picture(path: Path, title: str) -> Iterator[tuple]:
    """Two panels, side by side; drawn to a PNG when the block ends."""
    from matplotlib.figure import Figure  # here, since it takes a second to import and is needed at the end alone

    figure = Figure(figsize=(10, 4), layout="tight")
    yield figure.subplots(1, 2)
    figure.suptitle(title)
    with rollout.new_file(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")


def draw_curve(path: Path, entries: list[dict], targeted: list[str], title: str) -> None:
    """Accuracy against steps; targeted and untargeted test sets in panels of their own."""
    table = pandas.DataFrame([entry["accuracy"] for entry in entries], [entry["steps"] for entry in entries])
    others = [name for name in table if name not in targeted]
    with picture(path, title) as axes:
        for axis, names, panel in zip(axes, (targeted, others), ("targeted", "untargeted"), strict=True):
            for name in names:
                axis.plot(table[name], marker="o", markersize=3, linewidth=1, label=name)
            if len(names) > 1:
                axis.plot(table[names].mean(axis=1), color="black", linewidth=2, label="mean")
            axis.set(title=f"{panel} test sets", xlabel="training steps", ylabel="accuracy", ylim=(0, 1))
            axis.grid(alpha=0.3)
            if names:
                axis.legend()


def draw_selection(path: Path, pool: list[dict], chosen: list[Array], column: str, title: str) -> None:
    """The prompts that each stage chose, by a column of the data, beside the pool; and how many were chosen before."""
    groups = pandas.Series([str(row.get(column, "all")) for row in pool])
    sets = {"pool": groups} | {str(s): groups[picked] for s, picked in enumerate(chosen, 1)}
    shares = pandas.DataFrame({name: rows.value_counts(normalize=True) for name, rows in sets.items()}).T
    with picture(path, title) as (left, right):
        shares.plot.bar(stacked=True, ax=left, colormap="tab20", width=0.8, rot=0)
        left.set(title=f"chosen prompts by {column}", xlabel="stage", ylabel="share", ylim=(0, 1))
        left.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize="small", reverse=True)
        kept = [select.overlap(now, before) for before, now in itertools.pairwise(chosen)]
        ever = [len(np.unique(np.concatenate(chosen[:s]))) / len(pool) for s in range(1, len(chosen) + 1)]
        right.plot(range(2, len(chosen) + 1), kept, marker="o", label="share chosen by the stage before")
        right.plot(range(1, len(chosen) + 1), ever, marker="s", label="share of the pool ever chosen")
        right.set(title="turnover", xlabel="stage", ylim=(0, 1), xticks=range(1, len(chosen) + 1))
        right.grid(alpha=0.3)
        right.legend(fontsize="small")


# ---------------------------------------------------------------------------------------------------------------------
# The command


def parse_settings(assignments: list[str]) -> dict[str, dict[str, object]]:
    """["train.lr=1e-4"] -> {"train": {"lr": 1e-4}, ...}, converted and checked as the script's own command line would.

    Raises:
        BadInput: an unknown stage or option, one that the loop sets itself, or a value that the option refuses.
    """
    settings: dict[str, dict] = {use: dict(SAMPLES.get(use, {})) for use in USES}
    for text in assignments:
        name, has_value, value = text.partition("=")
        use, _, option = name.replace("-", "_").partition(".")
        known = f"--set {text}: not SCRIPT.OPTION=VALUE, SCRIPT of {', '.join(USES)}"
        require(has_value == "=" and use in USES, known)
        options = options_of(use)
        require(option in options, f"--set {text}: {use} has no such option (there is: {', '.join(options)})")
        try:
            settings[use][option] = options[option].process_value(typer.Context(typer.main.get_command(app)), value)
        except typer.BadParameter as error:
            raise BadInput(f"--set {text}: {error.message}") from None
    ours = {name: settings["train"][name] for name in ("loss", "mask_truncated") if name in settings["train"]}
    settings["project"] = ours | settings["project"]  # scoring uses the loss of training
    for use in USES:  # those of `rollout` hold for the others, too
        names = options_of(use).keys() if use in SAMPLES else options_of(use).keys() & SHARED
        settings[use] = {o: v for o, v in settings["rollout"].items() if o in names} | settings[use]
    return settings


def options_of(use: str) -> dict:
    """The options of a script that `--set` reaches, by name."""
    return {p.name: p for p in typer.main.get_command(USES[use].app).params if p.name not in OURS}


def set_names(texts: list[str], prefix: str) -> dict[str, str]:
    """NAME=SOURCE, or SOURCE alone: valid-rev.jsonl is called rev, openai/gsm8k:main:test gsm8k. A test set is targeted
    if a validation set has its name."""
    names: dict[str, str] = {}
    for text in map(str, texts):
        name, equals, source = text.partition("=")
        if not equals:  # of a file its stem, of openai/gsm8k:main:test gsm8k
            hub, source = Path(text).suffix not in rollout.FILES, text
            name = Path(text.partition(":")[0]).name if hub else Path(text).stem.removeprefix(prefix)
        require(name not in names, f"{text}: two sets have the same name, {name}; write OTHER_NAME={source}")
        good = re.fullmatch(r"[A-Za-z0-9_.-]+", name)
        require(bool(good), f"{text}: {name!r} is no name of letters, digits and . _ -; write NAME={source}")
        names[name] = source
    return names


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """While the block runs, no other command writes the folder. The operating system releases the lock if we die."""
    folder.mkdir(parents=True, exist_ok=True)
    writer = folder / ".writer"
    try:
        with FileLock(folder / ".lock", timeout=0):
            writer.write_text(f"process {os.getpid()} on {socket.gethostname()}")
            yield
    except Timeout:
        holder = writer.read_text() if writer.exists() else "another process"
        raise BadInput(f"{folder}: {holder} is at work here; wait for it, or choose another --out") from None


def read(settings: dict[str, dict], use: str, source: str) -> rollout.Prompts:
    """The rows of a data set, as rollout.py reads them for this use."""
    return rollout.load_prompts(source, **{name: v for name, v in settings[use].items() if name in DATA})


def run_recipe(run: Run, prompts: rollout.Prompts) -> dict:
    """Everything that the run depends on, except the number of stages and the test sets."""
    names = ("selector", "frac", "static", "refresh_every", "retry_failed", "retry_every", "seed")
    options = {name: getattr(run, name) for name in names}
    for use in [use for use in USES if use != "test"]:
        every = {name: option.default for name, option in options_of(use).items()} | run.settings[use]
        every = rollout.make_recipe("run", CODE, every)["options"]
        options |= {f"{use}.{name}": value for name, value in every.items()}
    valid = {name: read(run.settings, "valid", source).digest for name, source in run.valid.items()}
    model = rollout.model_identity(run.model)
    return rollout.make_recipe("run", CODE, options, model=model, train=prompts.digest, valid=valid)


@app.callback(invoke_without_command=True)
def main(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())


@app.command(help="Run the curriculum; the same command again resumes it where it was interrupted.")
def run(
    model: Path = TOY / "model",
    pool: Annotated[str, typer.Option("--train")] = TOY_POOL,
    valid: list[str] = TOY_VALID,
    test: list[str] = TOY_TEST,
    limit: rollout.MaybeCount = None,
    stages: rollout.Count = 8,
    frac: rollout.Share = 0.1,
    selector: Annotated[str, typer.Option(callback=select.known_selector)] = "influence",
    static: bool = False,
    refresh_every: rollout.Natural = 0,
    retry_failed: rollout.Natural = 0,
    retry_every: rollout.Count = 1,
    seed: rollout.Natural = 0,
    out: Path | None = None,
    assignments: Annotated[list[str], typer.Option("--set")] = [],
    engine: rollout.Engine = "auto",
    processes: rollout.Count = 1,
    max_restarts: rollout.Natural = 0,
    save_every: rollout.Weight = 300.0,
    keep_states: rollout.Count = 1,
    group_by: str = "family",
) -> None:
    """Options that rollout.py has as well are documented there.

    Args:
        model: Initial policy: a model folder, or a name on the Hub.
        pool: Training pool: jsonl, json, csv, parquet, or NAME[:CONFIG[:SPLIT]] on the Hub.
        valid: Validation set, [NAME=]SOURCE; repeat.
        test: Test set, [NAME=]SOURCE; targeted if a validation set has its name; repeat.
        stages: Stages of selection and training.
        frac: Share of the pool to train on.
        selector: influence, inner, grad-norm, full, random, pass-rate, learnability, hardest, or FILE.py:FUNCTION.
        static: Choose once, before the first stage.
        refresh_every: Sample the stored trajectories anew every N stages; 0: never.
        retry_failed: Before each later stage, sample prompts that have only failures again, N times each; 0: never.
        retry_every: Do that every N stages.
        out: Folder of the run.  [default: runs/SELECTOR-SEED, or runs/FILE-FUNCTION-SEED]
        assignments: SCRIPT.OPTION=VALUE, such as train.lr=1e-4; repeat.
        processes: Run in so many processes on this machine, one to a GPU; for several machines use torchrun.
        max_restarts: If a process dies, start all again, so many times.
        save_every: Save a checkpoint of training every N seconds.
        keep_states: Keep the optimizer states of the last N stages.
        group_by: Data column that selection.png shows.
    """
    if (processes > 1 or max_restarts) and "TORCHELASTIC_RUN_ID" not in os.environ:
        return launch(processes, max_restarts)
    rollout.device()
    ours = [f"rollout.engine={engine}"] if engine != "auto" else []
    ours += [f"rollout.limit={limit}"] if limit else []
    ours += [f"train.save_every={save_every:g}"] if save_every != 300 else []
    settings = parse_settings([*ours, *assignments])
    valid_sets, test_sets = set_names(valid, "valid-"), set_names(test, "test-")
    prompts = read(settings, "rollout", pool)
    for use, source in (*(("valid", s) for s in valid_sets.values()), *(("test", s) for s in test_sets.values())):
        read(settings, use, source)
    toy_sets = pool != TOY_POOL and (valid == TOY_VALID or test == TOY_TEST)
    require(not toy_sets, f"{pool} needs validation and test sets of its own: --valid FILE --test FILE")
    again = "--refresh-every and --retry-failed would sample for no selection"
    require(not (static and (refresh_every or retry_failed)), f"--static chooses once; {again}")
    file, colon, function = selector.rpartition(":")
    out = out or Path("runs") / f"{Path(file).stem}{'-' * bool(colon)}{function}-{seed}"
    ours = r"run\.safetensors|rollouts|stage-(?!00)\d+|(curve|selection)\.png|report\.(json|html)|tensorboard"
    strange = [path.name for path in out.glob("[!.]*") if not re.fullmatch(ours, path.name)]
    wrong = f"{out} holds something else than a run of this version of the scripts ({', '.join(sorted(strange)[:3])})"
    require(not strange, f"{wrong}; choose a new --out")
    this = Run(
        *(out, rollout.model_folder(model), pool, valid_sets, test_sets, selector, frac),
        *(static, refresh_every, retry_failed, retry_every, seed, keep_states, settings),
    )
    rollout.check_out(out)
    with locked(out) if RANK == 0 else nullcontext():
        if RANK == 0:
            recipe, begun = run_recipe(this, prompts), out / "run.safetensors"
            if not rollout.is_made(begun, recipe):
                rollout.save(begun, {}, recipe, rollout.facts(0.0))
        rollout.gather()
        follow(this, stages, prompts, group_by)


def launch(processes: int, max_restarts: int) -> None:
    """Run this same command in several processes, by torch's own launcher, and end like the first one that fails."""
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # else the port is in use at half of the restarts
    logging.disable(logging.ERROR)  # what went wrong is said below, once
    how: dict[str, Any] = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "monitor_interval": 0.1}
    how |= {"virtual_local_rank": True}  # each process sees its own GPU alone, as vLLM wants it
    config = LaunchConfig(1, 1, processes, run_id=str(os.getpid()), max_restarts=max_restarts, **how)
    try:
        elastic_launch(config, sys.executable)(*sys.argv)
    except SignalException as stopped:
        raise (KeyboardInterrupt if stopped.sigval == signal.SIGINT else SystemExit(128 + stopped.sigval)) from None
    except ChildFailedError as failed:
        rank, failure = failed.get_first_failure()
        require(failure.exitcode != 2, failure.message.removeprefix("error: "))
        if failure.exitcode == 130:
            raise KeyboardInterrupt from None
        ended = failure.message if failure.exitcode < 0 else f"exit code {failure.exitcode}, see above"
        sys.exit(f"process {rank} ended ({ended}); the same command resumes: {shlex.join(['python', *sys.argv])}")


def follow(run: Run, stages: int, prompts: rollout.Prompts, group_by: str) -> None:
    """Go through the curriculum, and print and draw the results."""
    targeted = [name for name in run.test if name in run.valid]
    names = ", ".join(targeted) or "none has the name of a validation set"
    say(f"{run.out}: {run.selector}, {stages} stages; targeted test sets: {names}")
    if RANK == 0 and (line := resuming(run, stages)):
        say(line)
    entries: list[dict] = []
    chosen: list[Array] = []
    s = 0
    for s in rollout.progress(curriculum(run, stages), "curriculum", "stage", total=stages + 1):
        if RANK == 0:
            entries.append(report_stage(run, s, entries[-1]["steps"] if s else 0))
            if s:
                chosen.append(chosen_prompts(run, s))
            line = stage_line(entries[-1], prompts, chosen[-1], group_by) if s else accuracies(entries[-1])
            say(f"{f'stage {s} of {stages}' if s else 'before training'}: {line}\n")
    if RANK == 0 and s < stages:
        ended = rollout.peek(run.stage(s + 1) / "selection.safetensors")["facts"]["ended"]
        say(f"{'done' if ended == select.ALL_SOLVED else 'warning'}: ended before stage {s + 1}: {ended}")
    if RANK == 0:
        title = f"{run.selector}{' chosen once' if run.static else ''}, seed {run.seed}"
        draw_curve(run.out / "curve.png", entries, targeted, title)
        draw_selection(run.out / "selection.png", prompts, chosen, group_by, title)
        report = {"selector": run.selector, "seed": run.seed, "targeted": targeted, "evaluations": entries}
        report["test_samples"] = run.settings["test"]["samples"]
        with rollout.new_file(run.out / "report.json") as temporary:
            temporary.write_text(json.dumps(report, indent=1) + "\n")
        print_table(entries, targeted)
        say(f"{run.out}: curve.png, selection.png, report.json (seconds are those of all processes, added up)")
        say("\n    ".join(["next:", *what_next(run)]))


def what_next(run: Run) -> list[str]:
    """Commands that make a page to read, and a comparison with prompts chosen at random."""
    here, other = (shlex.quote(f"{run.out}{ending}") for ending in ("", "-random"))
    options = re.sub(r" --(out|selector)[ =]('[^']*'|\S+)", "", shlex.join(sys.argv[1:]))
    commands = [f"python bench/report.py {here}", f"python cropi.py {options} --selector random --out {other}"]
    alone = run.selector == "random" or Path(sys.argv[0]).name != "cropi.py"
    return commands[:1] if alone else [*commands, f"python bench/compare.py {here} {other}"]


if __name__ == "__main__":
    rollout.command_line(app)
