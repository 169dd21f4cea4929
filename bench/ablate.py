"""The study: arms × seeds, each a run of cropi.py, one after another.

    python bench/ablate.py                  # ten arms, five seeds, eight stages: about an hour on two cores
    python bench/ablate.py --quick          # three arms, three seeds, four stages of 20 steps: about four
    python bench/ablate.py --arm "full=--selector full" --arm "hot=--set train.lr=2e-4" --seeds 2 -- --frac 0.2
    python bench/compare.py runs/study      # then: table, figure, acceleration

A selector, a reward, a loss and data of your own, each in one command beside what it is to be compared with:

    python bench/ablate.py --seeds 3 --out runs/selector --arm "influence=" \\
        --arm "mine=--selector toy/examples/selector.py:uncertain_and_aligned"
    python bench/ablate.py --seeds 3 --out runs/reward --arm "exact=" \\
        --arm "mine=--set rollout.reward=toy/examples/reward.py:share_right --set test.reward=exact" -- \\
        --train toy/examples/train.jsonl --valid rev=toy/examples/valid.jsonl --test rev=toy/examples/test.jsonl \\
        --set rollout.prompt_column=task --set rollout.answer_column=target
    python bench/ablate.py --seeds 3 --out runs/loss --arm "influence=" --arm "dapo=--set train.loss=dapo \\
        --set train.clip_high=0.28 --set train.kl=0 --set train.dynamic_sampling=true"
    python bench/ablate.py --seeds 3 --out runs/data --arm "influence=" --arm "random=--selector random" -- \\
        --train toy/examples/train.jsonl --valid rev=toy/examples/valid.jsonl --test rev=toy/examples/test.jsonl \\
        --set rollout.prompt_column=task --set rollout.answer_column=target

An arm is a name and options of `cropi.py run`. `--arm` replaces the ten of the study by arms of your own; what stands
after `--` goes to every run. `--world curriculum` is the bundled world of toy/curriculum. One folder holds the study: a
run folder ARM-SEED and a log ARM-SEED.log each, and study.json, which says what the arms were. The same command resumes
a study that was stopped, and makes only what is missing; with other options, a study or a run is refused, by name.

`--reports FOLDER` keeps what compare.py needs of each run, a few kB, as FOLDER/WORLD-ARM-SEED.json. A run whose report
is there is not made again, so a study outlives its run folders.
"""

import json
import os
import re
import shlex
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Annotated

import typer
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
# Before torch is imported: threads that wait go to sleep instead of spinning. On a machine that others use too,
# spinning ones have made a scoring pass of 2.7 s take 60; sleeping costs about a tenth.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")

import compare  # noqa: E402

import cropi  # noqa: E402
import rollout  # noqa: E402
from rollout import BadInput, require  # noqa: E402

ARMS = {
    "influence": "",
    "influence-static": "--static",
    "influence-refresh-1": "--refresh-every 1",
    "full": "--selector full",
    "random": "--selector random",
    "pass-rate": "--selector pass-rate",
    "learnability": "--selector learnability",
    "hardest": "--selector hardest",
    "inner": "--selector inner",
    "grad-norm": "--selector grad-norm",
}
CURRICULUM = rollout.TOY / "curriculum"
WORLDS = {  # name -> options of cropi.py run
    "toy": "",
    "curriculum": f"--model {CURRICULUM}/model --train {CURRICULUM}/train.jsonl --set rollout.max_tokens=16"
    + "".join(f" --valid {CURRICULUM}/valid-{name}.jsonl" for name in ("irn", "sl", "w"))
    + "".join(f" --test {CURRICULUM}/test-{name}.jsonl" for name in ("irn", "sl", "w", "untargeted")),
}
STUDY = {  # does ranking again pay? docs/results.md
    "full": "--selector full",
    "random": "--selector random",
    "static": "--static",
    "influence": "",
    "refresh": "--refresh-every 1",
    "retry": "--retry-failed 4",
    "retry-refresh-4": "--retry-failed 4 --refresh-every 4",
}
# `mixed`, a sample of the untargeted families, beside the targets (which are the toy's default only if no set is named)
OF_TOY = "".join(f" --valid {rollout.TOY}/valid-{name}.jsonl" for name in ("mixed", "rev", "srt"))
STUDIES = {
    "toy": STUDY | {"retry-mixed": f"--retry-failed 4{OF_TOY}"},
    "curriculum": STUDY
    | {"oracle": f"--selector {CURRICULUM}/oracle.py:best_order"}
    | {"retry-mixed": f"--retry-failed 4 --valid {CURRICULUM}/valid-mixed.jsonl"},
}
QUICK = ("influence", "full", "random")
app = typer.Typer(**rollout.PLAIN)


class Log:
    """What a run prints goes to its log, and moves the study's bar after each stage."""

    def __init__(self, file, bar: tqdm):
        self.file, self.bar = file, bar

    def write(self, text: str) -> int:
        if line := re.match(r"stage \d+ of (\d+)", text):  # cropi.py's line after each stage
            self.bar.update(1 / int(line[1]))
        return self.file.write(text)

    def flush(self) -> None:
        self.file.flush()

    def isatty(self) -> bool:
        return False  # no bars of the run's own


def read_arms(texts: list[str]) -> dict[str, list[str]]:
    """["hot=--set train.lr=2e-4"] -> {"hot": ["--set", "train.lr=2e-4"]}.

    Raises:
        BadInput: not of that form, or a name twice.
    """
    arms = {}
    for text in texts:
        name, equals, options = text.partition("=")
        named = re.fullmatch(r"[A-Za-z0-9_.-]+", name) and equals and name not in arms
        require(bool(named), f"--arm {text}: not NAME=OPTIONS with a new NAME of letters, digits and . _ -")
        try:
            arms[name] = shlex.split(options)
        except ValueError as error:  # a quote is not closed
            raise BadInput(f"--arm {text}: {error}") from None
    return arms


@app.command(help=__doc__.splitlines()[0])
def ablate(
    common: Annotated[list[str] | None, typer.Argument(help="After --: options of cropi.py run, for all runs.")] = None,
    arm: Annotated[
        list[str] | None, typer.Option(help="NAME=OPTIONS of cropi.py run, in place of ours; repeat.")
    ] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="Seeds 0, 1, ...  [default: 5; 3 with --quick]")] = None,
    stages: Annotated[
        int | None, typer.Option(min=1, help="Of a run whose arm does not say.  [default: 8; 4 with --quick]")
    ] = None,
    first_seed: Annotated[
        int | None, typer.Option(min=0, help="The first of the seeds.  [default: 0; 4 with --study]")
    ] = None,
    world: Annotated[str, typer.Option(help="toy, or curriculum: the bundled worlds.")] = "toy",
    study: Annotated[
        bool, typer.Option("--study", help="The arms of docs/results.md, seeds 4, 5, ..., reports in docs/study.")
    ] = False,
    reports: Annotated[
        Path | None, typer.Option(help="Folder for a report of each run; a run with a report is not made.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="The small form, in runs/quick.")] = False,
    out: Annotated[Path | None, typer.Option(help="Folder of the study.  [default: runs/study]")] = None,
) -> None:
    seeds, stages = seeds or (3 if quick else 5), stages or (4 if quick else 8)
    out = out or Path("runs") / ("quick" if quick else f"study-{world}" if study else "study")
    require(world in WORLDS, f"--world {world}: no such world; there is {', '.join(WORLDS)}")
    common = shlex.split(WORLDS[world]) + (["--set", "train.steps=20"] if quick else []) + (common or [])
    if study:
        first_seed, reports = 4 if first_seed is None else first_seed, reports or ROOT / "docs/study"
    ours = STUDIES[world] if study else {n: options for n, options in ARMS.items() if n in QUICK or not quick}
    arms = read_arms(arm or [f"{name}={options}" for name, options in ours.items()])
    given = {word.partition("=")[0] for options in (common, *arms.values()) for word in options}
    require(not given & {"--seed", "--out"}, "--seed and --out of each run are set here; there are --seeds and --out")
    file = out / "study.json"
    rollout.check_out(out)
    try:
        begun = json.loads(file.read_text()) if file.exists() else {"stages": stages, "options": common, "arms": {}}
    except ValueError as error:
        raise BadInput(f"{file} is damaged ({error}); remove it, and the same command writes it again") from None
    require(begun["stages"] == stages, f"{out} was begun with --stages {begun['stages']}; choose a new --out")
    was = shlex.join(begun["options"]) or "no options"
    require(begun["options"] == common, f"{out} was begun with {was} for all runs; choose a new --out")
    for name in set(arms) & set(begun["arms"]):
        was = shlex.join(begun["arms"][name]) or "no options"
        require(begun["arms"][name] == arms[name], f"{out}: its arm {name} was begun as '{was}'; choose another name")
    command = typer.main.get_command(cropi.app).commands["run"]
    for name, options in arms.items():  # a slip in the last arm is to be known before the first has run
        try:
            cropi.parse_settings(command.make_context("run", [*common, *options]).params["assignments"] or [])
        except (BadInput, rollout.UsageError) as error:
            raise BadInput(f"arm {name}: {getattr(error, 'message', error)}") from None
    with rollout.new_file(file) as temporary:
        temporary.write_text(json.dumps(begun | {"arms": begun["arms"] | arms}, indent=1) + "\n")

    rollout.load_model(rollout.TOY / "model")  # transformers imports the model's code now, not on the first run's clock
    shown = "{desc}: {percentage:3.0f}%|{bar}| {n:.1f} of {total} runs [{elapsed}<{remaining}]"
    with tqdm(total=len(arms) * seeds, bar_format=shown, disable=None) as bar:
        # All arms of a seed before the next, so that a slow hour of the machine hits all.
        for seed in range(first_seed or 0, (first_seed or 0) + seeds):
            names = list(arms)[seed % len(arms) :] + list(arms)[: seed % len(arms)]  # and none is always the first
            for name, options in ((name, arms[name]) for name in names):
                bar.set_description(f"{name}, seed {seed}")
                words = ["--stages", str(stages), *common, *options]  # of --stages given twice, the last holds
                report = reports and reports / f"{world}-{name}-{seed}.json"
                if report and report.exists():
                    compare.read_kept(report, words)
                    bar.update(1)
                    continue
                extent = ["--seed", str(seed), "--out", str(out / f"{name}-{seed}")]
                with open(out / f"{name}-{seed}.log", "a") as file:
                    log = Log(file, bar)
                    with redirect_stdout(log), redirect_stderr(log):
                        command.invoke(command.make_context("cropi.py", [*words, *extent]))
                if report:
                    compare.keep(report, out / f"{name}-{seed}", f"{name}-{seed}", words)
                tqdm.write(f"{out / f'{name}-{seed}'}: done")
    made = f"{reports}/{world}-*.json" if reports else out
    print(f"{out}: {len(arms)} arms, {seeds} seeds each; next: python bench/compare.py {made}")


if __name__ == "__main__":
    rollout.command_line(app)
