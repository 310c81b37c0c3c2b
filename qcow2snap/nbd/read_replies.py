"""The reply to one sound READ, put into an outbox. When it is answered, and by which thread, is the affair of `reads`.

Where bytes lie is remembered by `file_map`. Runs of 32 KiB and more that lie verbatim in a file which nobody can write
go from file to socket by `sendfile`: they never enter Python. All else is read into the outbox, behind its header. A
header that promises data may have left before an error turns up. The protocol then asks for the rest as zeros and an
error chunk behind it, or, of simple replies, for the connection's end; that is what `_content` does.

A node that has to be confirmed (an image in use) is read by copy. Such reads are confirmed together, when their bytes
are about to leave; those that turn out to be wrong are replaced by errors.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

from formats.nbd import ReplyFlag
from qcow2snap.block.node import Qcow2SnapError
from qcow2snap.nbd.channel import PIECE, Outbox
from qcow2snap.nbd.framing import StructuredReplies
from qcow2snap.nbd.negotiation import Agreement
from qcow2snap.nbd.transmission import Answers, Part

SENDFILE = 1 << 15  # bytes from which on sendfile is worth its two system calls


class CutOff(Exception):
    """There is no way left to say that something failed but to end the connection."""


class Unconfirmed(NamedTuple):
    """A read's reply in the outbox, from `start` to `end`."""

    start: int
    end: int
    cookie: int
    offset: int


class ReadReplies:
    """Replies to READs, by way of one outbox.

    threads  the outbox's own
    errors   OSError of the socket; CutOff. The node's are answers
    """

    def __init__(self, agreement: Agreement, outbox: Outbox, answers: Answers) -> None:
        self._node = agreement.node
        self._file_map = agreement.export.file_map
        self._framing = agreement.framing
        self._out = outbox
        self._answers = answers
        self._unconfirmed: list[Unconfirmed] = []
        self.may_send_file = outbox.is_plain and not self._node.must_confirm
        if self._node.must_confirm:
            outbox.before_send = self._confirm

    def copied(self, cookie: int, offset: int, length: int, *, wait: bool) -> bool:
        """Answer a read of up to PIECE by copy, in one chunk. Zeros too: to send a few costs less than to tell of them.

        False if it takes waiting, and may not: then nothing is answered.
        """
        out, framing = self._out, self._framing
        header_size = framing.data_header_size
        out.make_room(header_size + length)
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

    def in_parts(self, cookie: int, offset: int, length: int, whole: bool, parts: Sequence[Part]) -> None:
        """Answer a read: holes by themselves, and what lies in files straight from there."""
        framing, out = self._framing, self._out
        out.make_room(framing.data_header_size + min(length, PIECE))
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
        if self.may_send_file and part.extent is not None and part.extent.file is not None and part.length >= SENDFILE:
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
