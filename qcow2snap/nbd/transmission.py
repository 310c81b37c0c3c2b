"""The transmission phase as a server: what is a sound request, and what is answered. Knows no socket.

This is the whole of it, plainly: replies are bytes, every read goes through BlockNode.preadv. `connection` has a faster
way for the one request that matters, a sound READ, and comes here for all others; tests hold the two equal.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import NamedTuple

from construct import ConstructError

from formats import nbd
from formats.nbd import Command, CommandFlag, Errno
from qcow2snap.block.node import (
    AccessDenied,
    Buffer,
    Extent,
    NBDError,
    NoSpace,
    NotSupported,
    OutOfRange,
    Qcow2SnapError,
    ReadOnly,
    SnapshotGone,
)
from qcow2snap.nbd.file_map import fetch_ahead
from qcow2snap.nbd.framing import SIMPLE_REPLIES, Framing, StructuredReplies
from qcow2snap.nbd.negotiation import Agreement

logger = logging.getLogger(__name__)

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


class Requests:
    """What arrives, cut into requests and the data behind them."""

    def __init__(self, framing: Framing = SIMPLE_REPLIES) -> None:
        self._framing = framing
        self._received = bytearray()

    def receive(self, data: bytes | bytearray | memoryview) -> Iterator[tuple[Request, bytes]]:
        """The requests that are whole now. NBDError where there is none, for then no later one can be found either."""
        self._received += data
        size = self._framing.request.size
        while len(self._received) >= size:
            magic, *fields = self._framing.request.unpack_from(self._received)
            request = Request(*fields)
            check_magic(magic, self._framing)
            end = size + self._framing.payload_length(request.flags, request.type, request.length)
            if len(self._received) < end:
                return
            payload = bytes(self._received[size:end])
            del self._received[:end]
            yield request, payload


def check_magic(magic: int, framing: Framing) -> None:
    if magic != framing.request_magic:
        raise NBDError(f"the client sent no request where one has to be: its magic number is {magic:#x}")


class Answers:
    """The answer to each request on an agreed export.

    threads  one at a time
    errors   none of the node's: they are answers. What else goes wrong is a bug, and escapes.
    """

    def __init__(self, agreement: Agreement) -> None:
        self._export_name = agreement.export.name
        self._has_told = False  # the log, that the snapshot is gone
        self._contexts = agreement.contexts
        self._node = agreement.node
        self._may_trim = agreement.export.may_trim or not agreement.node.read_only
        self._framing = agreement.framing

    def answer(self, request: Request, payload: Iterable[Buffer] = ()) -> Iterator[bytes]:
        """The reply in pieces, to be sent in turn. DISC has none; whoever reads the requests ends there.

        `payload` is the data behind the request, in pieces of any size. They are taken as they are needed: of a request
        that is refused, none; whoever reads the requests passes over the rest.
        """
        try:
            handler = self._HANDLERS.get(request.type)
            if handler is None:
                raise Refused(Errno.EINVAL, f"this server knows no command {request.type}")
            yield from handler(self, request, payload)
        except (Refused, Qcow2SnapError) as error:
            yield self.error(request.cookie, request.offset, error)

    def error(self, cookie: int, request_offset: int, error: Refused | Qcow2SnapError) -> bytes:
        """The reply, or its last chunk, that says what went wrong."""
        if isinstance(error, SnapshotGone) and not self._has_told:
            self._has_told = True
            logger.warning("export %a: %s", self._export_name, error)
        return self._framing.error(cookie, request_offset, _errno_of(error), str(error))

    def _done(self, request: Request) -> bytes:
        return self._framing.done(request.cookie, request.offset)

    # One handler for each command.

    def _read(self, request: Request, payload: Iterable[Buffer]) -> Iterator[bytes]:
        framing = self._framing
        self._check(request, CommandFlag.DF if framing.structured else 0)
        if request.length > nbd.MAX_PAYLOAD:
            error = Errno.EOVERFLOW if framing.structured else Errno.EINVAL
            raise Refused(error, f"{request.length} bytes in one read, {nbd.MAX_PAYLOAD} are allowed")
        if not isinstance(framing, StructuredReplies):
            # All of it before the header, which says whether all went well.
            yield from self._data(request, request.offset, request.length)
            return
        if request.flags & CommandFlag.DF and request.length:
            yield from self._data(request, request.offset, request.length)
        elif request.length:
            extents = tuple(self._node.block_status(request.offset, request.length, want_zero=False))
            for part in parts_of(extents):
                if part.zero:
                    yield framing.hole(request.cookie, request.offset, part.offset, part.length)
                    continue
                for offset in range(part.offset, part.end, PIECE):
                    yield from self._data(request, offset, min(PIECE, part.end - offset))
        yield self._done(request)

    def _data(self, request: Request, offset: int, length: int) -> Iterator[bytes]:
        data = self._node.pread(offset, length)
        yield self._framing.data_header(request.cookie, request.offset, offset, length)
        yield data

    def _block_status(self, request: Request, payload: Iterable[Buffer]) -> Iterator[bytes]:
        framing = self._framing
        if not isinstance(framing, StructuredReplies) or not self._contexts:
            raise Refused(Errno.EINVAL, "no metadata context was negotiated for this export")
        wanted: Iterable[int] = range(len(self._contexts))
        if framing.extended and request.flags & CommandFlag.PAYLOAD_LEN:
            request, wanted = self._with_payload(request, payload)
        self._check(request, CommandFlag.REQ_ONE)
        if not request.length:
            raise Refused(Errno.EINVAL, "a block status of 0 bytes was asked for")
        limit = 1 if request.flags & CommandFlag.REQ_ONE else nbd.MAX_STATUS_DESCRIPTORS
        for number in wanted:
            with _ONE_AT_A_TIME:
                descriptors = self._contexts[number].descriptors(self._node, request.offset, request.length, limit)
                chunk = framing.block_status(request.cookie, request.offset, number, descriptors)
            yield chunk
        yield self._done(request)

    def _with_payload(self, request: Request, payload: Iterable[Buffer]) -> tuple[Request, Iterable[int]]:
        """What a block status with a payload asks: the request as it would be without, and the ids of the contexts."""
        if request.length > 8 + 4 * len(self._contexts):
            raise Refused(Errno.EINVAL, "more metadata contexts were asked about than were negotiated")
        try:
            asked = nbd.BlockStatusPayload.parse(b"".join(map(bytes, payload)))
        except ConstructError:
            raise Refused(Errno.EINVAL, "a block status has a payload of 8 bytes and 4 for each context") from None
        ids = set(asked.context_ids)
        if not ids or len(ids) < len(asked.context_ids) or max(ids) >= len(self._contexts):
            raise Refused(Errno.EINVAL, "the payload names no context, one twice, or one that was not negotiated")
        flags = request.flags & ~int(CommandFlag.PAYLOAD_LEN)
        return request._replace(flags=flags, length=asked.effect_length), asked.context_ids

    def _cache(self, request: Request, payload: Iterable[Buffer]) -> Iterator[bytes]:
        self._check(request, 0)
        extents = self._node.block_status(request.offset, request.length, want_zero=False)
        fetch_ahead(islice(extents, MAX_CACHED_EXTENTS))
        yield self._done(request)

    def _flush(self, request: Request, payload: Iterable[Buffer]) -> Iterator[bytes]:
        self._check(request, 0)
        if request.offset or request.length:
            raise Refused(Errno.EINVAL, "a flush has no offset and no length")
        self._node.flush()
        yield self._done(request)

    def _write(self, request: Request, payload: Iterable[Buffer]) -> Iterator[bytes]:
        self._check_write(request, CommandFlag.PAYLOAD_LEN if self._framing.extended else 0)
        offset = request.offset
        for piece in payload:
            self._node.pwritev(offset, [piece])
            offset += len(piece)
        yield self._written(request)

    def _write_zeroes(self, request: Request, payload: Iterable[Buffer]) -> Iterator[bytes]:
        self._check_write(request, CommandFlag.NO_HOLE | CommandFlag.FAST_ZERO)
        may_unmap = not request.flags & CommandFlag.NO_HOLE
        no_fallback = bool(request.flags & CommandFlag.FAST_ZERO)
        self._node.pwrite_zeroes(request.offset, request.length, may_unmap=may_unmap, no_fallback=no_fallback)
        yield self._written(request)

    def _trim(self, request: Request, payload: Iterable[Buffer]) -> Iterator[bytes]:
        if not self._may_trim:
            raise _read_only()
        self._check(request, 0)
        self._node.pdiscard(request.offset, request.length)
        yield self._written(request)

    def _written(self, request: Request) -> bytes:
        if request.flags & CommandFlag.FUA:
            self._node.flush()
        return self._done(request)

    def _disconnect(self, request: Request, payload: Iterable[Buffer]) -> Iterator[bytes]:
        yield from ()

    _HANDLERS: dict[int, Callable[[Answers, Request, Iterable[Buffer]], Iterator[bytes]]] = {
        Command.READ: _read,
        Command.WRITE: _write,
        Command.DISC: _disconnect,
        Command.FLUSH: _flush,
        Command.TRIM: _trim,
        Command.CACHE: _cache,
        Command.WRITE_ZEROES: _write_zeroes,
        Command.BLOCK_STATUS: _block_status,
    }

    def _check(self, request: Request, allowed_flags: int) -> None:
        if not self._node.read_only:
            allowed_flags |= CommandFlag.FUA  # which some clients set on anything; a server that offers it accepts that
        if request.flags & ~int(allowed_flags):
            raise Refused(Errno.EINVAL, f"command {request.type} does not go with flags {request.flags:#x}")
        self._node.check_range(request.offset, request.length)

    def _check_write(self, request: Request, allowed_flags: int) -> None:
        if self._node.read_only:
            raise NotSupported("this can be trimmed, not written") if self._may_trim else _read_only()
        try:
            self._check(request, allowed_flags)
        except OutOfRange as error:
            raise Refused(Errno.ENOSPC, str(error)) from error


def _read_only() -> ReadOnly:
    return ReadOnly("this export is read-only: it cannot be written")


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


def _errno_of(error: Exception) -> Errno:
    if isinstance(error, Refused):
        return error.error
    return next((number for kind, number in _ERRNO.items() if isinstance(error, kind)), Errno.EIO)


_ERRNO = {
    OutOfRange: Errno.EINVAL,
    ReadOnly: Errno.EPERM,
    NoSpace: Errno.ENOSPC,
    NotSupported: Errno.ENOTSUP,
    AccessDenied: Errno.EINVAL,  # NBD has no EACCES; this is how QEMU says it
}
