"""Run docs/walkthrough.ipynb and keep its outputs: about a minute on two cores.

python bench/walkthrough.py            # writes the notebook with new outputs
python bench/walkthrough.py --out X    # leaves it as it is
"""

import argparse
from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).resolve().parent.parent / "docs/walkthrough.ipynb"


def run(path: Path) -> nbformat.NotebookNode:
    """The notebook with the outputs of a new run. A cell that raises an error ends it with that error."""
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(path.parent)}}).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # the time of day
    return notebook


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=NOTEBOOK, help="File to write.")
    nbformat.write(run(NOTEBOOK), parser.parse_args().out)
