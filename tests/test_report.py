"""The page of a run: what stands in it is what the files say, and text from data stays text."""

import html.parser
import json
import re
import shlex
import sys

import numpy as np
import pandas
import pytest
import typer
from conftest import ROOT, TOY

sys.path.insert(0, str(ROOT / "bench"))

import ablate
import compare
import report

import cropi
import rollout
from rollout import BadInput

HOSTILE = "<script>alert(1)</script>&amp;{{ 7*7 }}\"'"


class Page(html.parser.HTMLParser):
    """Tags, attributes, and the text of the cells of each table, row by row."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.attributes, self.tables, self.text = [], [], [], ""
        self.feed(text)
        self.tables = [[[cell.strip() for cell in row] for row in table] for table in self.tables]

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_data(self, data):
        self.text += data
        if self.tables and self.tables[-1] and self.tables[-1][-1]:
            self.tables[-1][-1][-1] += data


def run_of(world, out, **options):
    settings = ["train.steps=2", "train.batch_prompts=8", "valid.samples=8", "test.samples=2", "project.k=64"]
    sets = {"valid": [f"rev={world}/valid.jsonl"], "test": [f"rev={world}/test.jsonl"]}
    cropi.run(
        pool=f"{world}/train.jsonl", **sets, out=out, assignments=settings, **{"stages": 2, "frac": 0.2} | options
    )
    return out


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A world with hostile text in each column, and two runs in it."""
    world = tmp_path_factory.mktemp("world")
    for kind, count in {"train": 80, "valid": 16, "test": 8}.items():
        source = TOY / ("train.jsonl" if kind == "train" else f"{kind}-rev.jsonl")
        rows = [json.loads(line) for line in source.read_text().splitlines()[:count]]
        for n, row in enumerate(rows):
            row["family"] = HOSTILE
            if kind == "train" and n % 2:
                row["prompt"] = HOSTILE + row["prompt"]
        (world / f"{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [run_of(world, world / f"{name}-0", selector=name) for name in ("influence", "random")]


def test_page_holds_what_the_files_say(runs):
    path = report.report(runs[0], prompts=3)
    page, made = Page(path.read_text()), json.loads((runs[0] / "report.json").read_text())
    assert page.tags.count("section") == 2 and page.tags.count("img") == 2
    stages = page.tables[0]
    assert [row[0] for row in stages] == ["stage", "0", "1", "2"]
    assert [row[4] for row in stages[1:]] == [f"{e['accuracy']['rev']:.3f}" for e in made["evaluations"]]
    assert stages[0][5] == "pass@2, rev"
    tensors, _ = rollout.load(runs[0] / "stage-01/selection.safetensors", "selection")
    best, worst = [table for table in page.tables if table[0][0] == "place"][:2]
    assert [int(row[1]) for row in best[1:]] == tensors["ranked"][:3].tolist()
    live = np.flatnonzero(~np.isnan(tensors["cosine"]).any(1))
    lowest = live[np.argsort(tensors["cosine"][live, 0])][:3]
    assert [int(row[1]) for row in worst[1:]][::-1] == lowest.tolist()
    rows = rollout.load_prompts(runs[0].parent / "train.jsonl")
    for row in best[1:] + worst[1:]:
        i = int(row[1])
        assert (row[2], row[3], row[5]) == (rows[i]["prompt"], rows[i]["answer"], f"{tensors['pass_rate'][i]:.2f}")
        assert row[6] == f"{tensors['cosine'][i, 0]:+.3f}"
    verdicts = [value for name, value in page.attributes if name == "class" and value.split()[0] in ("right", "wrong")]
    assert len(verdicts) == 2 * 2 * 3 * 8
    first = re.findall(r'<td class="said">(.*?)</td>', path.read_text(), re.S)[0]
    assert first.count('class="right') == round(8 * tensors["pass_rate"][tensors["ranked"][0]])


def test_text_from_data_stays_text_and_nothing_comes_from_elsewhere(runs):
    text = report.report(runs[0], prompts=40, out=runs[0].parent / "all.html").read_text()
    page = Page(text)
    assert "script" not in page.tags and HOSTILE in page.text and "49" not in page.text.split(HOSTILE)[1][:3]
    assert {value[:10] for name, value in page.attributes if name in ("src", "href")} == {"data:image"}
    assert "http" not in text and "url(" not in text and "@import" not in text


def test_a_run_without_gradients_has_a_page_too(runs):
    page = Page(report.report(runs[1]).read_text())
    assert page.tags.count("section") == 2 and "most influential" not in page.text


def test_bad_runs_are_refused(runs, tmp_path):
    with pytest.raises(BadInput, match="no such file"):
        report.report(tmp_path)
    data = runs[0].parent / "train.jsonl"
    kept = data.read_text()
    data.write_text(kept + kept.splitlines()[0] + "\n")
    try:
        with pytest.raises(BadInput, match="is not what "):
            report.report(runs[0])
    finally:
        data.write_text(kept)


def test_two_runs_and_who_chose_what(runs, capsys, tmp_path):
    compare.compare(runs, out=tmp_path / "c")
    said = capsys.readouterr().out
    table = pandas.read_csv(tmp_path / "c-chosen.csv")
    times = {}
    for run in runs:
        name = run.name.removesuffix("-0")
        picked = [rollout.load(path, "selection")[0]["ranked"] for path in sorted(run.glob("stage-*/selection.saf*"))]
        times[name] = np.bincount(np.concatenate(picked), minlength=80)
    for row in table.itertuples():
        assert (row.influence, row.random) == (times["influence"][row.prompt_index], times["random"][row.prompt_index])
    assert len(table) == np.count_nonzero(times["influence"] + times["random"])
    ours, theirs = times["influence"] > 0, times["random"] > 0
    assert f"prompts chosen by both: {np.count_nonzero(ours & theirs)}\n" in said
    assert f"only by influence: {np.count_nonzero(ours & ~theirs)}, such as" in said
    assert f"only by random: {np.count_nonzero(theirs & ~ours)}, such as" in said
    assert "acceleration over random" in said


def test_the_commands_at_the_end_of_a_run(runs, monkeypatch, capsys):
    """They name the page, the other run, and the comparison."""
    monkeypatch.setattr(sys, "argv", ["cropi.py", "run", "--out", "a b", "--stages", "2", "--selector=influence"])
    this = cropi.Run(*(runs[0], TOY / "model", "", {}, {}, "influence", 0.1, False, 0, 0, 1, 0, 1, {}))
    page, other, comparison = map(shlex.split, cropi.what_next(this))
    assert page == ["python", "bench/report.py", str(runs[0])]
    assert other == ["python", "cropi.py", "run", "--stages", "2", "--selector", "random", "--out", f"{runs[0]}-random"]
    assert comparison == ["python", "bench/compare.py", str(runs[0]), f"{runs[0]}-random"]


def test_examples_of_studies(tmp_path, monkeypatch):
    """The four commands at the head of bench/ablate.py, made short."""
    monkeypatch.chdir(ROOT)
    text = re.search(r"Of your own.*?\n\n(.*?)\n\n", ablate.__doc__.replace("of your own", "Of your own"), re.S)[1]
    commands = [shlex.split(line) for line in text.replace("\\\n", " ").splitlines()]
    assert len(commands) == 4
    quick = ["--limit", "40", "--set", "train.steps=1", "--set", "train.batch_prompts=8", "--set", "project.k=64"]
    for n, words in enumerate(commands):
        assert words[:2] == ["python", "bench/ablate.py"]
        ours, _, common = " ".join(map(shlex.quote, words[2:])).partition(" -- ")
        ours = [*shlex.split(ours), "--seeds", "1", "--stages", "1", "--out", str(tmp_path / str(n))]
        typer.main.get_command(ablate.app).main(
            [*ours, "--", *shlex.split(common), *quick, "--set", "valid.samples=8"], standalone_mode=False
        )
        reports = sorted((tmp_path / str(n)).glob("*/report.json"))
        assert len(reports) == 2 and all(len(json.loads(r.read_text())["evaluations"]) == 2 for r in reports)
