"""CROPI: the curriculum loop. Stage after stage, train on the prompts whose gradients point where validation points.

    python cropi.py run --stages 8 --frac 0.1

The algorithm (Data-Efficient RLVR via Off-Policy Influence Guidance, arXiv 2510.26491), in the numbers of the README:

    sample K trajectories from β = π_θ0 for every training and validation prompt       rollout.py
    for stage s = 0 .. S-1:
        (with --refresh-every R: if R divides s > 0, sample them anew from π_θs;      rollout.py
        with --static: the next two lines only in the first stage)
        ĝ, g̃   <- off-policy gradients at θ_s from β's trajectories, sketched     (2, 3)  project.py
        score  <- cosine with each validation set, ranks fused; the top N = frac·|D|  (4, 5)  select.py
        θ_s+1  <- GRPO from θ_s on the chosen prompts                                 (6)     train.py

Each step is a script that also runs alone; this one calls their functions in one process (eight stages of separate
processes would spend longer importing than learning on the toy) and prints the shell command that does the same.

One run is one folder. What has been done stands in its journals, with the digests of the files; running the same
command again checks them and goes on, inside a rollout, a scoring pass or a stage of training too. Only one process may
be at work in the folder.

    runs/NAME/
      run.json                           settings, digests of model and data, versions
      rollouts/{train,valid-*}.safetensors   β's trajectories;  test-*.safetensors: the evaluation before training
      stage-00/                          each folder of work has its journal.json, and ends with its summary.json
        rollouts/                               β's trajectories, where they were refreshed
        gradients-{train,valid-*}.safetensors   selection.{safetensors,csv}
        model/  optimizer.safetensors           metrics.jsonl (a line per step and per evaluation)
        test-*.safetensors                      the evaluation after this stage
      curve.png  selection.png  report.json
"""

import importlib.metadata
import importlib.util
import itertools
import json
import os
import platform
import re
import shlex
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import typer
from tqdm import tqdm

import project
import rollout
import train
from rollout import (
    FREE,
    TOY,
    BadInput,
    Engine,
    Limit,
    SaveEvery,
    Source,
    Unfinished,
    above_zero,
    check_out,
    command_line,
    device,
    differences,
    digest,
    in_words,
    is_intact,
    load_json,
    load_prompts,
    locked,
    model_folder,
    new_app,
    open_tensors,
    remove_folder,
    require,
    safe_point,
    settings_of,
    whole_file,
    write_json,
)


def _load_select():
    """The script select.py, by file path: by name it could be the standard library's `select` (see its head)."""
    spec = importlib.util.spec_from_file_location("cropi_select", Path(__file__).with_name("select.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


select = _load_select()
SCRIPTS = {"rollout": rollout, "project": project, "select": select, "train": train}
# Whose options `--set` reaches; rollout.py also as it is used on validation and on test sets.
STAGES = {"rollout": rollout, "valid": rollout, "test": rollout, "project": project, "train": train}
TOY_POOL = Source(TOY / "train.jsonl")
TOY_VALID = [str(TOY / f"valid-{name}.jsonl") for name in ("rev", "srt")]
TOY_TEST = [str(TOY / f"test-{name}.jsonl") for name in ("rev", "srt", "untargeted")]
# Completions per prompt of a validation and of a test set; a training prompt has rollout.py's own 8.
SAMPLES = {"valid": {"samples": 32}, "test": {"samples": 4}}
SHARED = (  # set for `rollout`, these hold for valid, test and train as well
    *("temperature", "max_tokens", "max_prompt_tokens", "system", "chat", "reward", "reward_seconds", "max_errors"),
    *("engine", "gpu_memory", "dtype", "limit"),
)
KEPT = (".safetensors", ".csv", ".jsonl")  # what a folder of work holds, beside the model
KINDS = {"rollout": "trajectories", "project": "gradients", "train": "training"}  # of files that are made in parts
OURS = {  # options that the loop itself gives to each script
    *("out", "model", "data", "seed", "trajectories", "gradients", "valid_gradients", "method", "frac"),
    *("selection", "previous", "initial_model", "optimizer"),
}


# ---------------------------------------------------------------------------------------------------------------------
# Options and commands


def parse_settings(assignments: list[str]) -> dict[str, dict[str, object]]:
    """["train.lr=1e-4"] -> {"train": {"lr": 1e-4}, ...}, converted and checked as the script's own command line would.

    Raises:
        BadInput: an unknown stage or option, one that the loop sets itself, or a value that the option refuses.
    """
    settings: dict[str, dict] = {stage: dict(SAMPLES.get(stage, {})) for stage in STAGES}
    for text in assignments:
        name, has_value, value = text.partition("=")
        stage, _, option = name.partition(".")
        option = option.replace("-", "_")
        require(
            has_value == "=" and stage in STAGES, f"--set {text}: not STAGE.OPTION=VALUE, STAGE of {', '.join(STAGES)}"
        )
        command = typer.main.get_command(STAGES[stage].app)
        parameters = {p.name: p for p in command.params if p.name not in (*OURS, "help")}
        require(option in parameters, f"--set {text}: {stage} has no such option (there is: {', '.join(parameters)})")
        try:
            settings[stage][option] = parameters[option].process_value(typer.Context(command), value)
        except typer.BadParameter as error:
            raise BadInput(f"--set {text}: {error.message}") from None
    for stage in ("valid", "test"):
        settings[stage] = settings["rollout"] | settings[stage]
    settings["project"] = {o: v for o, v in settings["rollout"].items() if o == "dtype"} | settings["project"]
    shared = {option: value for option, value in settings["rollout"].items() if option in SHARED}
    settings["train"] = shared | settings["train"]
    return settings


def shell_command(script: str, options: dict) -> str:
    words = ["python", f"{script}.py"]
    for name, value in options.items():
        for one in value if isinstance(value, list) else [value]:
            flag = name.replace("_", "-")
            if isinstance(one, bool):
                words += [f"--{flag}"] if one else [f"--no-{flag}"]
            elif one is not None:
                words += [f"--{flag}", str(one)]
    return shlex.join(words)


def call(script: str, **options):
    """Run a stage as a function, and print the command that does the same."""
    tqdm.write(f"$ {shell_command(script, options)}")
    return getattr(SCRIPTS[script], script)(**options)


def set_names(texts: list[str], prefix: str) -> dict[str, Source]:
    """NAME=SOURCE, or SOURCE alone: valid-rev.jsonl is called rev, openai/gsm8k:main:test gsm8k. A test set is targeted
    if a validation set has its name."""
    names: dict[str, Source] = {}
    for text in map(str, texts):
        name, equals, source = text.partition("=")
        if not equals:  # of a file its stem, of openai/gsm8k:main:test gsm8k
            hub, source = Path(text).suffix not in rollout.FILES, text
            name = Path(text.partition(":")[0]).name if hub else Path(text).stem.removeprefix(prefix)
        require(name not in names, f"{text}: two sets have the same name, {name}; write OTHER_NAME={source}")
        good = re.fullmatch(r"[A-Za-z0-9_.-]+", name)
        require(bool(good), f"{text}: {name!r} is no name of letters, digits and . _ -; write NAME={source}")
        names[name] = Source(source)
    return names


def is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        pass
    return process != os.getpid()


def describe(value: object) -> object:
    """A setting for run.json; data or a model folder by its name and its digest."""
    if isinstance(value, dict):
        return {name: describe(one) for name, one in value.items()}
    if isinstance(value, Source):
        return [Path(value).name if Path(value).is_file() else str(value), load_prompts(value).digest]
    return [value.name, digest(value)] if isinstance(value, Path) else value


# ---------------------------------------------------------------------------------------------------------------------
# The steps of a run


@dataclass
class Curriculum:
    """The settings of a run, and what it does with them. θ_s is the model before stage s."""

    out: Path
    model: Path
    pool: Source
    valid_sets: dict[str, Source]
    test_sets: dict[str, Source]
    selector: str
    frac: float
    static: bool
    refresh_every: int
    seed: int
    settings: dict[str, dict]  # options of each script, beside those that are set below

    def folder(self, stage: int) -> Path:
        return self.out / f"stage-{stage:02d}"

    def policy(self, stage: int) -> Path:
        return self.folder(stage - 1) / "model" if stage else self.model

    def open(self, force: int | None) -> None:
        """Begin the folder, or check that it was begun with the same settings; `force` gives up the stages from there.

        Raises:
            BadInput: it was begun otherwise, or is not a run.
        """
        options = {"pool": "train", "valid_sets": "valid", "test_sets": "test", "settings": "set"}
        settings = {options.get(name, name): describe(value) for name, value in vars(self).items() if name != "out"}
        settings["curriculum"] = type(self).__name__  # a study may bring a subclass
        for script in settings["set"].values():
            for option in (FREE | {"batch_tokens"}) & set(script):  # a full device must not end a run
                script.pop(option)
        auto = {"engine": "auto", "dtype": "auto", "reward": "exact"}  # what they stand for, here and now
        settings["as"] = {
            script: settings_of({name: self.settings[script].get(name, value) for name, value in auto.items()})
            for script in ("rollout", "train")
        }
        file = self.out / "run.json"
        made = any(any(self.out.glob(f"**/{name}")) for name in ("journal.json", "summary.json", ".*.unfinished"))
        found = load_json(file) if made else None  # a beginning that made nothing binds to nothing
        changes = self.check_settings(found, settings, force) if found else []
        if changes is None:
            return
        if force is not None:
            self.give_up(force)
        packages = ("torch", "transformers", "numpy", "safetensors")
        versions = {name: importlib.metadata.version(name) for name in packages}
        versions["python"] = platform.python_version()
        about = {"format": rollout.FORMAT, "settings": settings, "changes": changes, "versions": versions}
        write_json(file, about)

    def check_settings(self, found: dict, settings: dict, force: int | None) -> list[dict] | None:
        """May a run that was begun as in `found` go on with these settings?

        Returns its changes on the way, the last being that of `force`; None if there is nothing to give up.
        """
        same = found.get("format") == rollout.FORMAT
        require(same, f"{self.out} was begun by another version of these scripts; choose a new --out")
        changed = differences(found["settings"], settings)
        ways = f"choose a new --out, or --force STAGE to give up {self.out}'s stages from that one on (0: all)"
        require(not changed or force is not None, f"{self.out} was begun with {in_words(changed)}; {ways}")
        if force is None:
            return None
        # nothing before the stage depends on these
        late = "set.train." if self.static else ("frac", "set.train.", "set.project.")
        early = {name: change for name, change in changed.items() if not name.startswith(late)}
        require(not force or not early, f"{in_words(early)}: that bears on what came before; use --force 0")
        whole = not force or (self.folder(force - 1) / "summary.json").is_file()
        require(whole, f"--force {force}: {self.folder(force - 1)} is not whole yet; choose an earlier stage")
        last, summary = found["changes"][-1:], self.folder(force) / "summary.json"
        if not changed and last and last[0]["from_stage"] == force and not summary.exists():
            return None  # the same command, which was interrupted
        return [*(found["changes"] if force else []), {"from_stage": force, "changed": changed}]

    def give_up(self, stage: int) -> None:
        """Remove what was done from this stage on; from 0 on, the rollouts before it too."""
        for path in sorted(self.out.glob("stage-*"), reverse=True):  # the last one first: no gap if we are killed
            if int(path.name.removeprefix("stage-")) >= stage:
                remove_folder(path)
        if stage == 0:
            remove_folder(self.out / "rollouts")

    def sweep(self) -> None:
        """Remove what killed processes have left behind."""
        for path in self.out.rglob(".*"):
            if (found := re.search(r"\.(\d+)(\.old)?$", path.name)) and path.exists() and not is_alive(int(found[1])):
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def say_what_is_done(self, stages: int) -> None:
        """The first lines of a resumed run: what there is, what it cost, what comes next."""
        journals = [self.load(path) for path in sorted(self.out.glob("**/journal.json"))]
        entries = [entry for journal in journals for entry in journal.items()]
        parts = sorted(self.out.glob("**/.*.unfinished"))
        if not entries and not parts:
            return
        whole = sum((self.folder(stage) / "summary.json").is_file() for stage in range(stages))
        spent = sum(entry["seconds"] for _, entry in entries)
        begun = [name for name, entry in entries if name.split()[1].startswith(self.folder(whole).name)]
        print(f"goes on: {whole} of {stages} stages are whole, {spent:.1f} s of work in all", end="")
        if whole < stages:
            print(f"; of stage {whole + 1} are done: {', '.join(begun) or 'nothing'}", end="")
        print("".join(f"; begun: {path.relative_to(self.out)}" for path in parts))

    def do(self, folder: Path, script: str, files: list[Path], **options) -> dict:
        """Call a script, unless the folder's journal has it, and enter what it returned, wrote and took.

        Raises:
            BadInput: a file that the journal has is not as it was written.
        """
        safe_point()
        journal = self.load(folder / "journal.json") or {}
        name = f"{script} {files[0].relative_to(self.out)}"
        if name in journal:
            self.check(journal[name]["files"])
            return journal[name]
        before = Unfinished.seconds_in(files[0], KINDS[script]) if script in KINDS else 0.0
        clock = time.perf_counter()
        Unfinished.later = []  # parts stay until the journal has the whole
        try:
            result = call(script, **options)
        finally:
            done, Unfinished.later = Unfinished.later, None
        seconds = before + time.perf_counter() - clock
        digests = {str(path.relative_to(self.out)): digest(path) for path in files}
        if isinstance(result, rollout.Trajectories):
            result = {"trajectories": len(result.rewards), "reward": float(result.rewards.mean())}
        journal[name] = {
            "seconds": seconds,
            "files": digests,
            "result": result if script in ("rollout", "train") else None,
        }
        file = folder / "journal.json"
        write_json(file, journal | {"of": str(file.relative_to(self.out))})
        for parts in done:
            remove_folder(parts)
        return journal[name]

    def load(self, path: Path) -> dict | None:
        """A journal or summary, if it is there and is the one that was written there."""
        found, of = load_json(path), str(path.relative_to(self.out))
        require(
            found is None or found.pop("of", None) == of, f"{path} is another file than {of}; put it back, or remove it"
        )
        return found

    def check(self, files: dict[str, str]) -> None:
        for name, expected in files.items():
            path = self.out / name
            same = path.exists() and digest(path) == expected and is_intact(path)
            way = f"--force {int(found[1])}" if (found := re.match(r"stage-(\d+)", name)) else "--force 0"
            require(same, f"{path} is missing or not as it was written; {way} makes it, and what comes after it, again")

    def once(self, folder: Path, work: Callable[..., dict], *args) -> tuple[dict, bool]:
        """The summary that `work` returns, kept in the folder: what is whole is not done again. Also: was it done now?

        Raises:
            BadInput: a file of the folder is not as it was written.
        """
        file = folder / "summary.json"
        if found := self.load(file):
            self.check(found.pop("files"))
            return found, False
        later = [path.name for path in sorted(self.out.glob("stage-*")) if path.name > folder.name]
        gap = folder.parent == self.out and folder.name.startswith("stage-") and later
        require(
            not gap,
            f"{folder} is not whole, but {', '.join(later)} came after it; --force {folder.name[-2:]} redoes both",
        )
        summary = work(*args)
        ours = [path for path in sorted(folder.glob("[!.]*")) if path.suffix in KEPT or path.name == "model"]
        files = {str(path.relative_to(self.out)): digest(path) for path in ours}
        write_json(file, summary | {"files": files, "of": str(file.relative_to(self.out))})
        return summary, True

    def selection(self, stage: int) -> Path:
        return self.folder(0 if self.static else stage) / "selection.safetensors"

    def valid_files(self) -> dict[str, Path]:
        """valid-NAME, as its trajectories and gradients are called, -> data file."""
        return {f"valid-{name}": path for name, path in self.valid_sets.items()}

    def trajectories(self, stage: int) -> Path:
        """Folder of β's trajectories as the stage is scored with them."""
        sampled = stage - stage % self.refresh_every if self.refresh_every else 0
        return (self.folder(sampled) if sampled else self.out) / "rollouts"

    def offline_rollouts(self, stage: int) -> dict:
        """Sample β's trajectories from θ of the stage, those that the selector looks at; returns the cost."""
        done = []
        files = {} if self.selector in ("full", "random") else {"train": ("rollout", self.pool)}
        if self.selector == "influence":
            files |= {name: ("valid", path) for name, path in self.valid_files().items()}
        for name, (script, path) in files.items():
            out = self.trajectories(stage) / f"{name}.safetensors"
            seed = self.stage_seed(stage) if stage else self.seed
            options = {"model": self.policy(stage), "data": path, "seed": seed} | self.settings[script]
            done.append(self.do(self.trajectories(stage), "rollout", [out], out=out, **options))
        count = sum(one["result"]["trajectories"] for one in done)
        return {"seconds_rollout": sum(one["seconds"] for one in done), "trajectories_offline": count}

    def choose(self, stage: int) -> float:
        """Write the selection of the stage; returns the seconds it took."""
        folder, rollouts, seed = self.folder(stage), self.trajectories(stage), self.stage_seed(stage)
        sources: dict = {}
        done = []
        if self.selector not in ("full", "random"):
            sources["trajectories"] = rollouts / "train.safetensors"
        if self.selector == "influence":
            gradients = {name: folder / f"gradients-{name}.safetensors" for name in ("train", *self.valid_files())}
            for name, out in gradients.items():
                options = self.settings["project"] | ({} if name == "train" else {"halves": 0})
                stored = rollouts / f"{name}.safetensors"
                options |= {"model": self.policy(stage), "trajectories": stored, "seed": seed}
                done.append(self.do(folder, "project", [out], out=out, **options))
            sources["gradients"] = gradients.pop("train")
            sources["valid_gradients"] = list(gradients.values())
            sources["previous"] = self.selection(stage - 1) if stage else None
        limit = self.settings["rollout"].get("limit")
        options = {"method": self.selector, "frac": self.frac, "seed": seed, "limit": limit}
        out = self.selection(stage)
        files = [out, out.with_suffix(".csv")]
        done.append(self.do(folder, "select", files, data=self.pool, out=out, **sources, **options))
        return sum(one["seconds"] for one in done)

    def train(self, stage: int) -> dict:
        """The journal's entry: its `result` is one line of metrics per step."""
        folder = self.folder(stage)
        return self.do(
            folder,
            "train",
            [folder / "model", folder / "optimizer.safetensors"],
            model=self.policy(stage),
            initial_model=self.model,
            optimizer=self.folder(stage - 1) / "optimizer.safetensors" if stage else None,
            data=self.pool,
            selection=self.selection(stage),
            out=folder,
            seed=self.stage_seed(stage),
            **self.settings["train"],
        )

    def evaluate(self, policy: Path, folder: Path) -> tuple[dict[str, float], float]:
        """Accuracy, the mean reward, on each test set, and the seconds it took. The same random numbers every time."""
        accuracy, seconds = {}, 0.0
        for name, path in self.test_sets.items():
            out = folder / f"test-{name}.safetensors"
            options = {"model": policy, "data": path, "seed": self.seed} | self.settings["test"]
            done = self.do(folder, "rollout", [out], out=out, **options)
            accuracy[name] = done["result"]["reward"]
            seconds += done["seconds"]
        return accuracy, seconds

    def stage_seed(self, stage: int) -> int:
        return 1000 * self.seed + stage

    def begin(self) -> dict:
        """Everything before the first stage; returns its summary."""
        cost = self.offline_rollouts(0)
        return {"stage": 0, "steps": 0, **cost, "accuracy": self.evaluate(self.model, self.out / "rollouts")[0]}

    def run_stage(self, stage: int, steps: int) -> dict:
        """Refresh, select, train, evaluate; returns the stage's summary. `steps` were made before it."""
        refresh = stage and self.trajectories(stage).parent == self.folder(stage)
        cost = self.once(self.trajectories(stage), self.offline_rollouts, stage)[0] if refresh else {}
        scoring = 0.0 if self.static and stage else self.choose(stage)
        trained = self.train(stage)
        log = trained["result"]
        accuracy, evaluating = self.evaluate(self.policy(stage + 1), self.folder(stage))
        evaluations = [{"evaluation": name, "accuracy": value} for name, value in accuracy.items()]
        with whole_file(self.folder(stage) / "metrics.jsonl") as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in [*log, *evaluations]))
        tensors, metadata = open_tensors(self.selection(stage), "selection")
        return {
            "stage": stage + 1,
            "steps": steps + len(log),
            "chosen": len(tensors["ranked"]),
            "reward": float(np.mean([line["reward"] for line in log])),
            "accuracy": accuracy,
            "diagnostics": metadata["diagnostics"] if self.selection(stage).parent == self.folder(stage) else {},
            "trajectories_training": sum(line["trajectories"] for line in log),
            **cost,
            "seconds_scoring": scoring,
            "seconds_training": trained["seconds"],
            "seconds_evaluation": evaluating,
        }


# ---------------------------------------------------------------------------------------------------------------------
# The command

app = new_app(help=__doc__.splitlines()[0])


@app.callback(invoke_without_command=True)
def main(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())


@app.command(help="Run the curriculum; run the same command again to go on where it was interrupted.")
def run(
    model: Annotated[Path, typer.Option(help="Initial policy: a model folder, or a name on the Hub.")] = TOY / "model",
    pool: Annotated[
        Source,
        typer.Option(
            "--train",
            parser=Source,
            help="Training pool: a jsonl, json, csv or parquet file, or NAME[:CONFIG[:SPLIT]].",
        ),
    ] = TOY_POOL,
    valid: Annotated[list[str], typer.Option(help="Validation set, [NAME=]SOURCE; repeat.")] = TOY_VALID,
    test: Annotated[
        list[str],
        typer.Option(help="Test set, [NAME=]SOURCE; targeted if a validation set has its name; repeat."),
    ] = TOY_TEST,
    limit: Limit = None,
    stages: Annotated[int, typer.Option(min=1, help="Stages of selection and training.")] = 8,
    frac: Annotated[float, typer.Option(callback=above_zero, max=1, help="Share of the pool to train on.")] = 0.1,
    selector: Annotated[
        Literal[select.METHODS], typer.Option(help="How each stage's prompts are chosen.")
    ] = "influence",
    static: Annotated[bool, typer.Option("--static", help="Choose once, before the first stage.")] = False,
    refresh_every: Annotated[
        int, typer.Option(min=0, help="Stages after which the stored trajectories are sampled anew; 0: never.")
    ] = 0,
    seed: Annotated[int, typer.Option(min=0, help="Of everything random.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Folder of the run.  [default: runs/SELECTOR-SEED]")] = None,
    assignments: Annotated[
        list[str] | None, typer.Option("--set", help="STAGE.OPTION=VALUE, such as train.lr=1e-4; repeat.")
    ] = None,
    engine: Engine = "auto",
    save_every: SaveEvery = 300.0,
    force: Annotated[
        int | None,
        typer.Option(min=0, help="Give up the stages from this one on, as in stage-03 (0: the rollouts too)."),
    ] = None,
    group_by: Annotated[str, typer.Option(help="Data column that selection.png shows.")] = "family",
) -> dict:
    started = time.perf_counter()
    device()
    ours = [f"rollout.engine={engine}"] if engine != "auto" else []
    ours += [f"rollout.limit={limit}"] if limit else []
    ours += [f"{script}.save_every={save_every:g}" for script in STAGES if save_every != 300]
    settings = parse_settings([*ours, *(assignments or [])])
    valid_sets, test_sets = set_names(valid, "valid-"), set_names(test, "test-")
    prompts = load_prompts(pool, limit)
    for source in (*valid_sets.values(), *test_sets.values()):
        load_prompts(source, limit)
    model = model_folder(model)
    toy_sets = pool != TOY_POOL and (valid == TOY_VALID or test == TOY_TEST)
    require(not toy_sets, f"{pool} needs validation and test sets of its own: --valid FILE --test FILE")
    require(not (static and refresh_every), "--static chooses once; --refresh-every would sample for no selection")
    out = out or Path("runs") / f"{selector}-{seed}"
    check_out(out / "run.json")
    strange = out.is_dir() and not (out / "run.json").exists() and any(out.glob("[!.]*"))
    require(not strange, f"{out} holds something else than a run (no run.json); choose a new --out")
    curriculum = Curriculum(
        out, model, pool, valid_sets, test_sets, selector, frac, static, refresh_every, seed, settings
    )
    with locked(out):
        report = go(curriculum, stages, prompts, force, group_by)
        report["seconds_this_process"] = time.perf_counter() - started
        write_json(out / "report.json", report)
    return report


def go(curriculum: Curriculum, stages: int, prompts: list[dict], force: int | None, group_by: str) -> dict:
    """Do what is not done yet, and show it all; returns the report."""
    out, selector, static, seed = (getattr(curriculum, name) for name in ("out", "selector", "static", "seed"))
    curriculum.sweep()
    curriculum.open(force)
    targeted = [name for name in curriculum.test_sets if name in curriculum.valid_sets]
    print(
        f"{out}: {selector}, {stages} stages; targeted test sets: {', '.join(targeted) or 'none has a validation name'}"
    )
    curriculum.say_what_is_done(stages)
    done = sum((curriculum.folder(stage) / "summary.json").is_file() for stage in range(stages))
    with tqdm(total=stages, initial=done, desc="curriculum", unit="stage", disable=None) as bar:
        start, _ = curriculum.once(out / "rollouts", curriculum.begin)
        tqdm.write(f"before training: {accuracies(start)}; rollouts {start['seconds_rollout']:.1f} s\n")
        summaries, chosen = [start], []
        for stage in range(stages):
            summary, now = curriculum.once(
                curriculum.folder(stage), curriculum.run_stage, stage, summaries[-1]["steps"]
            )
            summaries.append(summary)
            chosen.append(np.array(open_tensors(curriculum.selection(stage), "selection")[0]["ranked"]))
            line = stage_line(summary, prompts, chosen[-1], group_by)
            tqdm.write(f"stage {stage + 1} of {stages}{'' if now else ' (done before)'}: {line}\n")
            bar.update(int(now))

    title = f"{selector}{' chosen once' if static else ''}, seed {seed}"
    draw_curve(out / "curve.png", summaries, targeted, title)
    draw_selection(out / "selection.png", prompts, chosen, group_by, title)
    report = {
        "selector": selector,
        "seed": seed,
        "targeted": targeted,
        "evaluations": summaries,
    }
    print_table(summaries, targeted)
    print(f"{out}: curve.png, selection.png, report.json")
    return report


# ---------------------------------------------------------------------------------------------------------------------
# What a person looks at


def accuracies(summary: dict) -> str:
    return "accuracy " + ", ".join(f"{name} {value:.3f}" for name, value in summary["accuracy"].items())


def stage_line(summary: dict, pool: list[dict], chosen: np.ndarray, column: str, most: int = 4) -> str:
    """What a person wants to know of a stage."""
    names, counts = np.unique([str(pool[i].get(column, "all")) for i in chosen], return_counts=True)
    order = np.argsort(-counts, kind="stable")
    groups = ", ".join(f"{names[j]} {counts[j] / len(chosen):.0%}" for j in order[:most])
    rolled = f"rollouts {summary['seconds_rollout']:.1f} s, " if "seconds_rollout" in summary else ""
    return (
        f"{len(chosen)} chosen ({groups}{' ...' if len(names) > most else ''}), reward {summary['reward']:.3f}; "
        f"{accuracies(summary)}; "
        f"{rolled}scoring {summary['seconds_scoring']:.1f} s, training {summary['seconds_training']:.1f} s"
    )


def print_table(summaries: list[dict], targeted: list[str]) -> None:
    seconds = {"roll s": "seconds_rollout", "score s": "seconds_scoring", "train s": "seconds_training"}
    columns = ["stage", "steps", "chosen", "reward", *summaries[0]["accuracy"], "targeted", *seconds]
    print("\n" + "  ".join(f"{name:>6}" for name in columns))
    for s in summaries:
        mean = float(np.mean([s["accuracy"][name] for name in targeted])) if targeted else ""
        cells = [s["stage"], s["steps"], s.get("chosen", ""), s.get("reward", ""), *s["accuracy"].values(), mean]
        texts = [f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in cells]
        texts += [f"{s[name]:.1f}" if name in s else "" for name in seconds.values()]
        print("  ".join(f"{text:>{max(6, len(name))}}" for text, name in zip(texts, columns, strict=True)))


def draw_curve(path: Path, summaries: list[dict], targeted: list[str], title: str) -> None:
    """Accuracy against steps; targeted and untargeted test sets in panels of their own."""
    names = list(summaries[0]["accuracy"])
    panels = {"targeted": targeted, "untargeted": [name for name in names if name not in targeted]}
    panels = {panel: names for panel, names in panels.items() if names}
    figure, axes = _figure(len(panels), 4.5 * len(panels), 3.8, sharey=True)
    steps = [s["steps"] for s in summaries]
    for axis, (panel, names) in zip(axes, panels.items(), strict=True):
        curves = [[s["accuracy"][name] for s in summaries] for name in names]
        for name, curve in zip(names, curves, strict=True):
            axis.plot(steps, curve, marker="o", markersize=3, linewidth=1, label=name)
        if len(names) > 1:
            axis.plot(steps, np.mean(curves, 0), color="black", linewidth=2, label="mean")
        axis.set(title=f"{panel} test sets", xlabel="training steps", ylim=(0, 1))
        axis.grid(alpha=0.3)
        axis.legend()
    axes[0].set_ylabel("accuracy")
    figure.suptitle(title)
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")


def draw_selection(path: Path, pool: list[dict], chosen: list[np.ndarray], column: str, title: str) -> None:
    """What each stage chose, by a column of the data, beside the pool; and how much of it was chosen before."""
    from matplotlib import colormaps

    groups = [str(row.get(column, "all")) for row in pool]
    names = sorted(set(groups))
    sets = [np.arange(len(pool)), *chosen]
    shares = np.array([[np.mean([groups[i] == name for i in some]) for name in names] for some in sets])  # (S+1, G)
    figure, (left, right) = _figure(2, 10, 4, width_ratios=(3, 2))
    labels = ["pool", *(str(s + 1) for s in range(len(chosen)))]
    bottom = np.zeros(len(sets))
    for g, name in enumerate(names):
        left.bar(labels, shares[:, g], bottom=bottom, label=name, color=colormaps["tab20"](g % 20))
        bottom += shares[:, g]
    left.set(title=f"chosen prompts by {column}", xlabel="stage", ylabel="share", ylim=(0, 1))
    left.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize="small", reverse=True)
    kept = [np.isin(now, before).mean() for before, now in itertools.pairwise(chosen)]
    ever = [len(np.unique(np.concatenate(chosen[: s + 1]))) / len(pool) for s in range(len(chosen))]
    right.plot(range(2, len(chosen) + 1), kept, marker="o", label="share chosen by the stage before")
    right.plot(range(1, len(chosen) + 1), ever, marker="s", label="share of the pool ever chosen")
    right.set(title="turnover", xlabel="stage", ylim=(0, 1), xticks=range(1, len(chosen) + 1))
    right.grid(alpha=0.3)
    right.legend(fontsize="small")
    figure.suptitle(title)
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")


def _figure(columns: int, width: float, height: float, **options) -> tuple:
    from matplotlib.figure import Figure  # here, since it takes a second to import and is needed at the end alone

    figure = Figure(figsize=(width, height), layout="tight")
    return figure, figure.subplots(1, columns, squeeze=False, **options)[0]


if __name__ == "__main__":
    command_line(app)
