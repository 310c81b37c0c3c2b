"""Section "Extended L2 Entries": every state that a subcluster can have, alone and beside others."""

from __future__ import annotations

from formats.qcow2 import ExtendedL2Entry
from qcow2snap.conformance.suite import deflate, zstd
from qcow2snap.conformance.suite.builder import KIB, MIB, Image
from qcow2snap.conformance.suite.content import lines
from qcow2snap.conformance.suite.registry import case
from qcow2snap.conformance.suite.values import Section

EACH_FIRST = "d" + "." * 31, "z" + "." * 31, "." * 31 + "d", "." * 31 + "z"
MIXED = "ddd..zz.d.z.dzdz" * 2


def image_of(name: str, size: int = 256 * KIB, *, cluster_bits: int = 14, zstd: bool = False) -> Image:
    return Image(name, size, cluster_bits=cluster_bits, extended_l2=True, zstd=zstd)


for _bits in (14, 15, 16, 20):

    @case(f"extended-cluster-bits-{_bits}", f"subclusters of {1 << _bits >> 5} bytes, mixed", Section.EXTENDED_L2)
    def extended_cluster_bits(name: str) -> Image:
        bits = int(name.rpartition("-")[2])
        image = image_of(name, 5 << bits, cluster_bits=bits)
        image.active.subclusters(0, MIXED).data(1).zero(3).subclusters(4, MIXED[::-1])
        return image


@case("extended-all-unallocated", "an L2 table without any allocated subcluster", Section.EXTENDED_L2)
def extended_all_unallocated(name: str) -> Image:
    image = image_of(name)
    image.active.table(0)
    return image


@case("extended-all-allocated", "clusters with all their subclusters", Section.EXTENDED_L2)
def extended_all_allocated(name: str) -> Image:
    image = image_of(name)
    image.active.data(0).data(1).data(7)
    return image


@case(
    "extended-all-zero",
    "clusters all of whose subclusters are zeros, with a host cluster and without",
    Section.EXTENDED_L2,
)
def extended_all_zero(name: str) -> Image:
    image = image_of(name)
    image.active.zero(0).zero(2, allocated=True).data(3)
    return image


@case("extended-first-and-last", "the first or the last subcluster has data or is zeros", Section.EXTENDED_L2)
def extended_first_and_last(name: str) -> Image:
    image = image_of(name)
    for cluster, states in enumerate(EACH_FIRST):
        image.active.subclusters(2 * cluster, states)
    return image


@case("extended-alternating", "data and holes, data and zeros, zeros and holes in turn", Section.EXTENDED_L2)
def extended_alternating(name: str) -> Image:
    image = image_of(name)
    image.active.subclusters(0, "d." * 16).subclusters(1, ".d" * 16).subclusters(2, "dz" * 16)
    image.active.subclusters(3, "z." * 16).subclusters(4, "z." * 16, host=True)
    return image


@case(
    "extended-host-without-data",
    "a host cluster none of whose subclusters is allocated: its bytes are not to be read",
    Section.EXTENDED_L2,
)
def extended_host_without_data(name: str) -> Image:
    image = image_of(name)
    image.active.subclusters(1, "." * 32, host=True).data(2)
    return image


@case(
    "extended-over-backing",
    "unallocated subclusters show the backing file, zeros hide it",
    Section.EXTENDED_L2,
    Section.UNALLOCATED,
)
def extended_over_backing(name: str) -> Image:
    image = image_of(name)
    image.over_raw(image.lines(200 * KIB))
    image.active.subclusters(0, MIXED).zero(1).subclusters(2, "." * 32, host=True).subclusters(3, "z" * 16 + "." * 16)
    image.active.subclusters(12, MIXED).subclusters(14, MIXED)
    return image


@case("extended-under-backing", "a backing file with extended L2 entries", Section.EXTENDED_L2, Section.UNALLOCATED)
def extended_under_backing(name: str) -> Image:
    base = image_of(f"{name}.base", 128 * KIB)
    base.active.subclusters(0, MIXED).subclusters(3, MIXED).data(5)
    image = Image(name, 200 * KIB, cluster_bits=10).over(base)
    image.active.data(1).zero(50)
    return image.may_refuse("its backing file needs incompatible feature bit 4")


@case("extended-part-of-cluster", "a disk that ends within a subcluster", Section.EXTENDED_L2)
def extended_part_of_cluster(name: str) -> Image:
    image = image_of(name, 4 * 32 * KIB + 5 * KIB + 512, cluster_bits=15)
    image.active.subclusters(4, "dz.ddd" + "d" * 26).data(0)
    return image


@case(
    "extended-many-tables", "several L2 tables, which have half as many entries", Section.EXTENDED_L2, Section.MAPPING
)
def extended_many_tables(name: str) -> Image:
    image = image_of(name, 33 * MIB)
    for cluster in (0, 1023, 1024, 1025, 2047, 2048, 2111):
        image.active.subclusters(cluster, MIXED)
    return image


@case("extended-compressed", "compressed clusters among extended entries", Section.EXTENDED_L2, Section.COMPRESSED)
def extended_compressed(name: str) -> Image:
    image = image_of(name)
    for cluster in (1, 2, 9):
        data = image.lines(image.cluster_size)
        image.active.compressed(cluster, deflate.dynamic(deflate.tokens(data)), data)
    image.active.subclusters(0, MIXED).subclusters(3, MIXED)
    return image


@case("extended-zstd", "extended entries and Zstandard", Section.EXTENDED_L2, Section.COMPRESSED)
def extended_zstd(name: str) -> Image:
    image = image_of(name, zstd=True)
    data = lines(0, image.cluster_size)
    image.active.compressed(1, zstd.raw(data), data).subclusters(0, MIXED)
    return image


@case("extended-snapshot", "a snapshot, and subclusters that changed since", Section.EXTENDED_L2, Section.SNAPSHOTS)
def extended_snapshot(name: str) -> Image:
    image = image_of(name)
    image.active.subclusters(0, MIXED).data(1).zero(2)
    image.snapshot("before")
    image.active.subclusters(0, MIXED[::-1]).subclusters(1, "d" * 31 + ".").unallocated(2)
    return image


@case("extended-data-file", "extended entries and an external data file", Section.EXTENDED_L2, Section.DATA_FILE)
def extended_data_file(name: str) -> Image:
    image = image_of(name).with_data_file()
    image.active.subclusters(0, MIXED).data(1).subclusters(3, MIXED).zero(4)
    return image


@case("refuse-extended-cluster-bits-13", "extended entries and clusters of 8 KiB", Section.CLUSTER_BITS)
def refuse_extended_cluster_bits_13(name: str) -> Image:
    image = Image(name, 64 * KIB, cluster_bits=13, extended_l2=True)
    image.active.data(0)
    return image.refuse("with extended L2 entries, cluster_bits must be at least 14")


def broken_entry(name: str, about: str, reason: str, *, host: bool, allocated: int, zero: int) -> None:
    @case(name, about, Section.EXTENDED_L2)
    def make(name: str) -> Image:
        image = image_of(name)
        image.active.data(0)
        cluster = {"zero": 0, "reserved_low": 0, "offset": image.host.end if host else 0, "reserved_high": 0}
        bits = {"allocated": allocated, "zero": zero}
        words = ExtendedL2Entry.build(
            {"cluster": cluster | {"compressed": 0, "copied": int(host)}, "subclusters": bits}
        )
        image.host.clusters(1, "guest cluster 1")
        image.active.entry(1, int.from_bytes(words[:8], "big"), int.from_bytes(words[8:], "big"))
        return image.refuse(reason)


broken_entry(
    "refuse-extended-both-bits",
    "a subcluster that is allocated and reads as zeros",
    "where a subcluster reads as zeros, its allocation bit must be unset",
    host=True,
    allocated=0xFF,
    zero=0x80,
)
broken_entry(
    "refuse-extended-no-host",
    "an allocated subcluster of a cluster that has no host cluster",
    "where a subcluster is allocated, the host cluster offset must be valid",
    host=False,
    allocated=0xFF,
    zero=0,
)
