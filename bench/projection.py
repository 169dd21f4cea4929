"""What the projection keeps of the ranking, and what it costs. The figure the paper's code could not draw.

    python bench/projection.py               # about forty minutes on two cores; needs (or first makes) its run
    python bench/projection.py --only speed  # or precision, or scale: one part, the others stay as they are

precision  Cosines with the mean validation gradient, from sketches, against those from exact full gradients (autograd,
           all parameters, prompt by prompt), on the policy after two stages of 20 steps, with the first policy's
           trajectories: overlap of the top 10% of the live prompts and rank correlation, means over two validation sets
           and over projection seeds. Over the sparse ratio r and the dimensions k:

    even shares      project.py's: every tensor keeps the same number of coordinates; ±1, k buckets
    same ratio       the same with every coordinate kept with probability r, the paper's M
    rows x columns   of each matrix, √r of the rows and √r of the columns
    Gaussian         dense Gaussian in float32 of coordinates kept with probability r
    float16          the same, gradients, matrix and running sums (over blocks of coordinates) rounded to float16
    first            the first coordinates instead of random ones, token embedding first: what the released code keeps

           Ours, the same ratio and rows x columns cover all but the norms; the last three cover all parameters.

speed      Milliseconds per live prompt of scoring batches with each, in alternating rounds with two plain forward +
           backward passes of the same trajectories: "repeated", every sequence with its prompt, as trainers usually lay
           them out, and "shared", train.py's own, which computes a prompt once for its K completions. "Gaussian" is
           timed for one block of coordinates, its matrix drawn anew for 32 prompts, and multiplied; added to the shared
           pass, which makes no gradients per prompt yet.
scale      project.py and select.py on synthetic trajectories, up to 50,000 prompts: seconds, peak memory.

Writes docs/projection.json and docs/projection.png and prints tables.
"""

import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import typer
from matplotlib.figure import Figure
from one_step import load_folder, ranks
from speed import best_plain, timed
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "toy")]

import make  # noqa: E402

import project  # noqa: E402
import rollout  # noqa: E402
from cropi import select  # noqa: E402
from train import collate, completion_logps, micro_batches  # noqa: E402

KS = (256, 1024, 4096, 32768)
TIMED = (1e-5, 1e-3, 0.1, 1.0)
RATIOS = (1e-5, 1e-4, 1e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0)
METHODS = ("even shares", "same ratio", "rows x columns", "Gaussian", "float16", "first", "two-sided")
CPU = torch.device("cpu")


# ---------------------------------------------------------------------------------------------------------------------
# Precision


class Exact:
    """Full gradients of the live training prompts, then the mean one of each validation set: `columns` (d, N + V)."""

    def __init__(self, run: Path, every: int):
        model, _ = rollout.load_model(run / "stage-02" / "model")
        self.sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
        self.shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        rows = [*self.gradients(model, run / "rollouts" / "train", every)]
        self.prompts = len(rows)
        for name in ("rev", "srt"):
            of_set = [*self.gradients(model, run / "rollouts" / f"valid-{name}", 1)]
            rows.append(torch.stack(of_set).mean(0))
        self.columns = torch.stack(rows, 1)
        ends = np.cumsum(list(self.sizes.values()))
        self.place = {name: slice(int(end) - size, int(end)) for (name, size), end in zip(self.sizes.items(), ends)}  # noqa: B905
        self.cosines = self.cosine(self.columns)

    @staticmethod
    def gradients(model, folder: Path, every: int):
        live = [(stored, int(n)) for stored in load_folder(folder) for n in stored.live()]
        for stored, n in tqdm(live[::every], desc=f"exact {folder.name}", unit="prompt"):
            batch = collate(stored, [(n, range(stored.samples))], model.device)
            logps, _ = completion_logps(model, batch, 1.0)
            value = project.off_policy_objective(logps, batch, "token")
            yield torch.cat([g.flatten() for g in torch.autograd.grad(value, list(model.parameters()))])

    def cosine(self, sketches: torch.Tensor) -> np.ndarray:
        """(k, N + V) -> (N, V)."""
        x = sketches.double()
        x = x / x.norm(dim=0).clamp(min=1e-300)
        return (x[:, : self.prompts].T @ x[:, self.prompts :]).numpy()

    def agreement(self, sketches: torch.Tensor) -> tuple[float, float]:
        """Overlap of the top 10% with the exact one, and rank correlation."""
        found, truth = self.cosine(sketches), self.cosines
        top = round(0.1 * len(truth))
        best = [[set(np.argsort(-c[:, v], kind="stable")[:top]) for v in range(truth.shape[1])] for c in (found, truth)]
        overlap = np.mean([len(a & b) / top for a, b in zip(*best, strict=True)])
        pairs = [(ranks(found[:, v]), ranks(truth[:, v])) for v in range(truth.shape[1])]
        return float(overlap), float(np.mean([np.corrcoef(a, b)[0, 1] if np.ptp(a) else 0.0 for a, b in pairs]))

    def sketch(self, projection: project.SparseProjection) -> torch.Tensor:
        """Of these gradients (k, N + V)."""
        sketches = torch.zeros(self.columns.shape[1], projection.k)
        for name in projection.blocks:
            gradient = self.columns[self.place[name]].T.contiguous()
            projection.add(sketches, name, gradient.view(len(gradient), self.shapes[name][0], -1))
        return sketches.T


def projection(exact: Exact, method: str, k: int, r: float, seed: int, names: list[str]) -> project.SparseProjection:
    sizes, shapes = {name: exact.sizes[name] for name in names}, {name: exact.shapes[name] for name in names}
    keep = project.keep_probability(sizes, r) if method == "even shares" else dict.fromkeys(sizes, r)
    if method == "two-sided":
        return TwoSided(shapes, k, seed)
    if method in ("even shares", "same ratio"):
        return project.SparseProjection(shapes, keep, k, seed, exact.columns)
    made = project.SparseProjection(shapes, dict.fromkeys(sizes, 1.0), k, seed, exact.columns)
    random, left = np.random.default_rng(seed), round(r * sum(sizes.values()))
    for name, (row, column, _, _, shift) in made.blocks.items():
        kept = torch.zeros(sizes[name], dtype=torch.bool)
        if method == "first":
            kept[: max(0, left)] = True
            left -= len(kept)
        else:
            shape = shapes[name]
            sides = [torch.from_numpy(random.random(n) < r ** (1 / len(shape))) for n in shape]
            kept = torch.outer(*sides).flatten() if len(sides) == 2 else sides[0]
        made.blocks[name] = row, column, kept.view(len(row), len(column)), 1.0, shift
    return made


class TwoSided:
    """Rows and columns hashed before the product of δ and the inputs, so that no (O, I) matrix is made: a count sketch
    of m rows and n columns with m·n = k, as nearly square as the matrix allows, turned by a random shift."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], k: int, seed: int):
        self.k, self.blocks, generator = k, {}, torch.Generator().manual_seed(seed)
        for name, shape in shapes.items():
            sides = [shape[0], math.prod(shape[1:])]
            narrow = 2 ** int(math.log2(min(*sides, k**0.5)))  # of the smaller side, in case it is short
            widths = [narrow, k // narrow] if sides[0] <= sides[1] else [k // narrow, narrow]
            matrices = []  # ±1 in each row: (O, m) and (I, n)
            for side, width in zip(sides, widths, strict=True):
                matrix = torch.zeros(side, width)
                sign = torch.randint(0, 2, (side,), generator=generator) * 2.0 - 1
                matrix[torch.arange(side), torch.randperm(side, generator=generator) % width] = sign
                matrices.append(matrix)
            self.blocks[name] = *matrices, int(torch.randint(0, k, (), generator=generator))

    def add(self, sketch: torch.Tensor, name: str, gradient: torch.Tensor) -> None:
        """As `SparseProjection.add`, for comparisons with exact gradients."""
        rows, columns, shift = self.blocks[name]
        sketch += (rows.T @ gradient @ columns).flatten(1).roll(shift, 1)


def gaussian(exact: Exact, seed: int) -> dict:
    """Agreement of both dense projections for every r and k. One matrix serves all: its first k rows are a projection
    to k dimensions, and its first columns, the coordinates being in random order, one of a random share of them."""
    d, count = exact.columns.shape
    order = torch.from_numpy(np.random.default_rng(seed).permutation(d))
    generators = [torch.Generator().manual_seed(1000 * seed + number) for number in range(2)]
    full, half = torch.zeros(KS[-1], count), torch.zeros(KS[-1], count, dtype=torch.half)
    matrix, found, start = torch.empty(2, KS[-1] // 2, 2048), {}, 0
    with ThreadPoolExecutor(2) as pool, tqdm(total=d, desc=f"Gaussian, seed {seed}", unit="coordinate") as bar:
        for r in RATIOS:
            stop = max(1, round(r * d))
            while start < stop:
                some = order[start : min(start + 2048, stop)]
                block = exact.columns[some]  # (c, N + V)
                list(pool.map(lambda n: matrix[n].normal_(generator=generators[n]), range(2)))
                draws = matrix.flatten(0, 1)[:, : len(some)]  # (k, c)
                full.addmm_(draws, block)
                half += (draws.half().float() @ block.half().float()).half()
                start += len(some)
                bar.update(len(some))
            for k in KS:
                found["Gaussian", r, k] = exact.agreement(full[:k])
                found["float16", r, k] = exact.agreement(half[:k].float())
    return found


def make_run(folder: Path, *options: str, stages: int = 2, lr: str = "5e-5") -> Path:
    """What is there is not made again."""
    command = [sys.executable, str(ROOT / "cropi.py"), "run", "--out", str(folder), "--stages", str(stages), *options]
    settings = ["--set", "train.steps=20", "--set", f"train.lr={lr}"]
    subprocess.run([*command, *settings], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return folder


def precision(run: Path, seeds: int, every: int) -> dict:
    exact = Exact(run, every)
    covered = [name for name in exact.sizes if "norm" not in name]
    linear = [name for name in covered if "embed" not in name]
    sets = {
        "all parameters": list(exact.sizes),
        "all but the norms": covered,
        "linear layers": linear,
        "linear layers without the output head": [name for name in linear if "lm_head" not in name],
    }
    rows = []

    def add(found: list[tuple[float, float]], **row) -> None:
        rows.append(row | {"precision": [x for x, _ in found], "rank_correlation": [x for _, x in found]})

    for label, names in sets.items():
        own = torch.cat([exact.columns[exact.place[name]] for name in names])
        add([exact.agreement(own)], method="exact", covered=label)
        for k, r in ((4096, 0.1), (4096, 1.0), (32768, 0.1), (32768, 1.0)):
            made = [projection(exact, "even shares", k, r, seed, names) for seed in range(seeds)]
            add([exact.agreement(exact.sketch(p)) for p in made], method="even shares", covered=label, k=k, r=r)
    cases = [(method, k, r) for method in METHODS if method not in ("Gaussian", "float16") for k in KS for r in RATIOS]
    cases = [case for case in cases if case[0] != "two-sided" or case[2] == 1]  # it keeps all
    for method, k, r in tqdm(cases, desc="sketches", unit="case"):
        names = sets["all parameters"] if method == "first" else covered
        made = (projection(exact, method, k, r, seed, names) for seed in range(seeds))
        add([exact.agreement(exact.sketch(p)) for p in made], method=method, k=k, r=r)
    dense = [gaussian(exact, seed) for seed in range(seeds)]
    for method, r, k in dense[0]:
        add([found[method, r, k] for found in dense], method=method, k=k, r=r)
    return {"prompts": exact.prompts, "seeds": seeds, "rows": rows}


def wide_model(folder: Path) -> Path:
    """4.5 million parameters, its width a large factor of k, trained like the toy's."""
    if not folder.exists():
        shape = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 2, "num_attention_heads": 8}
        make.warm_start(400, folder=folder, lr=1e-3, **shape)
    return folder


def two_sided(runs: Path, seeds: int, every: int) -> list[dict]:
    """Ours and the two-sided sketch over k, on policies that had no part in choosing either."""
    worlds = {f"toy, seed {seed}": (seed, rollout.TOY / "model", "5e-5") for seed in (1, 2)}
    worlds["wide"] = 0, wide_model(runs / "wide-model"), "2e-5"
    rows = []
    for label, (seed, model, lr) in worlds.items():
        run = make_run(runs / f"projection-{model.name}-{seed}", "--seed", str(seed), "--model", str(model), lr=lr)
        exact = Exact(run, every * (3 if label == "wide" else 1))
        covered = [name for name in exact.sizes if "norm" not in name]
        for method in ("even shares", "two-sided"):
            for k in tqdm(KS, desc=f"{label}, {method}", unit="k"):
                made = [projection(exact, method, k, 1.0, seed, covered) for seed in range(seeds)]
                precision, correlation = zip(*(exact.agreement(exact.sketch(p)) for p in made), strict=True)
                row = {"policy": label, "prompts": exact.prompts, "method": method, "k": k, "precision": precision}
                rows.append(row | {"rank_correlation": correlation})
        del exact
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# Speed


class TwoSidedSketcher(project.GradientSketcher):
    """Scoring with `TwoSided`."""

    def __init__(self, model, k: int, seed: int):
        super().__init__(model, k, 1.0, seed)
        self.projection = TwoSided({name: tuple(weight.shape) for name, weight in self.weights.items()}, k, seed)

    def _add(self, name: str, taken: torch.Tensor, delta: torch.Tensor) -> None:
        rows, columns, shift = self.projection.blocks[name]
        if self.weights[name].ndim == 1:
            return self.projection.add(self.sketches, name, delta.sum(1)[:, :, None])
        left, right = (delta @ rows, taken @ columns) if taken.is_floating_point() else (rows[taken], delta @ columns)
        self.sketches += (left.mT @ right).flatten(1).roll(shift, 1)


def dense_block(k: int, coordinates: int, prompts: int) -> float:
    """Milliseconds per prompt to project as many coordinates of `prompts` gradients, from the time of one block."""
    size = min(2048, coordinates)
    block = torch.randn(size, prompts)
    timed(lambda: torch.randn(k, size) @ block)
    seconds = statistics.median(timed(lambda: torch.randn(k, size) @ block) for _ in range(3))
    return 1e3 * seconds / prompts * coordinates / size


def speed(run: Path, rounds: int) -> dict:
    model_path, trajectories = run / "stage-02" / "model", run / "rollouts" / "train"
    live = sum(len(stored.live()) for stored in load_folder(trajectories))

    def policy():
        return rollout.load_model(model_path)[0]

    def score(sketcher) -> None:
        for stored in load_folder(trajectories):
            for pieces in micro_batches(stored, stored.live(), 4096):
                sketcher.sketch(collate(stored, pieces, CPU), 1.0)

    plain_model = policy()
    ways = {(f"plain, {way}",): best_plain(plain_model, trajectories, way) for way in ("repeated", "shared")}
    for k in KS:
        for r in TIMED:
            ways["even shares", k, r] = lambda sketcher=project.GradientSketcher(policy(), k, r, 0): score(sketcher)
        ways["two-sided", k, 1.0] = lambda sketcher=TwoSidedSketcher(policy(), k, 0): score(sketcher)
    seconds: dict[tuple, list[float]] = {way: [] for way in ways}
    for number in tqdm(range(rounds + 1), desc="speed", unit="round"):
        for way, work in ways.items():
            clock = time.perf_counter()
            work()
            if number:  # the first round warms up
                seconds[way].append(time.perf_counter() - clock)
    rows = []
    for way, values in seconds.items():
        row = dict(zip(("method", "k", "r"), way, strict=False))
        row["ms_per_prompt"] = 1e3 * statistics.median(values) / live
        for layout in ("repeated", "shared"):
            pairs = zip(values, seconds[(f"plain, {layout}",)], strict=True)
            row[f"over_{layout}"] = statistics.median(a / b for a, b in pairs)
        rows.append(row)
    base = next(row["ms_per_prompt"] for row in rows if row["method"] == "plain, shared")
    d = sum(p.numel() for p in plain_model.parameters())
    for k in KS:
        for r in TIMED:
            added = dense_block(k, max(1, round(r * d)), 32)
            rows.append({"method": "Gaussian", "k": k, "r": r, "ms_per_prompt": base + added})
    return {"rounds": rounds, "live_prompts": live, "rows": rows}


# ---------------------------------------------------------------------------------------------------------------------
# Scale

CHILD = """
import sys, threading, time
from pathlib import Path
folder, files = Path(sys.argv[1]), Path(sys.argv[2])
import cropi, project
import rollout
peak, done = 0, False
def watch():  # memory of its own, not the pages of files that are mapped
    global peak
    while not done:
        lines = open("/proc/self/status").read().splitlines()
        peak = max(peak, next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")))
        time.sleep(0.05)
thread = threading.Thread(target=watch, daemon=True)
thread.start()
clock = time.perf_counter()
project.project(trajectories=files / "t", out=files / "g")
projected, own = time.perf_counter(), peak
cropi.select.select(out=files / "s.safetensors", data=str(files / "d.jsonl"), trajectories=files / "t",
                    gradients=files / "g", valid_gradients=[files / "g"])
selected = time.perf_counter()
done = True
thread.join()
print(projected - clock, selected - projected, own, peak)
"""


def scale(run: Path, counts: tuple[int, ...]) -> list[dict]:
    folder = run / "rollouts" / "train"
    recipe = next(iter(rollout.shards(folder, "trajectories").values()))["recipe"]
    data, parts = rollout.load_prompts(rollout.TOY / "train.jsonl"), load_folder(folder)
    live = rollout.Trajectories(**select.join([part.take(part.live()).tensors() for part in parts]))
    rows = []
    for count in counts:
        with tempfile.TemporaryDirectory() as name:
            files = Path(name)
            places = np.resize(np.arange(len(live.prompt_index)), count)  # the live prompts, again and again
            lines = [json.dumps(data[i]) for i in live.prompt_index[places]]
            (files / "d.jsonl").write_text("\n".join(lines) + "\n")
            made = recipe | {"inputs": recipe["inputs"] | {"data": rollout.load_prompts(files / "d.jsonl").digest}}
            for path, shard in rollout.unmade(files / "t", rollout.shard_recipes(made, count, 512)).items():
                part = np.arange(shard["shard"]["first"], shard["shard"]["last"] + 1)
                laps = np.split(places[part], np.flatnonzero(np.diff(places[part]) < 0) + 1)
                table = rollout.Trajectories(**select.join([live.take(lap).tensors() for lap in laps]))
                table.prompt_index = part.astype(np.int32)
                facts = rollout.facts(0.0, **table.counts())
                rollout.save(path, table.tensors(), shard, facts)
            command = [sys.executable, "-c", CHILD, str(ROOT), str(files)]
            environment = os.environ | {"PYTHONPATH": str(ROOT)}
            ended = subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE, text=True)
            project_s, select_s, project_kb, select_kb = map(float, ended.stdout.split()[-4:])
            row = {
                "prompts": count,
                "project_ms_per_prompt": 1e3 * project_s / count,
                "select_ms_per_prompt": 1e3 * select_s / count,
                "project_peak_MB": project_kb / 1024,
                "peak_MB": select_kb / 1024,
                "gradient_file_MB": sum(path.stat().st_size for path in (files / "g").iterdir()) / 1e6,
            }
        print({name: round(value, 3) for name, value in row.items()}, flush=True)
        rows.append(row)
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# What a person looks at


def draw(result: dict) -> None:
    figure = Figure(figsize=(13, 6.4), layout="tight")
    axes = figure.subplots(2, len(KS), sharey="row", sharex=True)
    colors = dict(zip(METHODS, ("C3", "C1", "C0", "k", "0.55", "C2", "C4"), strict=True))
    for top, bottom, k in zip(*axes, KS, strict=True):
        for method in METHODS:
            rows = [row for row in result["precision"]["rows"] if row["method"] == method and row.get("k") == k]
            rows = [row for row in rows if "covered" not in row]
            mean = [np.mean(row["precision"]) for row in rows]
            style = {"marker": "o", "markersize": 3, "color": colors[method]}
            top.plot([row["r"] for row in rows], mean, label=method, **style)
            low, high = ([f(row["precision"]) for row in rows] for f in (min, max))
            top.fill_between([row["r"] for row in rows], low, high, color=colors[method], alpha=0.12, linewidth=0)
            rows = [row for row in result["speed"]["rows"] if row["method"] == method and row.get("k") == k]
            if rows:
                bottom.plot([row["r"] for row in rows], [row["ms_per_prompt"] for row in rows], label=method, **style)
        for row in result["speed"]["rows"]:
            if row["method"].startswith("plain"):
                style = "k--" if "repeated" in row["method"] else "k:"
                bottom.axhline(row["ms_per_prompt"], linestyle=style[1:], color="k", label=row["method"])
        top.axhline(0.1, color="k", linewidth=0.7, linestyle=":")
        top.set(title=f"k = {k:,}", xscale="log", ylim=(0, 1))
        bottom.set(xlabel="sparse ratio r", yscale="log")
        top.grid(alpha=0.3)
        bottom.grid(alpha=0.3)
    axes[0, 0].set_ylabel("top-10% precision")
    axes[1, 0].set_ylabel("ms per prompt, CPU")
    axes[0, -1].legend(fontsize="small")
    axes[1, -1].legend(fontsize="x-small")
    figure.savefig(ROOT / "docs" / "projection.png", dpi=120)


def draw_two_sided(rows: list[dict]) -> None:
    policies = list(dict.fromkeys(row["policy"] for row in rows))
    figure = Figure(figsize=(11, 3.6), layout="tight")
    for axes, policy in zip(figure.subplots(1, len(policies), sharey=True), policies, strict=True):
        for method, color in (("even shares", "C3"), ("two-sided", "C4")):
            curve = [row for row in rows if row["policy"] == policy and row["method"] == method]
            k, values = [row["k"] for row in curve], [row["precision"] for row in curve]
            label = "here" if method == "even shares" else method
            axes.plot(k, [np.mean(v) for v in values], label=label, marker="o", color=color)
            axes.fill_between(
                k, [min(v) for v in values], [max(v) for v in values], color=color, alpha=0.15, linewidth=0
            )
        axes.set(title=policy, xscale="log", xlabel="k", ylim=(0.4, 1), xticks=KS, xticklabels=[f"{k:,}" for k in KS])
        axes.grid(alpha=0.3)
        axes.minorticks_off()
        axes.tick_params(axis="x", rotation=30)
    figure.axes[0].set_ylabel("top-10% precision")
    figure.axes[0].legend(loc="lower right")
    figure.savefig(ROOT / "docs" / "two_sided.png", dpi=120)
    print(f"\n| policy | method | {' | '.join(f'k = {k:,}' for k in KS)} |\n|---|---|{'---|' * len(KS)}")
    for policy in policies:
        for method in ("even shares", "two-sided"):
            curve = [row for row in rows if row["policy"] == policy and row["method"] == method]
            cells = [f"{np.mean(row['precision']):.3f} ({np.mean(row['rank_correlation']):.3f})" for row in curve]
            print(f"| {policy} | {method} | {' | '.join(cells)} |")


def tables(result: dict) -> None:
    print("\n| covered | exact | k = 4096, r = 0.1 | k = 4096, r = 1 | k = 32768, r = 0.1 | k = 32768, r = 1 |")
    print("|---|---|---|---|---|---|")
    rows = result["precision"]["rows"]
    for label in dict.fromkeys(row["covered"] for row in rows if "covered" in row):
        cells = [f"{np.mean(row['precision']):.3f}" for row in rows if row.get("covered") == label]
        print(f"| {label} | {' | '.join(cells)} |")
    for k in KS:
        print(f"\n| k = {k}: top-10% precision (rank correlation) | {' | '.join(f'r = {r:g}' for r in RATIOS)} |")
        print("|" + "---|" * (len(RATIOS) + 1))
        for method in METHODS:
            some = [row for row in rows if row["method"] == method and row.get("k") == k and "covered" not in row]
            cells = [f"{np.mean(row['precision']):.3f} ({np.mean(row['rank_correlation']):.3f})" for row in some]
            print(f"| {method} | {' | '.join(cells)} |")
    print("\n| | k | r | ms per prompt | / plain, repeated | / plain, shared |\n|---|---|---|---|---|---|")
    for row in result["speed"]["rows"]:
        ratios = [f"{row[name]:.2f}" if name in row else "" for name in ("over_repeated", "over_shared")]
        place = f"{row.get('k', '')} | {row.get('r', '')}"
        print(f"| {row['method']} | {place} | {row['ms_per_prompt']:.2f} | {' | '.join(ratios)} |")


app = typer.Typer(**rollout.PLAIN)


@app.command(help=__doc__.splitlines()[0])
def measure(
    only: Annotated[
        Literal["precision", "speed", "scale", "two_sided"] | None, typer.Option(help="One part.  [default: all]")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds of the projection.")] = 3,
    every: Annotated[int, typer.Option(min=1, help="Of the live prompts, every one or every second ...")] = 2,
    rounds: Annotated[int, typer.Option(min=1, help="Of the timings.")] = 5,
    runs: Annotated[Path, typer.Option(help="Folder of the runs.")] = ROOT / "runs",
) -> None:
    run = make_run(runs / "influence-20-steps-0", stages=8)
    file = ROOT / "docs" / "projection.json"
    result = json.loads(file.read_text()) if file.exists() else {}
    parts = {
        "speed": lambda: speed(run, rounds),
        "scale": lambda: scale(run, (1_000, 5_000, 20_000, 50_000)),
        "precision": lambda: precision(run, seeds, every),
        "two_sided": lambda: two_sided(runs, seeds, every),
    }
    for part, work in parts.items():
        if only in (None, part):
            result[part] = work()
            result |= {"cores": os.cpu_count(), "torch": torch.__version__, "python": platform.python_version()}
            file.write_text(json.dumps(result, indent=1) + "\n")
    if "two_sided" in result:
        draw_two_sided(result["two_sided"])
    if {"precision", "speed"} <= set(result):
        draw(result)
        tables(result)


if __name__ == "__main__":
    rollout.command_line(app)
