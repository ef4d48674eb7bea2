"""The part of docs/results/suite.md that an evaluation writes."""

import json
import os
import subprocess

import pytest
from messages import names

from dit_accel.errors import DitAccelError
from dit_accel.eval.report import write_report
from tools import results_page as page


@pytest.fixture
def summary():
    """Two rows and one metric."""
    metric = {"name": "psnr", "title": "PSNR", "unit": "dB", "better": "higher", "about": "against the dense output"}
    rows = [
        {"label": label, "method": "gna", "density": density, "speedup": speedup, "figures": {"psnr": {"value": psnr}}}
        for label, density, speedup, psnr in (("baseline", 1.0, 1.0, "inf"), ("gna:window=0.5", 0.3, 1.5, 21.5))
    ]
    circumstances = {"command": "dit-accel eval", "hardware": "a processor"}
    return {"title": "Quality and speed", "made": circumstances, "metrics": [metric], "rows": rows}


@pytest.fixture
def results(summary, tmp_path):
    folder = tmp_path / "results"
    folder.mkdir()
    write_report(summary, folder)
    return folder


def test_the_part_between_the_marks_is_replaced(summary, results, tmp_path):
    file = tmp_path / page.PAGE
    file.parent.mkdir(parents=True)
    file.write_text(f"# A\n\n{page.BEGIN}\nold\n{page.END}\n\n## B\n")
    for _ in range(2):
        page.update(results, tmp_path)
        assert file.read_text() == f"# A\n\n{page.BEGIN}\n{page.section(summary)}\n{page.END}\n\n## B\n"
    assert "| `gna:window=0.5` | 30.0 % | 1.50× | 21.50 |" in file.read_text()
    assert "a processor. Rows: [`eval_demo.json`](../../benchmarks/results/eval_demo.json)" in file.read_text()
    assert json.loads((tmp_path / page.SUMMARY).read_text()) == summary
    assert (tmp_path / page.PICTURE).read_bytes() == (results / "pareto.png").read_bytes()


def test_nothing_is_touched_where_something_is_missing(results, tmp_path):
    file = tmp_path / page.PAGE
    file.parent.mkdir(parents=True)
    for text in ("# A\n", f"{page.END}{page.BEGIN}", f"{page.BEGIN}{page.BEGIN}{page.END}"):
        file.write_text(text)
        with pytest.raises(DitAccelError, match=names("marks")):
            page.update(results, tmp_path)
        assert file.read_text() == text and not (tmp_path / page.SUMMARY).exists()
    with pytest.raises(DitAccelError, match=names("summary.json pareto.png")):
        page.update(tmp_path, tmp_path)


def test_the_page_says_what_its_summary_says(root):
    """The committed table is the one that the committed rows give."""
    text = (root / page.PAGE).read_text(encoding="utf-8")
    if not (root / page.SUMMARY).exists():
        assert page.BEGIN not in text
        return
    summary = json.loads((root / page.SUMMARY).read_text(encoding="utf-8"))
    assert page.between(text) == page.section(summary)
    assert (root / page.PICTURE).is_file()


def test_make_eval_writes_it(root):
    """The command that measures also writes the page."""
    outside = {
        name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKEOVERRIDES", "OUTPUT")
    }
    command = ["make", "--dry-run", "--no-print-directory", "eval"]
    recipe = subprocess.run(command, cwd=root, env=outside, capture_output=True, text=True, check=True).stdout
    measured, _, after = recipe.partition("dit-accel eval --suite demo --output outputs/eval\n")
    assert measured and after.strip().endswith("-m tools.results_page outputs/eval")
