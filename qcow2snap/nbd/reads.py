"""Sound READs, answered fast. The plain twin, which also answers what is not a sound READ, is `transmission.Answers`.

What is at hand (in the page cache, or zeros) is answered at once, as the requests come. What has to be waited for, for
a disk or for decompression, is put aside; the node is told that it will be read (`prefetch`), so that all of it is
under way at once, and it is answered when there is nothing else to do. So one thread does what would take a pool of
them, and a lock on the socket for each reply.

Where bytes lie is remembered by `file_map`. Runs of 32 KiB and more that lie verbatim in a file which nobody can write
go from file to socket by `sendfile`: they never enter Python. All else is read into the outbox, behind its header. A
header that promises data may have left before an error turns up. The protocol then asks for the rest as zeros and an
error chunk behind it, or, of simple replies, for the connection's end; that is what `_content` does.

A node that has to be confirmed (an image in use) is read by copy. Short reads are confirmed together, when their bytes
are about to leave; those that turn out to be wrong are replaced by errors.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from itertools import groupby, islice
from typing import NamedTuple

from formats.nbd import ReplyFlag
from qcow2snap.block.node import Extent, Qcow2SnapError
from qcow2snap.nbd.channel import PIECE, Outbox
from qcow2snap.nbd.framing import StructuredReplies
from qcow2snap.nbd.negotiation import Agreement
from qcow2snap.nbd.transmission import Answers, Part, parts_of

SENDFILE = 1 << 15  # bytes from which on sendfile is worth its two system calls
MAX_MAPPED = 1 << 21  # bytes; where more lie, only the node is asked
MAX_PENDING = 1 << 10  # reads put aside; beyond that no more requests are taken
PATIENCE = 500e-6  # seconds of answering what was put aside, before there is another look at what has arrived


class CutOff(Exception):
    """There is no way left to say that something failed but to end the connection."""


class Pending(NamedTuple):
    """A read that was put aside, with its parts if it is a long one."""

    cookie: int
    offset: int
    length: int
    whole: bool
    parts: Sequence[Part]


class Unconfirmed(NamedTuple):
    """A short read's reply in the outbox, from `start` to `end`."""

    start: int
    end: int
    cookie: int
    offset: int


class Reads:
    """The READs of one connection.

    threads  the connection's own
    errors   OSError of the socket; CutOff. The node's are answers
    """

    def __init__(self, agreement: Agreement, outbox: Outbox, answers: Answers) -> None:
        self._node = agreement.node
        self._file_map = agreement.export.file_map
        self._framing = agreement.framing
        self._out = outbox
        self._answers = answers
        self._pending: deque[Pending] = deque()
        self._unannounced = 0  # the last so many in _pending are new to the node
        self._unconfirmed: list[Unconfirmed] = []
        self._may_send_file = outbox.is_plain and not self._node.must_confirm
        if self._node.must_confirm:
            outbox.before_send = self._confirm

    @property
    def pending(self) -> int:
        """Reads that wait to be answered."""
        return len(self._pending)

    def read(self, cookie: int, offset: int, length: int, *, whole: bool) -> None:
        """Answer a read, or put it aside. `whole`: the client wants one chunk."""
        if length >= SENDFILE and not (self._file_map.is_changing and length <= PIECE):
            self._read_long(cookie, offset, length, whole)
        elif not self._answer_short(cookie, offset, length, wait=False):
            self._put_aside(Pending(cookie, offset, length, whole, ()))

    def answer_pending(self, *, all_of_them: bool = False) -> None:
        """Answer what was put aside, for a while or to the end."""
        pending = self._pending
        if not self._node.must_confirm:
            # Not the one that is answered next: it is quicker done than announced.
            for read in islice(pending, max(1, len(pending) - self._unannounced), None):
                self._file_map.prefetch(read.offset, read.length)
        self._unannounced = 0
        until = time.perf_counter() + PATIENCE
        while pending and (all_of_them or time.perf_counter() < until):
            cookie, offset, length, whole, parts = pending.popleft()
            if parts:
                self._answer_long(cookie, offset, length, whole, parts)
            else:
                self._answer_short(cookie, offset, length, wait=True)

    def _put_aside(self, read: Pending) -> None:
        self._pending.append(read)
        self._unannounced += 1

    # Short reads: one chunk, zeros and all; to send them costs less than to tell of them.

    def _answer_short(self, cookie: int, offset: int, length: int, *, wait: bool) -> bool:
        """False if it takes waiting, and may not: then nothing is answered."""
        out, framing = self._out, self._framing
        header_size = framing.data_header_size
        start = out.room(header_size + length)
        end = start + header_size + length
        view = out.view[start + header_size : end]
        if not self._file_map.read(offset, view, wait=wait):
            if not wait:
                out.used = start
                return False
            try:
                self._node.preadv_unconfirmed(offset, [view])
            except Qcow2SnapError as error:
                out.used = start
                out.write(self._answers.error(cookie, offset, error))
                return True
        framing.pack_data_header_into(out.view, start, ReplyFlag.DONE, cookie, offset, offset, length)
        if self._node.must_confirm:
            self._unconfirmed.append(Unconfirmed(start, end, cookie, offset))
        return True

    def _confirm(self) -> None:
        """Replace what should not have been read, before it leaves."""
        if not self._unconfirmed:
            return
        reads, self._unconfirmed = self._unconfirmed, []
        try:
            self._node.confirm()
        except Qcow2SnapError as error:
            view = self._out.view
            content, position = bytearray(), 0
            for read in reads:
                content += view[position : read.start]
                content += self._answers.error(read.cookie, read.offset, error)
                position = read.end
            content += view[position : self._out.used]
            self._out.used = 0
            self._out.write(bytes(content))

    # Long reads: holes by themselves, and what lies in files straight from there.

    def _read_long(self, cookie: int, offset: int, length: int, whole: bool) -> None:
        extents: tuple[Extent, ...] = ()
        if length <= MAX_MAPPED and not self._node.must_confirm:
            extents = tuple(self._file_map.extents(offset, length))
        try:
            if not extents:
                extents = tuple(self._node.block_status(offset, length, want_zero=False))
        except Qcow2SnapError as error:
            self._out.write(self._answers.error(cookie, offset, error))
            return
        parts = tuple(parts_of(extents, SENDFILE if self._may_send_file else None))
        if self._are_at_hand(extents):
            self._answer_long(cookie, offset, length, whole, parts)
        else:
            self._put_aside(Pending(cookie, offset, length, whole, parts))

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

    def _answer_long(self, cookie: int, offset: int, length: int, whole: bool, parts: Sequence[Part]) -> None:
        framing, out = self._framing, self._out
        try:
            if whole or not isinstance(framing, StructuredReplies):
                self._content(framing.data_header(cookie, offset, offset, length), parts, length)
            else:
                for zero, group in groupby(parts, key=lambda part: part.zero):
                    self._chunk(framing, cookie, offset, zero, tuple(group))
            if framing.structured:
                out.write(framing.done(cookie, offset))
        except Qcow2SnapError as error:
            out.write(self._answers.error(cookie, offset, error))

    def _chunk(
        self, framing: StructuredReplies, cookie: int, request_offset: int, zero: bool, parts: Sequence[Part]
    ) -> None:
        """Neighbours of one kind, as one piece: a client takes that best, wherever in files it comes from."""
        offset = parts[0].offset
        length = parts[-1].end - offset
        if zero:
            self._out.write(framing.hole(cookie, request_offset, offset, length))
        elif len(parts) > 1 or parts[0].extent is not None:
            self._content(framing.data_header(cookie, request_offset, offset, length), parts, length)
        else:  # so that little is promised before it is read
            for start in range(offset, offset + length, PIECE):
                piece = Part(start, min(PIECE, offset + length - start), zero=False)
                self._content(framing.data_header(cookie, request_offset, start, piece.length), [piece], piece.length)

    def _content(self, header: bytes, parts: Sequence[Part], length: int) -> None:
        """A header and `length` bytes behind it. Where the node fails, its error is raised: an error chunk may follow.

        The outbox then ends where the header began; or, if that has left, behind zeros for all that it promised.
        """
        out = self._out
        if self._unconfirmed:
            out.flush()  # what they turn out to be must not move what follows
        out.write(header)
        end = out.position + length
        start = out.position - len(header)
        try:
            for part in parts:
                self._data(part)
        except Qcow2SnapError as error:
            if out.gone <= start:
                out.used = start - out.gone
            elif self._framing.structured:
                out.write_zeroes(end - out.position)
            else:
                raise CutOff(f"its reply had begun when reading failed: {error}") from error
            raise

    def _data(self, part: Part) -> None:
        out = self._out
        offset, end = part.offset, part.end
        if part.zero:
            out.write_zeroes(part.length)
            return
        if self._may_send_file and part.extent is not None and part.extent.file is not None and part.length >= SENDFILE:
            offset += out.send_file(part.extent.file.fileno(), part.extent.file_offset, part.length)
        while offset < end:  # what is in no file, or beyond where it ends: the node knows what is to be read there
            piece = min(end - offset, PIECE)
            start = out.room(piece)
            try:
                self._node.preadv(offset, [out.view[start : start + piece]])
            except Qcow2SnapError:
                out.used = start
                raise
            offset += piece
