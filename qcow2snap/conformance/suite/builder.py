"""An image under construction: header, extensions, snapshots, and the files beside it; built from formats/.

It makes what cases need, odd and broken layouts too, and makes the same bytes each time. Refcounts and COPIED bits are
computed from what refers to what, so that an image whose case says nothing else is clean.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Self

from formats import qcow2 as layout
from formats.qcow2 import AutoclearFeature, CompressionType, HeaderExtensionType, IncompatibleFeature
from qcow2snap.conformance.suite.content import LINE, Content, lines
from qcow2snap.conformance.suite.host import HostSpace, Refcounts
from qcow2snap.conformance.suite.state import State, Table
from qcow2snap.conformance.suite.values import Built, Disk, MapEntry, Ref, Region, SparseFile

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
MONDAY = 1_794_819_600  # 2026-11-16 09:00:00 UTC: the date of the first snapshot
DAY = 86_400

# Who does not know one of these bits has to refuse the image.
_OPTIONAL = {
    IncompatibleFeature.EXTERNAL_DATA_FILE: "external data files are incompatible feature bit 2",
    IncompatibleFeature.COMPRESSION_TYPE: "other compression types are incompatible feature bit 3",
    IncompatibleFeature.EXTENDED_L2_ENTRIES: "extended L2 entries are incompatible feature bit 4",
}


class _Snapshot(NamedTuple):
    state: State
    fields: dict[str, Any]


class Image:
    """A qcow2 image of a case, and what every disk of it is expected to hold.

    fields      of the header, by the names of formats/qcow2.py: what is set here is stored, right or wrong
    extensions  those of the header, encoded, in the order in which they were added
    """

    def __init__(
        self,
        name: str,
        size: int,
        *,
        version: int = 3,
        cluster_bits: int = 12,
        refcount_order: int = 4,
        header_length: int | None = None,
        extended_l2: bool = False,
        zstd: bool = False,
    ) -> None:
        self.name = name
        self.version = version
        self.cluster_bits = cluster_bits
        self.cluster_size = 1 << cluster_bits
        self.refcount_order = refcount_order if version >= 3 else 4
        self.has_extended_l2 = extended_l2
        self.has_data_file = False
        self.host = HostSpace(self.cluster_size)
        self.file = SparseFile()
        self.guest_file = self.file  # where guest clusters lie
        self.beside: dict[str, SparseFile] = {}  # other files, by name
        self.backing: Disk | None = None
        self.extensions: list[bytes] = []
        self.has_end_marker = True
        self.fields: dict[str, Any] = {}
        self.features = int(IncompatibleFeature.EXTENDED_L2_ENTRIES) if extended_l2 else 0
        if zstd:
            self.features |= IncompatibleFeature.COMPRESSION_TYPE
            self.fields["compression_type"] = CompressionType.ZSTD
        self.compatible = 0
        self.autoclear = 0
        default = layout.HEADER_LENGTH_V2 if version < 3 else layout.HEADER_LENGTH_V3 + (8 if zstd else 0)
        self.header_length = default if header_length is None else header_length
        self.refused: str | None = None
        self.optional: str | None = None
        self.ends_at: int | None = None
        self.has_refcounts = True  # otherwise all of them are zero
        self.patches: list[tuple[int, bytes]] = []  # what is stored last, over all else
        self.is_sparse = False
        self.snapshots: list[_Snapshot] = []
        self._backing_name = b""
        self._name_offset: int | None = None
        self._reserved: tuple[int, int, int] | None = None  # refcount table, refcount block, active L1 table
        self._metadata: list[tuple[int, int]] = []  # clusters that only header extensions refer to
        self._line = 0
        self.active = State(self, size)

    @property
    def l2_entries(self) -> int:
        return self.cluster_size // (16 if self.has_extended_l2 else 8)

    @property
    def l2_coverage(self) -> int:
        return self.l2_entries * self.cluster_size

    def lines(self, length: int) -> bytes:
        """Numbered lines that occur nowhere else in the image."""
        first = self._line
        self._line += -(-length // LINE)
        return lines(first, length)

    # -- header -------------------------------------------------------------------------------------------------------

    def extension(self, kind: int, data: bytes, *, padding: bytes | None = None, length: int | None = None) -> Self:
        """A header extension; `length` is stored in place of that of the data, `padding` in place of zeros."""
        fill = bytes(-len(data) % 8) if padding is None else padding
        built = layout.HeaderExtension.build({"type": kind, "length": len(data), "data": data, "padding": fill})
        if length is not None:
            built = built[:4] + length.to_bytes(4, "big") + built[8:]
        self.extensions.append(built)
        return self

    def metadata(self, data: bytes, what: str) -> int:
        """Clusters of the image file for what a header extension refers to; returns their offset."""
        offset = self.host.clusters(max(1, -(-len(data) // self.cluster_size)), what)
        self._metadata.append((offset, max(1, len(data))))
        self.file.put(offset, data)
        return offset

    def feature_names(self, *names: tuple[int, int, str]) -> Self:
        """A feature name table: type, bit and name."""
        entries = [{"type": kind, "bit": bit, "name": name.encode().ljust(46, b"\0")} for kind, bit, name in names]
        data = layout.FeatureNameTable.build({"entries": entries, "rest": b""})
        return self.extension(HeaderExtensionType.FEATURE_NAME_TABLE, data)

    # -- other files --------------------------------------------------------------------------------------------------

    def over_raw(
        self, content: bytes, *, stated: bytes | None = b"raw", name: bytes | None = None, at: int | None = None
    ) -> Self:
        """Put the image over a raw backing file of these bytes; `stated` is what the image says of its format."""
        own_name = f"{self.name}.base.raw"
        file = self.beside[own_name] = SparseFile()
        file.put(0, content)
        size = len(content)
        entry = MapEntry(0, size, 0, True, False, True, False, 0)
        self.backing = Disk(None, size, Content(size, ((0, content),)), (entry,) if size else ())
        return self.refer_to_backing(own_name.encode() if name is None else name, stated, at=at)

    def over(self, below: Image, *, stated: bytes | None = b"qcow2", name: bytes | None = None) -> Self:
        """Put the image over another."""
        built = below.build()
        self.beside |= built.files
        self.backing = built.disks[0]
        return self.refer_to_backing(next(iter(built.files)).encode() if name is None else name, stated)

    def refer_to_backing(self, name: bytes, stated: bytes | None, *, at: int | None = None) -> Self:
        """Name a backing file, at `at` in the first cluster, or behind the header extensions."""
        self._backing_name = name
        self._name_offset = at
        if stated is not None:
            self.extension(HeaderExtensionType.BACKING_FILE_FORMAT, stated)
        return self

    def with_data_file(self, *, raw: bool = False, missing: bool = False) -> Self:
        """Let guest clusters lie in a file of their own, at their guest offsets."""
        name = f"{self.name}.data"
        self.guest_file = SparseFile()
        self.guest_file.put(0, bytes(self.active.size))
        if not missing:
            self.beside[name] = self.guest_file
        self.has_data_file = True
        self.features |= IncompatibleFeature.EXTERNAL_DATA_FILE
        if raw:
            self.autoclear |= AutoclearFeature.RAW_EXTERNAL_DATA
        return self.extension(HeaderExtensionType.EXTERNAL_DATA_FILE, name.encode())

    # -- snapshots ----------------------------------------------------------------------------------------------------

    def snapshot(self, name: str | bytes = b"", id_: str | bytes | None = None, **fields: Any) -> State:
        """Take a snapshot of the active disk. `fields` of its table entry, by their names, are stored as they are.

        The state that is returned is the snapshot's: what is done to it, the active disk does not see.
        """
        number = len(self.snapshots) + 1
        state = self.active.fork()
        date = {"date_sec": MONDAY + (number - 1) * DAY, "vm_clock_nsec": number * 1_500_000_000}
        id_ = str(number) if id_ is None else id_
        named = {"id_str": _bytes(id_), "name": _bytes(name)}
        self.snapshots.append(_Snapshot(state, date | named | fields))
        return state

    def _ref(self, index: int) -> Ref:
        """How the reader under test is told which snapshot it is asked for."""
        entries = [(entry.fields["id_str"], entry.fields["name"]) for entry in self.snapshots]
        id_, name = entries[index]
        others = [other for number, other in enumerate(entries) if number != index]
        return Ref(id_, name, bool(name) and all(name not in other for other in others))

    # -- expectations -------------------------------------------------------------------------------------------------

    def refuse(self, reason: str) -> Self:
        """No disk of this image must be read without an error."""
        self.refused = reason
        return self

    def may_refuse(self, reason: str) -> Self:
        """A reader that refuses the image is not wrong; one that opens it has to read it right."""
        self.optional = reason
        return self

    # -- building -----------------------------------------------------------------------------------------------------

    def metadata_first(self) -> Self:
        """Place refcounts and the active L1 table now, so that what is stored next ends the file."""
        l1_clusters = -(-self._l1_size(self.active) * 8 // self.cluster_size)
        self._reserved = (
            self.host.clusters(1, "refcount table"),
            self.host.clusters(1, "refcount block 0"),
            self.host.clusters(l1_clusters, "L1 table of the active disk"),
        )
        return self

    def move_l1(self, host_offset: int) -> Self:
        """Place the active L1 table elsewhere than metadata_first() did."""
        assert self._reserved is not None
        self._reserved = (*self._reserved[:2], host_offset)
        return self

    def build(self) -> Built:
        refcounts = Refcounts(self.cluster_size, self.refcount_order)
        reserved_l1 = None if self._reserved is None else self._reserved[2]
        l1_offsets = [self._place_l1(self.active, "the active disk", refcounts, reserved_l1)]
        for index, snapshot in enumerate(self.snapshots):
            l1_offsets.append(self._place_l1(snapshot.state, f"snapshot {index + 1}", refcounts, None))
        states = [self.active, *(snapshot.state for snapshot in self.snapshots)]
        for state in states:
            self._count_references(state, refcounts)
        for offset, length in self._metadata:
            refcounts.count(offset, length)
        table_offset = self._write_snapshot_table(l1_offsets[1:], refcounts)
        reserved = None if self._reserved is None else self._reserved[:2]
        refcount_table = refcounts.write(self.host, self.file, reserved, all_zero=not self.has_refcounts)
        for state, offset in zip(states, l1_offsets, strict=True):
            self._write_tables(state, offset, refcounts)
        self._write_header(l1_offsets[0], table_offset, refcount_table)
        if self.file.size < self.host.end:
            self.file.put(self.host.end - 1, b"\0")
        for offset, data in self.patches:
            self.file.put(offset, data)
        if self.ends_at is not None:
            self.file.truncate(self.ends_at)
        optional = next((why for bit, why in _OPTIONAL.items() if self.features & bit), None)
        refs = (None, *(self._ref(index) for index in range(len(self.snapshots))))
        disks = (state.expected(ref, optional) for state, ref in zip(states, refs, strict=True))
        files = {f"{self.name}.qcow2": self.file} | self.beside
        return Built(files, tuple(disks), tuple(sorted(self.host.regions)), self.is_sparse)

    def _l1_size(self, state: State) -> int:
        if state.l1_size is not None:
            return state.l1_size
        return max(-(-state.size // self.l2_coverage), *(index + 1 for index in state.tables), 0)

    def _place_l1(self, state: State, whose: str, refcounts: Refcounts, reserved: int | None) -> int:
        length = self._l1_size(state) * 8
        clusters = -(-length // self.cluster_size)
        if reserved is None:
            reserved = self.host.clusters(clusters, f"L1 table of {whose}") if clusters else self.cluster_size
        refcounts.count(reserved, length)
        return reserved

    def _count_references(self, state: State, refcounts: Refcounts) -> None:
        for table in state.tables.values():
            refcounts.count(table.host_offset, self.cluster_size)
            for entry in table.entries.values():
                if entry.span is not None:
                    refcounts.count(*entry.span)

    def _write_tables(self, state: State, l1_offset: int, refcounts: Refcounts) -> None:
        size = self._l1_size(state)
        l1 = bytearray(8 * size)
        for index, table in state.tables.items():
            copied = refcounts.of(table.host_offset) == 1
            fields = {"reserved_low": 0, "offset": table.host_offset, "reserved_high": 0, "copied": copied}
            if index < size:
                l1[8 * index : 8 * index + 8] = layout.L1TableEntry.build(fields)
            self.file.put(table.host_offset, self._table_bytes(table, refcounts))
        for index, word in state.exact_l1.items():
            l1[8 * index : 8 * index + 8] = word.to_bytes(8, "big")
        self.file.put(l1_offset, bytes(l1))

    def _table_bytes(self, table: Table, refcounts: Refcounts) -> bytes:
        """An L2 table up to its last entry that is not zero."""
        width = self.cluster_size // self.l2_entries
        data = bytearray(width * (max(table.entries, default=0) + 1))
        for number, entry in table.entries.items():
            refcount = 0
            if self.has_data_file:  # guest clusters have an implicit refcount of 1
                refcount = int(entry.has_host)
            elif entry.span is not None:
                refcount = refcounts.of(entry.span[0])
            words = entry.build(refcount).to_bytes(8, "big") + entry.bitmap.to_bytes(8, "big")
            data[width * number : width * (number + 1)] = words[:width]
        return bytes(data)

    def _write_snapshot_table(self, l1_offsets: list[int], refcounts: Refcounts) -> int:
        if not self.snapshots:
            return 0
        table = b"".join(self._table_entry(*each) for each in zip(self.snapshots, l1_offsets, strict=True))
        offset = self.host.clusters(-(-len(table) // self.cluster_size), "snapshot table")
        refcounts.count(offset, len(table))
        self.file.put(offset, table)
        return offset

    def _table_entry(self, snapshot: _Snapshot, l1_offset: int) -> bytes:
        state, fields = snapshot
        values: dict[str, Any] = {
            "l1_table_offset": l1_offset,
            "l1_size": self._l1_size(state),
            "date_nsec": 0,
            "vm_state_size": 0,
            "extra_data_size": 24 if self.version >= 3 else 0,
            "vm_state_size_large": fields.get("vm_state_size", 0),
            "disk_size": state.size,
            "icount": layout.ICOUNT_OFF,
            "unknown_extra_data": b"",
        } | fields
        values |= {"id_str_size": len(fields["id_str"]), "name_size": len(fields["name"])}
        used = layout.SNAPSHOT_HEADER_LENGTH + sum(
            int(values[key]) for key in ("extra_data_size", "id_str_size", "name_size")
        )
        values.setdefault("padding", bytes(-used % 8))
        built: bytes = layout.SnapshotTableEntry.build(values)
        return built

    def _write_header(self, l1_offset: int, snapshots_offset: int, refcount_table: tuple[int, int]) -> None:
        behind = b"".join(self.extensions)
        if self.has_end_marker:
            behind += layout.HeaderExtension.build({"type": 0, "length": 0, "data": b"", "padding": b""})
        name_offset = self.header_length + len(behind) if self._name_offset is None else self._name_offset
        named = bool(self._backing_name)
        values: dict[str, Any] = {
            "version": self.version,
            "backing_file_offset": name_offset if named else 0,
            "backing_file_size": len(self._backing_name),
            "cluster_bits": self.cluster_bits,
            "size": self.active.size,
            "crypt_method": 0,
            "l1_size": self._l1_size(self.active),
            "l1_table_offset": l1_offset,
            "refcount_table_offset": refcount_table[0],
            "refcount_table_clusters": refcount_table[1],
            "nb_snapshots": len(self.snapshots),
            "snapshots_offset": snapshots_offset,
            "incompatible_features": self.features,
            "compatible_features": self.compatible,
            "autoclear_features": self.autoclear,
            "refcount_order": self.refcount_order,
            "header_length": self.header_length,
            "compression_type": CompressionType.DEFLATE,
            "padding": bytes(max(0, self.header_length - layout.HEADER_LENGTH_V3 - 1)),
        } | self.fields
        if named:
            self.file.put(int(values["backing_file_offset"]), self._backing_name)
        if behind:
            self.file.put(self.header_length, behind)
        header = bytearray(layout.Header.build(values | {"header_length": self.header_length}))
        if self.version >= 3:
            header[100:104] = int(values["header_length"]).to_bytes(4, "big")
        self.file.put(0, bytes(header))
        self.host.regions.append(Region(0, self.cluster_size, "header, its extensions, the backing file's name"))


def _bytes(text: str | bytes) -> bytes:
    return text.encode() if isinstance(text, str) else text
