"""Requests and replies: the plain way without a socket, the fast way on one, and both say the same."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from formats import nbd
from formats.nbd import Command, CommandFlag, Errno, OptionType, ReplyChunkType, State
from qcow2snap.block.node import BlockNode, Extent, NBDError, Qcow2SnapError, Status
from qcow2snap.nbd import connection as fast
from qcow2snap.nbd import contexts
from qcow2snap.nbd.contexts import ALLOCATION
from qcow2snap.nbd.export import Export
from qcow2snap.nbd.negotiation import Agreement
from qcow2snap.nbd.transmission import Answers, Request, Requests, parts_of
from tests.nbd.support import DATA, NewNode, PatchworkNode, ZeroNode, connected, exports
from tests.nbd.test_negotiation import ask, meta


class Answer(NamedTuple):
    """What a client makes of the reply to one request."""

    error: int
    data: bytes | None = None
    status: tuple[tuple[int, int], ...] = ()
    message: bytes = b""
    chunks: tuple[int, ...] = ()


Receive = Callable[[int], bytes]


def understand(receive: Receive, request: Request, *, structured: bool) -> Answer:
    """Receive the reply to one request, and hold the server to every MUST of it."""
    head = receive(nbd.SIMPLE_REPLY.size)
    magic, error, cookie = nbd.SIMPLE_REPLY.unpack(head)
    if magic == nbd.NBD_SIMPLE_REPLY_MAGIC:
        assert cookie == request.cookie
        assert not (structured and request.type == Command.READ)
        data = receive(request.length) if request.type == Command.READ and not error else None
        return Answer(error, data)
    assert structured
    head += receive(4)
    data = bytearray(request.length if request.type == Command.READ and request.length <= nbd.MAX_PAYLOAD else 0)
    covered, status, chunks = [], [], []
    error, message = 0, b""
    while True:
        magic, flags, kind, cookie, length = nbd.STRUCTURED_REPLY_CHUNK.unpack(head)
        assert (magic, cookie) == (nbd.NBD_STRUCTURED_REPLY_MAGIC, request.cookie)
        payload = receive(length)
        chunks.append(kind)
        if kind in (ReplyChunkType.OFFSET_DATA, ReplyChunkType.OFFSET_HOLE):
            offset = struct.unpack_from(">Q", payload)[0] - request.offset
            size = length - 8 if kind == ReplyChunkType.OFFSET_DATA else struct.unpack(">I", payload[8:])[0]
            assert size > 0
            assert 0 <= offset <= offset + size <= request.length
            assert all(offset + size <= low or high <= offset for low, high in covered)
            covered.append((offset, offset + size))
            if kind == ReplyChunkType.OFFSET_DATA:
                data[offset : offset + size] = payload[8:]
        elif kind == ReplyChunkType.BLOCK_STATUS:
            assert request.type == Command.BLOCK_STATUS
            status = list(struct.iter_unpack(">II", payload[4:]))
        elif kind == ReplyChunkType.ERROR:
            assert not error
            error, size = struct.unpack_from(">IH", payload)
            message = payload[6:]
            message.decode()
            assert error
            assert size == len(message) <= nbd.MAX_STRING
        else:
            assert (kind, flags, length) == (ReplyChunkType.NONE, 1, 0)
        if flags:
            break
        head = receive(nbd.STRUCTURED_REPLY_CHUNK.size)
    if request.flags & CommandFlag.DF:
        assert len(covered) <= 1
    if request.type == Command.READ and not error:
        assert sum(high - low for low, high in covered) == request.length
        return Answer(0, bytes(data), chunks=tuple(chunks))
    return Answer(error, None, tuple(status), message, tuple(chunks))


def slowly(node: BlockNode, requests: Sequence[Request], *, structured: bool) -> list[Answer]:
    answers = Answers(Agreement(Export("", lambda: node), node, structured, (ALLOCATION,) if structured else ()))
    found = []
    for request in requests:
        data = memoryview(b"".join(answers.answer(request)))

        def receive(length: int) -> bytes:
            nonlocal data
            assert length <= len(data)
            taken, data = bytes(data[:length]), data[length:]
            return taken

        found.append(understand(receive, request, structured=structured))
        assert not data
    return found


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


def handshake(sock: socket.socket, *, structured: bool, name: bytes = b"") -> Receive:
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
    if structured:
        option(OptionType.STRUCTURED_REPLY)
        option(OptionType.SET_META_CONTEXT, meta(b"base:allocation", name=name))
    option(OptionType.GO, ask(name))
    return receive


def packed(request: Request) -> bytes:
    return nbd.REQUEST.pack(nbd.NBD_REQUEST_MAGIC, *request)


def quickly(node: BlockNode, requests: Sequence[Request], *, structured: bool) -> list[Answer]:
    with connected(exports(default=node)) as sock:
        receive = handshake(sock, structured=structured)
        sock.sendall(b"".join(map(packed, requests)))
        found = [understand(receive, request, structured=structured) for request in requests]
        sock.sendall(packed(Request(0, Command.DISC, 0, 0, 0)))
        assert sock.recv(1) == b""
        return found


WAYS = pytest.mark.parametrize("way", [slowly, quickly])
BOTH = pytest.mark.parametrize("structured", [False, True])
Way = Callable[..., list[Answer]]


def read(offset: int, length: int, flags: int = 0, cookie: int = 7) -> Request:
    return Request(flags, Command.READ, cookie, offset, length)


@WAYS
@BOTH
def test_a_read_gives_the_bytes(new_node: NewNode, way: Way, structured: bool) -> None:
    node = new_node(("file", 1 << 20), ("zero", 1 << 20), ("memory", 1 << 20), ("file", 12345))
    requests = [read(0, node.size), read(1, 1), read(node.size - 1, 1), read(1 << 20, 4096), read((1 << 20) - 7, 70000)]
    for request, answer in zip(requests, way(node, requests, structured=structured), strict=True):
        assert answer[:2] == (0, node.content[request.offset : request.offset + request.length])


@WAYS
def test_zeros_are_sent_as_holes(new_node: NewNode, way: Way) -> None:
    node = new_node(("file", 1 << 16), ("zero", 1 << 20), ("file", 1 << 16))
    [whole, hole] = way(node, [read(0, node.size), read(1 << 17, 1 << 16)], structured=True)
    assert whole.chunks == (1, 2, 1, 0)
    assert hole.chunks == (2, 0)


@WAYS
def test_do_not_fragment_gives_one_chunk_of_data(new_node: NewNode, way: Way) -> None:
    node = new_node(("file", 1 << 16), ("zero", 1 << 20), ("memory", 1 << 20), ("file", 1 << 16))
    [answer] = way(node, [read(0, node.size, CommandFlag.DF)], structured=True)
    assert answer.data == node.content
    assert answer.chunks.count(ReplyChunkType.OFFSET_DATA) == 1
    assert ReplyChunkType.OFFSET_HOLE not in answer.chunks


@WAYS
@BOTH
@pytest.mark.parametrize(
    ("request_", "error"),
    [
        (read(1 << 20, 1), Errno.EINVAL),
        (read((1 << 20) - 1, 2), Errno.EINVAL),
        (read((1 << 64) - 1, 1), Errno.EINVAL),
        (read((1 << 64) - 1, 0xFFFFFFFF), Errno.EINVAL),
        (read(0, 1, CommandFlag.FUA), Errno.EINVAL),
        (read(0, 1, 1 << 15), Errno.EINVAL),
        (Request(0, Command.TRIM, 7, 0, 4096), Errno.EPERM),
        (Request(0, Command.WRITE_ZEROES, 7, 0, 4096), Errno.EPERM),
        (Request(0, Command.FLUSH, 7, 0, 0), 0),
        (Request(0, Command.FLUSH, 7, 1, 0), Errno.EINVAL),
        (Request(0, Command.CACHE, 7, 0, 1 << 20), 0),
        (Request(0, Command.CACHE, 7, 0, (1 << 20) + 1), Errno.EINVAL),
        (Request(1, Command.CACHE, 7, 0, 1), Errno.EINVAL),
        (Request(0, Command.RESIZE, 7, 0, 1), Errno.EINVAL),
        (Request(0, 0xFFFF, 7, 0, 1), Errno.EINVAL),
        (Request(0, Command.BLOCK_STATUS, 7, 0, (1 << 20) + 1), Errno.EINVAL),
        (Request(0, Command.BLOCK_STATUS, 7, 0, 0), Errno.EINVAL),
        (Request(CommandFlag.DF, Command.BLOCK_STATUS, 7, 0, 1), Errno.EINVAL),
    ],
)
def test_each_command_has_its_answer(
    new_node: NewNode, way: Way, structured: bool, request_: Request, error: int
) -> None:
    node = new_node(("file", 1 << 19), ("zero", 1 << 19))
    [answer, after] = way(node, [request_, read(0, 10)], structured=structured)
    assert answer.error == error
    if error and structured:
        assert len(answer.message) > 10
    assert after.data == node.content[:10]


@WAYS
@BOTH
def test_a_read_of_nothing_succeeds(new_node: NewNode, way: Way, structured: bool) -> None:
    [answer] = way(new_node(("file", 4096)), [read(4096, 0)], structured=structured)
    assert answer[:2] == (0, b"")


@WAYS
def test_too_long_a_read_is_refused_and_the_longest_is_served(way: Way) -> None:
    node = ZeroNode(1 << 40)
    longest = nbd.MAX_PAYLOAD
    assert [a.error for a in way(node, [read(0, longest), read(0, longest + 1)], structured=False)] == [0, 22]
    assert [a.error for a in way(node, [read(5, longest), read(0, 0xFFFFFFFF)], structured=True)] == [0, 75]
    [df] = way(node, [read(0, longest, CommandFlag.DF)], structured=True)
    assert df.data == bytes(longest)


@WAYS
@pytest.mark.parametrize("length", [4096, 1 << 16, 1 << 20])
def test_damage_is_an_error_with_its_reason(new_node: NewNode, way: Way, length: int) -> None:
    node = new_node(("file", 1 << 20), ("bad", 4096), ("file", 1 << 20))
    at = (1 << 20) - length // 2
    for flags in (0, CommandFlag.DF):
        [answer, after] = way(node, [read(at, length, flags), read(0, 5)], structured=True)
        assert answer.error == Errno.EIO
        assert b"damaged" in answer.message
        assert after.data == node.content[:5]


@WAYS
def test_damage_in_a_simple_reply_is_an_error_before_any_data(new_node: NewNode, way: Way) -> None:
    node = new_node(("memory", 1 << 17), ("bad", 4096), ("memory", 1 << 17))
    [small, large, after] = way(node, [read(1 << 17, 10), read(0, node.size), read(0, 5)], structured=False)
    assert (small.error, large.error) == (Errno.EIO, Errno.EIO)
    assert after.data == node.content[:5]


def test_damage_behind_a_simple_reply_that_has_left_ends_the_connection(new_node: NewNode) -> None:
    node = new_node(("file", 1 << 20), ("bad", 4096))
    with connected(exports(default=node)) as sock:
        receive = handshake(sock, structured=False)
        sock.sendall(packed(read(0, node.size)) + packed(read(0, 1)))
        assert receive(16)[4:8] == bytes(4)
        with pytest.raises(EOFError):
            receive(node.size)


def test_a_file_that_ends_early_is_read_through_the_node(new_node: NewNode) -> None:
    node = new_node(("file", 1 << 20), ("file", 1 << 20))
    os.truncate(node.filename, 512 + 100_001)  # the node still knows all the bytes
    for structured in (False, True):
        [answer] = quickly(node, [read(0, node.size)], structured=structured)
        assert answer.data == node.content


def test_bytes_of_a_file_that_others_may_write_go_by_copy(new_node: NewNode, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> int:
        raise AssertionError("sendfile")

    node = new_node(("file", 1 << 20), stable=False)
    monkeypatch.setattr(fast.os, "sendfile", refuse)
    [answer] = quickly(node, [read(0, node.size)], structured=True)
    assert answer.data == node.content
    assert answer.chunks == (1, 1, 1, 1, 0)


# Block status.


def status(offset: int, length: int, flags: int = 0) -> Request:
    return Request(flags, Command.BLOCK_STATUS, 7, offset, length)


@WAYS
def test_block_status_tells_holes_from_data(new_node: NewNode, way: Way) -> None:
    node = new_node(("file", 4096), ("memory", 4096), ("zero", 1 << 20), ("zero", 512), ("file", 4096))
    hole = State.HOLE | State.ZERO
    [whole, part, one] = way(node, [status(0, node.size), status(1, 9000), status(1, 9000, 8)], structured=True)
    assert whole.status == ((8192, 0), ((1 << 20) + 512, hole), (4096, 0))
    assert part.status == ((8191, 0), (809, hole))
    assert one.status == ((8191, 0),)


def test_allocated_zeros_are_zero_and_no_hole(monkeypatch: pytest.MonkeyPatch) -> None:
    node = ZeroNode(1 << 20)
    monkeypatch.setattr(node, "block_status", lambda o, n: iter([Extent(o, n, Status.DATA | Status.ZERO)]))
    [answer] = slowly(node, [status(0, 1 << 20)], structured=True)
    assert answer.status == ((1 << 20, State.ZERO),)


@WAYS
def test_block_status_of_four_gigabytes_fits_its_field(way: Way) -> None:
    node = ZeroNode((1 << 40) + 123)
    last = 0xFFFFFFFF
    [answer, tail] = way(node, [status(0, last), status((1 << 40) - 5, 128)], structured=True)
    assert answer.status == ((last, 3),)
    assert tail.status == ((128, 3),)


@WAYS
def test_block_status_without_a_context_is_refused(way: Way) -> None:
    [answer] = way(ZeroNode(4096), [status(0, 4096)], structured=False)
    assert answer.error == Errno.EINVAL


def test_the_number_of_descriptors_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    def alternating(offset: int, length: int) -> Iterator[Extent]:
        for start in range(offset, offset + length, 512):
            yield Extent(start, 512, DATA if start & 512 else Status.ZERO)

    node = ZeroNode(1 << 40)
    monkeypatch.setattr(node, "block_status", alternating)
    [answer] = slowly(node, [status(0, 1 << 31)], structured=True)
    assert len(answer.status) == contexts.MAX_DESCRIPTORS
    monkeypatch.setattr(node, "block_status", lambda o, n: (Extent(o + i, 1, DATA) for i in range(n)))
    [answer] = slowly(node, [status(0, 1 << 31)], structured=True)
    assert answer.status == ((contexts.MAX_EXTENTS, 0),)


# The two ways, on anything.

KINDS = st.sampled_from(["file", "file", "memory", "zero", "bad"])
RUNS = st.lists(st.tuples(KINDS, st.sampled_from([1, 512, 4095, 4096, 32768, 65536, 300_000])), min_size=1, max_size=8)


PICKS = st.lists(st.tuples(*[st.floats(0, 1)] * 2, st.booleans()), max_size=9)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    runs=RUNS, structured=st.booleans(), picks=st.lists(st.tuples(*[st.floats(0, 1)] * 2, st.booleans()), max_size=9)
)
def test_the_fast_way_and_the_plain_way_say_the_same(
    tmp_path: Path, runs: list[tuple[str, int]], structured: bool, picks: list[tuple[float, float, bool]]
) -> None:
    if not structured:
        runs = [run for run in runs if run[0] != "bad"] or [("file", 1)]  # a simple reply may be cut off
    node = PatchworkNode(tmp_path / "node", runs)
    requests = []
    for cookie, (start, size, whole) in enumerate(picks):
        offset = int(start * (node.size - 1))
        length = max(1, int(size * (node.size - offset)))
        requests.append(read(offset, length, CommandFlag.DF if whole and structured else 0, cookie))
    slow, quick = slowly(node, requests, structured=structured), quickly(node, requests, structured=structured)
    for request, one, other in zip(requests, slow, quick, strict=True):
        damaged = any(low < request.offset + request.length and request.offset < high for low, high in node.bad)
        assert one[:2] == other[:2]
        assert one.error == (Errno.EIO if damaged else 0)
        if not damaged:
            assert one.data == node.content[request.offset : request.offset + request.length]
    node.close()


@given(RUNS, st.one_of(st.none(), st.integers(1, 100_000)))
def test_parts_cover_a_read_without_gap_or_overlap(runs: list[tuple[str, int]], alone: int | None) -> None:
    file = type("File", (), {"filename": "f", "stable": True, "fileno": lambda self: 0})()
    offset, extents = 99, []
    for kind, length in runs:
        status = Status.ZERO if kind == "zero" else DATA
        extents.append(Extent(offset, length, status, 0, file if kind == "file" else None, offset))
        offset += length
    at = 99
    for part in parts_of(tuple(extents), alone):
        assert (part.offset, part.length > 0) == (at, True)
        inside = [e for e in extents if e.offset < part.end and part.offset < e.end]
        assert not part.zero or all(not extent.must_read for extent in inside)
        assert part.zero or part.extent is None or [part.extent] == inside
        at = part.end
    assert at == offset


# Broken clients.


@settings(max_examples=2000, deadline=None)
@given(st.lists(st.one_of(st.binary(max_size=60), st.builds(packed, st.builds(Request, *[st.integers(0, 9)] * 5)))))
def test_any_bytes_are_requests_or_end_it(data: list[bytes]) -> None:
    requests, answers = Requests(), Answers(Agreement(Export("", lambda: ZeroNode(9)), ZeroNode(9), True))
    try:
        for piece in data:
            for request in requests.receive(piece):
                b"".join(answers.answer(request))
    except NBDError:
        pass


def test_a_write_to_a_read_only_export_is_refused_and_its_data_passed_over(new_node: NewNode) -> None:
    node = new_node(("file", 4096))
    data = packed(read(0, 1))  # looks like a request, and is none
    write = Request(0, Command.WRITE, 3, 0, len(data))
    assert list(Requests().receive(packed(write) + data)) == [write]
    with connected(exports(default=node)) as sock:
        receive = handshake(sock, structured=True)
        for size in (len(data), 1 << 20):
            write = Request(0, Command.WRITE, 3, 0, size)
            sock.sendall(packed(write) + data.ljust(size, b"x") + packed(read(0, 9)))
            assert understand(receive, write, structured=True).error == Errno.EPERM
            assert understand(receive, read(0, 9), structured=True).data == node.content[:9]


@pytest.mark.parametrize(
    "attack",
    [
        bytes(28),
        b"GET / HTTP/1.1\r\nHost: nowhere\r\n\r\n",
        packed(Request(0, Command.WRITE, 3, 0, 0xFFFFFFFF)),
        packed(read(0, 1))[:20],
    ],
)
def test_what_is_no_request_ends_the_connection_after_what_was_one(new_node: NewNode, attack: bytes) -> None:
    node = new_node(("file", 4096))
    with connected(exports(default=node)) as sock:
        receive = handshake(sock, structured=True)
        sock.sendall(packed(read(0, 9)) + attack)
        sock.shutdown(socket.SHUT_WR)
        assert understand(receive, read(0, 9), structured=True).data == node.content[:9]
        assert sock.recv(1) == b""


def test_requests_before_a_disconnect_are_answered(new_node: NewNode) -> None:
    node = new_node(("file", 1 << 20))
    with connected(exports(default=node)) as sock:
        receive = handshake(sock, structured=True)
        disconnect = packed(Request(0, Command.DISC, 0, 0, 0))
        sock.sendall(packed(read(0, 9)) * 100 + disconnect + packed(read(0, 9)))
        for _ in range(100):
            assert understand(receive, read(0, 9), structured=True).data == node.content[:9]
        assert sock.recv(1) == b""


def test_requests_may_arrive_in_any_pieces(new_node: NewNode) -> None:
    node = new_node(("file", 1 << 20))
    with connected(exports(default=node)) as sock:
        receive = handshake(sock, structured=True)
        for byte in packed(read(5, 9)):
            sock.sendall(bytes([byte]))
        assert understand(receive, read(5, 9), structured=True).data == node.content[5:14]


def test_a_fault_of_ours_ends_one_connection_and_is_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    node = ZeroNode(4096)
    monkeypatch.setattr(node, "preadv", lambda offset, buffers: 1 / 0)
    with connected(exports(default=node)) as sock:
        handshake(sock, structured=True)
        sock.sendall(packed(read(0, 9)))
        assert sock.recv(1) == b""
    assert "fault of this server" in caplog.text
    assert not isinstance(ZeroDivisionError(), Qcow2SnapError)
