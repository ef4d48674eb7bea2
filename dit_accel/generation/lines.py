"""Files of one JSON object a line, added one by one, so that a run cut short keeps what it has."""

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
    line = (json.dumps(row, allow_nan=False) + "\n").encode()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab+") as file:
            file.seek(0)
            file.truncate(whole(file.read()))
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise DitAccelError(f"{path} could not be written: {error.strerror or error}.") from error


def whole(content: bytes) -> int:
    """Bytes up to the end of the last whole line."""
    return content.rfind(b"\n") + 1
