"""What commands do about signals if they write files or run others: end, and leave nothing behind."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def terminable() -> Iterator[None]:
    """Signals as an exception, so that what is half written is taken away. One switched off, as by nohup, stays off."""

    def leave(signum: int, _frame: object) -> None:
        sys.exit(128 + signum)

    wanted = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
    previous = {number: signal.getsignal(number) for number in wanted}
    heard = [number for number in wanted if previous[number] is not signal.SIG_IGN]
    for number in heard:
        signal.signal(number, leave)
    try:
        yield
    finally:
        for number in heard:
            signal.signal(number, previous[number])
