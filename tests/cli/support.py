"""Ways to run the command line that `run` does not have, and what all of its refusals have in common."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from qcow2snap.cli import main
from tests.support import Result
from tests.support.tools import REPOSITORY, TIME_LIMIT, Argument


def start(*args: Argument, before: tuple[str, ...] = (), env: dict[str, str] | None = None, **options: Any) -> Any:
    """Our command line as a process that runs on; its output is bytes. `before` are words in front of the command."""
    environ = os.environ | {"PYTHONPATH": str(REPOSITORY), "TZ": "UTC"} | (env or {})
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    return subprocess.Popen([*before, sys.executable, "-m", "qcow2snap", *args], env=environ, **options)


def finish(process: Any) -> Result:
    """What a process said, once it has ended by itself."""
    try:
        out, err = process.communicate(timeout=TIME_LIMIT)
    finally:
        process.kill()
    return Result((out or b"").decode(errors="replace"), (err or b"").decode(errors="replace"), process.returncode)


def raw_output(*args: Argument) -> bytes:
    """What a command that succeeds writes to standard output, byte by byte."""
    process = start(*args)
    out, err = process.communicate(timeout=TIME_LIMIT)
    assert process.returncode == 0, err
    assert isinstance(out, bytes)
    return out


def here(*args: Argument) -> Result:
    """Our command line within this process, for comparisons of which there are many."""
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", newline="\n") for _ in range(2))
    code = 0
    previous = signal.getsignal(signal.SIGINT)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main([os.fsdecode(argument) for argument in args])
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        finally:
            signal.signal(signal.SIGINT, previous)  # which is ^C for pytest
    return Result(_text(out), _text(err), code)


def _text(stream: io.TextIOWrapper) -> str:
    stream.flush()
    stream.seek(0)
    return stream.read()


def complaint(result: Result) -> str:
    """The one line that says why a command could not do it."""
    assert result.returncode == 1, result
    assert result.stderr.startswith("qcow2snap: ")
    assert result.stderr.endswith("\n")
    assert len(result.stderr.splitlines()) == 1, result.stderr
    return result.stderr.removeprefix("qcow2snap: ").rstrip("\n")


def contents(directory: Path) -> list[str]:
    """What lies in a directory, hidden files too."""
    return sorted(os.listdir(directory))
