"""Files are complete or absent, folders have one writer, and what cannot be written is refused before the work."""

import os
import platform
import shutil
import signal
import subprocess
import sys

import pytest
from messages import names

from dit_accel import files
from dit_accel.errors import DitAccelError

HOLD = "import pathlib, sys, time; from dit_accel.files import hold; "
HOLD += "held = hold(pathlib.Path(sys.argv[1])); held.__enter__(); print('held', flush=True); time.sleep(600)"


VIDEOS = (".mp4", ".gif")


@pytest.fixture
def start(root):
    """Starts a program with a path in another process, and waits until it says a word."""
    started = []

    def begin(program, path, word):
        environment = os.environ | {"PYTHONPATH": str(root)}
        command = [sys.executable, "-c", program, str(path)]
        started.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
        assert started[-1].stdout.readline() == f"{word}\n"
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.fixture
def holder(tmp_path, start):
    """Another process that has the folder."""
    return start(HOLD, tmp_path / "out", "held")


def test_a_folder_in_use_is_refused_and_its_holder_named(holder, tmp_path):
    for _ in range(2):  # being refused takes nothing from the holder
        with pytest.raises(DitAccelError) as error, files.hold(tmp_path / "out"):
            pass
        assert f"out is in use by process {holder.pid} on {platform.node()}, at work since 20" in str(error.value)
        assert "choose another --output" in str(error.value)


def test_a_killed_holder_holds_nothing(holder, tmp_path):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert str(holder.pid) in (tmp_path / "out" / files.LOCK).read_text()
    with files.hold(tmp_path / "out") as reserved:
        assert reserved
        assert f"process {os.getpid()} on" in (tmp_path / "out" / files.LOCK).read_text()
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]  # which was there before this process came
    assert list((tmp_path / "out").iterdir()) == []


def test_nothing_is_left_of_a_folder_in_which_nothing_was_written(tmp_path):
    with pytest.raises(ZeroDivisionError), files.hold(tmp_path / "new" / "out"):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
    with files.hold(tmp_path / "new" / "out"):
        (tmp_path / "new" / "out" / "a").write_text("a")
    assert [path.name for path in (tmp_path / "new" / "out").iterdir()] == ["a"]


def test_a_file_system_without_locks_keeps_nothing(tmp_path, monkeypatch):
    def none(file, how):
        raise OSError(files.errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "flock", none)
    with files.hold(tmp_path) as reserved:
        assert not reserved


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DitAccelError, match=names("File exists")), files.hold(tmp_path / "file"):
        pass


def test_staged_files_appear_together(tmp_path):
    with files.staged(tmp_path / "new" / "a.txt") as stage:
        (stage / "a.txt").write_text("a")
        (stage / "b.txt").write_text("b")
        assert list((tmp_path / "new").glob("*.txt")) == []
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["a.txt", "b.txt"]


def test_nothing_is_left_when_writing_fails(tmp_path):
    (tmp_path / "a.txt").write_text("old")
    with pytest.raises(ZeroDivisionError), files.staged(tmp_path / "a.txt") as stage:
        (stage / "a.txt").write_text("new")
        raise ZeroDivisionError
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "old"


def test_a_full_disk_is_one_line(tmp_path):
    with (
        pytest.raises(DitAccelError, match=names("No space left")),
        files.staged(tmp_path / "a") as stage,
    ):
        (stage / "a").write_text("x")
        raise OSError(28, "No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_is_too_long_is_refused_before_the_work(tmp_path):
    with pytest.raises(DitAccelError, match="cannot be written"):
        files.check_file(tmp_path / f"{'a' * 250}.mp4", (".mp4",))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["a.mov", "a", "a.mp4.txt"])
def test_endings(tmp_path, name):
    with pytest.raises(DitAccelError, match=names(".mp4", ".gif")):
        files.check_file(tmp_path / name, VIDEOS)


def test_a_folder_is_no_output(tmp_path):
    (tmp_path / "a.mp4").mkdir()
    with pytest.raises(DitAccelError, match="is a folder"):
        files.check_file(tmp_path / "a.mp4", VIDEOS)


def test_an_unwritable_folder_is_found_before_the_work(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DitAccelError, match="cannot be written"):
        files.check_file(tmp_path / "file" / "a.mp4", VIDEOS)


def test_a_folder_that_is_not_there_yet_is_fine_and_not_made(tmp_path):
    files.check_file(tmp_path / "x" / "y" / "a.mp4", VIDEOS)
    assert list(tmp_path.iterdir()) == []


STAGE = "import pathlib, sys, time; from dit_accel.files import staged; stage = staged(pathlib.Path(sys.argv[1])); "
STAGE += "(stage.__enter__() / 'a.txt').write_text('half'); print('writing', flush=True); time.sleep(600)"


def test_what_a_killed_process_left_is_removed_and_nothing_that_is_still_written(tmp_path, start):
    (killed, writing, other) = (start(STAGE, tmp_path / name, "writing") for name in ("a.txt", "a.txt", "b.txt"))
    killed.kill()
    killed.wait()
    left = set(tmp_path.iterdir())
    assert len(left) == 3
    with files.staged(tmp_path / "a.txt") as stage:
        (stage / "a.txt").write_text("a")
    remaining = set(tmp_path.iterdir()) - {tmp_path / "a.txt"}
    assert remaining < left
    assert sorted(path.name.rpartition(".")[0] for path in remaining) == [".dit-accel-a.txt", ".dit-accel-b.txt"]
    assert (writing.poll(), other.poll()) == (None, None)
    (stage_of_a,) = (path for path in remaining if "a.txt" in path.name)
    assert (stage_of_a / "a.txt").read_text() == "half"


def test_a_folder_takes_the_place_of_an_older_one(tmp_path):
    for text in ("old", "new"):
        with files.staged(tmp_path / "a") as stage:
            (stage / "a").mkdir()
            (stage / "a" / "state.json").write_text(f"{files.MARK} {text}")
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["a", "a/state.json"]
    assert (tmp_path / "a" / "state.json").read_text() == f"{files.MARK} new"


def test_a_replaced_file_has_the_modes_of_any_other(tmp_path):
    (tmp_path / "plain").write_text("")
    files.replace_file(tmp_path / "new" / "a", b"a")
    assert (tmp_path / "new" / "a").stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert (tmp_path / "new" / "a").read_bytes() == b"a"


def test_a_full_disk_leaves_no_folder(tmp_path):
    with pytest.raises(DitAccelError, match="No space left"), files.staged(tmp_path / "new" / "data" / "a") as stage:
        (stage / "a").write_text("half")
        raise OSError(files.errno.ENOSPC, "No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_removed_while_it_is_held(tmp_path):
    with files.hold(tmp_path / "out"):
        shutil.rmtree(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("depth", [0, 2])
def test_a_lock_that_cannot_be_written_leaves_no_file_and_no_folder(tmp_path, depth):
    """A process whose files may have no byte, as on a full disk."""
    resource = pytest.importorskip("resource")
    folder = tmp_path.joinpath(*("new" for _ in range(depth)))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        with pytest.raises(DitAccelError, match=names(folder)), files.hold(folder):
            pytest.fail("the folder is reserved without a byte for its holder's name")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []
    with files.hold(folder) as locked:
        assert locked
