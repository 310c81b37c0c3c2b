"""What commands do about signals if they write files or run others: end, and leave nothing behind."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def terminable() -> Iterator[None]:
    """Signals as an exception, so that what is half written is taken away. One switched off, as by nohup, stays off."""

    def leave(signum: int, _frame: object) -> None:
        sys.exit(128 + signum)

    with _handled(leave):
        yield


@contextmanager
def stopped_by_signals(stop: Callable[[], None]) -> Iterator[None]:
    """Signals call `stop`, which is to make the block end soon; the command ends then, with the first signal's code.

    For what waits for threads: an exception could strike while a lock of theirs is being taken, and leave it taken.
    `stop` may be called at any instant, again and within itself, and so must take no lock either.
    """
    heard: list[int] = []

    def note(signum: int, _frame: object) -> None:
        heard.append(signum)
        stop()

    with _handled(note):
        yield
    if heard:
        sys.exit(128 + heard[0])


@contextmanager
def _handled(handler: Callable[[int, object], None]) -> Iterator[None]:
    wanted = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
    previous = {number: signal.getsignal(number) for number in wanted}
    taken = [number for number in wanted if previous[number] is not signal.SIG_IGN]
    for number in taken:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, previous[number])
