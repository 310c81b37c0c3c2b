"""What the server says of its clients, on standard error: never so much that it harms. What is said is said elsewhere.

A client can cause a line by connecting, and it can connect ten thousand times a second. So lines beyond a rate are
counted instead of written; and a pipe that nobody reads, or reads too slowly, costs lines and not the server's time.
"""

from __future__ import annotations

import logging
import os
import socket
import stat
import time
from collections.abc import Callable

BURST = 100  # lines that may come at once
RATE = 10  # lines a second after that
MAX_LINE = 1 << 12  # bytes: what a pipe takes whole, or not at all


class LogHandler(logging.Handler):
    """Writes lines to a descriptor that this process has for standard error.

    threads  any, as with all handlers. A process that is forked off has a rate of its own
    errors   none: what cannot be written is lost, and counted where somebody was only too slow
    """

    def __init__(self, descriptor: int = 2, *, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter("qcow2snap: %(message)s"))
        self._write = _writer(descriptor)
        self._clock = clock
        self._credit = float(BURST)
        self._since = clock()
        self._left_out = 0

    def emit(self, record: logging.LogRecord) -> None:
        now = self._clock()
        self._credit = min(BURST, self._credit + (now - self._since) * RATE)
        self._since = now
        if self._credit < 1:
            self._left_out += 1
            return
        self._credit -= 1
        line = self.format(record)
        if self._left_out:
            line = f"qcow2snap: {self._left_out} lines left out\n{line}"
        try:
            self._write(f"{line}\n".encode(errors="backslashreplace")[-MAX_LINE:])
        except BlockingIOError:
            self._left_out += 1
        except OSError:
            pass  # nobody is there to be told
        else:
            self._left_out = 0


def log_to_stderr(*, verbose: bool) -> None:
    """Log what users should know; `verbose`: also who connects, what they read and how much."""
    logging.basicConfig(handlers=[LogHandler()], level=logging.INFO if verbose else logging.WARNING)


def _writer(descriptor: int) -> Callable[[bytes], object]:
    """Write without waiting, and without making others wait less: they may have the same pipe or socket."""
    try:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISSOCK(mode):  # the journal's
            sock = socket.socket(fileno=os.dup(descriptor))
            return lambda data: sock.send(data, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        if not stat.S_ISREG(mode):
            again = os.open(f"/proc/self/fd/{descriptor}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
            return lambda data: os.write(again, data)
    except OSError:
        pass
    return lambda data: os.write(descriptor, data)
