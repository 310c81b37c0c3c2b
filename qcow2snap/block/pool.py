"""The threads that work ahead of readers: one pool for the process, one thread for each processor it may use."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor

_lock = threading.Lock()
_pool: ThreadPoolExecutor | None = None


def thread_pool() -> ThreadPoolExecutor:
    """The pool, made when first asked for: before that, a process may fork."""
    global _pool
    with _lock:
        if _pool is None:
            _pool = ThreadPoolExecutor(len(os.sched_getaffinity(0)), thread_name_prefix="ahead")
        return _pool


def _forget() -> None:
    """In the child of a fork, where its threads are not."""
    global _pool, _lock
    _pool, _lock = None, threading.Lock()


os.register_at_fork(after_in_child=_forget)
