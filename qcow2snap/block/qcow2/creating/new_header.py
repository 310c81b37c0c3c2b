"""The first cluster of a new image: header, extensions and the backing file's name, as QEMU lays them out.

QEMU block/qcow2.c, qcow2_update_header: the order of the extensions, and a name table only where it fits well.
"""

from __future__ import annotations

from typing import NamedTuple

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
from qcow2snap.block.qcow2.creating.create_options import CreateOptions, InvalidOption
from qcow2snap.block.qcow2.header import as_bytes

HEADER_LENGTH = 112  # bytes that QEMU writes since 5.1, the padding after compression_type included
_LEAST_WITH_NAMES = 8192  # bytes of a cluster: in smaller ones the name table would take too much room

# Section "Feature name table"; the names are QEMU's.
_FEATURE_NAMES = (
    (FeatureType.INCOMPATIBLE, IncompatibleFeature.DIRTY, b"dirty bit"),
    (FeatureType.INCOMPATIBLE, IncompatibleFeature.CORRUPT, b"corrupt bit"),
    (FeatureType.INCOMPATIBLE, IncompatibleFeature.EXTERNAL_DATA_FILE, b"external data file"),
    (FeatureType.INCOMPATIBLE, IncompatibleFeature.COMPRESSION_TYPE, b"compression type"),
    (FeatureType.INCOMPATIBLE, IncompatibleFeature.EXTENDED_L2_ENTRIES, b"extended L2 entries"),
    (FeatureType.COMPATIBLE, CompatibleFeature.LAZY_REFCOUNTS, b"lazy refcounts"),
    (FeatureType.AUTOCLEAR, AutoclearFeature.BITMAPS, b"bitmaps"),
    (FeatureType.AUTOCLEAR, AutoclearFeature.RAW_EXTERNAL_DATA, b"raw external data"),
)


class Tables(NamedTuple):
    """Where the tables of the new image are: host offsets in bytes."""

    l1_table_offset: int
    refcount_table_offset: int
    refcount_table_clusters: int


def first_cluster(options: CreateOptions, tables: Tables) -> bytes:
    """The whole first cluster. What does not fit into it: InvalidOption."""
    incompatible = IncompatibleFeature(0)
    if options.data_file is not None:
        incompatible |= IncompatibleFeature.EXTERNAL_DATA_FILE
    if options.compression_type != CompressionType.DEFLATE:
        incompatible |= IncompatibleFeature.COMPRESSION_TYPE
    if options.extended_l2:
        incompatible |= IncompatibleFeature.EXTENDED_L2_ENTRIES
    extensions = b"".join(_extensions(options))
    header_length = layout.HEADER_LENGTH_V2 if options.version < 3 else HEADER_LENGTH
    name = b"" if options.backing_file is None else as_bytes(options.backing_file)
    header: bytes = layout.Header.build(
        {
            "version": options.version,
            "backing_file_offset": header_length + len(extensions) if name else 0,
            "backing_file_size": len(name),
            "cluster_bits": options.cluster_bits,
            "size": options.size,
            "crypt_method": CryptMethod.NONE,
            "l1_size": options.l1_size,
            "l1_table_offset": tables.l1_table_offset,
            "refcount_table_offset": tables.refcount_table_offset,
            "refcount_table_clusters": tables.refcount_table_clusters,
            "nb_snapshots": 0,
            "snapshots_offset": 0,
            "incompatible_features": incompatible,
            "compatible_features": CompatibleFeature.LAZY_REFCOUNTS if options.lazy_refcounts else 0,
            "autoclear_features": AutoclearFeature.RAW_EXTERNAL_DATA if options.data_file_raw else 0,
            "refcount_order": options.refcount_order,
            "header_length": header_length,
            "compression_type": options.compression_type,
            "padding": bytes(max(0, header_length - layout.HEADER_LENGTH_V3 - 1)),
        }
    )
    cluster = header + extensions + name
    if len(cluster) > options.cluster_size:
        raise InvalidOption(
            f"the names of backing and data file do not fit into a cluster of {options.cluster_size} bytes; "
            "try a larger cluster_size"
        )
    return cluster.ljust(options.cluster_size, b"\0")


def _extensions(options: CreateOptions) -> list[bytes]:
    kinds = HeaderExtensionType
    extensions = []
    if options.backing_fmt is not None:
        extensions.append(_extension(kinds.BACKING_FILE_FORMAT, as_bytes(options.backing_fmt)))
    if options.data_file is not None:
        extensions.append(_extension(kinds.EXTERNAL_DATA_FILE, as_bytes(options.data_file)))
    if options.version >= 3 and options.cluster_size >= _LEAST_WITH_NAMES:
        entries = [
            {"type": kind, "bit": bit.bit_length() - 1, "name": name.ljust(46, b"\0")}
            for kind, bit, name in _FEATURE_NAMES
        ]
        table = layout.FeatureNameTable.build({"entries": entries, "rest": b""})
        extensions.append(_extension(kinds.FEATURE_NAME_TABLE, table))
    return [*extensions, _extension(kinds.END, b"")]


def _extension(kind: HeaderExtensionType, data: bytes) -> bytes:
    built: bytes = layout.HeaderExtension.build(
        {"type": kind, "length": len(data), "data": data, "padding": bytes(-len(data) % 8)}
    )
    return built
