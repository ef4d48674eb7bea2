"""`report.html`: one file with everything in it, which opens from a disk and asks no network."""

from __future__ import annotations

import base64
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dit_accel.errors import DitAccelError
from dit_accel.eval.report import fields, pictures, published
from dit_accel.eval.report.markdown import LEGEND, plain
from dit_accel.files import MARK

HERE = Path(__file__).parent
KINDS = {".mp4": "video/mp4", ".webm": "video/webm", ".png": "image/png", ".jpg": "image/jpeg", ".gif": "image/gif"}


def render(summary: dict[str, Any], folder: Path) -> str:
    """The page of a summary, whose paths are relative to `folder`; errors as in `write_report`."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup, escape

    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals.update(fields=fields, mark=MARK, plain=plain, legend_text=LEGEND)
    environment.filters["breakable"] = lambda label: escape(label).replace(",", Markup(",<wbr>"))
    return environment.get_template("page.html.j2").render(
        summary=summary,
        style=Markup((HERE / "page.css").read_text(encoding="utf-8")),
        script=Markup((HERE / "page.js").read_text(encoding="utf-8")),
        published=published.table(summary),
        published_about=published.ABOUT,
        fronts={metric["name"]: fields.front(summary["rows"], metric) for metric in summary["metrics"]},
        crossed=fields.crossed(summary["rows"]),
        chosen=next((line["row"] for line in summary.get("verdict", []) if "row" in line), None),
        panels=[(metric, Markup(pictures.panel(summary, metric))) for metric in pictures.drawable(summary)],
        prompts=_by_prompt(summary.get("samples", []), folder),
        masks=[(mask["row"], embedded(folder / mask["image"])) for mask in summary.get("masks", [])],
        maps=[
            # no picture where everything ran dense
            (record, Markup(pictures.heat_maps(record)) if any(map(any, record["error"])) else None)
            for record in summary.get("attention", [])
        ],
    )


def embedded(path: Path) -> str:
    """A picture or video as a data URL."""
    kind = KINDS.get(path.suffix.lower())
    if kind is None:
        raise DitAccelError(f"The report shows {', '.join(KINDS)}, not {path}.")
    if not path.is_file():
        raise DitAccelError(f"The report wants {path}, which is not there; run the evaluation again.")
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode('ascii')}"


def _by_prompt(samples: Iterable[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """The samples of each prompt and seed together, each with its data URL and whether it is a video."""
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for sample in samples:
        url = embedded(folder / sample["media"])
        shown = {**sample, "url": url, "video": url.startswith("data:video"), "figures": sample.get("figures", {})}
        groups.setdefault((sample["prompt"], sample["seed"]), []).append(shown)
    return [{"prompt": prompt, "seed": seed, "samples": group} for (prompt, seed), group in groups.items()]
