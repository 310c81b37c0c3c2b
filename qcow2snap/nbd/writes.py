"""Sound WRITEs, done fast. The plain twin, which also answers what is not a sound WRITE, is `transmission.Answers`.

All that has arrived is done in one pass, straight from the buffer in which it arrived, and the replies leave together.
Writes that follow each other on the disk, in the order in which they came, are one write to the node; whatever comes
between them ends that, so that the order stays the client's. Of those that are to be durable (FUA) one flush at the end
of the pass serves all. If a write of several fails, each is tried by itself, so that each has the answer of its own.
"""

from __future__ import annotations

from qcow2snap.block.node import BlockNode, Qcow2SnapError
from qcow2snap.nbd.channel import Outbox
from qcow2snap.nbd.negotiation import Agreement
from qcow2snap.nbd.transmission import Answers

MAX_MERGED = 1 << 9  # writes that are done as one; the system takes 1,024 buffers


class Writes:
    """The WRITEs of one connection.

    threads  the connection's own
    errors   OSError of the socket. The node's are answers
    """

    def __init__(self, agreement: Agreement, outbox: Outbox, answers: Answers) -> None:
        self._node: BlockNode = agreement.node
        self._framing = agreement.framing
        self._out = outbox
        self._answers = answers
        # Writes that follow each other on the disk and were not done yet: their data lie where they arrived.
        self._offset = self._end = 0
        self._data: list[memoryview] = []
        self._cookies: list[tuple[int, bool]] = []
        self._to_flush: list[tuple[int, int]] = []  # cookie and offset of what is done, but not durable

    def write(self, cookie: int, offset: int, data: memoryview, *, fua: bool) -> None:
        """Take a write. It is done by the next one that does not follow it, or by finish(); until then `data` stays."""
        if offset != self._end or not self._data or len(self._data) >= MAX_MERGED:
            if self._data:
                self._write()
            self._offset = offset
        self._data.append(data)
        self._cookies.append((cookie, fua))
        self._end = offset + len(data)

    def finish(self) -> None:
        """Do all that was taken, and put its replies into the outbox."""
        if self._data:
            self._write()
        if self._to_flush:
            self._flush()

    def _write(self) -> None:
        offset, data, cookies = self._offset, self._data, self._cookies
        self._data, self._cookies = [], []
        try:
            self._node.pwritev(offset, data)
        except Qcow2SnapError as error:
            if len(data) == 1:
                self._out.write(self._answers.error(cookies[0][0], offset, error))
                return
            for piece, (cookie, fua) in zip(data, cookies, strict=True):
                self._offset, self._data, self._cookies = offset, [piece], [(cookie, fua)]
                self._write()
                offset += len(piece)
            return
        for piece, (cookie, fua) in zip(data, cookies, strict=True):
            if fua:
                self._to_flush.append((cookie, offset))
            else:
                self._out.write(self._framing.done(cookie, offset))
            offset += len(piece)

    def _flush(self) -> None:
        done, self._to_flush = self._to_flush, []
        try:
            self._node.flush()
        except Qcow2SnapError as error:
            for cookie, offset in done:
                self._out.write(self._answers.error(cookie, offset, error))
            return
        for cookie, offset in done:
            self._out.write(self._framing.done(cookie, offset))
