"""Section "Snapshots": the table and its entries, and what each snapshot reads as, with a size of its own."""

from __future__ import annotations

from typing import Any

from qcow2snap.conformance.suite.builder import KIB, MIB, Image
from qcow2snap.conformance.suite.cases.header import some_disk
from qcow2snap.conformance.suite.registry import case
from qcow2snap.conformance.suite.state import COPIED, State
from qcow2snap.conformance.suite.values import Section

TABLE = Section.SNAPSHOT_ENTRY
DISK = Section.SNAPSHOTS

ACTIVE_IS_FREE = "the active disk is whole, but what the table holds is not known"


@case("snapshot-one", "one snapshot, and clusters that were written, zeroed and discarded since", DISK)
def snapshot_one(name: str) -> Image:
    image = some_disk(Image(name, 64 * KIB))
    image.snapshot("before")
    image.active.data(0).data(1).zero(2).unallocated(3)
    return image


@case("snapshot-nothing-since", "a snapshot that shares all with the active disk", DISK)
def snapshot_nothing_since(name: str) -> Image:
    image = some_disk(Image(name, 64 * KIB))
    image.snapshot("same")
    return image


@case("snapshot-series", "five snapshots, each with what was written by then", DISK)
def snapshot_series(name: str) -> Image:
    image = Image(name, 256 * KIB, cluster_bits=9)
    for number in range(5):
        for cluster in range(number * 60, number * 60 + 130, 10):
            image.active.data(cluster)
        image.snapshot(f"day {number}")
        image.active.zero(number * 70)
    return image


@case("snapshot-v2", "snapshots of version 2, whose entries do not tell a size: it is the active disk's", DISK, TABLE)
def snapshot_v2(name: str) -> Image:
    image = some_disk(Image(name, 64 * KIB, version=2))
    image.snapshot("first")
    image.active.data(0).data(5)
    image.snapshot("second")
    image.active.data(2)
    return image


@case("snapshot-v2-extra-8", "version 2, with a size of the VM state and none of the disk", TABLE)
def snapshot_v2_extra_8(name: str) -> Image:
    image = some_disk(Image(name, 64 * KIB, version=2))
    image.snapshot("first", extra_data_size=8)
    image.active.data(0)
    return image


@case("snapshot-v2-size", "version 2, with a disk size of its own, smaller than the active disk's", TABLE)
def snapshot_v2_size(name: str) -> Image:
    image = some_disk(Image(name, 64 * KIB, version=2))
    image.snapshot("small", extra_data_size=16)
    image.active.resize(128 * KIB).data(20)
    return image


@case("snapshot-v3-no-extra", "version 3 without the extra data that it must have", TABLE)
def snapshot_v3_no_extra(name: str) -> Image:
    image = some_disk(Image(name, 64 * KIB))
    image.snapshot("old", extra_data_size=0).may_refuse("version 3 must tell the disk size in the extra data")
    image.active.data(0).may_refuse(ACTIVE_IS_FREE)
    return image


# -- sizes -------------------------------------------------------------------------------------------------------------


@case("snapshot-smaller", "the disk has grown since", DISK, TABLE)
def snapshot_smaller(name: str) -> Image:
    image = some_disk(Image(name, 64 * KIB))
    image.snapshot("small")
    image.active.resize(256 * KIB).data(40).data(0)
    return image


@case("snapshot-larger", "the disk has shrunk since: the snapshot is larger", DISK, TABLE)
def snapshot_larger(name: str) -> Image:
    image = some_disk(Image(name, 256 * KIB))
    image.snapshot("large")
    image.active.resize(64 * KIB).data(3)
    return image


@case("snapshot-larger-l1", "the disk has shrunk since, and its L1 table with it", DISK, TABLE)
def snapshot_larger_l1(name: str) -> Image:
    image = Image(name, 256 * KIB, cluster_bits=9)
    image.active.data(0).data(100).data(300).data(511)
    image.snapshot("large")
    image.active.resize(20 * KIB).data(3)
    return image


@case("snapshot-sizes", "snapshots of four sizes, one ending within a cluster", DISK, TABLE)
def snapshot_sizes(name: str) -> Image:
    image = Image(name, 32 * KIB, cluster_bits=9)
    for number, size in enumerate((32 * KIB, 100 * KIB, 512, 60 * KIB + 1536)):
        image.active.resize(size).data((size - 1) // 512).data(0)
        image.snapshot(f"size {number}")
    image.active.resize(80 * KIB).data(90)
    return image


@case("snapshot-size-zero", "a snapshot of an empty disk of no bytes", DISK, TABLE)
def snapshot_size_zero(name: str) -> Image:
    image = Image(name, 0)
    image.active.l1_size = 1
    image.snapshot("nothing")
    image.active.resize(64 * KIB).data(3)
    return image


@case("snapshot-size-part-of-sector", "a snapshot whose size is no multiple of 512", DISK, TABLE)
def snapshot_size_part_of_sector(name: str) -> Image:
    image = Image(name, 30 * KIB + 1000)
    image.active.data(0).data(7)
    image.snapshot("odd")
    image.active.resize(64 * KIB).data(7)
    return image


@case(
    "snapshot-smaller-over-backing",
    "the disk has grown since, over a longer backing file: what is behind the snapshot's end is not the snapshot's",
    DISK,
    Section.UNALLOCATED,
)
def snapshot_smaller_over_backing(name: str) -> Image:
    image = Image(name, 32 * KIB)
    image.over_raw(image.lines(128 * KIB)).active.data(1)
    image.snapshot("small")
    image.active.resize(64 * KIB)
    for cluster in range(8, 16):
        image.active.zero(cluster)
    return image


@case(
    "snapshot-larger-over-backing",
    "a snapshot that goes on behind the end of the backing file",
    DISK,
    Section.UNALLOCATED,
)
def snapshot_larger_over_backing(name: str) -> Image:
    image = Image(name, 128 * KIB)
    image.over_raw(image.lines(100 * KIB)).active.data(1).data(30)
    image.snapshot("large")
    image.active.resize(32 * KIB).data(1)
    return image


# -- VM states ---------------------------------------------------------------------------------------------------------


def with_vm_state(image: Image, state: State, length: int) -> None:
    """A VM state of some bytes, which lie behind the disk."""
    state.vm_state(b"QEVM" + image.lines(length - 4))


@case("snapshot-vm-state", "a snapshot with a VM state, which lies behind its disk and is not part of it", DISK, TABLE)
def snapshot_vm_state(name: str) -> Image:
    image = some_disk(Image(name, 64 * KIB))
    with_vm_state(image, image.snapshot("running", vm_state_size=10000), 10000)
    image.active.data(0)
    return image


@case(
    "snapshot-vm-state-grown",
    "a VM state right behind a snapshot's disk, where the active disk has data now",
    DISK,
    TABLE,
)
def snapshot_vm_state_grown(name: str) -> Image:
    image = Image(name, 64 * KIB, cluster_bits=9)
    image.active.data(0).data(127)
    with_vm_state(image, image.snapshot("running", vm_state_size=3000), 3000)
    image.active.resize(128 * KIB).data(128)
    return image


@case(
    "snapshot-vm-state-32-bits",
    "a 32-bit size of the VM state that is to be ignored, as there is one of 64 bits",
    TABLE,
)
def snapshot_vm_state_32_bits(name: str) -> Image:
    image = some_disk(Image(name, 64 * KIB))
    image.snapshot("not running", vm_state_size=0xFFFFFFFF, vm_state_size_large=0)
    image.active.data(1)
    return image


# -- entries -----------------------------------------------------------------------------------------------------------

for _extra in (16, 24, 25, 32, 200, 1024):

    @case(f"snapshot-extra-{_extra}", f"entries with {_extra} bytes of extra data, those not known full of ones", TABLE)
    def snapshot_extra(name: str) -> Image:
        extra = int(name.rpartition("-")[2])
        image = some_disk(Image(name, 64 * KIB))
        for number in range(3):
            unknown = b"\xff" * (extra - min(extra // 8 * 8, 24))
            image.snapshot(f"snapshot {number}", extra_data_size=extra, unknown_extra_data=unknown)
            image.active.data(number)
        return image


@case("snapshot-icount", "a snapshot with an instruction count", TABLE)
def snapshot_icount(name: str) -> Image:
    image = some_disk(Image(name, 64 * KIB))
    image.snapshot("replay", icount=123_456_789)
    image.active.data(0)
    return image


@case("snapshot-padding", "padding between entries that is not zeros", TABLE)
def snapshot_padding(name: str) -> Image:
    image = some_disk(Image(name, 64 * KIB))
    for number, label in enumerate(("a", "four", "seven..")):
        used = 40 + 24 + 1 + len(label)
        image.snapshot(label, padding=b"\xff" * (-used % 8))
        image.active.data(number)
    return image


@case("snapshot-table-of-clusters", "a snapshot table of several clusters, with an entry across each border", TABLE)
def snapshot_table_of_clusters(name: str) -> Image:
    image = Image(name, 64 * KIB, cluster_bits=9)
    for number in range(16):
        image.active.data(number)
        image.snapshot(f"snapshot number {number:02} " + "." * 20)
    return image


@case("snapshot-copied", "COPIED bits in a snapshot's tables, which mean nothing there", DISK, Section.L1_ENTRY)
def snapshot_copied(name: str) -> Image:
    image = some_disk(Image(name, 64 * KIB))
    state = image.snapshot("before")
    state.exact_l1[0] = COPIED | state.tables[0].host_offset
    image.active.data(0)
    return image


@case("snapshot-l1-longer", "a snapshot's L1 table of more entries than its disk needs", TABLE)
def snapshot_l1_longer(name: str) -> Image:
    image = some_disk(Image(name, 64 * KIB))
    image.snapshot("longer").l1_size = 50
    image.active.data(0)
    return image


@case("snapshot-l1-of-clusters", "a snapshot's L1 table of several clusters", TABLE)
def snapshot_l1_of_clusters(name: str) -> Image:
    image = Image(name, 6 * MIB, cluster_bits=9)
    for cluster in (0, 4095, 4096, 12287):
        image.active.data(cluster)
    image.snapshot("long")
    image.active.data(4096)
    return image


@case("snapshot-host-order", "a snapshot whose clusters lie behind those of the active disk", DISK)
def snapshot_host_order(name: str) -> Image:
    image = some_disk(Image(name, 64 * KIB))
    state = image.snapshot("reverted from")
    state.data(0).data(9).zero(2)
    return image


# -- names -------------------------------------------------------------------------------------------------------------

_NAMES: dict[str, tuple[str, list[str | bytes]]] = {
    "utf-8": ("names that are not ASCII", ["grün", "снимок", "スナップ", "🙂 and a space"]),
    "odd": ("names that shells and options could take for something else", ["-rf", "a b'c\"d", "$(false)", "*", "a=b"]),
    "long": ("names of 255 and 1,023 bytes", ["n" * 255, "m" * 1023]),
    "one-byte": ("names of one byte", ["a", "b"]),
    "duplicate": ("two snapshots of one name: only the id tells them apart", ["same", "same", "other"]),
    "empty": ("a snapshot without a name", ["", "named"]),
    "is-id": ("a name that is the id of another", ["2", "other"]),
    "not-utf-8": ("a name that is not UTF-8", [b"caf\xe9", b"\xff\xfe"]),
    "prefix": ("names that start with each other", ["snap", "snapshot", "snapshot-2"]),
}

for _label, (_about, _names) in _NAMES.items():

    @case(f"snapshot-name-{_label}", _about, TABLE)
    def snapshot_name(name: str) -> Image:
        image = some_disk(Image(name, 64 * KIB))
        for number, each in enumerate(_NAMES[name.removeprefix("snapshot-name-")][1]):
            image.snapshot(each)
            image.active.data(number)
        return image


@case("snapshot-id-text", "ids that are no numbers, and none in order", TABLE)
def snapshot_id_text(name: str) -> Image:
    image = some_disk(Image(name, 64 * KIB))
    for number, id_ in enumerate(("17", "abc", "0", "i" * 100)):
        image.snapshot(f"named {number}", id_)
        image.active.data(number)
    return image


# -- tables that cannot be read ----------------------------------------------------------------------------------------


def broken_snapshot(name: str, about: str, reason: str, **fields: Any) -> None:
    """A case of a snapshot with these fields in its entry, which cannot be read then; the active disk may be."""

    @case(name, about, TABLE)
    def make(name: str) -> Image:
        image = Image(name, 256 * KIB, cluster_bits=9)
        image.active.data(0).data(100).data(500)
        image.snapshot("broken", **fields).refuse(reason)
        image.active.data(3).may_refuse(ACTIVE_IS_FREE)
        return image


broken_snapshot(
    "refuse-snapshot-l1-unaligned",
    "a snapshot's L1 table that starts within a cluster",
    "the L1 table must be aligned to a cluster boundary",
    l1_table_offset=0x408,
)
broken_snapshot(
    "refuse-snapshot-l1-short",
    "a snapshot's L1 table that is too small for its disk",
    "the L1 table does not describe the whole disk",
    l1_size=3,
)
broken_snapshot(
    "refuse-snapshot-l1-huge",
    "a snapshot's L1 table of 32 GiB",
    "no file holds such a table",
    l1_size=0xFFFFFFFF,
)


@case("refuse-snapshots-unaligned", "a snapshot table that starts within a cluster", Section.SNAPSHOTS)
def refuse_snapshots_unaligned(name: str) -> Image:
    image = some_disk(Image(name, 64 * KIB))
    image.snapshot("lost").refuse("the snapshot table must be aligned to a cluster boundary")
    image.fields["snapshots_offset"] = 0x1008
    image.active.may_refuse(ACTIVE_IS_FREE)
    return image


@case("refuse-snapshots-beyond-file", "a snapshot table behind the end of the file", Section.SNAPSHOTS)
def refuse_snapshots_beyond_file(name: str) -> Image:
    image = some_disk(Image(name, 64 * KIB))
    image.snapshot("lost").refuse("there is no such table")
    image.fields["snapshots_offset"] = 1 << 40
    image.active.may_refuse(ACTIVE_IS_FREE)
    return image


@case("refuse-snapshots-absent", "a snapshot that is not in the table", Section.SNAPSHOTS)
def refuse_snapshots_absent(name: str) -> Image:
    image = some_disk(Image(name, 64 * KIB))
    image.snapshot("there")
    image.snapshot("deleted").refuse("there is no such snapshot")
    image.fields["nb_snapshots"] = 1
    return image
