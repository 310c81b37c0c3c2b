"""The rules for L1 and L2 entries, a batch of tables at a time. What is right, which is nearly all, costs one glance.

An L2 entry counts as often as qemu-img looks at it: once for each L1 entry, of any state, that points to its table.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from formats.qcow2 import L1TableEntry, StandardL2Entry, SubclusterBitmap
from qcow2snap.block.qcow2 import rules
from qcow2snap.block.qcow2.rules import Rule
from qcow2snap.conformance.findings import Finding, L2Place
from qcow2snap.conformance.l2_batches import COPIED, OFFSET, ZERO, L2Batch, Rows
from qcow2snap.conformance.refcounts import RefcountStructures
from qcow2snap.conformance.references import ACTIVE, References, State
from qcow2snap.conformance.subject import Subject

_L1_RESERVED = L1TableEntry.mask("reserved_low") | L1TableEntry.mask("reserved_high")
_L1_OFFSET = L1TableEntry.mask("offset")
_RESERVED = StandardL2Entry.mask("reserved_low") | StandardL2Entry.mask("reserved_high")
_ALLOCATED = np.uint64(SubclusterBitmap.mask("allocated"))
_COMPRESSED_OFFSET_BITS = 56  # of a host offset


class L1Judge:
    """Looks at every L1 table as the walk reads it."""

    def __init__(self, subject: Subject, states: tuple[State, ...]) -> None:
        self._subject = subject
        self._states = states

    def __call__(self, number: int, entries: NDArray[np.uint64]) -> None:
        cluster_size = self._subject.header.cluster_size
        bits = int(np.bitwise_or.reduce(entries)) if len(entries) else 0
        if not bits:
            return
        if bits & _L1_RESERVED:
            found = np.flatnonzero(entries & np.uint64(_L1_RESERVED))
            self._add(rules.L1_RESERVED, number, entries, found, "reserved bits are set in it")
        if bits & _L1_OFFSET & (cluster_size - 1):
            found = np.flatnonzero(entries & np.uint64(_L1_OFFSET & (cluster_size - 1)))
            self._add(rules.L1_ENTRY_ALIGNED, number, entries, found, "not a cluster boundary")
        offsets = entries & np.uint64(_L1_OFFSET)
        if int(offsets.max()) >= self._subject.file_size:
            found = np.flatnonzero(offsets >= np.uint64(self._subject.file_size))
            self._add(rules.L2_COMPLETE, number, entries, found, "the L2 table lies beyond the end of the file")

    def _add(self, rule: Rule, number: int, entries: NDArray[np.uint64], found: Rows, why: str) -> None:
        state, subject = self._states[number], self._subject

        def make(step: int) -> Finding:
            index = int(found[step])
            what = f"L1 entry {index} is {int(entries[index]):#x}: {why}"
            guest_offset, in_vm_state = guest_place(subject, state, index, 0)
            return Finding(
                rule, state.l1_table_offset + 8 * index, what, states=(number,), guest_offset=guest_offset,
                in_vm_state=in_vm_state,
            )  # fmt: skip

        subject.findings.add_each(rule, 1, len(found), make)


def guest_place(subject: Subject, state: State, l1_index: int, l2_index: int) -> tuple[int, bool]:
    """Which byte of a state's disk an L2 entry is for, or of its VM state, which begins behind the disk."""
    header = subject.header
    offset = l1_index * header.l2_coverage + l2_index * header.cluster_size
    if state.snapshot is None:
        return offset, False
    start = header.vm_state_offset(state.snapshot.size)
    return (offset - start, True) if offset >= start and state.snapshot.vm_state_size else (offset, False)


def judge_l1_copied(subject: Subject, walk: References, structures: RefcountStructures) -> None:
    """COPIED bits of the active L1 table against the refcounts of the L2 tables."""
    state = walk.states[ACTIVE]
    if ACTIVE in walk.left_out:
        return
    entries = state.read_l1(subject.file)
    indexes = np.flatnonzero(entries & np.uint64(_L1_OFFSET))
    clusters = ((entries[indexes] & np.uint64(_L1_OFFSET)) >> np.uint64(subject.header.cluster_bits)).astype(np.int64)
    refcounts = structures.refcounts_at(clusters)
    wrong = np.flatnonzero(((refcounts == 1) != (entries[indexes] & COPIED != 0)) & (refcounts >= 0))

    def make(step: int) -> Finding:
        index, refcount = int(indexes[wrong[step]]), int(refcounts[wrong[step]])
        what = f"L1 entry {index} is {int(entries[index]):#x}, and the refcount of the L2 table is {refcount}"
        where, guest = state.l1_table_offset + 8 * index, index * subject.header.l2_coverage
        return Finding(rules.L1_COPIED, where, what, states=(ACTIVE,), guest_offset=guest)

    subject.findings.add_each(rules.L1_COPIED, 1, len(wrong), make)


def judge_l2(subject: Subject, batch: L2Batch) -> None:
    """All rules for L2 entries but those that need refcounts, or guest offsets."""
    header, bits = subject.header, batch.all_bits
    entries = batch.entries
    if bits & _RESERVED:
        reserved = (entries & np.uint64(_RESERVED) != 0) & ~batch.is_compressed
        _add(subject, batch, rules.L2_RESERVED, reserved, "reserved bits are set in it")
    if bits & int(OFFSET) & (header.cluster_size - 1):
        unaligned = (entries & np.uint64(int(OFFSET) & (header.cluster_size - 1)) != 0) & batch.is_standard
        _add(subject, batch, rules.L2_ENTRY_ALIGNED, unaligned, "not a cluster boundary")
    if bits & int(ZERO) and (header.version < 3 or header.has_extended_l2):
        zero = (entries & ZERO != 0) & ~batch.is_compressed
        rule = rules.L2_ZERO_EXTENDED if header.has_extended_l2 else rules.L2_ZERO_V3
        _add(subject, batch, rule, zero, "bit 0 is set in it", np.zeros_like(batch.tables.counts))
    rest = batch.others
    if not header.has_data_file and len(rest.entries):
        copied_alone = rest.entries & (COPIED | OFFSET) == COPIED
        if copied_alone.any():
            what = "bit 63 is set, and there is no host offset"
            _add(subject, rest, rules.L2_OFFSET_ZERO, copied_alone & ~rest.is_compressed, what)
        rows, columns, offsets = rest.standard
        if len(offsets) and int(offsets.max()) >= subject.file_size:
            outside = np.zeros(rest.entries.shape, np.bool_)
            beyond = offsets >= subject.file_size
            outside[rows[beyond], columns[beyond]] = True
            _add(subject, rest, rules.L2_ENTRY_IN_FILE, outside, "the cluster lies beyond the end of the file")
    if batch.has_compressed:
        _judge_compressed(subject, batch)
    if batch.bitmaps is not None:
        _judge_subclusters(subject, batch, batch.bitmaps)


def _judge_compressed(subject: Subject, batch: L2Batch) -> None:
    header, is_compressed = subject.header, batch.is_compressed
    copied = is_compressed & (batch.entries & COPIED != 0)
    _add(subject, batch, rules.COMPRESSED_COPIED, copied, "bit 63 is set for a compressed cluster")
    if header.has_data_file:
        what = "a compressed cluster, with an external data file"
        _add(subject, batch, rules.DATA_FILE_COMPRESSED, is_compressed, what)
        return
    rows, columns, offsets, lengths = batch.compressed
    is_counted = is_compressed
    if batch.bitmaps is not None:
        with_bitmap = is_compressed & (batch.bitmaps != 0)
        what = "the subcluster bitmap of a compressed cluster is not zero"
        _add(subject, batch, rules.COMPRESSED_SUBCLUSTERS, with_bitmap, what)
        is_counted = is_compressed & ~with_bitmap
    too_far = np.zeros(batch.entries.shape, np.bool_)
    too_far[rows, columns] = offsets >> _COMPRESSED_OFFSET_BITS != 0
    _add(subject, batch, rules.COMPRESSED_OFFSET, too_far, "bits 56 and above of the host offset are set")
    outside = np.zeros(batch.entries.shape, np.bool_)
    outside[rows, columns] = offsets + lengths - subject.file_size >= header.cluster_size
    what = "the compressed data reaches beyond the end of the file"
    _add(subject, batch, rules.COMPRESSED_IN_FILE, outside & is_counted, what)


def _judge_subclusters(subject: Subject, batch: L2Batch, bitmaps: NDArray[np.uint64]) -> None:
    both = (bitmaps >> np.uint64(32)) & bitmaps & _ALLOCATED != 0
    what = "a subcluster is both allocated and zero"
    _add(subject, batch, rules.L2_SUBCLUSTERS, both & batch.is_standard, what)
    homeless = (bitmaps & _ALLOCATED != 0) & ~batch.is_standard
    if batch.has_compressed:
        homeless &= ~batch.is_compressed
    _add(subject, batch, rules.L2_SUBCLUSTERS, homeless, "a subcluster is allocated, and there is no host offset")


def judge_data_file_offsets(subject: Subject, batch: L2Batch, l1_indexes: dict[int, int]) -> None:
    """With an external data file, a cluster is where the guest has it. `l1_indexes`: those of the active tables."""
    header = subject.header
    bases = np.array([l1_indexes.get(offset, -1) for offset in batch.tables.offsets.tolist()], np.int64)
    columns = np.arange(batch.entries.shape[1], dtype=np.int64) * header.cluster_size
    expected = bases[:, None] * header.l2_coverage + columns
    wrong = batch.is_standard & ((batch.entries & OFFSET).astype(np.int64) != expected) & (bases[:, None] >= 0)
    what = "host offset and guest offset are not the same"
    _add(subject, batch, rules.DATA_FILE_OFFSET, wrong, what, np.zeros_like(batch.tables.counts))


def add_copied(subject: Subject, batch: L2Batch, wrong: NDArray[np.bool_]) -> None:
    """Findings for entries of the active disk whose COPIED bit is not what the refcount says."""
    what = "bit 63 is set, and the refcount of the cluster is not 1, or the other way round"
    _add(subject, batch, rules.L2_COPIED, wrong, what, batch.tables.active_counts, only_active=True)


def _add(
    subject: Subject,
    batch: L2Batch,
    rule: Rule,
    which: NDArray[np.bool_],
    why: str,
    weights: NDArray[np.int64] | None = None,
    *,
    only_active: bool = False,
) -> None:
    if not which.any():
        return
    rows, columns = np.nonzero(which)
    times = (batch.tables.counts if weights is None else weights)[rows]
    entry_size = subject.header.l2_entry_size

    def make(step: int) -> Finding:
        row, column = int(rows[step]), int(columns[step])
        table = int(batch.tables.offsets[row])
        what = f"L2 entry {column} of the table at {table:#x} is {int(batch.entries[row, column]):#x}: {why}"
        states = (ACTIVE,) if only_active else ()
        place = L2Place(table, column)
        return Finding(rule, table + column * entry_size, what, int(times[step]), states, place=place)

    subject.findings.add_each(rule, times.tolist(), len(rows), make)
