"""Going to the background: the process that was started stays until the daemon is ready, or says why it is not."""

from __future__ import annotations

import os
import sys


class Background:
    """The daemon's side of it. Make it before there is any thread, or anything that a child must not share."""

    def __init__(self) -> None:
        """Returns in the new process only."""
        waiting, self._ready = os.pipe2(os.O_CLOEXEC)
        if os.fork():
            os.close(self._ready)
            is_ready = os.read(waiting, 1) == b"\0"
            os._exit(0 if is_ready else 1)
        os.close(waiting)
        os.setsid()

    def ready(self) -> None:
        """Let the first process end, and leave the terminal and the directory alone."""
        os.chdir("/")
        null = os.open(os.devnull, os.O_RDWR)
        sys.stdout.flush()
        sys.stderr.flush()
        for descriptor in (0, 1, 2):
            os.dup2(null, descriptor)
        os.close(null)
        os.write(self._ready, b"\0")
        os.close(self._ready)
