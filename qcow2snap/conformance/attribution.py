"""What refcounts and references say of each other as findings, and whose clusters and tables all findings touch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from qcow2snap.block.qcow2 import rules
from qcow2snap.block.qcow2.rules import Rule
from qcow2snap.conformance.counting import Window
from qcow2snap.conformance.findings import Finding, L2Place
from qcow2snap.conformance.overlaps import Structures
from qcow2snap.conformance.refcounts import RefcountStructures
from qcow2snap.conformance.references import L1_OFFSET, References
from qcow2snap.conformance.subject import Subject
from qcow2snap.conformance.table_rules import guest_place

_OF_CLUSTERS = {  # rules whose findings are about a host cluster, whoever refers to it
    rules.REFCOUNT_TOO_LOW,
    rules.REFCOUNT_TOO_HIGH,
    rules.REFCOUNT_WIDTH,
    rules.REFCOUNT_BLOCK_ALONE,
    rules.METADATA_OVERLAP,
}
_MOST_PLACES = 4  # L2 entries that are looked at of those that refer to one cluster
_PIECE = 1 << 18  # L1 entries
_MOST_PAIRS = 1 << 20  # of L2 tables and states that have them


def judge_mismatches(subject: Subject, structures: Structures, refcounts: RefcountStructures, window: Window) -> None:
    """The findings of one window: counts that differ, structures that overlap, refcounts that are too narrow."""
    judge = _Mismatches(subject, structures, refcounts, window)
    judge.blocks()
    judge.overflows()
    judge.differences()
    judge.overlaps()


class _Mismatches:
    def __init__(self, subject: Subject, structures: Structures, refcounts: RefcountStructures, window: Window) -> None:
        self._subject = subject
        self._findings = subject.findings
        self._structures = structures
        self._refcounts = refcounts
        self._window = window
        self._size = subject.header.cluster_size
        between = {cluster for cluster in structures.overlaps if window.start <= cluster < window.stop}
        self._overlaps = between.union(window.overlapping_data().tolist())
        self._told: set[int] = set()  # overlaps that another finding tells

    def blocks(self) -> None:
        clusters, minded = self._window.shared_blocks()

        def make(step: int) -> Finding:
            cluster = int(clusters[step])
            what = f"the cluster of the refcount block at {cluster * self._size:#x} has other references"
            return Finding(rules.REFCOUNT_BLOCK_ALONE, cluster * self._size, what, int(minded[step]))

        self._told.update(clusters.tolist())
        self._findings.add_each(rules.REFCOUNT_BLOCK_ALONE, minded.tolist(), len(clusters), make)

    def overflows(self) -> None:
        clusters, numbers = self._window.overflows()
        if not len(clusters):
            return
        maximum = self._refcounts.maximum

        def make(step: int) -> Finding:
            cluster, number = int(clusters[step]), int(numbers[step])
            what = f"cluster {cluster} has {number} references, and a refcount counts to {maximum}"
            return Finding(rules.REFCOUNT_WIDTH, cluster * self._size, what, number - maximum)

        self._findings.add_each(rules.REFCOUNT_WIDTH, (numbers - maximum).tolist(), len(clusters), make)

    def differences(self) -> None:
        for piece in self._window.mismatches():
            is_low = piece.refcounts < piece.references
            if self._overlaps:
                doubly = is_low & np.isin(piece.clusters, sorted(self._overlaps))
                self._told.update(piece.clusters[doubly].tolist())
            else:
                doubly = np.zeros(len(is_low), np.bool_)
            for which, rule in (
                (is_low & ~doubly, rules.REFCOUNT_TOO_LOW),
                (doubly, rules.METADATA_OVERLAP),
                (~is_low, rules.REFCOUNT_TOO_HIGH),
            ):
                clusters, references = piece.clusters[which].tolist(), piece.references[which].tolist()

                def make(
                    step: int, rule: Rule = rule, clusters: list[int] = clusters, references: list[int] = references
                ) -> Finding:
                    return self._difference(rule, clusters[step], references[step])

                self._findings.add_each(rule, 1, len(clusters), make)

    def overlaps(self) -> None:
        """Those whose refcount is as high as it has to be, which makes it no better."""
        clusters = sorted(self._overlaps - self._told)

        def make(step: int) -> Finding:
            return self._difference(rules.METADATA_OVERLAP, clusters[step], None)._replace(times=0)

        self._findings.add_each(rules.METADATA_OVERLAP, 0, len(clusters), make)

    def _difference(self, rule: Rule, cluster: int, references: int | None) -> Finding:
        names = sorted(region.what for region in self._structures.at(cluster))
        if rule is rules.METADATA_OVERLAP:
            if len(names) == 1:
                names.append("what an L2 entry points to")
            what = f"cluster {cluster} is {' and '.join(names) or 'used twice'}"
        else:
            of = f" ({names[0]})" if names else ""
            what = f"cluster {cluster}{of} has refcount {self._refcounts.exact(cluster)}, and "
            what += f"{references} reference{'' if references == 1 else 's'}" if references else "nothing refers to it"
        return Finding(rule, cluster * self._size, what)


def attributed(subject: Subject, walk: References, findings: Iterable[Finding]) -> list[Finding]:
    """The same findings, with the states they touch and where for the guest. Reads tables again, if it has to."""
    result = list(findings)
    bits = subject.header.cluster_bits
    wanted = {f.host_offset >> bits for f in result if f.rule in _OF_CLUSTERS and not f.states}
    places = _places(walk, wanted) if wanted else {}
    tables = {place.table_offset for found in places.values() for place in found}
    tables |= {finding.place.table_offset for finding in result if finding.place is not None}
    owners = _owners(subject, walk, tables) if tables else {}
    for index, finding in enumerate(result):
        if finding.place is not None:
            found = [finding.place]
        elif finding.rule in _OF_CLUSTERS:
            found = places.get(finding.host_offset >> bits, [])
        else:
            continue
        result[index] = _placed(subject, walk, finding, found, owners)
    return result


def _placed(
    subject: Subject,
    walk: References,
    finding: Finding,
    places: list[L2Place],
    owners: dict[int, list[tuple[int, int]]],
) -> Finding:
    states = set(finding.states)
    guest_offset, in_vm_state = finding.guest_offset, finding.in_vm_state
    for place in places:
        for number, l1_index in owners.get(place.table_offset, []):
            if finding.states and number not in finding.states:
                continue
            states.add(number)
            if guest_offset is None:
                guest_offset, in_vm_state = guest_place(subject, walk.states[number], l1_index, place.column)
    return finding._replace(states=tuple(sorted(states)), guest_offset=guest_offset, in_vm_state=in_vm_state)


def _places(walk: References, clusters: set[int]) -> dict[int, list[L2Place]]:
    """L2 entries that refer to these host clusters; of a cluster that is an L2 table, its first entry."""
    bits, wanted = walk.header.cluster_bits, np.array(sorted(clusters), np.int64)
    found: defaultdict[int, list[L2Place]] = defaultdict(list)
    table_clusters = walk.tables.offsets >> bits
    for index in np.flatnonzero(np.isin(table_clusters, wanted)).tolist():
        found[int(table_clusters[index])].append(L2Place(int(walk.tables.offsets[index]), 0))
    if walk.header.has_data_file:
        return found
    for batch in walk.batches():
        rows, columns, offsets = batch.standard
        sources = [(rows, columns, offsets >> bits)]
        if batch.has_compressed:
            rows, columns, offsets, lengths = batch.compressed
            sources += [(rows, columns, offsets >> bits), (rows, columns, (offsets + lengths - 1) >> bits)]
        for rows, columns, touched in sources:
            for hit in np.flatnonzero(np.isin(touched, wanted)).tolist():
                known = found[int(touched[hit])]
                if len(known) < _MOST_PLACES:
                    known.append(L2Place(int(batch.tables.offsets[rows[hit]]), int(columns[hit])))
    return found


def _owners(subject: Subject, walk: References, tables: set[int]) -> dict[int, list[tuple[int, int]]]:
    """By L2 table: the states that have it, each with the index of the first L1 entry that points there."""
    wanted = np.array(sorted(tables), np.int64)
    owners: defaultdict[int, list[tuple[int, int]]] = defaultdict(list)
    nb_pairs = 0
    for number, state in enumerate(walk.states):
        if number in walk.left_out or nb_pairs > _MOST_PAIRS:
            continue
        for table, index in _pointing(state.read_l1(subject.file), wanted):
            of_table = owners[table]
            if not of_table or of_table[-1][0] != number:
                of_table.append((number, index))
                nb_pairs += 1
    return owners


def _pointing(entries: NDArray[np.uint64], tables: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Which of these tables L1 entries point to, each with the index of the first that does, of each piece."""
    for start in range(0, len(entries), _PIECE):
        piece = entries[start : start + _PIECE]
        offsets = (piece & L1_OFFSET).view(np.int64)
        nearest = tables[np.minimum(np.searchsorted(tables, offsets), len(tables) - 1)]
        indexes = np.flatnonzero((nearest == offsets) & (piece != 0))
        order = indexes[np.argsort(offsets[indexes], kind="stable")]
        found = offsets[order]
        firsts = np.flatnonzero(np.concatenate(([True], found[1:] != found[:-1]))) if len(found) else order
        yield from zip(found[firsts].tolist(), (order[firsts] + start).tolist(), strict=True)
