"""Kills of this process at a chosen write, so that a test names the moment of a kill and meets the same one every time.

A process calls `die_before` before it does what is to be killed.
"""

import errno
import fnmatch
import os
import pathlib
import signal
import sys

TESTS = str(pathlib.Path(__file__).parent)  # on the PYTHONPATH of such a process
WRITING = os.O_WRONLY | os.O_RDWR


def die_before(folder, write=1, name="*"):
    """SIGKILL this process right before a write below `folder`: a file opened to be written, or a rename.

    Args:
        folder: other places do not count.
        write: which of the writes, from 1.
        name: only writes whose file, after a rename, has a name of this pattern.
    """
    root, left = os.path.abspath(folder), write

    def before(event, arguments):
        nonlocal left
        if event == "open" and isinstance(arguments[0], str | bytes) and arguments[2] & WRITING:
            path = os.fsdecode(arguments[0])
        elif event == "os.rename":
            path = os.fsdecode(arguments[1])
        else:
            return
        inside = os.path.abspath(path).startswith(root + os.sep)
        if inside and fnmatch.fnmatch(os.path.basename(path), name):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(before)


def cli(folder, name, write, arguments):
    """A command that runs `dit-accel` and dies before that write of such a name below `folder`."""
    program = (
        "import sys; import kills; from dit_accel.cli.app import main; "
        f"kills.die_before({str(folder)!r}, {write}, {name!r}); main(sys.argv[1:])"
    )
    return [sys.executable, "-c", program, *map(str, arguments)]


def forbid_writes(folder):
    """Make `folder` read-only for this process alone, whoever it runs as."""
    root = os.path.abspath(folder)

    def before(event, arguments):
        writes = event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir") or (
            event == "open" and arguments[2] & WRITING
        )
        if writes and isinstance(arguments[0], str | bytes):
            path = os.path.abspath(os.fsdecode(arguments[0]))
            if path == root or path.startswith(root + os.sep):
                raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)

    sys.addaudithook(before)
