"""Files of benchmark rows, read back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dit_accel.errors import DitAccelError
from dit_accel.generation.lines import whole


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
    for number, line in enumerate(content[: whole(content)].splitlines(), 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DitAccelError(f"{path}, line {number}, is not JSON ({error}); rows are never edited.") from error
        if not isinstance(row, dict) or "speedup" not in row:
            raise DitAccelError(f"{path}, line {number}, is not a row that `dit-accel bench` wrote.")
        rows.append(row)
    return rows
