"""Reads that have to wait are put aside, announced, and answered by several; those to be confirmed are in time."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path

import pytest

from formats.nbd import Command, Errno
from qcow2snap.block.node import BlockNode, Buffer, FileError, SnapshotGone
from qcow2snap.nbd import pool, reads
from qcow2snap.nbd.framing import EXTENDED_HEADERS, SIMPLE_REPLIES, STRUCTURED_REPLIES, Framing
from qcow2snap.nbd.transmission import Request
from tests.nbd.support import NewNode, PatchworkNode, connected, exports
from tests.nbd.wire import Answer, handshake, packed, pushed_back, read, understand

EACH = pytest.mark.parametrize("framing", [SIMPLE_REPLIES, STRUCTURED_REPLIES, EXTENDED_HEADERS])


def replies(
    node: BlockNode,
    requests: Sequence[Request],
    framing: Framing = STRUCTURED_REPLIES,
    *,
    end: Callable[[socket.socket], None] | None = None,
) -> dict[int, Answer]:
    """What is answered to requests that arrive together, by cookie, in the order in which it is answered."""
    by_cookie = {request.cookie: request for request in requests}
    found: dict[int, Answer] = {}
    with connected(exports(default=node)) as sock:
        receive = handshake(sock, framing)
        sock.sendall(b"".join(packed(request, framing) for request in requests))
        if end is not None:
            end(sock)
        while len(found) < len(requests):
            head = receive(16)
            cookie = int.from_bytes(head[8:], "big")
            found[cookie] = understand(pushed_back(head, receive), by_cookie[cookie], framing)
    return found


@pytest.fixture
def announced(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The ranges that nodes were told of."""
    ranges: list[tuple[int, int]] = []
    monkeypatch.setattr(PatchworkNode, "prefetch", lambda node, offset, length: ranges.append((offset, length)))
    return ranges


@EACH
@pytest.mark.parametrize("length", [4096, 1 << 16])
def test_what_is_at_hand_is_answered_before_what_is_not(new_node: NewNode, framing: Framing, length: int) -> None:
    node = new_node(("memory", 1 << 20), ("file", 1 << 20))
    slow = [read(place * length, length, cookie=place) for place in range(5)]
    quick = [read((1 << 20) + place * length, length, cookie=100 + place) for place in range(5)]
    answers = replies(node, [each for pair in zip(slow, quick, strict=True) for each in pair], framing)
    assert list(answers)[:5] == [100, 101, 102, 103, 104]
    assert sorted(answers)[:5] == [0, 1, 2, 3, 4]
    for request in slow + quick:
        assert answers[request.cookie].data == node.content[request.offset : request.offset + length]


def test_a_node_is_told_what_will_be_read_where_disks_are_slow(
    new_node: NewNode, announced: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = count()
    monkeypatch.setattr(reads, "_blocks_read", lambda: next(blocks))
    node = new_node(("memory", 1 << 20))
    plain = PatchworkNode.preadv

    def slowly(self: PatchworkNode, offset: int, buffers: Sequence[Buffer]) -> None:
        time.sleep(0.01)  # longer than PATIENCE
        plain(self, offset, buffers)

    monkeypatch.setattr(PatchworkNode, "preadv", slowly)
    answers = replies(node, [read(place << 12, 1 << 12, cookie=place) for place in range(20)])
    assert len(answers) == 20
    # One was answered, by each of those who answer, before it was known that disks are slow.
    assert 10 <= len(announced) < 20
    assert set(announced) < {(place << 12, 1 << 12) for place in range(20)}


@pytest.mark.parametrize("framing", [SIMPLE_REPLIES, STRUCTURED_REPLIES, EXTENDED_HEADERS])
@pytest.mark.parametrize("length", [4096, 1 << 18, 1 << 20])
def test_helpers_answer_too_and_no_two_replies_are_mixed(
    new_node: NewNode, monkeypatch: pytest.MonkeyPatch, framing: Framing, length: int
) -> None:
    helpers = pool.ThreadPool(3)
    monkeypatch.setattr(reads, "thread_pool", lambda: helpers)
    threads = set()
    plain = PatchworkNode.preadv

    def preadv(self: PatchworkNode, offset: int, buffers: Sequence[Buffer]) -> None:
        threads.add(threading.current_thread().name)
        time.sleep(0.001)  # so that the others have a turn
        plain(self, offset, buffers)

    monkeypatch.setattr(PatchworkNode, "preadv", preadv)
    node = new_node(("memory", 2 << 20), ("zero", 1 << 16), ("memory", 2 << 20))
    requests = [read(place * 9973, length, cookie=place) for place in range(100)]
    answers = replies(node, requests, framing)
    for request in requests:
        assert answers[request.cookie].data == node.content[request.offset : request.offset + length]
    assert {name for name in threads if name.startswith("helper")} == {"helper-0", "helper-1", "helper-2"}


def test_an_error_that_a_helper_meets_ends_the_connection(new_node: NewNode, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it does in the connection's own thread: simple replies have no other way once a reply has begun."""
    node = new_node(("memory", 8 << 20))

    def preadv(self: PatchworkNode, offset: int, buffers: Sequence[Buffer]) -> None:
        time.sleep(0.005)
        if offset % (1 << 20) and threading.current_thread().name.startswith("helper"):  # the second piece of one
            raise FileError("damaged")
        for buffer in buffers:
            memoryview(buffer)[:] = node.content[offset : offset + len(buffer)]

    monkeypatch.setattr(PatchworkNode, "preadv", preadv)
    with pytest.raises((EOFError, ConnectionError)):
        replies(node, [read(place << 20, 1 << 20, cookie=place) for place in range(8)], SIMPLE_REPLIES)


@pytest.mark.parametrize("length", [4096, 1 << 16])
def test_a_read_by_itself_is_not_announced(new_node: NewNode, announced: list[tuple[int, int]], length: int) -> None:
    node = new_node(("memory", 1 << 20))
    assert replies(node, [read(0, length)])[7].data == node.content[:length]
    assert announced == []


ENDINGS = {
    "disconnect": lambda sock: sock.sendall(packed(Request(0, Command.DISC, 0, 0, 0), STRUCTURED_REPLIES)),
    "half closed": lambda sock: sock.shutdown(socket.SHUT_WR),
    "garbage": lambda sock: sock.sendall(bytes(28)),
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_what_was_put_aside_is_answered_to_the_end(new_node: NewNode, ending: str) -> None:
    node = new_node(("memory", 1 << 20))
    requests = [read(place * 9, 9, cookie=place) for place in range(300)]
    answers = replies(node, requests, end=ENDINGS[ending])
    assert [answers[place].data for place in range(300)] == [node.content[place * 9 :][:9] for place in range(300)]


class ChangingNode(PatchworkNode):
    """An image in use, whose snapshot goes after so many confirmations."""

    must_confirm = True

    def __init__(self, path: Path, runs: Sequence[tuple[str, int]], *, confirmations: int) -> None:
        super().__init__(path, runs, stable=False)
        self.confirmations = confirmations
        self.confirmed = 0

    def preadv(self, offset: int, buffers: Sequence[Buffer]) -> None:
        super().preadv(offset, buffers)
        self.confirm()

    def preadv_unconfirmed(self, offset: int, buffers: Sequence[Buffer]) -> None:
        super().preadv(offset, buffers)

    def confirm(self) -> None:
        if self.confirmed == self.confirmations:
            raise SnapshotGone("the snapshot was deleted")
        self.confirmed += 1


@EACH
@pytest.mark.parametrize("kind", ["file", "memory"])
def test_short_reads_are_confirmed_together(tmp_path: Path, framing: Framing, kind: str) -> None:
    node = ChangingNode(tmp_path / "node", [(kind, 1 << 20)], confirmations=1000)
    requests = [read(place * 512, 512, cookie=place) for place in range(100)]
    answers = replies(node, requests, framing)
    assert [answers[place].data for place in range(100)] == [node.content[place * 512 :][:512] for place in range(100)]
    assert 1 <= node.confirmed < 20
    node.close()


@EACH
@pytest.mark.parametrize("kind", ["file", "memory", "zero"])
def test_no_byte_of_a_snapshot_that_is_gone_leaves(tmp_path: Path, framing: Framing, kind: str) -> None:
    node = ChangingNode(tmp_path / "node", [(kind, 1 << 20)], confirmations=0)
    requests = [read(place, 1, cookie=place) for place in range(2000)]
    answers = replies(node, requests, framing)
    assert {answer.error for answer in answers.values()} == {Errno.EIO}
    assert len(answers) == 2000
    if framing.structured:
        assert answers[0].message == b"the snapshot was deleted"
    node.close()


@EACH
@pytest.mark.parametrize("kind", ["file", "memory"])
@pytest.mark.parametrize("confirmations", range(9))
def test_long_and_short_reads_in_one_batch_do_not_disturb_each_other(
    tmp_path: Path, framing: Framing, kind: str, confirmations: int
) -> None:
    node = ChangingNode(tmp_path / "node", [(kind, 3 << 20)], confirmations=confirmations)
    requests = [read(place << 14, 900 if place % 3 else 1 << 18, cookie=place) for place in range(40)]
    try:
        answers = replies(node, requests, framing)
    except EOFError:
        assert not framing.structured  # the reply had begun
        node.close()
        return
    for request in requests:
        answer = answers[request.cookie]
        if answer.error:
            assert answer.error == Errno.EIO
        else:
            assert answer.data == node.content[request.offset : request.offset + request.length]
    node.close()
