"""One command, run within limits of time, memory and output, and how it ended. Knows nothing of images.

Limits are set from here by prlimit once the command runs: a function between fork and exec is not safe where there are
threads. Memory is limited in two ways. RLIMIT_DATA makes large allocations fail; unlike RLIMIT_AS it leaves alone who
only reserves addresses, as Go, Java and sanitizers do by the gigabyte. And what the command and its children hold
together is looked at again and again, since the limit is each one's own.
"""

from __future__ import annotations

import os
import re
import resource
import select
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from enum import Enum
from pathlib import Path
from typing import NamedTuple

_LOOK_EVERY = 0.02  # seconds
_MESSAGE = 2000  # bytes of what it said last
_LOG_LIMIT = 1 << 20  # bytes that it may say at least, on standard error
_PAGE = os.sysconf("SC_PAGE_SIZE")

# What programs say when an allocation failed: then it was the limit that ended them, not the image.
_OUT_OF_MEMORY = re.compile(
    rb"MemoryError|[Cc]annot allocate memory|[Oo]ut of memory|OutOfMemory|bad_alloc"
    rb"|memory allocation of \d+ bytes failed"
)
# A shell in between says 128 + N for signal N. These are the ones by which programs crash, or are killed.
_SHELL_SIGNALS = {128 + number for number in (4, 5, 6, 7, 8, 9, 11, 31)}


class End(Enum):
    EXIT = "exit"
    CRASH = "crash"
    TIMEOUT = "timeout"
    MEMORY = "memory"
    OUTPUT = "output"


class Ended(NamedTuple):
    """How a command ended: for EXIT its exit code; for CRASH the signal."""

    end: End
    code: int
    seconds: float
    message: str  # the last that it said on standard error


class Limits(NamedTuple):
    """Seconds; bytes of memory, 0 for no limit; and what tells that all that runs is to end, as if its time were up."""

    timeout: float
    memory: int
    stopped: Callable[[], bool]


def run_limited(
    command: Sequence[str], limits: Limits, *, log: Path, output: Path, output_limit: int, to_stdout: bool
) -> Ended:
    """Run a command, without a shell. `output` is the file that it writes, by its name or as its standard output.

    Raises OSError if it cannot be started.
    """
    started = time.monotonic()
    with log.open("wb") as said, (output if to_stdout else Path(os.devnull)).open("wb") as out:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=said, start_new_session=True)
        try:
            _limit(process.pid, limits, max(output_limit, _LOG_LIMIT) + 1)
            stopped = _watch(process.pid, limits, started + limits.timeout)
        finally:
            # While it is not waited for, its process group cannot be another's.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    code, seconds, last = process.returncode, time.monotonic() - started, _tail(log)
    message = last.decode("utf-8", "backslashreplace").strip()
    if stopped is not None:
        return Ended(stopped, code, seconds, message)
    if code == -signal.SIGXFSZ or (output.exists() and output.stat().st_size > output_limit):
        return Ended(End.OUTPUT, code, seconds, message)
    if code != 0 and _OUT_OF_MEMORY.search(last):
        return Ended(End.MEMORY, code, seconds, message)
    if code < 0 or code in _SHELL_SIGNALS:
        return Ended(End.CRASH, -code if code < 0 else code - 128, seconds, message)
    return Ended(End.EXIT, code, seconds, message)


def _limit(pid: int, limits: Limits, file_size: int) -> None:
    wanted = [(resource.RLIMIT_CORE, 0), (resource.RLIMIT_FSIZE, file_size)]
    if limits.memory:
        wanted.append((resource.RLIMIT_DATA, limits.memory))
    for kind, value in wanted:
        with suppress(ProcessLookupError):  # it has ended
            _, hard = resource.prlimit(pid, kind)
            value = value if hard == resource.RLIM_INFINITY else min(value, hard)
            resource.prlimit(pid, kind, (value, value))


def _watch(pid: int, limits: Limits, deadline: float) -> End | None:
    """Until the process ends by itself, or must be ended."""
    handle = os.pidfd_open(pid)
    try:
        poll = select.poll()
        poll.register(handle, select.POLLIN)
        while True:
            left = deadline - time.monotonic()
            if left <= 0 or limits.stopped():
                return End.TIMEOUT
            if poll.poll(min(_LOOK_EVERY, left) * 1000):
                return None
            if limits.memory and _held(pid) > limits.memory:
                return End.MEMORY
    finally:
        os.close(handle)


def _held(pid: int) -> int:
    """Bytes that a process and its children hold in memory."""
    total, waiting = 0, [pid]
    while waiting:
        each = waiting.pop()
        with suppress(OSError, ValueError, IndexError):
            total += int(Path(f"/proc/{each}/statm").read_text().split()[1]) * _PAGE
            for task in os.listdir(f"/proc/{each}/task"):
                children = Path(f"/proc/{each}/task/{task}/children").read_text()
                waiting += [int(child) for child in children.split()]
    return total


def _tail(log: Path) -> bytes:
    with log.open("rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - _MESSAGE))
        return file.read()
