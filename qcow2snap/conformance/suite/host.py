"""The image file under construction: which clusters of it are given out for what, and how often each is referred to."""

from __future__ import annotations

from collections import Counter

from formats import qcow2 as layout
from qcow2snap.conformance.suite.values import Region, SparseFile


class HostSpace:
    """The clusters of the image file, given out one behind the other."""

    def __init__(self, cluster_size: int) -> None:
        self.cluster_size = cluster_size
        self.end = cluster_size  # the first is the header's
        self.regions: list[Region] = []
        self._packed = 0  # where the next compressed cluster may start, right behind the last

    def clusters(self, count: int, what: str) -> int:
        """Host offset of so many clusters in a row."""
        host, length = self.end, count * self.cluster_size
        self.end += length
        self.regions.append(Region(host, length, what))
        return host

    def pack(self, length: int, what: str, at: int | None = None) -> int:
        """Host offset of so many bytes: behind the last ones packed, or `at` bytes into a new cluster."""
        size = self.cluster_size
        last = -(-self._packed // size) * size  # the end of the cluster that the last one ends in
        is_full = self._packed + length > last != self.end
        host = self.end + (at or 0) if at is not None or not self._packed or is_full else self._packed
        self._packed = host + length
        self.end = max(self.end, -(-self._packed // size) * size)
        self.regions.append(Region(host, length, what))
        return host

    def skip_to(self, host_offset: int) -> None:
        """Leave a gap."""
        self.end = host_offset


class Refcounts:
    """How often each cluster of the image file is referred to, as far as it was counted; the header's, once."""

    def __init__(self, cluster_size: int, refcount_order: int) -> None:
        self._cluster_size = cluster_size
        self._order = refcount_order
        self._per_block = cluster_size * 8 >> refcount_order
        self._counts: Counter[int] = Counter({0: 1})

    def count(self, offset: int, length: int) -> None:
        """One more reference to each cluster that a range touches."""
        end = -(-(offset + length) // self._cluster_size)
        self._counts.update(range(offset // self._cluster_size, end))

    def of(self, host_offset: int) -> int:
        return self._counts[host_offset // self._cluster_size]

    def write(
        self, host: HostSpace, file: SparseFile, reserved: tuple[int, int] | None, *, all_zero: bool
    ) -> tuple[int, int]:
        """Write the table and the blocks, which count themselves too. Returns the table's offset and clusters.

        reserved  offsets of the table and of its only block; by default they are given clusters now
        all_zero  write zeros in place of what was counted
        """
        if reserved is None:
            table, clusters, places = self._placed(host)
        else:
            table, clusters, places = reserved[0], 1, {0: reserved[1]}
            assert max(self._counts) < self._per_block, "there is place for one refcount block"
        self.count(table, clusters * self._cluster_size)
        for offset in places.values():
            self.count(offset, self._cluster_size)
        entries = bytearray(clusters * self._cluster_size)
        for index, offset in places.items():
            entries[8 * index : 8 * index + 8] = layout.RefcountTableEntry.build({"reserved": 0, "offset": offset})
            first = index * self._per_block
            refcounts = [0 if all_zero else self._counts[first + number] for number in range(self._per_block)]
            file.put(offset, layout.refcount_block(self._order).build(refcounts))
        file.put(table, bytes(entries))
        return table, clusters

    def _placed(self, host: HostSpace) -> tuple[int, int, dict[int, int]]:
        """Clusters for the table, and for as many blocks as they all need: offset, clusters, blocks by their index."""
        first = host.end // self._cluster_size
        needed = {cluster // self._per_block for cluster in self._counts}
        while True:
            clusters = -(-(max(needed) + 1) * 8 // self._cluster_size)
            own = range(first, first + clusters + len(needed))
            grown = needed | {cluster // self._per_block for cluster in own}
            if grown == needed:
                break
            needed = grown
        table = host.clusters(clusters, "refcount table")
        places = {index: host.clusters(1, f"refcount block {index}") for index in sorted(needed)}
        return table, clusters, places
