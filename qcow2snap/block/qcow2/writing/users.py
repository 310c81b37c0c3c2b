"""Who reads or writes clusters now, by where a table said they are: those must not be used for anything else meanwhile.

Nobody waits for anybody here, but those who want all writers to stop for a moment. A user is known by the generation in
which he began. What a table no longer refers to since generation G is used by nobody who began after G.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count

NOBODY = 1 << 62  # a generation that never comes


class Users:
    """begin() before tables are looked at, end() when the clusters that they told of have been read or written.

    threads  any
    cost     half a microsecond; nothing is locked, for the interpreter does each step as one
    """

    def __init__(self) -> None:
        self._numbers = count()
        self._active: dict[int, int] = {}
        self._generation = 0

    def begin(self) -> int:
        """What it gives has to be given to end()."""
        number = next(self._numbers)
        self._active[number] = self._generation
        return number

    def end(self, number: int) -> None:
        del self._active[number]

    @contextmanager
    def using(self) -> Iterator[None]:
        number = self.begin()
        try:
            yield
        finally:
            self.end(number)

    def next_generation(self) -> int:
        """End a generation; gives it. With a lock held that is held whenever tables change."""
        ended = self._generation
        self._generation = ended + 1
        return ended

    def oldest(self) -> int:
        """The generation in which the first of today's users began."""
        return min(list(self._active.values()), default=NOBODY)


class Gate:
    """Writers pass, one beside the other, until somebody wants to be alone.

    threads  enter() and leave() with the lock held that it was made with, alone() without it
    """

    def __init__(self, lock: threading.Lock) -> None:
        self._changed = threading.Condition(lock)
        self._inside = 0
        self._closed = False

    def enter(self) -> None:
        while self._closed:
            self._changed.wait()
        self._inside += 1

    def leave(self) -> None:
        self._inside -= 1
        if self._closed and not self._inside:
            self._changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """While this lasts, no writer is inside; it begins when the last has left. Not for a writer."""
        with self._changed:
            while self._closed:
                self._changed.wait()
            self._closed = True
            while self._inside:
                self._changed.wait()
        try:
            yield
        finally:
            with self._changed:
                self._closed = False
                self._changed.notify_all()
