"""Persistent bitmaps, which a reader of disks can leave alone: that they are there must not change what is read."""

from __future__ import annotations

from typing import Any

from formats import qcow2 as layout
from formats.qcow2 import AutoclearFeature, BitmapFlag, HeaderExtensionType
from qcow2snap.conformance.suite.builder import KIB, MIB, Image
from qcow2snap.conformance.suite.cases.header import some_disk
from qcow2snap.conformance.suite.registry import case
from qcow2snap.conformance.suite.values import Section

GRANULARITY_BITS = 12


def add_bitmaps(image: Image, *bitmaps: dict[str, Any], consistent: bool = True) -> Image:
    """Bitmaps by fields of their directory entries, with `table`: entries that are offsets, or bits of a cluster."""
    directory = b""
    for number, given in enumerate(bitmaps):
        words = [
            image.metadata(each, f"bitmap {number}") if isinstance(each, bytes) else each
            for each in given.pop("table", [b"\x0f"])
        ]
        table = b"".join(word.to_bytes(8, "big") for word in words)
        fields: dict[str, Any] = {
            "bitmap_table_offset": image.metadata(table, f"table of bitmap {number}"),
            "bitmap_table_size": len(words),
            "flags": 0,
            "type": 1,
            "granularity_bits": GRANULARITY_BITS,
            "extra_data": b"",
            "name": b"bitmap%d" % number,
        } | given
        fields |= {"extra_data_size": len(fields["extra_data"]), "name_size": len(fields["name"])}
        used = layout.BITMAP_DIRECTORY_ENTRY_LENGTH + fields["extra_data_size"] + fields["name_size"]
        directory += layout.BitmapDirectoryEntry.build(fields | {"padding": bytes(-used % 8)})
    extension = layout.BitmapsExtension.build(
        {
            "nb_bitmaps": len(bitmaps),
            "reserved": 0,
            "bitmap_directory_size": len(directory),
            "bitmap_directory_offset": image.metadata(directory, "bitmap directory"),
        }
    )
    if consistent:
        image.autoclear |= AutoclearFeature.BITMAPS
    return image.extension(HeaderExtensionType.BITMAPS, extension)


@case("bitmap-one", "a bitmap", Section.BITMAPS_EXTENSION, Section.BITMAPS)
def bitmap_one(name: str) -> Image:
    return add_bitmaps(some_disk(Image(name, 64 * KIB)), {})


@case("bitmap-several", "bitmaps that are enabled, in use, or neither", Section.BITMAP_DIRECTORY)
def bitmap_several(name: str) -> Image:
    image = some_disk(Image(name, 64 * KIB))
    named: dict[str, Any] = {"name": "größe".encode()}
    return add_bitmaps(image, {}, {"flags": BitmapFlag.AUTO}, {"flags": BitmapFlag.IN_USE}, named)


@case(
    "bitmap-inconsistent",
    "bitmaps whose autoclear bit was cleared by a writer that does not know them",
    Section.BITMAPS_EXTENSION,
)
def bitmap_inconsistent(name: str) -> Image:
    return add_bitmaps(some_disk(Image(name, 64 * KIB)), {"flags": BitmapFlag.AUTO}, consistent=False)


@case("bitmap-table", "a bitmap table with clusters of zeros, of ones, and of bits", Section.BITMAP_TABLE)
def bitmap_table(name: str) -> Image:
    image = some_disk(Image(name, 6 * MIB, cluster_bits=9))
    return add_bitmaps(image, {"granularity_bits": 9, "table": [0, 1, b"\x81" * 512]})


@case(
    "bitmap-granularity", "bitmaps of the finest and the coarsest granularity that QEMU takes", Section.BITMAP_DIRECTORY
)
def bitmap_granularity(name: str) -> Image:
    image = some_disk(Image(name, 64 * KIB))
    return add_bitmaps(image, {"granularity_bits": 9, "table": [b"\xff" * 16]}, {"granularity_bits": 31, "table": [1]})


@case("bitmap-and-snapshot", "a bitmap in an image with a snapshot", Section.BITMAPS, Section.SNAPSHOTS)
def bitmap_and_snapshot(name: str) -> Image:
    image = some_disk(Image(name, 64 * KIB))
    image.snapshot("before")
    image.active.data(0)
    return add_bitmaps(image, {})


@case("bitmap-over-backing", "a bitmap in an image with a backing file", Section.BITMAPS, Section.UNALLOCATED)
def bitmap_over_backing(name: str) -> Image:
    image = Image(name, 64 * KIB)
    image.over_raw(image.lines(64 * KIB))
    return add_bitmaps(some_disk(image), {})


@case("bitmap-extra-data", "a bitmap with extra data, which may be used as it is", Section.BITMAP_DIRECTORY)
def bitmap_extra_data(name: str) -> Image:
    flags = BitmapFlag.EXTRA_DATA_COMPATIBLE
    return add_bitmaps(some_disk(Image(name, 64 * KIB)), {"flags": flags, "extra_data": b"extra data, twelve"})


@case("bitmap-name-longest", "a bitmap with a name of 1,023 bytes", Section.BITMAP_DIRECTORY)
def bitmap_name_longest(name: str) -> Image:
    return add_bitmaps(some_disk(Image(name, 64 * KIB)), {"name": b"b" * 1023})


@case("feature-bitmaps-alone", "the bitmaps bit without the extension", Section.AUTOCLEAR, Section.BITMAPS_EXTENSION)
def feature_bitmaps_alone(name: str) -> Image:
    image = some_disk(Image(name, 64 * KIB))
    image.autoclear |= AutoclearFeature.BITMAPS
    return image.may_refuse(
        "it is an error if this bit is set without the extension; the disk can be read all the same"
    )
