"""The notebooks run, and show again what is stored in them."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MOST_BYTES = 500_000
SHOWN = ("image/gif", "image/png", "text/html")
# Training is shorter here than in the stored run.
SHORTER = {"fine_tune": ("CLIPS, STEPS = 96, 60", "CLIPS, STEPS = 8, 2")}
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path):
    import nbformat

    return nbformat.read(path, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def shown(cell) -> list[str]:
    """The pictures and tables that a cell shows."""
    return [kind for output in cell.outputs for kind in output.get("data", {}) if kind in SHOWN]


def test_there_are_notebooks():
    assert [path.stem for path in NOTEBOOKS] == ["accelerate", "fine_tune"]


@each_notebook
def test_stored_outputs_are_whole_and_small(path):
    cells = code_cells(read(path))
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), "run all cells in order"
    assert not [output for cell in cells for output in cell.outputs if output.output_type == "error"]
    assert sum(len(shown(cell)) for cell in cells) >= 3
    text = path.read_text(encoding="utf-8")
    assert len(text) < MOST_BYTES
    assert not re.search(r"/(home|root|tmp|usr)/", text), "a path of the machine that ran it"


@each_notebook
def test_it_runs(path, tmp_path, monkeypatch):
    """Every cell, in a kernel of its own; a cell that raises fails the test."""
    from nbclient import NotebookClient

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = read(path)
    cells = code_cells(notebook)
    stored = [shown(cell) for cell in cells]
    if path.stem in SHORTER:
        full, short = SHORTER[path.stem]
        (cell,) = [cell for cell in cells if full in cell.source]
        cell.source = cell.source.replace(full, short)
    where = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=where).execute()
    for cell, before in zip(cells, stored, strict=True):
        assert set(shown(cell)) >= set(before), cell.source
