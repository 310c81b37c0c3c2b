"""NBD sessions made from any bytes, sound and broken: what a client sends. What is to be answered, `judge` knows.

Used by the atheris target (nbd.py) and by the property tests in tests/nbd/test_sessions.py.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from typing import TypeVar

from formats import nbd
from formats.nbd import Command, CommandFlag, OptionType

T = TypeVar("T")

COMPACT, EXTENDED = struct.Struct(">IHHQQI"), struct.Struct(">IHHQQQ")
COMPACT_MAGIC, EXTENDED_MAGIC = 0x25609513, 0x21E41C71


class Choices:
    """Choices that bytes make: the same bytes, the same choices. When they are used up, always the first one."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def number(self, limit: int) -> int:
        """From 0 up to, not including, `limit`."""
        size = (limit.bit_length() + 7) // 8
        taken = self._data[self._at : self._at + size]
        self._at += size
        return int.from_bytes(taken, "big") % limit

    def pick(self, options: Sequence[T]) -> T:
        return options[self.number(len(options))]

    def some(self, limit: int) -> bytes:
        """Bytes, at most `limit` of them."""
        count = self.number(limit + 1)
        taken = self._data[self._at : self._at + count]
        self._at += count
        return taken.ljust(count, b"\x99")

    def pieces(self, data: bytes) -> Iterator[bytes]:
        """The same bytes, cut anywhere."""
        sizes = self.pick([(1 << 30,), (1,), (7, 1, 16), (1 << 12,), (17, 300)])
        start = turn = 0
        while start < len(data):
            size = sizes[turn % len(sizes)] if turn < 300 else 1 << 14
            yield data[start : start + size]
            start += size
            turn += 1


NAMES = [b"", b"good", b"bad", b"none", b"closed", "ü".encode() * 9, b"\xff", b"a\0b", b"x" * 4096, b"y" * 4097]
QUERIES = [b"base:allocation", b"base:", b"base:x", b"qemu:allocation-depth", b"no colon", b":", b"\xff:", b"z:" * 2100]


def handshake(choices: Choices) -> bytes:
    """A client's side of a handshake, more or less."""
    out = struct.pack(">I", choices.pick([3, 3, 3, 3, 3, 1, 0, 2, 4, 0xFFFFFFFF]))
    for _ in range(choices.number(7)):
        if not choices.number(20):
            out += choices.some(40)  # no option at all
            continue
        number = choices.pick([6, 7, 3, 8, 9, 10, 10, 6, 3, 2, 1, 5, 11, 0, 4, 12, 0xFFFFFFFF])
        data = _option_data(choices, number)
        length = len(data) if choices.number(16) else choices.pick([0, len(data) + 1, 1 << 16, 1 << 25, (1 << 32) - 1])
        out += struct.pack(">8sII", nbd.IHAVEOPT, number, length) + data
    return out


def _option_data(choices: Choices, number: int) -> bytes:
    name = choices.pick(NAMES)
    data = b""
    if number == OptionType.EXPORT_NAME:
        data = name
    elif number in (OptionType.INFO, OptionType.GO):
        asked = [choices.number(6) for _ in range(choices.number(4))]
        data = struct.pack(f">I{len(name)}sH{len(asked)}H", len(name), name, len(asked), *asked)
    elif number in (OptionType.LIST_META_CONTEXT, OptionType.SET_META_CONTEXT):
        queries = [choices.pick(QUERIES) for _ in range(choices.number(4))]
        data = struct.pack(f">I{len(name)}sI", len(name), name, len(queries))
        data += b"".join(struct.pack(f">I{len(query)}s", len(query), query) for query in queries)
    damage = choices.number(12)
    if damage == 1:
        data += choices.some(30)
    elif damage == 2:
        data = data[: choices.number(len(data) + 1)]
    elif damage == 3 and data:
        at = choices.number(len(data))
        data = data[:at] + choices.some(4) + data[at + 4 :]
    elif damage == 4:
        data += struct.pack(">8sII", nbd.IHAVEOPT, OptionType.LIST, 0)  # in the data, it is no option
    elif damage == 5:
        data += bytes(1 << choices.number(18))
    return data


MODES = ["simple", "structured", "extended"]


def agreed(mode: str, name: bytes, *, contexts: bool = True) -> bytes:
    """A handshake without fault, up to the transmission."""
    out = struct.pack(">I", 3)
    if mode != "simple":
        number = OptionType.EXTENDED_HEADERS if mode == "extended" else OptionType.STRUCTURED_REPLY
        out += struct.pack(">8sII", nbd.IHAVEOPT, number, 0)
        if contexts:
            query = QUERIES[0]
            data = struct.pack(f">I{len(name)}sII{len(query)}s", len(name), name, 1, len(query), query)
            out += struct.pack(">8sII", nbd.IHAVEOPT, OptionType.SET_META_CONTEXT, len(data)) + data
    data = struct.pack(f">I{len(name)}sH", len(name), name, 0)
    return out + struct.pack(">8sII", nbd.IHAVEOPT, OptionType.GO, len(data)) + data


def going_on(choices: Choices, size: int) -> bytes:
    """What may follow a handshake that has not ended: an export of `size` bytes is chosen, and used."""
    if choices.number(2):
        return b""
    data = struct.pack(">I4sH", 4, b"good", 0)
    return struct.pack(">8sII", nbd.IHAVEOPT, OptionType.GO, len(data)) + data + requests(choices, size, extended=False)


def requests(choices: Choices, size: int, *, extended: bool) -> bytes:
    """What a client sends to an export of `size` bytes, more or less. Each request has a cookie of its own."""
    out = b""
    layout, magic = (EXTENDED, EXTENDED_MAGIC) if extended else (COMPACT, COMPACT_MAGIC)
    for cookie in range(choices.number(8)):
        if not choices.number(24):
            out += choices.some(40)  # no request at all
            continue
        command = choices.pick([0, 0, 0, 7, 0, 7, 5, 3, 1, 4, 6, 8, 99, 0xFFFF, 2])
        flags = choices.pick([0, 0, 0, 0, 4, 8, 1, 32, 2, 16, 64, 0xFFFF])
        offset = choices.pick([0, 1, 512, size - 1, size, size + 1, 1 << 63, (1 << 64) - 1, -1])
        offset = choices.number(size) if offset < 0 else offset
        length = choices.pick([512, 1, 4096, size, size + 1, 0, 1 << 25, (1 << 25) + 1, (1 << 32) - 1, -1, -1])
        length = choices.number(max(1, size - min(offset, size))) + 1 if length < 0 else length
        payload = b""
        if command == Command.WRITE or (extended and flags & CommandFlag.PAYLOAD_LEN):
            length = length if length > 1 << 25 else min(length, 5000)
            payload = bytes(min(length, 5000))
            if command == Command.BLOCK_STATUS:
                payload = struct.pack(">Q", choices.number(size + 2)) + bytes(4 * choices.number(3)) + choices.some(3)
                length = len(payload)
        elif extended and not choices.number(9):
            length = choices.pick([1 << 32, 1 << 40, 1 << 63, (1 << 64) - 1])
        out += layout.pack(magic, flags, command, cookie, offset, length) + payload
    return out
