"""Put an evaluation's table and Pareto picture into the README: `python -m dit_accel.eval.report.readme outputs/eval`.

`make eval` runs it behind the evaluation. What lies between the two marks is replaced; the summary it came from goes to
`benchmarks/results`, the picture to `docs/pictures`. A test holds the README against that summary.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from pathlib import Path
from typing import Any

from dit_accel.errors import DitAccelError
from dit_accel.eval.report import fields, markdown

BEGIN, END = "<!-- eval: begin -->", "<!-- eval: end -->"
SUMMARY = Path("benchmarks/results/eval_demo.json")
PICTURE = Path("docs/pictures/eval_demo.png")
ORIGIN = ("hardware", "git", "date")  # of `made`, said under the table where they are known


def section(summary: dict[str, Any]) -> str:
    """What stands between the marks: table, what is missing, picture, and what it was made with."""
    parts = [markdown.table(summary, costs=False)]
    gaps = fields.missing(summary)
    if gaps:
        parts.append("Not measured: " + "; ".join(gaps) + ".")
    parts.append(f"![Speed-up against each figure, with the Pareto front]({PICTURE.as_posix()})")
    made = summary["made"]
    origin = "; ".join(markdown.plain(made[name]) for name in ORIGIN if made.get(name))
    parts.append(
        f"Made by `{markdown.plain(made['command'])}`: {origin}. Rows: [`{SUMMARY.name}`]({SUMMARY.as_posix()})."
    )
    return "\n\n".join(parts)


def between(text: str) -> str:
    """What a README has between the marks.

    Raises:
        DitAccelError: it does not have both marks, once each and in order.
    """
    if not text.count(BEGIN) == text.count(END) == 1 or text.index(BEGIN) > text.index(END):
        raise DitAccelError(f"The README needs the marks {BEGIN} and {END}, once each and in this order.")
    return text.partition(BEGIN)[2].partition(END)[0].strip()


def update(results: Path, root: Path) -> None:
    """Write README, summary and picture of a checkout from a folder that the evaluation wrote.

    Raises:
        DitAccelError: the folder holds no report, or the README no marks.
    """
    missing = [name for name in ("summary.json", "pareto.png") if not (results / name).is_file()]
    if missing:
        raise DitAccelError(f"{results} lacks {' and '.join(missing)}; run make eval first.")
    readme = root / "README.md"
    text = readme.read_text(encoding="utf-8")
    between(text)
    summary = json.loads((results / "summary.json").read_text(encoding="utf-8"))
    before, after = text.partition(BEGIN)[0], text.partition(END)[2]
    for source, target in (("summary.json", SUMMARY), ("pareto.png", PICTURE)):
        (root / target).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(results / source, root / target)
    part = readme.with_suffix(".part")
    part.write_text(f"{before}{BEGIN}\n{section(summary)}\n{END}{after}", encoding="utf-8")
    os.replace(part, readme)


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
