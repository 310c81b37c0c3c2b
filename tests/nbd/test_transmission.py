"""Requests and replies: the plain way without a socket, the fast way on one, and both say the same."""

from __future__ import annotations

import io
import os
import socket
import struct
from collections.abc import Callable, Iterator, Sequence
from itertools import zip_longest
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from formats import nbd
from formats.nbd import Command, CommandFlag, Errno, ReplyChunkType, State
from qcow2snap.block.node import BlockNode, Extent, NBDError, Qcow2SnapError, Status
from qcow2snap.nbd import channel, contexts
from qcow2snap.nbd.contexts import ALLOCATION, MetaContext
from qcow2snap.nbd.export import Export
from qcow2snap.nbd.framing import EXTENDED_HEADERS, SIMPLE_REPLIES, STRUCTURED_REPLIES, Framing
from qcow2snap.nbd.negotiation import Agreement
from qcow2snap.nbd.transmission import Answers, Request, Requests, parts_of
from tests.nbd.support import DATA, NewNode, PatchworkNode, ZeroNode, connected, exports
from tests.nbd.wire import Answer, handshake, packed, pushed_back, read, understand


def slowly(
    node: BlockNode, requests: Sequence[Request], framing: Framing, payloads: Sequence[bytes] = ()
) -> list[Answer]:
    answers = Answers(agreement(node, framing))
    arrived = list(Requests(framing).receive(sent(requests, framing, payloads)))
    assert [request for request, _ in arrived] == requests
    found = []
    for request, payload in arrived:
        data = memoryview(b"".join(answers.answer(request, [payload[:5], payload[5:]])))

        def receive(length: int) -> bytes:
            nonlocal data
            assert length <= len(data)
            taken, data = bytes(data[:length]), data[length:]
            return taken

        found.append(understand(receive, request, framing))
        assert not data
    return found


def sent(requests: Sequence[Request], framing: Framing, payloads: Sequence[bytes]) -> bytes:
    pairs = zip_longest(requests, payloads, fillvalue=b"")
    return b"".join(packed(request, framing) + payload for request, payload in pairs)


def agreement(node: BlockNode, framing: Framing) -> Agreement:
    contexts = (ALLOCATION,) if framing.structured else ()
    return Agreement(Export("", lambda: node), node, framing.structured, contexts, framing.extended)


def quickly(
    node: BlockNode, requests: Sequence[Request], framing: Framing, payloads: Sequence[bytes] = ()
) -> list[Answer]:
    """Over a connection, which may answer in any order."""
    by_cookie = {number: request._replace(cookie=number) for number, request in enumerate(requests)}
    found = {}
    with connected(exports(default=node)) as sock:
        receive = handshake(sock, framing)
        sock.sendall(sent(list(by_cookie.values()), framing, payloads))
        while len(found) < len(requests):
            head = receive(16)  # of any kind of reply: its cookie comes last
            cookie = int.from_bytes(head[8:], "big")
            assert cookie not in found
            found[cookie] = understand(pushed_back(head, receive), by_cookie[cookie], framing)
        sock.sendall(packed(Request(0, Command.DISC, 0, 0, 0), framing))
        assert sock.recv(1) == b""
    return [found[cookie] for cookie in by_cookie]


WAYS = pytest.mark.parametrize("way", [slowly, quickly])
FRAMINGS = [SIMPLE_REPLIES, STRUCTURED_REPLIES, EXTENDED_HEADERS]
EACH = pytest.mark.parametrize("framing", FRAMINGS)
IN_CHUNKS = pytest.mark.parametrize("framing", FRAMINGS[1:])
Way = Callable[..., list[Answer]]
PAYLOAD = int(CommandFlag.PAYLOAD_LEN)


@WAYS
@EACH
def test_a_read_gives_the_bytes(new_node: NewNode, way: Way, framing: Framing) -> None:
    node = new_node(("file", 1 << 20), ("zero", 1 << 20), ("memory", 1 << 20), ("file", 12345))
    requests = [read(0, node.size), read(1, 1), read(node.size - 1, 1), read(1 << 20, 4096), read((1 << 20) - 7, 70000)]
    for request, answer in zip(requests, way(node, requests, framing), strict=True):
        assert answer[:2] == (0, node.content[request.offset : request.offset + request.length])


@IN_CHUNKS
@WAYS
def test_zeros_are_sent_as_holes(new_node: NewNode, way: Way, framing: Framing) -> None:
    node = new_node(("file", 1 << 16), ("zero", 1 << 20), ("file", 1 << 16))
    [whole, hole] = way(node, [read(0, node.size), read(1 << 17, 1 << 16)], framing)
    assert whole.chunks == (1, 2, 1, 0)
    assert hole.chunks == (2, 0)


@IN_CHUNKS
@WAYS
def test_do_not_fragment_gives_one_chunk_of_data(new_node: NewNode, way: Way, framing: Framing) -> None:
    node = new_node(("file", 1 << 16), ("zero", 1 << 20), ("memory", 1 << 20), ("file", 1 << 16))
    [answer] = way(node, [read(0, node.size, CommandFlag.DF)], framing)
    assert answer.data == node.content
    assert answer.chunks.count(ReplyChunkType.OFFSET_DATA) == 1
    assert ReplyChunkType.OFFSET_HOLE not in answer.chunks


@WAYS
@EACH
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
    new_node: NewNode, way: Way, framing: Framing, request_: Request, error: int
) -> None:
    node = new_node(("file", 1 << 19), ("zero", 1 << 19))
    [answer, after] = way(node, [request_, read(0, 10)], framing)
    assert answer.error == error
    if error and framing.structured:
        assert len(answer.message) > 10
    assert after.data == node.content[:10]


@WAYS
@EACH
def test_a_read_of_nothing_succeeds(new_node: NewNode, way: Way, framing: Framing) -> None:
    [answer] = way(new_node(("file", 4096)), [read(4096, 0)], framing)
    assert answer[:2] == (0, b"")


@WAYS
def test_too_long_a_read_is_refused_and_the_longest_is_served(way: Way) -> None:
    node = ZeroNode(1 << 40)
    longest = nbd.MAX_PAYLOAD
    assert [a.error for a in way(node, [read(0, longest), read(0, longest + 1)], SIMPLE_REPLIES)] == [0, 22]
    assert [a.error for a in way(node, [read(5, longest), read(0, 0xFFFFFFFF)], STRUCTURED_REPLIES)] == [0, 75]
    [df] = way(node, [read(0, longest, CommandFlag.DF)], STRUCTURED_REPLIES)
    assert df.data == bytes(longest)


@IN_CHUNKS
@WAYS
@pytest.mark.parametrize("length", [4096, 1 << 16, 1 << 20])
def test_damage_is_an_error_with_its_reason(new_node: NewNode, way: Way, length: int, framing: Framing) -> None:
    node = new_node(("file", 1 << 20), ("bad", 4096), ("file", 1 << 20))
    at = (1 << 20) - length // 2
    for flags in (0, CommandFlag.DF):
        [answer, after] = way(node, [read(at, length, flags), read(0, 5)], framing)
        assert answer.error == Errno.EIO
        assert b"damaged" in answer.message
        assert after.data == node.content[:5]


@WAYS
def test_damage_in_a_simple_reply_is_an_error_before_any_data(new_node: NewNode, way: Way) -> None:
    node = new_node(("memory", 1 << 17), ("bad", 4096), ("memory", 1 << 17))
    [small, large, after] = way(node, [read(1 << 17, 10), read(0, node.size), read(0, 5)], SIMPLE_REPLIES)
    assert (small.error, large.error) == (Errno.EIO, Errno.EIO)
    assert after.data == node.content[:5]


def test_damage_behind_a_simple_reply_that_has_left_ends_the_connection(new_node: NewNode) -> None:
    node = new_node(("file", 1 << 20), ("bad", 4096))
    with connected(exports(default=node)) as sock:
        receive = handshake(sock, SIMPLE_REPLIES)
        sock.sendall(packed(read(0, node.size)) + packed(read(0, 1)))
        assert receive(16)[4:8] == bytes(4)
        with pytest.raises(EOFError):
            receive(node.size)


def test_a_file_that_ends_early_is_read_through_the_node(new_node: NewNode) -> None:
    node = new_node(("file", 1 << 20), ("file", 1 << 20))
    os.truncate(node.filename, 512 + 100_001)  # the node still knows all the bytes
    for framing in FRAMINGS:
        [answer] = quickly(node, [read(0, node.size)], framing)
        assert answer.data == node.content


def test_bytes_of_a_file_that_others_may_write_go_by_copy(new_node: NewNode, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> int:
        raise AssertionError("sendfile")

    node = new_node(("file", 1 << 20), stable=False)
    monkeypatch.setattr(channel.os, "sendfile", refuse)
    [answer] = quickly(node, [read(0, node.size)], STRUCTURED_REPLIES)
    assert answer.data == node.content
    assert answer.chunks == (1, 1, 1, 1, 0)


# Block status.


def status(offset: int, length: int, flags: int = 0) -> Request:
    return Request(flags, Command.BLOCK_STATUS, 7, offset, length)


@IN_CHUNKS
@WAYS
def test_block_status_tells_holes_from_data(new_node: NewNode, way: Way, framing: Framing) -> None:
    node = new_node(("file", 4096), ("memory", 4096), ("zero", 1 << 20), ("zero", 512), ("file", 4096))
    hole = State.HOLE | State.ZERO
    [whole, part, one] = way(node, [status(0, node.size), status(1, 9000), status(1, 9000, 8)], framing)
    assert whole.status == ((8192, 0), ((1 << 20) + 512, hole), (4096, 0))
    assert part.status == ((8191, 0), (809, hole))
    assert one.status == ((8191, 0),)


def test_allocated_zeros_are_zero_and_no_hole(monkeypatch: pytest.MonkeyPatch) -> None:
    node = ZeroNode(1 << 20)
    monkeypatch.setattr(node, "block_status", lambda o, n: iter([Extent(o, n, Status.DATA | Status.ZERO)]))
    [answer] = slowly(node, [status(0, 1 << 20)], STRUCTURED_REPLIES)
    assert answer.status == ((1 << 20, State.ZERO),)


@IN_CHUNKS
@WAYS
def test_block_status_of_four_gigabytes_fits_its_field(way: Way, framing: Framing) -> None:
    node = ZeroNode((1 << 40) + 123)
    last = 0xFFFFFFFF
    [answer, tail] = way(node, [status(0, last), status((1 << 40) - 5, 128)], framing)
    assert answer.status == ((last, 3),)
    assert tail.status == ((128, 3),)


@WAYS
def test_block_status_without_a_context_is_refused(way: Way) -> None:
    [answer] = way(ZeroNode(4096), [status(0, 4096)], SIMPLE_REPLIES)
    assert answer.error == Errno.EINVAL


def test_the_number_of_descriptors_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    def alternating(offset: int, length: int) -> Iterator[Extent]:
        for start in range(offset, offset + length, 512):
            yield Extent(start, 512, DATA if start & 512 else Status.ZERO)

    node = ZeroNode(1 << 40)
    monkeypatch.setattr(node, "block_status", alternating)
    [answer] = slowly(node, [status(0, 1 << 31)], STRUCTURED_REPLIES)
    assert len(answer.status) == contexts.MAX_DESCRIPTORS
    monkeypatch.setattr(node, "block_status", lambda o, n: (Extent(o + i, 1, DATA) for i in range(n)))
    [answer] = slowly(node, [status(0, 1 << 31)], STRUCTURED_REPLIES)
    assert answer.status == ((contexts.MAX_EXTENTS, 0),)


# Extended headers.


@WAYS
def test_lengths_of_64_bits_have_their_effect(way: Way) -> None:
    node = ZeroNode((1 << 40) + 123)
    requests = [
        status(0, node.size),
        status(5, node.size - 5, CommandFlag.REQ_ONE),
        status((1 << 32) - 1, (1 << 32) + 1),
        Request(0, Command.CACHE, 7, 0, node.size),
        read(1, 1 << 32),
        status(1, node.size),
        status(1, (1 << 64) - 1),
    ]
    *statuses, cache, big, over, wrap = way(node, requests, EXTENDED_HEADERS)
    assert [answer.status for answer in statuses] == [
        ((node.size, 3),), ((node.size - 5, 3),), (((1 << 32) + 1, 3),)
    ]  # fmt: skip
    assert cache.error == 0
    assert big.error == Errno.EOVERFLOW
    assert (over.error, wrap.error) == (Errno.EINVAL, Errno.EINVAL)


@WAYS
@pytest.mark.parametrize("length", [0, 1, 4, 8, 12, 70_000])
@pytest.mark.parametrize(
    "command", [Command.READ, Command.FLUSH, Command.TRIM, Command.CACHE, Command.WRITE_ZEROES, 99]
)
def test_a_payload_where_none_belongs_is_passed_over_and_refused(
    new_node: NewNode, way: Way, command: int, length: int
) -> None:
    node = new_node(("file", 4096))
    request = Request(PAYLOAD, command, 3, 0, length)
    answer, after = way(node, [request, read(0, 9)], EXTENDED_HEADERS, [b"x" * length])
    assert answer.error in (Errno.EINVAL, Errno.EPERM)  # which of the two reasons comes first is nobody's business
    assert after.data == node.content[:9]


def three_contexts(node: BlockNode) -> Answers:
    contexts = [MetaContext(f"x:{i}", lambda _, o, n, i=i: iter([(n, i)])) for i in range(3)]  # type: ignore[misc]
    return Answers(Agreement(Export("", lambda: node), node, True, tuple(contexts), True))


@pytest.mark.parametrize(
    ("payload", "contexts"),
    [
        (struct.pack(">QI", 5 << 32, 1), (1,)),
        (struct.pack(">QIII", 5 << 32, 2, 0, 1), (2, 0, 1)),
        (struct.pack(">QII", 5 << 32, 1, 1), ()),
        (struct.pack(">QI", 5 << 32, 3), ()),
        (struct.pack(">QIIII", 5 << 32, 0, 1, 2, 0), ()),
        (struct.pack(">Q", 5 << 32), ()),
        (struct.pack(">QH", 5 << 32, 1), ()),
        (struct.pack(">QI", 0, 1), ()),
        (struct.pack(">QI", (5 << 32) + 1, 1), ()),
        (b"1234567", ()),
        (b"x" * 10_000, ()),
    ],
)
def test_the_payload_of_a_block_status_chooses_contexts(payload: bytes, contexts: tuple[int, ...]) -> None:
    request = Request(PAYLOAD, Command.BLOCK_STATUS, 7, 77, len(payload))
    data = io.BytesIO(b"".join(three_contexts(ZeroNode((5 << 32) + 77)).answer(request, [payload[:9], payload[9:]])))
    answer = understand(data.read, request, EXTENDED_HEADERS)
    assert answer.contexts == contexts
    assert answer.error == (0 if contexts else Errno.EINVAL)
    assert contexts or len(answer.message) > 10
    assert not data.read()


def test_the_payload_of_a_block_status_is_received(new_node: NewNode) -> None:
    node = new_node(("file", 4096), ("zero", 4096))
    payload = struct.pack(">QI", 8192, 0)
    request = Request(PAYLOAD, Command.BLOCK_STATUS, 7, 0, len(payload))
    bad = request._replace(length=5)
    [answer, refused, after] = quickly(node, [request, bad, read(0, 9)], EXTENDED_HEADERS, [payload, b"12345"])
    assert answer.status == ((4096, 0), (4096, 3))
    assert refused.error == Errno.EINVAL
    assert after.data == node.content[:9]


# The two ways, on anything.

KINDS = st.sampled_from(["file", "file", "memory", "zero", "bad"])
RUNS = st.lists(st.tuples(KINDS, st.sampled_from([1, 512, 4095, 4096, 32768, 65536, 300_000])), min_size=1, max_size=8)


PICKS = st.lists(st.tuples(*[st.floats(0, 1)] * 2, st.booleans()), max_size=9)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    runs=RUNS,
    framing=st.sampled_from(FRAMINGS),
    picks=st.lists(st.tuples(*[st.floats(0, 1)] * 2, st.booleans()), max_size=9),
)
def test_the_fast_way_and_the_plain_way_say_the_same(
    tmp_path: Path, runs: list[tuple[str, int]], framing: Framing, picks: list[tuple[float, float, bool]]
) -> None:
    if not framing.structured:
        runs = [run for run in runs if run[0] != "bad"] or [("file", 1)]  # a simple reply may be cut off
    node = PatchworkNode(tmp_path / "node", runs)
    requests = []
    for cookie, (start, size, whole) in enumerate(picks):
        offset = int(start * (node.size - 1))
        length = max(1, int(size * (node.size - offset)))
        requests.append(read(offset, length, CommandFlag.DF if whole and framing.structured else 0, cookie))
    slow, quick = slowly(node, requests, framing), quickly(node, requests, framing)
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


SMALL = st.builds(Request, st.sampled_from([0, 1, 4, 8, 32]), *[st.integers(0, 9)] * 4)


@EACH
@settings(max_examples=1000, deadline=None)
@given(st.lists(st.one_of(st.binary(max_size=60), SMALL)))
def test_any_bytes_are_requests_or_end_it(framing: Framing, pieces: list[bytes | Request]) -> None:
    data = [piece if isinstance(piece, bytes) else packed(piece, framing) for piece in pieces]
    requests, answers = Requests(framing), Answers(agreement(ZeroNode(9), framing))
    try:
        for piece in data:
            for request, payload in requests.receive(piece):
                b"".join(answers.answer(request, [payload]))
    except NBDError:
        pass


@IN_CHUNKS
def test_a_write_to_a_read_only_export_is_refused_and_its_data_passed_over(new_node: NewNode, framing: Framing) -> None:
    node = new_node(("file", 4096))
    flags = CommandFlag.PAYLOAD_LEN if framing.extended else 0
    data = packed(read(0, 1), framing)  # looks like a request, and is none
    write = Request(flags, Command.WRITE, 3, 0, len(data))
    assert list(Requests(framing).receive(packed(write, framing) + data)) == [(write, data)]
    with connected(exports(default=node)) as sock:
        receive = handshake(sock, framing)
        for size in (len(data), 1 << 20):
            write = Request(flags, Command.WRITE, 3, 0, size)
            sock.sendall(packed(write, framing) + data.ljust(size, b"x") + packed(read(0, 9), framing))
            assert understand(receive, write, framing).error == Errno.EPERM
            assert understand(receive, read(0, 9), framing).data == node.content[:9]


@pytest.mark.parametrize(
    ("framing", "attack"),
    [
        (STRUCTURED_REPLIES, bytes(28)),
        (STRUCTURED_REPLIES, b"GET / HTTP/1.1\r\nHost: nowhere\r\n\r\n"),
        (STRUCTURED_REPLIES, packed(Request(0, Command.WRITE, 3, 0, 0xFFFFFFFF))),
        (STRUCTURED_REPLIES, packed(read(0, 1))[:20]),
        (STRUCTURED_REPLIES, packed(read(0, 1), EXTENDED_HEADERS)),
        (EXTENDED_HEADERS, packed(read(0, 1)) + bytes(4)),
        (EXTENDED_HEADERS, packed(Request(PAYLOAD, Command.WRITE, 3, 0, nbd.MAX_PAYLOAD + 1), EXTENDED_HEADERS)),
        (EXTENDED_HEADERS, packed(Request(0, Command.WRITE, 3, 0, 1 << 63), EXTENDED_HEADERS)),
        (EXTENDED_HEADERS, packed(Request(PAYLOAD, 99, 3, 0, (1 << 64) - 1), EXTENDED_HEADERS)),
    ],
)
def test_what_is_no_request_ends_the_connection_after_what_was_one(
    new_node: NewNode, framing: Framing, attack: bytes
) -> None:
    node = new_node(("file", 4096))
    with connected(exports(default=node)) as sock:
        receive = handshake(sock, framing)
        sock.sendall(packed(read(0, 9), framing) + attack)
        sock.shutdown(socket.SHUT_WR)
        assert understand(receive, read(0, 9), framing).data == node.content[:9]
        assert sock.recv(1) == b""


@IN_CHUNKS
def test_requests_before_a_disconnect_are_answered(new_node: NewNode, framing: Framing) -> None:
    node = new_node(("file", 1 << 20))
    with connected(exports(default=node)) as sock:
        receive = handshake(sock, framing)
        disconnect = packed(Request(0, Command.DISC, 0, 0, 0), framing)
        sock.sendall(packed(read(0, 9), framing) * 100 + disconnect + packed(read(0, 9), framing))
        for _ in range(100):
            assert understand(receive, read(0, 9), framing).data == node.content[:9]
        assert sock.recv(1) == b""


@IN_CHUNKS
def test_requests_may_arrive_in_any_pieces(new_node: NewNode, framing: Framing) -> None:
    node = new_node(("file", 1 << 20))
    with connected(exports(default=node)) as sock:
        receive = handshake(sock, framing)
        for byte in packed(read(5, 9), framing):
            sock.sendall(bytes([byte]))
        assert understand(receive, read(5, 9), framing).data == node.content[5:14]


def test_a_fault_of_ours_ends_one_connection_and_is_logged(
    new_node: NewNode, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    node = new_node(("memory", 4096))
    monkeypatch.setattr(node, "preadv", lambda offset, buffers: 1 / 0)
    with connected(exports(default=node)) as sock:
        handshake(sock, STRUCTURED_REPLIES)
        sock.sendall(packed(read(0, 9)))
        assert sock.recv(1) == b""
    assert "fault of this server" in caplog.text
    assert not isinstance(ZeroDivisionError(), Qcow2SnapError)
