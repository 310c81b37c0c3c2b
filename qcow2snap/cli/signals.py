"""Signals end a command at once, whatever it is doing, and leave nothing half-written. Servers have their own ways."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from qcow2snap.block.output import discard_unfinished
from qcow2snap.cli.progress import show_cursor

_PATIENCE = 1  # seconds that taking away what is unfinished may take


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """What ends this process ends it at once, with nothing left behind. A signal switched off, as by nohup, stays off.

    A thread waits for the signals, which no other one takes. A handler that raises an exception can strike within the
    code of a lock, which then is taken for ever; and the end would wait for who reads our output. For the main thread,
    before it starts others.
    """
    wanted = {signal.SIGTERM, signal.SIGHUP, signal.SIGINT}
    previous = {number: signal.getsignal(number) for number in wanted}
    heard = {number for number in wanted if previous[number] is not signal.SIG_IGN}
    if not heard:
        yield
        return
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, heard)
    for number in heard:
        signal.signal(number, signal.SIG_DFL)
    waiter = _Waiter(heard)
    waiter.start()
    try:
        yield
    finally:
        waiter.stop()
        for number in heard:
            signal.signal(number, previous[number])
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


class _Waiter(threading.Thread):
    """Waits for a signal, and ends the process. The signals are blocked in whoever starts it."""

    def __init__(self, heard: set[signal.Signals]) -> None:
        super().__init__(name="signals", daemon=True)
        self._heard = heard
        self._lock = threading.Lock()
        self._is_over = False

    def run(self) -> None:
        number = signal.sigwait(self._heard)
        with self._lock:
            if self._is_over:
                return
        signal.alarm(_PATIENCE)  # which ends the process, should the file system or the terminal not answer
        discard_unfinished()
        show_cursor()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})
        os.kill(os.getpid(), number)

    def stop(self) -> None:
        with self._lock:  # so that the thread is still there when it is woken
            self._is_over = True
            assert self.ident is not None
            signal.pthread_kill(self.ident, next(iter(self._heard)))
        self.join()
