"""Writing files: complete or absent, with one writer to a folder, and checked before the work. Reading JSON.

Files are written in a hidden folder beside their place and then renamed. A killed process leaves such a folder behind,
which the next writer of the same file removes. Locks are the operating system's, so a killed process holds none.

Every file that replaces one holds `MARK`, in its format's place for a remark. A file without it is never replaced.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from dit_accel.errors import DitAccelError

try:
    import fcntl
except ImportError:  # Windows has no flock
    fcntl = None  # type: ignore[assignment]

LOCK = ".dit-accel.lock"
MARK = "Written by dit_accel, which may replace this file."
SEARCHED = 2**20  # bytes at either end of a file in which the mark stands: mp4 has it last, other formats first
NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EBADF)  # some network file systems


def is_ours(path: Path) -> bool:
    """Whether a file has `MARK`, or is empty and so has nothing to lose. Links, folders and devices are not ours."""
    if path.is_symlink() or not path.is_file():
        return False
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        first = file.read(SEARCHED)
        file.seek(max(0, size - SEARCHED))
        return size == 0 or MARK.encode() in first or MARK.encode() in file.read()


def check_ours(paths: Iterable[Path], option: str = "--output") -> None:
    """Refuse an output of which a file would replace something that this package did not write."""
    for path in paths:
        if not os.path.lexists(path):
            continue
        try:
            ours = is_ours(path)
        except OSError as error:
            raise DitAccelError(f"{option}: {path} cannot be read: {error.strerror}.") from error
        if not ours:
            kind = "a folder" if path.is_dir() else "no file that dit_accel wrote"
            raise DitAccelError(f"{option} would replace {path}, which is {kind}. Move it, or choose another name.")


def check_new(paths: Iterable[Path]) -> None:
    """Refuse an output of which a file exists; `check_ours` comes first."""
    for path in filter(os.path.lexists, paths):
        raise DitAccelError(f"--output: {path} exists. Add --overwrite to replace it, or choose another name.")


def replace_file(file: Path, content: bytes, *, checked: bool = False) -> None:
    """Write one file in place of an old one, which stays if an error is raised; arguments and errors as in `staged`."""
    with staged(file, checked=checked) as stage:
        (stage / file.name).write_bytes(content)


@contextlib.contextmanager
def staged(output: Path, *, checked: bool = False) -> Iterator[Path]:
    """A folder for files that belong together. They move to the folder of `output` when the block succeeds.

    JSON files move last, so the files that a record describes are complete.

    Args:
        checked: the caller knows that an old file is ours, though it lacks the mark.

    Raises:
        DitAccelError: `output` could not be written, for instance on a full disk, or would replace what this package
            did not write; nothing is left behind.
    """
    prefix = _stage_prefix(output)
    new = [folder for folder in output.parents if not folder.exists()]
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        for left in [path for path in output.parent.iterdir() if path.name.startswith(prefix)]:
            with contextlib.suppress(BlockingIOError, FileNotFoundError), _locked(left, wait=False) as locked:
                if locked:  # of a killed process: one that still writes has the lock
                    shutil.rmtree(left)
        stage, lock = _make_stage(output.parent, prefix)
        try:
            yield stage
            written = sorted(stage.iterdir(), key=lambda path: (path.suffix == ".json", path.name))
            targets = [output.parent / path.name for path in written]
            for path, target in zip(written, targets, strict=True):
                if path.is_dir() and target.is_dir():
                    _check_folder(path, target)
                elif not checked:
                    check_ours([target])
            for path, target in zip(written, targets, strict=True):
                _move(path, target)
        finally:
            shutil.rmtree(stage)
            lock.close()
    except OSError as error:
        raise DitAccelError(f"{output} could not be written: {error.strerror or error}.") from error
    finally:
        with contextlib.suppress(OSError):  # not empty
            for folder in new:
                folder.rmdir()


def _move(source: Path, target: Path) -> None:
    """Move a file or a folder into its place."""
    for path in (source, *source.rglob("*")):
        if path.is_file():
            with open(path, "rb") as written:
                os.fsync(written.fileno())  # or a power cut leaves an empty file under the final name
    if source.is_dir() and target.is_dir():  # only an empty folder could be replaced
        os.replace(target, source.with_name(f"{source.name}.old"))
    os.replace(source, target)


def _check_folder(new: Path, old: Path) -> None:
    """Refuse to replace a folder that is not empty, unless a file in it is ours and the new one has all its names."""
    names = {path.relative_to(new) for path in new.rglob("*")}
    present = sorted(old.rglob("*"))
    odd = [path for path in present if path.relative_to(old) not in names]
    if odd or (present and not any(map(is_ours, present))):
        raise DitAccelError(f"{old} holds {(odd or present)[0].name}, which dit_accel did not write. Move that folder.")


def _stage_prefix(output: Path) -> str:
    """The beginning of the names of this output's `staged` folders, and of no others."""
    return f".dit-accel-{output.name}."


def _make_stage(folder: Path, prefix: str) -> tuple[Path, contextlib.ExitStack]:
    """A new folder and its lock."""
    while True:
        stage = Path(tempfile.mkdtemp(prefix=prefix, dir=folder))
        with contextlib.suppress(FileNotFoundError), contextlib.ExitStack() as lock:
            lock.enter_context(_locked(stage, wait=True))
            if stage.exists():  # else another process locked it first and removed it as abandoned
                return stage, lock.pop_all()


@contextlib.contextmanager
def _locked(folder: Path, *, wait: bool) -> Iterator[bool]:
    """Lock a folder during the block; yields whether there are locks. Errors as in `_lock`."""
    if fcntl is None:
        yield False
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        yield _lock(handle, wait=wait)
    finally:
        os.close(handle)


def read_json(path: Path, kind: str, remedy: str, needs: Collection[str] = ()) -> dict[str, Any]:
    """Read one JSON object with the entries `needs`; anything else is refused.

    Errors name the `kind` of file, such as "layer schedule", and end with the `remedy`, a sentence.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_once)
    except OSError as error:
        raise DitAccelError(
            f"{path} is not a {kind}: it cannot be read ({error.strerror or error}). {remedy}"
        ) from error
    except (ValueError, RecursionError) as error:
        raise DitAccelError(f"{path} is not valid JSON ({error}). {remedy}") from error
    if not isinstance(value, dict) or not set(needs) <= value.keys():
        entries = f" with the entries {', '.join(needs)}" if needs else ""
        raise DitAccelError(f"{path} is not a {kind}: it should hold a JSON object{entries}. {remedy}")
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, none of whose keys is there twice."""
    entries = dict(pairs)
    if len(entries) < len(pairs):
        raise ValueError("a key is there twice")
    return entries


def append(path: Path, row: dict[str, Any]) -> None:
    """Add one JSON object as one line; it is on disk when this returns.

    An incomplete last line, left by a killed process, is removed first.
    """
    line = (json.dumps(row, allow_nan=False) + "\n").encode()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab+") as file:
            file.seek(0)
            content = file.read()
            end = whole(content)
            file.truncate(end)
            file.write(line if content[:end].endswith(b"\n") or not end else b"\n" + line)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise DitAccelError(f"{path} could not be written: {error.strerror or error}.") from error


def whole(content: bytes) -> int:
    """Number of bytes up to the end of the last complete line of JSON, which an editor may leave without a newline."""
    end = content.rfind(b"\n") + 1
    with contextlib.suppress(ValueError, RecursionError):
        json.loads(content[end:])
        return len(content)
    return end


def check_file(output: Path, endings: tuple[str, ...], option: str = "--output") -> None:
    """Refuse an output with another ending, that is a folder, or whose folder cannot be written to."""
    if output.suffix.lower() not in endings:
        raise DitAccelError(f"{option} {output} should end in {' or '.join(endings)}.")
    if os.path.isdir(output):
        raise DitAccelError(f"{option} {output} is a folder. Give a file name in it.")
    _check_writable(output, output.absolute().parent, option)


def check_folder(output: Path, option: str = "--output") -> None:
    """Refuse a folder that is a file or cannot be written to; it need not exist."""
    if os.path.exists(output) and not os.path.isdir(output):
        raise DitAccelError(f"{option} {output} is a file. Give a folder.")
    _check_writable(output, output.absolute(), option)


def _check_writable(output: Path, folder: Path, option: str) -> None:
    while not os.path.exists(folder):
        folder = folder.parent
    try:
        with tempfile.TemporaryDirectory(prefix=_stage_prefix(output), dir=folder, ignore_cleanup_errors=True):
            pass
    except OSError as error:
        raise DitAccelError(f"{option} {output} cannot be written: {folder}: {error.strerror}.") from error


class InUse(DitAccelError):
    """Another process has what was to be reserved."""


def lock_of(output: Path) -> Path:
    """The lock file of the files of an output's name; o.mp4 and o.gif have the record o.json, and so one lock."""
    return output.with_name(f".dit-accel.{output.stem}.lock")


@contextlib.contextmanager
def hold(output: Path, *, folder: bool = True) -> Iterator[bool]:
    """Reserve --output for this process during the block: a folder, or else the files of that name in its folder.

    The folder is made if it does not exist, and removed if the block leaves it empty. A lock file names the holder.

    Yields:
        Whether it is reserved; False if the system or the file system has no locks.

    Raises:
        InUse: another process has it.
        DitAccelError: it cannot be written to.
    """
    place = output if folder else output.parent
    new = [path for path in (place, *place.parents) if not path.exists()]
    path = place / LOCK if folder else lock_of(output)
    try:
        try:
            place.mkdir(parents=True, exist_ok=True)
            file, locked = (None, False) if fcntl is None else _open_lock(path)
        except BlockingIOError as error:
            holder = ""
            with contextlib.suppress(FileNotFoundError):  # released meanwhile
                holder = path.read_text(encoding="utf-8")
            raise InUse(
                f"--output {output} is in use by {holder or 'another process'}. Wait until it is done, stop it, or "
                "choose another --output."
            ) from error
        except OSError as error:
            raise DitAccelError(f"{output} could not be written: {error.strerror or error}.") from error
        try:
            yield locked
        finally:
            if file is not None:
                path.unlink(missing_ok=True)
                file.close()
    finally:
        with contextlib.suppress(OSError):  # not empty, or somebody has removed it
            for path in new:
                path.rmdir()


def _open_lock(path: Path) -> tuple[IO[str], bool]:
    """The lock file, locked, with this process's name, and whether the file system has locks."""
    while True:
        file = open(path, "a+", encoding="utf-8")  # keeps the present holder's name
        try:
            locked = _lock(file.fileno(), wait=False)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                    _sign(file, path)
                    return file, locked
        except BaseException:
            file.close()
            raise
        file.close()  # its holder removed it between our open and our lock


def _sign(file: IO[str], path: Path) -> None:
    """Write this process's name to its lock file, which an error removes."""
    now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    try:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}, at work since {now}")
        file.flush()
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def _lock(handle: int, *, wait: bool) -> bool:
    """Lock an open file or folder; False if the file system has no locks.

    Raises:
        BlockingIOError: another process has it, without `wait`.
    """
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return False
    return True
