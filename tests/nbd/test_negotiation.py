"""The handshake, byte by byte and without a socket."""

from __future__ import annotations

import struct
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from formats import nbd
from formats.nbd import ClientFlag, InfoType, OptionType, ReplyType, TransmissionFlag
from qcow2snap.block.node import BlockNode, FileError, NBDError
from qcow2snap.nbd import negotiation as module
from qcow2snap.nbd.export import Export, Exports
from qcow2snap.nbd.framing import EXTENDED_HEADERS
from qcow2snap.nbd.negotiation import ServerNegotiation
from tests.nbd.support import ZeroNode, exports
from tests.nbd.wire import ask, meta

NO_ZEROES = ClientFlag.FIXED_NEWSTYLE | ClientFlag.NO_ZEROES
ERR = nbd.REPLY_IS_ERROR


class Session:
    """A client in a handshake, and what it got."""

    def __init__(self, what: Exports, flags: int = NO_ZEROES) -> None:
        self.server = ServerNegotiation(what)
        self.greeting = self.take()
        self.server.receive(struct.pack(">I", flags))

    def take(self) -> bytes:
        return b"".join(iter(self.server.data_to_send, b""))

    def option(self, option: int, data: bytes = b"", *, length: int | None = None) -> list[tuple[int, bytes]]:
        """Reply types and data of all replies."""
        self.server.receive(struct.pack(">8sII", nbd.IHAVEOPT, option, len(data) if length is None else length) + data)
        return replies(self.take(), option)

    def only(self, option: int, data: bytes = b"") -> int:
        """The type of the only reply."""
        [(reply_type, _)] = self.option(option, data)
        return reply_type

    def select(self, *queries: bytes, name: bytes = b"", option: int = OptionType.SET_META_CONTEXT) -> list[bytes]:
        """The contexts in the reply, which has to be a success."""
        *contexts, (last, _) = self.option(option, meta(*queries, name=name))
        assert last == ReplyType.ACK
        assert all(kind == ReplyType.META_CONTEXT for kind, _ in contexts)
        return [data[4:] for _, data in contexts]


def replies(data: bytes, option: int) -> list[tuple[int, bytes]]:
    found = []
    while data:
        magic, replied, reply_type, length = struct.unpack_from(">QIII", data)
        assert (magic, replied) == (nbd.NBD_REP_MAGIC, option)
        assert len(data) >= 20 + length
        found.append((reply_type, data[20 : 20 + length]))
        data = data[20 + length :]
    return found


@pytest.fixture
def session() -> Session:
    return Session(exports(default=ZeroNode(1000), monday=ZeroNode(5 << 30)))


def test_the_server_greets_first_with_fixed_newstyle(session: Session) -> None:
    assert session.greeting == b"NBDMAGICIHAVEOPT\0\3"


def test_list_shows_every_export_with_its_description(session: Session) -> None:
    expected = [
        (ReplyType.SERVER, struct.pack(">I13s", 0, b"about default")),
        (ReplyType.SERVER, struct.pack(">I6s12s", 6, b"monday", b"about monday")),
        (ReplyType.ACK, b""),
    ]
    assert session.option(OptionType.LIST) == expected
    assert session.option(OptionType.LIST) == expected, "a second time, too"


@pytest.mark.parametrize("option", [OptionType.INFO, OptionType.GO])
def test_info_tells_what_was_asked_for(session: Session, option: OptionType) -> None:
    asked = ask(b"monday", InfoType.BLOCK_SIZE, InfoType.NAME, InfoType.DESCRIPTION, 99)
    *information, (last, _) = session.option(option, asked)
    assert last == ReplyType.ACK
    flags = (
        TransmissionFlag.HAS_FLAGS | TransmissionFlag.READ_ONLY | TransmissionFlag.SEND_FLUSH
        | TransmissionFlag.CAN_MULTI_CONN | TransmissionFlag.SEND_CACHE
    )  # fmt: skip
    assert sorted(data for _, data in information) == [
        struct.pack(">HQH", InfoType.EXPORT, 5 << 30, flags),
        struct.pack(">H6s", InfoType.NAME, b"monday"),
        struct.pack(">H12s", InfoType.DESCRIPTION, b"about monday"),
        struct.pack(">HIII", InfoType.BLOCK_SIZE, 1, 4096, 1 << 25),
    ]
    assert session.server.ended == (option == OptionType.GO)


def test_do_not_fragment_is_offered_with_structured_replies_only(session: Session) -> None:
    def flags() -> int:
        replies = session.option(OptionType.INFO, ask())
        return int(struct.unpack(">HQH", replies[0][1])[2])

    assert not flags() & TransmissionFlag.SEND_DF
    assert session.only(OptionType.STRUCTURED_REPLY) == ReplyType.ACK
    assert flags() & TransmissionFlag.SEND_DF


@pytest.mark.parametrize(("flags", "zeroes"), [(NO_ZEROES, 0), (ClientFlag.FIXED_NEWSTYLE, 124), (0, 124)])
def test_export_name_ends_the_handshake_at_once(flags: int, zeroes: int) -> None:
    session = Session(exports(monday=ZeroNode(7)), flags)
    session.server.receive(struct.pack(">8sII6s", nbd.IHAVEOPT, OptionType.EXPORT_NAME, 6, b"monday") + b"request")
    assert struct.unpack_from(">Q", session.take()) == (7,)
    assert session.server.ended
    assert session.server.unused == b"request"
    other = Session(exports(monday=ZeroNode(7)), flags)
    other.server.receive(struct.pack(">8sII6s", nbd.IHAVEOPT, OptionType.EXPORT_NAME, 6, b"monday"))
    assert other.take()[10:] == bytes(zeroes)


@pytest.mark.parametrize("name", [b"friday", b"\xff", b"monday\0", b"x" * 4097, b"x" * 70000])
def test_export_name_of_nothing_is_cut_off(session: Session, name: bytes) -> None:
    session.server.receive(struct.pack(f">8sII{len(name)}s", nbd.IHAVEOPT, OptionType.EXPORT_NAME, len(name), name))
    with pytest.raises(NBDError, match="cut off"):
        session.take()


@pytest.mark.parametrize("option", [OptionType.INFO, OptionType.GO])
@pytest.mark.parametrize(
    ("data", "error"),
    [
        (ask(b"friday"), ReplyType.ERR_UNKNOWN),
        (ask(b"Monday"), ReplyType.ERR_UNKNOWN),
        (ask(b"x" * 4097), ReplyType.ERR_INVALID),
        (ask(b"\xff\xfe"), ReplyType.ERR_INVALID),
        (ask(b"a\0b"), ReplyType.ERR_INVALID),
        (b"", ReplyType.ERR_INVALID),
        (ask() + b"x", ReplyType.ERR_INVALID),
        (ask(b"monday")[:-1], ReplyType.ERR_INVALID),
        (struct.pack(">IH", 0xFFFFFFFF, 0), ReplyType.ERR_INVALID),
        (struct.pack(">IH", 0, 0xFFFF), ReplyType.ERR_TOO_BIG),
        (ask(b"", *range(1025)), ReplyType.ERR_TOO_BIG),
    ],
)
def test_a_bad_request_gets_an_error_and_the_handshake_goes_on(
    session: Session, option: OptionType, data: bytes, error: ReplyType
) -> None:
    assert session.only(option, data) == error
    assert session.option(OptionType.GO, ask())[-1] == (ReplyType.ACK, b"")


def test_error_messages_are_utf8_whatever_was_asked(session: Session) -> None:
    [(_, message)] = session.option(OptionType.GO, ask("über".encode() * 500))
    assert message.decode().startswith("no export is named")


def test_a_snapshot_that_cannot_be_opened_says_why_and_alone() -> None:
    def fail() -> BlockNode:
        raise FileError("disk.qcow2: its L1 table is \udcff gone")

    session = Session(Exports([Export("bad", fail), Export("good", lambda: ZeroNode(1))]))
    [(reply_type, message)] = session.option(OptionType.GO, ask(b"bad"))
    assert reply_type == ReplyType.ERR_UNKNOWN
    assert b"L1 table" in message
    assert session.option(OptionType.GO, ask(b"good"))[-1][0] == ReplyType.ACK


@pytest.mark.parametrize("option", [OptionType.LIST, OptionType.STRUCTURED_REPLY, OptionType.EXTENDED_HEADERS])
def test_options_without_data_refuse_data(session: Session, option: OptionType) -> None:
    assert session.only(option, b"x") == ReplyType.ERR_INVALID
    assert session.option(option)[-1][0] == ReplyType.ACK


@pytest.mark.parametrize("option", [0, 4, OptionType.STARTTLS, 12, 0xFFFFFFFF])
def test_unknown_options_are_refused_with_any_data(session: Session, option: int) -> None:
    assert session.only(option, b"whatever") == ReplyType.ERR_UNSUP
    assert session.only(option) == ReplyType.ERR_UNSUP


def test_abort_is_acknowledged_also_with_data(session: Session) -> None:
    assert session.only(OptionType.ABORT, b"bye") == ReplyType.ACK
    assert session.server.ended
    assert session.server.agreement is None


def test_too_much_data_is_passed_over_and_never_held(session: Session) -> None:
    size = module.MAX_SKIPPED_DATA
    assert session.option(OptionType.LIST, length=size) == [
        (ReplyType.ERR_TOO_BIG, b"an option may have 65536 bytes of data")
    ]
    for _ in range(size >> 16):
        session.server.receive(bytes(1 << 16))
        assert not session.take()
        assert len(session.server.unused) < 1 << 16
    assert session.option(OptionType.LIST)[-1][0] == ReplyType.ACK


@pytest.mark.parametrize("length", [module.MAX_SKIPPED_DATA + 1, 0xFFFFFFFF])
def test_an_option_of_gigabytes_is_cut_off(session: Session, length: int) -> None:
    with pytest.raises(NBDError, match="option of"):
        session.option(OptionType.LIST, length=length)


def test_a_client_that_goes_on_asking_is_cut_off(session: Session) -> None:
    for _ in range(module.MAX_OPTIONS):
        session.option(99)
    with pytest.raises(NBDError, match="more than 4096 options"):
        session.option(99)


@pytest.mark.parametrize("flags", [4, 1 << 31])
def test_unknown_client_flags_are_cut_off(flags: int) -> None:
    with pytest.raises(NBDError, match="unknown flags"):
        Session(exports(default=ZeroNode(1)), flags).take()


def test_a_wrong_magic_is_cut_off(session: Session) -> None:
    session.server.receive(b"GET / HTTP/1.1\r\n")
    with pytest.raises(NBDError, match="magic"):
        session.take()


def test_pipelined_lists_are_answered_piece_by_piece() -> None:
    many = Exports(Export(f"{i:04}" * 500, lambda: ZeroNode(1)) for i in range(1000))
    session = Session(many)
    session.server.receive(struct.pack(">8sII", nbd.IHAVEOPT, OptionType.LIST, 0) * 1000)
    for _ in range(100):
        assert 0 < len(session.server.data_to_send()) < module.PIECE + 4096


# Metadata contexts.


def test_contexts_need_structured_replies(session: Session) -> None:
    assert session.only(OptionType.SET_META_CONTEXT, meta(b"base:allocation")) == ReplyType.ERR_INVALID
    assert session.only(OptionType.LIST_META_CONTEXT, meta()) == ReplyType.ERR_INVALID


@pytest.mark.parametrize(
    ("queries", "listed", "selected"),
    [
        ((), [b"base:allocation", b"qemu:allocation-depth"], []),
        ((b"base:",), [b"base:allocation"], []),
        ((b"qemu:", b"base:"), [b"qemu:allocation-depth", b"base:allocation"], []),
        ((b"qemu:allocation-depth", b"qemu:"), [b"qemu:allocation-depth"], [b"qemu:allocation-depth"]),
        ((b"base:allocation",), [b"base:allocation"], [b"base:allocation"]),
        ((b"base:allocation", b"base:allocation"), [b"base:allocation"], [b"base:allocation"]),
        ((b"base:allocation", b"base:"), [b"base:allocation"], [b"base:allocation"]),
        ((b"base:alloc", b"qemu:dirty-bitmap:x", b"x-y:", b":", b"base:allocation:"), [], []),
    ],
)
def test_queries_mean_contexts(
    session: Session, queries: tuple[bytes, ...], listed: list[bytes], selected: list[bytes]
) -> None:
    session.option(OptionType.STRUCTURED_REPLY)
    assert session.select(*queries, option=OptionType.LIST_META_CONTEXT) == listed
    assert session.select(*queries) == selected


@pytest.mark.parametrize("option", [OptionType.SET_META_CONTEXT, OptionType.LIST_META_CONTEXT])
@pytest.mark.parametrize(
    ("data", "error"),
    [
        (meta(name=b"friday"), ReplyType.ERR_UNKNOWN),
        (meta(b"no colon"), ReplyType.ERR_INVALID),
        (meta(b"base:\xff"), ReplyType.ERR_INVALID),
        (meta(b"base:" + b"x" * 4092), ReplyType.ERR_INVALID),
        (meta(count=1), ReplyType.ERR_INVALID),
        (meta(count=0xFFFFFFFF), ReplyType.ERR_TOO_BIG),
        (meta(b"base:allocation") + b"x", ReplyType.ERR_INVALID),
        # What looks like the next option's header made qemu-nbd abort.
        (meta(b"base:allocation") + struct.pack(">8sII", nbd.IHAVEOPT, 3, 0), ReplyType.ERR_INVALID),
    ],
)
def test_bad_queries_get_an_error_and_the_handshake_goes_on(
    session: Session, option: OptionType, data: bytes, error: ReplyType
) -> None:
    session.option(OptionType.STRUCTURED_REPLY)
    assert session.only(option, data) == error
    assert session.select(b"base:allocation") == [b"base:allocation"]


@pytest.mark.parametrize(
    ("then", "kept"),
    [
        (lambda s: None, 1),
        (lambda s: s.select(b"base:allocation"), 1),
        (lambda s: s.select(b"base:allocation", name=b"monday"), 0),  # contexts belong to the name they were asked for
        (lambda s: s.select(), 0),
        (lambda s: s.only(OptionType.SET_META_CONTEXT, meta(b"no colon")), 0),  # a failure takes them back
        (lambda s: s.select(option=OptionType.LIST_META_CONTEXT), 1),
        (lambda s: s.option(OptionType.INFO, ask(b"monday")), 1),
    ],
)
def test_the_last_selection_counts_for_the_export_that_it_named(session: Session, then: Any, kept: int) -> None:
    session.option(OptionType.STRUCTURED_REPLY)
    session.select(b"base:allocation")
    then(session)
    session.option(OptionType.GO, ask())
    assert session.server.agreement is not None
    assert len(session.server.agreement.contexts) == kept


# Extended headers.


def flags_of(session: Session, option: int, name: bytes = b"") -> int:
    return int(struct.unpack(">HQH", session.option(option, ask(name))[0][1])[2])


@pytest.mark.parametrize("structured_first", [True, False])
def test_extended_headers_do_not_need_structured_replies(session: Session, structured_first: bool) -> None:
    if structured_first:
        assert session.only(OptionType.STRUCTURED_REPLY) == ReplyType.ACK
    assert session.only(OptionType.EXTENDED_HEADERS) == ReplyType.ACK
    assert session.select(b"base:allocation") == [b"base:allocation"]
    flags = flags_of(session, OptionType.GO)
    assert flags & TransmissionFlag.SEND_DF
    assert flags & TransmissionFlag.BLOCK_STATUS_PAYLOAD
    assert session.server.agreement is not None
    assert session.server.agreement.framing is EXTENDED_HEADERS


def test_there_is_no_way_back_from_extended_headers(session: Session) -> None:
    assert session.only(OptionType.EXTENDED_HEADERS) == ReplyType.ACK
    assert session.only(OptionType.STRUCTURED_REPLY) == ReplyType.ERR_EXT_HEADER_REQD
    assert session.only(OptionType.EXTENDED_HEADERS) == ReplyType.ACK
    flags_of(session, OptionType.GO)
    assert session.server.agreement is not None
    assert session.server.agreement.framing is EXTENDED_HEADERS


def test_contexts_may_be_selected_before_extended_headers(session: Session) -> None:
    session.option(OptionType.STRUCTURED_REPLY)
    session.select(b"base:allocation")
    session.option(OptionType.EXTENDED_HEADERS)
    assert flags_of(session, OptionType.GO) & TransmissionFlag.BLOCK_STATUS_PAYLOAD
    assert session.server.agreement is not None
    assert len(session.server.agreement.contexts) == 1


def test_a_payload_of_block_status_is_offered_where_there_is_a_status(session: Session) -> None:
    """As QEMU's server does: INFO tells what could be, GO what is."""
    payload = TransmissionFlag.BLOCK_STATUS_PAYLOAD
    session.option(OptionType.STRUCTURED_REPLY)
    assert not flags_of(session, OptionType.INFO) & payload
    session.option(OptionType.EXTENDED_HEADERS)
    assert flags_of(session, OptionType.INFO) & payload
    assert not flags_of(session, OptionType.GO) & payload


def test_export_name_does_not_go_with_extended_headers(session: Session) -> None:
    session.option(OptionType.EXTENDED_HEADERS)
    session.server.receive(struct.pack(">8sII", nbd.IHAVEOPT, OptionType.EXPORT_NAME, 0))
    with pytest.raises(NBDError, match="extended headers"):
        session.take()


# Any client at all.

OPTION_DATA = st.one_of(
    st.binary(max_size=40),
    st.builds(ask, st.sampled_from([b"", b"monday", b"x", b"\xff"]), *[st.integers(0, 5)] * 2),
    st.builds(meta, st.sampled_from([b"base:", b"base:allocation", b"x"]), name=st.sampled_from([b"", b"monday"])),
)
OPTIONS = st.builds(
    lambda option, data: struct.pack(">8sII", nbd.IHAVEOPT, option, len(data)) + data, st.integers(0, 12), OPTION_DATA
)
MESSAGES = st.one_of(OPTIONS, st.binary(max_size=30))


@settings(max_examples=3000, deadline=None)
@given(st.lists(MESSAGES, max_size=8), st.integers(1, 50))
def test_any_session_is_answered_in_whole_replies_or_cut_off(messages: list[bytes], piece: int) -> None:
    """And it makes no difference in what pieces it arrives."""

    def talk(size: int) -> tuple[bytes, bool, bool]:
        session = Session(exports(default=ZeroNode(1000), monday=ZeroNode(5 << 30)))
        data, out = b"".join(messages), b""
        try:
            for start in range(0, len(data), size):
                if session.server.ended:
                    break
                session.server.receive(data[start : start + size])
                out += session.take()
        except NBDError:
            return out, False, True
        agreed = session.server.agreement is not None
        return out, agreed, False

    whole, pieces = talk(1 << 20), talk(piece)
    if not whole[2]:  # what came before a cut may or may not have been answered
        assert pieces == whole
    start = 0
    out = pieces[0]
    while start < len(out):
        magic, _, _, length = struct.unpack_from(">QIII", out, start) if len(out) - start >= 20 else (0, 0, 0, 0)
        if magic != nbd.NBD_REP_MAGIC:
            assert pieces[1]  # the answer to EXPORT_NAME
            assert len(out) - start == 10
            break
        start += 20 + length
