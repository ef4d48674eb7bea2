"""The evaluation's report: one summary of plain JSON values as `summary.json`, `summary.md` and `report.html`.

    write_report(summary, folder)

`fields.py` describes a summary. The page holds its pictures and videos, so it needs no other file and no network.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

NAMES = ("summary.json", "summary.md", "pareto.png", "report.html")


def write_report(summary: dict[str, Any], folder: Path) -> None:
    """Write `NAMES` into a folder that exists. Old files are replaced together, once all new ones are complete.

    Paths in the summary are relative to the folder.

    Raises:
        DitAccelError: matplotlib is not installed, a picture or video is missing, or the folder cannot be written to.
    """
    import json

    from dit_accel.eval.report import markdown, page, pictures
    from dit_accel.files import staged

    with staged(folder / "report.html") as part:
        text = json.dumps(summary, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
        (part / "summary.json").write_text(text, encoding="utf-8")
        (part / "summary.md").write_text(markdown.render(summary), encoding="utf-8")
        (part / "pareto.png").write_bytes(pictures.pareto(summary))
        (part / "report.html").write_text(page.render(summary, folder), encoding="utf-8")
