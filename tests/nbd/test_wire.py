"""The two forms of a layout say the same, and every layout builds what it parses."""

from __future__ import annotations

import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from formats import nbd

U16, U32, U64 = (st.integers(0, (1 << bits) - 1) for bits in (16, 32, 64))


@given(U16, U16, U64, U64, U32)
def test_the_packed_request_is_the_declared_one(flags: int, kind: int, cookie: int, offset: int, length: int) -> None:
    fields = {"command_flags": flags, "type": kind, "cookie": cookie, "offset": offset, "length": length}
    assert nbd.REQUEST.pack(nbd.NBD_REQUEST_MAGIC, flags, kind, cookie, offset, length) == nbd.Request.build(fields)


@given(U16, U16, U64, U64, U32)
def test_the_packed_replies_are_the_declared_ones(flags: int, kind: int, cookie: int, offset: int, size: int) -> None:
    def chunk(length: int) -> bytes:
        fields = {"flags": flags, "type": kind, "cookie": cookie, "length": length}
        return bytes(nbd.StructuredReplyChunk.build(fields))

    magic = nbd.NBD_STRUCTURED_REPLY_MAGIC
    simple = nbd.SimpleReply.build({"error": size, "cookie": cookie})
    assert nbd.SIMPLE_REPLY.pack(nbd.NBD_SIMPLE_REPLY_MAGIC, size, cookie) == simple
    assert nbd.STRUCTURED_REPLY_CHUNK.pack(magic, flags, kind, cookie, size) == chunk(size)
    data = nbd.OffsetData.build({"offset": offset, "data": b""})
    assert nbd.OFFSET_DATA_CHUNK.pack(magic, flags, kind, cookie, 8, offset) == chunk(8) + data
    hole = nbd.OffsetHole.build({"offset": offset, "hole_size": size})
    assert nbd.OFFSET_HOLE_CHUNK.pack(magic, flags, kind, cookie, 12, offset, size) == chunk(12) + hole
    descriptor = [{"length": size, "status_flags": flags}]
    status = nbd.BlockStatus.build({"context_id": size, "descriptors": descriptor})
    assert nbd.BLOCK_STATUS.pack(size) + nbd.DESCRIPTOR.pack(size, flags) == status


@given(U16, U16, U64, U64, U64)
def test_the_packed_extended_request_is_the_declared_one(
    flags: int, kind: int, cookie: int, offset: int, length: int
) -> None:
    fields = {"command_flags": flags, "type": kind, "cookie": cookie, "offset": offset, "length": length}
    packed = nbd.EXTENDED_REQUEST.pack(nbd.NBD_EXTENDED_REQUEST_MAGIC, flags, kind, cookie, offset, length)
    assert packed == nbd.ExtendedRequest.build(fields)
    assert len(packed) == 32


@given(U16, U16, U64, U64, U64, U32)
def test_the_packed_extended_replies_are_the_declared_ones(
    flags: int, kind: int, cookie: int, asked: int, offset: int, size: int
) -> None:
    def chunk(length: int) -> bytes:
        fields = {"flags": flags, "type": kind, "cookie": cookie, "offset": asked, "length": length}
        return bytes(nbd.ExtendedReplyChunk.build(fields))

    head = nbd.NBD_EXTENDED_REPLY_MAGIC, flags, kind, cookie, asked
    assert nbd.EXTENDED_REPLY_CHUNK.pack(*head, size) == chunk(size)
    assert len(chunk(size)) == 32
    data = nbd.OffsetData.build({"offset": offset, "data": b""})
    assert nbd.EXTENDED_OFFSET_DATA_CHUNK.pack(*head, 8, offset) == chunk(8) + data
    hole = nbd.OffsetHole.build({"offset": offset, "hole_size": size})
    assert nbd.EXTENDED_OFFSET_HOLE_CHUNK.pack(*head, 12, offset, size) == chunk(12) + hole
    descriptor = [{"length": offset, "status_flags": asked}]
    status = nbd.BlockStatusExt.build({"context_id": size, "descriptors": descriptor})
    assert nbd.BLOCK_STATUS_EXT.pack(size, 1) + nbd.EXTENDED_DESCRIPTOR.pack(offset, asked) == status


@pytest.mark.parametrize(
    ("layout", "data"),
    [
        (nbd.Greeting, b"NBDMAGICIHAVEOPT\0\3"),
        (nbd.OptionHeader, b"IHAVEOPT" + struct.pack(">II", 7, 12)),
        (nbd.InfoRequest, struct.pack(">I3sHHH", 3, b"abc", 2, 1, 3)),
        (nbd.MetaContextRequest, struct.pack(">I3sII5s", 3, b"abc", 1, 5, b"base:")),
        (nbd.ServerReply, struct.pack(">I3s4s", 3, b"abc", b"more")),
        (nbd.InfoBlockSize, struct.pack(">HIII", 3, 1, 4096, 1 << 25)),
        (nbd.InfoExport, struct.pack(">HQH", 0, 1 << 40, 3)),
        (nbd.BlockStatusExt, struct.pack(">IIQQQQ", 7, 2, 1 << 40, 3, 512, 1 << 63)),
        (nbd.BlockStatusPayload, struct.pack(">QII", 1 << 40, 0, 7)),
        (nbd.ErrorOffset, struct.pack(">IH2sQ", 5, 2, b"no", 77)),
    ],
)
def test_a_layout_builds_what_it_parses(layout: Any, data: bytes) -> None:
    assert layout.build(layout.parse(data)) == data
