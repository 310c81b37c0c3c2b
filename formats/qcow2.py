"""The qcow2 format on disk: every structure of the specification, declared; it parses and it builds.

Sections named here are those of QEMU's docs/interop/qcow2.rst (qcow2.txt before QEMU 10.2). Names and order are the
specification's. Nothing is judged: a value that the specification does not name stays what it is, and which values
are wrong is for the rules. All numbers are big-endian.

construct parses what an image has one of. Tables with millions of entries (L1, L2, refcounts) are decoded elsewhere
with the masks that the BitFields below define, so that there is one truth for both.
"""

from __future__ import annotations

from enum import IntEnum, IntFlag
from typing import Any, NamedTuple

from construct import (
    Adapter,
    Bytes,
    Computed,
    Const,
    Construct,
    Container,
    ExprAdapter,
    GreedyBytes,
    GreedyRange,
    IfThenElse,
    Int8ub,
    Int16ub,
    Int32ub,
    Int64ub,
    Struct,
    this,
)

# ---------------------------------------------------------------------------------------------------------------------
# Limits: QEMU's own (block/qcow2.h), which the specification mentions as notes. What exceeds them is refused.
# ---------------------------------------------------------------------------------------------------------------------

MIN_CLUSTER_BITS = 9
MAX_CLUSTER_BITS = 21
MIN_CLUSTER_BITS_EXTENDED_L2 = 14
MAX_REFCOUNT_ORDER = 6
MAX_L1_TABLE_SIZE = 32 << 20  # bytes
MAX_REFCOUNT_TABLE_SIZE = 8 << 20  # bytes
MAX_SNAPSHOTS = 65536
MAX_SNAPSHOT_TABLE_SIZE = 64 << 20  # bytes
MAX_SNAPSHOT_EXTRA_DATA_SIZE = 1024  # bytes
MAX_BITMAPS = 65535
MAX_BITMAP_DIRECTORY_SIZE = 65535 * 1048  # bytes: as many of the largest entries as QEMU takes
MAX_BITMAP_TABLE_SIZE = 0x8000000  # entries
MAX_BITMAP_DATA_SIZE = 512 << 20  # bytes of one bitmap in the file
MAX_BACKING_FILE_SIZE = 1023  # bytes of its name

SUBCLUSTERS_PER_CLUSTER = 32
SECTOR_SIZE = 512  # what compressed clusters are counted in

# ---------------------------------------------------------------------------------------------------------------------
# Vocabulary of the declarations
# ---------------------------------------------------------------------------------------------------------------------


def named(layout: Construct, kind: type[IntEnum] | type[IntFlag]) -> Construct:
    """An integer as a member of `kind`; a value that the specification does not name stays an int."""

    def member(value: int, _context: Any) -> int:
        try:
            return kind(value)
        except ValueError:
            return value

    return ExprAdapter(layout, member, lambda value, _context: int(value))


def since_v3(layout: Construct, implied: int) -> Construct:
    """A field that version 2 lacks, and the value that the specification implies for it there."""
    return IfThenElse(this.version >= 3, layout, Computed(implied))


class BitRange(NamedTuple):
    """Bits `first` to `last` of an entry, 0 being the least significant. In place: the value is not shifted down."""

    first: int
    last: int
    in_place: bool = False

    @property
    def mask(self) -> int:
        return (1 << (self.last + 1)) - (1 << self.first)


def bits(first: int, last: int | None = None) -> BitRange:
    return BitRange(first, first if last is None else last)


def offset_bits(first: int, last: int) -> BitRange:
    """The specification's "bits 9-55 of the offset": masked, not shifted."""
    return BitRange(first, last, in_place=True)


class BitFields(Adapter):  # type: ignore[misc]  # construct has no types
    """An integer cut into bit ranges that cover it whole, as the specification's tables of entries give them."""

    def __init__(self, integer: Construct, **ranges: BitRange) -> None:
        super().__init__(integer)
        self.ranges = ranges

    def mask(self, name: str) -> int:
        return self.ranges[name].mask

    def _decode(self, value: int, _context: Any, _path: Any) -> Container:
        return Container(
            {
                name: value & field.mask if field.in_place else (value & field.mask) >> field.first
                for name, field in self.ranges.items()
            }
        )

    def _encode(self, fields: Any, _context: Any, _path: Any) -> int:
        value = 0
        for name, field in self.ranges.items():
            value |= int(fields[name]) << (0 if field.in_place else field.first)
        return value


# ---------------------------------------------------------------------------------------------------------------------
# Section "Header"
# ---------------------------------------------------------------------------------------------------------------------

MAGIC = b"QFI\xfb"


class CryptMethod(IntEnum):
    NONE = 0
    AES = 1
    LUKS = 2


class IncompatibleFeature(IntFlag):
    """A reader refuses an image that sets a bit it does not know."""

    DIRTY = 1 << 0
    CORRUPT = 1 << 1
    EXTERNAL_DATA_FILE = 1 << 2
    COMPRESSION_TYPE = 1 << 3
    EXTENDED_L2_ENTRIES = 1 << 4


class CompatibleFeature(IntFlag):
    """A reader may ignore a bit it does not know."""

    LAZY_REFCOUNTS = 1 << 0


class AutoclearFeature(IntFlag):
    """A writer clears the bits it does not know."""

    BITMAPS = 1 << 0
    RAW_EXTERNAL_DATA = 1 << 1


class CompressionType(IntEnum):
    DEFLATE = 0  # called zlib until QEMU 10.0; clusters are raw deflate, without a zlib header
    ZSTD = 1


HEADER_LENGTH_V2 = 72
HEADER_LENGTH_V3 = 104  # at least
_COMPRESSION_TYPE_END = 105


# fmt: off
# The comments give byte ranges.
Header = Struct(
    "magic" / Const(MAGIC),                        # 0-3
    "version" / Int32ub,                           # 4-7: 2 or 3
    "backing_file_offset" / Int64ub,               # 8-15: 0 if there is no backing file
    "backing_file_size" / Int32ub,                 # 16-19: bytes of its name
    "cluster_bits" / Int32ub,                      # 20-23: cluster size is 1 << cluster_bits
    "size" / Int64ub,                              # 24-31: virtual disk size, bytes
    "crypt_method" / named(Int32ub, CryptMethod),  # 32-35
    "l1_size" / Int32ub,                           # 36-39: entries in the active L1 table
    "l1_table_offset" / Int64ub,                   # 40-47
    "refcount_table_offset" / Int64ub,             # 48-55
    "refcount_table_clusters" / Int32ub,           # 56-59
    "nb_snapshots" / Int32ub,                      # 60-63
    "snapshots_offset" / Int64ub,                  # 64-71: version 2 ends here
    "incompatible_features" / since_v3(named(Int64ub, IncompatibleFeature), IncompatibleFeature(0)),  # 72-79
    "compatible_features" / since_v3(named(Int64ub, CompatibleFeature), CompatibleFeature(0)),        # 80-87
    "autoclear_features" / since_v3(named(Int64ub, AutoclearFeature), AutoclearFeature(0)),           # 88-95
    "refcount_order" / since_v3(Int32ub, 4),                    # 96-99: a refcount has 1 << refcount_order bits
    "header_length" / since_v3(Int32ub, HEADER_LENGTH_V2),      # 100-103: bytes
    # Section "Additional fields": 104, present where header_length reaches beyond it.
    "compression_type" / IfThenElse(
        this.header_length > HEADER_LENGTH_V3, named(Int8ub, CompressionType), Computed(CompressionType.DEFLATE)
    ),
    # Section "Header padding", and fields that later versions of the specification may put there.
    "padding" / Bytes(lambda context: max(0, context.header_length - _COMPRESSION_TYPE_END)),
)
# fmt: on

# ---------------------------------------------------------------------------------------------------------------------
# Section "Header extensions", and those for each of the known ones
# ---------------------------------------------------------------------------------------------------------------------


class HeaderExtensionType(IntEnum):
    END = 0x00000000
    BACKING_FILE_FORMAT = 0xE2792ACA
    FEATURE_NAME_TABLE = 0x6803F857
    BITMAPS = 0x23852875
    FULL_DISK_ENCRYPTION = 0x0537BE77
    EXTERNAL_DATA_FILE = 0x44415441


HEADER_EXTENSION_HEADER_LENGTH = 8

# Section "Header extensions". What follows the end marker is not its data, whatever its length says.
HeaderExtension = Struct(
    "type" / named(Int32ub, HeaderExtensionType),
    "length" / Int32ub,
    "data" / Bytes(lambda context: 0 if context.type == HeaderExtensionType.END else context.length),
    "padding" / Bytes(lambda context: -len(context.data) % 8),
)


class FeatureType(IntEnum):
    INCOMPATIBLE = 0
    COMPATIBLE = 1
    AUTOCLEAR = 2


# Section "Feature name table"
FeatureName = Struct(
    "type" / named(Int8ub, FeatureType),
    "bit" / Int8ub,
    "name" / Bytes(46),  # padded with zeros
)
FeatureNameTable = Struct(
    "entries" / GreedyRange(FeatureName),
    "rest" / GreedyBytes,  # less than one entry; empty in a sound image
)

# Section "Bitmaps extension"
BitmapsExtension = Struct(
    "nb_bitmaps" / Int32ub,
    "reserved" / Int32ub,
    "bitmap_directory_size" / Int64ub,
    "bitmap_directory_offset" / Int64ub,
)

# Section "Full disk encryption header pointer"
FullDiskEncryptionExtension = Struct(
    "offset" / Int64ub,
    "length" / Int64ub,
)

# ---------------------------------------------------------------------------------------------------------------------
# Section "Host cluster management"
# ---------------------------------------------------------------------------------------------------------------------

RefcountTableEntry = BitFields(Int64ub, reserved=bits(0, 8), offset=offset_bits(9, 63))


class _Refcounts(Adapter):  # type: ignore[misc]
    """Bytes as refcounts of 1 << order bits. Below a byte, the first is in the least significant bits."""

    def __init__(self, refcount_order: int) -> None:
        super().__init__(GreedyBytes)
        self.width = 1 << refcount_order

    def _decode(self, data: bytes, _context: Any, _path: Any) -> list[int]:
        if self.width >= 8:
            step = self.width // 8
            return [int.from_bytes(data[i : i + step], "big") for i in range(0, len(data), step)]
        mask = (1 << self.width) - 1
        return [byte >> shift & mask for byte in data for shift in range(0, 8, self.width)]

    def _encode(self, refcounts: list[int], _context: Any, _path: Any) -> bytes:
        if self.width >= 8:
            return b"".join(refcount.to_bytes(self.width // 8, "big") for refcount in refcounts)
        per_byte = 8 // self.width
        return bytes(
            sum(refcount << (i * self.width) for i, refcount in enumerate(refcounts[start : start + per_byte]))
            for start in range(0, len(refcounts), per_byte)
        )


def refcount_block(refcount_order: int) -> Construct:
    """A refcount block, or whole bytes of one, as a list of refcounts."""
    return _Refcounts(refcount_order)


# ---------------------------------------------------------------------------------------------------------------------
# Section "Cluster mapping"
# ---------------------------------------------------------------------------------------------------------------------

L1TableEntry = BitFields(
    Int64ub,
    reserved_low=bits(0, 8),
    offset=offset_bits(9, 55),
    reserved_high=bits(56, 62),
    copied=bits(63),
)

# "L2 table entry" with "Standard Cluster Descriptor"
StandardL2Entry = BitFields(
    Int64ub,
    zero=bits(0),
    reserved_low=bits(1, 8),
    offset=offset_bits(9, 55),
    reserved_high=bits(56, 61),
    compressed=bits(62),
    copied=bits(63),
)


def compressed_l2_entry(cluster_bits: int) -> BitFields:
    """ "L2 table entry" with "Compressed Clusters Descriptor": where its fields meet depends on the cluster size."""
    x = 62 - (cluster_bits - 8)
    return BitFields(
        Int64ub,
        offset=offset_bits(0, x - 1),
        additional_sectors=bits(x, 61),
        compressed=bits(62),
        copied=bits(63),
    )


# Section "Extended L2 Entries": the second 64 bits of an entry
SubclusterBitmap = BitFields(Int64ub, allocated=bits(0, 31), zero=bits(32, 63))
ExtendedL2Entry = Struct("cluster" / StandardL2Entry, "subclusters" / SubclusterBitmap)

# ---------------------------------------------------------------------------------------------------------------------
# Section "Snapshots"
# ---------------------------------------------------------------------------------------------------------------------

SNAPSHOT_HEADER_LENGTH = 40
_KNOWN_EXTRA_DATA = 24  # the three fields below, 8 bytes each


def _in_extra_data(end: int) -> Construct:
    """A field of the extra data, there if the extra data reaches its end (counted from the extra data's start)."""
    return IfThenElse(this.extra_data_size >= end, Int64ub, Computed(None))


def _unknown_extra_data(context: Any) -> int:
    size: int = context.extra_data_size
    return size - min(size // 8 * 8, _KNOWN_EXTRA_DATA)


# fmt: off
SnapshotTableEntry = Struct(
    "l1_table_offset" / Int64ub,        # 0-7
    "l1_size" / Int32ub,                # 8-11: entries
    "id_str_size" / Int16ub,            # 12-13
    "name_size" / Int16ub,              # 14-15
    "date_sec" / Int32ub,               # 16-19: since the Epoch
    "date_nsec" / Int32ub,              # 20-23
    "vm_clock_nsec" / Int64ub,          # 24-31
    "vm_state_size" / Int32ub,          # 32-35: bytes; ignored where the 64-bit field below is present
    "extra_data_size" / Int32ub,        # 36-39
    "vm_state_size_large" / _in_extra_data(8),          # 40-47: bytes
    "disk_size" / _in_extra_data(16),                   # 48-55: bytes
    "icount" / _in_extra_data(24),                      # 56-63: all ones if icount was off
    "unknown_extra_data" / Bytes(_unknown_extra_data),
    "id_str" / Bytes(this.id_str_size),
    "name" / Bytes(this.name_size),
    "padding" / Bytes(lambda c: -(SNAPSHOT_HEADER_LENGTH + c.extra_data_size + c.id_str_size + c.name_size) % 8),
)
# fmt: on

ICOUNT_OFF = (1 << 64) - 1

# ---------------------------------------------------------------------------------------------------------------------
# Section "Bitmaps"
# ---------------------------------------------------------------------------------------------------------------------


class BitmapFlag(IntFlag):
    IN_USE = 1 << 0
    AUTO = 1 << 1
    EXTRA_DATA_COMPATIBLE = 1 << 2


class BitmapType(IntEnum):
    DIRTY_TRACKING = 1


BITMAP_DIRECTORY_ENTRY_LENGTH = 24  # without its variable parts

# fmt: off
BitmapDirectoryEntry = Struct(
    "bitmap_table_offset" / Int64ub,             # 0-7
    "bitmap_table_size" / Int32ub,               # 8-11: entries
    "flags" / named(Int32ub, BitmapFlag),        # 12-15
    "type" / named(Int8ub, BitmapType),          # 16
    "granularity_bits" / Int8ub,                 # 17
    "name_size" / Int16ub,                       # 18-19
    "extra_data_size" / Int32ub,                 # 20-23
    "extra_data" / Bytes(this.extra_data_size),
    "name" / Bytes(this.name_size),
    "padding" / Bytes(lambda c: -(BITMAP_DIRECTORY_ENTRY_LENGTH + c.extra_data_size + c.name_size) % 8),
)
# fmt: on

# Section "Bitmap table"
BitmapTableEntry = BitFields(
    Int64ub,
    all_ones=bits(0),  # where the offset is 0: all bits of the cluster are ones, else zeros
    reserved_low=bits(1, 8),
    offset=offset_bits(9, 55),
    reserved_high=bits(56, 63),
)
