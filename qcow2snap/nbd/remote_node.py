"""A remote NBD export as a node: connections that are shared by threads, and made again when they were lost.

What is said on a connection is the client's. The node is here and not with the other drivers because those know no
protocol (QEMU block/nbd.c); what is built on nodes takes it like any other.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TypeVar

from formats.nbd import CommandFlag, Errno, State, TransmissionFlag
from qcow2snap.block.buffers import Cursor
from qcow2snap.block.node import (
    BitmapNotFound,
    BlockNode,
    Buffer,
    Extent,
    NBDError,
    NoSpace,
    NotSupported,
    Qcow2SnapError,
    ReadOnly,
    Status,
    UnsupportedFeature,
    merged,
)
from qcow2snap.nbd.client import ALLOCATION, Client, ReplyError
from qcow2snap.nbd.contexts import DIRTY
from qcow2snap.nbd.uri import URI, parse

T = TypeVar("T")

ZERO_SIZE = 1 << 20  # bytes of zeros that are written at once to a server that has no command for them


class RemoteNode(BlockNode):
    """An export of an NBD server.

    size     the export's when it was opened; one that has another size when it is connected to again is refused
    threads  any; as many requests at a time as there are connections, which is one where the server allows no more
    errors   NBDError if the server is gone or does not answer in time; NoSpace, ReadOnly, NotSupported if it says so
    lost     if a connection is lost, reads are tried once more with a new one. But a server that died may have taken
             along what was written and not flushed, and one that was only slow may write later what was under way. So
             if there was any of that, nothing can be read or written any more
    owns     its connections
    """

    def __init__(
        self,
        where: URI | str,
        *,
        writable: bool = False,
        timeout: float = 60.0,
        reconnect_delay: float = 0.0,
        max_connections: int = 4,
        contexts: Sequence[str] = (),
    ) -> None:
        """`timeout`: seconds without a sign of life of the server. `reconnect_delay`: seconds to look for it again.

        `contexts`: metadata contexts that dirty() will be asked for. The server has none of one: BitmapNotFound.
        """
        self.filename = str(where)
        self._uri = parse(where) if isinstance(where, str) else where
        self._timeout = timeout
        self._reconnect_delay = reconnect_delay
        self._changed = threading.Condition()
        self._idle: list[Client] = []
        self._connections = 1  # idle or in use
        self._written = 0  # writes that are done
        self._flushed = 0  # how many of them are durable
        self._lost = ""  # why nothing can be read or written any more
        self._closed = False
        self._contexts = tuple(contexts)
        self.size = -1
        client = self._connect()
        self._idle.append(client)
        self.size = client.size
        self._flags = client.export.flags
        self.read_only = not writable
        self._most = max_connections if self._flags & TransmissionFlag.CAN_MULTI_CONN else 1
        for context in self._contexts:
            if context not in client.contexts:
                client.close()
                raise BitmapNotFound(f"{self.filename}: has no metadata context {context}")
        if writable and self._flags & TransmissionFlag.READ_ONLY:
            client.close()
            raise ReadOnly(f"{self.filename}: is exported read-only")
        if writable and (client.export.minimum_block_size or 1) > 1:
            client.close()
            raise UnsupportedFeature(
                f"{self.filename}: takes only whole blocks of {client.export.minimum_block_size} bytes"
            )

    def preadv(self, offset: int, buffers: Sequence[Buffer]) -> None:
        cursor = Cursor(buffers)
        self.check_range(offset, cursor.remaining)
        data = self._ask(lambda client: client.pread(offset, cursor.remaining))
        cursor.copy(memoryview(data))

    def block_status(self, offset: int, length: int, *, want_zero: bool = True) -> Iterator[Extent]:
        self.check_range(offset, length)
        return merged(self._extents(offset, offset + length))

    def _extents(self, offset: int, end: int) -> Iterator[Extent]:
        while offset < end:
            for length, flags in self._ask(partial(_status, offset=offset, length=end - offset)):
                run = min(length, end - offset)
                status = Status.ZERO if flags & State.ZERO else Status.DATA
                if run:
                    yield Extent(offset, run, status | Status.ALLOCATED)
                offset += run

    def is_zero_fast(self, offset: int, length: int) -> bool:
        return False  # to ask takes as long as to read

    def dirty(self, context: str, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """Offset and length of what is dirty in a range, by a context of the kind of qemu:dirty-bitmap: its flag 1."""
        self.check_range(offset, length)
        end = offset + length
        while offset < end:
            ask = partial(Client.block_status, offset=offset, length=end - offset, context=context)
            for run, flags in self._ask(ask):
                if flags & DIRTY and run:
                    yield offset, min(run, end - offset)
                offset += run

    def pwritev(self, offset: int, buffers: Sequence[Buffer]) -> None:
        data = buffers[0] if len(buffers) == 1 else b"".join(buffers)
        self._check_write(offset, len(data))
        self._write(lambda client: client.pwrite(offset, data))

    def pwrite_zeroes(self, offset: int, length: int, *, may_unmap: bool = False, no_fallback: bool = False) -> None:
        self._check_write(offset, length)
        if no_fallback and not self._flags & TransmissionFlag.SEND_FAST_ZERO:
            raise NotSupported(f"{self.filename}: the server does not say whether it makes zeros fast")
        if self._flags & TransmissionFlag.SEND_WRITE_ZEROES:
            flags = 0 if may_unmap else int(CommandFlag.NO_HOLE)
            flags |= int(CommandFlag.FAST_ZERO) if no_fallback else 0
            self._write(lambda client: client.write_zeroes(offset, length, flags=flags))
            return
        for start in range(offset, offset + length, ZERO_SIZE):
            self.pwritev(start, [bytearray(min(ZERO_SIZE, offset + length - start))])

    def pdiscard(self, offset: int, length: int) -> None:
        self._check_write(offset, length)
        if self._flags & TransmissionFlag.SEND_TRIM:
            self._write(lambda client: client.trim(offset, length))

    def flush(self) -> None:
        """Make what was written durable. Of several connections each flushes for all: the server promised that."""
        with self._changed:
            written, is_needed = self._written, self._written > self._flushed
        if is_needed and self._flags & TransmissionFlag.SEND_FLUSH:
            self._ask(Client.flush, again=False)
        with self._changed:
            self._flushed = max(self._flushed, written)

    def close(self) -> None:
        with self._changed:
            self._closed = True
            idle, self._idle = self._idle, []
        for client in idle:
            client.close()

    def _check_write(self, offset: int, length: int) -> None:
        if self.read_only:
            self._refuse_to_write()
        self.check_range(offset, length)

    def _write(self, what: Callable[[Client], None]) -> None:
        self._ask(what, writes=True)
        with self._changed:
            self._written += 1

    def _ask(self, what: Callable[[Client], T], *, writes: bool = False, again: bool = True) -> T:
        """Do something on a connection that nobody else uses. If that is lost, with another one; unless it `writes`."""
        client = self._take()
        try:
            result = what(client)
        except ReplyError as error:
            if client.is_idle:
                self._give_back(client)
            else:
                self._drop(client, error, writes=writes)
            raise self._refusal(error) from error
        except BaseException as error:
            self._drop(client, error, writes=writes)
            if again and not writes and isinstance(error, NBDError):
                return self._ask(what, again=False)
            raise
        self._give_back(client)
        return result

    def _take(self) -> Client:
        with self._changed:
            while not self._idle and self._connections >= self._most and not self._lost and not self._closed:
                self._changed.wait()
            if self._lost:
                raise NBDError(self._lost)
            if self._closed:
                raise NBDError(f"{self.filename}: is closed")
            if self._idle:
                return self._idle.pop()
            self._connections += 1
        try:
            return self._connect_again()
        except BaseException:
            with self._changed:
                self._connections -= 1
                self._changed.notify()
            raise

    def _give_back(self, client: Client) -> None:
        with self._changed:
            if not self._closed:
                self._idle.append(client)
                self._changed.notify()
                return
        client.close()

    def _drop(self, client: Client, error: BaseException, *, writes: bool) -> None:
        with self._changed:
            self._connections -= 1
            if (writes or self._written > self._flushed) and not self._lost:
                self._lost = f"{self.filename}: lost, with writes that were not flushed: {error}"
            # The others have most likely lost theirs as well.
            idle, self._idle = self._idle, []
            self._connections -= len(idle)
            self._changed.notify_all()
        client.abandon()
        for each in idle:
            each.abandon()

    def _connect_again(self) -> Client:
        deadline = time.monotonic() + self._reconnect_delay
        while True:
            try:
                return self._connect()
            except NBDError:
                if self._closed or time.monotonic() >= deadline:
                    raise
            time.sleep(min(0.2, self._reconnect_delay))

    def _connect(self) -> Client:
        client = Client.connect(self._uri, timeout=self._timeout)
        try:
            size = client.go(self._uri.export, (ALLOCATION, *self._contexts)).size
            if self.size not in (-1, size):
                raise NBDError(f"{self.filename}: has {size} bytes now, and had {self.size}")
        except BaseException:
            client.close()
            raise
        return client

    def _refusal(self, error: ReplyError) -> Qcow2SnapError:
        return _REFUSALS.get(error.error, NBDError)(f"{self.filename}: {error}")


_REFUSALS: dict[int, type[Qcow2SnapError]] = {
    Errno.ENOSPC: NoSpace,
    Errno.EPERM: ReadOnly,
    Errno.ENOTSUP: NotSupported,
}


def _status(client: Client, offset: int, length: int) -> list[tuple[int, int]]:
    if ALLOCATION not in client.contexts:
        return [(length, 0)]
    return client.block_status(offset, length)
