"""Fixed newstyle negotiation as a client: takes and gives bytes, and knows no socket.

What a method returns are the steps of one exchange with the server (`Steps`). Whoever runs them sends `data_to_send()`
before it receives what the next step wants.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from construct import ConstructError

from formats import nbd
from formats.nbd import ClientFlag, HandshakeFlag, InfoType, OptionType, ReplyType
from qcow2snap.block.node import NBDError
from qcow2snap.nbd.client.replies import ReplyError, Steps, parsed, text
from qcow2snap.nbd.framing import EXTENDED_HEADERS, SIMPLE_REPLIES, STRUCTURED_REPLIES, Framing
from qcow2snap.nbd.strings import is_string

MAX_REPLY = 1 << 16  # bytes of one option's reply: a name, a description and their lengths fit many times
MAX_REPLIES = 1 << 17  # to one option: the most snapshots, and a VM state of each
MAX_REPLIES_SIZE = 1 << 28  # bytes of all of them


class ListedExport(NamedTuple):
    """One entry of the server's list."""

    name: str
    description: str


class ExportInfo(NamedTuple):
    """What the server says about an export. Block sizes are None where it did not say."""

    size: int
    flags: int  # TransmissionFlag, and perhaps bits that are none
    name: str = ""
    description: str = ""
    minimum_block_size: int | None = None
    preferred_block_size: int | None = None
    maximum_payload_size: int | None = None


class ClientNegotiation:
    """The handshake of one connection: greet() first, then any of the others, and go() as the last.

    framing   what was agreed on so far
    contexts  names of the selected metadata contexts by id
    errors    ReplyError where the server said no: the handshake goes on. Any other NBDError: it cannot
    """

    def __init__(self, *, extended_headers: bool = True, structured_replies: bool = True) -> None:
        """Extended headers and structured replies are asked for unless told otherwise, and used if the server can."""
        self.framing: Framing = SIMPLE_REPLIES
        self.contexts: dict[int, str] = {}
        self._wanted: list[tuple[OptionType, Framing]] = []
        if extended_headers:
            self._wanted.append((OptionType.EXTENDED_HEADERS, EXTENDED_HEADERS))
        if structured_replies:
            self._wanted.append((OptionType.STRUCTURED_REPLY, STRUCTURED_REPLIES))
        self._to_try = list(self._wanted)
        self._out = b""

    def data_to_send(self) -> bytes:
        data, self._out = self._out, b""
        return data

    def greet(self) -> Steps[None]:
        greeting = yield nbd.Greeting.sizeof()
        try:
            flags = nbd.Greeting.parse(greeting).handshake_flags
        except ConstructError:
            raise NBDError("this is not a server of newstyle NBD") from None
        if not flags & HandshakeFlag.FIXED_NEWSTYLE:
            raise NBDError("the server does not speak fixed newstyle NBD")
        answer = {"client_flags": ClientFlag.FIXED_NEWSTYLE | flags & ClientFlag.NO_ZEROES}
        self._out += nbd.ClientFlags.build(answer)

    def starttls(self) -> Steps[None]:
        """Once these steps are done, the next bytes in both directions are TLS. What was agreed on before is void."""
        yield from self._option(OptionType.STARTTLS)
        self.framing, self.contexts = SIMPLE_REPLIES, {}
        self._to_try = list(self._wanted)

    def list_exports(self) -> Steps[list[ListedExport]]:
        exports = []
        for reply_type, data in (yield from self._option(OptionType.LIST)):
            if reply_type == ReplyType.SERVER:
                reply = parsed(nbd.ServerReply, data)
                exports.append(ListedExport(text(reply.name), text(reply.details)))
        return exports

    def info(self, name: str) -> Steps[ExportInfo]:
        """What there is to know about an export, without choosing it."""
        return (yield from self._ask(OptionType.INFO, name))

    def list_contexts(self, name: str, queries: Sequence[str]) -> Steps[list[str]]:
        """The metadata contexts of an export: all, or those that the queries mean."""
        yield from self._agree_on_framing()
        contexts = yield from self._meta_contexts(OptionType.LIST_META_CONTEXT, name, queries)
        return [context for _, context in contexts]

    def go(self, name: str, contexts: Sequence[str]) -> Steps[ExportInfo]:
        """Choose an export, with those of the metadata contexts that it has. The handshake ends with these steps."""
        self.contexts = {}
        yield from self._agree_on_framing()
        if self.framing.structured and contexts:
            with suppress(ReplyError):  # the server has none; or has no such export, as GO is about to say
                self.contexts = dict((yield from self._meta_contexts(OptionType.SET_META_CONTEXT, name, contexts)))
        return (yield from self._ask(OptionType.GO, name))

    def abort(self) -> Steps[None]:
        yield from self._option(OptionType.ABORT)

    def _agree_on_framing(self) -> Steps[None]:
        """The best that the server has, once. One that knows none of it speaks simple replies."""
        while self._to_try:
            option, framing = self._to_try.pop(0)
            with suppress(ReplyError):
                yield from self._option(option)
                self.framing = framing
                self._to_try = []

    def _ask(self, option: OptionType, name: str) -> Steps[ExportInfo]:
        wanted = [InfoType.NAME, InfoType.DESCRIPTION, InfoType.BLOCK_SIZE]
        data = nbd.InfoRequest.build({"name": _encoded(name), "number_of_requests": len(wanted), "requests": wanted})
        facts: dict[str, Any] = {}
        for reply_type, reply in (yield from self._option(option, data)):
            kind = int.from_bytes(reply[:2], "big")
            if reply_type == ReplyType.INFO and kind in _INFO_LAYOUTS:
                facts |= parsed(_INFO_LAYOUTS[kind], reply)
        if "size" not in facts:
            raise NBDError("the server accepted an export without telling its size")
        if facts["size"] >= 1 << 63:
            raise NBDError(f"the server tells a size that cannot be: {facts['size']} bytes")
        minimum, preferred, payload = (
            facts.get(f"{each}_size") for each in ("minimum_block", "preferred_block", "maximum_payload")
        )
        if minimum is not None and (minimum & (minimum - 1) or not 0 < minimum <= 1 << 16 or payload < minimum):
            raise NBDError(f"the server tells block sizes that cannot be: {minimum}, {preferred}, {payload}")
        return ExportInfo(
            facts["size"],
            facts["transmission_flags"],
            text(facts.get("name", name.encode())),
            text(facts.get("description", b"")),
            minimum,
            preferred,
            payload,
        )

    def _meta_contexts(self, option: OptionType, name: str, queries: Sequence[str]) -> Steps[list[tuple[int, str]]]:
        """Ids, which mean something after SET only, and names."""
        request = {
            "name": _encoded(name),
            "number_of_queries": len(queries),
            "queries": [_encoded(query) for query in queries],
        }
        replies = yield from self._option(option, nbd.MetaContextRequest.build(request))
        contexts = [parsed(nbd.MetaContextReply, data) for kind, data in replies if kind == ReplyType.META_CONTEXT]
        return [(context.context_id, text(context.name)) for context in contexts]

    def _option(self, option: OptionType, data: bytes = b"") -> Steps[list[tuple[int, bytes]]]:
        """The replies to an option up to its ACK. An error among them: ReplyError."""
        header = {"magic": nbd.IHAVEOPT, "option": option, "length": len(data)}
        self._out += nbd.OptionHeader.build(header) + data
        replies: list[tuple[int, bytes]] = []
        received = 0
        while received <= MAX_REPLIES_SIZE and len(replies) <= MAX_REPLIES:
            reply = parsed(nbd.OptionReplyHeader, (yield nbd.OptionReplyHeader.sizeof()))
            if reply.magic != nbd.NBD_REP_MAGIC or reply.option != option or reply.length > MAX_REPLY:
                raise NBDError(f"the server's reply to {option.name} is none")
            payload = (yield reply.length) if reply.length else b""
            received += len(payload)
            if reply.reply_type == ReplyType.ACK:
                return replies
            if reply.reply_type & nbd.REPLY_IS_ERROR:
                code = reply.reply_type & ~nbd.REPLY_IS_ERROR
                raise ReplyError(reply.reply_type, f"{option.name}: {text(payload) or f'error {code}'}")
            replies.append((reply.reply_type, payload))
        raise NBDError(f"the server does not come to an end with its replies to {option.name}")


_INFO_LAYOUTS: dict[int, Any] = {
    InfoType.EXPORT: nbd.InfoExport,
    InfoType.NAME: nbd.InfoName,
    InfoType.DESCRIPTION: nbd.InfoDescription,
    InfoType.BLOCK_SIZE: nbd.InfoBlockSize,
}


def _encoded(name: str) -> bytes:
    if not is_string(name):
        raise NBDError(f"{name[:100]!a}... is no name that NBD can carry: UTF-8 of at most {nbd.MAX_STRING} bytes")
    return name.encode()
