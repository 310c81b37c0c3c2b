"""Our servers as programs: started as a user starts them, and stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from tests.support.tools import REPOSITORY


class Serving:
    """A `qcow2snap serve` that has printed its URIs."""

    def __init__(
        self,
        *arguments: str | Path,
        stderr: int | IO[bytes] = subprocess.PIPE,
        process_group: int | None = None,
        command: str = "serve",
        before: Sequence[str] = (),
    ) -> None:
        """`before`: words in front of the command, which end with running it."""
        words = [*before, sys.executable, "-m", "qcow2snap", command, *map(str, arguments)]
        env = os.environ | {"PYTHONPATH": str(REPOSITORY)}
        self.process = subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=stderr, env=env, process_group=process_group
        )
        self.stderr = ""  # once it has ended
        assert self.process.stdout is not None
        printed = os.read(self.process.stdout.fileno(), 1 << 16)  # all at once, and flushed
        if not printed:
            raise AssertionError(self.process.communicate(timeout=20)[1])
        self.uris = printed.decode().split()

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        self.stderr = (self.process.communicate(timeout=20)[1] or b"").decode()
        return self.process.returncode
