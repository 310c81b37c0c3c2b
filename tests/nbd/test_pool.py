"""Threads that help: a job is done once, by whoever takes it, and a process that was forked has threads of its own."""

from __future__ import annotations

import os
import threading

from qcow2snap.nbd import pool


def test_a_job_that_is_taken_back_is_not_done() -> None:
    one, busy, done = pool.ThreadPool(1), threading.Event(), threading.Event()
    first = one.submit(lambda: busy.wait(20))
    second = one.submit(done.set)
    assert one.is_wanted
    assert not first.is_done
    assert second.take_back()
    assert second.is_done
    assert not second.take_back()
    busy.set()
    first.wait()
    one.submit(lambda: None).wait()
    assert not done.is_set()


def test_a_child_of_a_fork_makes_a_pool_of_its_own() -> None:
    assert pool.thread_pool() is pool.thread_pool()
    assert pool.thread_pool().size == len(os.sched_getaffinity(0)) - 1
    before = pool.thread_pool()
    child = os.fork()
    if child == 0:  # whatever happens, this must not return into pytest
        try:
            os._exit(pool.thread_pool() is before)
        except BaseException:
            os._exit(2)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
