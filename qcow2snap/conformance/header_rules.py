"""The rules for the header and its extensions, all of them, where a reader is content with those it needs."""

from __future__ import annotations

from construct import Container

from formats import luks
from formats import qcow2 as layout
from formats.qcow2 import (
    AutoclearFeature,
    CompressionType,
    CryptMethod,
    FeatureType,
    HeaderExtensionType,
    IncompatibleFeature,
)
from qcow2snap.block.file import FileNode
from qcow2snap.block.node import ImageFormatError
from qcow2snap.block.qcow2 import rules
from qcow2snap.block.qcow2.header import (
    Extension,
    ImageHeader,
    active_l1_errors,
    header_errors,
    image_header,
    parse_extensions,
    parse_header,
    unknown_features,
)
from qcow2snap.conformance.findings import Finding, Findings, short
from qcow2snap.conformance.subject import Region, Subject

_COMPRESSION_TYPE_END = 105
_MAX_BACKING_FORMAT = 15  # bytes: QEMU's buffer
_LUKS_EXTENSION = layout.FullDiskEncryptionExtension.sizeof()


def judge_header(file: FileNode, findings: Findings) -> ImageHeader | None:
    """The header as far as it can be used; None where nothing can be read by it. Raises FileError.

    A file that is no qcow2 image at all is for the caller: it raises the reader's ImageFormatError.
    """
    try:
        fields, first_cluster = parse_header(file)
    except ImageFormatError as error:
        if error.rule == rules.HEADER_MAGIC.id:
            raise
        findings.add_error(error, stops=True)
        return None
    for broken in header_errors(fields, first_cluster):
        findings.add_error(broken, stops=True)
    extensions, damage = parse_extensions(fields, first_cluster)
    if damage is not None:
        findings.add_error(damage, stops=True)
    unknown = unknown_features(fields, extensions)
    if unknown:
        what = f"the image needs a feature that is not known here: {short(unknown)}"
        findings.add(Finding(rules.HEADER_INCOMPATIBLE, 72, what, stops=True))
        return None
    _judge_padding(fields, findings)
    _judge_bits(fields, findings)
    _judge_room(fields, first_cluster, extensions, damage, findings)
    _judge_extensions(extensions, findings)
    _make_usable(fields)
    header = image_header(fields, first_cluster, extensions)
    _judge_backing(header, findings)
    for broken in active_l1_errors(header):
        findings.add_error(broken, stops=True, states=(0,))
    return header


def _make_usable(fields: Container) -> None:
    """What has been reported, and without which the rest can be looked at."""
    if fields.crypt_method not in tuple(CryptMethod):
        fields.crypt_method = CryptMethod.NONE
    if fields.compression_type not in tuple(CompressionType):
        fields.compression_type = CompressionType.DEFLATE
    fields.refcount_order = min(fields.refcount_order, layout.MAX_REFCOUNT_ORDER)


def _judge_padding(fields: Container, findings: Findings) -> None:
    if fields.version < 3:
        return
    if fields.header_length % 8:
        what = f"header_length is {fields.header_length}"
        findings.add(Finding(rules.HEADER_LENGTH_MULTIPLE, 100, what))
    # A longer header has fields of a later version of the specification: only what rounds it up is padding for sure.
    padding = fields.padding[: 112 - _COMPRESSION_TYPE_END]
    for index, byte in enumerate(padding):
        if byte:
            where = _COMPRESSION_TYPE_END + index
            findings.add(Finding(rules.HEADER_PADDING, where, f"byte {where} of the header is {byte:#04x}"))
            break


def _judge_bits(fields: Container, findings: Findings) -> None:
    features = int(fields.incompatible_features)
    if features & IncompatibleFeature.DIRTY:
        what = "the image is marked dirty: it was not closed cleanly, and its refcounts may be stale"
        findings.add(Finding(rules.HEADER_DIRTY, 72, what))
    if features & IncompatibleFeature.CORRUPT:
        what = "the image is marked corrupt: some writer met damage, and QEMU does not write it any more"
        findings.add(Finding(rules.HEADER_CORRUPT, 72, what))
    if fields.size % layout.SECTOR_SIZE:
        what = f"the virtual disk size is {fields.size} bytes; the last {fields.size % layout.SECTOR_SIZE} are lost"
        findings.add(Finding(rules.HEADER_SIZE_SECTORS, 24, what))
    if fields.crypt_method == CryptMethod.AES:
        findings.add(Finding(rules.CRYPT_AES, 32, "the disk is encrypted with QEMU's old AES"))


def _judge_room(
    fields: Container,
    first_cluster: bytes,
    extensions: tuple[Extension, ...],
    damage: ImageFormatError | None,
    findings: Findings,
) -> None:
    """What lies behind the header extensions, which is for the name of the backing file alone."""
    if damage is not None or len(first_cluster) < fields.header_length:
        return
    first_cluster = first_cluster.ljust(1 << fields.cluster_bits, b"\0")  # as QEMU reads a file that ends within it
    end = fields.header_length
    if extensions:
        last = extensions[-1]
        end = last.host_offset + layout.HEADER_EXTENSION_HEADER_LENGTH + len(last.data) + -len(last.data) % 8
    start, stop = fields.backing_file_offset, fields.backing_file_offset + fields.backing_file_size
    if start and start < end and fields.backing_file_size:
        what = f"the backing file name at {start:#x} lies within the header, which ends at {end:#x}"
        findings.add(Finding(rules.HEADER_BACKING_PLACE, 8, what))
    left = (start or len(first_cluster)) - end
    if 0 < left < layout.HEADER_EXTENSION_HEADER_LENGTH:  # not even for the end marker, which QEMU looks for
        what = f"{left} bytes are left for header extensions, too few for any"
        findings.add(Finding(rules.EXTENSION_LENGTH, end, what, stops=True))
    if first_cluster[end : end + 4] == bytes(4):  # the end marker
        length = int.from_bytes(first_cluster[end + 4 : end + 8], "big")
        end += layout.HEADER_EXTENSION_HEADER_LENGTH
        if end <= (start or len(first_cluster)) < end + length:  # QEMU wants room for its data, though it has none
            what = f"the end marker of the header extensions states a length of {length}"
            findings.add(Finding(rules.EXTENSION_LENGTH, end - 4, what, stops=True))
    room = bytearray(first_cluster[end:])
    low, high = max(0, start - end), min(max(0, stop - end), len(room))
    if start and low < high:
        room[low:high] = bytes(high - low)
    foreign = len(room) - len(room.lstrip(b"\0"))
    if foreign < len(room):
        what = f"{len(room.strip(bytes(1)))} bytes at {end + foreign:#x} are neither extension nor backing file name"
        findings.add(Finding(rules.HEADER_FOREIGN_DATA, end + foreign, what))


def _judge_extensions(extensions: tuple[Extension, ...], findings: Findings) -> None:
    seen: set[int] = set()
    for extension in extensions:
        if extension.type in seen:
            what = f"header extension {extension.type:#010x} is there more than once"
            findings.add(Finding(rules.EXTENSION_ONCE, extension.host_offset, what))
        elif extension.type == HeaderExtensionType.FEATURE_NAME_TABLE:
            _judge_feature_names(extension, findings)
        seen.add(extension.type)


def _judge_feature_names(extension: Extension, findings: Findings) -> None:
    table = layout.FeatureNameTable.parse(extension.data)
    start = extension.host_offset + layout.HEADER_EXTENSION_HEADER_LENGTH
    for index, entry in enumerate(table.entries):
        if entry.type not in tuple(FeatureType) or entry.bit > 63:
            what = f"entry {index} of the feature name table is for bit {entry.bit} of type {int(entry.type)}"
            findings.add(Finding(rules.FEATURE_NAME_ENTRY, start + 48 * index, what))
    if table.rest:
        what = f"the feature name table has {len(extension.data)} bytes, which is no multiple of 48"
        findings.add(Finding(rules.FEATURE_NAME_LENGTH, extension.host_offset + 4, what))


def _judge_backing(header: ImageHeader, findings: Findings) -> None:
    extension = header.extension(HeaderExtensionType.BACKING_FILE_FORMAT)
    for each in header.extensions:  # QEMU looks at all of them
        if each.type == HeaderExtensionType.BACKING_FILE_FORMAT and len(each.data) > _MAX_BACKING_FORMAT:
            what = f"the format of the backing file has {len(each.data)} bytes"
            findings.add(Finding(rules.BACKING_FORMAT_LENGTH, each.host_offset, what, stops=True))
    if header.backing_file and extension is None:
        findings.add(Finding(rules.BACKING_FORMAT, 8, "the format of the backing file is not stated"))
    if not header.backing_file and extension is not None:
        what = "there is a backing file format, and no backing file"
        findings.add(Finding(rules.BACKING_FORMAT_ALONE, extension.host_offset, what))
    if header.backing_file and header.is_data_file_raw:
        what = "the raw external data file can be read without the image, but not without the backing file"
        findings.add(Finding(rules.HEADER_RAW_BACKING, 88, what))
    name = header.extension(HeaderExtensionType.EXTERNAL_DATA_FILE)
    if header.has_data_file and (name is None or not name.data):
        what = "the image needs an external data file and does not name it"
        findings.add(Finding(rules.DATA_FILE_NAME, 72, what, stops=True))
    if not header.has_data_file and name is not None:
        what = "an external data file is named, but its feature bit is not set"
        findings.add(Finding(rules.DATA_FILE_NAME_ALONE, name.host_offset, what))
    has_bitmaps = header.extension(HeaderExtensionType.BITMAPS) is not None
    if header.autoclear_features & AutoclearFeature.BITMAPS and not has_bitmaps:
        what = "the bitmaps bit is set, but there is no bitmaps extension"
        findings.add(Finding(rules.HEADER_BITMAPS_BIT, 88, what))


def judge_encryption(subject: Subject) -> None:
    """The full disk encryption header, and the area it takes."""
    header, findings = subject.header, subject.findings
    extension = header.extension(HeaderExtensionType.FULL_DISK_ENCRYPTION)
    if (extension is not None) != (header.crypt_method == CryptMethod.LUKS):
        state = "no full disk encryption header" if extension is None else "a full disk encryption header"
        what = f"there is {state}, and the encryption method is {int(header.crypt_method)}"
        findings.add(Finding(rules.CRYPT_HEADER_PRESENT, 32, what, stops=True))
    if extension is None:
        return
    if len(extension.data) != _LUKS_EXTENSION:
        what = f"the full disk encryption extension has {len(extension.data)} bytes, not {_LUKS_EXTENSION}"
        findings.add(Finding(rules.EXTENSION_DATA, extension.host_offset, what, stops=True))
        return
    pointer = layout.FullDiskEncryptionExtension.parse(extension.data)
    where = extension.host_offset + layout.HEADER_EXTENSION_HEADER_LENGTH
    if pointer.offset % header.cluster_size:
        what = f"the encryption header is at {pointer.offset:#x}, not a cluster boundary"
        findings.add(Finding(rules.CRYPT_HEADER_ALIGNED, where, what, stops=True))
    if pointer.length < 1 << 63:
        region = Region(pointer.offset, pointer.length, "the encryption header")
        subject.takes(region, rules.CRYPT_HEADER_IN_FILE)
    else:  # QEMU takes the length for a negative one, and passes over it
        what = f"the encryption header has {pointer.length} bytes, more than a file can have"
        findings.add(Finding(rules.CRYPT_HEADER_IN_FILE, where + 8, what, times=0))
    if pointer.length < luks.PartitionHeader.sizeof():
        what = f"{pointer.length} bytes of encryption header are too few for a LUKS partition header"
        findings.add(Finding(rules.CRYPT_HEADER_LUKS, where + 8, what, stops=True))
    start = subject.file.pread_available(pointer.offset, len(luks.MAGIC))
    if start != luks.MAGIC:
        what = f"there is no LUKS partition header at {pointer.offset:#x}"
        findings.add(Finding(rules.CRYPT_HEADER_LUKS, pointer.offset, what, stops=True))
