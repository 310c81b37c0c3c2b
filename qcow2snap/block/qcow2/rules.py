"""The rules of the qcow2 specification: id, severity, sentence, section. Values only.

The reader raises the rule that keeps it from going on; the checker (qcow2snap/conformance) reports all. Sections are
those of QEMU's docs/interop/qcow2.rst; "QEMU" stands for a limit of QEMU's that the specification mentions in a note or
not at all. Ids are for good: a rule that goes leaves a gap, a new one takes the next number of its group.
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

from qcow2snap.block.node import ImageFormatError


class Severity(Enum):
    """What a rule guards. Corruptions and leaks are what `qemu-img check` counts as such, and decide the exit code."""

    CORRUPTION = "corruption"  # data may be wrong or lost
    LEAK = "leak"  # space is wasted
    VIOLATION = "violation"  # the specification is broken; the data that is there can be read
    ADVICE = "advice"  # allowed, and worth knowing


class Rule(NamedTuple):
    id: str
    severity: Severity
    sentence: str
    section: str

    def broken(self, host_offset: int, what: str) -> ImageFormatError:
        """The error that says that, and where, an image breaks this rule. The file's name is added by who knows it."""
        return ImageFormatError(self.id, host_offset, what)


def _rule(id_: str, severity: Severity, section: str, sentence: str) -> Rule:
    rule = Rule(f"QCOW2-{id_}", severity, sentence, section)
    RULES.append(rule)
    return rule


RULES: list[Rule] = []  # all of them, in the order of this file
_CORRUPTION, _LEAK, _VIOLATION, _ADVICE = Severity

# The header
HEADER_MAGIC = _rule("HDR-001", _CORRUPTION, "Header", "The file starts with the magic QFI\\xfb.")
HEADER_COMPLETE = _rule("HDR-002", _CORRUPTION, "Header", "The header is whole: the file holds all of its fields.")
HEADER_VERSION = _rule("HDR-003", _CORRUPTION, "Header", "The version is 2 or 3.")
HEADER_CLUSTER_BITS = _rule(
    "HDR-004", _CORRUPTION, "Header", "cluster_bits is 9 to 21; with extended L2 entries at least 14."
)
HEADER_LENGTH = _rule("HDR-005", _CORRUPTION, "Header", "header_length is at least 104 and within the first cluster.")
HEADER_INCOMPATIBLE = _rule("HDR-006", _CORRUPTION, "Header", "No unknown incompatible feature bit is set.")
HEADER_COMPRESSION = _rule(
    "HDR-007",
    _CORRUPTION,
    "Additional fields",
    "The compression type is known, and its feature bit is set if and only if it is not deflate.",
)
HEADER_REFCOUNT_ORDER = _rule("HDR-008", _CORRUPTION, "Header", "refcount_order is at most 6.")
HEADER_BACKING_NAME = _rule(
    "HDR-009", _CORRUPTION, "Header", "The backing file name lies in the first cluster and has at most 1023 bytes."
)
HEADER_L1_SIZE = _rule(
    "HDR-010", _CORRUPTION, "Header", "The active L1 table covers the virtual disk size and has at most 32 MiB."
)
HEADER_L1_OFFSET = _rule("HDR-011", _CORRUPTION, "Header", "The active L1 table starts at a cluster boundary.")
HEADER_CRYPT_METHOD = _rule("HDR-012", _CORRUPTION, "Header", "The encryption method is 0, 1 or 2.")
HEADER_SNAPSHOTS = _rule(
    "HDR-013", _CORRUPTION, "Header", "The snapshot table starts at a cluster boundary and has at most 65,536 entries."
)
HEADER_LENGTH_MULTIPLE = _rule("HDR-014", _VIOLATION, "Header", "header_length is a multiple of 8.")
HEADER_RAW_DATA = _rule(
    "HDR-015", _CORRUPTION, "Header", "The raw external data bit is set only together with the external data file bit."
)
HEADER_PADDING = _rule("HDR-016", _VIOLATION, "Header padding", "The padding at the end of the header is zero.")
HEADER_DIRTY = _rule(
    "HDR-017", _ADVICE, "Header", "The dirty bit is not set: where it is, refcounts may be inconsistent."
)
HEADER_CORRUPT = _rule(
    "HDR-018",
    _ADVICE,
    "Header",
    "The corrupt bit is not set: where it is, any structure may be corrupt, and the image must not be written.",
)
HEADER_BITMAPS_BIT = _rule(
    "HDR-019", _VIOLATION, "Header", "The bitmaps bit is set only where there is a bitmaps extension."
)
HEADER_RAW_BACKING = _rule(
    "HDR-020", _VIOLATION, "Header", "An image with a raw external data file has no backing file."
)
HEADER_SIZE_SECTORS = _rule(
    "HDR-021", _ADVICE, "QEMU", "The virtual disk size is a multiple of 512 bytes: QEMU does not read the rest."
)
HEADER_BACKING_PLACE = _rule(
    "HDR-022", _VIOLATION, "Header extensions", "The backing file name lies behind the header and its extensions."
)
HEADER_FOREIGN_DATA = _rule(
    "HDR-023",
    _VIOLATION,
    "Header extensions",
    "Nothing but the backing file name is stored in the first cluster behind the header extensions.",
)

# Header extensions
EXTENSION_LENGTH = _rule("EXT-001", _CORRUPTION, "Header extensions", "Every header extension ends within its area.")
EXTENSION_DATA = _rule(
    "EXT-002",
    _CORRUPTION,
    "Header extensions",
    "The data of a known header extension has the length that its section gives.",
)
EXTENSION_ONCE = _rule(
    "EXT-003", _VIOLATION, "Header extensions", "Each type of header extension appears at most once."
)
FEATURE_NAME_ENTRY = _rule(
    "EXT-004",
    _VIOLATION,
    "Feature name table",
    "An entry of the feature name table has type 0, 1 or 2 and a bit number of 0 to 63.",
)
FEATURE_NAME_LENGTH = _rule(
    "EXT-005", _VIOLATION, "Feature name table", "The feature name table is made of whole entries, 48 bytes each."
)
BACKING_FORMAT = _rule(
    "EXT-006",
    _ADVICE,
    "String header extensions",
    "An image with a backing file states its format: QEMU guesses it otherwise, which the guest can abuse.",
)
BACKING_FORMAT_ALONE = _rule(
    "EXT-007",
    _ADVICE,
    "String header extensions",
    "A backing file format is stated only where there is a backing file.",
)
BACKING_FORMAT_LENGTH = _rule(
    "EXT-008", _CORRUPTION, "QEMU", "The name of a backing file's format has at most 15 bytes."
)

# Refcounts
REFCOUNT_TABLE_OFFSET = _rule(
    "REF-001", _CORRUPTION, "Header", "The refcount table starts at a cluster boundary, below 2^63 bytes."
)
REFCOUNT_TABLE_SIZE = _rule("REF-002", _CORRUPTION, "QEMU", "The refcount table has at most 8 MiB.")
REFCOUNT_TABLE_COMPLETE = _rule(
    "REF-003", _CORRUPTION, "Host cluster management", "The refcount table lies within the file."
)
REFCOUNT_TABLE_RESERVED = _rule(
    "REF-004", _CORRUPTION, "Host cluster management", "The reserved bits of a refcount table entry are zero."
)
REFCOUNT_BLOCK_ALIGNED = _rule(
    "REF-005", _CORRUPTION, "Host cluster management", "A refcount block starts at a cluster boundary."
)
REFCOUNT_BLOCK_IN_FILE = _rule(
    "REF-006", _CORRUPTION, "Host cluster management", "A refcount block lies within the file."
)
REFCOUNT_TOO_LOW = _rule(
    "REF-007",
    _CORRUPTION,
    "Host cluster management",
    "The refcount of a cluster is no less than the number of its references.",
)
REFCOUNT_TOO_HIGH = _rule(
    "REF-008",
    _LEAK,
    "Host cluster management",
    "The refcount of a cluster is no more than the number of its references.",
)
REFCOUNT_BLOCK_ALONE = _rule(
    "REF-009", _CORRUPTION, "Host cluster management", "A refcount block has a cluster of its own."
)
REFCOUNT_WIDTH = _rule(
    "REF-010",
    _CORRUPTION,
    "Host cluster management",
    "A cluster has no more references than a refcount of this width can count.",
)
REFCOUNT_TABLE_EMPTY = _rule(
    "REF-011", _VIOLATION, "Host cluster management", "The refcount table has at least one cluster."
)
REFCOUNT_CLUSTERS = _rule("REF-012", _ADVICE, "QEMU", "The file has at most 2^31 - 1 clusters: more are not counted.")
METADATA_OVERLAP = _rule("REF-013", _CORRUPTION, "General", "A cluster of metadata is used for nothing else.")

# L1 and L2 tables
L1_COMPLETE = _rule("L1-001", _CORRUPTION, "Cluster mapping", "An L1 table lies within the file.")
L1_ENTRY_ALIGNED = _rule("L1-002", _CORRUPTION, "Cluster mapping", "An L1 entry points to a cluster boundary.")
L1_RESERVED = _rule("L1-003", _CORRUPTION, "Cluster mapping", "The reserved bits of an L1 entry are zero.")
L1_COPIED = _rule(
    "L1-004",
    _CORRUPTION,
    "Cluster mapping",
    "Bit 63 of an entry of the active L1 table is set if and only if the refcount of the L2 table is exactly one.",
)
L2_COMPLETE = _rule("L2-001", _CORRUPTION, "Cluster mapping", "An L2 table lies within the file.")
L2_ENTRY_IN_FILE = _rule(
    "L2-002", _CORRUPTION, "Cluster mapping", "A cluster that an L2 entry points to lies within the file."
)
L2_ENTRY_ALIGNED = _rule("L2-003", _CORRUPTION, "Cluster mapping", "A standard L2 entry points to a cluster boundary.")
L2_ZERO_V3 = _rule("L2-004", _CORRUPTION, "Cluster mapping", "Zero clusters are not in version 2 images.")
L2_SUBCLUSTERS = _rule(
    "L2-005",
    _CORRUPTION,
    "Extended L2 Entries",
    "A subcluster is not both allocated and zero, and one that is allocated has a host offset.",
)
L2_RESERVED = _rule("L2-006", _CORRUPTION, "Cluster mapping", "The reserved bits of a standard L2 entry are zero.")
L2_COPIED = _rule(
    "L2-007",
    _CORRUPTION,
    "Cluster mapping",
    "Bit 63 of a standard L2 entry of the active disk is set if and only if its cluster's refcount is exactly one.",
)
L2_ZERO_EXTENDED = _rule(
    "L2-008", _VIOLATION, "Cluster mapping", "Bit 0 of a standard cluster descriptor is zero in an extended L2 entry."
)
L2_OFFSET_ZERO = _rule(
    "L2-009",
    _VIOLATION,
    "Cluster mapping",
    "A host cluster offset of 0 with bit 63 set is only in images with an external data file.",
)

# Compressed clusters
COMPRESSED_DATA = _rule(
    "CMP-001", _CORRUPTION, "Cluster mapping", "The data of a compressed cluster decompresses to a cluster."
)
COMPRESSED_IN_FILE = _rule(
    "CMP-002", _CORRUPTION, "Cluster mapping", "The data of a compressed cluster lies within the file."
)
COMPRESSED_COPIED = _rule(
    "CMP-003", _CORRUPTION, "Cluster mapping", "Bit 63 of the L2 entry of a compressed cluster is zero."
)
COMPRESSED_OFFSET = _rule(
    "CMP-004", _VIOLATION, "Cluster mapping", "Bits 56 and above of the host offset of a compressed cluster are zero."
)
COMPRESSED_SUBCLUSTERS = _rule(
    "CMP-005", _CORRUPTION, "Extended L2 Entries", "The subcluster bitmap of a compressed cluster is zero."
)

# External data file
DATA_FILE_OFFSET = _rule(
    "DATA-001", _CORRUPTION, "Header", "With an external data file, host offset and guest offset are the same."
)
DATA_FILE_COMPRESSED = _rule("DATA-002", _CORRUPTION, "Header", "With an external data file, no cluster is compressed.")
DATA_FILE_NAME = _rule("DATA-003", _CORRUPTION, "Header extensions", "An image with an external data file names it.")
DATA_FILE_SNAPSHOTS = _rule(
    "DATA-004", _CORRUPTION, "Header", "With an external data file, there are no internal snapshots."
)
DATA_FILE_NAME_ALONE = _rule(
    "DATA-005", _VIOLATION, "Header", "An external data file is named only where its feature bit is set."
)

# Encryption
CRYPT_HEADER_PRESENT = _rule(
    "CRYPT-001",
    _CORRUPTION,
    "Full disk encryption header pointer",
    "There is a full disk encryption header if and only if the encryption method is LUKS.",
)
CRYPT_HEADER_ALIGNED = _rule(
    "CRYPT-002",
    _CORRUPTION,
    "Full disk encryption header pointer",
    "The encryption header starts at a cluster boundary.",
)
CRYPT_HEADER_IN_FILE = _rule(
    "CRYPT-003", _CORRUPTION, "Full disk encryption header pointer", "The encryption header lies within the file."
)
CRYPT_HEADER_LUKS = _rule(
    "CRYPT-004",
    _CORRUPTION,
    "Full disk encryption header pointer",
    "The encryption header starts with a LUKS partition header.",
)
CRYPT_AES = _rule(
    "CRYPT-005",
    _ADVICE,
    "Data encryption",
    "Encryption is not by AES-CBC of the old kind, which is broken by design, and which QEMU reads in its tools only.",
)

# Snapshots
SNAPSHOT_COMPLETE = _rule(
    "SNAP-001", _CORRUPTION, "Snapshots", "Every entry of the snapshot table lies within the file."
)
SNAPSHOT_EXTRA_DATA = _rule(
    "SNAP-002", _CORRUPTION, "Snapshots", "The extra data of a snapshot has at most 1,024 bytes."
)
SNAPSHOT_TABLE_SIZE = _rule("SNAP-003", _CORRUPTION, "Snapshots", "The snapshot table has at most 64 MiB.")
SNAPSHOT_L1_OFFSET = _rule(
    "SNAP-004",
    _CORRUPTION,
    "Snapshots",
    "The L1 table of a snapshot starts at a cluster boundary and has at most 32 MiB.",
)
SNAPSHOT_L1_SIZE = _rule(
    "SNAP-005", _VIOLATION, "Snapshots", "The L1 table of a snapshot covers its disk and its VM state."
)
SNAPSHOT_EXTRA_DATA_V3 = _rule(
    "SNAP-006",
    _CORRUPTION,
    "Snapshots",
    "A snapshot in a version 3 image has extra data up to byte 55 at least, with its disk size.",
)
SNAPSHOT_ID_UNIQUE = _rule("SNAP-007", _VIOLATION, "Snapshots", "The id of a snapshot is no other's.")
SNAPSHOT_ID_EMPTY = _rule("SNAP-008", _VIOLATION, "Snapshots", "A snapshot has an id.")
SNAPSHOT_NAME_UNIQUE = _rule(
    "SNAP-009",
    _ADVICE,
    "QEMU",
    "The name of a snapshot is no other's, nor another's id: QEMU takes the first that fits.",
)
SNAPSHOT_TEXT = _rule(
    "SNAP-010",
    _ADVICE,
    "QEMU",
    "Id and name of a snapshot are UTF-8 without NUL: QEMU's tools show or find them otherwise mutilated.",
)
SNAPSHOT_NANOSECONDS = _rule(
    "SNAP-011", _VIOLATION, "Snapshots", "The subsecond part of a snapshot's date is less than a second."
)
SNAPSHOT_SIZE_SECTORS = _rule(
    "SNAP-012",
    _ADVICE,
    "QEMU",
    "The disk size of a snapshot is a multiple of 512 bytes: QEMU cannot revert to it otherwise.",
)
SNAPSHOT_VM_STATE = _rule("SNAP-013", _VIOLATION, "Snapshots", "All clusters of a snapshot's VM state are allocated.")

# Bitmaps
BITMAP_DIRECTORY = _rule(
    "BMP-001", _CORRUPTION, "Bitmaps", "The bitmap directory lies within the file and is as long as its entries."
)
BITMAP_TABLE = _rule(
    "BMP-002",
    _CORRUPTION,
    "Bitmaps",
    "A bitmap table starts at a cluster boundary, lies within the file, and has as many entries as the bitmap needs.",
)
BITMAP_TABLE_ENTRY = _rule(
    "BMP-003",
    _CORRUPTION,
    "Bitmap table",
    "A bitmap table entry points to a cluster boundary within the file, and its reserved bits are zero.",
)
BITMAP_NUMBER = _rule(
    "BMP-004", _CORRUPTION, "Bitmaps extension", "A bitmaps extension has at least one bitmap, and no more than 65,535."
)
BITMAP_EXTENSION_RESERVED = _rule(
    "BMP-005", _CORRUPTION, "Bitmaps extension", "The reserved field of the bitmaps extension is zero."
)
BITMAP_DIRECTORY_ALIGNED = _rule(
    "BMP-006", _CORRUPTION, "Bitmaps extension", "The bitmap directory starts at a cluster boundary."
)
BITMAP_FLAGS = _rule("BMP-007", _CORRUPTION, "Bitmap directory", "The reserved flags of a bitmap are zero.")
BITMAP_TYPE = _rule("BMP-008", _CORRUPTION, "Bitmap directory", "The type of a bitmap is 1, dirty tracking.")
BITMAP_GRANULARITY = _rule(
    "BMP-009", _CORRUPTION, "Bitmap directory", "granularity_bits of a bitmap is 0 to 63; QEMU reads 9 to 31 only."
)
BITMAP_NAME = _rule(
    "BMP-010", _CORRUPTION, "Bitmap directory", "The name of a bitmap has at least one byte; QEMU reads up to 1,023."
)
BITMAP_NAME_UNIQUE = _rule("BMP-011", _CORRUPTION, "Bitmap directory", "The name of a bitmap is no other's.")
BITMAP_EXTRA_DATA = _rule(
    "BMP-012", _CORRUPTION, "Bitmap directory", "A bitmap has no extra data, which is reserved; QEMU refuses it."
)
BITMAP_PADDING = _rule("BMP-013", _VIOLATION, "Bitmap directory", "The padding of a bitmap directory entry is zero.")
BITMAP_TAIL = _rule("BMP-014", _VIOLATION, "Bitmap data", "The bits of a bitmap beyond the end of the disk are zero.")
BITMAP_IN_USE = _rule(
    "BMP-015",
    _ADVICE,
    "Bitmap directory",
    "A bitmap is not marked in use: one that is was not saved, and nobody knows what is dirty.",
)
BITMAPS_INCONSISTENT = _rule(
    "BMP-016",
    _ADVICE,
    "Bitmaps extension",
    "Where there is a bitmaps extension, its autoclear bit is set: otherwise all bitmaps are inconsistent.",
)
