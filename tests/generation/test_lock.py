"""Folders that one process at a time writes to."""

import multiprocessing
import os
import platform
import signal
import subprocess
import sys
import threading

import pytest

from dit_accel.errors import DitAccelError
from dit_accel.generation import lock

HOLD = "import pathlib, sys, time; from dit_accel.generation.lock import hold; "
HOLD += "held = hold(pathlib.Path(sys.argv[1])); held.__enter__(); print('held', flush=True); time.sleep(600)"


@pytest.fixture
def holder(tmp_path, root):
    """Another process that has the folder."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "out")]
    environment = os.environ | {"PYTHONPATH": str(root)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_folder_in_use_is_refused_and_its_holder_named(holder, tmp_path):
    for _ in range(2):  # being refused takes nothing from the holder
        with pytest.raises(DitAccelError) as error, lock.hold(tmp_path / "out"):
            pass
        assert f"out is in use by process {holder.pid} on {platform.node()}, at work since 20" in str(error.value)
        assert "choose another --output" in str(error.value)


def test_a_killed_holder_holds_nothing(holder, tmp_path):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert str(holder.pid) in (tmp_path / "out" / lock.NAME).read_text()
    with lock.hold(tmp_path / "out") as kept:
        assert kept
        assert f"process {os.getpid()} on" in (tmp_path / "out" / lock.NAME).read_text()
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]  # which was there before this process came
    assert list((tmp_path / "out").iterdir()) == []


def test_nothing_is_left_of_a_folder_in_which_nothing_was_written(tmp_path):
    with pytest.raises(ZeroDivisionError), lock.hold(tmp_path / "new" / "out"):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
    with lock.hold(tmp_path / "new" / "out"):
        (tmp_path / "new" / "out" / "a").write_text("a")
    assert [path.name for path in (tmp_path / "new" / "out").iterdir()] == ["a"]


def add_one(folder, times):
    """Reads a number and writes the next one, which loses some where two do it at once."""
    for _ in range(times):
        with lock.hold(folder, wait=True):
            number = int((folder / "number").read_text())
            (folder / "number").write_text(str(number + 1))


def test_who_waits_gets_a_lock_that_others_see(tmp_path):
    """The file is removed by each holder, so that the ones that wait wait for a file that is no longer there."""
    (tmp_path / "number").write_text("0")
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    processes = [context.Process(target=add_one, args=(tmp_path, 200)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert (tmp_path / "number").read_text() == "600"
    assert [path.name for path in tmp_path.iterdir()] == ["number"]


def test_who_waits_comes_next(tmp_path):
    order, waits = [], threading.Event()

    def wait():
        waits.set()
        with lock.hold(tmp_path, wait=True):
            order.append("second")

    with lock.hold(tmp_path):
        other = threading.Thread(target=wait)
        other.start()
        waits.wait()
        order.append("first")
    other.join()
    assert order == ["first", "second"]


def test_a_file_system_without_locks_keeps_nothing(tmp_path, monkeypatch):
    def none(file, how):
        raise OSError(lock.errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "flock", none)
    with lock.hold(tmp_path) as kept:
        assert not kept


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DitAccelError, match="could not be written: File exists"), lock.hold(tmp_path / "file"):
        pass
