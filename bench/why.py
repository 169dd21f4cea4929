"""Why do fresh trajectories help the ranking? Estimator by estimator for two policies, and arm by arm, stage by stage.

    python bench/why.py                      # about an hour on two cores; needs (or first makes) its runs
    python bench/why.py --world curriculum

For a policy, a *truth* is the ranking by `--fresh` new trajectories of every training and validation prompt. There are
two of them, each from trajectories of its own. A choice of 10% of the pool is measured by

    found   the share of a truth's choice that is in it, mean over the two
    gain    the first-order gain of a step on it, Σ_x∈choice Σ_V ⟨ĝ(x), ∇J_V⟩, by the gradients of one truth, divided by
            that of the other truth's choice; mean over both. (A truth's own gradients would flatter its own choice.)

First table: the policies of the run `influence` after 2 and 4 stages, and choices by these estimators:

    stored             β's trajectories, as cropi.py run has it
    fresh validation   8 new trajectories of every validation prompt, β's of the pool
    fresh live         8 new ones of the prompts that are live under β; those that are dead stay dead
    retried            4 new ones of prompts that have only failures under β, kept where there is a success
    retried, fresh v.  both
    all fresh          8 new ones of the pool, 32 of validation: --refresh-every
    unsolved           β's, without prompts that 8 new trajectories find solved, or without a success
    truth              the other truth

Second table: what each arm of the study chose for a stage, measured by the truth of its own policy.

Prints both and writes docs/why.json, which holds a part for each world.
"""

import json
import shlex
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import ablate  # before all that imports torch
import numpy as np
import typer
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import cropi  # noqa: E402
import project  # noqa: E402
import rollout  # noqa: E402

select = cropi.select
ARMS = ("static", "influence", "retry", "refresh")  # of the study
STAGES = (2, 3, 5, 8)
CODE = {"why": rollout.code_digest(__file__)}


class World:
    """The data of a world, the options that rollout.py has there, and its initial model."""

    def __init__(self, name: str):
        command = typer.main.get_command(cropi.app).commands["run"]
        options = command.make_context("run", shlex.split(ablate.WORLDS[name])).params
        self.model, self.settings = options["model"], cropi.parse_settings(options["assignments"] or [])
        valid = cropi.set_names(options["valid"], "valid-")
        self.sets = {"train": options["pool"]} | {f"valid-{name}": source for name, source in valid.items()}
        self.rows = rollout.load_prompts(self.sets["train"])

    def sample(self, folder: Path, model: Path, samples: dict[str, int], seed: int) -> dict[str, Path]:
        """New trajectories of some of the sets: name -> folder."""
        folders = {name: folder / f"{name}-{count}-{seed}" for name, count in samples.items()}
        for name, out in folders.items():
            options = self.settings["rollout"] | {"samples": samples[name]}
            rollout.rollout(out=out, model=model, data=self.sets[name], seed=seed, **options)
        return folders

    def choose(self, folder: Path, model: Path, stored: dict[str, Path], seed: int) -> tuple[np.ndarray, np.ndarray]:
        """The choice (n,) by these trajectories, and the pool's inner products with the sets (N, V), 0 where dead."""
        gradients = {name: folder / f"gradients-{name}" for name in self.sets}
        for name, out in gradients.items():
            options = {"halves": 0, "seed": seed} | self.settings["project"]
            project.project(trajectories=stored[name], out=out, model=model, **options)
        pool, valid = gradients["train"], [gradients[name] for name in self.sets if name != "train"]
        inputs = {"data": self.sets["train"], "trajectories": stored["train"], "gradients": pool}
        select.select(out=folder / "selection.safetensors", valid_gradients=valid, **inputs)
        chosen, record = rollout.load(folder / "selection.safetensors", "selection")
        valid = {name: gradients[f"valid-{name}"] for name in record["facts"]["valid"]}
        known, _ = select.of_gradients(pool, valid, len(self.rows))
        for out in gradients.values():
            shutil.rmtree(out)  # there are dozens of them, and each holds a number of k for every live prompt
        return chosen["ranked"], np.nan_to_num(known["inner"])


def mix(out: Path, stored: Path, fresh: Path, taken: Iterable[int], dropped: Iterable[int] = ()) -> Path:
    """The stored groups, but the fresh ones of the prompts `taken`, and none of those `dropped`."""
    for path in rollout.shards(stored, "trajectories"):
        parts = [rollout.load_trajectories(folder / path.name)[0] for folder in (stored, fresh)]
        old, new = (np.isin(part.prompt_index, list(taken)) for part in parts)
        old |= np.isin(parts[0].prompt_index, list(dropped))
        made = rollout.join([parts[0].take(np.flatnonzero(~old)), parts[1].take(np.flatnonzero(new))])
        recipe = rollout.peek(fresh / path.name)["recipe"]
        recipe |= {"code": recipe["code"] | CODE}
        rollout.save(out / path.name, made.tensors(), recipe, rollout.facts(0.0, sampled=0, **made.counts()))
    return out


def pool_of(folder: Path) -> rollout.Trajectories:
    return rollout.join([rollout.load_trajectories(path)[0] for path in rollout.shards(folder, "trajectories")])


def truths_of(world: World, folder: Path, model: Path, fresh: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Two choices, with the inner products that they were made by; kept in a file, since they take minutes."""
    file, truths = folder / f"truths-{fresh}.npz", []
    if file.exists():
        kept = np.load(file)
        return [(kept[f"ranked{number}"], kept[f"inner{number}"]) for number in (0, 1)]
    for number in (0, 1):
        place = folder / f"truth-{number}"
        stored = world.sample(place, model, dict.fromkeys(world.sets, fresh), seed=10_000 + number)
        truths.append(world.choose(place, model, stored, seed=1 + number))
    for number in (0, 1):
        shutil.rmtree(folder / f"truth-{number}")
    arrays = {f"ranked{n}": ranked for n, (ranked, _) in enumerate(truths)}
    arrays |= {f"inner{n}": inner for n, (_, inner) in enumerate(truths)}
    with rollout.new_file(file) as temporary, open(temporary, "wb") as handle:
        np.savez(handle, **arrays)
    return truths


def measured(choice: np.ndarray, truths: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, float]:
    """`found` and `gain` of a choice, as the head of this file has them.

    >>> a, b = np.array([[3.0], [1.0], [0.0]]), np.array([[2.0], [2.0], [0.0]])  # inner products of three prompts
    >>> measured(np.array([1, 2]), [(np.array([0, 1]), a), (np.array([0, 1]), b)])  # 1 of 4, and 2 of 4
    {'found': 0.5, 'gain': 0.375}
    """
    (first, by_first), (second, by_second) = truths
    best = by_second[first].sum(), by_first[second].sum()
    gains = by_second[choice].sum() / best[0], by_first[choice].sum() / best[1]
    return {
        "found": float(np.mean([select.overlap(truth, choice) for truth in (first, second)])),
        "gain": float(np.mean(gains)),
    }


def estimators(world: World, run: Path, stage: int, folder: Path, fresh: int) -> dict[str, dict[str, float]]:
    """First table, for the policy of a run after a stage."""
    model, stored = run / f"stage-{stage:02d}/model", {name: run / "rollouts" / name for name in world.sets}
    truths = truths_of(world, folder, model, fresh)
    valid = [name for name in world.sets if name != "train"]
    eight = world.sample(folder, model, dict.fromkeys(world.sets, 8), seed=20_000)
    thirty = world.sample(folder, model, dict.fromkeys(valid, 32), seed=20_001)
    retried, options = folder / "train-retried", world.settings["rollout"] | {"samples": 4}
    out = {"out": retried, "retry": stored["train"], "seed": 20_002}
    rollout.rollout(model=model, data=world.sets["train"], **out, **options)
    before, now = pool_of(stored["train"]), pool_of(eight["train"])
    live = before.prompt_index[before.live()]
    rate = now.rewards.mean(1)
    settled = now.prompt_index[(rate == 0) | (rate == 1)]
    new_valid = {name: eight[name] for name in valid}
    ways = {
        "stored": stored,
        "fresh validation": stored | new_valid,
        "fresh live": stored | {"train": mix(folder / "mixed-live", stored["train"], eight["train"], live)},
        "retried": stored | {"train": retried},
        "retried, fresh v.": stored | new_valid | {"train": retried},
        "all fresh": eight | thirty,
        "unsolved": stored | {"train": mix(folder / "mixed-unsolved", stored["train"], eight["train"], (), settled)},
    }
    found = {name: measured(world.choose(folder / name, model, way, seed=3)[0], truths) for name, way in ways.items()}
    (first, _), (second, _) = truths
    found["truth"] = {"found": select.overlap(first, second), "gain": 1.0}
    return found


app = typer.Typer(**rollout.PLAIN)


@app.command(help=__doc__.splitlines()[0])
def why(
    world: Annotated[str, typer.Option(help="toy or curriculum.")] = "toy",
    seed: Annotated[int, typer.Option(min=0, help="Of the runs.")] = 0,
    fresh: Annotated[int, typer.Option(min=2, help="Trajectories per prompt of a truth.")] = 32,
    stages: Annotated[list[int], typer.Option(help="Of the first table: policies after so many stages.")] = [2, 4],
    runs: Annotated[
        Path, typer.Option(help="Folder of the runs WORLD/ARM-SEED, which are made if they are missing.")
    ] = Path("runs/why"),
    out: Annotated[Path, typer.Option(help="File to write.")] = ROOT / "docs/why.json",
) -> None:
    here, runs = World(world), runs / world
    missing = [name for name in ARMS if not (runs / f"{name}-{seed}/report.json").exists()]
    if missing:
        arms = [f"{name}={ablate.STUDY[name]}" for name in missing]
        ablate.ablate([], arms, 1, first_seed=seed, world=world, out=runs)
    work = runs / f"truth-{seed}"
    table: dict[str, dict] = {}
    for s in tqdm(stages, desc="estimators", unit="policy", disable=None):
        of_policy = estimators(here, runs / f"influence-{seed}", s, work / f"after-{s}", fresh)
        for name, values in of_policy.items():
            table.setdefault(name, {})[f"after {s} stages"] = values
    by_arm = {name: {} for name in ARMS}
    for name, s in tqdm([(name, s) for name in ARMS for s in STAGES], desc="arms", unit="policy", disable=None):
        run = runs / f"{name}-{seed}"
        truths = truths_of(here, work / f"{name}-{s}", run / f"stage-{s - 1:02d}/model", fresh)
        path = run / f"stage-{1 if name == 'static' else s:02d}/selection.safetensors"
        by_arm[name][f"stage {s}"] = measured(rollout.load(path, "selection")[0]["ranked"], truths)
    made = json.loads(out.read_text()) if out.exists() else {}
    with rollout.new_file(out) as temporary:
        text = json.dumps(made | {world: {"seed": seed, "fresh": fresh, "estimators": table, "arms": by_arm}}, indent=1)
        temporary.write_text(text + "\n")
    for part in (table, by_arm):
        columns = list(next(iter(part.values())))
        print("\n| | " + " | ".join(columns) + " |\n|" + "---|" * (1 + len(columns)))
        for name, row in part.items():
            print(f"| {name} | " + " | ".join(f"{row[c]['found']:.2f}, {row[c]['gain']:.2f}" for c in columns) + " |")


if __name__ == "__main__":
    rollout.command_line(app)
