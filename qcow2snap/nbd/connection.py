"""One client on a socket: its handshake under a deadline, then its requests, fast. The protocol itself is elsewhere.

How it is fast, and why. Requests come in batches: one `recv_into` takes all that have arrived, one tight loop handles
them, and their replies are gathered in one buffer and leave with one `send`. Between two requests of a client that
waits for each reply lies a wake-up, which costs more than the read: so a few non-blocking `recv`s come before the one
that blocks, as long as such spinning has been paying (`_Arrivals`). Runs of 32 KiB and more that lie verbatim in a file
which nobody can write go from file to socket by `sendfile`, behind a header that waits for them (MSG_MORE); their bytes
never enter Python. All else is read into the buffer, behind its header; where short reads lie is remembered
(`file_map`). The plain twin of all this, which also answers
whatever is not a sound READ, is `transmission.Answers`.

A header that promises data may have left before an error turns up. The protocol then asks for the rest as zeros and an
error chunk behind it, or, of simple replies, for the connection's end; that is what `_content` does.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from socket import MSG_DONTWAIT, MSG_MORE, MSG_WAITALL

from formats import nbd
from formats.nbd import Command, CommandFlag, ReplyFlag
from qcow2snap.block.node import NBDError, Qcow2SnapError
from qcow2snap.nbd.export import Exports
from qcow2snap.nbd.framing import Framing, StructuredReplies
from qcow2snap.nbd.negotiation import Agreement, ServerNegotiation
from qcow2snap.nbd.transmission import Answers, Part, Request, check_magic, parts_of

logger = logging.getLogger(__name__)

HANDSHAKE_RECEIVE = 1 << 12  # bytes at a time: a handshake is short
RECEIVE = 1 << 16  # bytes: some 2,300 requests
GATHER = 288 << 10  # bytes of replies in one send: 64 of 4 KiB or one of 256 KiB; 1 MiB was slower
PIECE = 1 << 18  # bytes read at once
SENDFILE = 1 << 15  # bytes from which on sendfile is worth its two system calls
SPIN = 40  # non-blocking tries, about 1 µs each
SPIN_PAYS = 100e-6  # seconds: a spin that took longer was interrupted by somebody who needed the processor
MAX_PAUSE = 255  # receives without a spin where spins do not pay; an idle client costs one spin in so many


class CutOff(Exception):
    """There is no way left to say that something failed but to end the connection."""


class Connection:
    """One client, from its first byte to its last.

    threads  run() in one of its own; stop() and cut_off() from any other
    errors   none: they end this connection, and the log says why
    owns     the socket
    """

    def __init__(self, sock: socket.socket, peer: str, exports: Exports, *, handshake_timeout: float) -> None:
        self._socket = sock
        self._peer = peer
        self._exports = exports
        self._handshake_timeout = handshake_timeout
        self._stopping = False

    def run(self) -> None:
        try:
            if agreement_and_unused := self._negotiate():
                self._transmit(*agreement_and_unused)
        except (NBDError, CutOff) as error:
            logger.warning("%s: cut off: %s", self._peer, error)
        except TimeoutError:
            logger.warning("%s: cut off: no export chosen within %g s", self._peer, self._handshake_timeout)
        except OSError as error:
            logger.info("%s: gone: %s", self._peer, error)
        except Exception:
            logger.exception("%s: cut off by a fault of this server", self._peer)
        finally:
            self._socket.close()

    def stop(self) -> None:
        """Answer what has arrived, and end. Wakes a recv that waits."""
        self._stopping = True
        self._shutdown(socket.SHUT_RD)

    def cut_off(self) -> None:
        """End now, also in the middle of a reply that nobody receives."""
        self._stopping = True
        self._shutdown(socket.SHUT_RDWR)

    def _shutdown(self, how: int) -> None:
        with suppress(OSError):  # it may be gone already
            self._socket.shutdown(how)

    def _negotiate(self) -> tuple[Agreement, bytes] | None:
        """What was agreed on, and the first bytes of the transmission phase. None if the client left."""
        deadline = time.monotonic() + self._handshake_timeout
        negotiation = ServerNegotiation(self._exports)
        while not negotiation.ended:
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                raise TimeoutError
            self._socket.settimeout(remaining)
            if data := negotiation.data_to_send():
                self._socket.sendall(data)
            elif not negotiation.ended:
                received = self._socket.recv(HANDSHAKE_RECEIVE)
                if not received or self._stopping:
                    return None
                negotiation.receive(received)
        self._socket.settimeout(None)
        if negotiation.agreement is None:
            return None
        return negotiation.agreement, negotiation.unused

    def _transmit(self, agreement: Agreement, unused: bytes) -> None:
        logger.info("%s: reads export %a", self._peer, agreement.export.name)
        framing = agreement.framing
        outbox = _Outbox(self._socket)
        arrivals = _Arrivals(self._socket, framing, unused)
        answers = Answers(agreement)
        reads = _Reads(agreement, outbox, answers)
        size = agreement.node.size
        read_flags = int(CommandFlag.DF) if framing.structured else 0
        unpack = framing.request.unpack_from
        expected_magic = framing.request_magic
        try:
            last = False
            while not last and arrivals.wait():
                last = self._stopping  # after stop() comes what had arrived before it, and no more
                buffer = arrivals.buffer
                for position in arrivals.requests():
                    magic, flags, command, cookie, offset, length = unpack(buffer, position)
                    if magic != expected_magic:
                        check_magic(magic, framing)
                    if (
                        command == Command.READ
                        and not flags & ~read_flags
                        and 0 < length <= nbd.MAX_PAYLOAD
                        and offset + length <= size
                    ):
                        reads.read(cookie, offset, length, whole=bool(flags))
                    elif command == Command.DISC:
                        outbox.flush()
                        return
                    else:
                        payload: Iterator[memoryview] = iter(())
                        if payload_length := framing.payload_length(flags, command, length):
                            outbox.flush()  # the client may wait for these before it sends the rest of its payload
                            payload = arrivals.payload(payload_length)
                        for piece in answers.answer(Request(flags, command, cookie, offset, length), payload):
                            outbox.write(piece)
                        for _ in payload:  # what a request that was refused left behind
                            pass
                outbox.flush()
        except NBDError:
            outbox.flush()  # what was sound before that is answered
            raise


class _Arrivals:
    """What the client sent and was not handled yet, in one buffer."""

    def __init__(self, sock: socket.socket, framing: Framing, received: bytes) -> None:
        self._socket = sock
        self._request_size = framing.request.size
        self.buffer = bytearray(RECEIVE)
        self.buffer[: len(received)] = received
        self._view = memoryview(self.buffer)
        self._start = 0
        self._end = len(received)
        self._pause = 0  # receives that will block at once
        self._pauses = 0  # so many of them follow when a spin has failed: the more, the more have

    def wait(self) -> bool:
        """Wait until there is a whole request. False if the client left."""
        self._view[: self._end - self._start] = self._view[self._start : self._end]
        self._start, self._end = 0, self._end - self._start
        while self._end < self._request_size:
            count = self._receive(self._view[self._end :])
            if not count:
                return False
            self._end += count
        return True

    def requests(self) -> Iterable[int]:
        """Where in the buffer each whole request's header is."""
        size = self._request_size
        while self._end - self._start >= size:
            self._start += size
            yield self._start - size

    def payload(self, length: int) -> Iterator[memoryview]:
        """The data behind the header that was given last, in pieces, each good until the next one is asked for."""
        here = min(length, self._end - self._start)
        if here:
            self._start += here
            yield self._view[self._start - here : self._start]
        missing = length - here
        if not missing:
            return
        self._start = self._end = 0
        piece = memoryview(bytearray(min(missing, PIECE)))
        while missing:
            count = self._socket.recv_into(piece, min(missing, PIECE), MSG_WAITALL)
            if not count:
                raise ConnectionResetError("in the middle of a payload")
            missing -= count
            yield piece[:count]

    def _receive(self, into: memoryview) -> int:
        receive = self._socket.recv_into
        if self._pause:
            self._pause -= 1
            return receive(into)
        patience = time.perf_counter() + SPIN_PAYS
        count = -1
        for _ in range(SPIN):
            try:
                count = receive(into, 0, MSG_DONTWAIT)
                break
            except BlockingIOError:
                # Where other threads want the interpreter, each try waits for it: 40 tries could take seconds.
                if time.perf_counter() > patience:
                    break
        if count >= 0 and time.perf_counter() < patience:
            self._pauses //= 2
            return count
        # It did not pay: the client thinks for long, or the processor that spinning takes is wanted by others.
        self._pause = self._pauses = min(2 * self._pauses + 1, MAX_PAUSE)
        return count if count >= 0 else receive(into)


class _Outbox:
    """Replies on their way into a socket, gathered. `gone` counts the bytes that left, `position` all there were."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self.view = memoryview(bytearray(GATHER))
        self.used = 0
        self.gone = 0

    @property
    def position(self) -> int:
        return self.gone + self.used

    def room(self, size: int) -> int:
        """Where in `view` to put the next `size` bytes, up to PIECE and a header."""
        if self.used + size > GATHER:
            self.flush()
        start = self.used
        self.used = start + size
        return start

    def write(self, data: bytes) -> None:
        for start in range(0, len(data), PIECE):
            piece = data[start : start + PIECE]
            at = self.room(len(piece))
            self.view[at : at + len(piece)] = piece

    def write_zeroes(self, length: int) -> None:
        while length:
            piece = min(length, PIECE)
            at = self.room(piece)
            self.view[at : at + piece] = bytes(piece)
            length -= piece

    def flush(self, flags: int = 0) -> None:
        start = 0
        while start < self.used:
            start += self._socket.send(self.view[start : self.used], flags)
        self.gone += self.used
        self.used = 0

    def send_file(self, file: int, offset: int, length: int) -> int:
        """Bytes of a file, behind all that was written. Gives how many: fewer where the file ends or cannot be read."""
        self.flush(MSG_MORE)
        end = offset + length
        at = offset
        while at < end:
            try:
                count = os.sendfile(self._socket.fileno(), file, at, end - at)
            except OSError as error:
                if error.errno in (errno.EPIPE, errno.ECONNRESET, errno.ETIMEDOUT, errno.ENOTCONN, errno.EBADF):
                    raise
                break
            if not count:
                break
            at += count
        self.gone += at - offset
        return at - offset


class _Reads:
    """Sound READs, answered into an outbox."""

    def __init__(self, agreement: Agreement, outbox: _Outbox, answers: Answers) -> None:
        self._node = agreement.node
        self._pread_into = agreement.export.file_map.pread_into
        self._framing = agreement.framing
        self._out = outbox
        self._answers = answers

    def read(self, cookie: int, offset: int, length: int, *, whole: bool) -> None:
        """`whole`: the client wants one chunk."""
        if length < SENDFILE:
            self._read_small(cookie, offset, length)
            return
        framing = self._framing
        try:
            parts = tuple(parts_of(tuple(self._node.block_status(offset, length, want_zero=False)), SENDFILE))
            if whole or not isinstance(framing, StructuredReplies):
                self._content(framing.data_header(cookie, offset, offset, length), parts, length)
            else:
                for part in parts:
                    self._chunks(framing, cookie, offset, part)
            if framing.structured:
                self._out.write(framing.done(cookie, offset))
        except Qcow2SnapError as error:
            self._out.write(self._answers.error(cookie, offset, error))

    def _read_small(self, cookie: int, offset: int, length: int) -> None:
        """One chunk, zeros and all: to send them costs less than to find them."""
        out = self._out
        framing = self._framing
        start = out.room(framing.data_header_size + length)
        data = start + framing.data_header_size
        try:
            self._pread_into(offset, out.view[data : data + length])
        except Qcow2SnapError as error:
            out.used = start
            out.write(self._answers.error(cookie, offset, error))
            return
        framing.pack_data_header_into(out.view, start, ReplyFlag.DONE, cookie, offset, offset, length)

    def _chunks(self, framing: StructuredReplies, cookie: int, request_offset: int, part: Part) -> None:
        if part.zero:
            self._out.write(framing.hole(cookie, request_offset, part.offset, part.length))
        elif part.extent is not None:
            self._content(framing.data_header(cookie, request_offset, part.offset, part.length), [part], part.length)
        else:
            for offset in range(part.offset, part.end, PIECE):
                piece = Part(offset, min(PIECE, part.end - offset), zero=False)
                self._content(framing.data_header(cookie, request_offset, offset, piece.length), [piece], piece.length)

    def _content(self, header: bytes, parts: Iterable[Part], length: int) -> None:
        """A header and `length` bytes behind it. Where the node fails, its error is raised: an error chunk may follow.

        The outbox then ends where the header began; or, if that has left, behind zeros for all that it promised.
        """
        out = self._out
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
        if part.extent is not None and part.extent.file is not None and part.length >= SENDFILE:
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
