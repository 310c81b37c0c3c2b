"""The rules for the snapshot table and for what its entries say. Goes on past a broken entry wherever it can."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from formats import qcow2 as layout
from qcow2snap.block.node import SnapshotInfo
from qcow2snap.block.qcow2 import rules
from qcow2snap.block.qcow2.snapshot_table import TableEntry, TableWindow, parse_entry, used_size
from qcow2snap.conformance.findings import Finding, short
from qcow2snap.conformance.l2_batches import distinct
from qcow2snap.conformance.references import L1_OFFSET, References
from qcow2snap.conformance.subject import Region, Subject

_V3_EXTRA_DATA = 16  # bytes: up to byte 55 of the entry
_SECOND = 1_000_000_000  # nanoseconds
_NO_ENTRY = bytes(layout.SNAPSHOT_HEADER_LENGTH)


class SnapshotEntries(NamedTuple):
    """The entries that could be read, in the order of the table, and how many of it are lost for certain."""

    entries: tuple[TableEntry, ...]
    nb_lost: int


def read_snapshots(subject: Subject) -> SnapshotEntries:
    """Read the table as QEMU does, for which what is past the end of the file is zeros; and judge its form."""
    header, findings = subject.header, subject.findings
    offset, count = header.snapshots_offset, header.nb_snapshots
    # Without snapshots too, and in signed 64 bits: QEMU asks for it before it looks whether there is a table.
    if offset % header.cluster_size or offset + count * layout.SNAPSHOT_HEADER_LENGTH >= 1 << 63:
        what = f"the snapshot table is at {offset:#x}, not a cluster boundary"
        findings.add(Finding(rules.HEADER_SNAPSHOTS, 64, what, stops=True))
    if not count:
        return SnapshotEntries((), 0)
    if count > layout.MAX_SNAPSHOTS:
        what = f"the snapshot table has {count} entries, more than {layout.MAX_SNAPSHOTS}"
        findings.add(Finding(rules.HEADER_SNAPSHOTS, 60, what, stops=True))
    window, length = TableWindow(subject.file), max(0, subject.file.current_size() - offset)
    entries: list[TableEntry] = []
    position = end = 0
    nb_lost = 0
    for index in range(min(count, layout.MAX_SNAPSHOTS)):
        fixed = window.read(offset + position, layout.SNAPSHOT_HEADER_LENGTH).ljust(len(_NO_ENTRY), b"\0")
        used = used_size(fixed)
        end = position + used
        where = f"snapshot table entry {index + 1} of {count}"
        if end > layout.MAX_SNAPSHOT_TABLE_SIZE:
            _judge_form(subject, fixed, offset + position, where, index)
            what = f"with entry {index + 1} of {count} the snapshot table exceeds 64 MiB"
            findings.add(Finding(rules.SNAPSHOT_TABLE_SIZE, offset + position, what, stops=True))
            nb_lost += count - index
            break
        if fixed == _NO_ENTRY:
            if position >= length:  # all that follow are lost too
                rest = min(count, layout.MAX_SNAPSHOTS) - index
                _lose(subject, position, index, rest)
                nb_lost += rest
                end = position + rest * layout.SNAPSHOT_HEADER_LENGTH
                break
            _lose(subject, position, index, 1)
            nb_lost += 1
        else:
            nb_lost += end > length
            raw = window.read(offset + position, used + -used % 8).ljust(used + -used % 8, b"\0")
            entries.append(parse_entry(raw, header, index, offset + position))
            _judge_form(subject, fixed, offset + position, where, index)
        position = end + -end % 8
    subject.takes(Region(offset, end, "the snapshot table"), rules.SNAPSHOT_COMPLETE)
    return SnapshotEntries(tuple(entries), nb_lost)


def _lose(subject: Subject, position: int, index: int, number: int) -> None:
    """Entries that are all zeros: in version 3 QEMU calls each incomplete; in version 2 they look like empty ones."""
    is_v3 = subject.header.version >= 3
    rule = rules.SNAPSHOT_EXTRA_DATA_V3 if is_v3 else rules.SNAPSHOT_COMPLETE
    size, count = layout.SNAPSHOT_HEADER_LENGTH, subject.header.nb_snapshots

    def make(step: int) -> Finding:
        what = f"snapshot table entry {index + step + 1} of {count} is all zeros: it has been lost"
        return Finding(rule, subject.header.snapshots_offset + position + step * size, what, int(is_v3))

    subject.findings.add_each(rule, int(is_v3), number, make)


def _judge_form(subject: Subject, fixed: bytes, position: int, where: str, index: int) -> None:
    findings, states = subject.findings, (index + 1,)
    extra_data_size = int.from_bytes(fixed[36:40], "big")
    if extra_data_size > layout.MAX_SNAPSHOT_EXTRA_DATA_SIZE:
        what = f"{where} has {extra_data_size} bytes of extra data"
        findings.add(Finding(rules.SNAPSHOT_EXTRA_DATA, position + 36, what, states=states, stops=True))
    if subject.header.version >= 3 and extra_data_size < _V3_EXTRA_DATA:
        what = f"{where} has {extra_data_size} bytes of extra data, which do not reach its disk size"
        findings.add(Finding(rules.SNAPSHOT_EXTRA_DATA_V3, position + 36, what, states=states))
    if int.from_bytes(fixed[20:24], "big") >= _SECOND:
        what = f"{where} has {int.from_bytes(fixed[20:24], 'big')} nanoseconds in its date"
        findings.add(Finding(rules.SNAPSHOT_NANOSECONDS, position + 20, what, states=states))


def judge_snapshots(subject: Subject, entries: Sequence[TableEntry]) -> None:
    """What the entries say of themselves, and the areas of their L1 tables."""
    findings = subject.findings
    _judge_names(subject, [entry.info for entry in entries])
    if entries and subject.header.has_data_file:
        what = f"there are {len(entries)} snapshots in an image with an external data file"
        findings.add(Finding(rules.DATA_FILE_SNAPSHOTS, 60, what))
    for number, entry in enumerate(entries, 1):
        _judge_l1_place(subject, entry, number)
        _judge_sizes(subject, entry, number)


def _named(info: SnapshotInfo) -> str:
    return f"snapshot {short(info.name)} (id {short(info.id)})"


def _judge_l1_place(subject: Subject, entry: TableEntry, number: int) -> None:
    where, info = entry.info.host_offset, entry.info
    if entry.l1_table_offset % subject.header.cluster_size:
        what = f"the L1 table of {_named(info)} is at {entry.l1_table_offset:#x}, not a cluster boundary"
    elif 8 * entry.l1_size > layout.MAX_L1_TABLE_SIZE:
        where += 8
        what = f"the L1 table of {_named(info)} has {entry.l1_size} entries, more than 32 MiB"
    else:
        region = Region(
            entry.l1_table_offset,
            8 * entry.l1_size,
            f"the L1 table of {_named(info)}",
            (number,),
        )
        subject.takes(region, rules.L1_COMPLETE)
        return
    subject.findings.add(Finding(rules.SNAPSHOT_L1_OFFSET, where, what, states=(number,)))


def _judge_sizes(subject: Subject, entry: TableEntry, number: int) -> None:
    info, findings = entry.info, subject.findings
    start = subject.header.vm_state_offset(info.size)
    needed = -(-(start + info.vm_state_size) // subject.header.l2_coverage)
    if needed > entry.l1_size:
        what = (
            f"{_named(info)}, with a disk of {info.size} bytes and a VM state of {info.vm_state_size}, needs {needed} "
            f"L1 entries and has {entry.l1_size}"
        )
        findings.add(Finding(rules.SNAPSHOT_L1_SIZE, info.host_offset + 8, what, states=(number,)))
    if info.size % layout.SECTOR_SIZE:
        what = f"the disk size of {_named(info)} is {info.size} bytes"
        findings.add(Finding(rules.SNAPSHOT_SIZE_SECTORS, info.host_offset + 48, what, states=(number,)))


def _judge_names(subject: Subject, snapshots: Sequence[SnapshotInfo]) -> None:
    findings = subject.findings
    by_id: defaultdict[str, list[int]] = defaultdict(list)
    by_name: defaultdict[str, list[int]] = defaultdict(list)
    for number, info in enumerate(snapshots, 1):
        by_id[info.id].append(number)
        by_name[info.name].append(number)
        if not info.id:
            what = f"snapshot {short(info.name)} has no id"
            findings.add(Finding(rules.SNAPSHOT_ID_EMPTY, info.host_offset + 12, what, states=(number,)))
        if not (_is_plain(info.id) and _is_plain(info.name)):
            what = f"id or name of snapshot {short(info.name)} is not UTF-8, or has a NUL"
            findings.add(Finding(rules.SNAPSHOT_TEXT, info.host_offset, what, states=(number,)))
    for id_, numbers in by_id.items():
        if len(numbers) > 1 and id_:
            what = f"{len(numbers)} snapshots have the id {short(id_)}"
            where = snapshots[numbers[1] - 1].host_offset
            findings.add(Finding(rules.SNAPSHOT_ID_UNIQUE, where, what, states=tuple(numbers)))
    for name, numbers in by_name.items():
        others = [number for number in by_id.get(name, []) if number not in numbers] if name else []
        if len(numbers) > 1 or others:
            what = f"{len(numbers)} snapshots have the name {short(name)}" if len(numbers) > 1 else ""
            what += " and " if what and others else ""
            what += f"{short(name)} is the id of one snapshot and the name of another" if others else ""
            states = tuple(sorted({*numbers, *others}))
            findings.add(
                Finding(rules.SNAPSHOT_NAME_UNIQUE, snapshots[numbers[0] - 1].host_offset, what, states=states)
            )


def _is_plain(text: str) -> bool:
    return "\0" not in text and not any("\ud800" <= character <= "\udfff" for character in text)


def judge_vm_states(subject: Subject, walk: References) -> None:
    """Whether VM states are all there: the first gap of each. Reads the L2 tables of VM states, each once."""
    header, gaps = subject.header, _Gaps(subject)
    for number, state in enumerate(walk.states):
        info = state.snapshot
        if info is None or not info.vm_state_size or number in walk.left_out:
            continue
        first = header.vm_state_offset(info.size) // header.l2_coverage
        end = first + -(-info.vm_state_size // header.l2_coverage)
        if end > state.l1_size:
            continue  # which another rule is about
        gap = gaps.first(state.read_l1(subject.file)[first:end], info.vm_state_size)
        if gap is not None:
            where = state.l1_table_offset + 8 * (first + gap // header.l2_coverage)
            what = f"the VM state of {_named(info)} has {info.vm_state_size} bytes, and none at {gap:#x}"
            subject.findings.add(
                Finding(
                    rules.SNAPSHOT_VM_STATE, where, what, states=(number,), guest_offset=gap, in_vm_state=True
                )
            )  # fmt: skip


class _Gaps:
    """Where L2 tables leave clusters unallocated."""

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        self._known: dict[int, int] = {}  # by host offset of a table: bytes before its first gap

    def first(self, entries: NDArray[np.uint64], length: int) -> int | None:
        """Which byte is the first, of so many that the entries of an L1 table are for, that is unallocated."""
        header = self._subject.header
        offsets = (entries & L1_OFFSET).view(np.int64)
        before = {0: 0} | {offset: self._before(offset) for offset in distinct(offsets).tolist() if offset}
        incomplete = [offset for offset, nbytes in before.items() if nbytes < header.l2_coverage]
        for index in np.flatnonzero(np.isin(offsets, incomplete))[:2].tolist():  # the last one need not be whole
            gap = index * header.l2_coverage + before[int(offsets[index])]
            if gap < length:
                return int(gap)
        return None

    def _before(self, offset: int) -> int:
        header = self._subject.header
        if offset not in self._known:
            data = self._subject.file.pread_available(offset, header.cluster_size).ljust(header.cluster_size, b"\0")
            firsts = np.frombuffer(data, dtype=np.uint64)[:: header.l2_entry_size // 8]
            gaps = np.flatnonzero(firsts == 0)
            self._known[offset] = (int(gaps[0]) if len(gaps) else len(firsts)) * header.cluster_size
        return self._known[offset]
