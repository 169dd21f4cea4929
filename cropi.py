"""CROPI: the curriculum loop. Stage after stage, train on the prompts whose gradients point where validation points.

    python cropi.py run --stages 8 --frac 0.1

The algorithm (Data-Efficient RLVR via Off-Policy Influence Guidance, arXiv 2510.26491), in the numbers of the README:

    sample K trajectories from β = π_θ0 for every training and validation prompt       rollout.py
    for stage s = 0 .. S-1:
        ĝ, g̃   <- off-policy gradients at θ_s from β's trajectories, sketched     (2, 3)  project.py
        score  <- cosine with each validation set, ranks fused; the top N = frac·|D|  (4, 5)  select.py
        θ_s+1  <- GRPO from θ_s on the chosen prompts                                 (6)     train.py

Each step is a script that also runs alone; this one calls their functions in one process (eight stages of separate
processes would spend longer importing than learning on the toy) and prints the shell command that does the same.

One run is one folder. A block of work is whole when its `summary.json` stands; running the same command again goes on
after the last whole one.

    runs/NAME/
      run.json                           settings, digests of model and data, versions
      rollouts/{train,valid-*}.safetensors   β's trajectories;  test-*.safetensors: the evaluation before training
      stage-00/
        gradients-{train,valid-*}.safetensors   selection.{safetensors,csv}
        model/  optimizer.safetensors           metrics.jsonl (a line per step and per evaluation)
        test-*.safetensors                      the evaluation after this stage
      curve.png  selection.png  report.json
"""

import importlib.metadata
import importlib.util
import json
import platform
import shlex
import time
import typing
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

import project
import rollout
import train
from rollout import TOY, BadInput, command_line, digest, load_prompts, new_app, open_tensors, require, whole_file


def _load_select():
    """The script select.py, by file path: by name it could be the standard library's `select` (see its head)."""
    spec = importlib.util.spec_from_file_location("cropi_select", Path(__file__).with_name("select.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


select = _load_select()
SCRIPTS = {
    "rollout": rollout.rollout,
    "project": project.project,
    "select": select.select,
    "train": train.train,
}
# Whose options `--set` reaches: the four scripts, and rollout.py as used on validation and on test sets.
STAGES = {**SCRIPTS, "valid": rollout.rollout, "test": rollout.rollout}
SAMPLES = {"valid": {"samples": 32}, "test": {"samples": 4}}  # completions per prompt; training prompts: rollout's own 8
SHARED = ("temperature", "max_tokens", "reward")  # set for `rollout`, these hold for valid, test and train as well
OURS = {  # options that the loop itself gives to each script
    *("out", "model", "data", "seed", "trajectories", "gradients", "valid_gradients", "method", "frac"),
    *("selection", "initial_model", "optimizer"),
}


# ---------------------------------------------------------------------------------------------------------------------
# Options and commands


def parse_settings(assignments: list[str]) -> dict[str, dict[str, object]]:
    """["train.lr=1e-4"] -> {"train": {"lr": 1e-4}, ...}, converted to the option's type.

    Raises:
        BadInput: an unknown stage or option, one that the loop sets itself, or a value of another type.
    """
    settings: dict[str, dict] = {stage: dict(SAMPLES.get(stage, {})) for stage in STAGES}
    for text in assignments:
        name, has_value, value = text.partition("=")
        stage, _, option = name.partition(".")
        option = option.replace("-", "_")
        require(bool(has_value) and stage in STAGES, f"--set {text}: not STAGE.OPTION=VALUE, STAGE in {', '.join(STAGES)}")
        types = {k: v for k, v in typing.get_type_hints(STAGES[stage]).items() if k not in OURS and k != "return"}
        require(option in types, f"--set {text}: {stage} has no such option to set (there is: {', '.join(types)})")
        try:
            settings[stage][option] = types[option](value)
        except ValueError:
            raise BadInput(f"--set {text}: {value!r} is not of type {types[option].__name__}") from None
    for stage in ("valid", "test"):
        settings[stage] = settings["rollout"] | settings[stage]
    shared = {option: value for option, value in settings["rollout"].items() if option in SHARED}
    settings["train"] = shared | settings["train"]
    return settings


def shell_command(script: str, options: dict) -> str:
    words = ["python", f"{script}.py"]
    for name, value in options.items():
        for one in value if isinstance(value, list) else [value]:
            words += [] if one is None else [f"--{name.replace('_', '-')}", str(one)]
    return shlex.join(words)


def call(script: str, **options):
    """Run a stage as a function, and print the command that does the same."""
    print(f"$ {shell_command(script, options)}", flush=True)
    return SCRIPTS[script](**options)


def write_json(path: Path, content: object) -> None:
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")


def set_names(paths: list[Path], prefix: str) -> dict[str, Path]:
    """valid-rev.jsonl -> rev: a test set is targeted if a validation set has its name."""
    names = {path.stem.removeprefix(prefix): path for path in paths}
    require(len(names) == len(paths), f"two of {', '.join(map(str, paths))} have the same name; rename one")
    return names


# ---------------------------------------------------------------------------------------------------------------------
# The loop

app = new_app(help=__doc__.splitlines()[0])


@app.callback()
def main() -> None:
    """So that `run` is a subcommand though it is the only one."""


@app.command(help="Run the curriculum; run the same command again to go on after the last whole stage.")
def run(
    model: Annotated[Path, typer.Option(help="Model folder of the initial policy.")] = TOY / "model",
    train: Annotated[Path, typer.Option(help="jsonl file of the training pool.")] = TOY / "train.jsonl",
    valid: Annotated[list[Path], typer.Option(help="Validation set, valid-NAME.jsonl; repeat for several.")] = [  # noqa: B006
        TOY / "valid-rev.jsonl",
        TOY / "valid-srt.jsonl",
    ],
    test: Annotated[
        list[Path], typer.Option(help="Test set, test-NAME.jsonl; targeted if a validation set has its NAME; repeat.")
    ] = [TOY / "test-rev.jsonl", TOY / "test-srt.jsonl", TOY / "test-untargeted.jsonl"],  # noqa: B006
    stages: Annotated[int, typer.Option(help="Stages of selection and training.")] = 8,
    frac: Annotated[float, typer.Option(help="Share of the pool that a stage trains on.")] = 0.1,
    selector: Annotated[str, typer.Option(help="One of: " + ", ".join(select.METHODS) + ".")] = "influence",
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder of the run.  [default: runs/SELECTOR-SEED]")] = None,
    set_: Annotated[
        list[str], typer.Option("--set", help="STAGE.OPTION=VALUE, such as train.lr=1e-4; repeat.", show_default=False)
    ] = [],  # noqa: B006
    group_by: Annotated[str, typer.Option(help="Data column by which selection.png sorts the chosen prompts.")] = "family",
) -> dict:
    started = time.perf_counter()
    settings = parse_settings(set_)
    require(stages >= 1, f"--stages {stages}: at least 1 is needed")
    require(0 < frac <= 1, f"--frac {frac}: it must be above 0 and at most 1")
    require(selector in select.METHODS, f"--selector {selector}: unknown (there is: {', '.join(select.METHODS)})")
    require(bool(valid) or selector != "influence", "influence needs at least one validation set, --valid FILE")
    require(bool(test), "at least one test set is needed, --test FILE")
    valid_sets, test_sets = set_names(valid, "valid-"), set_names(test, "test-")
    pool = load_prompts(train)
    for path in (*valid, *test):
        load_prompts(path)
    require((model / "config.json").is_file(), f"{model}: no model folder here (it has no config.json)")
    out = out or Path("runs") / f"{selector}-{seed}"
    open_run(
        out,
        {
            "model": [str(model), digest(model)],
            "train": [str(train), digest(train)],
            "valid": {name: [str(path), digest(path)] for name, path in valid_sets.items()},
            "test": {name: [str(path), digest(path)] for name, path in test_sets.items()},
            "frac": frac,
            "selector": selector,
            "seed": seed,
            "set": settings,
        },
    )

    def evaluate(policy: Path, folder: Path) -> dict[str, float]:
        """Accuracy, the mean reward, on each test set. The same random numbers every time."""
        accuracy = {}
        for name, path in test_sets.items():
            file = folder / f"test-{name}.safetensors"
            rolled = call("rollout", model=policy, data=path, out=file, seed=seed, **settings["test"])
            accuracy[name] = float(rolled.rewards.mean())
        return accuracy

    offline = out / "rollouts"
    start = load_summary(offline)
    if start is None:
        clock = time.perf_counter()
        if selector not in ("full", "random"):
            call("rollout", model=model, data=train, out=offline / "train.safetensors", seed=seed, **settings["rollout"])
        if selector == "influence":
            for name, path in valid_sets.items():
                file = offline / f"valid-{name}.safetensors"
                call("rollout", model=model, data=path, out=file, seed=seed, **settings["valid"])
        seconds = time.perf_counter() - clock
        start = {"stage": -1, "steps": 0, "seconds_rollout": seconds, "accuracy": evaluate(model, offline)}
        write_json(offline / "summary.json", start)
        print(f"before training: {accuracies(start)}; offline rollouts took {seconds:.1f} s\n", flush=True)
    summaries = [start]

    for stage in range(stages):
        folder = out / f"stage-{stage:02d}"
        summary = load_summary(folder)
        if summary is None:
            policy = out / f"stage-{stage - 1:02d}" / "model" if stage else model
            stage_seed = 1000 * seed + stage
            clock = time.perf_counter()
            sources: dict = {} if selector in ("full", "random") else {"trajectories": offline / "train.safetensors"}
            live = len(pool)
            if selector == "influence":
                for name in ("train", *(f"valid-{name}" for name in valid_sets)):
                    count = call(
                        "project",
                        model=policy,
                        trajectories=offline / f"{name}.safetensors",
                        out=folder / f"gradients-{name}.safetensors",
                        seed=stage_seed,
                        **settings["project"],
                    )
                    live = count if name == "train" else live
                sources["gradients"] = folder / "gradients-train.safetensors"
                sources["valid_gradients"] = [folder / f"gradients-valid-{name}.safetensors" for name in valid_sets]
            selection = folder / "selection.safetensors"
            chosen = call(
                "select", data=train, method=selector, frac=frac, seed=stage_seed, out=selection, **sources
            )
            scored = time.perf_counter()
            log = call(
                "train",
                model=policy,
                initial_model=model,
                optimizer=out / f"stage-{stage - 1:02d}" / "optimizer.safetensors" if stage else None,
                data=train,
                selection=selection,
                out=folder,
                seed=stage_seed,
                **settings["train"],
            )
            trained = time.perf_counter()
            accuracy = evaluate(policy=folder / "model", folder=folder)
            summary = {
                "stage": stage,
                "steps": summaries[-1]["steps"] + len(log),
                "live_prompts": live,
                "chosen": len(chosen),
                "reward": float(np.mean([line["reward"] for line in log])),
                "accuracy": accuracy,
                "seconds_scoring": scored - clock,
                "seconds_training": trained - scored,
                "seconds_evaluation": time.perf_counter() - trained,
            }
            with whole_file(folder / "metrics.jsonl") as temporary:
                evaluations = [{"evaluation": name, "accuracy": value} for name, value in accuracy.items()]
                temporary.write_text("".join(json.dumps(line) + "\n" for line in [*log, *evaluations]))
            write_json(folder / "summary.json", summary)
            print(
                f"stage {stage + 1} of {stages}: {live} live prompts, {len(chosen)} chosen "
                f"({chosen_groups(pool, chosen, group_by)}), reward {summary['reward']:.3f}; {accuracies(summary)}; "
                f"scoring {summary['seconds_scoring']:.1f} s, training {summary['seconds_training']:.1f} s\n",
                flush=True,
            )
        summaries.append(summary)

    chosen_by_stage = [
        open_tensors(out / f"stage-{stage:02d}" / "selection.safetensors", "selection")[0].get_tensor("ranked")
        for stage in range(stages)
    ]
    targeted = [name for name in test_sets if name in valid_sets]
    draw_curve(out / "curve.png", summaries, targeted, f"{selector}, seed {seed}")
    draw_selection(out / "selection.png", pool, chosen_by_stage, group_by, f"{selector}, seed {seed}")
    report = {
        "selector": selector,
        "seed": seed,
        "targeted": targeted,
        "evaluations": summaries,
        "seconds_this_process": time.perf_counter() - started,
    }
    write_json(out / "report.json", report)
    print_table(summaries)
    print(f"{out}: curve.png, selection.png, report.json")
    return report


def open_run(out: Path, settings: dict) -> None:
    """Begin the run folder, or check that it was begun with the same settings."""
    settings = json.loads(json.dumps(settings))
    file = out / "run.json"
    if file.is_file():
        found = json.loads(file.read_text())["settings"]
        changed = [name for name in settings if found.get(name) != settings[name]]
        require(not changed, f"{out} was begun with another {', '.join(changed)} (see its run.json); choose a new --out")
    else:
        packages = ("torch", "transformers", "numpy", "safetensors")
        versions = {name: importlib.metadata.version(name) for name in packages} | {"python": platform.python_version()}
        write_json(file, {"format": rollout.FORMAT, "settings": settings, "versions": versions})


def load_summary(folder: Path) -> dict | None:
    file = folder / "summary.json"
    return json.loads(file.read_text()) if file.is_file() else None


# ---------------------------------------------------------------------------------------------------------------------
# What a person looks at


def accuracies(summary: dict) -> str:
    return "accuracy " + ", ".join(f"{name} {value:.3f}" for name, value in summary["accuracy"].items())


def chosen_groups(pool: list[dict], chosen: np.ndarray, column: str, most: int = 4) -> str:
    """The largest groups among the chosen prompts, in words."""
    names, counts = np.unique([str(pool[i].get(column, "all")) for i in chosen], return_counts=True)
    order = np.argsort(-counts, kind="stable")
    words = [f"{names[j]} {counts[j] / len(chosen):.0%}" for j in order[:most]]
    return ", ".join(words) + (" ..." if len(names) > most else "")


def print_table(summaries: list[dict]) -> None:
    names = list(summaries[0]["accuracy"])
    print("\nstage  steps  chosen  reward  " + "  ".join(names) + "  scoring s  training s")
    for s in summaries:
        row = [f"{s['stage'] + 1:5d}  {s['steps']:5d}  {s.get('chosen', 0):6d}  {s.get('reward', float('nan')):6.3f}"]
        row += [f"{s['accuracy'][name]:{len(name)}.3f}" for name in names]
        row += [f"{s.get('seconds_scoring', 0):9.1f}  {s.get('seconds_training', 0):10.1f}"]
        print("  ".join(row))


def draw_curve(path: Path, summaries: list[dict], targeted: list[str], title: str) -> None:
    """Accuracy against steps; targeted and untargeted test sets in panels of their own."""
    plt = _pyplot()
    names = list(summaries[0]["accuracy"])
    panels = {"targeted": targeted, "untargeted": [name for name in names if name not in targeted]}
    panels = {panel: names for panel, names in panels.items() if names}
    figure, axes = plt.subplots(1, len(panels), figsize=(4.5 * len(panels), 3.6), sharey=True, squeeze=False)
    steps = [s["steps"] for s in summaries]
    for axis, (panel, names) in zip(axes[0], panels.items(), strict=True):
        curves = [[s["accuracy"][name] for s in summaries] for name in names]
        for name, curve in zip(names, curves, strict=True):
            axis.plot(steps, curve, marker="o", markersize=3, linewidth=1, label=name)
        if len(names) > 1:
            axis.plot(steps, np.mean(curves, 0), color="black", linewidth=2, label="mean")
        axis.set(title=f"{panel} test sets", xlabel="training steps", ylim=(0, 1))
        axis.grid(alpha=0.3)
        axis.legend()
    axes[0][0].set_ylabel("accuracy")
    figure.suptitle(title)
    _save(figure, path)


def draw_selection(path: Path, pool: list[dict], chosen: list[np.ndarray], column: str, title: str) -> None:
    """What each stage chose, by a column of the data, beside the pool; and how much of it the stage before had chosen."""
    plt = _pyplot()
    groups = [str(row.get(column, "all")) for row in pool]
    names = sorted(set(groups))
    sets = [np.arange(len(pool)), *chosen]
    shares = np.array([[np.mean([groups[i] == name for i in some]) for name in names] for some in sets])  # (S+1, G)
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), width_ratios=(3, 2))
    labels = ["pool", *(str(s + 1) for s in range(len(chosen)))]
    bottom = np.zeros(len(sets))
    for g, name in enumerate(names):
        left.bar(labels, shares[:, g], bottom=bottom, label=name, color=plt.get_cmap("tab20")(g % 20))
        bottom += shares[:, g]
    left.set(title=f"chosen prompts by {column}", xlabel="stage", ylabel="share", ylim=(0, 1))
    left.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize="small")
    kept = [np.isin(now, before).mean() for before, now in zip(chosen, chosen[1:], strict=False)]
    ever = [len(np.unique(np.concatenate(chosen[: s + 1]))) / len(pool) for s in range(len(chosen))]
    right.plot(range(2, len(chosen) + 1), kept, marker="o", label="share chosen by the stage before")
    right.plot(range(1, len(chosen) + 1), ever, marker="s", label="share of the pool ever chosen")
    right.set(title="turnover", xlabel="stage", ylim=(0, 1), xticks=range(1, len(chosen) + 1))
    right.grid(alpha=0.3)
    right.legend(fontsize="small")
    figure.suptitle(title)
    _save(figure, path)


def _pyplot():
    import matplotlib  # here, since it takes a second to import and is needed at the end alone

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _save(figure, path: Path) -> None:
    figure.tight_layout()
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")


if __name__ == "__main__":
    command_line(app)
