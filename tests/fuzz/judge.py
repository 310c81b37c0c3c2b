"""Holds what an NBD server answered against what its client had sent, both as bytes. Knows nothing of qcow2snap.nbd."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

from formats import nbd
from formats.nbd import Command, CommandFlag, Errno, InfoType, OptionType, ReplyChunkType, ReplyType, State
from tests.fuzz.sessions import COMPACT, COMPACT_MAGIC, EXTENDED, EXTENDED_MAGIC


class Disk(NamedTuple):
    """What an export holds, by its name: the judge's own knowledge of it."""

    content: bytes
    damaged: tuple[tuple[int, int], ...] = ()  # from, up to

    def __repr__(self) -> str:
        return f"{len(self.content)} bytes, damaged at {self.damaged}"


class Request(NamedTuple):
    flags: int
    type: int
    cookie: int
    offset: int
    length: int
    payload: bytes


class Answer(NamedTuple):
    """What a client makes of a reply. The runs of each metadata context that it told of, by the context's id."""

    error: int = 0
    data: bytes = b""
    status: tuple[tuple[int, tuple[tuple[int, int], ...]], ...] = ()


@dataclass
class Verdict:
    """A session that was held against the protocol and found right.

    options    each that was answered, with the type of its final reply
    answers    to each request that was answered whole, by its cookie
    requests   all that the client made, in its order, up to where it broke off
    broken     the client sent something that no server can answer: the session had to end there
    """

    options: list[tuple[int, int]] = field(default_factory=list)
    export: bytes | None = None
    answers: dict[int, Answer] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    broken: bool = False


class _Bytes:
    """Bytes that are taken from the front."""

    def __init__(self, data: bytes) -> None:
        self.left = memoryview(data)

    def take(self, count: int) -> bytes | None:
        """None if there are not so many."""
        if count > len(self.left):
            return None
        taken, self.left = self.left[:count], self.left[count:]
        return bytes(taken)

    def must(self, count: int) -> bytes:
        taken = self.take(count)
        assert taken is not None, "the server stopped in the middle of a reply"
        return taken


def judge(sent: bytes, got: bytes, disks: Mapping[bytes, Disk], *, cut: bool) -> Verdict:
    """Hold what the server said, `got`, against all that the client had `sent`. AssertionError if it broke a rule.

    `cut`: the server ended the session on account of the client. It then need not have answered all, and may have
    stopped anywhere between two replies.
    """
    verdict = Verdict()
    client, server = _Bytes(sent), _Bytes(got)
    assert server.must(18) == b"NBDMAGICIHAVEOPT\0\3"
    flags = client.take(4)
    if flags is None:
        assert not server.left
        return verdict
    if int.from_bytes(flags, "big") & ~3:
        verdict.broken = True
        assert cut
        assert not server.left
        return verdict
    agreement = _judge_handshake(client, server, disks, verdict, zeroes=not flags[3] & 2, cut=cut)
    if agreement is not None:
        _judge_transmission(client, server, agreement, verdict, cut=cut)
    assert not server.left, "the server says more than it was asked"
    assert cut or not verdict.broken, "the server goes on where it cannot know what the client means"
    return verdict


@dataclass
class _Agreement:
    disk: Disk
    structured: bool
    extended: bool
    contexts: int  # how many


def _judge_handshake(
    client: _Bytes, server: _Bytes, disks: Mapping[bytes, Disk], verdict: Verdict, *, zeroes: bool, cut: bool
) -> _Agreement | None:
    structured = extended = False
    selected: tuple[bytes, int] = (b"", 0)
    while (header := client.take(16)) is not None:
        magic, number, length = struct.unpack(">8sII", header)
        if magic != nbd.IHAVEOPT or length > 1 << 25:
            verdict.broken = True
            return None
        too_long = length > 1 << 16
        data = client.take(length)
        if data is None and not too_long:
            return None  # not yet whole: nothing may be said about it
        if number == OptionType.EXPORT_NAME:
            if not server.left:
                assert cut
                verdict.broken = True
                return None
            assert data is not None
            size, _ = struct.unpack(">QH", server.must(10))
            assert server.must(124 if zeroes else 0).count(0) == (124 if zeroes else 0)
            verdict.export = data
            return _agreement(disks, data, size, structured, extended, selected)
        if cut and not server.left:
            return None
        replies = list(_replies(server, number))
        final, _ = replies[-1]
        assert not (too_long and final == ReplyType.ACK)
        verdict.options.append((number, final))
        size = _judge_option(number, data, replies)
        if number == OptionType.SET_META_CONTEXT:
            name = _name(data) if data is not None else b""
            selected = (name, len(replies) - 1 if final == ReplyType.ACK else 0)
        if data is None:
            return None  # refused before it was whole
        if final == ReplyType.ACK:
            structured |= number == OptionType.STRUCTURED_REPLY
            extended |= number == OptionType.EXTENDED_HEADERS
            assert number != OptionType.STARTTLS, "no server here was told to speak TLS"
            if number == OptionType.ABORT:
                return None
            if number == OptionType.GO:
                assert data is not None
                verdict.export = _name(data)
                return _agreement(disks, verdict.export, size, structured, extended, selected)
    return None


def _agreement(
    disks: Mapping[bytes, Disk], name: bytes, size: int, structured: bool, extended: bool, selected: tuple[bytes, int]
) -> _Agreement:
    disk = disks[name]  # what is not there can neither be agreed on
    assert size == len(disk.content)
    return _Agreement(disk, structured or extended, extended, selected[1] if selected[0] == name else 0)


def _name(data: bytes) -> bytes:
    return data[4 : 4 + int.from_bytes(data[:4], "big")]


def _replies(server: _Bytes, number: int) -> Iterator[tuple[int, bytes]]:
    """The replies to one option: any number that say something, and then one that ends it."""
    while True:
        magic, option, kind, length = struct.unpack(">QIII", server.must(20))
        assert (magic, option) == (nbd.NBD_REP_MAGIC, number)
        data = server.must(length)
        yield kind, data
        if kind & nbd.REPLY_IS_ERROR:
            assert 0 < len(data) <= nbd.MAX_STRING, "an error without a message"
            data.decode()
            return
        if kind == ReplyType.ACK:
            assert not data
            return


_TELLS = {
    OptionType.LIST: ReplyType.SERVER,
    OptionType.INFO: ReplyType.INFO,
    OptionType.GO: ReplyType.INFO,
    OptionType.LIST_META_CONTEXT: ReplyType.META_CONTEXT,
    OptionType.SET_META_CONTEXT: ReplyType.META_CONTEXT,
}


def _judge_option(number: int, data: bytes | None, replies: list[tuple[int, bytes]]) -> int:
    """What an option's replies say, and the export's size if that is among it."""
    told, final = replies[:-1], replies[-1][0]
    assert all(kind == _TELLS[OptionType(number)] for kind, _ in told)
    if data is None:
        assert final != ReplyType.ACK
    if number not in list(OptionType):
        assert final == ReplyType.ERR_UNSUP
    if final != ReplyType.ACK:
        return 0
    if number == OptionType.SET_META_CONTEXT:
        ids = [reply[:4] for _, reply in told]
        assert len(set(ids)) == len(ids), "two contexts with one id"
    if number in (OptionType.SET_META_CONTEXT, OptionType.LIST_META_CONTEXT):
        names = [reply[4:] for _, reply in told]
        assert len(set(names)) == len(names), "one context twice"
        assert all(b":" in name for name in names)
    if number in (OptionType.INFO, OptionType.GO):
        kinds = [int.from_bytes(reply[:2], "big") for _, reply in told]
        assert kinds.count(InfoType.EXPORT) == 1
        assert len(set(kinds)) == len(kinds)
        size, flags = struct.unpack(">2xQH", told[kinds.index(InfoType.EXPORT)][1])
        assert flags & 1
        return int(size)
    return 0


def _judge_transmission(client: _Bytes, server: _Bytes, agreement: _Agreement, verdict: Verdict, *, cut: bool) -> None:
    layout, magic = (EXTENDED, EXTENDED_MAGIC) if agreement.extended else (COMPACT, COMPACT_MAGIC)
    while (header := client.take(layout.size)) is not None:
        found, *fields = layout.unpack(header)
        flags, command, _, _, length = fields
        if found != magic:
            verdict.broken = True
            break
        # Extended headers ask for the flag on a WRITE, which QEMU does not set.
        has_payload = command == Command.WRITE or (agreement.extended and flags & CommandFlag.PAYLOAD_LEN)
        if has_payload and length > nbd.MAX_PAYLOAD:
            verdict.broken = True
            break
        payload = client.take(length if has_payload else 0)
        if payload is None or command == Command.DISC:
            break
        verdict.requests.append(Request(*fields, payload))
    open_ = {request.cookie: request for request in verdict.requests}
    if len(open_) < len(verdict.requests):  # two with one cookie: allowed, but nobody can tell which answer is whose
        server.left = server.left[:0]
        return
    partial: dict[int, list[tuple[int, bytes]]] = {}  # replies may be mixed
    while server.left:
        cookie, done, chunk = _chunk(server, agreement, open_)
        chunks = partial.setdefault(cookie, [])
        chunks += chunk
        if done:
            verdict.answers[cookie] = _understood(open_.pop(cookie), partial.pop(cookie), agreement)
    assert cut or not (partial or open_), "a request was not answered"
    for request in verdict.requests:
        if request.cookie in verdict.answers:
            _judge_answer(request, verdict.answers[request.cookie], agreement)


def _chunk(
    server: _Bytes, agreement: _Agreement, open_: Mapping[int, Request]
) -> tuple[int, bool, list[tuple[int, bytes]]]:
    """A cookie, whether its reply ends here, and the type and payload of what came; a simple reply is one of both."""
    magic = int.from_bytes(server.left[:4], "big")
    if not agreement.structured:
        found, error, cookie = struct.unpack(">IIQ", server.must(16))
        assert found == nbd.NBD_SIMPLE_REPLY_MAGIC
        request = open_[cookie]
        if error:
            return cookie, True, [(ReplyChunkType.ERROR, struct.pack(">IH", error, 0))]
        if request.type != Command.READ:
            return cookie, True, []
        data = server.must(request.length)
        return cookie, True, [(ReplyChunkType.OFFSET_DATA, struct.pack(">Q", request.offset) + data)] if data else []
    if agreement.extended:
        assert magic == 0x6E8A278C
        _, flags, kind, cookie, offset, length = struct.unpack(">IHHQQQ", server.must(32))
        assert offset == open_[cookie].offset
    else:
        assert magic == nbd.NBD_STRUCTURED_REPLY_MAGIC
        _, flags, kind, cookie, length = struct.unpack(">IHHQI", server.must(20))
    assert flags in (0, 1)
    assert cookie in open_, "a reply to what was not asked, or a second one"
    payload = server.must(length)
    if kind == ReplyChunkType.NONE:
        assert (flags, payload) == (1, b"")
        return cookie, True, []
    return cookie, bool(flags), [(kind, payload)]


def _understood(request: Request, chunks: list[tuple[int, bytes]], agreement: _Agreement) -> Answer:
    data = bytearray(request.length if request.type == Command.READ and request.length <= nbd.MAX_PAYLOAD else 0)
    covered: list[tuple[int, int]] = []
    status: dict[int, tuple[tuple[int, int], ...]] = {}
    error = 0
    for kind, payload in chunks:
        if kind in (ReplyChunkType.OFFSET_DATA, ReplyChunkType.OFFSET_HOLE):
            assert request.type == Command.READ
            start = int.from_bytes(payload[:8], "big") - request.offset
            if kind == ReplyChunkType.OFFSET_DATA:
                length = len(payload) - 8
                data[start : start + length] = payload[8:]
            else:
                length = int.from_bytes(payload[8:], "big")
                assert len(payload) == 12
            assert 0 <= start < start + length <= request.length
            covered.append((start, start + length))
        elif kind == (ReplyChunkType.BLOCK_STATUS_EXT if agreement.extended else ReplyChunkType.BLOCK_STATUS):
            assert request.type == Command.BLOCK_STATUS
            context = int.from_bytes(payload[:4], "big")
            runs = struct.iter_unpack(*((">QQ", payload[8:]) if agreement.extended else (">II", payload[4:])))
            assert context not in status
            assert context < agreement.contexts
            status[context] = tuple((int(length), int(flags)) for length, flags in runs)
        else:
            assert kind in (ReplyChunkType.ERROR, ReplyChunkType.ERROR_OFFSET)
            assert not error
            error, size = struct.unpack_from(">IH", payload)
            assert error in list(Errno)
            payload[6 : 6 + size].decode()
            assert size or not agreement.structured, "an error without a message"
    covered.sort()
    assert all(one[1] <= other[0] for one, other in pairwise(covered)), "bytes twice"
    if request.type == Command.READ and not error:
        assert sum(stop - start for start, stop in covered) == request.length
    if request.flags & CommandFlag.DF:
        assert len(covered) <= 1
    return Answer(error, b"" if error else bytes(data), tuple(sorted(status.items())))


_KNOWN = {Command.READ, Command.WRITE, Command.FLUSH, Command.TRIM, Command.CACHE, Command.WRITE_ZEROES}
_WRITES = {Command.WRITE, Command.TRIM, Command.WRITE_ZEROES}


def _judge_answer(request: Request, answer: Answer, agreement: _Agreement) -> None:
    """What is answered, where the protocol leaves no choice."""
    disk = agreement.disk
    end = request.offset + request.length
    inside = end <= len(disk.content)
    if request.type not in _KNOWN | {Command.BLOCK_STATUS}:
        assert answer.error == Errno.EINVAL
    elif request.type in _WRITES:
        assert answer.error in (Errno.EPERM, Errno.EINVAL)
    elif request.type == Command.READ and request.length:
        sound = not request.flags & ~(int(CommandFlag.DF) if agreement.structured else 0) and inside
        if not sound or request.length > nbd.MAX_PAYLOAD:
            assert answer.error in (Errno.EINVAL, Errno.EOVERFLOW)
        elif any(start < end and request.offset < stop for start, stop in disk.damaged):
            assert answer.error == Errno.EIO, (request, answer)
        else:
            assert answer.error == 0
            assert answer.data == disk.content[request.offset : end]
    elif request.type == Command.BLOCK_STATUS:
        if not agreement.contexts or (not inside and not request.payload):
            assert answer.error == Errno.EINVAL
        for _, runs in answer.status:
            _judge_status(request, runs, disk)


def _judge_status(request: Request, runs: tuple[tuple[int, int], ...], disk: Disk) -> None:
    assert runs
    assert len(runs) == 1 or not request.flags & CommandFlag.REQ_ONE
    at = request.offset
    for length, flags in runs:
        assert length
        assert at + length <= len(disk.content)
        if flags & State.ZERO:
            assert not any(disk.content[at : at + length])
        at += length
