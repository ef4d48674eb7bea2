"""Files of rows: one JSON object a line, added row by row, so that a run cut short keeps what it has."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from dit_accel.errors import DitAccelError


def append(path: Path, row: dict[str, Any]) -> None:
    """Add one row as one whole line, on disk when this returns.

    What a run that was cut short left of its last line is cut off first.

    Raises:
        DitAccelError: the file cannot be written.
    """
    line = (json.dumps(row) + "\n").encode()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab+") as file:
            file.seek(0)
            file.truncate(_whole(file.read()))
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise DitAccelError(f"{path} could not be written: {error.strerror or error}.") from error


def read(path: Path) -> list[dict[str, Any]]:
    """All whole rows of a file; the rest of a line that was cut short does not count.

    Raises:
        DitAccelError: the file cannot be read, or a whole line of it is not a row.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DitAccelError(f"{path} cannot be read: {error.strerror or error}.") from error
    rows = []
    for number, line in enumerate(content[: _whole(content)].splitlines(), 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DitAccelError(f"{path}, line {number}, is not JSON ({error}); rows are never edited.") from error
        if not isinstance(row, dict) or "speedup" not in row:
            raise DitAccelError(f"{path}, line {number}, is not a row that `dit-accel bench` wrote.")
        rows.append(row)
    return rows


def _whole(content: bytes) -> int:
    """Bytes up to the end of the last whole line."""
    return content.rfind(b"\n") + 1
