"""Backing files: where their names lie, what their formats are, and where they show through."""

from __future__ import annotations

from formats.qcow2 import HeaderExtensionType
from qcow2snap.conformance.suite.builder import KIB, Image
from qcow2snap.conformance.suite.registry import case
from qcow2snap.conformance.suite.values import Section

QEMU_ONLY = "what is no plain file name is QEMU's own, and not in the specification"


def overlay(image: Image) -> Image:
    """Clusters with data and with zeros over a backing file, which shows between them."""
    image.active.data(1).data(3)
    if image.version >= 3:
        image.active.zero(5).zero(6, allocated=True)
    return image


def long_path(length: int, file_name: bytes) -> bytes:
    """A path of so many bytes to a file in the same directory."""
    steps, odd = divmod(length - len(file_name), 2)
    path = b"." + b"/" * odd + b"/" + b"./" * (steps - 1) + file_name
    assert len(path) == length
    return path


@case("backing-raw", "a raw backing file of the disk's size", Section.BACKING_FILE, Section.UNALLOCATED)
def backing_raw(name: str) -> Image:
    image = Image(name, 64 * KIB)
    return overlay(image.over_raw(image.lines(64 * KIB)))


@case("backing-raw-v2", "a raw backing file under version 2", Section.BACKING_FILE, Section.UNALLOCATED)
def backing_raw_v2(name: str) -> Image:
    image = Image(name, 64 * KIB, version=2)
    return overlay(image.over_raw(image.lines(64 * KIB)))


@case("backing-shorter", "a backing file that ends before the disk does: zeros from there on", Section.UNALLOCATED)
def backing_shorter(name: str) -> Image:
    image = Image(name, 64 * KIB)
    return overlay(image.over_raw(image.lines(36 * KIB)))


@case("backing-shorter-within-cluster", "a backing file that ends within a cluster of the disk", Section.UNALLOCATED)
def backing_shorter_within_cluster(name: str) -> Image:
    image = Image(name, 128 * KIB, cluster_bits=14)
    return overlay(image.over_raw(image.lines(36 * KIB + 512)))


@case("backing-shorter-within-sector", "a backing file whose size is no multiple of 512", Section.UNALLOCATED)
def backing_shorter_within_sector(name: str) -> Image:
    image = Image(name, 64 * KIB)
    return overlay(image.over_raw(image.lines(34 * KIB + 100)))


@case("backing-longer", "a backing file that goes on behind the end of the disk", Section.UNALLOCATED)
def backing_longer(name: str) -> Image:
    image = Image(name, 30 * KIB)
    return overlay(image.over_raw(image.lines(64 * KIB)))


@case("backing-empty", "a backing file of no bytes", Section.UNALLOCATED)
def backing_empty(name: str) -> Image:
    return overlay(Image(name, 64 * KIB).over_raw(b""))


@case("backing-no-l2-table", "a backing file under L1 entries without tables", Section.UNALLOCATED, Section.L1_ENTRY)
def backing_no_l2_table(name: str) -> Image:
    image = Image(name, 128 * KIB, cluster_bits=9)
    image.over_raw(image.lines(128 * KIB)).active.data(70)
    return image


@case("backing-qcow2", "a qcow2 backing file with smaller clusters", Section.BACKING_FILE, Section.UNALLOCATED)
def backing_qcow2(name: str) -> Image:
    base = Image(f"{name}.base", 64 * KIB, cluster_bits=9)
    base.active.data(0).data(13).zero(20).data(24).data(127)
    return overlay(Image(name, 64 * KIB, cluster_bits=12).over(base))


@case("backing-qcow2-larger-clusters", "a qcow2 backing file with larger clusters", Section.UNALLOCATED)
def backing_qcow2_larger_clusters(name: str) -> Image:
    base = Image(f"{name}.base", 96 * KIB, cluster_bits=15)
    base.active.data(0).data(2)
    return overlay(Image(name, 128 * KIB, cluster_bits=10).over(base))


@case("backing-chain", "a chain of three images of three sizes over a raw file", Section.BACKING_FILE)
def backing_chain(name: str) -> Image:
    lowest = Image(f"{name}.1", 60 * KIB, cluster_bits=12, version=2)
    lowest.over_raw(lowest.lines(40 * KIB)).active.data(2)
    middle = Image(f"{name}.2", 48 * KIB, cluster_bits=9).over(lowest)
    middle.active.data(30).zero(9)
    upper = Image(f"{name}.3", 128 * KIB, cluster_bits=14).over(middle)
    upper.active.data(1)
    return overlay(Image(name, 96 * KIB).over(upper))


@case(
    "backing-format-raw-of-qcow2",
    "a backing file that looks like qcow2 and is said to be raw: its bytes are the disk's",
    Section.BACKING_FILE,
    Section.STRINGS,
)
def backing_format_raw_of_qcow2(name: str) -> Image:
    image = Image(name, 64 * KIB)
    header = Image("inner", 4 * KIB, cluster_bits=9)
    header.active.data(0)
    inner = next(iter(header.build().files.values())).content.read()
    return overlay(image.over_raw(inner + image.lines(40 * KIB)))


@case(
    "backing-format-unstated",
    "a backing file whose format nobody states: a qcow2 image",
    Section.BACKING_FILE,
)
def backing_format_unstated(name: str) -> Image:
    base = Image(f"{name}.base", 64 * KIB)
    base.active.data(0).data(2).data(9)
    image = overlay(Image(name, 64 * KIB).over(base, stated=None))
    return image.may_refuse("the specification does not say what a backing file of no stated format is")


@case(
    "backing-format-unstated-raw",
    "a backing file whose format nobody states, and which is no image of any kind",
    Section.BACKING_FILE,
)
def backing_format_unstated_raw(name: str) -> Image:
    image = Image(name, 64 * KIB)
    overlay(image.over_raw(image.lines(64 * KIB), stated=None))
    return image.may_refuse("the specification does not say what a backing file of no stated format is")


@case("backing-name-at-end", "a name that ends with the first cluster", Section.BACKING_FILE)
def backing_name_at_end(name: str) -> Image:
    image = Image(name, 64 * KIB)
    file_name = f"{name}.base.raw".encode()
    return overlay(image.over_raw(image.lines(64 * KIB), at=image.cluster_size - len(file_name)))


@case("backing-name-longest", "a name of 1023 bytes, the longest that there may be", Section.BACKING_FILE)
def backing_name_longest(name: str) -> Image:
    image = Image(name, 64 * KIB)
    path = long_path(1023, f"{name}.base.raw".encode())
    return overlay(image.over_raw(image.lines(64 * KIB), name=path))


@case("backing-name-utf-8", "a name that is not ASCII, with a space in it", Section.BACKING_FILE)
def backing_name_utf_8(name: str) -> Image:
    image = Image(name, 64 * KIB)
    image.over_raw(image.lines(64 * KIB), name="grün, und ein Baß.raw".encode())
    image.beside["grün, und ein Baß.raw"] = image.beside.pop(f"{name}.base.raw")
    return overlay(image)


@case("backing-name-file", "a name that starts with file:", Section.BACKING_FILE)
def backing_name_file(name: str) -> Image:
    image = Image(name, 64 * KIB)
    overlay(image.over_raw(image.lines(64 * KIB), name=f"file:{name}.base.raw".encode()))
    return image.may_refuse(QEMU_ONLY)


@case("backing-name-json", "a name that is QEMU's description of a node, in JSON", Section.BACKING_FILE)
def backing_name_json(name: str) -> Image:
    image = Image(name, 64 * KIB)
    node = f'json:{{"driver": "raw", "file": {{"driver": "file", "filename": "{name}.base.raw"}}}}'
    overlay(image.over_raw(image.lines(64 * KIB), name=node.encode()))
    return image.may_refuse(QEMU_ONLY)


@case("backing-no-extensions", "a name right behind a header without extensions", Section.BACKING_FILE)
def backing_no_extensions(name: str) -> Image:
    image = Image(name, 64 * KIB)
    image.has_end_marker = False
    overlay(image.over_raw(image.lines(64 * KIB), stated=None))
    return image.may_refuse("the specification does not say what a backing file of no stated format is")


@case(
    "backing-size-without-offset", "a length of the name, and no offset: there is no backing file", Section.BACKING_FILE
)
def backing_size_without_offset(name: str) -> Image:
    image = Image(name, 64 * KIB)
    image.fields["backing_file_size"] = 0xFFFFFFFF
    return overlay(image)


@case("refuse-backing-missing", "a backing file that does not exist", Section.BACKING_FILE)
def refuse_backing_missing(name: str) -> Image:
    image = overlay(Image(name, 64 * KIB).refer_to_backing(f"{name}.nowhere.raw".encode(), b"raw"))
    return image.refuse("what the backing file holds is not known")


@case("refuse-backing-loop", "an image that is its own backing file", Section.BACKING_FILE)
def refuse_backing_loop(name: str) -> Image:
    image = overlay(Image(name, 64 * KIB).refer_to_backing(f"{name}.qcow2".encode(), b"qcow2"))
    return image.refuse("the backing chain has no end")


@case("refuse-backing-broken", "a qcow2 backing file that must not be opened", Section.BACKING_FILE)
def refuse_backing_broken(name: str) -> Image:
    base = Image(f"{name}.base", 64 * KIB)
    base.active.data(0)
    base.features |= 1 << 40
    return overlay(Image(name, 64 * KIB).over(base)).refuse("the backing file has an unknown incompatible feature")


@case("refuse-backing-name-long", "a name of 1024 bytes", Section.BACKING_FILE)
def refuse_backing_name_long(name: str) -> Image:
    image = Image(name, 64 * KIB)
    path = long_path(1024, f"{name}.base.raw".encode())
    return overlay(image.over_raw(image.lines(64 * KIB), name=path)).refuse("the name is longer than 1023 bytes")


@case("refuse-backing-name-outside", "a name that reaches beyond the first cluster", Section.BACKING_FILE)
def refuse_backing_name_outside(name: str) -> Image:
    image = Image(name, 64 * KIB)
    image.over_raw(image.lines(64 * KIB))
    image.fields["backing_file_offset"] = 4090
    return overlay(image).refuse("the name must be in the first cluster")


@case("refuse-backing-format-unknown", "a backing file of a format that does not exist", Section.STRINGS)
def refuse_backing_format_unknown(name: str) -> Image:
    image = Image(name, 64 * KIB)
    image.over_raw(image.lines(64 * KIB), stated=None).extension(HeaderExtensionType.BACKING_FILE_FORMAT, b"qcow9")
    return overlay(image).refuse("nobody knows how the backing file is to be read")
