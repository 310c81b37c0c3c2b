"""Zstandard frames (RFC 8878) whose bytes never change: written by hand, and one recorded from a real compressor.

A library's output depends on its version, and an image of the suite must not.
"""

from __future__ import annotations

import base64

_MAGIC = b"\x28\xb5\x2f\xfd"
_RAW, _RLE, _COMPRESSED = 0, 1, 2
_MAX_BLOCK = 1 << 17  # bytes that a block may decompress to
_UNIT = 16  # bytes that `repeated` repeats

# What Zstandard 1.5.7 made, at level 19, of content.lines(0, 4096): Huffman-coded literals, FSE-coded sequences, the
# content's size in the frame's header, and a checksum behind it.
RECORDED = base64.b85decode(
    b"D77#BWB?D%3IGPLN(!*$7$iwTY)s`kN&rg$LI6>N`Z~}@8(lQfLkk@=pr^xpv&}WrJhRL(gZVkgC!1U{$s>y#GLV-"
    b";e6ht9Q#`T65rg<R?5%Ar?W}ApaIj%-ZEI;~Wn;m9OFJtY3p@;aYg<b@D;o<O81~k-"
    b"mUdP)7W^QDFKpooQ+UD>jxY!x4)@)5*G>1_a>ots?_i&8cG+Z)Eq2(z-"
    b"VXKER##2+)KUi?40~%^OFJtY3;YawYg<b@D;o>k40~%^OFJtY3%m?_Yg<b@D;o=(40~%^OFJtY3w#WFYg<b@D;o=340~%^0n*OO#"
    b"sVk9-rCmE&dSCDAH&|-*3!<(#sU|^-rCmE&dSCD55wNt*3!<(#sUY1y|t~Sot2FRe}uiYt)-"
    b"onjRgUL0H_cU;{)L55MJR2FWFMrY^h`yin^<$+*MNUDk*oBut|szqJXiJ^znl#%&r0"
)


def raw(data: bytes, *, block: int = _MAX_BLOCK) -> bytes:
    """A frame of blocks without compression."""
    pieces = [data[start : start + block] for start in range(0, len(data), block)]
    return _frame(b"".join(_block(_RAW, len(p), p, p is pieces[-1]) for p in pieces))


def run(byte: int, length: int) -> bytes:
    """A frame of `length` times the same byte, as blocks of one byte."""
    sizes = [min(_MAX_BLOCK, length - start) for start in range(0, length, _MAX_BLOCK)]
    blocks = (_block(_RLE, size, bytes([byte]), i == len(sizes) - 1) for i, size in enumerate(sizes))
    return _frame(b"".join(blocks))


def repeated(unit: bytes) -> bytes:
    """A frame of 4096 bytes: one sequence, of 16 literals and a match of 4080 bytes at distance 16."""
    assert len(unit) == _UNIT
    literals = bytes([_UNIT << 3]) + unit  # raw, a header of one byte
    # One sequence, whose three codes are stored as they are (RLE_Mode); then their extra bits, which are read from the
    # end: a mark, offset 16 + 3 = 16 + 0b0011, match length 2051 + 2029, literals length 16 + 0.
    modes = bytes([1, 0b01010100, 16, 4, 47])
    extra = (1 << 16 | 3 << 12 | 2029 << 1).to_bytes(3, "little")
    body = literals + modes + extra
    return _frame(_block(_COMPRESSED, len(body), body, True))


def skippable(data: bytes) -> bytes:
    """A frame that decodes to nothing."""
    return b"\x50\x2a\x4d\x18" + len(data).to_bytes(4, "little") + data


def _frame(blocks: bytes) -> bytes:
    """With a window of 2 MiB and neither the content's size nor a checksum: what a streaming compressor writes."""
    return _MAGIC + bytes([0, (21 - 10) << 3]) + blocks


def _block(kind: int, size: int, data: bytes, last: bool) -> bytes:
    return (int(last) | kind << 1 | size << 3).to_bytes(3, "little") + data
