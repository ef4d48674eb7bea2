"""The table of published figures beside those of this run."""

from __future__ import annotations

from typing import Any

from dit_accel.eval.report import fields

ABOUT = (
    "Published figures come from other hardware, prompts and often sizes. PSNR of one method differs by up to 2 dB "
    "between papers: compare within a column of one source."
)
FIGURES = {"speedup": "speed-up", "density": "density", "psnr": "PSNR (dB)", "ssim": "SSIM", "lpips": "LPIPS"}
FIGURES |= {"vbench": "VBench", "geneval": "GenEval"}
MEASURED = ("speedup", "density", "psnr", "ssim", "lpips")  # what an evaluation can have itself


def table(summary: dict[str, Any]) -> list[list[str]]:
    """Lines of cells, the headings first; none without published figures. Columns without any figure are left out."""
    entries = summary.get("published", [])
    if not entries:
        return []
    rows = {row["label"]: row for row in summary["rows"]}
    shown = [name for name in FIGURES if any(entry[name] is not None for entry in entries)]
    head = ["published", "where"]
    for name in shown:
        head += [f"{FIGURES[name]}, published", *(["here"] if name in MEASURED else [])]
    lines = [[*head, "row here", "source"]]
    for entry in entries:
        cells = [entry["name"], entry["where"]]
        for name in shown:
            cells.append(_cell(name, entry[name]))
            if name in MEASURED:
                cells.append(_cell(name, _here(name, rows.get(entry["label"]))))
        source = f"{entry['source']}. {entry['note']}" if entry["note"] else entry["source"]
        lines.append([*cells, entry["label"] if entry["label"] in rows else fields.NONE, source])
    return lines


def _here(name: str, row: dict[str, Any] | None) -> Any:
    if row is None:
        return None
    return row[name] if name in ("speedup", "density") else row["figures"].get(name, {}).get("value")


def _cell(name: str, value: Any) -> str:
    if name == "speedup":
        return fields.times(value)
    return fields.share(value) if name == "density" else fields.written(value)
