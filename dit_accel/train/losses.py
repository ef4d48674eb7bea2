"""The loss curve of a run: one JSON object a line, which a resumed run goes on with where its checkpoint stands."""

from __future__ import annotations

import json
import pathlib
from typing import Any

from dit_accel.files import replace_file


class LossCurve:
    """Appends to `losses.jsonl`.

    Args:
        path: of the file.
        step: rows of later steps are dropped; they were taken after the checkpoint and will come again.
    """

    def __init__(self, path: pathlib.Path, step: int) -> None:
        kept = [row for row in read(path) if row["step"] <= step] if path.exists() else []
        replace_file(path, "".join(json.dumps(row) + "\n" for row in kept).encode())
        self._file = path.open("a", encoding="utf-8")

    def add(self, row: dict[str, Any]) -> None:
        """Write a row; it is in the file when this returns."""
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read(path: pathlib.Path) -> list[dict[str, Any]]:
    """The complete rows of a loss curve; a last line that a kill cut short is left out."""
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]
