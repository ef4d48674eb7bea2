"""Folders that one process at a time writes to. A lock is the system's, so it ends with its holder, however that ends.

What the lock's file says is for people: it names the holder. A killed one leaves the file, which then locks nothing and
is taken over.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from dit_accel.errors import DitAccelError

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None  # type: ignore[assignment]

NAME = ".dit-accel.lock"
NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)  # some network file systems


@contextlib.contextmanager
def hold(folder: Path, *, wait: bool = False, option: str = "--output") -> Iterator[bool]:
    """Keep a folder to this process for the length of a with block.

    The folder is made if it is not there, and goes again if the block leaves nothing in it.

    Args:
        folder: to keep.
        wait: until another process lets go of it, instead of refusing.
        option: which names the folder.

    Yields:
        Whether it is kept: not so where the system or the file system has no locks.

    Raises:
        DitAccelError: another process has it, or it cannot be written to.
    """
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    path = folder / NAME
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file, kept = (None, False) if fcntl is None else _open(path, wait)
    except BlockingIOError as error:
        raise DitAccelError(
            f"{option} {folder} is in use by {_holder(path)}; wait until that is done, stop it, or choose another "
            f"{option}."
        ) from error
    except OSError as error:
        raise DitAccelError(f"{folder} could not be written: {error.strerror or error}.") from error
    try:
        yield kept
    finally:
        if file is not None:
            path.unlink(missing_ok=True)  # while it is locked: whoever waits sees that it is no longer the one
            file.close()
        for each in made:
            if any(each.iterdir()):
                break
            each.rmdir()


def _open(path: Path, wait: bool) -> tuple[IO[str], bool]:
    """The lock's file, locked and with this process's name in it, and whether there are locks."""
    while True:
        file = open(path, "a+", encoding="utf-8")  # what its holder wrote stays
        try:
            kept = _lock(file, wait)
            if _is_at(file, path):
                file.truncate(0)
                file.write(f"process {os.getpid()} on {platform.node()}, at work since {_now()}")
                file.flush()
                return file, kept
        except BaseException:
            file.close()
            raise
        file.close()  # its holder removed it before it let go


def _lock(file: IO[str], wait: bool) -> bool:
    """Lock a file; False where the file system has no locks.

    Raises:
        BlockingIOError: another process has it, and this one is not to wait.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return False
    return True


def _is_at(file: IO[str], path: Path) -> bool:
    """Whether an open file is still the one of that name."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def _holder(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8") or "another process"
    except FileNotFoundError:  # it has let go since
        return "another process"


def _now() -> str:
    return datetime.datetime.now().astimezone().isoformat(timespec="seconds")
