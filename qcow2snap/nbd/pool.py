"""The threads that help those of the connections: one pool for the process, one thread fewer than it has processors.

A job may be some 100 µs of work outside of Python, so what hands it over has to be cheap: a future of
concurrent.futures takes 40 µs of the interpreter, a Job of two locks 5.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from queue import SimpleQueue

logger = logging.getLogger(__name__)


class Job:
    """Work for the pool, which whoever needs its result first may take back.

    threads  any
    errors   of the work: the log's
    """

    __slots__ = ("_claimed", "_running", "_work")

    def __init__(self, work: Callable[[], None]) -> None:
        self._work = work
        self._claimed = threading.Lock()  # held from when it is clear who does it
        self._running = threading.Lock()  # held until it is done, or will not be
        self._running.acquire()

    def take_back(self) -> bool:
        """Whether it has not been begun; then it never will be."""
        if not self._claimed.acquire(blocking=False):
            return False
        self._running.release()
        return True

    def wait(self) -> None:
        """Until it is done, or was taken back."""
        with self._running:
            pass

    @property
    def is_done(self) -> bool:
        return not self._running.locked()

    def run(self) -> None:
        """In a thread of the pool."""
        if self._claimed.acquire(blocking=False):
            try:
                self._work()
            except Exception:
                logger.exception("a job of the pool failed")
            finally:
                self._running.release()


class ThreadPool:
    """`size` threads that do jobs, in their order. They end with the process, which does not wait for them."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._jobs: SimpleQueue[Job] = SimpleQueue()
        for number in range(size):
            threading.Thread(target=self._run, name=f"helper-{number}", daemon=True).start()

    @property
    def is_wanted(self) -> bool:
        """Whether jobs wait for a thread."""
        return not self._jobs.empty()

    def submit(self, work: Callable[[], None]) -> Job:
        job = Job(work)
        self._jobs.put(job)
        return job

    def _run(self) -> None:
        while True:
            self._jobs.get().run()


_lock = threading.Lock()
_pool: ThreadPool | None = None


def thread_pool() -> ThreadPool:
    """The pool, made when first asked for: before that, a process may fork."""
    global _pool
    with _lock:
        if _pool is None:
            _pool = ThreadPool(len(os.sched_getaffinity(0)) - 1)
        return _pool


def _forget() -> None:
    """In the child of a fork, where its threads are not."""
    global _pool, _lock
    _pool, _lock = None, threading.Lock()


os.register_at_fork(after_in_child=_forget)
