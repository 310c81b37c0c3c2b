"""The programs that tests run: QEMU's tools, which say what is right, and our own command line, which is judged."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
TIME_LIMIT = 60  # seconds; no single step of a test may take longer

Argument = str | bytes | os.PathLike[str]


class ToolFailed(AssertionError):
    """A program that a test relies on did not do what it was asked."""


class Result(NamedTuple):
    """What a program said, and how it ended."""

    stdout: str
    stderr: str
    returncode: int

    def json(self) -> Any:
        assert self.returncode == 0, self.stderr
        return json.loads(self.stdout)


def require(tool: str) -> str:
    """The path of a program. Without it the test is skipped, but where CI=true it fails: there, all are installed."""
    path = shutil.which(tool, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin")
    if path is None:
        if os.environ.get("CI") == "true":
            pytest.fail(f"{tool} is not installed")
        pytest.skip(f"{tool} is not installed")
    return path


def run(*args: Argument, stdin: str | None = None, env: dict[str, str] | None = None) -> Result:
    """Our command line, in a process of its own: run("list", image, "--json")."""
    environ = os.environ | {"PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])}
    return _finish([sys.executable, "-m", "qcow2snap", *args], stdin=stdin, env=environ | (env or {}))


def qemu_img(*args: Argument, check: bool = True) -> Result:
    """qemu-img, which has to succeed unless `check` is False."""
    return _judge(_finish([require("qemu-img"), *args], cwd=_home(*args)), args, check)


def qemu_io(path: Argument, *commands: str, options: tuple[str, ...] = (), check: bool = True) -> Result:
    """Any number of qemu-io commands on one image, in one process. Each has to succeed unless `check` is False."""
    # Caching without flushes makes it twice as fast; nothing here survives a power cut.
    writing = () if "-r" in options else ("-t", "unsafe", "-d", "unmap")
    each = [argument for command in commands for argument in ("-c", command)]
    result = _finish([require("qemu-io"), *writing, *options, *each, path], cwd=_home(path))
    return _judge(result, commands, check)


def qemu_info(path: Argument) -> Any:
    """`qemu-img info` of one image, without its backing chain."""
    return qemu_img("info", "--output=json", path).json()


def qemu_map(path: Argument) -> list[dict[str, Any]]:
    """`qemu-img map` of the active disk, entry by entry."""
    entries: list[dict[str, Any]] = qemu_img("map", "--output=json", path).json()
    return entries


def _finish(
    command: list[Argument], *, stdin: str | None = None, env: dict[str, str] | None = None, cwd: Path | None = None
) -> Result:
    done = subprocess.run(
        command, input=stdin, env=env, cwd=cwd, capture_output=True, timeout=TIME_LIMIT, encoding="utf-8",
        errors="replace",
    )  # fmt: skip
    return Result(done.stdout, done.stderr, done.returncode)


def _home(*args: Argument) -> Path | None:
    """Where QEMU's tools have to run: that is where they look for an external data file, not beside the image."""
    return next((argument.parent for argument in args if isinstance(argument, Path)), None)


def _judge(result: Result, what: tuple[Argument, ...], check: bool) -> Result:
    if check and result.returncode != 0:
        raise ToolFailed(f"{what!r} ended with {result.returncode}: {result.stderr}{result.stdout}")
    return result
