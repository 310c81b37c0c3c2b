"""The layouts of formats/qcow2.py: what is parsed is built again byte for byte, from real images and from any bytes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from construct import Construct
from hypothesis import given
from hypothesis import strategies as st

from formats import qcow2
from formats.qcow2 import CompressionType, HeaderExtensionType, IncompatibleFeature
from tests.support import Library

words = st.integers(0, 2**64 - 1)


def same_again(layout: Construct, data: bytes) -> None:
    assert layout.build(layout.parse(data)) == data


def header_bytes(version: int, header_length: int, rest: bytes) -> bytes:
    """A header with any other values: the magic, the version and the length where they stand."""
    head = bytearray(rest[:104].ljust(104, b"\0"))
    head[0:4], head[4:8], head[100:104] = b"QFI\xfb", version.to_bytes(4, "big"), header_length.to_bytes(4, "big")
    return bytes(head[:72]) if version == 2 else bytes(head) + rest[104:header_length].ljust(header_length - 104, b"\1")


@given(st.binary(max_size=200), st.sampled_from([104, 105, 112, 120, 160]))
def test_any_version_3_header_is_built_as_it_was(rest: bytes, header_length: int) -> None:
    same_again(qcow2.Header, header_bytes(3, header_length, rest))


@given(st.binary(max_size=72))
def test_any_version_2_header_is_built_as_it_was(rest: bytes) -> None:
    same_again(qcow2.Header, header_bytes(2, 72, rest))


def test_version_2_implies_what_it_does_not_say() -> None:
    header = qcow2.Header.parse(header_bytes(2, 72, b""))
    assert (header.refcount_order, header.header_length, header.incompatible_features) == (4, 72, 0)
    assert header.compression_type is CompressionType.DEFLATE


def test_unknown_feature_bits_are_kept() -> None:
    data = bytearray(header_bytes(3, 104, b""))
    data[72:80] = (1 << 63 | 1).to_bytes(8, "big")
    header = qcow2.Header.parse(bytes(data))
    assert int(header.incompatible_features) == 1 << 63 | IncompatibleFeature.DIRTY
    assert IncompatibleFeature.DIRTY in header.incompatible_features


@given(st.integers(0, 2**32 - 1), st.binary(max_size=40), st.binary(min_size=7, max_size=7))
def test_any_header_extension_is_built_as_it_was(kind: int, data: bytes, padding: bytes) -> None:
    length = 0 if kind == HeaderExtensionType.END else len(data)
    used = data[:length]
    raw = kind.to_bytes(4, "big") + len(data).to_bytes(4, "big") + used + padding[: -length % 8]
    same_again(qcow2.HeaderExtension, raw)


@given(st.binary(max_size=48 * 3 + 20))
def test_any_feature_name_table_is_built_as_it_was(data: bytes) -> None:
    same_again(qcow2.FeatureNameTable, data)


@given(st.binary(min_size=24, max_size=24))
def test_any_bitmaps_extension_is_built_as_it_was(data: bytes) -> None:
    same_again(qcow2.BitmapsExtension, data)


@given(st.binary(min_size=16, max_size=16))
def test_any_encryption_pointer_is_built_as_it_was(data: bytes) -> None:
    same_again(qcow2.FullDiskEncryptionExtension, data)


@given(st.binary(min_size=36, max_size=36), st.integers(0, 40), st.binary(max_size=9), st.binary(max_size=9))
def test_any_snapshot_entry_is_built_as_it_was(fixed: bytes, extra: int, id_str: bytes, name: bytes) -> None:
    raw = fixed[:12] + len(id_str).to_bytes(2, "big") + len(name).to_bytes(2, "big") + fixed[16:36]
    raw += extra.to_bytes(4, "big") + bytes(range(1, extra + 1)) + id_str + name
    same_again(qcow2.SnapshotTableEntry, raw + b"\xff" * (-len(raw) % 8))


@pytest.mark.parametrize(
    ("extra_data_size", "present"),
    [(0, (False, False, False)), (8, (True, False, False)), (15, (True, False, False)), (16, (True, True, False))],
)
def test_extra_data_holds_the_fields_that_it_reaches(extra_data_size: int, present: tuple[bool, ...]) -> None:
    raw = bytes(36) + extra_data_size.to_bytes(4, "big") + bytes(extra_data_size)
    entry = qcow2.SnapshotTableEntry.parse(raw + bytes(-len(raw) % 8))
    fields = (entry.vm_state_size_large, entry.disk_size, entry.icount)
    assert tuple(field is not None for field in fields) == present


@given(st.binary(min_size=24, max_size=24), st.integers(0, 9), st.binary(max_size=9))
def test_any_bitmap_directory_entry_is_built_as_it_was(fixed: bytes, extra: int, name: bytes) -> None:
    raw = fixed[:18] + len(name).to_bytes(2, "big") + extra.to_bytes(4, "big") + bytes(extra) + name
    same_again(qcow2.BitmapDirectoryEntry, raw + b"\xff" * (-len(raw) % 8))


@pytest.mark.parametrize(
    "layout",
    [
        qcow2.RefcountTableEntry,
        qcow2.L1TableEntry,
        qcow2.StandardL2Entry,
        qcow2.SubclusterBitmap,
        qcow2.BitmapTableEntry,
        *(qcow2.compressed_l2_entry(cluster_bits) for cluster_bits in (9, 12, 16, 21)),
    ],
)
@given(word=words)
def test_any_table_entry_is_built_as_it_was(layout: qcow2.BitFields, word: int) -> None:
    same_again(layout, word.to_bytes(8, "big"))


@given(words, words)
def test_any_extended_l2_entry_is_built_as_it_was(entry: int, bitmap: int) -> None:
    same_again(qcow2.ExtendedL2Entry, entry.to_bytes(8, "big") + bitmap.to_bytes(8, "big"))


@pytest.mark.parametrize(
    "layout",
    [
        qcow2.RefcountTableEntry,
        qcow2.L1TableEntry,
        qcow2.StandardL2Entry,
        qcow2.SubclusterBitmap,
        qcow2.BitmapTableEntry,
        *(qcow2.compressed_l2_entry(cluster_bits) for cluster_bits in range(9, 22)),
    ],
)
def test_the_fields_of_an_entry_cover_each_bit_once(layout: qcow2.BitFields) -> None:
    masks = [field.mask for field in layout.ranges.values()]
    assert sum(masks) == 2**64 - 1
    assert all(a & b == 0 for i, a in enumerate(masks) for b in masks[i + 1 :])


@pytest.mark.parametrize("order", range(7))
@given(data=st.binary(min_size=8, max_size=64).map(lambda data: data[: len(data) // 8 * 8]))
def test_any_refcount_block_is_built_as_it_was(order: int, data: bytes) -> None:
    same_again(qcow2.refcount_block(order), data)


def test_refcounts_below_a_byte_start_with_the_least_significant_bits() -> None:
    assert qcow2.refcount_block(0).parse(b"\x05") == [1, 0, 1, 0, 0, 0, 0, 0]
    assert qcow2.refcount_block(1).parse(b"\xe1") == [1, 0, 2, 3]
    assert qcow2.refcount_block(2).parse(b"\xe1") == [1, 14]


# -- real images -------------------------------------------------------------------------------------------------------

Walk = Callable[[bytes], None]


def test_every_structure_of_real_images_is_built_as_it_was(library: Library) -> None:
    counted = {"headers": 0, "extensions": 0, "snapshots": 0, "bitmaps": 0, "tables": 0, "blocks": 0}
    for name in library.images:
        data = library.path(name).read_bytes()
        header = qcow2.Header.parse(data)
        assert qcow2.Header.build(header) == data[: header.header_length]
        counted["headers"] += 1
        counted["extensions"] += _extensions_are_built_as_they_were(data, header)
        counted["snapshots"] += _snapshots_are_built_as_they_were(data, header)
        counted["bitmaps"] += _bitmaps_are_built_as_they_were(data, header)
        cluster = 1 << header.cluster_bits
        for at in (header.l1_table_offset, header.refcount_table_offset):
            for position in range(at, min(at + cluster, len(data)), 8):
                same_again(qcow2.StandardL2Entry, data[position : position + 8])
            counted["tables"] += 1
        block = int.from_bytes(data[header.refcount_table_offset :][:8], "big")
        same_again(qcow2.refcount_block(header.refcount_order), data[block : block + cluster])
        counted["blocks"] += 1
    assert all(counted.values()), counted


def _extensions_are_built_as_they_were(data: bytes, header: qcow2.Container) -> int:
    position, count = header.header_length, 0
    while header.version >= 3:
        extension = qcow2.HeaderExtension.parse(data[position:])
        built = qcow2.HeaderExtension.build(extension)
        assert built == data[position : position + len(built)]
        position, count = position + len(built), count + 1
        if extension.type == HeaderExtensionType.FEATURE_NAME_TABLE:
            same_again(qcow2.FeatureNameTable, extension.data)
        if extension.type == HeaderExtensionType.END:
            break
    return count


def _snapshots_are_built_as_they_were(data: bytes, header: qcow2.Container) -> int:
    position = header.snapshots_offset
    for _ in range(header.nb_snapshots):
        entry = qcow2.SnapshotTableEntry.parse(data[position:] + bytes(8))
        built = qcow2.SnapshotTableEntry.build(entry)
        assert built == data[position : position + len(built)].ljust(len(built), b"\0")
        position += len(built)
    return int(header.nb_snapshots)


def _bitmaps_are_built_as_they_were(data: bytes, header: qcow2.Container) -> int:
    position = data.find(HeaderExtensionType.BITMAPS.to_bytes(4, "big"), header.header_length, 4096)
    if position < 0 or header.version < 3:
        return 0
    directory = qcow2.BitmapsExtension.parse(data[position + 8 :])
    entries = data[directory.bitmap_directory_offset :][: directory.bitmap_directory_size]
    for _ in range(directory.nb_bitmaps):
        built = qcow2.BitmapDirectoryEntry.build(qcow2.BitmapDirectoryEntry.parse(entries))
        assert built == entries[: len(built)]
        entries = entries[len(built) :]
    return int(directory.nb_bitmaps)
