"""Does influence help? Influence against full data and random choice, at the defaults, for three seeds.

    python bench/learning.py            # nine runs, about ten minutes on two cores

Runs (or goes on with, or reuses) `cropi.py run --selector S --seed N` in runs/S-N, then writes docs/learning.json and
docs/learning.png and prints the table: targeted accuracy (the mean of the targeted test sets) at the start and at the
end, and averaged over all evaluations of the run, the start included.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
SELECTORS = ("influence", "full", "random")


def accuracy(report: dict, targeted: bool) -> list[float]:
    """Mean accuracy over the targeted or the other test sets, evaluation by evaluation."""
    return [
        float(np.mean([value for name, value in e["accuracy"].items() if (name in report["targeted"]) == targeted]))
        for e in report["evaluations"]
    ]


def draw(reports: dict[str, list[dict]]) -> None:
    figure = Figure(figsize=(9, 3.6), layout="tight")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, targeted, title in zip(axes, (True, False), ("targeted families", "other families"), strict=True):
        for color, (selector, runs) in enumerate(reports.items()):
            for number, report in enumerate(runs):
                steps = [e["steps"] for e in report["evaluations"]]
                label = selector if number == 0 else None
                axis.plot(steps, accuracy(report, targeted), color=f"C{color}", label=label, alpha=0.8)
        axis.set(title=title, xlabel="training steps", ylim=(0, 1))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("test accuracy")
    axes[0].legend(title=f"{len(runs)} seeds each")
    figure.savefig(ROOT / "docs" / "learning.png", dpi=120)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs", help="folder of the runs")
    arguments = parser.parse_args()
    reports: dict[str, list[dict]] = {selector: [] for selector in SELECTORS}
    table = []
    for seed in range(arguments.seeds):
        for selector in SELECTORS:
            out = arguments.runs / f"{selector}-{seed}"
            options = ["--selector", selector, "--seed", str(seed), "--out", str(out)]
            print(f"{selector}, seed {seed}: {out}", file=sys.stderr)
            command = [sys.executable, str(ROOT / "cropi.py"), "run", *options]
            subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
            reports[selector].append(json.loads((out / "report.json").read_text()))
            curve = accuracy(reports[selector][-1], targeted=True)
            table.append(
                {"seed": seed, "selector": selector, "start": curve[0], "end": curve[-1], "mean": float(np.mean(curve))}
            )
    print("| seed | selector | start | end | mean over the run |\n|---|---|---|---|---|")
    for row in table:
        print(f"| {row['seed']} | {row['selector']} | {row['start']:.3f} | {row['end']:.3f} | {row['mean']:.3f} |")
    (ROOT / "docs" / "learning.json").write_text(json.dumps(table, indent=1) + "\n")
    draw(reports)
