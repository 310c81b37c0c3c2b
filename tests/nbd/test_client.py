"""Our client, against three servers, and against servers that lie."""

from __future__ import annotations

import os
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from formats import nbd
from formats.nbd import CommandFlag, Errno, InfoType, OptionType, ReplyType, State
from qcow2snap.block.node import NBDError
from qcow2snap.nbd import uri as nbd_uri
from qcow2snap.nbd.client import Client, ReplyError
from qcow2snap.nbd.uri import URI
from tests.nbd.support import NewNode, Serve, ZeroNode, exports
from tests.support import require


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


@pytest.fixture(params=["qemu-nbd", "nbdkit"])
def peer(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, bytes]]:
    """Another server's export of 1 MiB, a hole in its middle."""
    program = require(request.param)
    content = bytes(range(1, 256)) * 1200
    content = content.ljust(700_000, b"\0") + content
    content = content.ljust(1 << 20, b"\1")
    disk, path = tmp_path / "disk.raw", tmp_path / "s"
    with disk.open("wb") as out:
        out.truncate(1 << 20)
        out.write(content[:306_000])
        out.seek(700_000)
        out.write(content[700_000:])
    if request.param == "qemu-nbd":
        command = [program, "-r", "-t", "-f", "raw", "-k", str(path), "-x", "x y", str(disk)]
    else:
        command = [program, "-f", "-r", "-U", str(path), "file", str(disk)]
    server = subprocess.Popen(command)
    for _ in range(200):
        if path.exists():
            break
        time.sleep(0.05)
    yield str(URI("x y", socket=str(path))), content
    server.terminate()
    server.wait(20)


def test_it_reads_qemus_and_nbdkits_exports(peer: tuple[str, bytes]) -> None:
    where, content = peer
    with Client.connect(where) as client:
        assert client.go("x y").size == len(content)
        assert client.pread(0, len(content)) == content
        assert any(flags & State.ZERO for _, _, flags in client.extents())
        assert sum(length for _, length, _ in client.extents()) == len(content)


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


# Servers that lie.


def told(server_says: bytes) -> Client:
    """A client of a server that says this, whatever it is asked."""
    ours, theirs = socket.socketpair()

    def speak() -> None:
        try:
            theirs.sendall(server_says)
            theirs.shutdown(socket.SHUT_WR)
            while theirs.recv(4096):
                pass
        except OSError:
            pass
        theirs.close()

    threading.Thread(target=speak, daemon=True).start()
    ours.settimeout(20)
    return Client(ours)


GREETING = b"NBDMAGICIHAVEOPT\0\3"


def reply(option: int, kind: int, data: bytes = b"", *, length: int | None = None) -> bytes:
    size = len(data) if length is None else length
    return struct.pack(">QIII", nbd.NBD_REP_MAGIC, option, kind, size) + data


ACCEPTED = (
    GREETING
    + reply(OptionType.STRUCTURED_REPLY, ReplyType.ACK)
    + reply(OptionType.SET_META_CONTEXT, ReplyType.META_CONTEXT, b"\0\0\0\0base:allocation")
    + reply(OptionType.SET_META_CONTEXT, ReplyType.ACK)
    + reply(OptionType.GO, ReplyType.INFO, struct.pack(">HQH", InfoType.EXPORT, 1 << 20, 1))
    + reply(OptionType.GO, ReplyType.ACK)
)


@pytest.mark.parametrize(
    "says",
    [
        b"",
        b"SSH-2.0-OpenSSH_9.2p1 hello\r\n",
        b"NBDMAGIC\x00\x00\x42\x02\x81\x86\x12\x53",
        b"NBDMAGICIHAVEOPT\0\0",
        GREETING,
        GREETING + bytes(20),
        GREETING + reply(OptionType.GO, ReplyType.ACK),
        GREETING + reply(OptionType.STRUCTURED_REPLY, ReplyType.ACK, length=0xFFFFFFFF),
        GREETING + reply(OptionType.STRUCTURED_REPLY, ReplyType.ERR_UNSUP) + reply(OptionType.GO, ReplyType.ACK),
        GREETING + reply(OptionType.STRUCTURED_REPLY, ReplyType.ERR_UNSUP) + reply(OptionType.GO, 3, b"\0\0x"),
    ],
)
def test_a_handshake_that_is_none_is_an_error(says: bytes) -> None:
    with pytest.raises(NBDError):
        told(says).go()


def chunk(kind: int, payload: bytes, *, flags: int = 1, cookie: int = 1, length: int | None = None) -> bytes:
    size = len(payload) if length is None else length
    return struct.pack(">IHHQI", nbd.NBD_STRUCTURED_REPLY_MAGIC, flags, kind, cookie, size) + payload


@pytest.mark.parametrize(
    "says",
    [
        b"",
        bytes(20),
        chunk(0, b""),
        chunk(0, b"", cookie=2),
        chunk(1, struct.pack(">Q", 0) + bytes(99)),
        chunk(1, struct.pack(">Q", 50) + bytes(100)),
        chunk(1, struct.pack(">Q", (1 << 64) - 1) + bytes(100)),
        chunk(1, b"", length=0xFFFFFFFF),
        chunk(2, struct.pack(">QI", 0, 0xFFFFFFFF)),
        chunk(2, struct.pack(">QI", 0, 101)),
        chunk(2, b"short"),
        chunk(77, bytes(8)),
        chunk(0x8001, b"\0"),
        chunk(0x8001, struct.pack(">IH", 5, 9999)),
        struct.pack(">IIQ", nbd.NBD_SIMPLE_REPLY_MAGIC, 0, 1) + bytes(100),
    ],
)
def test_a_reply_to_a_read_that_is_none_is_an_error(says: bytes) -> None:
    client = told(ACCEPTED + says)
    client.go()
    with pytest.raises(NBDError):
        client.pread(0, 100)


@pytest.mark.parametrize(
    "says",
    [
        chunk(0, b""),
        chunk(5, struct.pack(">I", 0)),
        chunk(5, struct.pack(">III", 0, 0, 3)),
        chunk(5, struct.pack(">III", 9, 512, 3)),
        chunk(5, b"", length=0xFFFFFFFF),
    ],
)
def test_a_block_status_that_gets_nowhere_is_an_error(says: bytes) -> None:
    client = told(ACCEPTED + says)
    client.go()
    with pytest.raises(NBDError):
        client.block_status(0, 4096)


def test_a_length_that_nobody_asked_for_is_not_received() -> None:
    for kind in (1, 5, 0x8001):
        client = told(ACCEPTED + chunk(kind, b"", length=0xFFFFFFFF))
        client.go()
        with pytest.raises(NBDError, match="the server's reply is none"):
            client.pread(0, 100)


# URIs.

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@given(TEXT, TEXT.filter(bool), st.integers(0, 65535))
def test_a_uri_that_is_printed_is_the_one_that_is_parsed(export: str, path: str, port: int) -> None:
    for uri in (URI(export, socket=path), URI(export, host="127.0.0.1", port=port), URI(export, host="::1", port=port)):
        assert nbd_uri.parse(str(uri)) == uri
        assert str(uri).isascii()


@pytest.mark.parametrize(
    "text",
    ["", "nbd://", "nbd:///x", "http://h/x", "nbds://h/x", "nbd+unix:///x", "nbd+unix:///?socket=a&socket=b",
     "nbd://h:x/", "nbd://[::1/", "nbd://h/%ff", "nbd+unix:///?socket=", "/path"],
)  # fmt: skip
def test_what_is_no_uri_of_ours_is_one_error(text: str) -> None:
    with pytest.raises(NBDError):
        nbd_uri.parse(text)


def test_nbdinfo_understands_our_uris(serve: Serve) -> None:
    if shutil.which("nbdinfo") is None:
        pytest.skip("nbdinfo is not installed")
    name = '100% ä/?#&= "x"+y'
    where = serve(exports(**{name: ZeroNode(77)})).listeners[0].uri._replace(export=name)
    assert subprocess.check_output(["nbdinfo", "--size", str(where)], text=True).strip() == "77"
