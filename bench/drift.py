"""Is the ranking by stored trajectories still that of the current policy? Estimator by estimator, stage by stage.

    python bench/drift.py            # about an hour on two cores; needs (or first makes) its runs

For the policies after 0, 1, 2, 4 and 8 stages of 20 steps: the prompts that influence selects (240 of 2,400)
from the first policy's trajectories, for each of project.py's `--ratio`, are compared with those that it selects from
fresh trajectories of the policy itself, many of them (`--fresh` for each training and validation prompt), twice:

    agreement   share of the selection that is in a fresh one; mean over the two fresh ones
    ceiling     the same between the two fresh selections, each as noisy as the other
    refreshed   the same for 8 fresh trajectories per training prompt and 32 per validation prompt: what
                `cropi.py run --refresh-every` would have, drift gone and the sampling noise still there
    chance      the same for a random choice from the prompts that are live under the stored trajectories
    reachable   share of the fresh selections that is live under the stored trajectories, so that it can be chosen

The two fresh selections, the stored ones and the refreshed one have projection seeds of their own.

Writes docs/drift.png and, with the diagnostics that project.py and select.py report meanwhile, docs/drift.json.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Annotated, get_args

import numpy as np
import typer
from matplotlib.figure import Figure
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import cropi  # noqa: E402
import project  # noqa: E402
import rollout  # noqa: E402

select = cropi.select
STAGES = (0, 1, 2, 4, 8)
# label -> options of project.py
ESTIMATORS = {ratio: {"ratio": ratio} for ratio in get_args(project.Ratio)} | {
    "sequence, cap 2": {"ratio": "sequence", "cap": 2.0}
}
SETS = {"train": cropi.TOY_POOL} | {Path(path).stem: path for path in cropi.TOY_VALID}


def sample(folder: Path, model: Path, samples: dict[str, int], seed: int) -> dict[str, Path]:
    """Trajectories of the pool and of the validation sets."""
    folders = {name: folder / f"{name}-{seed}" for name in SETS}
    for name, out in folders.items():
        rollout.rollout(out=out, model=model, data=SETS[name], samples=samples[name], seed=seed)
    return folders


def choose(folder: Path, model: Path, trajectories: dict[str, Path], **options) -> tuple[np.ndarray, dict]:
    """The selection of 10% of the pool, and its diagnostics."""
    gradients = {name: folder / f"gradients-{name}" for name in SETS}
    for name, out in gradients.items():
        project.project(trajectories=trajectories[name], out=out, model=model, **options)
    out = folder / "selection.safetensors"
    select.select(
        out=out,
        data=SETS["train"],
        trajectories=trajectories["train"],
        gradients=gradients["train"],
        valid_gradients=[gradients[name] for name in SETS if name != "train"],
    )
    tensors, record = rollout.load(out, "selection")
    for gradient in gradients.values():
        shutil.rmtree(gradient)  # there are dozens of them, and each holds a number of k for every live prompt
    return tensors["ranked"], record["facts"]["diagnostics"]


def compare(run: Path, folder: Path, stage: int, seed: int, fresh: int) -> dict:
    """Agreements and diagnostics for one policy of one run."""
    model = run / f"stage-{stage:02d}" / "model" if stage else rollout.TOY / "model"
    truths = []
    for number in (0, 1):
        files = sample(folder, model, dict.fromkeys(SETS, fresh), seed=10_000 + 10 * seed + number)
        truths.append(choose(folder / f"fresh-{number}", model, files, halves=0, seed=1 + number)[0])
    agreement = {"ceiling": select.overlap(*truths)}

    def agree(chosen: np.ndarray) -> float:
        return float(np.mean([select.overlap(chosen, truth) for truth in truths]))

    stored = {name: run / "rollouts" / name for name in SETS}
    diagnostics: dict = {}
    for label, options in ESTIMATORS.items():
        chosen, reported = choose(folder / label.replace(", ", "-").replace(" ", "-"), model, stored, **options)
        agreement[label] = agree(chosen)
        diagnostics = diagnostics or reported  # those of the default
    few = {name: 8 if name == "train" else 32 for name in SETS}
    files = sample(folder, model, few, seed=20_000 + seed)
    chosen, _ = choose(folder / "refreshed", model, files, halves=0, seed=3)
    agreement["refreshed"] = agree(chosen)
    shards = [rollout.load_trajectories(path)[0] for path in rollout.shards(stored["train"], "trajectories")]
    live = np.concatenate([shard.prompt_index[shard.live()] for shard in shards])
    agreement["chance"] = float(np.mean([select.overlap(live, truth) for truth in truths]))
    agreement["reachable"] = float(np.mean([select.overlap(truth, live) for truth in truths]))
    return {"seed": seed, "stage": stage, "agreement": agreement, "diagnostics": diagnostics}


def draw(table: list[dict], fresh: int) -> None:
    figure = Figure(figsize=(11, 5.6), layout="tight")
    left, right = figure.subplots(1, 2)

    def curve(key, name):
        values = np.array([[row[key][name] for row in table if row["stage"] == stage] for stage in STAGES])
        return values.mean(1), values.min(1), values.max(1)

    for number, name in enumerate(table[0]["agreement"]):
        mean, low, high = curve("agreement", name)
        style = {"ceiling": "k-", "refreshed": "k--", "chance": "k:", "reachable": "k-."}.get(name, f"C{number}o-")
        label = {
            "ceiling": f"ceiling: {fresh} fresh against {fresh} fresh",
            "refreshed": "8 fresh trajectories (32 for validation)",
            "chance": "chance",
            "reachable": "live under the stored trajectories",
        }.get(name, f"stored, --ratio {name}".replace(", cap", " --cap"))
        left.plot(STAGES, mean, style, label=label, markersize=4)
        left.fill_between(STAGES, low, high, color=f"C{number}" if "o" in style else "k", alpha=0.1, linewidth=0)
    left.set(title="agreement with the selection from fresh trajectories", xlabel="stages trained", ylim=(0, 1))
    left.set_ylabel("share of the selection")
    for name, label in {
        "ess_token": "effective sample size of tokens",
        "valid_ess_token": "the same in validation",
        "ess_trajectory": "effective sample size of trajectories",
        "valid_ess_trajectory": "the same in validation",
        "token_kl": "KL(β‖π) per token",
        "valid_token_kl": "the same in validation",
        "split_half": "split-half top 10%",
    }.items():
        mean, low, high = curve("diagnostics", name)
        right.plot(STAGES, mean, "o-", label=label, markersize=4)
        right.fill_between(STAGES, low, high, alpha=0.1)
    right.set(title="what the scripts report meanwhile", xlabel="stages trained", ylim=(0, 1))
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2)
    figure.savefig(ROOT / "docs" / "drift.png", dpi=120)


app = typer.Typer(**rollout.PLAIN)


@app.command(help=__doc__.splitlines()[0])
def drift(
    seeds: Annotated[int, typer.Option(min=1, help="Seeds 0, 1, ...")] = 3,
    fresh: Annotated[int, typer.Option(min=1, help="Trajectories per prompt and fresh selection.")] = 32,
    runs: Annotated[Path, typer.Option(help="Folder of the runs.")] = ROOT / "runs",
) -> None:
    table = []
    pairs = [(seed, stage) for seed in range(seeds) for stage in STAGES]
    for seed, stage in tqdm(pairs, desc="drift", unit="policy"):
        run = runs / f"influence-20-steps-{seed}"
        command = [sys.executable, str(ROOT / "cropi.py"), "run", "--seed", str(seed), "--set", "train.steps=20"]
        command += ["--out", str(run)]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)  # what is there is not made again
        folder = runs / f"drift-{fresh}" / f"{seed}-{stage}"
        file = folder / "agreement.json"
        made_by = [project.CODE | select.CODE, ESTIMATORS]
        row = json.loads(file.read_text()) if file.exists() else {}
        if row.get("made_by") != json.loads(json.dumps(made_by)):
            row = compare(run, folder, stage, seed, fresh) | {"made_by": made_by}
            for path in folder.iterdir():
                shutil.rmtree(path)
            with rollout.new_file(file) as temporary:
                temporary.write_text(json.dumps(row, indent=1) + "\n")
        table.append({name: value for name, value in row.items() if name != "made_by"})
    (ROOT / "docs" / "drift.json").write_text(json.dumps({"fresh": fresh, "table": table}, indent=1) + "\n")
    draw(table, fresh)
    names = list(table[0]["agreement"])
    print("| stages | " + " | ".join(names) + " |\n|" + "---|" * (len(names) + 1))
    for stage in STAGES:
        rows = [row["agreement"] for row in table if row["stage"] == stage]
        cells = [f"{np.mean([row[name] for row in rows]):.2f}" for name in names]
        print(f"| {stage} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    rollout.command_line(app)
