"""A client's socket, and what a program does with it. The protocol itself is in `negotiation` and `transmission`."""

from __future__ import annotations

import socket
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Self, TypeVar

from formats import nbd
from formats.nbd import Command, TransmissionFlag
from qcow2snap.block.node import NBDError
from qcow2snap.nbd import uri as nbd_uri
from qcow2snap.nbd.client.negotiation import ClientNegotiation, ExportInfo, ListedExport
from qcow2snap.nbd.client.replies import ReplyError, Steps
from qcow2snap.nbd.client.transmission import Reply, Request, Runs, Transmission
from qcow2snap.nbd.framing import Framing

T = TypeVar("T")

ALLOCATION = "base:allocation"
DEPTH = 16  # requests in flight
MAX_COMPACT_LENGTH = (1 << 32) - (1 << 16)  # bytes of one request without payload: round, and within 32 bits


class Client:
    """A connection to an NBD server. First list, ask and `go`; then read and write. `with` disconnects at its end.

    threads  one at a time
    errors   ReplyError where the server said no: the connection can be used on. Any other NBDError: it cannot.
    owns     the socket
    """

    def __init__(self, sock: socket.socket, *, extended_headers: bool = True, structured_replies: bool = True) -> None:
        """Speak on a socket that is connected. The options hold back what the server might agree to."""
        self._socket = sock
        self._info: ExportInfo | None = None
        self._negotiation = ClientNegotiation(extended_headers=extended_headers, structured_replies=structured_replies)
        self._transmission: Transmission | None = None
        try:
            self._run(self._negotiation.greet())
        except BaseException:
            sock.close()
            raise

    @classmethod
    def connect(cls, where: nbd_uri.URI | str, *, timeout: float | None = 60.0, **options: bool) -> Self:
        """Connect to the server of a URI; its export is not chosen yet. `timeout`: seconds without a sign of life."""
        target = nbd_uri.parse(where) if isinstance(where, str) else where
        try:
            if target.socket:
                sock = socket.socket(socket.AF_UNIX)
                sock.settimeout(timeout)
                sock.connect(target.socket)
            elif target.cid is not None:
                sock = socket.socket(socket.AF_VSOCK)
                sock.settimeout(timeout)
                sock.connect((target.cid, target.port))
            else:
                sock = socket.create_connection((target.host, target.port), timeout)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except OSError as error:
            raise NBDError(f"{target}: cannot connect: {error}") from error
        client = cls(sock, **options)
        if target.tls:
            try:
                client._start_tls(target)
            except BaseException:
                client._socket.close()
                raise
        return client

    def _start_tls(self, target: nbd_uri.URI) -> None:
        """Go on by TLS, or not at all: a URI that asks for it is never served without."""
        from qcow2snap.nbd.client.tls import secured  # ssl takes 20 ms to import

        try:
            self._run(self._negotiation.starttls())
        except ReplyError as error:
            raise NBDError(f"{target}: the server does not speak TLS: {error}") from error
        self._socket = secured(self._socket, target)

    # The handshake.

    def list_exports(self) -> list[ListedExport]:
        return self._run(self._negotiation.list_exports())

    def info(self, name: str = "") -> ExportInfo:
        """What there is to know about an export, without choosing it."""
        return self._run(self._negotiation.info(name))

    def list_contexts(self, name: str = "", queries: Sequence[str] = ()) -> list[str]:
        """The metadata contexts of an export: all, or those that the queries mean."""
        return self._run(self._negotiation.list_contexts(name, queries))

    def go(self, name: str = "", contexts: Sequence[str] = (ALLOCATION,)) -> ExportInfo:
        """Choose an export, with those of the metadata contexts that it has; from now on it can be read."""
        self._info = self._run(self._negotiation.go(name, contexts))
        self._transmission = Transmission(self.framing, self._negotiation.contexts)
        return self._info

    def abort(self) -> None:
        """Leave in the handshake."""
        with suppress(NBDError):  # a server may close without an answer
            self._run(self._negotiation.abort())
        self._socket.close()

    # The transmission.

    @property
    def framing(self) -> Framing:
        """Simple or structured replies, or extended headers."""
        return self._negotiation.framing

    @property
    def export(self) -> ExportInfo:
        """The export that was chosen."""
        if self._info is None:
            raise NBDError("no export was chosen yet")
        return self._info

    @property
    def contexts(self) -> frozenset[str]:
        """The metadata contexts that were agreed on."""
        return frozenset(self._negotiation.contexts.values())

    @property
    def size(self) -> int:
        return self.export.size

    @property
    def max_payload(self) -> int:
        """Bytes that one READ or WRITE may have."""
        return min(nbd.MAX_PAYLOAD, self.export.maximum_payload_size or nbd.MAX_PAYLOAD)

    def submit(self, requests: Iterable[Request], depth: int = DEPTH) -> Iterator[Reply]:
        """The replies, as they come; of the requests up to `depth` are in flight. An error is in the reply, not raised.

        What is not taken to its end is lost with the connection.
        """
        transmission = self._on_air()
        reads = 0  # in flight
        for request in requests:
            # A server that sends data receives no payload meanwhile: neither side may wait for the other.
            while transmission.in_flight and (transmission.in_flight >= depth or (request.payload and reads)):
                reply = self._run(transmission.next_reply())
                reads -= reply.request.command == Command.READ
                yield reply
            reads += request.command == Command.READ
            self._send(transmission.request(request), request.payload)
        while transmission.in_flight:
            yield self._run(transmission.next_reply())

    def pread(self, offset: int, length: int, *, flags: int = 0) -> bytearray:
        """`length` bytes at `offset`, in as many requests as it takes, at the server's block size."""
        block = self.export.minimum_block_size or 1
        low = offset - offset % block
        high = max(offset + length, min(-(-(offset + length) // block) * block, self.size))
        buffer = bytearray(high - low)
        for reply in self._all(Request(Command.READ, low, len(buffer), flags), self.max_payload):
            at = reply.request.offset - low
            buffer[at : at + len(reply.data)] = reply.data
        return buffer if len(buffer) == length else buffer[offset - low : offset - low + length]

    def pwrite(self, offset: int, data: bytes | bytearray | memoryview, *, flags: int = 0) -> None:
        """Write all of `data`, in as many requests as it takes."""
        view = memoryview(data)
        step = self.max_payload
        requests = (
            Request(Command.WRITE, offset + at, 0, flags, view[at : at + step]) for at in range(0, len(view), step)
        )
        for reply in self.submit(requests):
            reply.checked()

    def write_zeroes(self, offset: int, length: int, *, flags: int = 0) -> None:
        self._everywhere(Request(Command.WRITE_ZEROES, offset, length, flags))

    def trim(self, offset: int, length: int, *, flags: int = 0) -> None:
        self._everywhere(Request(Command.TRIM, offset, length, flags))

    def cache(self, offset: int, length: int) -> None:
        self._everywhere(Request(Command.CACHE, offset, length))

    def flush(self) -> None:
        self._ask(Request(Command.FLUSH))

    def block_status(self, offset: int, length: int, context: str = ALLOCATION, *, flags: int = 0) -> Runs:
        """Length and flags of the runs from `offset` on: of at least one, but maybe not of all of `length`."""
        return self.block_statuses(offset, length, [context], flags=flags)[context]

    def block_statuses(
        self, offset: int, length: int, contexts: Sequence[str] = (), *, flags: int = 0
    ) -> dict[str, Runs]:
        """The same in several contexts at once: those named, or all that were agreed on."""
        agreed = self._negotiation.contexts
        ids = [number for number, name in agreed.items() if not contexts or name in contexts]
        unknown = set(contexts) - {agreed[number] for number in ids}
        if unknown or not ids:
            raise NBDError(f"the export has no metadata context {', '.join(sorted(unknown)) or 'at all'}")
        can_choose = self.framing.extended and self.export.flags & TransmissionFlag.BLOCK_STATUS_PAYLOAD
        chosen = ids if can_choose and len(ids) < len(agreed) else ()
        request = Request(Command.BLOCK_STATUS, offset, min(length, self._max_length), flags, contexts=chosen)
        reply = self._ask(request)
        return {agreed[number]: reply.statuses[number] for number in ids}

    def extents(self, context: str = ALLOCATION) -> Iterator[tuple[int, int, int]]:
        """Offset, length and flags of the runs of the whole export."""
        offset = 0
        while offset < self.size:
            for length, flags in self.block_status(offset, self.size - offset, context):
                yield offset, min(length, self.size - offset), flags
                offset += length
                if offset >= self.size:
                    break

    def close(self) -> None:
        """Disconnect."""
        if self._socket.fileno() < 0:
            return
        if self._transmission is None:
            self.abort()
            return
        with suppress(NBDError):
            self._send(self._transmission.request(Request(Command.DISC)))
        self._socket.close()

    @property
    def is_idle(self) -> bool:
        """All replies were taken: the connection can be used on."""
        return self._transmission is not None and not self._transmission.in_flight

    def abandon(self) -> None:
        """Close without a word to the server, which may not listen."""
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def _max_length(self) -> int:
        """Bytes that one request without payload may be about."""
        return (1 << 63) - 1 if self.framing.extended else MAX_COMPACT_LENGTH

    def _ask(self, request: Request) -> Reply:
        [reply] = self.submit([request])
        return reply.checked()

    def _everywhere(self, request: Request) -> None:
        for _ in self._all(request, self._max_length):
            pass

    def _all(self, request: Request, step: int) -> Iterator[Reply]:
        """The replies to a request that is made in pieces, none of them an error."""
        ends = request.offset + request.length
        pieces = (
            request._replace(offset=start, length=min(step, ends - start))
            for start in range(request.offset, ends, step)
        )
        for reply in self.submit(pieces, 2):
            yield reply.checked()

    def _on_air(self) -> Transmission:
        if self._transmission is None:
            raise NBDError("no export was chosen yet")
        if self._transmission.in_flight:
            raise NBDError("replies to earlier requests were not taken: the connection cannot be used on")
        return self._transmission

    # The socket.

    def _run(self, steps: Steps[T]) -> T:
        """Take the steps of one exchange, each with what it wants."""
        try:
            wanted = next(steps)
            while True:
                self._send(self._negotiation.data_to_send())
                if isinstance(wanted, int):
                    received = bytearray(wanted)
                    self._receive_into(memoryview(received))
                    wanted = steps.send(bytes(received))
                else:
                    self._receive_into(wanted)
                    wanted = steps.send(b"")
        except StopIteration as done:
            self._send(self._negotiation.data_to_send())
            result: T = done.value
            return result

    def _send(self, *pieces: bytes | bytearray | memoryview) -> None:
        try:
            for piece in pieces:
                if piece:
                    self._socket.sendall(piece)
        except OSError as error:
            raise NBDError(f"the server is gone: {error}") from error

    def _receive_into(self, buffer: memoryview) -> None:
        start = 0
        while start < len(buffer):
            try:
                count = self._socket.recv_into(buffer[start:])
            except OSError as error:
                raise NBDError(f"the server is gone: {error}") from error
            if not count:
                raise NBDError("the server closed the connection")
            start += count
