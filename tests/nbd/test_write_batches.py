"""WRITEs that arrive together: done in few calls of the node, in the client's order, each with its own answer."""

from __future__ import annotations

import random
import struct
import threading
import time
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from formats.nbd import Command, CommandFlag, Errno, ReplyChunkType
from qcow2snap.block.node import BlockNode, Buffer, Extent, FileError, NoSpace, Status
from qcow2snap.nbd.channel import RECEIVE_WRITES
from qcow2snap.nbd.framing import STRUCTURED_REPLIES, Framing
from qcow2snap.nbd.transmission import Request
from tests.nbd.support import connected, exports
from tests.nbd.test_transmission import EACH, quickly, slowly
from tests.nbd.wire import Answer, handshake, packed, read

SIZE = 4 << 20
FUA = CommandFlag.FUA


class Disk(BlockNode):
    """Keeps what is written, and by which calls; writes that touch the byte at `bad` fail, and so may flushes."""

    read_only = False

    def __init__(self, bad: int = -1, *, flush_fails: bool = False) -> None:
        self.size = SIZE
        self.content = bytearray(SIZE)
        self.calls: list[tuple[int, int]] = []
        self.flushes = 0
        self._bad, self._flush_fails = bad, flush_fails

    def preadv(self, offset: int, buffers: Sequence[Buffer]) -> None:
        for buffer in buffers:
            buffer[:] = self.content[offset : offset + len(buffer)]
            offset += len(buffer)

    def preadv_nowait(self, offset: int, buffers: Sequence[Buffer]) -> bool:
        self.preadv(offset, buffers)
        return True

    def pwritev(self, offset: int, buffers: Sequence[Buffer]) -> None:
        data = b"".join(buffers)
        self.calls.append((offset, len(data)))
        if offset <= self._bad < offset + len(data):
            raise NoSpace("full")
        self.content[offset : offset + len(data)] = data

    def flush(self) -> None:
        self.flushes += 1
        if self._flush_fails:
            raise FileError("lost")

    def block_status(self, offset: int, length: int, *, want_zero: bool = True) -> Iterator[Extent]:
        yield Extent(offset, length, Status.DATA)


def write(offset: int, length: int, framing: Framing, flags: int = 0) -> Request:
    return Request(flags | (CommandFlag.PAYLOAD_LEN if framing.extended else 0), Command.WRITE, 7, offset, length)


def errors(answers: list[Answer]) -> list[int]:
    return [answer.error for answer in answers]


@EACH
def test_writes_that_follow_each_other_are_one(framing: Framing) -> None:
    disk = Disk()
    requests = [write(n * 512, 512, framing) for n in range(100)] + [write(0, 512, framing), write(512, 1, framing)]
    answers = quickly(disk, requests, framing, [bytes([n]) * request.length for n, request in enumerate(requests)])
    assert errors(answers) == [0] * len(requests)
    assert disk.calls == [(0, 51200), (0, 513)]
    expected = b"".join(bytes([n]) * 512 for n in range(100))
    assert disk.content[:51200] == bytes([100]) * 512 + bytes([101]) + expected[513:]


@EACH
def test_each_write_has_its_own_error(framing: Framing) -> None:
    """Also where it was one with others, and then those have done what they say."""
    disk = Disk(bad=3 * 512)
    requests = [write(n * 512, 512, framing, FUA if n == 4 else 0) for n in range(6)]
    answers = quickly(disk, requests, framing, [b"x" * 512] * 6)
    assert errors(answers) == [0, 0, 0, Errno.ENOSPC, 0, 0]
    assert disk.content[: 6 * 512] == b"x" * (3 * 512) + bytes(512) + b"x" * (2 * 512)
    assert disk.flushes == 1


@EACH
def test_one_flush_makes_all_durable_that_arrived(framing: Framing) -> None:
    for flush_fails in (False, True):
        disk = Disk(flush_fails=flush_fails)
        requests = [write(n * 8192, 512, framing, FUA if n % 2 else 0) for n in range(20)]
        answers = quickly(disk, requests, framing, [b"x" * 512] * 20)
        assert errors(answers) == [Errno.EIO * (flush_fails and n % 2) for n in range(20)]
        assert disk.flushes == 1


@EACH
def test_what_comes_between_writes_sees_those_before_it(framing: Framing) -> None:
    disk = Disk()
    requests = [
        write(0, 512, framing), read(0, 512), write(512, 512, framing), Request(0, Command.FLUSH, 7, 0, 0),
        write(0, 512, framing), read(0, 1024),
    ]  # fmt: skip
    payloads = [b"a" * 512, b"", b"b" * 512, b"", b"c" * 512, b""]
    answers = quickly(disk, requests, framing, payloads)
    assert answers[1].data == b"a" * 512
    assert answers[5].data == b"c" * 512 + b"b" * 512
    assert disk.calls == [(0, 512), (512, 512), (0, 512)]


SIZES = st.sampled_from(
    [1, 511, 4096, 65536, RECEIVE_WRITES - 29, RECEIVE_WRITES - 1, RECEIVE_WRITES, RECEIVE_WRITES + 1]
)
REQUEST = st.tuples(st.integers(0, SIZE // 4096 - 1), SIZES | st.integers(1, 5000), st.booleans())


@settings(max_examples=30, deadline=None)
@given(st.lists(REQUEST, min_size=1, max_size=12))
def test_however_they_come_the_disk_is_that_of_the_plain_way(written: list[tuple[int, int, bool]]) -> None:
    """Of all sizes about those of the buffer, following each other, overlapping, in the order of the client."""
    requests, payloads, at = [], [], 0
    for number, (block, length, follows) in enumerate(written):
        offset = at if follows else block * 4096
        length = max(0, min(length, SIZE - offset))
        requests.append(write(offset, length, STRUCTURED_REPLIES))
        payloads.append(random.Random(number).randbytes(length))
        at = offset + length
    fast, plain = Disk(), Disk()
    assert errors(quickly(fast, requests, STRUCTURED_REPLIES, payloads)) == [0] * len(requests)
    assert errors(slowly(plain, requests, STRUCTURED_REPLIES, payloads)) == [0] * len(requests)
    assert fast.content == plain.content


@pytest.mark.parametrize("size", [1, RECEIVE_WRITES, RECEIVE_WRITES + 1, 3 << 20])
@EACH
def test_a_write_of_any_size_is_whole(framing: Framing, size: int) -> None:
    disk, data = Disk(), random.Random(size).randbytes(size)
    assert errors(quickly(disk, [write(7, size, framing), read(7, 1)], framing, [data])) == [0, 0]
    assert disk.content[7 : 7 + size] == data


def test_who_goes_on_writing_is_answered_what_was_put_aside() -> None:
    """A read that took waiting does not wait for the end of what arrives, from a client faster than the disk."""
    disk, framing = Slow(), STRUCTURED_REPLIES
    size = 5000  # so that the end of what was received is in the middle of one
    with connected(exports(default=disk)) as sock:
        receive = handshake(sock, framing)
        before, after = (packed(write(0, size, framing)._replace(cookie=n), framing) + bytes(size) for n in (1, 2))
        everything = before * 200 + packed(read(0, 7), framing) + after * 600
        writer = threading.Thread(target=sock.sendall, args=[everything], daemon=True)
        writer.start()
        later = 0
        for _ in range(801):
            chunk = struct.unpack(">IHHQI", receive(20))
            receive(chunk[4])
            if chunk[2] == ReplyChunkType.OFFSET_DATA:
                assert later < 100, "so many that came later were done before it"
                break
            later += chunk[3] == 2
        for _ in range(600 - later):
            receive(20)
        writer.join(20)
        sock.sendall(packed(Request(0, Command.DISC, 0, 0, 0), framing))


class Slow(Disk):
    """Writes take their time, and reads cannot be done without."""

    def pwritev(self, offset: int, buffers: Sequence[Buffer]) -> None:
        time.sleep(0.001)
        super().pwritev(offset, buffers)

    def preadv_nowait(self, offset: int, buffers: Sequence[Buffer]) -> bool:
        return False
