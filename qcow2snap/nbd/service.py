"""A server as a program: its signals, its images opened again, its pid file, its parent's end. For the main thread."""

from __future__ import annotations

import logging
import os
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TYPE_CHECKING, NamedTuple

from qcow2snap.block.node import FileError, Qcow2SnapError, UnsupportedFeature
from qcow2snap.nbd.export import Exports
from qcow2snap.nbd.server import Server

if TYPE_CHECKING:
    from qcow2snap.nbd.connection import Secure

logger = logging.getLogger(__name__)

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
REFRESH_SIGNAL = signal.SIGHUP
OTHER_DESCRIPTORS = 512  # that a process may need besides its connections: images, backing files, channels to workers


class Offer(NamedTuple):
    """What there is to serve, as it was when the images were opened."""

    exports: Exports
    close: Callable[[], None]  # the images
    state: object = None  # of the images; equal if a client could see no difference
    secure: Secure | None = None  # begins TLS by credentials that were read as well


@contextmanager
def signals_held() -> Iterator[None]:
    """Keep the signals until `Service.run` can obey them, so that none of them leaves a socket or a file behind."""
    signals = {*STOP_SIGNALS, REFRESH_SIGNAL}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


@contextmanager
def pid_file(path: str | None) -> Iterator[None]:
    """Our process id in a file, whole or not at all, as long as we run."""
    if path is None:
        yield
        return
    own = f"{path}.{os.getpid()}"
    try:
        with open(own, "x") as file:
            file.write(f"{os.getpid()}\n")
        os.rename(own, path)
    except (OSError, ValueError) as error:
        with suppress(OSError, ValueError):
            os.unlink(own)
        raise FileError(f"{path}: cannot be written: {getattr(error, 'strerror', None) or error}") from error
    try:
        yield
    finally:
        with suppress(OSError):
            os.unlink(path)


def stop_with_parent(server: Server) -> None:
    """Stop when the process that started this one ends, however it does."""
    parent = os.getppid()
    try:
        server.watch(os.pidfd_open(parent), server.request_stop)
    except ProcessLookupError:
        server.request_stop()
    except OSError as error:
        raise UnsupportedFeature(f"--exit-with-parent needs Linux 5.3 or later: {error.strerror}") from error
    if os.getppid() != parent:  # it ended before it could be watched
        server.request_stop()


def allow_connections(count: int) -> None:
    """Have as many descriptors as so many connections take, if the system's hard limit lets us."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = count + OTHER_DESCRIPTORS
    if soft != resource.RLIM_INFINITY and soft < needed:
        needed = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, needed), hard))


class Service:
    """Runs a server until a signal comes, and offers what its images have by then when SIGHUP comes.

    Clients that come after that see the new state; those that are there stay with theirs. The images have been opened
    once already: `offer`. Where they cannot be opened again, the log says so and all stays as it is.
    """

    def __init__(self, server: Server, offer: Offer, reopen: Callable[[], Offer] | None = None) -> None:
        """Without `reopen`, SIGHUP does nothing."""
        self._server = server
        self._state = offer.state
        self._reopen = reopen

    def run(self) -> None:
        previous = {number: signal.signal(number, self._on_stop) for number in STOP_SIGNALS}
        previous[REFRESH_SIGNAL] = signal.signal(REFRESH_SIGNAL, self._on_refresh)
        # The loop waits in poll(): this wakes it at once, where the handlers alone could come a moment too early.
        previous_descriptor = signal.set_wakeup_fd(self._server.wakeup_descriptor, warn_on_full_buffer=False)
        mask = signal.pthread_sigmask(signal.SIG_UNBLOCK, previous)
        try:
            self._server.run()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            signal.set_wakeup_fd(previous_descriptor)
            self._server.stop()
            for number, handler in previous.items():
                signal.signal(number, handler)

    def refresh_every(self, seconds: float) -> None:
        """Look at the images so often, and offer what is new in them."""
        self._server.call_every(seconds, lambda: self._refresh(if_changed=True))

    def _on_stop(self, number: int, frame: FrameType | None) -> None:
        self._server.request_stop()

    def _on_refresh(self, number: int, frame: FrameType | None) -> None:
        self._server.call_soon(lambda: self._refresh(if_changed=False))

    def _refresh(self, *, if_changed: bool) -> None:
        if self._reopen is None:
            return
        try:
            offer = self._reopen()
        except (Qcow2SnapError, OSError) as error:
            logger.warning("the images cannot be opened again, and are served as they were: %s", error)
            return
        if if_changed and offer.state == self._state:
            offer.close()
            return
        self._state = offer.state
        self._server.refresh(offer.exports, close=offer.close, secure=offer.secure)
        logger.info("the images were opened again: %d exports", len(offer.exports))
