"""A client's socket as a stream: requests as they arrive, and replies on their way. What they say is elsewhere.

How it is fast, and why. One `recv_into` takes all requests that have arrived; their replies are gathered in one buffer,
and leave with one `send`. Between two requests of a client that waits for each reply lies a wake-up, which costs more
than the read: so a few non-blocking `recv`s come before the one that blocks, as long as such spinning has been paying.
A file's pages go to the socket by `sendfile`, behind a header that waits for them (MSG_MORE).

With TLS bytes pass through its library (`tls.SecureSocket`), so there is no `sendfile`; `is_plain` tells.
"""

from __future__ import annotations

import errno
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from socket import MSG_DONTWAIT, MSG_MORE, MSG_WAITALL
from threading import Lock
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qcow2snap.nbd.tls import SecureSocket

RECEIVE = 1 << 16  # bytes: some 2,300 requests
RECEIVE_WRITES = 1 << 20  # bytes; of a write that fits, all of its data are taken at once. Not touched takes no memory
GATHER = 288 << 10  # bytes of replies in one send: 64 of 4 KiB or one of 256 KiB; 1 MiB was slower
SEND_BUFFER = 1 << 19  # bytes in the kernel on a Unix socket, which has 208 KiB: less than one reply of nbdcopy's
PIECE = 1 << 18  # bytes read, or received of a payload, at once
SPIN = 40  # non-blocking tries, about 1 µs each
SPIN_PAYS = 100e-6  # seconds: a spin that took longer was interrupted by somebody who needed the processor
MAX_PAUSE = 255  # receives without a spin where spins do not pay; an idle client costs one spin in so many


class Arrivals:
    """What the client sent and was not handled yet, in one buffer.

    request_size  bytes of a request's header
    received      what came with the end of the handshake
    errors        OSError of the socket
    """

    def __init__(
        self, sock: socket.socket | SecureSocket, request_size: int, received: bytes, *, size: int = RECEIVE
    ) -> None:
        self._socket = sock
        self._request_size = request_size
        self.buffer = bytearray(size)
        self.buffer[: len(received)] = received
        self._view = memoryview(self.buffer)
        self._start = 0
        self._end = len(received)
        self._pause = 0  # receives that will block at once
        self._pauses = 0  # so many of them follow when a spin has failed: the more, the more have

    def wait(self) -> bool:
        """Wait until there is a whole request. False if the client left."""
        self._move_up()
        while self._end < self._request_size:
            count = self._receive(self._view[self._end :])
            if not count:
                return False
            self._end += count
        return True

    def poll(self) -> bool:
        """Take what has arrived, if anything has. False if the client left."""
        self._move_up()
        into = self._view[self._end :]
        try:
            count = self._socket.recv_into(into, 0, MSG_DONTWAIT)
        except BlockingIOError:
            return True
        self._end += count
        return count > 0

    def requests(self) -> Iterator[int]:
        """Where in the buffer each whole request's header is."""
        size = self._request_size
        while self._end - self._start >= size:
            self._start += size
            yield self._start - size

    def whole_payload(self, length: int, before_waiting: Callable[[], None]) -> memoryview:
        """The data behind the header that was given last, which have to fit the buffer, as one.

        They are there until before_waiting is called, or wait() or poll().
        """
        if self._start + length > self._end:
            before_waiting()
            self._move_up()
            while self._end < length:  # and no more: a client that goes on sending must not keep us from all else
                count = self._receive(self._view[self._end : length])
                if not count:
                    raise ConnectionResetError("in the middle of a payload")
                self._end += count
        self._start += length
        return self._view[self._start - length : self._start]

    def payload(self, length: int, before_waiting: Callable[[], None]) -> Iterator[memoryview]:
        """The data behind the header that was given last, in pieces, each good until the next one is asked for."""
        here = min(length, self._end - self._start)
        if here:
            self._start += here
            yield self._view[self._start - here : self._start]
        missing = length - here
        if not missing:
            return
        before_waiting()
        self._start = self._end = 0
        piece = memoryview(bytearray(min(missing, PIECE)))
        while missing:
            count = self._socket.recv_into(piece, min(missing, PIECE), MSG_WAITALL)
            if not count:
                raise ConnectionResetError("in the middle of a payload")
            missing -= count
            yield piece[:count]

    def _move_up(self) -> None:
        self._view[: self._end - self._start] = self._view[self._start : self._end]
        self._start, self._end = 0, self._end - self._start

    def _receive(self, into: memoryview) -> int:
        receive = self._socket.recv_into
        if self._pause:
            self._pause -= 1
            return receive(into)
        until = time.perf_counter() + SPIN_PAYS
        count = -1
        for _ in range(SPIN):
            try:
                count = receive(into, 0, MSG_DONTWAIT)
                break
            except BlockingIOError:
                # Where other threads want the interpreter, each try waits for it: 40 tries could take seconds.
                if time.perf_counter() > until:
                    break
        if count >= 0 and time.perf_counter() < until:
            self._pauses //= 2
            return count
        # It did not pay: the client thinks for long, or the processor that spinning takes is wanted by others.
        self._pause = self._pauses = min(2 * self._pauses + 1, MAX_PAUSE)
        return count if count >= 0 else receive(into)


class Outbox:
    """Replies on their way into a socket, gathered.

    A socket may have several, each of a thread of its own. Who has sent a part has the socket to itself until `flush`.

    view         where replies are put, at places that `room` gives
    gone         bytes that left
    before_send  called ahead of each send, while `used` bytes of `view` can still be changed
    threads      one
    errors       OSError of the socket
    """

    def __init__(
        self, sock: socket.socket | SecureSocket, *, is_plain: bool = True, memory: memoryview | None = None
    ) -> None:
        self._socket = sock
        if sock.family == socket.AF_UNIX:  # TCP finds a size by itself
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        self.is_plain = is_plain
        self.view = memory or self.new_memory()
        self.used = 0
        self.gone = 0
        self.before_send: Callable[[], None] | None = None
        self._turn = Lock()  # held by the one of the socket's outboxes that is sending
        self._has_turn = False

    @staticmethod
    def new_memory() -> memoryview:
        """For an outbox, or several one after the other."""
        return memoryview(bytearray(GATHER))

    def another(self, memory: memoryview) -> Outbox:
        """One for another thread, into the same socket."""
        outbox = Outbox(self._socket, is_plain=self.is_plain, memory=memory)
        outbox._turn = self._turn
        return outbox

    @property
    def position(self) -> int:
        """Bytes that there ever were."""
        return self.gone + self.used

    def make_room(self, size: int) -> None:
        """Send what is whole, if `size` bytes would not fit behind it: so a reply that is begun leaves in one piece."""
        if self.used + size > GATHER:
            self.flush()

    def room(self, size: int) -> int:
        """Where in `view` to put the next `size` bytes, up to PIECE and a header."""
        if self.used + size > GATHER:
            self._send()
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

    def flush(self) -> None:
        """Send all there is, up to the end of a reply or of a chunk of one."""
        if self.used:
            self._send()
        if self._has_turn:
            self._has_turn = False
            self._turn.release()

    def close(self) -> None:
        """No more comes from here. If that leaves a reply unfinished, nothing can follow it: the connection ends."""
        if self._has_turn:
            with suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
            self._has_turn = False
            self._turn.release()

    def _send(self, flags: int = 0) -> None:
        """Send all there is, which need not be the end of anything."""
        if self.before_send is not None:
            self.before_send()
        if not self._has_turn:
            self._turn.acquire()
            self._has_turn = True
        start = 0
        while start < self.used:
            start += self._socket.send(self.view[start : self.used], flags)
        self.gone += self.used
        self.used = 0

    def send_file(self, file: int, offset: int, length: int) -> int:
        """Bytes of a file, behind all that was written. Gives how many: fewer where the file ends or cannot be read."""
        self._send(MSG_MORE)
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
