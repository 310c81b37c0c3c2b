"""The daemon's one thread: waits for clients, signals and calls from other threads, and does what they ask in turn."""

from __future__ import annotations

import select
import signal
import socket
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Loop:
    """Calls what was registered for a descriptor when it can be read, or written.

    threads  run() and all else in one, call_soon() from any
    """

    def __init__(self) -> None:
        self._readers: dict[int, Callable[[], None]] = {}
        self._writers: dict[int, Callable[[], None]] = {}
        self._calls: deque[Callable[[], None]] = deque()
        self._woken, self._waker = socket.socketpair()
        self._woken.setblocking(False)
        self._waker.setblocking(False)
        self._is_stopping = False
        self.on_read(self._woken.fileno(), self._on_wake)

    def on_read(self, descriptor: int, call: Callable[[], None] | None) -> None:
        """Have something called when there is something to be read; None: nothing any more."""
        _put(self._readers, descriptor, call)

    def on_write(self, descriptor: int, call: Callable[[], None] | None) -> None:
        _put(self._writers, descriptor, call)

    def call_soon(self, call: Callable[[], None]) -> None:
        self._calls.append(call)
        with suppress(OSError):  # it has been woken often enough, or has ended
            self._waker.send(b"\0")

    @property
    def is_stopping(self) -> bool:
        return self._is_stopping

    def stop(self) -> None:
        self._is_stopping = True

    def run(self) -> None:
        """Until stop(); what was to be called by then is called."""
        while not self._is_stopping:
            self.turn()

    def turn(self) -> None:
        """Wait for something, and do what there is to do then."""
        poll = select.poll()
        for descriptor in self._readers.keys() | self._writers.keys():
            events = select.POLLIN if descriptor in self._readers else 0
            poll.register(descriptor, events | (select.POLLOUT if descriptor in self._writers else 0))
        for descriptor, events in poll.poll():
            if events & ~select.POLLOUT and descriptor in self._readers:
                self._readers[descriptor]()
            if events & ~select.POLLIN and descriptor in self._writers:
                self._writers[descriptor]()
            if self._is_stopping:
                return

    @contextmanager
    def stopped_by_signals(self) -> Iterator[None]:
        """End run() on SIGINT, SIGTERM and SIGHUP."""

        def on_signal(number: int, frame: FrameType | None) -> None:
            self.stop()

        previous = {number: signal.signal(number, on_signal) for number in STOP_SIGNALS}
        descriptor = signal.set_wakeup_fd(self._waker.fileno(), warn_on_full_buffer=False)
        try:
            yield
        finally:
            signal.set_wakeup_fd(descriptor)
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _on_wake(self) -> None:
        with suppress(BlockingIOError):
            self._woken.recv(1 << 12)
        while self._calls:
            self._calls.popleft()()


def _put(calls: dict[int, Callable[[], None]], descriptor: int, call: Callable[[], None] | None) -> None:
    if call is None:
        calls.pop(descriptor, None)
    else:
        calls[descriptor] = call
