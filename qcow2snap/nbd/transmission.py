"""The transmission phase as a server: what is a sound request, and what is answered. Knows no socket.

This is the whole of it, plainly: replies are bytes, every read goes through BlockNode.preadv. `connection` has a faster
way for the one request that matters, a sound READ, and comes here for all others; tests hold the two equal.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import islice
from typing import NamedTuple

from formats import nbd
from formats.nbd import Command, CommandFlag, Errno, ReplyChunkType, ReplyFlag
from qcow2snap.block.node import Extent, NBDError, OutOfRange, Qcow2SnapError, ReadOnly
from qcow2snap.nbd.negotiation import Agreement
from qcow2snap.nbd.strings import message

PIECE = 1 << 18  # bytes of data in one chunk of a structured reply, unless the client wants it whole
SHORT_HOLE = 1 << 12  # bytes: zeros shorter than this go with the data beside them, unless they are all there is
MAX_CACHED_EXTENTS = 1 << 12  # that one CACHE request is good for

# Block status is the one request that costs much more processor time than it costs the client: of a process's
# connections one at a time works on it, so that they compete with all the others' reads as one would.
_ONE_AT_A_TIME = threading.Lock()


class Request(NamedTuple):
    """A request as it came, nothing in it checked."""

    flags: int
    type: int
    cookie: int
    offset: int
    length: int


class Refused(Exception):
    """A request's answer is this error."""

    def __init__(self, error: Errno, text: str) -> None:
        super().__init__(text)
        self.error = error


def payload_length(request_type: int, length: int) -> int:
    """Bytes of data behind a request's header. NBDError if no client may send so many."""
    if request_type != Command.WRITE:
        return 0
    if length > nbd.MAX_PAYLOAD:
        raise NBDError(f"the client began to write {length} bytes in one request, {nbd.MAX_PAYLOAD} are allowed")
    return length


class Requests:
    """What arrives, cut into requests. Data behind a WRITE is dropped: no export can be written."""

    def __init__(self) -> None:
        self._received = bytearray()

    def receive(self, data: bytes | bytearray | memoryview) -> Iterator[Request]:
        """The requests that are whole now. NBDError where there is none, for then no later one can be found either."""
        self._received += data
        while len(self._received) >= nbd.REQUEST.size:
            magic, *fields = nbd.REQUEST.unpack_from(self._received)
            request = Request(*fields)
            check_magic(magic)
            end = nbd.REQUEST.size + payload_length(request.type, request.length)
            if len(self._received) < end:
                return
            del self._received[:end]
            yield request


def check_magic(magic: int) -> None:
    if magic != nbd.NBD_REQUEST_MAGIC:
        raise NBDError(f"the client sent no request where one has to be: its magic number is {magic:#x}")


class Answers:
    """The answer to each request on an agreed export.

    threads  one at a time
    errors   none of the node's: they are answers. What else goes wrong is a bug, and escapes.
    """

    def __init__(self, agreement: Agreement) -> None:
        self._agreement = agreement
        self._node = agreement.node
        self._structured = agreement.structured_replies

    def answer(self, request: Request) -> Iterator[bytes]:
        """The reply in pieces, to be sent in turn. DISC has none; whoever reads the requests ends there."""
        try:
            handler = self._HANDLERS.get(request.type)
            if handler is None:
                raise Refused(Errno.EINVAL, f"this server knows no command {request.type}")
            yield from handler(self, request)
        except (Refused, Qcow2SnapError) as error:
            yield self.error(request.cookie, error)

    def error(self, cookie: int, error: Refused | Qcow2SnapError) -> bytes:
        """The reply, or in a structured reply the last chunk, that says what went wrong."""
        number = _errno_of(error)
        if not self._structured:
            return nbd.SIMPLE_REPLY.pack(nbd.NBD_SIMPLE_REPLY_MAGIC, number, cookie)
        return _chunk(ReplyChunkType.ERROR, cookie, nbd.Error.build({"error": number, "message": message(str(error))}))

    def _done(self, cookie: int) -> bytes:
        if self._structured:
            return _chunk(ReplyChunkType.NONE, cookie, b"")
        return nbd.SIMPLE_REPLY.pack(nbd.NBD_SIMPLE_REPLY_MAGIC, 0, cookie)

    # One handler for each command.

    def _read(self, request: Request) -> Iterator[bytes]:
        self._check(request, CommandFlag.DF if self._structured else 0)
        if request.length > nbd.MAX_PAYLOAD:
            error = Errno.EOVERFLOW if self._structured else Errno.EINVAL
            raise Refused(error, f"{request.length} bytes in one read, {nbd.MAX_PAYLOAD} are allowed")
        if not self._structured:
            # All of it before the header, which says whether all went well.
            data = self._node.pread(request.offset, request.length)
            yield self._done(request.cookie)
            yield data
            return
        if request.flags & CommandFlag.DF and request.length:
            yield data_chunk(request.cookie, request.offset, self._node.pread(request.offset, request.length))
        elif request.length:
            extents = tuple(self._node.block_status(request.offset, request.length, want_zero=False))
            for part in parts_of(extents):
                if part.zero:
                    yield hole_chunk(request.cookie, part.offset, part.length)
                    continue
                for offset in range(part.offset, part.end, PIECE):
                    data = self._node.pread(offset, min(PIECE, part.end - offset))
                    yield data_chunk(request.cookie, offset, data)
        yield self._done(request.cookie)

    def _block_status(self, request: Request) -> Iterator[bytes]:
        self._check(request, CommandFlag.REQ_ONE)
        if not self._agreement.contexts:
            raise Refused(Errno.EINVAL, "no metadata context was negotiated for this export")
        if not request.length:
            raise Refused(Errno.EINVAL, "a block status of 0 bytes was asked for")
        limit = 1 if request.flags & CommandFlag.REQ_ONE else nbd.MAX_STATUS_DESCRIPTORS
        for number, context in enumerate(self._agreement.contexts):
            with _ONE_AT_A_TIME:
                descriptors = context.descriptors(self._node, request.offset, request.length, limit)
                payload = nbd.BLOCK_STATUS.pack(number) + b"".join(nbd.DESCRIPTOR.pack(*each) for each in descriptors)
            yield _chunk(ReplyChunkType.BLOCK_STATUS, request.cookie, payload, done=False)
        yield self._done(request.cookie)

    def _cache(self, request: Request) -> Iterator[bytes]:
        """Ask the kernel to read ahead where bytes lie verbatim in a file. That it may, or may not: it is a hint."""
        self._check(request, 0)
        extents = self._node.block_status(request.offset, request.length, want_zero=False)
        for extent in islice(extents, MAX_CACHED_EXTENTS):
            if extent.file is not None and extent.must_read:
                with suppress(OSError):
                    os.posix_fadvise(extent.file.fileno(), extent.file_offset, extent.length, os.POSIX_FADV_WILLNEED)
        yield self._done(request.cookie)

    def _flush(self, request: Request) -> Iterator[bytes]:
        if request.flags or request.offset or request.length:
            raise Refused(Errno.EINVAL, "a flush has no flags, no offset and no length")
        self._node.flush()
        yield self._done(request.cookie)

    def _write(self, request: Request) -> Iterator[bytes]:
        raise ReadOnly("this export is read-only: it cannot be written")
        yield b""

    def _disconnect(self, request: Request) -> Iterator[bytes]:
        yield from ()

    _HANDLERS: dict[int, Callable[[Answers, Request], Iterator[bytes]]] = {
        Command.READ: _read,
        Command.WRITE: _write,
        Command.DISC: _disconnect,
        Command.FLUSH: _flush,
        Command.TRIM: _write,
        Command.CACHE: _cache,
        Command.WRITE_ZEROES: _write,
        Command.BLOCK_STATUS: _block_status,
    }

    def _check(self, request: Request, allowed_flags: int) -> None:
        if request.flags & ~int(allowed_flags):
            raise Refused(Errno.EINVAL, f"command {request.type} does not go with flags {request.flags:#x}")
        self._node.check_range(request.offset, request.length)


class Part(NamedTuple):
    """A part of a read that is answered in one way: zeros, or data, which may lie verbatim in a file."""

    offset: int
    length: int
    zero: bool
    extent: Extent | None = None  # the one extent that a part of data is, where it is one

    @property
    def end(self) -> int:
        return self.offset + self.length


def parts_of(extents: tuple[Extent, ...], alone: int | None = None) -> Iterator[Part]:
    """How to answer a read of these extents: holes by themselves, and between them as much data in one as there is.

    Data of `alone` bytes and more that lie verbatim in a file that nobody else writes are a part by themselves too.
    """
    start = end = extents[0].offset  # of the data gathered so far
    only: Extent | None = None
    for extent in extents:
        zero = not extent.must_read and (extent.length >= SHORT_HOLE or len(extents) == 1)
        in_file = extent.must_read and extent.file is not None and extent.file.stable
        if not zero and not (in_file and alone is not None and extent.length >= alone):
            only = extent if start == end and in_file else None
            end = extent.end
            continue
        if start < end:
            yield Part(start, end - start, False, only)
        yield Part(extent.offset, extent.length, zero, extent)
        start = end = extent.end
    if start < end:
        yield Part(start, end - start, False, only)


def data_chunk(cookie: int, offset: int, data: bytes) -> bytes:
    """Part of what was read. Never the last chunk, so that an error can still follow."""
    return _chunk(
        ReplyChunkType.OFFSET_DATA, cookie, nbd.OffsetData.build({"offset": offset, "data": data}), done=False
    )


def hole_chunk(cookie: int, offset: int, length: int) -> bytes:
    payload = nbd.OffsetHole.build({"offset": offset, "hole_size": length})
    return _chunk(ReplyChunkType.OFFSET_HOLE, cookie, payload, done=False)


def _chunk(chunk_type: ReplyChunkType, cookie: int, payload: bytes, *, done: bool = True) -> bytes:
    flags = ReplyFlag.DONE if done else 0
    header = nbd.STRUCTURED_REPLY_CHUNK.pack(nbd.NBD_STRUCTURED_REPLY_MAGIC, flags, chunk_type, cookie, len(payload))
    return header + payload


def _errno_of(error: Exception) -> Errno:
    if isinstance(error, Refused):
        return error.error
    if isinstance(error, OutOfRange):
        return Errno.EINVAL
    if isinstance(error, ReadOnly):
        return Errno.EPERM
    return Errno.EIO
