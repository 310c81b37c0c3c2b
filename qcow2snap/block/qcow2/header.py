"""The header and its extensions: bytes -> declared layouts -> one immutable ImageHeader, judged by the header rules."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from construct import Container, StreamError

from formats import qcow2 as layout
from formats.qcow2 import (
    AutoclearFeature,
    CompatibleFeature,
    CompressionType,
    CryptMethod,
    FeatureType,
    HeaderExtensionType,
    IncompatibleFeature,
)
from qcow2snap.block.file import FileNode
from qcow2snap.block.node import ImageFormatError, UnsupportedFeature
from qcow2snap.block.qcow2 import rules

_KNOWN_INCOMPATIBLE = sum(IncompatibleFeature)


class Extension(NamedTuple):
    """A header extension as it stands in the file; `data` uninterpreted."""

    type: int
    data: bytes
    host_offset: int


class ImageHeader(NamedTuple):
    """What the first cluster of an image says. Sizes and offsets in bytes."""

    version: int
    cluster_bits: int
    size: int
    crypt_method: CryptMethod
    l1_table_offset: int
    l1_size: int  # entries
    refcount_table_offset: int
    refcount_table_clusters: int
    refcount_order: int
    nb_snapshots: int
    snapshots_offset: int
    incompatible_features: IncompatibleFeature
    compatible_features: int
    autoclear_features: int
    header_length: int
    compression_type: CompressionType
    backing_file: bytes | None  # the name as it stands in the file
    extensions: tuple[Extension, ...]

    @property
    def cluster_size(self) -> int:
        return 1 << self.cluster_bits

    @property
    def has_extended_l2(self) -> bool:
        return bool(self.incompatible_features & IncompatibleFeature.EXTENDED_L2_ENTRIES)

    @property
    def has_data_file(self) -> bool:
        return bool(self.incompatible_features & IncompatibleFeature.EXTERNAL_DATA_FILE)

    @property
    def is_data_file_raw(self) -> bool:
        return bool(self.autoclear_features & AutoclearFeature.RAW_EXTERNAL_DATA)

    @property
    def is_lazy_refcounts(self) -> bool:
        return bool(self.compatible_features & CompatibleFeature.LAZY_REFCOUNTS)

    @property
    def l2_entry_size(self) -> int:
        return 16 if self.has_extended_l2 else 8

    @property
    def l2_coverage(self) -> int:
        """Guest bytes that one L2 table describes."""
        return self.cluster_size // self.l2_entry_size * self.cluster_size

    @property
    def subcluster_size(self) -> int:
        """The unit of allocation: a cluster where there are no extended L2 entries."""
        return self.cluster_size // layout.SUBCLUSTERS_PER_CLUSTER if self.has_extended_l2 else self.cluster_size

    def vm_state_offset(self, disk_size: int) -> int:
        """Where the VM state of a disk of that size starts, guest side: at the first L1 entry that it does not need."""
        return -(-disk_size // self.l2_coverage) * self.l2_coverage

    def extension(self, kind: HeaderExtensionType) -> Extension | None:
        return next((extension for extension in self.extensions if extension.type == kind), None)

    def string_extension(self, kind: HeaderExtensionType) -> str | None:
        extension = self.extension(kind)
        return None if extension is None else as_text(extension.data)

    @property
    def backing_format(self) -> str | None:
        return self.string_extension(HeaderExtensionType.BACKING_FILE_FORMAT)

    @property
    def data_file(self) -> str | None:
        return self.string_extension(HeaderExtensionType.EXTERNAL_DATA_FILE)


def as_text(data: bytes) -> str:
    """A name in the file as a str; bytes that are not UTF-8 survive as surrogates, as in Python's file names."""
    return data.decode("utf-8", "surrogateescape")


def as_bytes(text: str) -> bytes:
    """A name as it stands in the file: what as_text made a str of."""
    return text.encode("utf-8", "surrogateescape")


def read_header(file: FileNode) -> ImageHeader:
    """Read and judge the header of an image. Raises ImageFormatError, UnsupportedFeature, FileError.

    What only a checker or a writer minds is let pass here: refcounts, the corrupt and dirty bits.
    """
    fields, first_cluster = parse_header(file)
    for error in header_errors(fields, first_cluster):
        raise error
    extensions, damage = parse_extensions(fields, first_cluster)
    if damage is not None:
        raise damage
    _refuse_unknown_features(fields, extensions)
    return image_header(fields, first_cluster, extensions)


def parse_header(file: FileNode) -> tuple[Container, bytes]:
    """The fields of a header, and what there is of the first cluster. Raises what keeps them from being read at all."""
    start = file.pread_available(0, layout.HEADER_LENGTH_V3)
    if start[:4] != layout.MAGIC:
        raise rules.HEADER_MAGIC.broken(0, "not a qcow2 image (it does not start with QFI\\xfb)")
    if len(start) < layout.HEADER_LENGTH_V2:
        raise rules.HEADER_COMPLETE.broken(len(start), f"the file ends within the header, after {len(start)} bytes")
    version = int.from_bytes(start[4:8], "big")
    if version not in (2, 3):
        raise rules.HEADER_VERSION.broken(4, f"version {version} of the format is not known; there are 2 and 3")
    cluster_bits = int.from_bytes(start[20:24], "big")
    if not layout.MIN_CLUSTER_BITS <= cluster_bits <= layout.MAX_CLUSTER_BITS:
        raise rules.HEADER_CLUSTER_BITS.broken(20, f"cluster size 2^{cluster_bits} is not in 2^9 to 2^21 bytes")
    first_cluster = file.pread_available(0, 1 << cluster_bits)
    try:
        return layout.Header.parse(_padded(first_cluster, cluster_bits)), first_cluster
    except StreamError:
        raise rules.HEADER_LENGTH.broken(100, "header_length reaches beyond the first cluster") from None


def _padded(first_cluster: bytes, cluster_bits: int) -> bytes:
    """As in QEMU, what a short file lacks of its first cluster reads as zeros."""
    return first_cluster.ljust(1 << cluster_bits, b"\0")


def image_header(fields: Container, first_cluster: bytes, extensions: tuple[Extension, ...]) -> ImageHeader:
    """The values of a header whose enumerations are known."""
    name_end = fields.backing_file_offset + fields.backing_file_size
    return ImageHeader(
        version=fields.version,
        cluster_bits=fields.cluster_bits,
        size=fields.size,
        crypt_method=CryptMethod(fields.crypt_method),
        l1_table_offset=fields.l1_table_offset,
        l1_size=fields.l1_size,
        refcount_table_offset=fields.refcount_table_offset,
        refcount_table_clusters=fields.refcount_table_clusters,
        refcount_order=fields.refcount_order,
        nb_snapshots=fields.nb_snapshots,
        snapshots_offset=fields.snapshots_offset,
        incompatible_features=IncompatibleFeature(fields.incompatible_features),
        compatible_features=int(fields.compatible_features),
        autoclear_features=int(fields.autoclear_features),
        header_length=fields.header_length,
        compression_type=CompressionType(fields.compression_type),
        backing_file=first_cluster[fields.backing_file_offset : name_end] if fields.backing_file_offset else None,
        extensions=extensions,
    )


def header_errors(fields: Container, first_cluster: bytes) -> Iterator[ImageFormatError]:
    """What keeps an image from being read. Order and bounds as in QEMU's qcow2_do_open; of unknown features, later.

    QEMU also refuses an image whose active L1 table or snapshot table is out of bounds; here the others stay readable.
    """
    cluster_size = 1 << fields.cluster_bits
    if fields.version >= 3:
        if len(first_cluster) < layout.HEADER_LENGTH_V3:
            yield rules.HEADER_COMPLETE.broken(len(first_cluster), "the file ends within the header")
        if fields.header_length < layout.HEADER_LENGTH_V3:
            yield rules.HEADER_LENGTH.broken(100, f"header_length {fields.header_length} is less than 104")
    if fields.backing_file_offset:
        end = fields.backing_file_offset + fields.backing_file_size
        if end > cluster_size or fields.backing_file_size > layout.MAX_BACKING_FILE_SIZE:
            yield rules.HEADER_BACKING_NAME.broken(
                8,
                f"the backing file name, {fields.backing_file_size} bytes at {fields.backing_file_offset:#x}, is too "
                f"long or not in the first cluster",
            )
    yield from _feature_errors(fields)
    if fields.refcount_order > layout.MAX_REFCOUNT_ORDER:
        yield rules.HEADER_REFCOUNT_ORDER.broken(96, f"refcount_order {fields.refcount_order} is more than 6")
    if fields.crypt_method not in tuple(CryptMethod):
        yield rules.HEADER_CRYPT_METHOD.broken(32, f"encryption method {fields.crypt_method} is not known")


def judge_active_l1(header: ImageHeader) -> None:
    """The rules for the active L1 table, without which snapshots can be read all the same."""
    for error in active_l1_errors(header):
        raise error


def active_l1_errors(header: ImageHeader) -> Iterator[ImageFormatError]:
    if header.l1_size * 8 > layout.MAX_L1_TABLE_SIZE:
        yield rules.HEADER_L1_SIZE.broken(36, f"an L1 table of {header.l1_size} entries is larger than 32 MiB")
    if header.l1_table_offset % header.cluster_size:
        what = f"the L1 table at {header.l1_table_offset:#x} does not start at a cluster boundary"
        yield rules.HEADER_L1_OFFSET.broken(40, what)
    if -(-header.size // header.l2_coverage) > header.l1_size:
        what = f"an L1 table of {header.l1_size} entries is too small for a disk of {header.size} bytes"
        yield rules.HEADER_L1_SIZE.broken(36, what)


def _feature_errors(fields: Container) -> Iterator[ImageFormatError]:
    features = fields.incompatible_features
    if fields.compression_type not in tuple(CompressionType):
        yield rules.HEADER_COMPRESSION.broken(104, f"compression type {fields.compression_type} is not known")
    is_marked = bool(features & IncompatibleFeature.COMPRESSION_TYPE)
    if is_marked != (fields.compression_type != CompressionType.DEFLATE):
        state = "set" if is_marked else "not set"
        yield rules.HEADER_COMPRESSION.broken(
            72, f"the compression type is {fields.compression_type} but its feature bit is {state}"
        )
    if features & IncompatibleFeature.EXTENDED_L2_ENTRIES and fields.cluster_bits < layout.MIN_CLUSTER_BITS_EXTENDED_L2:
        yield rules.HEADER_CLUSTER_BITS.broken(
            20, f"cluster size 2^{fields.cluster_bits} is too small for extended L2 entries, which need 2^14"
        )
    if (
        fields.autoclear_features & AutoclearFeature.RAW_EXTERNAL_DATA
        and not features & IncompatibleFeature.EXTERNAL_DATA_FILE
    ):
        yield rules.HEADER_RAW_DATA.broken(88, "the raw external data bit is set, but there is no external data file")


def parse_extensions(fields: Container, first_cluster: bytes) -> tuple[tuple[Extension, ...], ImageFormatError | None]:
    """Up to the end marker, or to where the backing file name or the cluster's end leaves no room for another.

    With the error that ended it before.
    """
    padded = _padded(first_cluster, fields.cluster_bits)
    extensions: list[Extension] = []
    position = fields.header_length
    end = min(fields.backing_file_offset, len(padded)) or len(padded)
    while position + layout.HEADER_EXTENSION_HEADER_LENGTH <= end:
        kind = int.from_bytes(padded[position : position + 4], "big")
        if kind == HeaderExtensionType.END:
            break
        length = int.from_bytes(padded[position + 4 : position + 8], "big")
        if length > end - position - layout.HEADER_EXTENSION_HEADER_LENGTH:
            what = f"header extension {kind:#010x} of {length} bytes reaches beyond its area"
            return tuple(extensions), rules.EXTENSION_LENGTH.broken(position, what)
        parsed = layout.HeaderExtension.parse(padded[position : position + 16 + length])
        extensions.append(Extension(int(parsed.type), parsed.data, position))
        position += layout.HEADER_EXTENSION_HEADER_LENGTH + length + -length % 8
    return tuple(extensions), None


def feature_names(extensions: tuple[Extension, ...]) -> dict[tuple[int, int], str]:
    """The image's own names of features, by (FeatureType, bit)."""
    names: dict[tuple[int, int], str] = {}
    for extension in extensions:
        if extension.type == HeaderExtensionType.FEATURE_NAME_TABLE:
            for entry in layout.FeatureNameTable.parse(extension.data).entries:
                names[int(entry.type), entry.bit] = as_text(entry.name.rstrip(b"\0"))
    return names


def _refuse_unknown_features(fields: Container, extensions: tuple[Extension, ...]) -> None:
    listed = unknown_features(fields, extensions)
    if listed:
        raise UnsupportedFeature(
            f"the image needs a feature that is not known here: {listed} ({rules.HEADER_INCOMPATIBLE.id}, at byte 0x48)"
        )


def unknown_features(fields: Container, extensions: tuple[Extension, ...]) -> str:
    """The incompatible features that are not known here, by the names that the image has for them."""
    unknown = int(fields.incompatible_features) & ~_KNOWN_INCOMPATIBLE
    names = feature_names(extensions)
    return ", ".join(
        names.get((FeatureType.INCOMPATIBLE, bit), f"bit {bit}") for bit in range(64) if unknown >> bit & 1
    )
