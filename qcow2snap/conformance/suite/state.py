"""One state of a disk under construction: its L1 and L2 tables, and beside them what a reader has to find in it.

The two are filled by the same calls and never derived from each other: what is expected is not what some reader of
the tables says.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum
from typing import TYPE_CHECKING, NamedTuple, Self

from formats import qcow2 as layout
from qcow2snap.conformance.suite.content import Content
from qcow2snap.conformance.suite.values import Disk, MapEntry, Ref, merged

if TYPE_CHECKING:
    from qcow2snap.conformance.suite.builder import Image

COPIED = layout.StandardL2Entry.mask("copied")
_STALE = b"not to be read.\n"  # what lies under clusters that read as zeros or as what is below


class _Kind(Enum):
    DATA = "data"
    COMPRESSED = "compressed"
    ZERO = "zero"
    BELOW = "below"  # unallocated: the backing file, or zeros


class _Piece(NamedTuple):
    """What a part of a guest cluster reads as, and for DATA where its host cluster has it."""

    offset: int  # within the cluster
    length: int
    kind: _Kind
    data: bytes = b""
    host: int | None = None


class Entry(NamedTuple):
    """An L2 entry, without its COPIED bit, and the host bytes that it refers to: they are what its refcounts count."""

    word: int
    bitmap: int = 0
    span: tuple[int, int] | None = None  # offset, length; in the image file
    has_host: bool = False  # it is a standard cluster's, and has a place for it, be it in another file

    def build(self, refcount: int) -> int:
        return self.word | (COPIED if self.has_host and refcount == 1 else 0)


class Table:
    """An L2 table: where it lies, and those of its entries that are not zero."""

    def __init__(self, host_offset: int, entries: dict[int, Entry] | None = None) -> None:
        self.host_offset = host_offset
        self.entries = {} if entries is None else entries


class State:
    """A disk of `size` bytes. Each step returns the state, so that steps form a sentence; `cluster` counts from 0.

    l1_size    entries; by default as many as the size, and the VM state, need
    exact_l1   entries of the L1 table, by index, to be stored as they are
    """

    def __init__(self, image: Image, size: int) -> None:
        self.image = image
        self.size = size
        self.l1_size: int | None = None
        self.exact_l1: dict[int, int] = {}
        self.tables: dict[int, Table] = {}  # by index in the L1 table
        self._owned: set[int] = set()  # indexes of tables that no other state has
        self._clusters: dict[int, list[_Piece]] = {}
        self._refused: str | None = None
        self._may_refuse: str | None = None

    # -- what is stored -----------------------------------------------------------------------------------------------

    def data(self, cluster: int, content: bytes | None = None, *, host: int | None = None) -> Self:
        """A standard cluster of numbered lines, or of `content`; in a host cluster of its own, or in that one."""
        size = self.image.cluster_size
        content = self.image.lines(size) if content is None else content
        host, span = self._host(cluster, f"guest cluster {cluster}", host)
        self.image.guest_file.put(host, content)
        self._set(cluster, Entry(host, self._whole(), span, True), [_Piece(0, size, _Kind.DATA, content, host)])
        return self

    def same(self, cluster: int, other: int) -> Self:
        """A guest cluster that lies in the same host cluster as another."""
        self._set(cluster, self._entry(other), self._clusters[other])
        return self

    def zero(self, cluster: int, *, allocated: bool = False) -> Self:
        """A cluster that reads as zeros; `allocated`, it has a host cluster, whose bytes are not to be read."""
        size = self.image.cluster_size
        host, span = self._stale_host(cluster) if allocated else (None, None)
        zeros = 0xFFFFFFFF << 32 if self.image.has_extended_l2 else 0
        word = (host or 0) | (0 if self.image.has_extended_l2 else 1)
        self._set(cluster, Entry(word, zeros, span, host is not None), [_Piece(0, size, _Kind.ZERO)])
        return self

    def subclusters(self, cluster: int, states: str, *, host: bool | None = None) -> Self:
        """A cluster by its 32 subclusters: d has data, z reads as zeros, . is unallocated.

        host  whether it has a host cluster; by default if there is data
        """
        assert len(states) == layout.SUBCLUSTERS_PER_CLUSTER
        unit = self.image.cluster_size // len(states)
        has_host = "d" in states if host is None else host
        place, span = self._stale_host(cluster) if has_host else (None, None)
        bitmap, pieces = 0, []
        for index, state in enumerate(states):
            start = index * unit
            if state == "d":
                assert place is not None
                content = self.image.lines(unit)
                self.image.guest_file.put(place + start, content)
                bitmap |= 1 << index
                pieces.append(_Piece(start, unit, _Kind.DATA, content, place + start))
            elif state == "z":
                bitmap |= 1 << (32 + index)
                pieces.append(_Piece(start, unit, _Kind.ZERO))
            else:
                pieces.append(_Piece(start, unit, _Kind.BELOW))
        self._set(cluster, Entry(place or 0, bitmap, span, has_host), pieces)
        return self

    def compressed(
        self,
        cluster: int,
        stream: bytes,
        content: bytes,
        *,
        at: int | None = None,
        more_sectors: int = 0,
        host: int | None = None,
    ) -> Self:
        """A compressed cluster, right behind the one before; or so many bytes into a new host cluster; or at `host`.

        more_sectors  how many sectors too many its descriptor gives
        """
        size = self.image.cluster_size
        self._own_table(cluster // self.image.l2_entries)  # the table comes first in the file
        if host is None:
            host = self.image.host.pack(len(stream), f"guest cluster {cluster}, compressed", at)
        self.image.file.put(host, stream)
        sectors = (host % layout.SECTOR_SIZE + len(stream) - 1) // layout.SECTOR_SIZE + more_sectors
        descriptor = layout.compressed_l2_entry(self.image.cluster_bits)
        fields = {"offset": host, "additional_sectors": sectors, "compressed": 1, "copied": 0}
        word = int.from_bytes(descriptor.build(fields), "big")
        start = host // layout.SECTOR_SIZE * layout.SECTOR_SIZE
        span = start, (sectors + 1) * layout.SECTOR_SIZE
        self._set(cluster, Entry(word, 0, span), [_Piece(0, size, _Kind.COMPRESSED, content)])
        return self

    def entry(self, cluster: int, word: int, bitmap: int = 0) -> Self:
        """An L2 entry of just these bits. What it reads as is for the case to say."""
        self._set(cluster, Entry(word, bitmap), [])
        return self

    def unallocated(self, cluster: int) -> Self:
        """Nothing, where there may have been something."""
        self._set(cluster, Entry(0), [_Piece(0, self.image.cluster_size, _Kind.BELOW)])
        return self

    def table(self, index: int) -> Self:
        """An L2 table, be it empty."""
        self._own_table(index)
        return self

    def share(self, index: int, other: int) -> Self:
        """Let an L1 entry point to the L2 table of another."""
        table = self.tables[index] = self.tables[other]
        self._owned -= {index, other}
        per_table = self.image.l2_entries
        for number in table.entries:
            self._clusters[index * per_table + number] = self._clusters[other * per_table + number]
        return self

    def vm_state(self, state: bytes) -> Self:
        """A VM state behind the disk: data that belongs to no guest."""
        size = self.image.cluster_size
        first = -(-self.size // self.image.l2_coverage) * self.image.l2_entries
        for number, start in enumerate(range(0, len(state), size)):
            self.data(first + number, state[start : start + size].ljust(size, b"\0"))
        return self

    def resize(self, size: int) -> Self:
        """Another size, and nothing beyond it."""
        if size < self.size:
            last = -(-size // self.image.cluster_size)
            for cluster in [number for number in self._clusters if number >= last]:
                self.unallocated(cluster)
            needed = -(-size // self.image.l2_coverage)
            self.tables = {index: table for index, table in self.tables.items() if index < needed}
        self.size = size
        return self

    def fork(self) -> State:
        """A copy that shares all L2 tables, until one of the two changes them: what taking a snapshot does."""
        other = State(self.image, self.size)
        other.l1_size = self.l1_size
        other.tables = dict(self.tables)
        other._clusters = dict(self._clusters)
        self._owned.clear()
        return other

    # -- what is expected ---------------------------------------------------------------------------------------------

    def refuse(self, reason: str) -> Self:
        """This disk must not be read without an error."""
        self._refused = reason
        return self

    def may_refuse(self, reason: str) -> Self:
        self._may_refuse = reason
        return self

    def expected(self, ref: Ref | None, optional: str | None) -> Disk:
        """What a reader has to find here. `optional`: why it may refuse the whole image."""
        reason = self._refused or self.image.refused
        if reason is not None:
            return Disk(ref, self.size, None, None, reason=reason)
        may_refuse = self._may_refuse or self.image.optional or optional
        return Disk(ref, self.size, self._content(), merged(self._map()), may_refuse)

    def _content(self) -> Content:
        backing = self.image.backing
        below = Content(0) if backing is None or backing.content is None else backing.content
        content = below.with_size(min(below.size, self.size)).with_size(self.size)
        for start, piece in self._pieces():
            if piece.kind is _Kind.ZERO:
                content = content.zero(start, piece.length)
            elif piece.kind is not _Kind.BELOW:
                content = content.put(start, piece.data)
        return content

    def _pieces(self) -> Iterator[tuple[int, _Piece]]:
        """Guest offset and piece, in order, as far as the disk goes."""
        for cluster in sorted(self._clusters):
            for piece in self._clusters[cluster]:
                start = cluster * self.image.cluster_size + piece.offset
                if start < self.size:
                    yield start, piece

    def _map(self) -> Iterator[MapEntry]:
        position = 0
        for start, piece in self._pieces():
            if start > position:
                yield from self._map_below(position, start)
            position = min(start + piece.length, self.size)
            if piece.kind is _Kind.BELOW:
                yield from self._map_below(start, position)
                continue
            is_zero, compressed = piece.kind is _Kind.ZERO, piece.kind is _Kind.COMPRESSED
            yield MapEntry(start, position - start, 0, True, is_zero, not is_zero, compressed, piece.host)
        yield from self._map_below(position, self.size)

    def _map_below(self, start: int, end: int) -> Iterator[MapEntry]:
        """What an unallocated range is: the extents of the backing file, and zeros behind its end."""
        backing = self.image.backing
        if start >= end:
            return
        if backing is None:
            yield MapEntry(start, end - start, 0, False, True, False)
            return
        for entry in backing.map or ():
            if entry.end > start and entry.start < end:
                part = entry.within(start, end)
                yield part._replace(depth=part.depth + 1)
        behind = max(start, backing.size)
        if behind < end:
            yield MapEntry(behind, end - behind, 0, False, True, False)

    # -- tables -------------------------------------------------------------------------------------------------------

    def _own_table(self, index: int) -> Table:
        """The L2 table of an L1 entry, for writing: made, or copied if another state has it too."""
        if index in self._owned:
            return self.tables[index]
        old = self.tables.get(index)
        host = self.image.host.clusters(1, f"L2 table {index}" + (", a copy" if old else ""))
        table = self.tables[index] = Table(host, dict(old.entries) if old else None)
        self._owned.add(index)
        return table

    def _set(self, cluster: int, entry: Entry, pieces: list[_Piece]) -> None:
        index, number = divmod(cluster, self.image.l2_entries)
        self._own_table(index).entries[number] = entry
        self._clusters[cluster] = pieces

    def _entry(self, cluster: int) -> Entry:
        index, number = divmod(cluster, self.image.l2_entries)
        return self.tables[index].entries[number]

    def _whole(self) -> int:
        """The bitmap of a cluster all of whose subclusters are allocated."""
        return 0xFFFFFFFF if self.image.has_extended_l2 else 0

    def _host(self, cluster: int, what: str, host: int | None = None) -> tuple[int, tuple[int, int] | None]:
        """A host cluster, and what of the image file it occupies: nothing if guest clusters lie in another file."""
        size = self.image.cluster_size
        if self.image.has_data_file:
            return cluster * size, None
        self._own_table(cluster // self.image.l2_entries)  # the table comes first in the file
        host = self.image.host.clusters(1, what) if host is None else host
        return host, (host, size)

    def _stale_host(self, cluster: int) -> tuple[int, tuple[int, int] | None]:
        """A host cluster full of what nobody may read."""
        host, span = self._host(cluster, f"guest cluster {cluster}")
        stale = _STALE * (self.image.cluster_size // len(_STALE))
        self.image.guest_file.put(host, stale)
        return host, span
