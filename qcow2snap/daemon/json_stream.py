"""JSON values out of a stream of bytes that arrive in pieces of any size (QEMU qobject/json-streamer.c). No protocol.

As in QEMU, strings may stand in single quotes, values need nothing between them, and after what is no JSON the stream
is read on: at the end of the line, or behind the brackets that belong together.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from qcow2snap.block.node import InvalidOption

MAX_VALUE = 1 << 20  # bytes of one value; QEMU takes 64 MiB
MAX_DEPTH = 256  # of brackets; QEMU takes 1,024

_SPACE = b" \t\r\n"
_NEXT = re.compile(rb"[\[\]{}\"']")
_IN_STRING = {quote: re.compile(rb"\\|" + quote) for quote in (b'"', b"'")}
_WORD_END = re.compile(rb"[\s\[\]{}\"',:]")
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"|\'(?:[^\'\\]|\\.)*\'', re.DOTALL)


class JSONStream:
    """Feed it what arrives; it gives values, or the InvalidOption that says why there is none.

    memory  one value that is not whole yet, of MAX_VALUE bytes at most
    """

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._reset()

    def _reset(self) -> None:
        self._position = 0  # looked at up to here
        self._depth = 0
        self._quote = b""

    def feed(self, data: bytes) -> Iterator[Any]:
        self._buffer += data
        while (end := self._end_of_value()) is not None:
            text = bytes(self._buffer[:end])
            del self._buffer[:end]
            self._reset()
            yield _value(text)
        if len(self._buffer) > MAX_VALUE:
            self._buffer.clear()
            self._reset()
            yield InvalidOption(f"JSON token size limit exceeded: {MAX_VALUE} bytes are all that a value may have")

    def _end_of_value(self) -> int | None:
        """Where the first value in the buffer ends. None: it is not whole."""
        if not self._depth and not self._quote and not self._position:
            del self._buffer[: len(self._buffer) - len(self._buffer.lstrip(_SPACE))]
            if not self._buffer:
                return None
            if self._buffer[0] not in b"{[\"'":
                return self._end_of_word()
        while True:
            if self._quote:
                found = _IN_STRING[self._quote].search(self._buffer, self._position)
                if found is None:
                    self._position = len(self._buffer)
                    return None
                if found[0] == b"\\":
                    if found.end() == len(self._buffer):
                        self._position = found.start()
                        return None
                    self._position = found.end() + 1
                    continue
                self._position, self._quote = found.end(), b""
            else:
                found = _NEXT.search(self._buffer, self._position)
                if found is None:
                    self._position = len(self._buffer)
                    return None
                self._position = found.end()
                if found[0] in (b'"', b"'"):
                    self._quote = bytes(found[0])
                    continue
                self._depth += 1 if found[0] in b"[{" else -1
            if self._depth <= 0 or self._depth > MAX_DEPTH:
                return self._position

    def _end_of_word(self) -> int | None:
        """Of what begins like no value with an end of its own."""
        found = _WORD_END.search(self._buffer, 1)
        if found is not None:
            return found.start()
        return 1 if self._buffer[0] in b"]},:" else None


def _value(text: bytes) -> Any:
    """What the text says, or what is wrong with it."""
    try:
        decoded = text.decode()
        if "'" in decoded:
            decoded = _STRING.sub(_in_double_quotes, decoded)
        return json.loads(decoded, parse_constant=_refuse)
    except RecursionError:
        return InvalidOption("JSON parse error, nested too deeply")
    except ValueError as error:
        if re.fullmatch(rb"[a-z]+", text):
            return InvalidOption(f"JSON parse error, invalid keyword '{text.decode()[:200]}'")
        reason = getattr(error, "msg", None) or "not UTF-8"
        return InvalidOption(f"JSON parse error, {reason}")


def _in_double_quotes(string: re.Match[str]) -> str:
    text = string[0]
    if text.startswith('"'):
        return text
    return '"' + re.sub(r'\\.|"', lambda found: {"\\'": "'", '"': '\\"'}.get(found[0], found[0]), text[1:-1]) + '"'


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")
