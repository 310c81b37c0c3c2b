"""The client's side of the protocol, written once more for tests: it trusts nothing, and asserts every MUST."""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable
from typing import NamedTuple

from formats import nbd
from formats.nbd import Command, CommandFlag, OptionType, ReplyChunkType
from qcow2snap.nbd.framing import SIMPLE_REPLIES, Framing
from qcow2snap.nbd.transmission import Request

Status = tuple[tuple[int, int], ...]  # length and flags of each run, in the first context


class Answer(NamedTuple):
    """What a client makes of the reply to one request."""

    error: int
    data: bytes | None = None
    status: Status = ()
    message: bytes = b""
    chunks: tuple[int, ...] = ()
    contexts: tuple[int, ...] = ()


Receive = Callable[[int], bytes]


def understand(receive: Receive, request: Request, framing: Framing) -> Answer:
    """Receive the reply to one request, and hold the server to every MUST of it."""
    if not framing.structured:
        magic, error, cookie = nbd.SIMPLE_REPLY.unpack(receive(nbd.SIMPLE_REPLY.size))
        assert (magic, cookie) == (nbd.NBD_SIMPLE_REPLY_MAGIC, request.cookie)
        return Answer(error, receive(request.length) if request.type == Command.READ and not error else None)
    data = bytearray(request.length if request.type == Command.READ and request.length <= nbd.MAX_PAYLOAD else 0)
    covered, status, chunks = [], {}, []
    error, message = 0, b""
    last = False
    while not last:
        kind, last, payload = understand_chunk(receive, request, framing)
        chunks.append(kind)
        if kind in (ReplyChunkType.OFFSET_DATA, ReplyChunkType.OFFSET_HOLE):
            offset = struct.unpack_from(">Q", payload)[0] - request.offset
            size = len(payload) - 8 if kind == ReplyChunkType.OFFSET_DATA else struct.unpack(">I", payload[8:])[0]
            assert size > 0
            assert 0 <= offset <= offset + size <= request.length
            assert all(offset + size <= low or high <= offset for low, high in covered)
            covered.append((offset, offset + size))
            if kind == ReplyChunkType.OFFSET_DATA:
                data[offset : offset + size] = payload[8:]
        elif kind == (ReplyChunkType.BLOCK_STATUS_EXT if framing.extended else ReplyChunkType.BLOCK_STATUS):
            assert request.type == Command.BLOCK_STATUS
            context, found = understand_status(payload, framing)
            assert context not in status
            status[context] = found
        elif kind == ReplyChunkType.ERROR:
            assert not error
            error, size = struct.unpack_from(">IH", payload)
            message = payload[6:]
            message.decode()
            assert error
            assert size == len(message) <= nbd.MAX_STRING
        else:
            assert (kind, last, payload) == (ReplyChunkType.NONE, True, b"")
    if request.flags & CommandFlag.DF:
        assert len(covered) <= 1
    if request.type == Command.READ and not error:
        assert sum(high - low for low, high in covered) == request.length
        return Answer(0, bytes(data), chunks=tuple(chunks))
    return Answer(error, None, status.get(0, ()), message, tuple(chunks), tuple(status))


def understand_chunk(receive: Receive, request: Request, framing: Framing) -> tuple[int, bool, bytes]:
    """Type of a chunk, whether it is the last, and its payload."""
    if framing.extended:
        magic, flags, kind, cookie, offset, length = struct.unpack(">IHHQQQ", receive(32))
        assert (magic, offset) == (nbd.NBD_EXTENDED_REPLY_MAGIC, request.offset)
    else:
        magic, flags, kind, cookie, length = struct.unpack(">IHHQI", receive(20))
        assert magic == nbd.NBD_STRUCTURED_REPLY_MAGIC
    assert flags in (0, 1)
    assert cookie == request.cookie
    return kind, bool(flags), receive(length)


def understand_status(payload: bytes, framing: Framing) -> tuple[int, Status]:
    """Id of the context, and the runs."""
    context = int.from_bytes(payload[:4], "big")
    if not framing.extended:
        found = tuple(struct.iter_unpack(">II", payload[4:]))
    else:
        found = tuple(struct.iter_unpack(">QQ", payload[8:]))
        assert int.from_bytes(payload[4:8], "big") == len(found)
    assert found
    assert all(length for length, _ in found)
    return context, found


def ask(name: bytes = b"", *requests: int) -> bytes:
    """Data of INFO and GO."""
    count = len(requests)
    return struct.pack(f">I{len(name)}sH{count}H", len(name), name, count, *requests)


def meta(*queries: bytes, name: bytes = b"", count: int | None = None) -> bytes:
    start = struct.pack(f">I{len(name)}sI", len(name), name, len(queries) if count is None else count)
    return start + b"".join(struct.pack(f">I{len(query)}s", len(query), query) for query in queries)


def receiver(sock: socket.socket) -> Receive:
    def receive(length: int) -> bytes:
        data = bytearray()
        while len(data) < length:
            piece = sock.recv(length - len(data))
            if not piece:
                raise EOFError(len(data))
            data += piece
        return bytes(data)

    return receive


def pushed_back(data: bytes, receive: Receive) -> Receive:
    """A receive that gives `data` once more."""
    rest = data

    def again(length: int) -> bytes:
        nonlocal rest
        taken, rest = rest[:length], rest[length:]
        return taken + (receive(length - len(taken)) if len(taken) < length else b"")

    return again


def handshake(sock: socket.socket, framing: Framing, name: bytes = b"") -> Receive:
    """Into the transmission phase by the client's side."""
    receive = receiver(sock)

    def option(option: int, data: bytes = b"") -> None:
        sock.sendall(struct.pack(">8sII", nbd.IHAVEOPT, option, len(data)) + data)
        while True:
            _, _, kind, length = struct.unpack(">QIII", receive(20))
            receive(length)
            assert not kind & nbd.REPLY_IS_ERROR
            if kind == 1:
                return

    receive(18)
    sock.sendall(struct.pack(">I", 3))
    if framing.structured:
        option(OptionType.EXTENDED_HEADERS if framing.extended else OptionType.STRUCTURED_REPLY)
        option(OptionType.SET_META_CONTEXT, meta(b"base:allocation", name=name))
    option(OptionType.GO, ask(name))
    return receive


def packed(request: Request, framing: Framing = SIMPLE_REPLIES) -> bytes:
    return framing.request.pack(framing.request_magic, *request)


def read(offset: int, length: int, flags: int = 0, cookie: int = 7) -> Request:
    return Request(flags, Command.READ, cookie, offset, length)
