"""The transmission phase as a client: requests as bytes, and replies in whatever order they come. Knows no socket.

Nothing of a reply is taken on trust: it answers a request that is in flight, with chunks that go with it, of lengths
that it can have. A server that breaks this is at its end: NBDError. One that says no has its error in the Reply.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from formats import nbd
from formats.nbd import Command, CommandFlag, ReplyChunkType, ReplyFlag
from qcow2snap.block.node import NBDError
from qcow2snap.nbd.client.replies import ReplyError, Steps, failed, parsed, text
from qcow2snap.nbd.framing import Framing

Runs = list[tuple[int, int]]  # length in bytes and flags of each

MAX_CHUNKS = 1 << 10  # of one reply, besides those that bring data: errors, and statuses
_MAX_ERROR = 6 + nbd.MAX_STRING + 8  # bytes of an error chunk's payload, with an offset
_MAX_STATUS = 8 + 16 * nbd.MAX_STATUS_DESCRIPTORS  # bytes of a block status chunk's


class Request(NamedTuple):
    """What is asked of the server. `payload` is what a WRITE writes; `length` is taken from it then."""

    command: Command
    offset: int = 0
    length: int = 0
    flags: int = 0
    payload: bytes | bytearray | memoryview = b""
    contexts: Sequence[int] = ()  # of a BLOCK_STATUS: the ids that are wanted, if not all; with extended headers only


@dataclass
class Reply:
    """What the server answered.

    error     what it refused or could not do; the rest says nothing then
    data      of a READ
    statuses  of a BLOCK_STATUS: the runs from the request's offset on, by the context's id
    """

    request: Request
    cookie: int
    error: ReplyError | None = None
    data: bytearray = field(default_factory=bytearray)
    statuses: dict[int, Runs] = field(default_factory=dict)
    missing: int = 0  # bytes of data that have not come
    chunks: int = 0  # that have

    def checked(self) -> Reply:
        """Raise its error, if it is one."""
        if self.error is not None:
            raise self.error
        return self


class Transmission:
    """The requests in flight on one connection.

    Send what `request()` gives; then run the steps of `next_reply()`, each time for one whole reply.
    """

    def __init__(self, framing: Framing, contexts: dict[int, str]) -> None:
        self._framing = framing
        self._contexts = contexts
        self._cookie = 0
        self._in_flight: dict[int, Reply] = {}

    @property
    def in_flight(self) -> int:
        return len(self._in_flight)

    def request(self, request: Request) -> bytes:
        """The header, behind which the payload of a WRITE is to be sent."""
        flags, length, behind = request.flags, request.length, b""
        if request.command == Command.WRITE:
            length = len(request.payload)
            flags |= CommandFlag.PAYLOAD_LEN if self._framing.extended else 0
        elif request.contexts:
            ids = request.contexts
            behind = struct.pack(f">Q{len(ids)}I", length, *ids)
            flags, length = flags | CommandFlag.PAYLOAD_LEN, len(behind)
        self._cookie += 1
        if request.command != Command.DISC:
            reply = Reply(request, self._cookie)
            if request.command == Command.READ:
                reply.data = bytearray(length)
                reply.missing = length
            self._in_flight[self._cookie] = reply
        magic = self._framing.request_magic
        return self._framing.request.pack(magic, flags, request.command, self._cookie, request.offset, length) + behind

    def next_reply(self) -> Steps[Reply]:
        """The steps to the end of whichever reply ends first. Chunks of others are kept for theirs."""
        while True:
            if self._framing.extended:
                header = yield nbd.EXTENDED_REPLY_CHUNK.size
                magic, flags, kind, cookie, offset, length = nbd.EXTENDED_REPLY_CHUNK.unpack(header)
                reply = self._reply_to(magic == nbd.NBD_EXTENDED_REPLY_MAGIC, cookie)
                if offset != reply.request.offset:
                    raise NBDError(f"the server's reply is none: it is for offset {offset}")
            else:
                header = yield nbd.SIMPLE_REPLY.size
                if int.from_bytes(header[:4], "big") == nbd.NBD_SIMPLE_REPLY_MAGIC:
                    return (yield from self._simple_reply(header))
                header += yield nbd.STRUCTURED_REPLY_CHUNK.size - len(header)
                magic, flags, kind, cookie, length = nbd.STRUCTURED_REPLY_CHUNK.unpack(header)
                expected = self._framing.structured and magic == nbd.NBD_STRUCTURED_REPLY_MAGIC
                reply = self._reply_to(expected, cookie)
            yield from self._chunk(reply, kind, length)
            reply.chunks += 1
            if flags & ReplyFlag.DONE:
                return self._whole(reply)

    def _reply_to(self, expected: bool, cookie: int) -> Reply:
        reply = self._in_flight.get(cookie)
        if not expected or reply is None:
            raise NBDError("the server's reply is none")
        return reply

    def _simple_reply(self, header: bytes) -> Steps[Reply]:
        _, error, cookie = nbd.SIMPLE_REPLY.unpack(header)
        reply = self._reply_to(not (self._framing.structured and self._has_content(cookie)), cookie)
        if error:
            reply.error = failed(error, "")
        elif reply.data:
            yield memoryview(reply.data)
            reply.missing = 0
        return self._whole(reply)

    def _has_content(self, cookie: int) -> bool:
        """A simple reply cannot answer it where there are others: not a READ at all, and no status without error."""
        reply = self._in_flight.get(cookie)
        return reply is not None and reply.request.command == Command.READ

    def _chunk(self, reply: Reply, kind: int, length: int) -> Steps[None]:
        """One chunk's payload into its reply."""
        command = reply.request.command
        if reply.chunks > len(reply.data) + MAX_CHUNKS:
            raise NBDError(f"the server does not come to an end with its reply to {command.name}")
        if kind & nbd.CHUNK_IS_ERROR:
            yield from self._error(reply, kind, length)
        elif kind == ReplyChunkType.NONE:
            if length:
                raise NBDError(f"the server's reply is none: {length} bytes of nothing")
        elif kind == ReplyChunkType.OFFSET_DATA and command == Command.READ:
            offset = int.from_bytes((yield 8), "big")
            yield self._part(reply, offset, length - 8)
        elif kind == ReplyChunkType.OFFSET_HOLE and command == Command.READ and length == 12:
            payload = yield 12
            part = self._part(reply, int.from_bytes(payload[:8], "big"), int.from_bytes(payload[8:], "big"))
            part[:] = bytes(len(part))
        elif kind == self._status_type and command == Command.BLOCK_STATUS:
            if length > _MAX_STATUS:
                raise NBDError(f"the server's reply is none: {length} bytes of block status")
            self._status(reply, (yield length) if length else b"")
        else:
            raise NBDError(f"the server answers {command.name} with a chunk of type {kind}")

    def _part(self, reply: Reply, offset: int, length: int) -> memoryview:
        """Where in a reply's data a chunk goes."""
        start = offset - reply.request.offset
        if length <= 0 or start < 0 or start + length > len(reply.data) or length > reply.missing:
            raise NBDError("the server sends data that were not asked for")
        reply.missing -= length  # nothing may come twice, so the sum tells when all is there
        return memoryview(reply.data)[start : start + length]

    def _error(self, reply: Reply, kind: int, length: int) -> Steps[None]:
        if length > _MAX_ERROR:
            raise NBDError(f"the server's reply is none: {length} bytes of error message")
        error = parsed(nbd.Error, (yield length) if length else b"")
        if not error.error or len(error.message) > nbd.MAX_STRING:
            raise NBDError("the server's reply is none: an error without a number, or with too long a message")
        reply.error = reply.error or failed(error.error, text(error.message))

    @property
    def _status_type(self) -> ReplyChunkType:
        return ReplyChunkType.BLOCK_STATUS_EXT if self._framing.extended else ReplyChunkType.BLOCK_STATUS

    def _status(self, reply: Reply, payload: bytes) -> None:
        start, descriptor = (
            (nbd.BLOCK_STATUS_EXT, nbd.EXTENDED_DESCRIPTOR)
            if self._framing.extended
            else (nbd.BLOCK_STATUS, nbd.DESCRIPTOR)
        )
        count, rest = divmod(len(payload) - start.size, descriptor.size)
        if count < 1 or rest:
            raise NBDError(f"the server's reply is none: {len(payload)} bytes of block status")
        context_id, *counted = start.unpack_from(payload)
        if counted not in ([], [count]) or context_id not in self._contexts or context_id in reply.statuses:
            raise NBDError(f"the server's reply is none: a block status of context {context_id}, {counted}")
        runs = list(descriptor.iter_unpack(payload[start.size :]))
        if not all(length for length, _ in runs):
            raise NBDError(f"the server tells nothing about {self._contexts[context_id]} at {reply.request.offset}")
        reply.statuses[context_id] = runs

    def _whole(self, reply: Reply) -> Reply:
        """Nothing more comes of it: is all there?"""
        del self._in_flight[reply.cookie]
        request = reply.request
        if reply.error is None and reply.missing:
            got = len(reply.data) - reply.missing
            raise NBDError(f"the server sends {got} bytes where {len(reply.data)} were asked for")
        if reply.error is None and request.command == Command.BLOCK_STATUS:
            wanted = request.contexts or self._contexts
            if any(context_id not in reply.statuses for context_id in wanted):
                raise NBDError(f"the server does not tell the block status at {request.offset} of every context")
        return reply
