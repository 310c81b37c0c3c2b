"""Our client, against our server and others."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from formats.nbd import Command, CommandFlag, Errno, ReplyType, State
from qcow2snap.block.graph import open_raw
from qcow2snap.block.node import NBDError
from qcow2snap.nbd.client import ALLOCATION, Client, ReplyError, Request
from qcow2snap.nbd.client.copy import copy
from qcow2snap.nbd.framing import EXTENDED_HEADERS, SIMPLE_REPLIES, STRUCTURED_REPLIES, Framing
from qcow2snap.nbd.uri import URI
from tests.nbd.support import NewNode, Serve, ZeroNode, exports
from tests.support import require

FRAMINGS = [SIMPLE_REPLIES, STRUCTURED_REPLIES, EXTENDED_HEADERS]


def test_it_lists_describes_and_reads(new_node: NewNode, serve: Serve) -> None:
    node = new_node(("file", 1 << 20), ("zero", 1 << 20), ("memory", 12345))
    where = serve(exports(default=ZeroNode(7), monday=node)).listeners[0].uri
    with Client.connect(where) as client:
        assert client.list_exports() == [("", "about default"), ("monday", "about monday")]
        info = client.info("monday")
        assert (info.size, info.name, info.description) == (node.size, "monday", "about monday")
        assert (info.minimum_block_size, info.preferred_block_size, info.maximum_payload_size) == (1, 4096, 1 << 25)
        assert client.list_contexts("monday") == ["base:allocation", "qemu:allocation-depth"]
        with pytest.raises(ReplyError, match="friday") as refused:
            client.go("friday")
        assert refused.value.error == ReplyType.ERR_UNKNOWN
        client.go("monday")
        assert client.pread(0, node.size) == node.content
        assert client.pread(77, 5000, flags=CommandFlag.DF) == node.content[77:5077]
        hole = State.HOLE | State.ZERO
        assert list(client.extents()) == [(0, 1 << 20, 0), (1 << 20, 1 << 20, hole), (2 << 20, 12345, 0)]
        client.cache(0, 4096)
        client.flush()
        with pytest.raises(ReplyError, match="beyond the end") as error:
            client.pread(node.size, 1)
        assert error.value.error == Errno.EINVAL
        assert client.pread(5, 5) == node.content[5:10]


HELD_BACK = [
    {"extended_headers": False, "structured_replies": False},
    {"extended_headers": False},
    {"structured_replies": False},
]
EACH = pytest.mark.parametrize(("options", "framing"), list(zip(HELD_BACK, FRAMINGS, strict=True)))


@EACH
def test_each_framing_does_the_same(
    new_node: NewNode, serve: Serve, options: dict[str, bool], framing: Framing
) -> None:
    node = new_node(("file", 1 << 20), ("bad", 4096), ("zero", 1 << 20), ("memory", 12345))
    with Client.connect(serve(exports(default=node)).listeners[0].uri, **options) as client:
        client.go()
        assert client.framing is framing
        assert client.pread(3, 1 << 19) == node.content[3 : 3 + (1 << 19)]
        assert client.pread(2 << 20, node.size - (2 << 20)) == node.content[2 << 20 :]
        with pytest.raises(ReplyError, match=r"EIO: .*damaged" if framing.structured else "EIO"):
            client.pread(1 << 20, 10)
        assert client.pread(7, 0) == b""
        assert sum(length for _, length, _ in client.extents()) == node.size if framing.structured else True


@EACH
def test_each_framing_writes(tmp_path: Path, serve: Serve, options: dict[str, bool], framing: Framing) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(b"x" * (40 << 20))
    node = open_raw(str(path), writable=True)
    data = bytes(range(256)) * (35 << 12)  # more than one request may hold
    with Client.connect(serve(exports(default=node)).listeners[0].uri, **options) as client:
        client.go()
        client.pwrite(77, data, flags=CommandFlag.FUA)
        client.write_zeroes(1000, 2000, flags=CommandFlag.NO_HOLE)
        client.write_zeroes(1 << 20, 1 << 20, flags=CommandFlag.FAST_ZERO)
        client.trim(5 << 20, 1 << 20)
        client.flush()
        with pytest.raises(ReplyError) as refused:
            client.pwrite(node.size - 1, b"12")
        assert refused.value.error == Errno.ENOSPC
        assert client.pread(77, len(data))[: 1000 - 77] == data[: 1000 - 77]
        assert client.pread(0, node.size) == path.read_bytes()
    node.close()
    expected = bytearray((b"x" * 77 + data).ljust(40 << 20, b"x"))
    for start, length in ((1000, 2000), (1 << 20, 1 << 20), (5 << 20, 1 << 20)):
        expected[start : start + length] = bytes(length)
    assert path.read_bytes() == expected


@EACH
def test_many_requests_are_in_flight(
    new_node: NewNode, serve: Serve, options: dict[str, bool], framing: Framing
) -> None:
    node = new_node(*[("file", 70_000), ("zero", 30_000), ("memory", 50_000)] * 5, ("bad", 4096))
    asked = [Request(Command.READ, at % (node.size - 5000), 5000) for at in range(0, 3_000_000, 7001)]
    asked.insert(50, Request(Command.READ, node.size - 1, 2))
    with Client.connect(serve(exports(default=node)).listeners[0].uri, **options) as client:
        client.go()
        replies = list(client.submit(asked, depth=64))
        assert sorted(reply.request for reply in replies) == sorted(asked)
        for reply in replies:
            start, end = reply.request.offset, reply.request.offset + reply.request.length
            bad = any(start < high and low < end for low, high in node.bad)
            if reply.error:
                assert bad or end > node.size
            else:
                assert not bad
                assert reply.data == node.content[start:end]


def test_writes_and_reads_in_flight_do_not_wait_for_each_other(tmp_path: Path, serve: Serve) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(b"x" * (16 << 20))
    node = open_raw(str(path), writable=True)
    with Client.connect(serve(exports(default=node)).listeners[0].uri, timeout=10) as client:
        client.go()
        asked = []
        for number in range(8):
            asked.append(Request(Command.READ, number << 20, 4 << 20))
            asked.append(Request(Command.WRITE, number << 20, payload=bytes(4 << 20)))
        assert not any(reply.error for reply in client.submit(asked, depth=8))
    node.close()


def test_what_is_in_flight_has_to_be_taken_first(serve: Serve) -> None:
    with Client.connect(serve(exports(default=ZeroNode(1 << 20))).listeners[0].uri) as client:
        with pytest.raises(NBDError, match="no export"):
            client.pread(0, 1)
        client.go()
        replies = client.submit([Request(Command.READ, 0, 512)] * 3)
        next(replies)
        with pytest.raises(NBDError, match="not taken"):
            client.pread(0, 1)
        assert len(list(replies)) == 2
        assert client.pread(0, 1) == b"\0"


def test_terabytes_of_status_take_one_request(serve: Serve) -> None:
    size = (5 << 40) + 123
    where = serve(exports(default=ZeroNode(size))).listeners[0].uri
    with Client.connect(where) as client:
        client.go()
        assert client.block_status(0, size) == [(size, 3)]
        assert client.block_status(5, size - 5, flags=CommandFlag.REQ_ONE) == [(size - 5, 3)]
    with Client.connect(where, extended_headers=False) as client:
        client.go()
        assert sum(length for _, length, _ in client.extents()) == size


def test_statuses_of_several_contexts_come_at_once(new_node: NewNode, serve: Serve) -> None:
    where = serve(exports(default=new_node(("file", 4096), ("zero", 4096)))).listeners[0].uri
    depth = "qemu:allocation-depth"
    for options in HELD_BACK[1:]:
        with Client.connect(where, **options) as client:
            client.go(contexts=[depth, ALLOCATION, "y:none"])
            assert client.contexts == {depth, ALLOCATION}
            allocation, depths = [(4096, 0), (4096, 3)], [(4096, 1), (4096, 0)]
            assert client.block_statuses(0, 8192) == {ALLOCATION: allocation, depth: depths}
            assert client.block_statuses(0, 8192, [depth]) == {depth: depths}
            assert client.block_status(0, 8192) == allocation
            with pytest.raises(NBDError, match="y:none"):
                client.block_status(0, 512, "y:none")


@pytest.fixture(params=["qemu-nbd", "nbdkit", "nbdkit --no-sr", "newer qemu-nbd"])
def peer(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, bytes, str]]:
    """Another server's export of 1 MiB, a hole in its middle, which may be written."""
    name = request.param
    content = bytes(range(1, 256)) * 1200
    content = content.ljust(700_000, b"\0") + content
    content = content.ljust(1 << 20, b"\1")
    disk, path = tmp_path / "disk.raw", tmp_path / "s"
    with disk.open("wb") as out:
        out.truncate(1 << 20)
        out.write(content[:306_000])
        out.seek(700_000)
        out.write(content[700_000:])
    if name.startswith("nbdkit"):
        command = [*name.replace("nbdkit", require("nbdkit")).split(), "-f", "-U", str(path), "file", str(disk)]
    else:
        program = request.getfixturevalue("peers") / "qemu-nbd" if "newer" in name else require("qemu-nbd")
        command = [str(program), "-t", "-e", "4", "-f", "raw", "-k", str(path), "-x", "x y", str(disk)]
    server = subprocess.Popen(command)
    where = URI("x y", socket=str(path))
    for _ in range(200):
        with suppress(NBDError):  # the socket may be there, and nobody listens yet
            Client.connect(where).close()
            break
        time.sleep(0.05)
    yield str(where), content, name
    server.terminate()
    server.wait(20)


@pytest.mark.parametrize("options", [{}, *HELD_BACK])
def test_it_reads_and_writes_other_servers_exports(peer: tuple[str, bytes, str], options: dict[str, bool]) -> None:
    where, content, name = peer
    with Client.connect(where, **options) as client:
        assert client.go("x y").size == len(content)
        if not options:
            assert client.framing.extended == ("newer" in name)
            assert client.framing.structured == ("no-sr" not in name)
        assert client.pread(0, len(content)) == content
        assert client.pread(77, 1) == content[77:78]
        if ALLOCATION in client.contexts:
            assert any(flags & State.ZERO for _, _, flags in client.extents())
            assert sum(length for _, length, _ in client.extents()) == len(content)
        assert client.framing.structured == bool(client.contexts)
        out = io.BytesIO()
        copy(client, out, sparse=False)
        assert out.getvalue() == content
        client.pwrite(512, b"written" * 512, flags=CommandFlag.FUA)
        client.write_zeroes(8192, 4096, flags=CommandFlag.NO_HOLE)
        client.trim(65536, 65536)
        client.flush()
        after = client.pread(0, len(content))
        assert after[512 : 512 + 7 * 512] == b"written" * 512
        assert after[8192:12288] == bytes(4096)
        assert after[131072:] == content[131072:]
        with pytest.raises(ReplyError) as refused:
            client.pread(len(content), 512)
        assert refused.value.error == Errno.EINVAL


@pytest.mark.parametrize("output", ["file", "stdout"])
def test_as_a_program_it_copies_an_export(new_node: NewNode, serve: Serve, tmp_path: Path, output: str) -> None:
    node = new_node(("file", 1 << 20), ("zero", 64 << 20), ("memory", 12345))
    where = str(serve(exports(monday=node)).listeners[0].uri._replace(export="monday"))
    copy = tmp_path / "copy"
    target = "-" if output == "stdout" else str(copy)
    with (tmp_path / "stdout").open("wb") as out:
        subprocess.run(
            [sys.executable, "-m", "qcow2snap.nbd.client", where, target], stdout=out, check=True, timeout=60
        )
    if output == "stdout":
        copy = tmp_path / "stdout"
    assert copy.read_bytes() == node.content
    assert output == "stdout" or copy.stat().st_blocks * 512 < 8 << 20


def test_as_a_program_it_says_in_one_line_what_failed(tmp_path: Path) -> None:
    def client(*arguments: str) -> tuple[int, str]:
        command = [sys.executable, "-m", "qcow2snap.nbd.client", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        return done.returncode, done.stderr

    code, said = client(f"nbd+unix:///?socket={tmp_path}/none", "out")
    assert (code, said.count("\n")) == (1, 1)
    assert "cannot connect" in said
    assert client("http://x", "out")[0] == 1
    assert client("nbd://x")[0] == 2
    assert not os.path.exists("out")
