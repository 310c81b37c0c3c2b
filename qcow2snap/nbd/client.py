"""An NBD client: small, synchronous, one request at a time. It trusts no server: lengths are bounded, replies checked.

`python -m qcow2snap.nbd.client URI OUT` copies an export to a sparse file, or to standard output if OUT is `-`.
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple, Self

from construct import ConstructError

from formats import nbd
from formats.nbd import (
    ClientFlag,
    Command,
    Errno,
    HandshakeFlag,
    InfoType,
    OptionType,
    ReplyChunkType,
    ReplyFlag,
    ReplyType,
    State,
)
from qcow2snap.block.node import NBDError
from qcow2snap.nbd import uri as nbd_uri
from qcow2snap.nbd.strings import is_string

MAX_REPLY = 1 << 16  # bytes of one option's reply: a name, a description and their lengths fit many times
MAX_REPLIES = 1 << 28  # bytes of all replies to one option: the longest names of the most snapshots take less
MAX_READ = nbd.MAX_PAYLOAD  # bytes asked for at once
MAX_STATUS_LENGTH = (1 << 32) - (1 << 16)  # bytes asked about at once: round, and within 32 bits
COPY_PIECE = 1 << 21  # bytes

ALLOCATION = "base:allocation"


class ListedExport(NamedTuple):
    """One entry of the server's list."""

    name: str
    description: str


class ExportInfo(NamedTuple):
    """What the server says about an export. Block sizes are None where it did not say."""

    size: int
    flags: int  # TransmissionFlag, and perhaps bits that are none
    name: str = ""
    description: str = ""
    minimum_block_size: int | None = None
    preferred_block_size: int | None = None
    maximum_payload_size: int | None = None


class ReplyError(NBDError):
    """The server said no.

    error  a reply type of the handshake or an error value of the transmission; an int where it is none we know
    """

    def __init__(self, error: int, message: str) -> None:
        super().__init__(message)
        self.error = error


class Client:
    """A connection to an NBD server. First list, ask and `go`; then read. As a context manager it disconnects at exit.

    threads  one at a time
    errors   ReplyError where the server said no: the connection can be used on. Any other NBDError: it cannot.
    owns     the socket
    """

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._info: ExportInfo | None = None
        self._structured_replies = False
        self._contexts: dict[int, str] = {}
        self._cookie = 0
        try:
            self._greet()
        except BaseException:
            sock.close()
            raise

    @classmethod
    def connect(cls, where: nbd_uri.URI | str, *, timeout: float | None = 60.0) -> Self:
        """Connect to the server of a URI; its export is not chosen yet. `timeout`: seconds without a sign of life."""
        target = nbd_uri.parse(where) if isinstance(where, str) else where
        try:
            if target.socket:
                sock = socket.socket(socket.AF_UNIX)
                sock.settimeout(timeout)
                sock.connect(target.socket)
            else:
                sock = socket.create_connection((target.host, target.port), timeout)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except OSError as error:
            raise NBDError(f"{target}: cannot connect: {error}") from error
        return cls(sock)

    # The handshake.

    def _greet(self) -> None:
        greeting = self._receive(nbd.Greeting.sizeof())
        try:
            flags = nbd.Greeting.parse(greeting).handshake_flags
        except ConstructError:
            raise NBDError("this is not a server of newstyle NBD") from None
        if not flags & HandshakeFlag.FIXED_NEWSTYLE:
            raise NBDError("the server does not speak fixed newstyle NBD")
        self._send(nbd.ClientFlags.build({"client_flags": ClientFlag.FIXED_NEWSTYLE | flags & ClientFlag.NO_ZEROES}))

    def list_exports(self) -> list[ListedExport]:
        exports = []
        for reply_type, data in self._option(OptionType.LIST):
            if reply_type == ReplyType.SERVER:
                reply = _parse(nbd.ServerReply, data)
                exports.append(ListedExport(_text(reply.name), _text(reply.details)))
        return exports

    def info(self, name: str = "") -> ExportInfo:
        """What there is to know about an export, without choosing it."""
        return self._ask(OptionType.INFO, name)

    def list_contexts(self, name: str = "", queries: Sequence[str] = ()) -> list[str]:
        """The metadata contexts of an export: all, or those that the queries mean."""
        self._want_structured_replies()
        return list(self._meta_contexts(OptionType.LIST_META_CONTEXT, name, queries).values())

    def go(self, name: str = "", contexts: Sequence[str] = (ALLOCATION,)) -> ExportInfo:
        """Choose an export, with those of the metadata contexts that it has; from now on it can be read."""
        self._contexts = {}
        if self._want_structured_replies() and contexts:
            with suppress(ReplyError):  # the server has none; or has no such export, as GO is about to say
                self._contexts = self._meta_contexts(OptionType.SET_META_CONTEXT, name, contexts)
        self._info = self._ask(OptionType.GO, name)
        return self._info

    def abort(self) -> None:
        """Leave in the handshake."""
        with suppress(NBDError):  # a server may close without an answer
            self._accepted(OptionType.ABORT)
        self._socket.close()

    def _want_structured_replies(self) -> bool:
        if not self._structured_replies:
            with suppress(ReplyError):  # an old server: simple replies then
                self._accepted(OptionType.STRUCTURED_REPLY)
                self._structured_replies = True
        return self._structured_replies

    def _ask(self, option: OptionType, name: str) -> ExportInfo:
        wanted = [InfoType.NAME, InfoType.DESCRIPTION, InfoType.BLOCK_SIZE]
        data = nbd.InfoRequest.build({"name": _encoded(name), "number_of_requests": len(wanted), "requests": wanted})
        facts: dict[str, Any] = {}
        for reply_type, reply in self._option(option, data):
            kind = int.from_bytes(reply[:2], "big")
            if reply_type == ReplyType.INFO and kind in _INFO_LAYOUTS:
                facts |= _parse(_INFO_LAYOUTS[kind], reply)
        if "size" not in facts:
            raise NBDError("the server accepted an export without telling its size")
        return ExportInfo(
            facts["size"],
            facts["transmission_flags"],
            _text(facts.get("name", name.encode())),
            _text(facts.get("description", b"")),
            *(facts.get(f"{each}_size") for each in ("minimum_block", "preferred_block", "maximum_payload")),
        )

    def _meta_contexts(self, option: OptionType, name: str, queries: Sequence[str]) -> dict[int, str]:
        request = {
            "name": _encoded(name),
            "number_of_queries": len(queries),
            "queries": [_encoded(query) for query in queries],
        }
        replies = [
            _parse(nbd.MetaContextReply, reply)
            for reply_type, reply in self._option(option, nbd.MetaContextRequest.build(request))
            if reply_type == ReplyType.META_CONTEXT
        ]
        if option == OptionType.LIST_META_CONTEXT:  # where the ids mean nothing
            return {number: _text(reply.name) for number, reply in enumerate(replies)}
        return {reply.context_id: _text(reply.name) for reply in replies}

    def _accepted(self, option: OptionType) -> None:
        for _ in self._option(option):
            pass

    def _option(self, option: OptionType, data: bytes = b"") -> Iterator[tuple[int, bytes]]:
        """The replies to an option up to its ACK. An error among them: ReplyError."""
        header = {"magic": nbd.IHAVEOPT, "option": option, "length": len(data)}
        self._send(nbd.OptionHeader.build(header) + data)
        received = 0
        while received <= MAX_REPLIES:
            reply = _parse(nbd.OptionReplyHeader, self._receive(nbd.OptionReplyHeader.sizeof()))
            if reply.magic != nbd.NBD_REP_MAGIC or reply.option != option or reply.length > MAX_REPLY:
                raise NBDError(f"the server's reply to {option.name} is none")
            payload = self._receive(reply.length)
            received += nbd.OptionReplyHeader.sizeof() + len(payload)
            if reply.reply_type == ReplyType.ACK:
                return
            if reply.reply_type & nbd.REPLY_IS_ERROR:
                code = reply.reply_type & ~nbd.REPLY_IS_ERROR
                raise ReplyError(reply.reply_type, f"{option.name}: {_text(payload) or f'error {code}'}")
            yield reply.reply_type, payload
        raise NBDError(f"the server does not come to an end with its replies to {option.name}")

    # The transmission.

    @property
    def export(self) -> ExportInfo:
        """The export that was chosen."""
        if self._info is None:
            raise NBDError("no export was chosen yet")
        return self._info

    @property
    def contexts(self) -> frozenset[str]:
        """The metadata contexts that were agreed on."""
        return frozenset(self._contexts.values())

    @property
    def size(self) -> int:
        return self.export.size

    def pread(self, offset: int, length: int, *, flags: int = 0) -> bytearray:
        """`length` bytes at `offset`, in as many requests as it takes."""
        buffer = bytearray(length)
        limit = min(MAX_READ, self.export.maximum_payload_size or MAX_READ)
        for start in range(0, length, limit):
            self._read(offset + start, memoryview(buffer)[start : start + limit], flags)
        return buffer

    def block_status(
        self, offset: int, length: int, context: str = ALLOCATION, *, flags: int = 0
    ) -> list[tuple[int, int]]:
        """Length and flags of the runs from `offset` on: of at least one, but maybe not of all of `length`."""
        request_length = min(length, MAX_STATUS_LENGTH)
        cookie = self._request(Command.BLOCK_STATUS, offset, request_length, flags)
        found: list[tuple[int, int]] = []
        for chunk_type, payload in self._chunks(cookie):
            if chunk_type == ReplyChunkType.BLOCK_STATUS:
                status = _parse(nbd.BlockStatus, payload)
                if self._contexts.get(status.context_id) == context:
                    found += [(each.length, each.status_flags) for each in status.descriptors]
        if not found or any(not run for run, _ in found):
            raise NBDError(f"the server tells nothing about {context} at {offset}")
        return found

    def extents(self, context: str = ALLOCATION) -> Iterator[tuple[int, int, int]]:
        """Offset, length and flags of the runs of the whole export."""
        offset = 0
        while offset < self.size:
            for length, flags in self.block_status(offset, self.size - offset, context):
                yield offset, min(length, self.size - offset), flags
                offset += length

    def cache(self, offset: int, length: int) -> None:
        self._simple(Command.CACHE, offset, length)

    def flush(self) -> None:
        self._simple(Command.FLUSH, 0, 0)

    def close(self) -> None:
        """Disconnect."""
        if self._socket.fileno() < 0:
            return
        if self._info is None:
            self.abort()
            return
        with suppress(NBDError):
            self._request(Command.DISC, 0, 0, 0)
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _request(self, command: Command, offset: int, length: int, flags: int) -> int:
        self._cookie += 1
        self._send(nbd.REQUEST.pack(nbd.NBD_REQUEST_MAGIC, flags, command, self._cookie, offset, length))
        return self._cookie

    def _simple(self, command: Command, offset: int, length: int) -> None:
        for _ in self._chunks(self._request(command, offset, length, 0)):
            raise NBDError(f"the server answers {command.name} with data")

    def _read(self, offset: int, buffer: memoryview, flags: int) -> None:
        cookie = self._request(Command.READ, offset, len(buffer), flags)
        if not self._structured_replies:
            self._simple_reply(self._receive(nbd.SIMPLE_REPLY.size), cookie)
            self._receive_into(buffer)
            return
        missing = len(buffer)
        for chunk_type, payload in self._chunks(cookie, len(buffer) + 8):
            at = int.from_bytes(payload[:8], "big") - offset
            if chunk_type == ReplyChunkType.OFFSET_DATA and len(payload) > 8:
                length = len(payload) - 8
            elif chunk_type == ReplyChunkType.OFFSET_HOLE and len(payload) == 12:
                length = int.from_bytes(payload[8:], "big")
            else:
                raise NBDError(f"the server answers READ with a chunk of type {chunk_type}")
            if at < 0 or at + length > len(buffer):
                raise NBDError("the server sends data that were not asked for")
            if chunk_type == ReplyChunkType.OFFSET_DATA:
                buffer[at : at + length] = memoryview(payload)[8:]
            missing -= length
        if missing:  # nothing may come twice, so the sum tells
            raise NBDError(f"the server sends {len(buffer) - missing} bytes where {len(buffer)} were asked for")

    def _chunks(self, cookie: int, limit: int = 4 + 8 * nbd.MAX_STATUS_DESCRIPTORS) -> Iterator[tuple[int, bytes]]:
        """The content chunks of a reply. Errors among them are raised when all has been received."""
        failed: ReplyError | None = None
        while True:
            head = self._receive(nbd.SIMPLE_REPLY.size)
            if int.from_bytes(head[:4], "big") == nbd.NBD_SIMPLE_REPLY_MAGIC:
                self._simple_reply(head, cookie)
                return
            head += self._receive(nbd.STRUCTURED_REPLY_CHUNK.size - len(head))
            magic, flags, chunk_type, replied, length = nbd.STRUCTURED_REPLY_CHUNK.unpack(head)
            if magic != nbd.NBD_STRUCTURED_REPLY_MAGIC or replied != cookie or length > limit + nbd.MAX_STRING:
                raise NBDError("the server's reply is none")
            payload = self._receive(length)
            if chunk_type & nbd.CHUNK_IS_ERROR:
                error = _parse(nbd.Error, payload)
                failed = failed or _failed(error.error, _text(error.message))
            elif chunk_type != ReplyChunkType.NONE:
                yield chunk_type, payload
            if flags & ReplyFlag.DONE:
                break
        if failed:
            raise failed

    def _simple_reply(self, head: bytes, cookie: int) -> None:
        magic, error, replied = nbd.SIMPLE_REPLY.unpack(head)
        if magic != nbd.NBD_SIMPLE_REPLY_MAGIC or replied != cookie:
            raise NBDError("the server's reply is none")
        if error:
            raise _failed(error, "")

    def _send(self, data: bytes) -> None:
        try:
            self._socket.sendall(data)
        except OSError as error:
            raise NBDError(f"the server is gone: {error}") from error

    def _receive(self, length: int) -> bytes:
        buffer = bytearray(length)
        self._receive_into(memoryview(buffer))
        return bytes(buffer)

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


_INFO_LAYOUTS: dict[int, Any] = {
    InfoType.EXPORT: nbd.InfoExport,
    InfoType.NAME: nbd.InfoName,
    InfoType.DESCRIPTION: nbd.InfoDescription,
    InfoType.BLOCK_SIZE: nbd.InfoBlockSize,
}


def _parse(layout: Any, data: bytes) -> Any:
    try:
        return layout.parse(data)
    except ConstructError as error:
        raise NBDError(f"the server's reply cannot be understood: {error}") from error


def _encoded(text: str) -> bytes:
    if not is_string(text):
        raise NBDError(f"{text[:100]!a}... is no name that NBD can carry: UTF-8 of at most {nbd.MAX_STRING} bytes")
    return text.encode()


def _text(data: bytes) -> str:
    return data.decode(errors="backslashreplace")


def _failed(error: int, message: str) -> ReplyError:
    try:
        name = Errno(error).name
    except ValueError:
        name = f"error {error}"
    return ReplyError(error, f"{name}: {message}" if message else name)


def copy(client: Client, out: BinaryIO, *, sparse: bool) -> None:
    """Copy the chosen export to an empty file, which can be sought if it is to be `sparse`: zeros are holes then."""
    if sparse:
        out.truncate(client.size)
    runs = client.extents() if ALLOCATION in client.contexts else iter([(0, client.size, 0)])
    for offset, length, flags in runs:
        if flags & State.ZERO and sparse:
            continue
        for start in range(offset, offset + length, COPY_PIECE):
            size = min(COPY_PIECE, offset + length - start)
            data = bytes(size) if flags & State.ZERO else client.pread(start, size)
            if sparse:
                out.seek(start)
            out.write(data)
    out.flush()


def main(arguments: Sequence[str]) -> int:
    if len(arguments) != 2:
        print("usage: python -m qcow2snap.nbd.client URI OUT", file=sys.stderr)
        return 2
    source, target = arguments
    try:
        with Client.connect(source) as client:
            client.go(nbd_uri.parse(source).export)
            if target == "-":
                copy(client, sys.stdout.buffer, sparse=False)
            else:
                with open(target, "wb") as out:
                    copy(client, out, sparse=True)
    except (NBDError, OSError) as error:
        print(f"qcow2snap: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
