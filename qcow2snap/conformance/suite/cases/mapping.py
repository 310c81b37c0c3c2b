"""Section "Cluster mapping", without compressed clusters; and "Host cluster management", which readers can ignore."""

from __future__ import annotations

from qcow2snap.conformance.suite.builder import GIB, KIB, Image
from qcow2snap.conformance.suite.cases.header import some_disk
from qcow2snap.conformance.suite.registry import case
from qcow2snap.conformance.suite.state import COPIED
from qcow2snap.conformance.suite.values import Section

# -- L1 entries --------------------------------------------------------------------------------------------------------


@case("l1-all-unallocated", "L1 entries that are all zero: an empty disk", Section.L1_ENTRY)
def l1_all_unallocated(name: str) -> Image:
    return Image(name, 256 * KIB, cluster_bits=9)


@case("l1-gaps", "L1 entries without tables between others that have them", Section.L1_ENTRY)
def l1_gaps(name: str) -> Image:
    image = Image(name, 256 * KIB, cluster_bits=9)
    image.active.data(64).data(3 * 64 + 63).data(7 * 64)
    return image


@case("l1-not-copied", "L1 and L2 entries without the COPIED bit, as where a snapshot shares them", Section.L1_ENTRY)
def l1_not_copied(name: str) -> Image:
    image = some_disk(Image(name, 64 * KIB))
    image.snapshot("shares")
    return image


@case("l1-empty-table", "an L2 table of zeros", Section.L1_ENTRY, Section.UNALLOCATED)
def l1_empty_table(name: str) -> Image:
    image = Image(name, 64 * KIB, cluster_bits=9)
    image.active.table(0).table(1).data(70)
    return image


@case("l1-shared-table", "two L1 entries that point to one L2 table", Section.L1_ENTRY)
def l1_shared_table(name: str) -> Image:
    image = Image(name, 96 * KIB, cluster_bits=9)
    image.active.data(1).data(63).share(2, 0)
    return image


@case("l1-tables-in-reverse", "L2 tables in the file in another order than in the L1 table", Section.L1_ENTRY)
def l1_tables_in_reverse(name: str) -> Image:
    image = Image(name, 128 * KIB, cluster_bits=9)
    for cluster in (255, 191, 127, 0):
        image.active.data(cluster)
    return image


# -- standard clusters -------------------------------------------------------------------------------------------------


@case("mapping-full", "all clusters have data, one behind the other", Section.STANDARD)
def mapping_full(name: str) -> Image:
    image = Image(name, 64 * KIB)
    for cluster in range(16):
        image.active.data(cluster)
    return image


@case("mapping-reverse", "host clusters in reverse order", Section.STANDARD)
def mapping_reverse(name: str) -> Image:
    image = Image(name, 64 * KIB)
    for cluster in reversed(range(16)):
        image.active.data(cluster)
    return image


@case("mapping-alternating", "data and holes in turn", Section.STANDARD, Section.UNALLOCATED)
def mapping_alternating(name: str) -> Image:
    image = Image(name, 128 * KIB, cluster_bits=10)
    for cluster in range(0, 128, 2):
        image.active.data(cluster)
    return image


@case("mapping-shared-cluster", "guest clusters that share a host cluster", Section.STANDARD)
def mapping_shared_cluster(name: str) -> Image:
    image = Image(name, 64 * KIB)
    image.active.data(3).same(4, 3).same(0, 3).data(5).same(15, 5)
    return image


@case("mapping-data-of-zeros", "clusters whose data are zeros", Section.STANDARD)
def mapping_data_of_zeros(name: str) -> Image:
    image = Image(name, 64 * KIB)
    image.active.data(0, bytes(4096)).data(1).data(2, bytes(4096))
    return image


@case("mapping-beyond-disk", "L2 entries behind the end of the disk, with data: no part of it", Section.MAPPING)
def mapping_beyond_disk(name: str) -> Image:
    image = Image(name, 20 * KIB)
    image.active.data(0).data(4).data(5).data(9).data(400)
    return image


@case("mapping-host-gaps", "free clusters and garbage between those in use", Section.MAPPING, Section.REFCOUNTS)
def mapping_host_gaps(name: str) -> Image:
    image = Image(name, 64 * KIB)
    for cluster in (0, 7, 3):
        image.file.put(image.host.end, b"QFI\xfb" * 4096)
        image.host.skip_to(image.host.end + 4 * image.cluster_size)
        image.active.data(cluster)
    return image


@case("mapping-host-beyond-4g", "host offsets that need more than 32 bits", Section.STANDARD, large=True)
def mapping_host_beyond_4g(name: str) -> Image:
    image = Image(name, 1 << 20, cluster_bits=16)
    image.is_sparse = True
    image.active.data(0)
    image.host.skip_to(4 * GIB)
    image.active.data(1).data(3)
    image.host.skip_to(5 * GIB - (2 << 16))
    image.active.data(5).data(6)
    return image


@case("mapping-last-cluster-cut", "a file that ends within its last data cluster", Section.STANDARD)
def mapping_last_cluster_cut(name: str) -> Image:
    image = Image(name, 64 * KIB, cluster_bits=14).metadata_first()
    image.active.data(0).data(3, image.lines(5000).ljust(16 * KIB, b"\0"))
    image.ends_at = image.host.end - 16 * KIB + 5120
    return image.may_refuse("the specification does not say what lies behind the end of the file")


# -- zero clusters -----------------------------------------------------------------------------------------------------


@case("zero-plain", "zero clusters without a host cluster", Section.STANDARD)
def zero_plain(name: str) -> Image:
    image = Image(name, 64 * KIB)
    image.active.data(0).zero(1).zero(2).data(3).zero(15)
    return image


@case("zero-allocated", "zero clusters that have a host cluster, whose bytes are not to be read", Section.STANDARD)
def zero_allocated(name: str) -> Image:
    image = Image(name, 64 * KIB)
    image.active.data(0).zero(1, allocated=True).zero(2, allocated=True).data(3).zero(15, allocated=True)
    return image


@case("zero-over-backing", "zero clusters over a backing file, which they hide", Section.STANDARD)
def zero_over_backing(name: str) -> Image:
    image = Image(name, 64 * KIB)
    image.over_raw(image.lines(64 * KIB)).active.zero(1).zero(3, allocated=True).data(4).zero(15)
    return image


# -- refcounts: a reader need not look at them -------------------------------------------------------------------------

for _order in range(7):

    @case(f"refcount-order-{_order}", f"refcounts of {1 << _order} bits", Section.REFCOUNTS)
    def refcount_order(name: str) -> Image:
        return some_disk(Image(name, 64 * KIB, refcount_order=int(name.rpartition("-")[2])))


@case("refcount-many-blocks", "several refcount blocks, and one without refcounts left out", Section.REFCOUNTS)
def refcount_many_blocks(name: str) -> Image:
    image = Image(name, 64 * KIB, cluster_bits=9, refcount_order=6)
    for cluster in range(0, 128, 3):
        image.active.data(cluster)
    image.host.skip_to(200 * image.cluster_size)
    image.active.data(1)
    return image


@case("refcount-table-of-clusters", "a refcount table of several clusters", Section.REFCOUNTS)
def refcount_table_of_clusters(name: str) -> Image:
    image = Image(name, 64 * KIB, cluster_bits=9, refcount_order=6)
    image.active.data(0)
    image.host.skip_to(64 * 64 * image.cluster_size + 512)
    image.active.data(1)
    return image


# -- entries that nothing can be read by -------------------------------------------------------------------------------


@case("refuse-l1-entry-unaligned", "an L2 table that does not start at a cluster boundary", Section.L1_ENTRY)
def refuse_l1_entry_unaligned(name: str) -> Image:
    image = some_disk(Image(name, 64 * KIB))
    image.active.exact_l1[0] = COPIED | image.active.tables[0].host_offset + 512
    return image.refuse("the L2 table must be aligned to a cluster boundary")


@case("refuse-l2-entry-unaligned", "a data cluster that does not start at a cluster boundary", Section.STANDARD)
def refuse_l2_entry_unaligned(name: str) -> Image:
    image = some_disk(Image(name, 64 * KIB))
    image.active.entry(1, COPIED | image.active.tables[0].host_offset + 512)
    return image.refuse("the host cluster offset must be aligned to a cluster boundary")


@case("refuse-v2-zero-bit", "version 2 with bit 0 of an L2 entry set, which is always 0 there", Section.STANDARD)
def refuse_v2_zero_bit(name: str) -> Image:
    image = some_disk(Image(name, 64 * KIB, version=2))
    image.active.entry(1, 1)
    return image.refuse("there are no zero clusters in version 2")
