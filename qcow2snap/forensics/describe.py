"""What an image says of itself, with the field names of `qemu-img info --output=json`, and more. Reads no data."""

from __future__ import annotations

import os
from collections import Counter
from typing import Any

from construct import ConstructError

from formats import luks
from formats.qcow2 import (
    AutoclearFeature,
    CompatibleFeature,
    CryptMethod,
    FeatureType,
    FullDiskEncryptionExtension,
    HeaderExtensionType,
    IncompatibleFeature,
)
from qcow2snap.block.graph import Link
from qcow2snap.block.node import ImageFormatError, SnapshotGone, SnapshotInfo
from qcow2snap.block.qcow2.bitmaps import read_bitmap_directory
from qcow2snap.block.qcow2.driver import Qcow2Node
from qcow2snap.block.qcow2.header import as_text, feature_names


def describe(node: Qcow2Node, damages: list[ImageFormatError]) -> dict[str, Any]:
    """Everything that `qemu-img info` says, under the same names; without the snapshots, which have a listing.

    Where a part cannot be read, the rest is described, and the error added to `damages`.
    """
    header = node.header
    fields: dict[str, Any] = {
        "filename": node.filename,
        "format": "qcow2",
        "virtual-size": node.size,
        "actual-size": node.file.allocated_size(),
        "cluster-size": header.cluster_size,
        "dirty-flag": bool(header.incompatible_features & IncompatibleFeature.DIRTY),
        "format-specific": {"type": "qcow2", "data": _format_specific(node, damages)},
    }
    if header.crypt_method != CryptMethod.NONE:
        fields["encrypted"] = True
    if header.backing_file:
        reference = as_text(header.backing_file)
        fields["backing-filename"] = reference
        fields["full-backing-filename"] = _full_name(reference, node.filename)
        if header.backing_format:
            fields["backing-filename-format"] = header.backing_format
    return fields


def _full_name(reference: str, filename: str) -> str:
    return reference if reference.startswith("json:") else os.path.join(os.path.dirname(filename), reference)


def _format_specific(node: Qcow2Node, damages: list[ImageFormatError]) -> dict[str, Any]:
    header = node.header
    data: dict[str, Any] = {
        "compat": "1.1" if header.version >= 3 else "0.10",
        "compression-type": "zlib" if header.compression_type == 0 else header.compression_type.name.lower(),
        "refcount-bits": 1 << header.refcount_order,
    }
    if header.version >= 3:
        data["lazy-refcounts"] = header.is_lazy_refcounts
        data["corrupt"] = bool(header.incompatible_features & IncompatibleFeature.CORRUPT)
        data["extended-l2"] = header.has_extended_l2
    if header.has_data_file:
        if header.data_file:
            data["data-file"] = header.data_file
        data["data-file-raw"] = header.is_data_file_raw
    try:
        bitmaps = read_bitmap_directory(node.file, header)
    except ImageFormatError as error:
        error.filename = node.filename
        damages.append(error)
    else:
        listed = [{"name": b.name, "granularity": b.granularity, "flags": b.flag_names} for b in bitmaps]
        data |= {"bitmaps": listed} if listed else {}
    if header.crypt_method == CryptMethod.AES:
        data["encrypt"] = {"format": "aes"}
    elif header.crypt_method == CryptMethod.LUKS:
        data["encrypt"] = {"format": "luks", **_luks(node)}
    return data


def _luks(node: Qcow2Node) -> dict[str, Any]:
    """The LUKS header, as qemu-img tells it; nothing where it cannot be read, since nothing here needs it."""
    extension = node.header.extension(HeaderExtensionType.FULL_DISK_ENCRYPTION)
    try:
        pointer = FullDiskEncryptionExtension.parse(extension.data if extension else b"")
        data = node.file.pread_available(pointer.offset, luks.PartitionHeader.sizeof())
        header = luks.PartitionHeader.parse(data)
    except ConstructError:
        return {}

    def text(field: str) -> str:
        return as_text(header[field].rstrip(b"\0"))

    mode, _, ivgen = text("cipher-mode").partition("-")
    key_bits = header["key-bytes"] * 8
    slots = []
    for slot in header["key-slots"]:
        active = slot["active"] == luks.KEY_SLOT_ENABLED
        fields = {"active": active, "key-offset": slot["key-material-offset"] * luks.SECTOR_SIZE}
        slots.append(fields | ({"iters": slot["iterations"], "stripes": slot["stripes"]} if active else {}))
    return {
        "cipher-alg": f"{text('cipher-name')}-{key_bits // 2 if mode == 'xts' else key_bits}",
        "cipher-mode": mode,
        "ivgen-alg": ivgen.partition(":")[0],
        "hash-alg": text("hash-spec"),
        "uuid": text("uuid"),
        "payload-offset": header["payload-offset"] * luks.SECTOR_SIZE,
        "master-key-iters": header["mk-digest-iter"],
        "slots": slots,
    }


def features(node: Qcow2Node) -> dict[str, list[str]]:
    """The feature bits that are set, by kind, each with its name; bits that nobody names as `bit N`."""
    names = feature_names(node.header.extensions)
    kinds = (
        (FeatureType.INCOMPATIBLE, IncompatibleFeature, int(node.header.incompatible_features)),
        (FeatureType.COMPATIBLE, CompatibleFeature, int(node.header.compatible_features)),
        (FeatureType.AUTOCLEAR, AutoclearFeature, int(node.header.autoclear_features)),
    )
    result = {}
    for kind, known, value in kinds:
        known_names = {int(flag): str(flag.name).lower().replace("_", "-") for flag in known}
        result[kind.name.lower()] = [
            known_names.get(1 << bit) or names.get((kind, bit)) or f"bit {bit}" for bit in range(64) if value >> bit & 1
        ]
    return result


def extensions(node: Qcow2Node) -> list[dict[str, Any]]:
    """The header extensions in the file's order, unknown ones too."""
    known = {int(kind): kind.name.lower().replace("_", "-") for kind in HeaderExtensionType}
    return [
        {
            "type": f"{e.type:#010x}",
            "name": known.get(e.type, "unknown"),
            "length": len(e.data),
            "offset": e.host_offset,
        }
        for e in node.header.extensions
    ]


def chain(links: list[Link]) -> list[dict[str, Any]]:
    """The backing chain below the image."""
    result: list[dict[str, Any]] = []
    for link in links:
        fields: dict[str, Any] = {"filename": link.reference}
        if isinstance(link.node, Qcow2Node):
            fields |= {"filename": link.node.filename, "format": "qcow2", "virtual-size": link.node.size}
        elif link.node is not None:
            fields |= {"format": "raw", "virtual-size": link.node.size}
        else:
            fields |= {"error": str(link.error)} | ({"format": link.format} if link.format else {})
        result.append(fields)
    return result


def sharing(node: Qcow2Node) -> list[dict[str, Any]]:
    """For the active disk and every snapshot, how many L2 tables it has, and how many of them nobody else has.

    A table that is shared has not changed since; an L1 table that cannot be read counts as none, and says why.
    """
    states: list[SnapshotInfo | None] = [None, *node.snapshots()]
    tables: list[set[int]] = []
    result: list[dict[str, Any]] = []
    for state in states:
        fields: dict[str, Any] = {} if state is None else {"id": state.id, "name": state.name}
        try:
            tables.append({offset for offset in node.l1_table(state).offsets if offset})
        except (ImageFormatError, SnapshotGone) as error:
            tables.append(set())
            fields["error"] = str(error)
        result.append(fields)
    users = Counter(offset for offsets in tables for offset in offsets)
    for fields, offsets in zip(result, tables, strict=True):
        fields["l2-tables"] = len(offsets)
        fields["l2-tables-exclusive"] = sum(users[offset] == 1 for offset in offsets)
    return result
