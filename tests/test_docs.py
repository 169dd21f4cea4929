"""Documents: their links, and the walkthrough, which is run."""

import re
import sys
from pathlib import Path

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "bench"))
import walkthrough

PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")]
PAGES += [*sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "toy").rglob("*.md"))]
NAMED = re.compile(r"\b(?:bench|docs|tests|toy)/[\w/.-]*\.(?:py|md|json|png|jsonl|ipynb)\b")


def anchors(page: Path) -> set[str]:
    """Names of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)", re.sub(r"```.*?```", "", page.read_text(), flags=re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_resolves(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    assert links or page.name != "README.md"
    for link in links:
        if "://" in link:  # not followed: the tests need no network
            continue
        target, _, anchor = link.partition("#")
        target = page.parent / target if target else page
        assert target.exists(), f"{page.name}: {link}"
        assert not anchor or anchor in anchors(target), f"{page.name}: {link}"


def test_files_that_a_page_names_exist():
    """Paths like bench/speed.py, in any page or script."""
    for page in [*PAGES, *ROOT.glob("*.py"), *ROOT.glob("bench/*.py")]:
        for path in NAMED.findall(page.read_text()):
            assert (ROOT / path).exists(), f"{page.name}: {path}"


def test_the_walkthrough_runs():
    """Its own asserts compare hooks with autograd. Every step has a figure."""
    made = walkthrough.run(walkthrough.NOTEBOOK)
    kept = walkthrough.nbformat.read(walkthrough.NOTEBOOK, as_version=4)
    for notebook in (made, kept):
        pictures = 0
        for cell in notebook.cells:
            pictures += sum("image/png" in output.get("data", {}) for output in cell.get("outputs", ()))
            if cell.source.startswith("## ") and not cell.source.startswith("## 1"):
                assert pictures, f"no figure before {cell.source.splitlines()[0]}"
                pictures = 0
        assert pictures
