"""Decoded L2 tables say what the specification says of each entry: compared with plain.py, which decodes one by one."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from formats.qcow2 import CompressionType, CryptMethod, IncompatibleFeature
from qcow2snap.block.qcow2.header import ImageHeader
from qcow2snap.block.qcow2.l2 import Kind, L2Table, decode
from tests.block.plain import Unit, plain_units


def header(cluster_bits: int = 9, *, version: int = 3, features: int = 0) -> ImageHeader:
    return ImageHeader(
        version=version,
        cluster_bits=cluster_bits,
        size=1 << 30,
        crypt_method=CryptMethod.NONE,
        l1_table_offset=0,
        l1_size=0,
        refcount_table_offset=0,
        refcount_table_clusters=1,
        refcount_order=4,
        nb_snapshots=0,
        snapshots_offset=0,
        incompatible_features=IncompatibleFeature(features),
        compatible_features=0,
        autoclear_features=0,
        header_length=104,
        compression_type=CompressionType.DEFLATE,
        backing_file=None,
        extensions=(),
    )


EXTENDED = IncompatibleFeature.EXTENDED_L2_ENTRIES
DATA_FILE = IncompatibleFeature.EXTERNAL_DATA_FILE
HEADERS = {
    "512-byte clusters": header(9),
    "64k clusters": header(16),
    "version 2": header(12, version=2),
    "external data file": header(12, features=DATA_FILE),
    "extended L2": header(14, features=EXTENDED),
    "extended L2, 2M clusters": header(21, features=EXTENDED),
    "extended L2, external data file": header(14, features=EXTENDED | DATA_FILE),
}


def units_of(table: L2Table, image: ImageHeader, end: int) -> Iterator[Unit]:
    """The runs of a decoded table up to byte `end` as one item for each unit."""
    unit = image.subcluster_size
    for run in table.runs(0, end):
        for index in range((run.end - run.start) // unit):
            if run.kind in (Kind.NORMAL, Kind.ZERO_ALLOC, Kind.UNALLOCATED_ALLOC):
                yield run.kind, run.host + index * unit
            elif run.kind in (Kind.COMPRESSED, Kind.INVALID):
                yield run.kind, run.host
            else:
                yield run.kind, 0


def plausible_entries(image: ImageHeader, count: int, seed: int) -> bytes:
    """Entries as images have them, in runs, and now and then any word at all."""
    choose = random.Random(seed)
    words: list[int] = []
    host = image.cluster_size
    while len(words) < count * image.l2_entry_size // 8:
        kind = choose.choice(["none", "normal", "normal", "zero", "zero-alloc", "compressed", "any"])
        for _ in range(choose.choice([1, 2, 7, 40])):
            host = host + image.cluster_size if choose.random() < 0.9 else choose.randrange(1 << 40) << 9
            word = {
                "none": 0,
                "normal": 1 << 63 | host,
                "zero": 1,
                "zero-alloc": host | 1,
                "compressed": 1 << 62 | choose.randrange(1 << 60),
                "any": choose.getrandbits(64),
            }[kind]
            words.append(word)
            if image.has_extended_l2:
                part = choose.getrandbits(32)
                words.append(choose.choice([0, 0xFFFFFFFF, part, part << 32, (~part & 0xFFFFFFFF) << 32 | part]))
    return b"".join(word.to_bytes(8, "big") for word in words[: count * image.l2_entry_size // 8])


@pytest.mark.parametrize("name", [name for name in HEADERS if "2M" not in name and "64k" not in name])
@settings(max_examples=40)
@given(seed=st.integers(0, 2**32))
def test_each_entry_means_what_it_says(name: str, seed: int) -> None:
    same_units(HEADERS[name], plausible_entries(HEADERS[name], 64, seed))


@pytest.mark.parametrize("name", ["64k clusters", "extended L2, 2M clusters"])
def test_large_tables_too(name: str) -> None:
    same_units(HEADERS[name], bytes(2000 * HEADERS[name].l2_entry_size) + plausible_entries(HEADERS[name], 100, seed=1))


def same_units(image: ImageHeader, entries: bytes) -> None:
    """A table that starts with these entries and has zeros behind them says the same either way."""
    table = decode(entries.ljust(image.cluster_size, b"\0"), 0, image)
    filled = len(entries) // image.l2_entry_size * image.cluster_size
    assert list(units_of(table, image, filled)) == list(plain_units(entries, image))
    assert {run.kind for run in table.runs(filled, image.l2_coverage)} <= {Kind.UNALLOCATED}


def test_a_table_of_one_run_is_one_run() -> None:
    image = HEADERS["64k clusters"]
    data = b"".join((1 << 63 | (index + 5) << 16).to_bytes(8, "big") for index in range(8192))
    assert list(decode(data, 0, image).runs(0, image.l2_coverage)) == [(0, image.l2_coverage, Kind.NORMAL, 5 << 16)]


def test_runs_go_on_over_the_slices_of_an_extended_table() -> None:
    image = HEADERS["extended L2, 2M clusters"]
    entries = image.cluster_size // 16
    words = ((1 << 63 | (index + 1) << 21, 0xFFFFFFFF) for index in range(entries))
    data = b"".join(entry.to_bytes(8, "big") + bitmap.to_bytes(8, "big") for entry, bitmap in words)
    assert list(decode(data, 0, image).runs(0, image.l2_coverage)) == [(0, image.l2_coverage, Kind.NORMAL, 1 << 21)]


def test_runs_are_cut_to_what_was_asked_for() -> None:
    image = HEADERS["64k clusters"]
    data = b"".join((1 << 63 | (index + 5) << 16).to_bytes(8, "big") for index in range(8192))
    assert list(decode(data, 0, image).runs(100, 300)) == [(100, 300, Kind.NORMAL, (5 << 16) + 100)]


def test_equal_compressed_entries_are_two_clusters() -> None:
    image = HEADERS["512-byte clusters"]
    entry = (1 << 62 | 0x1234).to_bytes(8, "big")
    runs = list(decode(entry * 2 + bytes(62 * 8), 0, image).runs(0, 1024))
    assert [(run.start, run.end) for run in runs] == [(0, 512), (512, 1024)]
