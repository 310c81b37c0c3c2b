"""An encoder of deflate (RFC 1951) whose output never changes, and which can be told to be odd.

zlib's output depends on its version, and an image of the suite must not. Speed and ratio are of no interest here; what
is, is that every kind of block, and every distance that a case wants, can be had.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from typing import NamedTuple

MIN_MATCH, MAX_MATCH = 3, 258
WINDOW = 4096  # bytes; what QEMU's writer uses. The format has 32768
_END_OF_BLOCK = 256


class Match(NamedTuple):
    length: int
    distance: int


Token = int | Match  # an int is a literal byte

# RFC 1951, 3.2.5: the first length or distance of each code, and how many more bits tell the rest.
_LENGTHS = [
    *((base, 0) for base in range(3, 11)),
    *((base, 1) for base in range(11, 19, 2)),
    *((base, 2) for base in range(19, 35, 4)),
    *((base, 3) for base in range(35, 67, 8)),
    *((base, 4) for base in range(67, 131, 16)),
    *((base, 5) for base in range(131, 258, 32)),
    (258, 0),
]
_DISTANCES = [
    *((base, 0) for base in range(1, 5)),
    *((base, bits) for bits in range(1, 14) for base in ((2 << bits) + 1, (3 << bits) + 1)),
]
_ORDER = (16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15)  # 3.2.7


class BitWriter:
    """Bits into bytes, the least significant bit of a byte first."""

    def __init__(self) -> None:
        self.data = bytearray()
        self._value = 0
        self._count = 0

    def bits(self, value: int, count: int) -> None:
        self._value |= value << self._count
        self._count += count
        while self._count >= 8:
            self.data.append(self._value & 0xFF)
            self._value >>= 8
            self._count -= 8

    def code(self, code: tuple[int, int]) -> None:
        """A Huffman code, (value, bits), whose most significant bit comes first."""
        value, count = code
        self.bits(int(f"{value:0{count}b}"[::-1], 2) if count else 0, count)

    def align(self) -> None:
        if self._count:
            self.bits(0, 8 - self._count)


def tokens(data: bytes, window: int = WINDOW) -> list[Token]:
    """Literals and matches, greedily: each match is the latest of those that start with the same three bytes."""
    found: list[Token] = []
    latest: dict[bytes, int] = {}
    position = 0
    while position < len(data):
        key = data[position : position + MIN_MATCH]
        start = latest.get(key, -1)
        length = 0
        if len(key) == MIN_MATCH and start >= 0 and position - start <= window:
            limit = min(MAX_MATCH, len(data) - position)
            length = MIN_MATCH
            while length < limit and data[start + length] == data[position + length]:
                length += 1
            found.append(Match(length, position - start))
        else:
            found.append(data[position])
        for step in range(position, position + max(1, length)):
            latest[data[step : step + MIN_MATCH]] = step
        position += max(1, length)
    return found


def run(byte: int, length: int) -> list[Token]:
    """One byte, and matches that repeat it."""
    full, rest = divmod(length - 1, MAX_MATCH)
    last = [Match(rest, 1)] if rest >= MIN_MATCH else [byte] * rest
    return [byte, *[Match(MAX_MATCH, 1)] * full, *last]


def stored(data: bytes, *, block: int = 65535, final: bool = True) -> bytes:
    """Blocks without compression, of at most `block` bytes each."""
    out = bytearray()
    for start in range(0, len(data), block):
        piece = data[start : start + block]
        out.append(int(final and start + block >= len(data)))
        out += len(piece).to_bytes(2, "little") + (len(piece) ^ 0xFFFF).to_bytes(2, "little") + piece
    return bytes(out)


def fixed(*blocks: Sequence[Token], final: bool = True) -> bytes:
    """Blocks with fixed Huffman codes."""
    lengths = [8] * 144 + [9] * 112 + [7] * 24 + [8] * 8
    writer = BitWriter()
    for number, block in enumerate(blocks):
        writer.bits(int(final and number == len(blocks) - 1), 1)
        writer.bits(1, 2)
        _write_block(writer, block, _canonical(lengths), _canonical([5] * 30))
    writer.align()
    return bytes(writer.data)


def dynamic(*blocks: Sequence[Token], final: bool = True) -> bytes:
    """Blocks with Huffman codes of their own, each preceded by their lengths."""
    writer = BitWriter()
    for number, block in enumerate(blocks):
        writer.bits(int(final and number == len(blocks) - 1), 1)
        writer.bits(2, 2)
        literals, distances = [0] * 286, [0] * 30
        for token in (*block, _END_OF_BLOCK):
            if isinstance(token, Match):
                literals[_length_code(token.length)] += 1
                distances[_distance_code(token.distance)] += 1
            else:
                literals[token] += 1
        literal_lengths, distance_lengths = _code_lengths(literals, 15), _code_lengths(distances, 15)
        _write_code_lengths(writer, _trimmed(literal_lengths, 257), _trimmed(distance_lengths, 1))
        _write_block(writer, block, _canonical(literal_lengths), _canonical(distance_lengths))
    writer.align()
    return bytes(writer.data)


def _write_block(
    writer: BitWriter,
    block: Sequence[Token],
    literals: Sequence[tuple[int, int]],
    distances: Sequence[tuple[int, int]],
) -> None:
    for token in block:
        if isinstance(token, Match):
            code = _length_code(token.length)
            base, extra = _LENGTHS[code - 257]
            writer.code(literals[code])
            writer.bits(token.length - base, extra)
            code = _distance_code(token.distance)
            base, extra = _DISTANCES[code]
            writer.code(distances[code])
            writer.bits(token.distance - base, extra)
        else:
            writer.code(literals[token])
    writer.code(literals[_END_OF_BLOCK])


def _length_code(length: int) -> int:
    return 257 + max(code for code, (base, _) in enumerate(_LENGTHS) if base <= length)


def _distance_code(distance: int) -> int:
    return max(code for code, (base, _) in enumerate(_DISTANCES) if base <= distance)


def _canonical(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """Codes by symbol, as (value, bits), from their lengths: RFC 1951, 3.2.2."""
    codes, value = [(0, 0)] * len(lengths), 0
    for bits in range(1, 16):
        for symbol, length in enumerate(lengths):
            if length == bits:
                codes[symbol] = (value, bits)
                value += 1
        value <<= 1
    return codes


def _code_lengths(counts: Sequence[int], limit: int) -> list[int]:
    """Lengths of Huffman codes for symbols by how often they occur, none longer than `limit` bits."""
    weights = [*counts]
    if sum(count > 0 for count in weights) < 2:  # a code of one symbol has a bit all the same; 3.2.7 allows no less
        weights = [count + (symbol < 2) for symbol, count in enumerate(weights)]
    while True:
        heap: list[tuple[int, int, tuple[int, ...]]] = [
            (weight, symbol, (symbol,)) for symbol, weight in enumerate(weights) if weight
        ]
        heapq.heapify(heap)
        lengths = [0] * len(weights)
        while len(heap) > 1:
            (weight, order, some), (other, _, rest) = heapq.heappop(heap), heapq.heappop(heap)
            for symbol in (*some, *rest):
                lengths[symbol] += 1
            heapq.heappush(heap, (weight + other, order, (*some, *rest)))
        if max(lengths) <= limit:
            return lengths
        weights = [weight and weight // 2 + 1 for weight in weights]


def _trimmed(lengths: list[int], least: int) -> list[int]:
    """Without the zeros at the end, as far as the format allows."""
    count = len(lengths)
    while count > least and not lengths[count - 1]:
        count -= 1
    return lengths[:count]


def _write_code_lengths(writer: BitWriter, literals: list[int], distances: list[int]) -> None:
    symbols = [*_run_lengths([*literals, *distances])]
    counts = [0] * 19
    for symbol, _, _ in symbols:
        counts[symbol] += 1
    lengths = _code_lengths(counts, 7)
    used = max(index for index, symbol in enumerate(_ORDER) if lengths[symbol]) + 1
    used = max(used, 4)
    writer.bits(len(literals) - 257, 5)
    writer.bits(len(distances) - 1, 5)
    writer.bits(used - 4, 4)
    for symbol in _ORDER[:used]:
        writer.bits(lengths[symbol], 3)
    codes = _canonical(lengths)
    for symbol, value, bits in symbols:
        writer.code(codes[symbol])
        writer.bits(value, bits)


def _run_lengths(lengths: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """The alphabet of 3.2.7: a length, or 16 to 18 for a run of them; with the value and number of the bits behind."""
    index = 0
    while index < len(lengths):
        length, run = lengths[index], 1
        while index + run < len(lengths) and lengths[index + run] == length:
            run += 1
        index += run
        while length == 0 and run >= 3:
            count = min(run, 138)
            yield (17, count - 3, 3) if count < 11 else (18, count - 11, 7)
            run -= count
        if length and run >= 4:
            yield length, 0, 0
            run -= 1
            while run >= 3:
                count = min(run, 6)
                yield 16, count - 3, 2
                run -= count
        for _ in range(run):
            yield length, 0, 0
