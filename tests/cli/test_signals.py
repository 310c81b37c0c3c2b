"""SIGTERM, SIGHUP and ^C end every command at once, whatever it waits for, and nothing half-written is left."""

from __future__ import annotations

import fcntl
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cli.support import contents, finish, start
from tests.support import Image, Library
from tests.support.tools import REPOSITORY, TIME_LIMIT
from tests.support.waiting import until

SIGNALS = pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP], ids=lambda n: n.name)


def heed() -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)  # a test run in the background inherits SIGINT switched off


@pytest.fixture
def unread() -> Iterator[int]:
    """The write end of a pipe that is full, and that nobody reads."""
    read_end, write_end = os.pipe()
    fcntl.fcntl(write_end, fcntl.F_SETPIPE_SZ, 4096)
    os.write(write_end, bytes(4096))
    yield write_end
    os.close(read_end)
    os.close(write_end)


def is_writing(process: Any) -> bool:
    """Whether its main thread waits in write()."""
    return "write" in Path(f"/proc/{process.pid}/wchan").read_text()


@SIGNALS
@pytest.mark.parametrize(
    "words", ["list {}", "map {}", "info --json {}", "digest {}", "check --deep {}", "diff {} monday", "extract {} -"]
)
def test_a_command_that_writes_to_whom_nobody_reads_can_be_ended(
    library: Library, unread: int, words: str, number: signal.Signals
) -> None:
    process = start(*words.format(library.path("demo")).split(), stdout=unread, preexec_fn=heed)
    assert until(lambda: is_writing(process))
    process.send_signal(number)
    result = finish(process)
    assert (result.returncode, result.stderr) == (-number, "")


IN_A_LOCK = """
import concurrent.futures.thread, os, sys, threading, time
from qcow2snap.cli import main
class Interrupted:  # the queue of a pool's jobs, or the event of one: a lock that is taken when the signal strikes
    def __enter__(self):
        lock.acquire()
        os.kill(os.getpid(), int(sys.argv[1]))
        time.sleep(1)
    def __exit__(self, *args):
        lock.release()
lock = threading.Lock()
concurrent.futures.thread._global_shutdown_lock = Interrupted()
main(sys.argv[2:])
"""


@pytest.mark.parametrize("words", ["extract {} OUT", "extract -O qcow2 {} OUT", "digest {}", "diff --verify {} monday"])
def test_a_signal_within_the_code_of_a_lock_ends_it_too(library: Library, tmp_path: Path, words: str) -> None:
    """Where an exception would leave the lock taken, and the end of the pool would wait for it for ever."""
    command = [sys.executable, "-c", IN_A_LOCK, str(int(signal.SIGINT)), *words.format(library.path("demo")).split()]
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(REPOSITORY)}, timeout=TIME_LIMIT, preexec_fn=heed
    )
    assert done.returncode == -signal.SIGINT
    assert contents(tmp_path) == []


BETWEEN_OUTPUTS = """
import os, sys, time
from qcow2snap.cli import main
link = os.link
def interrupted(*args):
    link(*args)
    os.kill(os.getpid(), int(sys.argv[1]))
    time.sleep(0.1)
os.link = interrupted
main(sys.argv[2:])
"""


@pytest.mark.parametrize(
    "words",
    [
        "create -o data_file=disk.raw disk.qcow2 1M",
        "extract -O qcow2 -o data_file=disk.raw {} disk.qcow2",
        "extract --skip-damaged {} disk.raw",
    ],
)
def test_two_files_that_belong_together_appear_both_or_none(library: Library, tmp_path: Path, words: str) -> None:
    words = words.format(library.path("demo"))
    command = [sys.executable, "-c", BETWEEN_OUTPUTS, str(int(signal.SIGTERM)), *words.split()]
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(REPOSITORY)}, timeout=TIME_LIMIT, preexec_fn=heed
    )
    assert done.returncode == -signal.SIGTERM
    assert len(contents(tmp_path)) == 2
    assert not [name for name in contents(tmp_path) if name.endswith(".part")]


@pytest.fixture
def terminal() -> Iterator[tuple[int, Callable[[], bytes]]]:
    """A terminal's end for a process, and what was shown on it so far."""
    ours, theirs = pty.openpty()
    os.set_blocking(ours, False)
    shown = b""

    def read() -> bytes:
        nonlocal shown
        try:
            while data := os.read(ours, 1 << 16):
                shown += data
        except BlockingIOError:
            pass
        return shown

    yield theirs, read
    os.close(ours)
    os.close(theirs)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda n: n.name)
def test_a_progress_bar_leaves_the_cursor_as_it_was(
    slow_image: Image, terminal: tuple[int, Callable[[], bytes]], number: signal.Signals
) -> None:
    theirs, shown = terminal
    process = start("digest", slow_image.path, stderr=theirs, env={"TERM": "xterm"}, preexec_fn=heed)
    assert until(lambda: b"\x1b[?25l" in shown())
    process.send_signal(number)
    assert process.wait(TIME_LIMIT) == -number
    assert shown().rstrip().endswith(b"\x1b[?25h")
