"""The contents: every compressed cluster decompressed, every data cluster read. What they hold is the guest's."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from qcow2snap.block.node import FileError, ImageFormatError
from qcow2snap.block.qcow2 import rules
from qcow2snap.block.qcow2.compressed import CompressedClusters
from qcow2snap.conformance.findings import Finding, L2Place
from qcow2snap.conformance.l2_batches import L2Batch
from qcow2snap.conformance.references import References
from qcow2snap.conformance.subject import Subject

_TOGETHER = 64  # compressed clusters that are read at once
_PIECE = 1 << 20  # bytes of data that are read at once
_MOST_SEEN = 500_000  # compressed clusters that are remembered, as each state may have its own table with them


def judge_contents(subject: Subject, walk: References, advance: Callable[[int], None]) -> None:
    """Read it all, once as a rule. With an external data file, the data is not in the image, and is not read."""
    if subject.header.has_data_file:
        return
    decompressor = _Decompressor(subject)
    read_to = 0
    for batch in walk.batches():
        decompressor.add(batch)
        for start, length in _runs(batch):
            low = max(start, min(read_to, start + length))  # snapshots share most of it
            _read(subject, low, start + length - low)
            read_to = max(read_to, start + length)
        advance(batch.entries.size * 8)


class _Decompressor:
    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        self._clusters = CompressedClusters(subject.file, subject.header, 0)
        self._anywhere = memoryview(bytearray(subject.header.cluster_size))
        self._seen: set[int] = set()

    def add(self, batch: L2Batch) -> None:
        if not batch.has_compressed:
            return
        rows, columns, offsets, lengths = batch.compressed
        whole = offsets + lengths - self._subject.file_size < self._subject.header.cluster_size
        entries = batch.entries[rows, columns]
        unique, firsts = np.unique(entries[whole], return_index=True)
        places = np.flatnonzero(whole)[firsts]
        new = [i for i, entry in enumerate(unique.tolist()) if entry not in self._seen]
        for start in range(0, len(new), _TOGETHER):
            together = new[start : start + _TOGETHER]
            wanted = [int(unique[i]) for i in together]
            try:
                for _ in self._clusters.read(wanted, [self._anywhere] * len(wanted)):
                    pass
            except ImageFormatError:
                for i in together:
                    self._one_by_one(batch, int(unique[i]), int(rows[places[i]]), int(columns[places[i]]))
            if len(self._seen) < _MOST_SEEN:
                self._seen.update(wanted)

    def _one_by_one(self, batch: L2Batch, entry: int, row: int, column: int) -> None:
        try:
            self._clusters.cluster(entry)
        except ImageFormatError as error:
            place = L2Place(int(batch.tables.offsets[row]), column)
            finding = Finding(rules.COMPRESSED_DATA, error.host_offset, error.message, 0, place=place)
            self._subject.findings.add(finding)


def _runs(batch: L2Batch) -> Iterator[tuple[int, int]]:
    """Host offset and length of the data of standard clusters, in the order of the file, none twice."""
    size = batch.header.cluster_size
    _, _, offsets = batch.standard
    offsets = np.unique(offsets)
    offsets = offsets[offsets < batch.file_size]
    if len(offsets):
        breaks = np.flatnonzero(np.diff(offsets) != size) + 1
        for part in np.split(offsets, breaks):
            yield int(part[0]), int(part[-1]) - int(part[0]) + size


def _read(subject: Subject, offset: int, length: int) -> None:
    while length > 0:
        try:
            subject.file.pread_available(offset, min(length, _PIECE))
        except FileError as error:
            subject.findings.problems.append(str(error))
        offset, length = offset + _PIECE, length - _PIECE
