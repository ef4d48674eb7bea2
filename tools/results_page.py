"""Put an evaluation's table and Pareto picture into docs/results/suite.md.

`make eval` runs `python -m tools.results_page outputs/eval` after the evaluation. It replaces the text between the two
marks. The summary goes to `benchmarks/results`, the picture to `docs/pictures`. A test compares page and summary.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from pathlib import Path
from typing import Any

from dit_accel.errors import DitAccelError
from dit_accel.eval.report import markdown
from dit_accel.files import replace_file

BEGIN, END = "<!-- eval: begin -->", "<!-- eval: end -->"
PAGE = Path("docs/results/suite.md")
SUMMARY = Path("benchmarks/results/eval_demo.json")
PICTURE = Path("docs/pictures/eval_demo.png")
ORIGIN = ("hardware", "git", "date")  # entries of `made` in the line under the table


def section(summary: dict[str, Any]) -> str:
    """The text between the marks: table, picture and origin."""
    parts = [markdown.table(summary, costs=False)]
    parts.append(f"![Speed-up against each figure, with the Pareto front]({_link(PICTURE)})")
    record = summary["made"]
    origin = "; ".join(markdown.plain(record[name]) for name in ORIGIN if record.get(name))
    command = markdown.plain(record["command"])
    parts.append(f"Made by `{command}`: {origin}. Rows: [`{SUMMARY.name}`]({_link(SUMMARY)}).")
    return "\n\n".join(parts)


def _link(path: Path) -> str:
    """A path of the checkout as a link of the page."""
    return Path(os.path.relpath(path, PAGE.parent)).as_posix()


def between(text: str) -> str:
    """The text of a page between the marks; missing, repeated or reversed marks are refused."""
    if not text.count(BEGIN) == text.count(END) == 1 or text.index(BEGIN) > text.index(END):
        raise DitAccelError(f"{PAGE.name} needs the marks {BEGIN} and {END}, once each and in this order.")
    return text.partition(BEGIN)[2].partition(END)[0].strip()


def update(results: Path, root: Path) -> None:
    """Write page, summary and picture of a checkout from an evaluation's folder."""
    missing = [name for name in ("summary.json", "pareto.png") if not (results / name).is_file()]
    if missing:
        raise DitAccelError(f"{results} lacks {' and '.join(missing)}. Run make eval first.")
    page = root / PAGE
    text = page.read_text(encoding="utf-8")
    between(text)
    summary = json.loads((results / "summary.json").read_text(encoding="utf-8"))
    before, after = text.partition(BEGIN)[0], text.partition(END)[2]
    for source, target in (("summary.json", SUMMARY), ("pareto.png", PICTURE)):
        (root / target).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(results / source, root / target)
    replace_file(page, f"{before}{BEGIN}\n{section(summary)}\n{END}{after}".encode(), checked=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="the evaluation's --output")
    parser.add_argument("--root", type=Path, default=Path(), help="the checkout")
    options = parser.parse_args()
    try:
        update(options.results, options.root)
    except DitAccelError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
