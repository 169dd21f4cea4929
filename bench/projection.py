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

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from one_step import load_folder, ranks
from speed import best_plain, timed
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import project  # noqa: E402
import rollout  # noqa: E402
from cropi import select  # noqa: E402
from train import collate, completion_logps, micro_batches  # noqa: E402

KS = (256, 1024, 4096, 32768)
TIMED = (1e-5, 1e-3, 0.1, 1.0)
RATIOS = (1e-5, 1e-4, 1e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0)
METHODS = ("even shares", "same ratio", "rows x columns", "Gaussian", "float16", "first")
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
        """What `SparseProjection.add` makes of these gradients (k, N + V), from kept coordinates alone."""
        sketches = torch.zeros(projection.k, self.columns.shape[1])
        for name, (sign, scale, shifts) in projection.blocks.items():
            kept = sign.nonzero()[:, 0]
            bucket = (kept + torch.tensor(shifts)[kept // projection.k]) % projection.k
            values = self.columns[self.place[name]][kept] * (scale * sign[kept])[:, None]
            sketches.index_add_(0, bucket, values)
        return sketches


def projection(exact: Exact, method: str, k: int, r: float, seed: int, names: list[str]) -> project.SparseProjection:
    sizes = {name: exact.sizes[name] for name in names}
    if method == "even shares":
        return project.SparseProjection(sizes, project.keep_probability(sizes, r), k, seed, CPU)
    if method == "same ratio":
        return project.SparseProjection(sizes, dict.fromkeys(sizes, r), k, seed, CPU)
    made = project.SparseProjection(sizes, dict.fromkeys(sizes, 1.0), k, seed, CPU)
    random, left = np.random.default_rng(seed), round(r * sum(sizes.values()))
    for name, (sign, _, shifts) in made.blocks.items():
        keep = torch.zeros(len(sign), dtype=torch.bool)
        if method == "first":
            keep[: max(0, left)] = True
            left -= len(sign)
        else:
            shape = exact.shapes[name]
            sides = [torch.from_numpy(random.random(n) < r ** (1 / len(shape))) for n in shape]
            keep = torch.outer(*sides).flatten() if len(sides) == 2 else sides[0]
        made.blocks[name] = (sign * keep, 1.0, shifts)
    return made


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
    for method, k, r in tqdm(cases, desc="sketches", unit="case"):
        names = sets["all parameters"] if method == "first" else covered
        made = (projection(exact, method, k, r, seed, names) for seed in range(seeds))
        add([exact.agreement(exact.sketch(p)) for p in made], method=method, k=k, r=r)
    dense = [gaussian(exact, seed) for seed in range(seeds)]
    for method, r, k in dense[0]:
        add([found[method, r, k] for found in dense], method=method, k=k, r=r)
    return {"prompts": exact.prompts, "seeds": seeds, "rows": rows}


# ---------------------------------------------------------------------------------------------------------------------
# Speed


class RowsColumns(project.GradientSketcher):
    """Of each matrix √r of the rows and of the columns: the product itself is smaller."""

    def __init__(self, model, k: int, r: float, seed: int):
        super().__init__(model, k, 1.0, seed)
        random = np.random.default_rng(seed)
        self.sides = {}
        sizes = {name: bias.numel() for name, bias in self.biases.items()}
        for name, weight in self.weights.items():
            sides = [(random.random(n) < r**0.5).nonzero()[0] for n in weight.shape]
            self.sides[name] = [torch.from_numpy(side if len(side) else np.zeros(1, int)) for side in sides]
            sizes[name] = len(self.sides[name][0]) * len(self.sides[name][1])
        self.projection = project.SparseProjection(sizes, dict.fromkeys(sizes, 1.0), k, seed, CPU)

    def _weight_gradient(self, name: str, calls: list) -> torch.Tensor:
        rows, columns = self.sides[name]
        if not calls[0][0].is_floating_point():
            return super()._weight_gradient(name, calls)[:, rows][:, :, columns]
        prompts = len(calls[0][0])
        gradient = self.workspace[: prompts * len(rows) * len(columns)].view(prompts, len(rows), len(columns))
        for number, (taken, delta) in enumerate(calls):
            gradient.baddbmm_(delta[..., rows].mT, taken[..., columns], beta=float(number > 0))
        return gradient


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
            for method, kind in (("even shares", project.GradientSketcher), ("rows x columns", RowsColumns)):
                ways[method, k, r] = lambda sketcher=kind(policy(), k, r, 0): score(sketcher)
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
thread = threading.Thread(target=watch)
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
                facts = rollout.facts(0.0, trajectories=table.rewards.size, live=len(part))
                rollout.save(path, table.tensors(), shard, facts)
            command = [sys.executable, "-c", CHILD, str(ROOT), str(files)]
            environment = os.environ | {"PYTHONPATH": str(ROOT)}
            ended = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True)
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
    colors = dict(zip(METHODS, ("C3", "C1", "C0", "k", "0.55", "C2"), strict=True))
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


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["precision", "speed", "scale"], help="one part")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--every", type=int, default=2, help="of the live prompts, every one or every second ...")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs", help="folder of the runs")
    arguments = parser.parse_args()
    run = arguments.runs / "influence-20-steps-0"
    command = [sys.executable, str(ROOT / "cropi.py"), "run", "--set", "train.steps=20", "--out", str(run)]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)  # what is there is not made again
    file = ROOT / "docs" / "projection.json"
    result = json.loads(file.read_text()) if file.exists() else {}
    parts = {
        "speed": lambda: speed(run, arguments.rounds),
        "scale": lambda: scale(run, (1_000, 5_000, 20_000, 50_000)),
        "precision": lambda: precision(run, arguments.seeds, arguments.every),
    }
    for part, work in parts.items():
        if arguments.only in (None, part):
            result[part] = work()
            result |= {"cores": os.cpu_count(), "torch": torch.__version__, "python": platform.python_version()}
            file.write_text(json.dumps(result, indent=1) + "\n")
    if {"precision", "speed"} <= set(result):
        draw(result)
        tables(result)
