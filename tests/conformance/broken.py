"""For every rule an image that breaks it: a shipped one, and what is changed in it, by the names of the fields."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from fixtures import corpus

FAR = 1 << 40  # on a cluster boundary, past the end of every image
EXTENSIONS = 0x70  # where they start in an image of version 3


@dataclass(frozen=True)
class Break:
    """Fields and bytes that are set in a shipped image, and the size that it gets."""

    of: str
    fields: dict[str, int | bytes] = field(default_factory=dict)
    bytes_at: dict[int, bytes] = field(default_factory=dict)
    size: int | None = None

    def write(self, path: Path) -> Path:
        data = bytearray(corpus.original(self.of))
        places = {each.path: each for each in corpus.anatomy(self.of).fields}
        for name, value in self.fields.items():
            place = places[name]
            now = value
            if isinstance(now, int):
                number = int.from_bytes(data[place.offset : place.offset + place.size], "big")
                now = (number & ~place.mask | now << place.shift & place.mask).to_bytes(place.size, "big")
            data[place.offset : place.offset + len(now)] = now
        for offset, now in self.bytes_at.items():
            data[offset : offset + len(now)] = now
        path.write_bytes(data)
        if self.size is not None:
            with path.open("r+b") as file:
                file.truncate(self.size)
        return path


def extension(kind: int, data: bytes, length: int | None = None) -> bytes:
    size = len(data) if length is None else length
    return kind.to_bytes(4, "big") + size.to_bytes(4, "big") + data + bytes(-len(data) % 8)


BITMAPS = "extensions.bitmaps.data"
LUKS = "extensions.full_disk_encryption.data"

BREAKS = {
    "HDR-001": Break("sound", {"header.magic": b"QFI\0"}),
    "HDR-002": Break("sound", size=50),
    "HDR-003": Break("sound", {"header.version": 4}),
    "HDR-004": Break("sound", {"header.cluster_bits": 8}),
    "HDR-005": Break("sound", {"header.header_length": 96}),
    "HDR-006": Break("sound", {"header.incompatible_features": 1 << 5}),
    "HDR-007": Break("sound", {"header.compression_type": 1}),
    "HDR-008": Break("sound", {"header.refcount_order": 7}),
    "HDR-009": Break("sound", {"header.backing_file_offset": 4000, "header.backing_file_size": 100}),
    "HDR-010": Break("sound", {"header.size": 1 << 40}),
    "HDR-011": Break("sound", {"header.l1_table_offset": 0x3200}),
    "HDR-012": Break("sound", {"header.crypt_method": 3}),
    "HDR-013": Break("sound", {"header.snapshots_offset": 0x15008}),
    "HDR-014": Break("sound", {"header.header_length": 109}),
    "HDR-015": Break("sound", {"header.autoclear_features": 2}),
    "HDR-016": Break("sound", {"header.padding": b"\0\0\1"}),
    "HDR-017": Break("sound", {"header.incompatible_features": 1}),
    "HDR-018": Break("sound", {"header.incompatible_features": 2}),
    "HDR-019": Break("sound", {"header.autoclear_features": 1}),
    "HDR-020": Break(
        "data-file-raw", {"header.backing_file_offset": 0x800, "header.backing_file_size": 4}, {0x800: b"base"}
    ),
    "HDR-021": Break("sound", {"header.size": 0x600001}),
    "HDR-022": Break("sound", {"header.backing_file_offset": 50, "header.backing_file_size": 4}),
    "HDR-023": Break("sound", bytes_at={0x400: b"?"}),
    "EXT-001": Break("sound", bytes_at={EXTENSIONS: extension(1, b"", 0x10000)}),
    "EXT-002": Break("bitmaps", {"extensions.bitmaps.length": 16}),
    "EXT-003": Break("sound", bytes_at={EXTENSIONS: 2 * extension(0x12345678, b"twice")}),
    "EXT-004": Break("sound", bytes_at={EXTENSIONS: extension(0x6803F857, b"\x09\0name".ljust(48, b"\0"))}),
    "EXT-005": Break("sound", bytes_at={EXTENSIONS: extension(0x6803F857, bytes(40))}),
    "EXT-006": Break("backing-qcow2", {"extensions.backing_file_format.type": 1}),
    "EXT-007": Break("sound", bytes_at={EXTENSIONS: extension(0xE2792ACA, b"qcow2")}),
    "EXT-008": Break("sound", bytes_at={EXTENSIONS: extension(0xE2792ACA, b"q" * 16)}),
    "REF-001": Break("sound", {"header.refcount_table_offset": 0x1200}),
    "REF-002": Break("sound", {"header.refcount_table_clusters": 2049}),
    "REF-003": Break("sound", {"header.refcount_table_offset": FAR}),
    "REF-004": Break("sound", {"refcount_table.empty.reserved": 1}),
    "REF-005": Break("sound", {"refcount_table.empty.offset": 0x2200}),
    "REF-006": Break("sound", {"refcount_table.empty.offset": FAR}),
    "REF-007": Break("sound", {"refcounts.header.1.refcount": 0}),
    "REF-008": Break("bitmaps", {"refcounts.free.0.refcount": 1}),
    "REF-009": Break("sound", {"refcount_table.empty.offset": 0x2000}),
    "REF-010": Break("refcount-1", {"header.refcount_table_clusters": 2}),
    "REF-011": Break("sound", {"header.refcount_table_clusters": 0}),
    "REF-012": Break("cluster-512", size=(1 << 40) + 512),
    "REF-013": Break("bitmaps", {"bitmaps.1.table.zeros.offset": 0x3000}),
    "L1-001": Break("sound", {"header.l1_table_offset": FAR}),
    "L1-002": Break("sound", {"l1.shared.offset": 0xA200}),
    "L1-003": Break("sound", {"l1.copied.reserved_high": 1}),
    "L1-004": Break("sound", {"l1.copied.copied": 0}),
    "L2-001": Break("sound", {"l1.shared.offset": FAR}),
    "L2-002": Break("sound", {"l2.copied.offset": FAR}),
    "L2-003": Break("sound", {"l2.copied.offset": 0x16200}),
    "L2-004": Break("compat-0.10", {"l2.copied.zero": 1}),
    "L2-005": Break("extended-l2-16k", {"l2.copied_partly.subclusters.zero": 0xFFFFFFFF}),
    "L2-006": Break("sound", {"l2.copied.reserved_high": 1}),
    "L2-007": Break("sound", {"l2.copied.copied": 0}),
    "L2-008": Break("extended-l2-16k", {"l2.shared.zero": 1}),
    "L2-009": Break("sound", {"l2.unallocated.copied": 1}),
    "CMP-001": Break("sound", {"l2.shared.compressed": 1}),  # what is data was never compressed
    "CMP-002": Break("sound", {"l2.compressed.offset": FAR}),
    "CMP-003": Break("sound", {"l2.compressed.copied": 1}),
    "CMP-004": Break("sound", {"l2.compressed.offset": 1 << 57}),
    "CMP-005": Break("extended-l2-16k", {"l2.copied_partly.compressed": 1}),
    "DATA-001": Break("data-file", {"l2.copied.offset": FAR}),
    "DATA-002": Break("data-file", {"l2.copied.compressed": 1}),
    "DATA-003": Break("data-file", {"extensions.external_data_file.type": 1}),
    "DATA-004": Break("data-file", {"header.nb_snapshots": 1, "header.snapshots_offset": 0x3000}),
    "DATA-005": Break("data-file", {"header.incompatible_features": 0}),
    "CRYPT-001": Break("luks", {"header.crypt_method": 0}),
    "CRYPT-002": Break("luks", {f"{LUKS}.offset": 0x200}),
    "CRYPT-003": Break("luks", {f"{LUKS}.length": FAR}),
    "CRYPT-004": Break("luks", {f"{LUKS}.offset": 0}),
    "CRYPT-005": Break("sound", {"header.crypt_method": 1}),
    "SNAP-001": Break("sound", {"header.snapshots_offset": FAR}),
    "SNAP-002": Break("sound", {"snapshots.0.extra_data_size": 2000}),
    "SNAP-003": Break("sound", {"snapshots.0.extra_data_size": 1 << 27}),
    "SNAP-004": Break("sound", {"snapshots.0.l1_table_offset": 0xE200}),
    "SNAP-005": Break("sound", {"snapshots.0.disk_size": 1 << 50}),
    "SNAP-006": Break("sound", {"snapshots.0.extra_data_size": 8}),
    "SNAP-007": Break("sound", {"snapshots.1.id_str": b"1"}),
    "SNAP-008": Break("sound", {"snapshots.1.id_str_size": 0}),
    "SNAP-009": Break("sound", {"snapshots.1.name_size": 5, "snapshots.1.name": b"first\0"}),
    "SNAP-010": Break("sound", {"snapshots.0.name": b"\xff\xfe\xfd\xfc\xfb"}),
    "SNAP-011": Break("sound", {"snapshots.0.date_nsec": 1_000_000_000}),
    "SNAP-012": Break("sound", {"snapshots.0.disk_size": 513}),
    "SNAP-013": Break("vm-state-grown", {"snapshots.0.disk_size": 0}),
    "BMP-001": Break("bitmaps", {f"{BITMAPS}.bitmap_directory_size": 8}),
    "BMP-002": Break("bitmaps", {"bitmaps.0.bitmap_table_offset": 0x14008}),
    "BMP-003": Break("bitmaps", {"bitmaps.0.table.data.reserved_high": 1}),
    "BMP-004": Break("bitmaps", {f"{BITMAPS}.nb_bitmaps": 0}),
    "BMP-005": Break("bitmaps", {f"{BITMAPS}.reserved": 1}),
    "BMP-006": Break("bitmaps", {f"{BITMAPS}.bitmap_directory_offset": 0x16008}),
    "BMP-007": Break("bitmaps", {"bitmaps.0.flags": 8}),
    "BMP-008": Break("bitmaps", {"bitmaps.0.type": 2}),
    "BMP-009": Break("bitmaps", {"bitmaps.0.granularity_bits": 64}),
    "BMP-010": Break("bitmaps", {"bitmaps.1.name_size": 0}),
    "BMP-011": Break(
        "bitmaps",
        {"bitmaps.1.name_size": 12, f"{BITMAPS}.bitmap_directory_size": 0x50},
        {0x16040: b"since-sunday" + bytes(4)},
    ),
    "BMP-012": Break("bitmaps", {"bitmaps.1.extra_data_size": 5}),
    "BMP-013": Break("bitmaps", {"bitmaps.0.padding": b"\0\0\0\1"}),
    "BMP-014": Break("bitmaps", bytes_at={0x12FFF: b"\x80"}),  # the last bit of the cluster of bits
    "BMP-015": Break("bitmaps", {"bitmaps.0.flags": 1}),
    "BMP-016": Break("bitmaps", {"header.autoclear_features": 0}),
}
