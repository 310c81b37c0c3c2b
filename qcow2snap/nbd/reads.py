"""Sound READs, answered fast. The plain twin, which also answers what is not a sound READ, is `transmission.Answers`.

What is at hand (in the page cache, or zeros) is answered at once, as the requests come. What takes time, for a disk is
slow, or there is much to decompress or to copy, is put aside, and answered when there is nothing else to do. The kernel
is told what will be read of files, so that all of it is under way at once. Where more than one such read waits, threads
of the process's pool help, each with an outbox of its own: what one thread reads, decompresses and sends through one
buffer stays in its processor's cache. When a pool decompressed ahead, for one thread to send, 2 GiB of zstd took 1.2
times as long; and when one thread did all the copying of an image in use, 1.25 times.
"""

from __future__ import annotations

import math
import resource
import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

from qcow2snap.block.node import Extent, Qcow2SnapError
from qcow2snap.nbd.channel import PIECE, Outbox
from qcow2snap.nbd.negotiation import Agreement
from qcow2snap.nbd.pool import Job, thread_pool
from qcow2snap.nbd.read_replies import SENDFILE, ReadReplies
from qcow2snap.nbd.transmission import Answers, Part, parts_of

MAX_MAPPED = 1 << 21  # bytes; where more lie, only the node is asked
MAX_PENDING = 1 << 10  # reads put aside; beyond that no more requests are taken
PATIENCE = 500e-6  # seconds of answering what was put aside, before there is another look at what has arrived

_helper = threading.local()  # `memory` of a pool thread's outboxes, one after the other


class Pending(NamedTuple):
    """A read that was put aside; with its parts, if it is answered by them."""

    cookie: int
    offset: int
    length: int
    whole: bool
    parts: Sequence[Part]


class Reads:
    """The READs of one connection.

    threads  the connection's own; until close(), those of the pool that help it
    errors   OSError of the socket; CutOff. The node's are answers
    """

    def __init__(self, agreement: Agreement, outbox: Outbox, answers: Answers) -> None:
        self._agreement = agreement
        self._node = agreement.node
        self._file_map = agreement.export.file_map
        self._out = outbox
        self._answers = answers
        self._replies = ReadReplies(agreement, outbox, answers)
        self._pending: deque[Pending] = deque()
        self._is_laborious = False  # to answer the last of them takes more than to wait for a disk
        self._helping: list[Job] = []
        self._failure: BaseException | None = None  # of one that helped
        self._blocks_read = _blocks_read()
        self._is_cold = False  # this thread has had to wait for a disk of late

    @property
    def pending(self) -> int:
        """Reads that wait to be answered."""
        return len(self._pending)

    def read(self, cookie: int, offset: int, length: int, *, whole: bool) -> None:
        """Answer a read, or put it aside. `whole`: the client wants one chunk."""
        if length < SENDFILE:
            if not self._replies.copied(cookie, offset, length, wait=False):
                self._put_aside(Pending(cookie, offset, length, whole, ()))
        elif length <= PIECE and self._is_copied(offset, length):
            self._put_aside(Pending(cookie, offset, length, whole, ()))
        else:
            self._read_in_parts(cookie, offset, length, whole)

    def answer_pending(self, *, all_of_them: bool = False) -> None:
        """Answer what was put aside, for a while or to the end."""
        if not self._pending and not all_of_them:
            return
        if self._is_laborious and len(self._pending) > 1:
            self._call_for_help()
        self._answer(self._replies, self._out, math.inf if all_of_them else time.perf_counter() + PATIENCE)
        if all_of_them:
            self._wait_for_help()
        if self._failure is not None:
            raise self._failure
        was_cold, before, self._blocks_read = self._is_cold, self._blocks_read, _blocks_read()
        self._is_cold = self._blocks_read != before
        if self._is_cold and not was_cold:
            for read in tuple(self._pending):
                self._announce(read)

    def close(self) -> None:
        """Answer no more, and wait until nobody helps any longer."""
        self._pending.clear()
        self._out.close()
        self._wait_for_help()

    # What is put aside, and who answers it.

    def _put_aside(self, read: Pending) -> None:
        # The first is answered next, which is quicker done than announced.
        self._is_laborious = bool(self._pending) and not self._announce(read)
        self._pending.append(read)

    def _announce(self, read: Pending) -> bool:
        """Whether the kernel is told to bring all of a read, so that there is only to wait for it."""
        if self._node.must_confirm:
            return False
        # To ask the node takes longer than to read what is in the page cache.
        return self._file_map.prefetch(read.offset, read.length, ask_node=self._is_cold)

    def _answer(self, replies: ReadReplies, outbox: Outbox, until: float) -> None:
        pending = self._pending
        with suppress(IndexError):  # another thread has taken the last one
            while pending and time.perf_counter() < until:
                cookie, offset, length, whole, parts = pending.popleft()
                if parts:
                    replies.in_parts(cookie, offset, length, whole, parts)
                else:
                    replies.copied(cookie, offset, length, wait=True)
                if length >= SENDFILE:
                    outbox.flush()
        outbox.flush()

    def _call_for_help(self) -> None:
        pool = thread_pool()
        self._helping = [job for job in self._helping if not job.is_done]
        for _ in range(min(pool.size, len(self._pending) - 1) - len(self._helping)):
            self._helping.append(pool.submit(self._help))

    def _help(self) -> None:
        """In a thread of the pool: answer what is pending, until others wait for the thread."""
        if not hasattr(_helper, "memory"):
            _helper.memory = Outbox.new_memory()
        outbox = self._out.another(_helper.memory)
        pool = thread_pool()
        try:
            replies = ReadReplies(self._agreement, outbox, self._answers)
            while self._pending:
                self._answer(replies, outbox, time.perf_counter() + PATIENCE)
                if pool.is_wanted:
                    break
        except BaseException as error:  # for the connection's own thread to raise
            self._failure = error
        finally:
            outbox.close()

    def _wait_for_help(self) -> None:
        for job in self._helping:
            if not job.take_back():
                job.wait()
        self._helping.clear()

    # Long reads: holes by themselves, and what lies in files straight from there.

    def _read_in_parts(self, cookie: int, offset: int, length: int, whole: bool) -> None:
        extents: tuple[Extent, ...] = ()
        if length <= MAX_MAPPED and not self._node.must_confirm:
            extents = tuple(self._file_map.extents(offset, length))
        try:
            if not extents:
                extents = tuple(self._node.block_status(offset, length, want_zero=False))
        except Qcow2SnapError as error:
            self._out.write(self._answers.error(cookie, offset, error))
            return
        parts = tuple(parts_of(extents, SENDFILE if self._replies.may_send_file else None))
        if self._are_at_hand(extents):
            self._replies.in_parts(cookie, offset, length, whole, parts)
        elif len(parts) == 1 and parts[0].extent is None and length <= PIECE:
            self._put_aside(Pending(cookie, offset, length, whole, ()))
        else:
            self._put_aside(Pending(cookie, offset, length, whole, parts))

    def _is_copied(self, offset: int, length: int) -> bool:
        """Whether a long read is answered as a short one is, for no part of it could go without a copy."""
        if self._file_map.is_changing:
            return True
        return not self._replies.may_send_file and not self._file_map.is_zero(offset, length)

    def _are_at_hand(self, extents: Sequence[Extent]) -> bool:
        """Whether these can be read without waiting, to judge by the ends of the longer ones."""
        for extent in extents:
            if extent.must_read:
                if extent.file is None:
                    return False
                if (extent.length >= SENDFILE or extent is extents[-1]) and not self._file_map.is_at_hand(
                    extent.file, extent.file_offset + extent.length - 1
                ):
                    return False
        return True


def _blocks_read() -> int:
    """Blocks that this thread has had read from disks."""
    return resource.getrusage(resource.RUSAGE_THREAD).ru_inblock
