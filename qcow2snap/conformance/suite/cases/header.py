"""Section "Header" and its additional fields: versions, lengths, cluster sizes, disk sizes, feature bits."""

from __future__ import annotations

from formats.qcow2 import AutoclearFeature, CompatibleFeature, IncompatibleFeature
from qcow2snap.conformance.suite.builder import GIB, KIB, MIB, Image
from qcow2snap.conformance.suite.registry import case
from qcow2snap.conformance.suite.values import Section


def some_disk(image: Image) -> Image:
    """Data, a hole, a zero cluster if there are such, and data that the disk ends with."""
    last = (image.active.size - 1) // image.cluster_size
    image.active.data(0).data(2)
    if image.version >= 3:
        image.active.zero(3)
    image.active.data(last)
    return image


@case("header-v2", "version 2: a header of 72 bytes, with nothing behind it that counts", Section.HEADER)
def header_v2(name: str) -> Image:
    image = Image(name, 64 * KIB, version=2)
    image.has_end_marker = False
    return some_disk(image)


@case("header-v2-extensions", "version 2 with header extensions at byte 72", Section.HEADER, Section.EXTENSIONS)
def header_v2_extensions(name: str) -> Image:
    return some_disk(
        Image(name, 64 * KIB, version=2).extension(0x12345678, b"unknown").over_raw(bytes(range(256)) * 64)
    )


@case("header-v3", "version 3 with the shortest header, of 104 bytes", Section.HEADER)
def header_v3(name: str) -> Image:
    return some_disk(Image(name, 64 * KIB))


for _length in (112, 120, 256):
    _about = f"a header of {_length} bytes, zeros where fields are not known"

    @case(f"header-length-{_length}", _about, Section.PADDING, Section.ADDITIONAL)
    def header_length(name: str) -> Image:
        return some_disk(Image(name, 64 * KIB, header_length=int(name.rpartition("-")[2])))


@case(
    "header-length-extensions",
    "a header of 144 bytes, and extensions behind it, and a backing file: they start where header_length says",
    Section.EXTENSIONS,
    Section.ADDITIONAL,
    Section.BACKING_FILE,
)
def header_length_extensions(name: str) -> Image:
    image = Image(name, 64 * KIB, header_length=144)
    return some_disk(image.over_raw(image.lines(64 * KIB)))


@case(
    "header-length-fills-cluster",
    "a header that fills the first cluster, so that nothing can be behind it",
    Section.ADDITIONAL,
)
def header_length_fills_cluster(name: str) -> Image:
    image = Image(name, 32 * KIB, cluster_bits=9, header_length=512)
    image.has_end_marker = False
    return some_disk(image)


@case(
    "header-unknown-fields",
    "additional fields that are not known are not zero: without an incompatible bit they are safely ignored",
    Section.ADDITIONAL,
)
def header_unknown_fields(name: str) -> Image:
    image = Image(name, 64 * KIB, header_length=128)
    image.fields["padding"] = bytes(7) + bytes(range(1, 17))
    return some_disk(image)


# -- cluster sizes -----------------------------------------------------------------------------------------------------

for _bits in range(9, 22):

    @case(f"cluster-bits-{_bits}", f"clusters of {1 << _bits} bytes", Section.CLUSTER_BITS)
    def cluster_bits(name: str) -> Image:
        bits = int(name.rpartition("-")[2])
        return some_disk(Image(name, (5 << bits) - 512, cluster_bits=bits))


for _bits in (9, 16):

    @case(f"cluster-bits-{_bits}-v2", f"clusters of {1 << _bits} bytes, version 2", Section.CLUSTER_BITS)
    def cluster_bits_v2(name: str) -> Image:
        bits = int(name.split("-")[2])
        return some_disk(Image(name, 6 << bits, cluster_bits=bits, version=2))


# -- disk sizes --------------------------------------------------------------------------------------------------------


@case("size-zero", "a disk of no bytes", Section.SIZE)
def size_zero(name: str) -> Image:
    image = Image(name, 0)
    image.active.l1_size = 1
    return image


@case("size-sector", "a disk of one sector", Section.SIZE)
def size_sector(name: str) -> Image:
    image = Image(name, 512)
    image.active.data(0)
    return image


@case("size-part-of-cluster", "a disk that ends within a cluster: what the cluster has beyond is not its", Section.SIZE)
def size_part_of_cluster(name: str) -> Image:
    return some_disk(Image(name, 60 * KIB + 1536, cluster_bits=14))


@case("size-part-of-sector", "a disk whose size is no multiple of 512", Section.SIZE)
def size_part_of_sector(name: str) -> Image:
    return some_disk(Image(name, 60 * KIB + 1000))


@case("size-many-l1-entries", "a disk of several L2 tables, with data in each", Section.SIZE, Section.MAPPING)
def size_many_l1_entries(name: str) -> Image:
    image = Image(name, 200 * KIB, cluster_bits=9)
    for cluster in range(0, 400, 37):
        image.active.data(cluster)
    return image


@case("size-beyond-4g", "data at guest offsets that need more than 32 bits", Section.SIZE, large=True)
def size_beyond_4g(name: str) -> Image:
    image = Image(name, 4 * GIB + 3 * MIB, cluster_bits=16)
    image.active.data(0).data((4 * GIB >> 16) - 1).data(4 * GIB >> 16).data((4 * GIB >> 16) + 47)
    return image


# -- the L1 table ------------------------------------------------------------------------------------------------------


@case("l1-longer", "an L1 table of more entries than the disk needs, and they are empty", Section.L1_SIZE)
def l1_longer(name: str) -> Image:
    image = some_disk(Image(name, 64 * KIB))
    image.active.l1_size = 100
    return image


@case(
    "l1-longer-in-use",
    "an L1 table with tables behind those of the disk (a VM state was loaded): they are no part of it",
    Section.L1_SIZE,
)
def l1_longer_in_use(name: str) -> Image:
    image = some_disk(Image(name, 64 * KIB))
    image.active.vm_state(image.lines(10000))
    return image


@case("l1-many-clusters", "an L1 table of several clusters", Section.L1_SIZE)
def l1_many_clusters(name: str) -> Image:
    image = Image(name, 6 * MIB, cluster_bits=9)
    for cluster in (0, 64 * 64 - 1, 64 * 64, 2 * 64 * 64 + 5, 6 * MIB // 512 - 1):
        image.active.data(cluster)
    return image


@case("l1-ends-file", "the file ends with the last entry of the L1 table, not with a cluster", Section.L1_SIZE)
def l1_ends_file(name: str) -> Image:
    image = Image(name, 64 * KIB).metadata_first()
    image.active.data(0).data(15)
    l1 = image.host.clusters(1, "L1 table, moved")
    image.move_l1(l1)
    image.ends_at = l1 + 8
    return image


# -- features ----------------------------------------------------------------------------------------------------------


@case(
    "feature-dirty",
    "the dirty bit: refcounts may be wrong, and here all are zero; the mapping is right",
    Section.INCOMPATIBLE,
    Section.REFCOUNTS,
)
def feature_dirty(name: str) -> Image:
    image = some_disk(Image(name, 64 * KIB))
    image.features |= IncompatibleFeature.DIRTY
    image.compatible |= CompatibleFeature.LAZY_REFCOUNTS
    image.has_refcounts = False
    return image


@case("feature-corrupt", "the corrupt bit: the image must not be written, but can be read", Section.INCOMPATIBLE)
def feature_corrupt(name: str) -> Image:
    image = some_disk(Image(name, 64 * KIB))
    image.features |= IncompatibleFeature.CORRUPT
    return image


@case("feature-lazy-refcounts", "lazy refcounts, cleanly closed", Section.COMPATIBLE)
def feature_lazy_refcounts(name: str) -> Image:
    image = some_disk(Image(name, 64 * KIB))
    image.compatible |= CompatibleFeature.LAZY_REFCOUNTS
    return image


@case("feature-unknown-compatible", "unknown compatible bits, which can be ignored", Section.COMPATIBLE)
def feature_unknown_compatible(name: str) -> Image:
    image = some_disk(Image(name, 64 * KIB))
    image.compatible |= 1 << 1 | 1 << 63
    return image


@case("feature-unknown-autoclear", "unknown autoclear bits, which only writers mind", Section.AUTOCLEAR)
def feature_unknown_autoclear(name: str) -> Image:
    image = some_disk(Image(name, 64 * KIB))
    image.autoclear |= 1 << 2 | 1 << 63
    return image


for _bit in (5, 31, 32, 63):

    @case(
        f"feature-unknown-incompatible-{_bit}",
        f"incompatible bit {_bit}, which is not known: the image must not be opened",
        Section.INCOMPATIBLE,
    )
    def feature_unknown_incompatible(name: str) -> Image:
        image = some_disk(Image(name, 64 * KIB))
        image.features |= 1 << int(name.rpartition("-")[2])
        return image.refuse("an unknown incompatible feature bit is set")


@case(
    "feature-unknown-incompatible-named",
    "an unknown incompatible bit that the feature name table has a name for: that makes it no more known",
    Section.INCOMPATIBLE,
    Section.FEATURE_NAMES,
)
def feature_unknown_incompatible_named(name: str) -> Image:
    image = some_disk(Image(name, 64 * KIB).feature_names((0, 0, "dirty bit"), (0, 20, "time travel")))
    image.features |= 1 << 20
    return image.refuse("an unknown incompatible feature bit is set")


# -- what no reader can make sense of ----------------------------------------------------------------------------------


def broken(name: str, about: str, section: Section, reason: str, size: int = 64 * KIB, **fields: int) -> None:
    """A case of some disk, but for these fields of its header."""

    @case(name, about, section)
    def make(name: str) -> Image:
        image = some_disk(Image(name, size))
        image.fields |= fields
        return image.refuse(reason)


broken("refuse-version-1", "version 1", Section.HEADER, "the version is neither 2 nor 3", version=1)
broken("refuse-version-4", "version 4", Section.HEADER, "the version is neither 2 nor 3", version=4)
broken(
    "refuse-cluster-bits-8", "cluster_bits below 9", Section.CLUSTER_BITS, "cluster_bits is less than 9", cluster_bits=8
)
broken(
    "refuse-cluster-bits-64",
    "cluster_bits that no integer can be shifted by",
    Section.CLUSTER_BITS,
    "no cluster has 2^64 bytes",
    cluster_bits=64,
)
broken(
    "refuse-header-length-short",
    "header_length below 104",
    Section.HEADER,
    "header_length is less than 104",
    header_length=96,
)
broken(
    "refuse-header-length-long",
    "header_length beyond the first cluster",
    Section.HEADER,
    "the header does not fit into the first cluster",
    header_length=8192,
)
broken(
    "refuse-refcount-order-7",
    "refcount_order above 6",
    Section.REFCOUNTS,
    "refcount_order may not exceed 6",
    refcount_order=7,
)
broken(
    "refuse-crypt-method-3",
    "an encryption method that is not known",
    Section.ENCRYPTION,
    "crypt_method is not 0, 1 or 2",
    crypt_method=3,
)
broken(
    "refuse-l1-unaligned",
    "an L1 table that starts within a cluster",
    Section.L1_SIZE,
    "the L1 table must be aligned to a cluster boundary",
    l1_table_offset=0x1008,
)
broken(
    "refuse-l1-short",
    "an L1 table that is too small for the disk",
    Section.L1_SIZE,
    "the L1 table does not describe the whole disk",
    size=3 * MIB,
    l1_size=1,
)
broken(
    "refuse-compression-bit-alone",
    "the compression type bit without the field",
    Section.ADDITIONAL,
    "with the bit set, the compression type must be present and not zero",
    incompatible_features=int(IncompatibleFeature.COMPRESSION_TYPE),
)


@case("refuse-magic", "a file that is no qcow2 image", Section.HEADER)
def refuse_magic(name: str) -> Image:
    image = some_disk(Image(name, 64 * KIB))
    image.patches.append((0, b"QFI\xfa"))
    return image.refuse("the magic is not QFI\\xfb")


@case("refuse-header-cut", "a file that ends within the header", Section.HEADER)
def refuse_header_cut(name: str) -> Image:
    image = some_disk(Image(name, 64 * KIB))
    image.ends_at = 60
    return image.refuse("the file does not hold the header")


@case("refuse-compression-type-2", "a compression type that is not known", Section.ADDITIONAL)
def refuse_compression_type_2(name: str) -> Image:
    image = some_disk(Image(name, 64 * KIB, zstd=True))
    image.fields["compression_type"] = 2
    return image.refuse("the compression type is neither 0 nor 1")


@case("refuse-compression-type-alone", "compression type zstd without its incompatible bit", Section.ADDITIONAL)
def refuse_compression_type_alone(name: str) -> Image:
    image = some_disk(Image(name, 64 * KIB, zstd=True))
    image.features = 0
    return image.refuse("without the bit, the compression type must be absent or zero")


@case("refuse-compression-bit-zero", "the compression type bit, and a type of 0", Section.ADDITIONAL)
def refuse_compression_bit_zero(name: str) -> Image:
    image = some_disk(Image(name, 64 * KIB, zstd=True))
    image.fields["compression_type"] = 0
    return image.refuse("with the bit set, the compression type must be present and not zero")


@case("refuse-raw-data-bit-alone", "the raw external data bit without an external data file", Section.AUTOCLEAR)
def refuse_raw_data_bit_alone(name: str) -> Image:
    image = some_disk(Image(name, 64 * KIB))
    image.autoclear |= AutoclearFeature.RAW_EXTERNAL_DATA
    return image.refuse("the raw external data bit needs the external data file bit")
