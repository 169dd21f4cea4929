"""What makes scoring pay for itself? Ways to make it cheaper, or better at no extra rollout, each as an arm of a study.

    python bench/tries.py                 # about 25 minutes on two cores; the same command resumes
    python bench/compare.py runs/tries

Most are options of cropi.py (ARMS). Five change what is scored (VARIANTS). They have a loop of their own, `curriculum`,
which calls the same stage functions as cropi.py's and differs from it in one line: before every stage, the variant says
which trajectories the stage is scored with. That is also how to try an idea of your own. A variant that makes
trajectories writes them as rollout.py does, with a recipe of their own, so that they are resumed by the same rule.
"""

import inspect
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Annotated

import ablate  # before all that imports torch
import numpy as np
import typer

import cropi
import rollout
import train
from rollout import Trajectories, require

ARMS = {  # to be compared with 8 stages of 20 steps, or with their first 80 steps
    "full": "--set train.steps=20 --selector full",
    "influence": "--set train.steps=20",
    "rollout-4": "--set train.steps=20 --stages 4 --set rollout.samples=4",
    "valid-8": "--set train.steps=20 --set valid.samples=8",
    "steps-10": "--set train.steps=10",
    "steps-40": "--set train.steps=40 --stages 4",
    "valid-8-steps-40": "--set train.steps=40 --stages 4 --set valid.samples=8",
}
CODE = {"tries": rollout.code_digest(__file__)}
Group = tuple[Trajectories, int]  # the K trajectories of prompt n of a table


# ---------------------------------------------------------------------------------------------------------------------
# Trajectories made of others


def join(groups: list[Group], empty: Trajectories) -> Trajectories:
    """One table from groups of many, in their order; `empty` is a table to take no rows from."""
    parts = [empty.take(np.array([], int)), *(stored.take(np.array([n])) for stored, n in groups)]
    return Trajectories(**cropi.select.join([part.tensors() for part in parts]))


def save_shard(path: Path, made: Trajectories, recipe: dict, clock: float) -> None:
    """They were sampled before, and paid for then: only the seconds since `clock` are new."""
    about = {"trajectories": 0, "sampled": 0, "tokens": 0, "rewards": 0.0, "truncated": 0.0, "live": len(made.live())}
    rollout.save(path, made.tensors(), recipe, rollout.facts(time.perf_counter() - clock, **about))


def rewrite(source: Path, out: Path, change: Callable[[Trajectories], Trajectories], variant: dict, **inputs) -> None:
    """A folder of trajectories from another one, shard by shard. `variant` and `inputs` are what `change` depends on
    beside them."""
    for path in rollout.shards(source, "trajectories"):
        clock, made = time.perf_counter(), rollout.peek(path)
        recipe = made["recipe"] | {"code": made["recipe"]["code"] | CODE}
        recipe["inputs"] = recipe["inputs"] | inputs
        recipe["shard"] = recipe["shard"] | {"trajectories": made["identity"]}
        recipe["options"] = recipe["options"] | variant
        if not rollout.is_made(out / path.name, recipe):
            save_shard(out / path.name, change(rollout.load_trajectories(path)[0]), recipe, clock)


# ---------------------------------------------------------------------------------------------------------------------
# The variants: which trajectories is stage s scored with? Each returns folders by name, train and valid-*.


def stored_folders(run: cropi.Run) -> dict[str, Path]:
    """β's trajectories: what cropi.py scores every stage with."""
    return {name: run.out / "rollouts" / name for name in run.sets(cropi.select.TRAJECTORIES)}


def thinned(run: cropi.Run, s: int, keep: np.ndarray, variant: dict) -> dict[str, Path]:
    """Those of a part of the pool: what is left out has no trajectory, so that it is not live."""
    stored = stored_folders(run)
    out = run.stage(s) / "rollouts" / "train"
    rewrite(stored["train"], out, lambda t: t.take(np.flatnonzero(np.isin(t.prompt_index, keep))), variant)
    return stored | {"train": out}


def screened(run: cropi.Run, s: int, policy: Path, seed: int) -> dict[str, Path]:
    """The half of the live prompts whose pass rate is nearest to 1/2."""
    off = {}  # live prompt -> how far its pass rate is from 1/2
    for path in rollout.shards(stored_folders(run)["train"], "trajectories"):
        pool, _ = rollout.load_trajectories(path)
        rates = np.abs(pool.rewards.mean(1) - 0.5)
        off |= {int(pool.prompt_index[n]): rates[n] for n in pool.live()}
    nearest = sorted(off, key=off.get)[: len(off) // 2]
    return thinned(run, s, np.array(nearest), {"variant": "screened"})


def random_half(run: cropi.Run, s: int, policy: Path, seed: int) -> dict[str, Path]:
    """A random half of the pool, another one every stage."""
    count = len(rollout.load_prompts(run.pool))
    keep = np.random.default_rng(seed).permutation(count)[: count // 2]
    return thinned(run, s, keep, {"variant": "random-half", "variant_seed": seed})


def fresh_validation(run: cropi.Run, s: int, policy: Path, seed: int) -> dict[str, Path]:
    """The validation sets sampled anew before every stage but the first, the pool never."""
    folders = stored_folders(run)
    for name, (use, source) in run.sets(cropi.select.TRAJECTORIES).items():
        if s > 1 and name != "train":
            folders[name] = run.stage(s) / "rollouts" / name
            cropi.call("rollout", model=policy, data=source, out=folders[name], seed=seed, **run.settings[use])
    return folders


def own_trajectories(run: cropi.Run, s: int, policy: Path, seed: int) -> dict[str, Path]:
    """The last group that training sampled for a prompt takes the place of the stored one."""
    stored = stored_folders(run)
    if s == 1:
        return stored
    latest: dict[int, Group] = {}
    identities = []
    for before in range(1, s):
        for path in rollout.shards(run.stage(before) / "trained", "trajectories"):  # step after step
            trained, record = rollout.load_trajectories(path)
            latest |= {int(i): (trained, n) for n, i in enumerate(trained.prompt_index)}
            identities.append(record["identity"])
    samples = {trained.samples for trained, _ in latest.values()}

    def replaced(pool: Trajectories) -> Trajectories:
        require(samples == {pool.samples}, "own-trajectories needs rollout.samples and train.samples to be the same")
        return join([latest.get(int(i), (pool, n)) for n, i in enumerate(pool.prompt_index)], pool)

    out = run.stage(s) / "rollouts" / "train"
    rewrite(stored["train"], out, replaced, {"variant": "own-trajectories"}, trained=rollout.digest(*identities))
    return stored | {"train": out}


def due(seed: int, prompt: int, stage: int) -> bool:
    """Is a prompt that has had nothing but failures tried again before this stage? After m tries in vain, of which the
    stored group is the first, with probability 1/m."""
    vain, tried = 1, False
    for s in range(2, stage + 1):
        tried = np.random.default_rng([seed, prompt, s]).random() < 1 / vain
        vain += tried
    return bool(tried)


def retry_thinned(run: cropi.Run, s: int, policy: Path, seed: int) -> dict[str, Path]:
    """`--retry-failed 4`, but the more often a prompt was tried in vain, the less often it is tried again."""
    folders, failures, code = stored_folders(run), Trajectories.failures, rollout.CODE
    for before in range(2, s + 1):
        source, folders["train"] = folders["train"], run.stage(before) / "rollouts" / "train"
        if before == s:

            def thinned_failures(t: Trajectories) -> np.ndarray:
                return np.array([n for n in failures(t) if due(run.seed, int(t.prompt_index[n]), s)], int)

            Trajectories.failures, rollout.CODE = thinned_failures, code | CODE
            try:
                how = run.settings["rollout"] | {"samples": 4}
                cropi.call("rollout", model=policy, data=run.pool, retry=source, out=folders["train"], seed=seed, **how)
            finally:
                Trajectories.failures, rollout.CODE = failures, code
    return folders


VARIANTS = {  # name of the arm -> which trajectories, number of stages
    "screened": (screened, 4),
    "random-half": (random_half, 4),
    "fresh-validation": (fresh_validation, 8),
    "own-trajectories": (own_trajectories, 8),
    "retry-thinned": (retry_thinned, 8),
}


# ---------------------------------------------------------------------------------------------------------------------
# Their loop


def curriculum(run: cropi.Run, stages: int, variant: str) -> Iterator[int]:
    """As in cropi.py, with `influence`. Yields 0 before the first stage and s after stage s."""
    policy, optimizer, selection = run.model, None, None
    cropi.sample(run, policy, run.out / "rollouts", run.seed)
    cropi.evaluate(run, policy, run.out / "rollouts")
    yield 0
    for s in range(1, stages + 1):
        stage, seed = run.stage(s), 1000 * run.seed + s - 1
        stored = VARIANTS[variant][0](run, s, policy, seed)
        gradients = {name: stage / f"gradients-{name}" for name in stored}
        for name, out in gradients.items():
            options = run.settings["project"]
            cropi.call("project", model=policy, trajectories=stored[name], out=out, seed=seed, **options)
        previous, selection = selection, stage / "selection.safetensors"
        cropi.call(
            "select",
            data=run.pool,
            trajectories=stored["train"],
            gradients=gradients.pop("train"),
            valid_gradients=list(gradients.values()),
            previous=previous,
            out=selection,
            **{"frac": run.frac, "stage": s, "seed": seed} | run.settings["select"],
        )
        start = {"model": policy, "initial_model": run.model, "optimizer": optimizer}
        start |= {"data": run.pool, "selection": selection, "out": stage, "seed": seed}
        own = variant == "own-trajectories"
        with keep_trajectories(stage / "trained", run, policy, selection) if own else nullcontext():
            cropi.call("train", **start, **run.settings["train"])
        policy, optimizer = stage / "model", stage / "optimizer"
        cropi.evaluate(run, policy, stage)
        if s > run.keep_states:
            train.remove(run.stage(s - run.keep_states) / optimizer.name)
        yield s


@contextmanager
def keep_trajectories(folder: Path, run: cropi.Run, policy: Path, selection: Path) -> Iterator[None]:
    """While the block runs, what training samples is stored, a shard for every step, before the step is made: so a
    stage that is resumed from its checkpoint has those of all its steps."""
    sample = rollout.sample_trajectories
    steps = inspect.signature(train.train).parameters["steps"].default
    options = {"steps": steps} | run.settings["train"]
    inputs = {"model": rollout.model_identity(policy), "data": rollout.load_prompts(run.pool).digest}
    inputs["selection"] = rollout.peek(selection)["identity"]

    def sampled(*given, **checks) -> Trajectories:
        clock, o, (seed, step) = time.perf_counter(), checks["o"], checks["seed"]
        made = sample(*given, **checks)
        used = {name: getattr(o, name) for name in ("samples", "max_tokens", "temperature")} | {"seed": seed}
        recipe = rollout.make_recipe("trajectories", cropi.CODE | CODE, options | used, **inputs)
        recipe["shard"] = {"number": step, "of": options["steps"]}
        path = folder / f"{step:05d}.safetensors"
        if not rollout.is_made(path, recipe):
            save_shard(path, made, recipe, clock)
        return made

    rollout.sample_trajectories = sampled
    try:
        yield
    finally:
        rollout.sample_trajectories = sample


def follow(
    variant: str,
    out: Path,
    seed: int,
    stages: int,
    model: Path = rollout.TOY / "model",
    pool: str = cropi.TOY_POOL,
    valid: list[str] = cropi.TOY_VALID,
    test: list[str] = cropi.TOY_TEST,
    assignments: tuple[str, ...] = ("train.steps=20",),
) -> None:
    """One run of a variant, with the files that cropi.py writes and compare.py reads."""
    settings, prompts = cropi.parse_settings(list(assignments)), rollout.load_prompts(pool)
    sets = {"valid": cropi.set_names(valid, "valid-"), "test": cropi.set_names(test, "test-")}
    run = cropi.Run(
        out=out,
        model=model,
        pool=pool,
        **sets,
        selector="influence",
        frac=0.1,
        static=False,
        refresh_every=0,
        retry_failed=0,
        retry_every=1,
        seed=seed,
        keep_states=1,
        settings=settings,
    )
    targeted = [name for name in run.test if name in run.valid]
    rollout.check_out(out)
    with cropi.locked(out):
        recipe, begun = cropi.run_recipe(run, prompts), out / "run.safetensors"
        recipe["code"] = recipe["code"] | CODE
        recipe["options"] = recipe["options"] | {"variant": variant}
        if not rollout.is_made(begun, recipe):
            rollout.save(begun, {}, recipe, rollout.facts(0.0))
        entries: list[dict] = []
        for s in curriculum(run, stages, variant):
            entries.append(cropi.report_stage(run, s, entries[-1]["steps"] if s else 0))
            print(f"{f'stage {s} of {stages}' if s else 'before training'}: {cropi.accuracies(entries[-1])}")
        report = {"selector": run.selector, "seed": seed, "targeted": targeted, "evaluations": entries}
        with rollout.new_file(out / "report.json") as temporary:
            temporary.write_text(json.dumps(report, indent=1) + "\n")
        cropi.print_table(entries, targeted)


app = typer.Typer(**rollout.PLAIN)


@app.command(help=__doc__.splitlines()[0])
def tries(
    seeds: Annotated[int, typer.Option(min=1, help="Seeds 0, 1, ...")] = 3,
    only: Annotated[list[str] | None, typer.Option(help="One of the arms; repeat.  [default: all]")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the study.")] = Path("runs/tries"),
) -> None:
    names = only or [*ARMS, *VARIANTS]
    strange = ", ".join(set(names) - {*ARMS, *VARIANTS})
    require(not strange, f"--only {strange}: no such arm; there are {', '.join([*ARMS, *VARIANTS])}")
    for seed in range(seeds):  # all arms of a seed before the next; what is there is not made again
        if arms := [f"{name}={options}" for name, options in ARMS.items() if name in names]:
            ablate.ablate([], arms, seeds=seed + 1, out=out)
        for name in VARIANTS:
            if name in names:
                out.mkdir(parents=True, exist_ok=True)
                with open(out / f"{name}-{seed}.log", "a") as log, redirect_stdout(log), redirect_stderr(log):
                    follow(name, out / f"{name}-{seed}", seed, VARIANTS[name][1])
                print(f"{out / f'{name}-{seed}'}: done")


if __name__ == "__main__":
    rollout.command_line(app)
