"""Files that are complete or not there: written under another name, then renamed."""

from __future__ import annotations

import os
import pathlib
import tempfile


def replace_file(file: pathlib.Path, content: bytes) -> None:
    """Write under a temporary name in the same folder, then rename.

    Raises:
        OSError: it cannot be written; the old file stays.
    """
    handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
        os.replace(temporary, file)
    except BaseException:
        pathlib.Path(temporary).unlink(missing_ok=True)
        raise
