"""What a command does about signals if it runs others: end them, then itself. Of its own files see signals.py."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


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

    wanted = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
    previous = {number: signal.getsignal(number) for number in wanted}
    taken = [number for number in wanted if previous[number] is not signal.SIG_IGN]  # switched off, as by nohup: stays
    for number in taken:
        signal.signal(number, note)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, previous[number])
    if heard:
        sys.exit(128 + heard[0])
