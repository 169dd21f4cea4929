"""A run as one page to read: report.html, which holds all that it shows and opens from disk.

    python bench/report.py runs/influence-0
    python bench/report.py runs/influence-0 --prompts 25 --out elsewhere.html

Curve and selection, the table of stages, and of each stage: what was chosen and what came of it, the diagnostics with
their warnings, and the most and the least influential of the live prompts, with pass rate, cosine with each validation
set, and stored completions (green: right). Then settings, versions and costs. It is computed from the files of the run.
"""

import base64
import json
import sys
from pathlib import Path
from typing import Annotated

import jinja2
import numpy as np
import typer
from transformers import AutoTokenizer

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import rollout  # noqa: E402
from cropi import select  # noqa: E402
from rollout import BadInput, require  # noqa: E402

COMPLETIONS = 8  # of a prompt, at most
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
  body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 0 auto; padding: 1rem; color: #222; }
  h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; border-bottom: 1px solid #ccc; }
  h3 { font-size: 1rem; margin-bottom: 0.3rem; }
  img { max-width: 100%; }
  .wide { overflow-x: auto; }
  table { border-collapse: collapse; }
  th, td { padding: 0.15rem 0.6rem; text-align: right; vertical-align: top; white-space: nowrap; }
  th { border-bottom: 1px solid #888; } tr:nth-child(even) td { background: #f5f5f5; }
  .text { text-align: left; white-space: pre-wrap; overflow-wrap: anywhere; min-width: 8rem; }
  .said { text-align: left; white-space: pre-wrap; overflow-wrap: anywhere; min-width: 16rem; }
  .said span { padding: 0 0.3rem; border-radius: 0.2rem; margin-right: 0.3rem; display: inline-block; }
  .right { background: #d7f0d7; } .wrong { background: #f7d9d9; }
  .cut::after { content: " …"; color: #888; }
  .warning { background: #fff3cd; padding: 0.4rem 0.6rem; border-left: 4px solid #e0a800; }
  summary { cursor: pointer; }
</style>
</head>
<body>
<h1>{{ title }}</h1>
<p>{{ about }}</p>
{% for name, picture in pictures %}<img alt="{{ name }}" src="data:image/png;base64,{{ picture }}">{% endfor %}

{% macro grid(rows) %}
<div class="wide"><table>
<tr>{% for name in rows[0] %}<th>{{ name }}</th>{% endfor %}</tr>
{% for row in rows %}<tr>{% for value in row.values() %}<td>{{ value }}</td>{% endfor %}</tr>
{% endfor %}</table></div>
{% endmacro %}

<h2>All stages</h2>
{{ grid(table) }}

{% for stage in stages %}
<section id="stage-{{ stage.number }}">
<h2>Stage {{ stage.number }}</h2>
<p>{{ stage.line }}</p>
{% for answer in stage.answers %}<p class="text">{{ answer }}</p>{% endfor %}
{% for warning in stage.warnings %}<p class="warning">{{ warning }}</p>{% endfor %}
{% if stage.diagnostics %}
<details><summary>Diagnostics of the ranking</summary>{{ grid(stage.diagnostics) }}</details>
{% endif %}
{% for title, prompts in stage.prompts.items() %}
<h3>{{ title }}</h3>
<div class="wide"><table>
<tr><th>place</th><th>prompt</th><th class="text">text</th><th class="text">answer</th><th>chosen</th><th>pass rate</th>
{% for name in stage.sets %}<th>cosine, {{ name }}</th>{% endfor %}<th class="said">completions of β</th></tr>
{% for p in prompts %}<tr><td>{{ p.place }}</td><td>{{ p.index }}</td><td class="text">{{ p.prompt }}</td>
<td class="text">{{ p.answer }}</td><td>{{ "yes" if p.chosen else "" }}</td><td>{{ "%.2f"|format(p.pass_rate) }}</td>
{% for cosine in p.cosine %}<td>{{ "%+.3f"|format(cosine) }}</td>{% endfor %}
<td class="said">{% for text, right, cut in p.completions %}<span class="{{ "right" if right else "wrong" }}
{{- " cut" if cut }}">{{ text }}</span>{% endfor %}</td></tr>
{% endfor %}</table></div>
{% endfor %}
</section>
{% endfor %}

<h2>Costs</h2>
<p>Seconds are those of all processes, added up.</p>
{{ grid(costs) }}
<h2>Settings and versions</h2>
<details><summary>All settings</summary>{{ grid(settings) }}</details>
{{ grid(versions) }}
</body>
</html>
"""
app = typer.Typer(**rollout.PLAIN)


def rounded(value: object) -> str:
    """A number for a table, or nothing."""
    if value is None or isinstance(value, bool):
        return "" if value is None else str(value).lower()
    if isinstance(value, float):
        return f"{value:,.3f}" if abs(value) >= 0.1 or not value else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def ranking(tensors: dict[str, np.ndarray]) -> np.ndarray:
    """Live prompts, the most influential first: by score, those that cannot be chosen by their mean cosine."""
    cosine = tensors["cosine"].mean(1)
    live, score = np.flatnonzero(~np.isnan(cosine)), np.nan_to_num(tensors["score"], nan=-np.inf)
    return live[np.lexsort((-cosine[live], -score[live]))]


def stored(run: Path, s: int) -> Path:
    """The pool's trajectories by which stage s was ranked: the newest up to then."""
    folders = [run / "rollouts", *(run / f"stage-{n:02d}" / "rollouts" for n in range(1, s + 1))]
    return next(folder / "train" for folder in reversed(folders) if (folder / "train").is_dir())


def prompts_of(run: Path, s: int, rows: list[dict], tensors: dict, count: int) -> dict[str, list[dict]]:
    """The `count` most and least influential live prompts of a stage."""
    order, shards = ranking(tensors), list(rollout.shards(stored(run, s), "trajectories"))
    best, worst = order[:count], order[max(count, len(order) - count) :]
    folder, found = rollout.model_folder(Path(rollout.peek(shards[0])["facts"]["model"])), {}
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    for path in shards:  # one at a time
        t = rollout.load_trajectories(path)[0]
        for n in np.flatnonzero(np.isin(t.prompt_index, [*best, *worst])):
            shown = range(min(COMPLETIONS, t.sizes[n]))
            texts = [tokenizer.decode(t.tokens[t.span(n, k)], skip_special_tokens=True) for k in shown]
            verdicts = [(bool(t.right()[n, k]), int(t.truncated[n, k])) for k in shown]
            found[int(t.prompt_index[n])] = [(text, *verdict) for text, verdict in zip(texts, verdicts, strict=True)]

    def about(place: int) -> dict:
        i = int(order[place])
        prompt = rows[i]["prompt"]
        text = prompt if isinstance(prompt, str) else "\n".join(str(message["content"]) for message in prompt)
        known = {"place": place + 1, "index": i, "prompt": text, "answer": rows[i]["answer"]}
        known |= {"chosen": i in tensors["ranked"], "pass_rate": tensors["pass_rate"][i]}
        return known | {"cosine": tensors["cosine"][i].tolist(), "completions": found[i]}

    places = range(len(order))
    most, least = [about(p) for p in places[:count]], [about(p) for p in places[len(order) - len(worst) :]]
    groups = {f"The {len(most)} most influential live prompts": most}
    return groups | ({f"The {len(least)} least influential": least} if least else {})


def stage_of(run: Path, entry: dict, rows: list[dict] | None, count: int) -> dict:
    """What the page says of a stage."""
    s, found = entry["stage"], {"sets": [], "prompts": {}}
    path = run / f"stage-{s:02d}" / "selection.safetensors"
    if path.exists() and rows is not None:
        tensors, record = rollout.load(path, "selection")
        if "cosine" in tensors:
            found = {"sets": record["facts"]["valid"], "prompts": prompts_of(run, s, rows, tensors, count)}
    diagnostics = [
        {
            **{"what": name, "pool": rounded(entry["diagnostics"][name])},
            **{"worst validation set": rounded(entry["diagnostics"].get(f"valid_{name}")), "meaning": meaning},
        }
        for name, meaning in select.MEANINGS.items()
        if name in entry["diagnostics"]
    ]
    accuracy = ", ".join(f"{name} {value:.3f}" for name, value in entry["accuracy"].items())
    line = f"{entry['chosen']} prompts chosen; reward in training {entry['reward']:.3f}; accuracy {accuracy}"
    found |= {"number": s, "line": line, "answers": entry["answers"], "diagnostics": diagnostics}
    return found | {"warnings": select.warnings(entry["diagnostics"])}


def pool_of(run: Path, options: dict) -> list[dict] | None:
    """The rows of the training pool, if a selection of the run was made from trajectories.

    Raises:
        BadInput: the data has changed, or is gone.
    """
    folder = run / "rollouts" / "train"
    if not folder.is_dir():
        return None
    record = next(iter(rollout.shards(folder, "trajectories").values()))
    names = ("limit", "prompt_column", "answer_column", "skip_bad_rows")
    rows = rollout.load_prompts(record["facts"]["data"], *(options[f"rollout.{name}"] for name in names))
    same = rows.digest == record["recipe"]["inputs"]["data"]
    require(same, f"{record['facts']['data']} is not what {run} was trained on; run this where it is")
    return rows


@app.command(help=__doc__.splitlines()[0])
def report(
    run: Annotated[Path, typer.Argument(help="Folder of a run that has ended.")],
    prompts: Annotated[int, typer.Option(min=1, help="Most and least influential prompts of a stage.")] = 10,
    out: Annotated[Path | None, typer.Option(help="The page.  [default: RUN/report.html]")] = None,
) -> Path:
    recipe, file = rollout.peek(run / "run.safetensors"), run / "report.json"
    require(file.is_file(), f"{run} is not finished (it has no report.json); run its command again")
    try:
        made = json.loads(file.read_text())
    except ValueError as error:
        raise BadInput(f"{file} is damaged ({error}); remove it, and the run's command writes it again") from None
    options, entries = recipe["recipe"]["options"], made["evaluations"]
    rows = pool_of(run, options)
    seconds = ["rollout", "scoring", "training", "evaluation"]
    costs = [
        {"stage": e["stage"]}
        | {f"{name} (s)": rounded(e.get(f"seconds_{name}")) for name in seconds}
        | {f"trajectories, {name}": rounded(e.get(f"trajectories_{name}")) for name in ("offline", "training")}
        for e in entries
    ]
    table = [
        {name: rounded(e.get(name)) for name in ("stage", "steps", "chosen", "reward")}
        | {name: rounded(value) for name, value in e["accuracy"].items()}
        | {f"pass@{made['test_samples']}, {name}": rounded(value) for name, value in e["pass_at_k"].items()}
        for e in entries
    ]
    pictures = [
        (name, base64.b64encode((run / f"{name}.png").read_bytes()).decode()) for name in ("curve", "selection")
    ]
    page = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(PAGE)
    text = page.render(
        title=f"CROPI: {made['selector']}, seed {made['seed']}",
        about=f"{len(entries) - 1} stages, {entries[-1]['steps']} steps; targeted: {', '.join(made['targeted'])}",
        pictures=pictures,
        table=table,
        stages=[stage_of(run, entry, rows, prompts) for entry in entries[1:]],
        costs=costs,
        settings=[{"option": name, "value": rounded(value)} for name, value in options.items()],
        versions=[recipe["facts"]["versions"] | {"device": recipe["facts"]["device"]}],
    )
    out = out or run / "report.html"
    require(not out.is_dir(), f"{out} is a folder; choose another --out")
    rollout.check_out(out.parent)
    with rollout.new_file(out) as temporary:
        temporary.write_text(text)
    print(f"{out}: {len(text) / 1e6:.1f} MB; open it in a browser")
    return out


if __name__ == "__main__":
    rollout.command_line(app)
