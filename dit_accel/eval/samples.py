"""Generated samples on disk: a file with the frames of each, and a line with its record.

A sample is named by a hash of everything that decides its pixels. Its frames are written first and its line second, so
a run that is killed loses at most the sample it was making.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dit_accel.errors import DitAccelError
from dit_accel.files import append, replace_file
from dit_accel.values import fits

if TYPE_CHECKING:
    import numpy as np

Row = dict[str, Any]

RESULTS = "results.jsonl"
FIELDS = {  # a row has them all
    "key": str, "label": str, "prompt": str, "seed": int, "sha256": str,
    "seconds": float, "denoising_seconds": float, "attention_seconds": float | None, "density": float,
    "steps": int, "peak_memory": int | None, "cached": bool,
}  # fmt: skip


def key_of(identity: dict[str, Any]) -> str:
    """The name of a sample: 32 hexadecimal digits from all that decides its pixels."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]


class Store:
    """Frames of samples in a folder, which the first one makes; each file has the sample's row in its header."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"

    def write(self, frames: np.ndarray, row: Row) -> Row:
        """Write frames, uint8 [F, H, W, 3] with any strides, and return the row with their hash in it.

        Several evaluations may share the folder. Errors as in `replace_file`.
        """
        import numpy as np
        from safetensors.numpy import save

        frames = np.ascontiguousarray(frames)  # safetensors writes memory in its order
        path = self.path(row["key"])
        row = row | {"sha256": hash_of(frames)}
        replace_file(path, save({"frames": frames}, metadata={"row": json.dumps(row)}), checked=True)
        return row

    def find(self, key: str) -> Row | None:
        """The row in the header of a whole file; None if there is no such file or it is damaged."""
        from safetensors import SafetensorError, safe_open

        path = self.path(key)
        if not path.exists():
            return None
        try:
            with safe_open(path, "numpy") as file:
                row = _row((file.metadata() or {}).get("row", "null").encode())
                intact = row is not None and hash_of(file.get_tensor("frames")) == row["sha256"]
        except (SafetensorError, OSError, ValueError):
            return None
        return row if intact else None

    def frames(self, key: str) -> np.ndarray:
        """The frames of a sample that is there: uint8 [F, H, W, 3]."""
        from safetensors.numpy import load_file

        return load_file(self.path(key))["frames"]


def hash_of(frames: np.ndarray) -> str:
    """Of shape and pixels."""
    return hashlib.sha256(repr(frames.shape).encode() + frames.tobytes()).hexdigest()


class Results:
    """The rows of an evaluation's folder; each process adds to a file of its own."""

    def __init__(self, folder: Path, process: int = 0) -> None:
        self.folder = folder
        self._path = folder / (f"results-{process}.jsonl" if process else RESULTS)
        self.rows: dict[str, Row] = {}
        self.damaged: list[str] = []

    def read(self) -> None:
        """Read what is there; `damaged` names the lines that are no rows, whose samples will be made again.

        Raises:
            DitAccelError: a file cannot be read, or has no row at all.
        """
        for path in sorted(filter(os.path.lexists, (self.folder / RESULTS, *self._parts()))):
            try:
                content = path.read_bytes()
            except OSError as error:
                raise DitAccelError(f"{path} cannot be read: {error.strerror or error}.") from error
            lines = {number: line for number, line in enumerate(content.split(b"\n"), 1) if line}
            rows = {number: _row(line) for number, line in lines.items()}
            part = content.startswith(b'{"key": ')  # of a line, which a killed process leaves
            if lines and not part and not any(rows.values()):
                raise DitAccelError(f"{path} has no row of an evaluation. Move it, or choose another --output.")
            self.damaged += [f"{path.name}, line {number}" for number, row in rows.items() if row is None]
            self.rows |= {row["key"]: row for row in rows.values() if row is not None}

    def _parts(self) -> list[Path]:
        """The files of the other processes."""
        return [path for path in self.folder.glob("results-*.jsonl") if path.stem.removeprefix("results-").isdecimal()]

    def add(self, row: Row) -> None:
        """Keep a row, on disk when this returns."""
        append(self._path, row)
        self.rows[row["key"]] = row

    def rewrite(self, rows: Iterable[Row]) -> None:
        """Put these rows first, in this order, and whatever else is known behind them, into one file."""
        ordered = {row["key"]: row for row in rows}
        ordered |= {key: row for key, row in self.rows.items() if key not in ordered}
        path = self.folder / RESULTS
        replace_file(
            path, "".join(json.dumps(row, allow_nan=False) + "\n" for row in ordered.values()).encode(), checked=True
        )
        for other in self._parts():
            other.unlink()


def _row(line: bytes) -> Row | None:
    """A row from its line, or None if it is not one."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or not all(name in row and fits(row[name], kind) for name, kind in FIELDS.items()):
        return None
    return row if all(0 < row[name] < math.inf for name in ("seconds", "denoising_seconds")) else None
