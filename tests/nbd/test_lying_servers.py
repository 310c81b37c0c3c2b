"""Our client, against servers that lie: whatever they say, it is understood, or one NBDError."""

from __future__ import annotations

import io
import socket
import struct
import threading
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from formats import nbd
from formats.nbd import Command, InfoType, OptionType, ReplyType
from qcow2snap.block.node import NBDError
from qcow2snap.nbd.client import Client, Reply, ReplyError, Request
from qcow2snap.nbd.client.negotiation import ClientNegotiation
from qcow2snap.nbd.client.replies import Steps
from qcow2snap.nbd.client.transmission import Transmission
from qcow2snap.nbd.framing import EXTENDED_HEADERS, SIMPLE_REPLIES, STRUCTURED_REPLIES, Framing

FRAMINGS = [SIMPLE_REPLIES, STRUCTURED_REPLIES, EXTENDED_HEADERS]


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


def accepted(framing: Framing) -> bytes:
    """What a server says until a client has chosen an export of 1 MiB."""
    wants = OptionType.EXTENDED_HEADERS if framing.extended else OptionType.STRUCTURED_REPLY
    return (
        GREETING
        + (b"" if framing.extended else reply(OptionType.EXTENDED_HEADERS, ReplyType.ERR_UNSUP))
        + reply(wants, ReplyType.ACK)
        + reply(OptionType.SET_META_CONTEXT, ReplyType.META_CONTEXT, b"\0\0\0\0base:allocation")
        + reply(OptionType.SET_META_CONTEXT, ReplyType.ACK)
        + reply(OptionType.GO, ReplyType.INFO, struct.pack(">HQH", InfoType.EXPORT, 1 << 20, 1))
        + reply(OptionType.GO, ReplyType.ACK)
    )


UNSUPPORTED = GREETING + b"".join(
    reply(option, ReplyType.ERR_UNSUP) for option in (OptionType.EXTENDED_HEADERS, OptionType.STRUCTURED_REPLY)
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
        GREETING + reply(OptionType.EXTENDED_HEADERS, ReplyType.ACK, length=0xFFFFFFFF),
        UNSUPPORTED + reply(OptionType.GO, ReplyType.ACK),
        UNSUPPORTED + reply(OptionType.GO, ReplyType.INFO, b"\0\0x"),
        UNSUPPORTED
        + reply(OptionType.GO, ReplyType.INFO, struct.pack(">HQH", InfoType.EXPORT, 1 << 63, 1))
        + reply(OptionType.GO, ReplyType.ACK),
        UNSUPPORTED
        + reply(OptionType.GO, ReplyType.INFO, struct.pack(">HQH", InfoType.EXPORT, 1 << 20, 1))
        + reply(OptionType.GO, ReplyType.INFO, struct.pack(">HIII", InfoType.BLOCK_SIZE, 0, 0, 0))
        + reply(OptionType.GO, ReplyType.ACK),
    ],
)
def test_a_handshake_that_is_none_is_an_error(says: bytes) -> None:
    with pytest.raises(NBDError):
        told(says).go()


def chunk(
    framing: Framing, kind: int, payload: bytes, *, flags: int = 1, cookie: int = 1, length: int | None = None,
    offset: int = 0,
) -> bytes:  # fmt: skip
    size = len(payload) if length is None else length
    if framing.extended:
        return struct.pack(">IHHQQQ", nbd.NBD_EXTENDED_REPLY_MAGIC, flags, kind, cookie, offset, size) + payload
    return struct.pack(">IHHQI", nbd.NBD_STRUCTURED_REPLY_MAGIC, flags, kind, cookie, size) + payload


IN_CHUNKS = pytest.mark.parametrize("framing", FRAMINGS[1:])


@IN_CHUNKS
@pytest.mark.parametrize(
    ("kind", "payload", "fields"),
    [
        (0, b"", {}),
        (0, b"", {"cookie": 2}),
        (0, b"x", {}),
        (1, struct.pack(">Q", 0) + bytes(99), {}),
        (1, struct.pack(">Q", 50) + bytes(100), {}),
        (1, struct.pack(">Q", (1 << 64) - 1) + bytes(100), {}),
        (1, struct.pack(">Q", 0), {}),
        (1, b"", {"length": 0xFFFFFFFF}),
        (2, struct.pack(">QI", 0, 0xFFFFFFFF), {}),
        (2, struct.pack(">QI", 0, 101), {}),
        (2, struct.pack(">QI", 0, 0), {}),
        (2, b"short", {}),
        (5, struct.pack(">III", 0, 512, 0), {}),
        (6, struct.pack(">IIQQ", 0, 1, 512, 0), {}),
        (77, bytes(8), {}),
        (0x8001, b"\0", {}),
        (0x8001, struct.pack(">IH", 5, 9999), {}),
        (0x8001, struct.pack(">IH", 0, 0), {}),
        (0x8001, b"", {"length": 0xFFFFFFFF}),
    ],
)
def test_a_reply_to_a_read_that_is_none_is_an_error(
    framing: Framing, kind: int, payload: bytes, fields: dict[str, int]
) -> None:
    client = told(accepted(framing) + chunk(framing, kind, payload, **fields))
    client.go()
    with pytest.raises(NBDError) as error:
        client.pread(0, 100)
    assert not isinstance(error.value, ReplyError)


@pytest.mark.parametrize(
    ("framing", "says"),
    [
        (STRUCTURED_REPLIES, b""),
        (STRUCTURED_REPLIES, bytes(20)),
        (STRUCTURED_REPLIES, struct.pack(">IIQ", nbd.NBD_SIMPLE_REPLY_MAGIC, 0, 1) + bytes(100)),
        (STRUCTURED_REPLIES, chunk(EXTENDED_HEADERS, 0, b"")),
        (EXTENDED_HEADERS, bytes(32)),
        (EXTENDED_HEADERS, chunk(STRUCTURED_REPLIES, 0, b"").ljust(32)),
        (EXTENDED_HEADERS, chunk(EXTENDED_HEADERS, 2, struct.pack(">QI", 0, 100), offset=1)),
        (EXTENDED_HEADERS, chunk(EXTENDED_HEADERS, 1, b"", length=(1 << 64) - 1)),
    ],
)
def test_what_is_no_reply_at_all_is_an_error(framing: Framing, says: bytes) -> None:
    client = told(accepted(framing) + says)
    client.go()
    with pytest.raises(NBDError):
        client.pread(0, 100)


@pytest.mark.parametrize(
    ("framing", "says"),
    [
        (STRUCTURED_REPLIES, chunk(STRUCTURED_REPLIES, 0, b"")),
        (STRUCTURED_REPLIES, chunk(STRUCTURED_REPLIES, 5, struct.pack(">I", 0))),
        (STRUCTURED_REPLIES, chunk(STRUCTURED_REPLIES, 5, struct.pack(">III", 0, 0, 3))),
        (STRUCTURED_REPLIES, chunk(STRUCTURED_REPLIES, 5, struct.pack(">III", 9, 512, 3))),
        (STRUCTURED_REPLIES, chunk(STRUCTURED_REPLIES, 5, struct.pack(">IIIH", 0, 512, 3, 7))),
        (STRUCTURED_REPLIES, chunk(STRUCTURED_REPLIES, 5, b"", length=0xFFFFFFFF)),
        (STRUCTURED_REPLIES, chunk(STRUCTURED_REPLIES, 5, struct.pack(">III", 0, 512, 3), flags=0) * 2),
        (STRUCTURED_REPLIES, struct.pack(">IIQ", nbd.NBD_SIMPLE_REPLY_MAGIC, 0, 1)),
        (EXTENDED_HEADERS, chunk(EXTENDED_HEADERS, 5, struct.pack(">III", 0, 512, 3))),
        (EXTENDED_HEADERS, chunk(EXTENDED_HEADERS, 6, struct.pack(">IIQQ", 0, 2, 512, 3))),
        (EXTENDED_HEADERS, chunk(EXTENDED_HEADERS, 6, struct.pack(">IIQQ", 0, 1, 0, 3))),
        (EXTENDED_HEADERS, chunk(EXTENDED_HEADERS, 6, struct.pack(">II", 0, 0))),
    ],
)
def test_a_block_status_that_gets_nowhere_is_an_error(framing: Framing, says: bytes) -> None:
    client = told(accepted(framing) + says)
    client.go()
    with pytest.raises(NBDError):
        client.block_status(0, 4096)


# The state machines alone.


def steps(machine: Steps[Any], data: bytes) -> Any:
    """Take the steps on what the server says, and give their result. EOFError where it says too little."""
    said = io.BytesIO(data)
    try:
        wanted = next(machine)
        while True:
            size = wanted if isinstance(wanted, int) else len(wanted)
            assert 0 < size <= 1 << 25
            piece = said.read(size)
            if len(piece) < size:
                raise EOFError
            if not isinstance(wanted, int):
                wanted[:] = piece
                piece = b""
            wanted = machine.send(piece)
    except StopIteration as done:
        return done.value


@IN_CHUNKS
def test_replies_and_their_chunks_come_in_any_order(framing: Framing) -> None:
    transmission = Transmission(framing, {0: "base:allocation"})
    transmission.request(Request(Command.READ, 0, 8))
    transmission.request(Request(Command.READ, 100, 4))
    transmission.request(Request(Command.FLUSH))
    said = (
        chunk(framing, 1, struct.pack(">Q", 4) + b"5678", flags=0, cookie=1)
        + chunk(framing, 2, struct.pack(">QI", 100, 4), flags=0, cookie=2, offset=100)
        + chunk(framing, 0x8001, struct.pack(">IH4s", 5, 4, b"oops"), flags=1, cookie=3)
        + chunk(framing, 1, struct.pack(">Q", 0) + b"1234", cookie=1)
        + chunk(framing, 0, b"", cookie=2, offset=100)
    )

    def all_replies() -> Steps[list[Reply]]:
        replies = []
        while transmission.in_flight:
            replies.append((yield from transmission.next_reply()))
        return replies

    flush, first, second = steps(all_replies(), said)
    assert str(flush.error) == "EIO: oops"
    assert (first.data, second.data) == (b"12345678", bytes(4))


@IN_CHUNKS
@pytest.mark.parametrize("kind", [0, 1, 2, 5, 6, 7, 0x8001])
def test_a_length_that_nobody_asked_for_is_not_received(framing: Framing, kind: int) -> None:
    transmission = Transmission(framing, {0: "base:allocation"})
    transmission.request(Request(Command.READ, 0, 100))
    with pytest.raises(NBDError):
        steps(transmission.next_reply(), chunk(framing, kind, bytes(8), length=0xFFFFFFFF))


@IN_CHUNKS
@pytest.mark.parametrize(
    ("kind", "payload"),
    [(0, b""), (1, bytes(8 + 60)), (2, struct.pack(">QI", 0, 60)), (0x8001, struct.pack(">IH", 5, 0))],
)
def test_a_reply_without_end_is_an_error(framing: Framing, kind: int, payload: bytes) -> None:
    transmission = Transmission(framing, {0: "base:allocation"})
    transmission.request(Request(Command.READ, 0, 100))
    with pytest.raises(NBDError):
        steps(transmission.next_reply(), chunk(framing, kind, payload, flags=0) * 2000)


PIECES = st.one_of(
    st.binary(max_size=40),
    st.builds(reply, st.sampled_from([3, 6, 7, 8, 9, 10, 11]), st.sampled_from([1, 1, 2, 3, 4, 1 << 31 | 1]),
              st.one_of(st.binary(max_size=30), st.just(struct.pack(">HQH", 0, 1 << 20, 1)))),
)  # fmt: skip


@settings(max_examples=500, deadline=None)
@given(st.lists(PIECES, max_size=12), st.sampled_from(["list_exports", "info", "list_contexts", "go"]))
def test_whatever_a_server_says_in_the_handshake_is_understood_or_an_error(pieces: list[bytes], what: str) -> None:
    machine = ClientNegotiation()
    arguments = {"list_exports": (), "info": ("x",), "list_contexts": ("x", ()), "go": ("x", ("base:allocation",))}
    with suppress(NBDError, EOFError):
        steps(getattr(machine, what)(*arguments[what]), b"".join(pieces))
    assert machine.data_to_send().startswith(nbd.IHAVEOPT)


@settings(max_examples=300, deadline=None)
@given(st.data(), st.sampled_from(FRAMINGS), st.sampled_from([Command.READ, Command.BLOCK_STATUS, Command.FLUSH]))
def test_whatever_a_server_replies_is_understood_or_an_error(
    data: st.DataObject, framing: Framing, command: Command
) -> None:
    payloads = st.one_of(
        st.binary(max_size=40),
        st.builds(lambda at, more: struct.pack(">Q", at) + more, st.integers(0, 9), st.binary(max_size=9)),
        st.builds(lambda at, size: struct.pack(">QI", at, size), st.integers(0, 9), st.integers(0, 9)),
        st.just(struct.pack(">III", 0, 512, 3)),
        st.just(struct.pack(">IIQQ", 0, 1, 512, 3)),
    )
    kinds = st.sampled_from([0, 1, 2, 5, 6, 7, 0x8001, 0x8002, 0x8777])
    chunks = st.builds(
        lambda kind, payload, flags: chunk(framing, kind, payload, flags=flags), kinds, payloads, st.integers(0, 1)
    )
    simple = st.builds(
        lambda e, d: struct.pack(">IIQ", nbd.NBD_SIMPLE_REPLY_MAGIC, e, 1) + d, st.integers(0, 9), st.binary(max_size=9)
    )
    transmission = Transmission(framing, {0: "base:allocation"})
    transmission.request(Request(command, 0, 9 if command != Command.FLUSH else 0))
    said = b"".join(data.draw(st.lists(st.one_of(chunks, simple, st.binary(max_size=40)), max_size=6)))
    with suppress(NBDError, EOFError):
        answer = steps(transmission.next_reply(), said)
        assert answer.error or len(answer.data) == (9 if command == Command.READ else 0)
        assert answer.error or bool(answer.statuses) == (command == Command.BLOCK_STATUS)
