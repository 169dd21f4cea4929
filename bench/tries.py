"""What makes scoring pay for itself? Ways to make it cheaper, or better at no extra rollout, each as an arm of a study.

    python bench/tries.py                 # about 25 minutes on two cores; goes on where it was stopped
    python bench/compare.py runs/tries

Most are options of cropi.py (ARMS). Four change what is scored, and stand here as subclasses of cropi.Curriculum, which
is also how to try an idea of your own: `offline_rollouts`, asked for before every stage, writes the trajectories that
the stage is scored with.
"""

import os
import shutil
import time
from pathlib import Path
from typing import Annotated, ClassVar

import ablate  # before all that imports torch
import numpy as np
import typer

import cropi
import train
from rollout import TENSORS, Trajectories, Unfinished, command_line, new_app, open_trajectories, require, save_tensors

ARMS = {  # to be compared with 8 stages of 20 steps, or with their first 80 steps
    "full": "--set train.steps=20 --selector full",
    "influence": "--set train.steps=20",
    "rollout-4": "--set train.steps=20 --stages 4 --set rollout.samples=4",
    "valid-8": "--set train.steps=20 --set valid.samples=8",
    "steps-10": "--set train.steps=10",
    "steps-40": "--set train.steps=40 --stages 4",
    "valid-8-steps-40": "--set train.steps=40 --stages 4 --set valid.samples=8",
}
Curriculum = cropi.Curriculum
Groups = dict[int, tuple[Trajectories, range]]  # prompt_index -> where its trajectories are


def groups_of(path: Path) -> Groups:
    stored = open_trajectories(path)
    return {i: (stored, rows) for i, rows in stored.groups().items()}


def save_groups(path: Path, groups: Groups, metadata: dict) -> None:
    """One trajectory file from groups of many."""
    parts = [groups[i] for i in sorted(groups)]

    def rows(name: str) -> np.ndarray:
        return np.concatenate([getattr(stored, name)[rows.start : rows.stop] for stored, rows in parts])

    tensors = {name: rows(name) for name in ("prompt_length", "rewards", "prompt_index", "truncated")}
    for name, offsets in (("tokens", "offsets"), ("behavior_logps", "logp_offsets")):
        spans = [(stored, getattr(stored, offsets)[[r.start, r.stop]]) for stored, r in parts]
        tensors[name] = np.concatenate([getattr(stored, name)[slice(*span)] for stored, span in spans])
    lengths = [np.diff(stored.offsets[r.start : r.stop + 1]) for stored, r in parts]
    tensors["offsets"] = np.concatenate([[0], *lengths]).cumsum().astype(np.int64)
    save_tensors(path, "trajectories", {name: np.ascontiguousarray(tensors[name]) for name in TENSORS}, metadata)


class Thinned(Curriculum):
    """Scores a part of the pool. What is left out keeps one trajectory a prompt, so that it is not live."""

    def keep(self, stage: int, pool: Trajectories) -> set[int]:
        raise NotImplementedError

    def offline_rollouts(self, stage: int) -> dict:
        first, folder = self.trajectories(0), self.trajectories(stage)
        cost = {"seconds_rollout": 0.0, "trajectories_offline": 0} if stage else super().offline_rollouts(0)
        clock = time.perf_counter()
        folder.mkdir(parents=True, exist_ok=True)
        if stage == 0:
            os.replace(first / "train.safetensors", first / "all.safetensors")
        for name in self.valid_files() if stage else ():
            shutil.copy(first / f"{name}.safetensors", folder)
        groups = groups_of(first / "all.safetensors")
        pool = next(iter(groups.values()))[0]
        keep = self.keep(stage, pool)
        groups = {i: (pool, rows if i in keep else rows[:1]) for i, (_, rows) in groups.items()}
        save_groups(folder / "train.safetensors", groups, pool.metadata)
        return cost | {"seconds_rollout": cost["seconds_rollout"] + time.perf_counter() - clock}


class Screened(Thinned):
    """The half of the live prompts whose pass rate is nearest to 1/2."""

    def keep(self, stage: int, pool: Trajectories) -> set[int]:
        rates, live = pool.pass_rates(), list(pool.live_groups())
        return set(sorted(live, key=lambda i: abs(rates[i] - 0.5))[: len(live) // 2])


class RandomHalf(Thinned):
    """A random half of the pool, another one every stage."""

    def keep(self, stage: int, pool: Trajectories) -> set[int]:
        prompts = pool.metadata["prompts"]
        return set(np.random.default_rng(self.stage_seed(stage)).permutation(prompts)[: prompts // 2].tolist())


class FreshValidation(Curriculum):
    """Samples the validation sets anew before every stage, the pool never."""

    def offline_rollouts(self, stage: int) -> dict:
        if stage == 0:
            return super().offline_rollouts(0)
        clock, count = time.perf_counter(), 0
        self.trajectories(stage).mkdir(parents=True, exist_ok=True)
        shutil.copy(self.trajectories(0) / "train.safetensors", self.trajectories(stage))
        for name, data in self.valid_files().items():
            out, options = self.trajectories(stage) / f"{name}.safetensors", self.settings["valid"]
            model, seed = self.policy(stage), self.stage_seed(stage)
            count += len(cropi.call("rollout", model=model, data=data, out=out, seed=seed, **options).rewards)
        return {"seconds_rollout": time.perf_counter() - clock, "trajectories_offline": count}


class OwnTrajectories(Curriculum):
    """The last group that training sampled for a prompt takes the place of the stored one."""

    latest: ClassVar[Groups] = {}  # of the stage in training

    def train(self, stage: int) -> dict:
        self.latest.clear()
        kept = not Unfinished.folder_of(self.folder(stage) / "model").exists()
        log = super().train(stage)
        kept &= bool(self.latest) or (self.folder(stage) / "trained.safetensors").is_file()
        require(kept, f"{self.out}: killed at a moment that this try cannot go on from; remove it")
        metadata = open_trajectories(self.trajectories(0) / "train.safetensors").metadata
        if self.latest:
            save_groups(self.folder(stage) / "trained.safetensors", self.latest, metadata)
        return log

    def offline_rollouts(self, stage: int) -> dict:
        if stage == 0:
            return super().offline_rollouts(0)
        clock, first, folder = time.perf_counter(), self.trajectories(0), self.trajectories(stage)
        folder.mkdir(parents=True, exist_ok=True)
        groups = groups_of(first / "train.safetensors")
        metadata = next(iter(groups.values()))[0].metadata
        for before in range(stage):
            groups |= groups_of(self.folder(before) / "trained.safetensors")
        save_groups(folder / "train.safetensors", groups, metadata)
        for name in self.valid_files():
            shutil.copy(first / f"{name}.safetensors", folder)
        return {"seconds_rollout": time.perf_counter() - clock, "trajectories_offline": 0}


VARIANTS = {  # name of the arm -> class and stages
    "screened": (Screened, 4),
    "random-half": (RandomHalf, 4),
    "fresh-validation": (FreshValidation, 8),
    "own-trajectories": (OwnTrajectories, 8),
}


def keep_latest(sample):
    """train.py's sampling, which notes what it sampled."""

    def sampled(*args, **options) -> Trajectories:
        trajectories = sample(*args, **options)
        OwnTrajectories.latest |= {i: (trajectories, rows) for i, rows in trajectories.groups().items()}
        return trajectories

    return sampled


app = new_app()


@app.command(help=__doc__.splitlines()[0])
def tries(
    seeds: Annotated[int, typer.Option(min=1, help="Seeds 0, 1, ...")] = 3,
    only: Annotated[list[str] | None, typer.Option(help="One of the arms; repeat.  [default: all]")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the study.")] = Path("runs/tries"),
) -> None:
    names = only or [*ARMS, *VARIANTS]
    strange = ", ".join(set(names) - {*ARMS, *VARIANTS})
    require(not strange, f"--only {strange}: no such arm; there are {', '.join([*ARMS, *VARIANTS])}")
    train.sample_trajectories = keep_latest(train.sample_trajectories)
    for runs in range(1, seeds + 1):  # all arms of a seed before the next; what is done is passed over
        if arms := [f"{name}={options}" for name, options in ARMS.items() if name in names]:
            cropi.Curriculum = Curriculum
            ablate.ablate([], arms, seeds=runs, out=out)
        for name in VARIANTS:
            if name in names:
                cropi.Curriculum, stages = VARIANTS[name]
                options = f"--refresh-every 1 --stages {stages} --set train.steps=20"
                ablate.ablate([], [f"{name}={options}"], seeds=runs, out=out)


if __name__ == "__main__":
    command_line(app)
