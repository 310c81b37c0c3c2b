"""A server as a program: the signals that stop it and that make it look at its images again. Needs the main thread."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NamedTuple

from qcow2snap.block.node import Qcow2SnapError
from qcow2snap.nbd.export import Exports
from qcow2snap.nbd.server import Server

logger = logging.getLogger(__name__)

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
REFRESH_SIGNAL = signal.SIGHUP


class Offer(NamedTuple):
    """What there is to serve, as it was when the images were opened."""

    exports: Exports
    close: Callable[[], None]  # the images


@contextmanager
def signals_held() -> Iterator[None]:
    """Keep the signals until `run` can obey them, so that none of them leaves a socket behind."""
    signals = {*STOP_SIGNALS, REFRESH_SIGNAL}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def run(server: Server, reopen: Callable[[], Offer] | None = None) -> None:
    """Serve until SIGINT or SIGTERM, or until the server stops by itself. SIGHUP opens the images anew.

    Clients that come then see the new state; those that are there stay with theirs. Without `reopen` it does nothing.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        server.request_stop()

    def refresh(number: int, frame: FrameType | None) -> None:
        if reopen is not None:
            server.call_soon(lambda: _refresh(server, reopen))

    previous = {number: signal.signal(number, stop) for number in STOP_SIGNALS}
    previous[REFRESH_SIGNAL] = signal.signal(REFRESH_SIGNAL, refresh)
    # The loop waits in poll(): this wakes it at once, where the handlers alone could come a moment too early.
    previous_descriptor = signal.set_wakeup_fd(server.wakeup_descriptor, warn_on_full_buffer=False)
    mask = signal.pthread_sigmask(signal.SIG_UNBLOCK, previous)
    try:
        server.run()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.set_wakeup_fd(previous_descriptor)
        for number, handler in previous.items():
            signal.signal(number, handler)


def _refresh(server: Server, reopen: Callable[[], Offer]) -> None:
    try:
        offer = reopen()
    except (Qcow2SnapError, OSError) as error:
        logger.warning("the images cannot be opened again, and are served as they were: %s", error)
        return
    server.refresh(offer.exports, close=offer.close)
    logger.info("the images were opened again: %d exports", len(offer.exports))
