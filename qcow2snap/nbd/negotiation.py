"""Fixed newstyle negotiation as a server: takes and gives bytes, and knows no socket, no clock and no thread.

Every option has one handler, a generator of reply messages. Only as many are made as are sent at once, so that neither
a long list nor a client that pipelines a thousand options makes the server hold more than a piece of the answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from enum import Enum
from itertools import islice
from typing import Any, NamedTuple

from construct import CheckError, ConstructError

from formats import nbd
from formats.nbd import ClientFlag, HandshakeFlag, InfoType, OptionType, ReplyType, TransmissionFlag
from qcow2snap.block.node import BlockNode, NBDError, Qcow2SnapError
from qcow2snap.nbd.contexts import Contexts, MetaContext
from qcow2snap.nbd.export import Export, Exports
from qcow2snap.nbd.framing import EXTENDED_HEADERS, SIMPLE_REPLIES, STRUCTURED_REPLIES, Framing
from qcow2snap.nbd.strings import message

MAX_OPTION_DATA = 1 << 16  # bytes: room for every honest option. More is passed over and refused.
MAX_SKIPPED_DATA = 1 << 25  # bytes: more than this is no mistake but an attack
MAX_OPTIONS = 4096  # of one connection
MAX_CONTEXTS = 64  # that a client may select
PIECE = 1 << 16  # bytes of replies made at once, give or take one reply

HANDSHAKE_FLAGS = HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES

_IN_THE_CLEAR = "the client sent more in the clear behind NBD_OPT_STARTTLS, where TLS has to begin"

_WRITING = (
    TransmissionFlag.SEND_FUA
    | TransmissionFlag.SEND_TRIM
    | TransmissionFlag.SEND_WRITE_ZEROES
    | TransmissionFlag.SEND_FAST_ZERO
)


class Agreement(NamedTuple):
    """What client and server agreed on: how the transmission phase goes. A context's id is its index.

    Extended headers take the place of structured replies, whether or not those were asked for as well.
    """

    export: Export
    node: BlockNode
    structured_replies: bool = False
    contexts: tuple[MetaContext, ...] = ()
    extended_headers: bool = False

    @property
    def framing(self) -> Framing:
        if self.extended_headers:
            return EXTENDED_HEADERS
        return STRUCTURED_REPLIES if self.structured_replies else SIMPLE_REPLIES

    @property
    def transmission_flags(self) -> TransmissionFlag:
        """All features that this server has for the export, and no other.

        Connections share the node, so what one flushes is all that was written: any number of them make one disk.
        """
        flags = TransmissionFlag.HAS_FLAGS | TransmissionFlag.CAN_MULTI_CONN
        flags |= TransmissionFlag.SEND_FLUSH | TransmissionFlag.SEND_CACHE
        if not self.node.read_only:
            flags |= _WRITING
        elif self.export.may_trim:
            flags |= TransmissionFlag.SEND_TRIM  # what says that it is read-only has to refuse TRIM
        else:
            flags |= TransmissionFlag.READ_ONLY
        if self.structured_replies or self.extended_headers:
            flags |= TransmissionFlag.SEND_DF
        if self.extended_headers and self.contexts:
            flags |= TransmissionFlag.BLOCK_STATUS_PAYLOAD
        return flags


class TLSMode(Enum):
    """Whether clients may change over to TLS, named as in nbdkit: NOTLS, SELECTIVETLS and FORCEDTLS of the document."""

    OFF = "off"
    ON = "on"
    REQUIRE = "require"


class _Refused(Exception):
    """An option's answer is this error."""

    def __init__(self, reply_type: ReplyType, text: str) -> None:
        super().__init__(text)
        self.reply_type = reply_type


Answer = Iterator[tuple[int, bytes]]  # reply type and data


class ServerNegotiation:
    """One client's handshake. Send `data_to_send()` until it is empty, feed `receive()`, and so on until `ended`.

    agreement   set when the client has chosen an export: transmission begins after the last data to send
    unused      bytes that came after the last option: the first requests
    starts_tls  TLS begins after the last data to send: call tls_started(), then go on with what comes through it
    errors      NBDError: the client broke the protocol in a way that has no answer, and is to be cut off
    """

    def __init__(self, exports: Exports, tls: TLSMode = TLSMode.OFF) -> None:
        self.agreement: Agreement | None = None
        self._exports = exports
        self._tls = tls
        self._is_secure = False
        self._wants_tls = False
        self._received = bytearray()
        self._skip = 0  # bytes of data that are passed over as they arrive
        self._over = False
        self._client_flags: int | None = None
        self._options = 0
        self._answered = 0  # the option whose answer is being given
        self._answer: Answer | None = None
        self._greeting = nbd.Greeting.build({"handshake_flags": HANDSHAKE_FLAGS})
        self._structured_replies = False
        self._extended_headers = False
        self._selected: tuple[str, tuple[MetaContext, ...]] = ("", ())  # for an export's name as the client gave it

    @property
    def ended(self) -> bool:
        """Nothing more is to be received, and nothing to be sent."""
        return self._over and self._answer is None

    @property
    def starts_tls(self) -> bool:
        return self._wants_tls and self._answer is None

    def tls_started(self) -> None:
        """All that was agreed on in the clear is void: somebody else may have said it ("NBD_OPT_STARTTLS")."""
        self._wants_tls = False
        self._is_secure = True
        self._structured_replies = False
        self._extended_headers = False
        self._selected = ("", ())

    @property
    def unused(self) -> bytes:
        return bytes(self._received)

    def receive(self, data: bytes | bytearray | memoryview) -> None:
        """Take what arrived, in pieces of any size. Once the answers are taken, little is ever kept."""
        if self._wants_tls:
            raise NBDError(_IN_THE_CLEAR)
        self._received += data
        self._pass_over()

    def data_to_send(self) -> bytes:
        """The next of the answers to what was received, about 64 KiB of them; empty when more has to arrive."""
        out = bytearray(self._greeting)
        self._greeting = b""
        while len(out) < PIECE:
            if self._answer is None and not self._next_option(out):
                break
            if self._answer is not None:
                out += self._next_reply()
        return bytes(out)

    def _next_reply(self) -> bytes:
        assert self._answer is not None
        try:
            return _reply(self._answered, *next(self._answer))
        except StopIteration:
            self._answer = None
            return b""
        except _Refused as refused:
            self._answer = None
            return _reply(self._answered, refused.reply_type, message(str(refused)))

    def _next_option(self, out: bytearray) -> bool:
        """Begin to answer what was received next. False if that has not arrived whole."""
        if self._over or self._skip or self._wants_tls:
            return False
        if self._client_flags is None:
            return self._take_client_flags()
        if len(self._received) < nbd.OptionHeader.sizeof():
            return False
        header = nbd.OptionHeader.parse(self._received)
        if header.magic != nbd.IHAVEOPT:
            raise NBDError("the client sent no option where one has to be: its magic number is wrong")
        if header.length > MAX_SKIPPED_DATA:
            raise NBDError(f"the client sent an option of {header.length} bytes")
        start = nbd.OptionHeader.sizeof()
        fits = header.length <= MAX_OPTION_DATA
        if fits and len(self._received) < start + header.length:
            return False
        self._options += 1
        if self._options > MAX_OPTIONS:
            raise NBDError(f"the client sent more than {MAX_OPTIONS} options")
        if fits:
            data = bytes(self._received[start : start + header.length])
            del self._received[: start + header.length]
        else:
            data = b""
            del self._received[:start]
            self._skip = header.length
            self._pass_over()
        self._answered = header.option
        if self._must_refuse_without_tls(header.option):
            self._answer = _refuse(ReplyType.ERR_TLS_REQD, "this server speaks with you by TLS only: start that first")
        elif header.option == OptionType.EXPORT_NAME:
            out += self._export_name(data if fits else None)
        elif header.option not in self._HANDLERS:
            self._answer = _refuse(ReplyType.ERR_UNSUP, "this server does not know the option")
        elif not fits:
            self._answer = _refuse(ReplyType.ERR_TOO_BIG, f"an option may have {MAX_OPTION_DATA} bytes of data")
        else:
            self._answer = self._HANDLERS[header.option](self, data)
        return True

    def _must_refuse_without_tls(self, option: int) -> bool:
        if self._tls is not TLSMode.REQUIRE or self._is_secure:
            return False
        if option == OptionType.EXPORT_NAME:
            raise NBDError("the client asked by NBD_OPT_EXPORT_NAME without TLS, which can only be cut off")
        return option not in (OptionType.STARTTLS, OptionType.ABORT)

    def _pass_over(self) -> None:
        passed = min(self._skip, len(self._received))
        del self._received[:passed]
        self._skip -= passed

    def _take_client_flags(self) -> bool:
        size = nbd.ClientFlags.sizeof()
        if len(self._received) < size:
            return False
        flags = int(nbd.ClientFlags.parse(self._received).client_flags)
        del self._received[:size]
        # A client that does not claim fixed newstyle may still speak it: that much leniency is allowed, and free.
        if flags & ~int(ClientFlag.FIXED_NEWSTYLE | ClientFlag.NO_ZEROES):
            raise NBDError(f"the client set unknown flags: {flags:#x}")
        self._client_flags = flags
        return True

    # One handler for each option. What a handler raises or yields last is the final reply.

    def _export_name(self, data: bytes | None) -> bytes:
        """The one option whose answer has no header, and no way to say no."""
        if self._extended_headers:
            raise NBDError("the client asked by NBD_OPT_EXPORT_NAME, which does not go with its extended headers")
        try:
            if data is None:
                raise _Refused(ReplyType.ERR_TOO_BIG, "the export's name is too long")
            agreement = self._agreement(_string(data))
        except _Refused as refused:
            raise NBDError(f"the client asked by NBD_OPT_EXPORT_NAME, which can only be cut off: {refused}") from None
        self._agree(agreement)
        size_and_flags = {"size": agreement.node.size, "transmission_flags": agreement.transmission_flags}
        reply = nbd.ExportNameReply.build(size_and_flags)
        zeroes = b"" if (self._client_flags or 0) & ClientFlag.NO_ZEROES else nbd.EXPORT_NAME_ZEROES
        return bytes(reply + zeroes)

    def _abort(self, data: bytes) -> Answer:
        self._over = True
        yield ReplyType.ACK, b""

    def _list(self, data: bytes) -> Answer:
        _expect_no_data(data)
        for export in self._exports:
            details = message(export.description)
            yield ReplyType.SERVER, nbd.ServerReply.build({"name": export.name.encode(), "details": details})
        yield ReplyType.ACK, b""

    def _info(self, data: bytes) -> Answer:
        request = _parse(nbd.InfoRequest, data)
        agreement = self._agreement(_string(request.name))
        flags = agreement.transmission_flags
        if self._extended_headers:
            flags |= (
                TransmissionFlag.BLOCK_STATUS_PAYLOAD
            )  # there would be contexts to select, as QEMU's server says it
        yield from self._information(agreement, flags, request.requests)
        yield ReplyType.ACK, b""

    def _go(self, data: bytes) -> Answer:
        request = _parse(nbd.InfoRequest, data)
        agreement = self._agreement(_string(request.name))
        yield from self._information(agreement, agreement.transmission_flags, request.requests)
        self._agree(agreement)
        yield ReplyType.ACK, b""

    def _starttls(self, data: bytes) -> Answer:
        if self._tls is TLSMode.OFF:
            raise _Refused(ReplyType.ERR_UNSUP, "this server has no TLS: it was started without --tls")
        _expect_no_data(data)
        if self._is_secure:
            raise _Refused(ReplyType.ERR_INVALID, "this is TLS already")
        if self._received:  # by whoever sits between us and the client, to be taken for the client's
            raise NBDError(_IN_THE_CLEAR)
        self._wants_tls = True
        yield ReplyType.ACK, b""

    def _structured_reply(self, data: bytes) -> Answer:
        _expect_no_data(data)
        if self._extended_headers:
            raise _Refused(ReplyType.ERR_EXT_HEADER_REQD, "extended headers were negotiated, there is no way back")
        self._structured_replies = True
        yield ReplyType.ACK, b""

    def _enable_extended_headers(self, data: bytes) -> Answer:
        _expect_no_data(data)
        self._extended_headers = True
        yield ReplyType.ACK, b""

    def _list_meta_context(self, data: bytes) -> Answer:
        _, queries, available = self._meta_context_request(data)
        for context in available.matching(queries, wildcards=True) if queries else available:
            yield ReplyType.META_CONTEXT, nbd.MetaContextReply.build({"context_id": 0, "name": context.name.encode()})
        yield ReplyType.ACK, b""

    def _set_meta_context(self, data: bytes) -> Answer:
        self._selected = ("", ())  # also where the request then fails
        name, queries, available = self._meta_context_request(data)
        contexts = tuple(islice(available.matching(queries, wildcards=False), MAX_CONTEXTS + 1))
        if len(contexts) > MAX_CONTEXTS:
            raise _Refused(ReplyType.ERR_TOO_BIG, f"a client may select {MAX_CONTEXTS} contexts")
        self._selected = (name, contexts)
        for number, context in enumerate(contexts):
            reply = {"context_id": number, "name": context.name.encode()}
            yield ReplyType.META_CONTEXT, nbd.MetaContextReply.build(reply)
        yield ReplyType.ACK, b""

    # All that this server speaks. Any other option is answered with ERR_UNSUP, as the protocol asks.
    _HANDLERS: dict[int, Callable[[ServerNegotiation, bytes], Answer]] = {
        OptionType.ABORT: _abort,
        OptionType.LIST: _list,
        OptionType.INFO: _info,
        OptionType.GO: _go,
        OptionType.STARTTLS: _starttls,
        OptionType.STRUCTURED_REPLY: _structured_reply,
        OptionType.LIST_META_CONTEXT: _list_meta_context,
        OptionType.SET_META_CONTEXT: _set_meta_context,
        OptionType.EXTENDED_HEADERS: _enable_extended_headers,
    }

    # What the handlers share.

    def _agreement(self, name: str) -> Agreement:
        export = self._exports.find(name)
        if export is None:
            what = f"no export is named {name[:200]!a}" if name else "there is no default export"
            raise _Refused(ReplyType.ERR_UNKNOWN, f'{what}; to see those that are, try "nbdinfo --list"')
        try:
            node = export.node
        except Qcow2SnapError as error:
            raise _Refused(ReplyType.ERR_UNKNOWN, f"the export cannot be opened: {error}") from error
        selected_for, contexts = self._selected
        if selected_for != name:
            contexts = ()
        return Agreement(export, node, self._structured_replies, contexts, self._extended_headers)

    def _agree(self, agreement: Agreement) -> None:
        self.agreement = agreement
        self._over = True

    def _information(self, agreement: Agreement, flags: TransmissionFlag, requests: Sequence[int]) -> Answer:
        """The size and flags, and of the rest what the client asked for."""
        export = agreement.export
        size_and_flags = {"size": agreement.node.size, "transmission_flags": flags}
        yield ReplyType.INFO, nbd.InfoExport.build(size_and_flags)
        if InfoType.NAME in requests:
            yield ReplyType.INFO, nbd.InfoName.build({"name": export.name.encode()})
        if InfoType.DESCRIPTION in requests and export.description:
            yield ReplyType.INFO, nbd.InfoDescription.build({"description": message(export.description)})
        if InfoType.BLOCK_SIZE in requests:
            sizes = {
                "minimum_block_size": 1,
                "preferred_block_size": export.preferred_block_size,
                "maximum_payload_size": nbd.MAX_PAYLOAD,
            }
            yield ReplyType.INFO, nbd.InfoBlockSize.build(sizes)

    def _meta_context_request(self, data: bytes) -> tuple[str, list[str], Contexts]:
        """The export's name, the queries, and the contexts that there are."""
        if not (self._structured_replies or self._extended_headers):
            text = "structured replies or extended headers have to be negotiated first"
            raise _Refused(ReplyType.ERR_INVALID, text)
        request = _parse(nbd.MetaContextRequest, data)
        name = _string(request.name)
        queries = [_string(query) for query in request.queries]
        if any(":" not in query for query in queries):
            raise _Refused(ReplyType.ERR_INVALID, "a query begins with a namespace and a colon")
        return name, queries, self._agreement(name).export.contexts


def _reply(option: int, reply_type: int, data: bytes) -> bytes:
    header = {"magic": nbd.NBD_REP_MAGIC, "option": option, "reply_type": reply_type, "length": len(data)}
    return bytes(nbd.OptionReplyHeader.build(header)) + data


def _refuse(reply_type: ReplyType, text: str) -> Answer:
    yield reply_type, message(text)


def _expect_no_data(data: bytes) -> None:
    if data:
        raise _Refused(ReplyType.ERR_INVALID, "this option has no data")


def _parse(layout: Any, data: bytes) -> Any:
    """The option's data, which must be all that the layout says and not a byte more."""
    try:
        return layout.parse(data)
    except CheckError:
        raise _Refused(ReplyType.ERR_TOO_BIG, f"more than {nbd.MAX_REQUEST_ITEMS} requests or queries") from None
    except ConstructError:
        raise _Refused(ReplyType.ERR_INVALID, "lengths in the option's data do not add up to its length") from None


def _string(data: bytes) -> str:
    if len(data) > nbd.MAX_STRING:
        raise _Refused(ReplyType.ERR_INVALID, f"a string has {len(data)} bytes, {nbd.MAX_STRING} are allowed")
    try:
        text = data.decode()
    except UnicodeDecodeError:
        raise _Refused(ReplyType.ERR_INVALID, "a string is not UTF-8") from None
    if "\0" in text:
        raise _Refused(ReplyType.ERR_INVALID, "a string has a NUL in it")
    return text
