"""How requests and replies are framed, as client and server agreed: the bytes around what is asked and answered.

There are three ways, one object for each. Which request may be made, and what is answered, is not here.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import starmap
from struct import Struct as Packed

from formats import nbd
from formats.nbd import Command, CommandFlag, Errno, ReplyChunkType, ReplyFlag
from qcow2snap.block.node import NBDError
from qcow2snap.nbd.strings import message


class Framing:
    """Compact requests and simple replies: what every client and server speak.

    A reply is made for a request, which its cookie and, with extended headers, its offset tell.
    """

    structured = False
    extended = False
    request: Packed = nbd.REQUEST  # magic, flags, type, cookie, offset, length
    request_magic = nbd.NBD_REQUEST_MAGIC
    data_header_size = nbd.SIMPLE_REPLY.size

    def payload_length(self, flags: int, command: int, length: int) -> int:
        """Bytes of data behind a request's header. NBDError if no client may send so many."""
        return _bounded(length) if command == Command.WRITE else 0

    def done(self, cookie: int, request_offset: int) -> bytes:
        """All went well, and there is no more to come."""
        return nbd.SIMPLE_REPLY.pack(nbd.NBD_SIMPLE_REPLY_MAGIC, 0, cookie)

    def error(self, cookie: int, request_offset: int, error: Errno, text: str) -> bytes:
        """What went wrong, and there is no more to come."""
        return nbd.SIMPLE_REPLY.pack(nbd.NBD_SIMPLE_REPLY_MAGIC, error, cookie)

    def pack_data_header_into(
        self, buffer: memoryview, at: int, flags: int, cookie: int, request_offset: int, offset: int, length: int
    ) -> None:
        """What comes before `length` bytes that were read at `offset`: all of the data in a simple reply.

        A chunk may hold a part. `flags` say whether it is the last: not while an error may still follow.
        """
        nbd.SIMPLE_REPLY.pack_into(buffer, at, nbd.NBD_SIMPLE_REPLY_MAGIC, 0, cookie)

    def data_header(self, cookie: int, request_offset: int, offset: int, length: int) -> bytes:
        """The same, by itself. Never of the last chunk."""
        header = bytearray(self.data_header_size)
        self.pack_data_header_into(memoryview(header), 0, 0, cookie, request_offset, offset, length)
        return bytes(header)


class StructuredReplies(Framing):
    """Compact requests, and replies in chunks."""

    structured = True
    data_header_size = nbd.OFFSET_DATA_CHUNK.size

    def chunk_header(self, flags: int, chunk_type: int, cookie: int, request_offset: int, length: int) -> bytes:
        return nbd.STRUCTURED_REPLY_CHUNK.pack(nbd.NBD_STRUCTURED_REPLY_MAGIC, flags, chunk_type, cookie, length)

    def done(self, cookie: int, request_offset: int) -> bytes:
        return self.chunk_header(ReplyFlag.DONE, ReplyChunkType.NONE, cookie, request_offset, 0)

    def error(self, cookie: int, request_offset: int, error: Errno, text: str) -> bytes:
        payload = bytes(nbd.Error.build({"error": error, "message": message(text)}))
        return self.chunk_header(ReplyFlag.DONE, ReplyChunkType.ERROR, cookie, request_offset, len(payload)) + payload

    def pack_data_header_into(
        self, buffer: memoryview, at: int, flags: int, cookie: int, request_offset: int, offset: int, length: int
    ) -> None:
        magic, kind = nbd.NBD_STRUCTURED_REPLY_MAGIC, ReplyChunkType.OFFSET_DATA
        nbd.OFFSET_DATA_CHUNK.pack_into(buffer, at, magic, flags, kind, cookie, length + 8, offset)

    def hole(self, cookie: int, request_offset: int, offset: int, length: int) -> bytes:
        """Zeros that were read. Never the last chunk, so that an error can follow."""
        magic, kind = nbd.NBD_STRUCTURED_REPLY_MAGIC, ReplyChunkType.OFFSET_HOLE
        return nbd.OFFSET_HOLE_CHUNK.pack(magic, 0, kind, cookie, 12, offset, length)

    def block_status(
        self, cookie: int, request_offset: int, context_id: int, descriptors: Iterable[tuple[int, int]]
    ) -> bytes:
        """Lengths and flags in one context. Never the last chunk."""
        payload = nbd.BLOCK_STATUS.pack(context_id) + b"".join(starmap(nbd.DESCRIPTOR.pack, descriptors))
        return self.chunk_header(0, ReplyChunkType.BLOCK_STATUS, cookie, request_offset, len(payload)) + payload


class ExtendedHeaders(StructuredReplies):
    """Requests and chunks with lengths of 64 bits. Any request may have a payload, which a flag tells.

    A WRITE has one also without the flag, against the document: QEMU's client never sets it (10.0), and its server does
    without it.
    """

    extended = True
    request = nbd.EXTENDED_REQUEST
    request_magic = nbd.NBD_EXTENDED_REQUEST_MAGIC
    data_header_size = nbd.EXTENDED_OFFSET_DATA_CHUNK.size

    def payload_length(self, flags: int, command: int, length: int) -> int:
        return _bounded(length) if command == Command.WRITE or flags & CommandFlag.PAYLOAD_LEN else 0

    def chunk_header(self, flags: int, chunk_type: int, cookie: int, request_offset: int, length: int) -> bytes:
        magic = nbd.NBD_EXTENDED_REPLY_MAGIC
        return nbd.EXTENDED_REPLY_CHUNK.pack(magic, flags, chunk_type, cookie, request_offset, length)

    def pack_data_header_into(
        self, buffer: memoryview, at: int, flags: int, cookie: int, request_offset: int, offset: int, length: int
    ) -> None:
        header = nbd.NBD_EXTENDED_REPLY_MAGIC, flags, ReplyChunkType.OFFSET_DATA, cookie, request_offset, length + 8
        nbd.EXTENDED_OFFSET_DATA_CHUNK.pack_into(buffer, at, *header, offset)

    def hole(self, cookie: int, request_offset: int, offset: int, length: int) -> bytes:
        header = nbd.NBD_EXTENDED_REPLY_MAGIC, 0, ReplyChunkType.OFFSET_HOLE, cookie, request_offset, 12
        return nbd.EXTENDED_OFFSET_HOLE_CHUNK.pack(*header, offset, length)

    def block_status(
        self, cookie: int, request_offset: int, context_id: int, descriptors: Iterable[tuple[int, int]]
    ) -> bytes:
        runs = list(descriptors)
        payload = nbd.BLOCK_STATUS_EXT.pack(context_id, len(runs)) + b"".join(
            starmap(nbd.EXTENDED_DESCRIPTOR.pack, runs)
        )
        return self.chunk_header(0, ReplyChunkType.BLOCK_STATUS_EXT, cookie, request_offset, len(payload)) + payload


SIMPLE_REPLIES = Framing()
STRUCTURED_REPLIES = StructuredReplies()
EXTENDED_HEADERS = ExtendedHeaders()


def _bounded(length: int) -> int:
    if length > nbd.MAX_PAYLOAD:
        raise NBDError(f"the client began to send {length} bytes with one request, {nbd.MAX_PAYLOAD} are allowed")
    return length
