"""The rules of the qcow2 specification that a reader meets: id, severity, sentence, section. Values only.

The reader raises the rule that keeps it from going on; a checker reports all. Sections are those of
QEMU's docs/interop/qcow2.rst; "QEMU" stands for a limit of QEMU's that the specification only mentions.
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

from qcow2snap.block.node import ImageFormatError


class Severity(Enum):
    CORRUPTION = "corruption"  # data may be wrong or lost
    LEAK = "leak"  # space is wasted
    VIOLATION = "violation"  # the specification is broken, data is not at risk
    ADVICE = "advice"


class Rule(NamedTuple):
    id: str
    severity: Severity
    sentence: str
    section: str

    def broken(self, host_offset: int, what: str) -> ImageFormatError:
        """The error that says that, and where, an image breaks this rule. The file's name is added by who knows it."""
        return ImageFormatError(self.id, host_offset, what)


def _corruption(id_: str, section: str, sentence: str) -> Rule:
    return Rule(id_, Severity.CORRUPTION, sentence, section)


HEADER_MAGIC = _corruption("QCOW2-HDR-001", "Header", "The file starts with the magic QFI\\xfb.")
HEADER_COMPLETE = _corruption("QCOW2-HDR-002", "Header", "The header is whole: the file holds all of its fields.")
HEADER_VERSION = _corruption("QCOW2-HDR-003", "Header", "The version is 2 or 3.")
HEADER_CLUSTER_BITS = _corruption(
    "QCOW2-HDR-004", "Header", "cluster_bits is 9 to 21; with extended L2 entries at least 14."
)
HEADER_LENGTH = _corruption("QCOW2-HDR-005", "Header", "header_length is at least 104 and within the first cluster.")
HEADER_INCOMPATIBLE = _corruption("QCOW2-HDR-006", "Header", "No unknown incompatible feature bit is set.")
HEADER_COMPRESSION = _corruption(
    "QCOW2-HDR-007",
    "Additional fields",
    "The compression type is known, and its feature bit is set if and only if it is not deflate.",
)
HEADER_REFCOUNT_ORDER = _corruption("QCOW2-HDR-008", "Header", "refcount_order is at most 6.")
HEADER_BACKING_NAME = _corruption(
    "QCOW2-HDR-009", "Header", "The backing file name lies in the first cluster and has at most 1023 bytes."
)
HEADER_L1_SIZE = _corruption(
    "QCOW2-HDR-010", "Header", "The active L1 table covers the virtual disk size and has at most 32 MiB."
)
HEADER_L1_OFFSET = _corruption("QCOW2-HDR-011", "Header", "The active L1 table starts at a cluster boundary.")
HEADER_CRYPT_METHOD = _corruption("QCOW2-HDR-012", "Header", "The encryption method is 0, 1 or 2.")
HEADER_SNAPSHOTS = _corruption(
    "QCOW2-HDR-013", "Header", "The snapshot table starts at a cluster boundary and has at most 65,536 entries."
)
HEADER_RAW_DATA = _corruption(
    "QCOW2-HDR-015", "Header", "The raw external data bit is set only together with the external data file bit."
)

EXTENSION_LENGTH = _corruption("QCOW2-EXT-001", "Header extensions", "Every header extension ends within its area.")
EXTENSION_DATA = _corruption(
    "QCOW2-EXT-002", "Header extensions", "The data of a known header extension has the length that its section gives."
)

L1_COMPLETE = _corruption("QCOW2-L1-001", "Cluster mapping", "An L1 table lies within the file.")
L1_ENTRY_ALIGNED = _corruption("QCOW2-L1-002", "Cluster mapping", "An L1 entry points to a cluster boundary.")

L2_COMPLETE = _corruption("QCOW2-L2-001", "Cluster mapping", "An L2 table lies within the file.")
L2_ENTRY_IN_FILE = _corruption(
    "QCOW2-L2-002", "Cluster mapping", "A cluster that an L2 entry points to lies within the file."
)
L2_ENTRY_ALIGNED = _corruption("QCOW2-L2-003", "Cluster mapping", "A standard L2 entry points to a cluster boundary.")
L2_ZERO_V3 = _corruption("QCOW2-L2-004", "Cluster mapping", "Zero clusters are not in version 2 images.")
L2_SUBCLUSTERS = _corruption(
    "QCOW2-L2-005",
    "Extended L2 Entries",
    "A subcluster is not both allocated and zero, and one that is allocated has a host offset.",
)

COMPRESSED_DATA = _corruption(
    "QCOW2-CMP-001", "Cluster mapping", "The data of a compressed cluster decompresses to a cluster."
)
COMPRESSED_IN_FILE = _corruption(
    "QCOW2-CMP-002", "Cluster mapping", "The data of a compressed cluster lies within the file."
)

DATA_FILE_OFFSET = _corruption(
    "QCOW2-DATA-001", "Header", "With an external data file, host offset and guest offset are the same."
)
DATA_FILE_COMPRESSED = _corruption("QCOW2-DATA-002", "Header", "With an external data file, no cluster is compressed.")
DATA_FILE_NAME = _corruption("QCOW2-DATA-003", "Header extensions", "An image with an external data file names it.")

SNAPSHOT_COMPLETE = _corruption(
    "QCOW2-SNAP-001", "Snapshots", "Every entry of the snapshot table lies within the file."
)
SNAPSHOT_EXTRA_DATA = _corruption(
    "QCOW2-SNAP-002", "Snapshots", "The extra data of a snapshot has at most 1,024 bytes."
)
SNAPSHOT_TABLE_SIZE = _corruption("QCOW2-SNAP-003", "Snapshots", "The snapshot table has at most 64 MiB.")
SNAPSHOT_L1_OFFSET = _corruption(
    "QCOW2-SNAP-004", "Snapshots", "The L1 table of a snapshot starts at a cluster boundary and has at most 32 MiB."
)
SNAPSHOT_L1_SIZE = _corruption(
    "QCOW2-SNAP-005", "Snapshots", "The L1 table of a snapshot covers its disk and its VM state."
)

BITMAP_DIRECTORY = _corruption(
    "QCOW2-BMP-001", "Bitmaps", "The bitmap directory lies within the file and is as long as its entries."
)
BITMAP_TABLE = _corruption(
    "QCOW2-BMP-002",
    "Bitmaps",
    "A bitmap table starts at a cluster boundary, lies within the file, and has as many entries as the bitmap needs.",
)
BITMAP_TABLE_ENTRY = _corruption(
    "QCOW2-BMP-003",
    "Bitmap table",
    "A bitmap table entry points to a cluster boundary within the file, and its reserved bits are zero.",
)

REFCOUNT_TABLE = _corruption(
    "QCOW2-REF-001",
    "Host cluster management",
    "The refcount table starts at a cluster boundary, lies within the file, and has at most 8 MiB.",
)
REFCOUNT_TABLE_ENTRY = _corruption(
    "QCOW2-REF-002", "Host cluster management", "An entry of the refcount table points to a cluster boundary."
)
REFCOUNT_BLOCK = _corruption("QCOW2-REF-003", "Host cluster management", "A refcount block lies within the file.")
REFCOUNT_TOO_LOW = _corruption(
    "QCOW2-REF-004", "Host cluster management", "The refcount of a cluster is not less than the references to it."
)
