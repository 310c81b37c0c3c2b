"""The check of an image: every structure against every rule, and what came of it. Reads; never writes.

Nothing stops at the first error. Where the header cannot be used at all, that is the result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from qcow2snap.block.file import FileNode
from qcow2snap.block.node import SnapshotInfo
from qcow2snap.block.qcow2 import rules
from qcow2snap.block.qcow2.header import ImageHeader
from qcow2snap.block.qcow2.rules import Rule, Severity
from qcow2snap.conformance.attribution import attributed, judge_mismatches
from qcow2snap.conformance.bitmap_rules import judge_bitmaps
from qcow2snap.conformance.counting import MAX_CLUSTERS, Window, windows
from qcow2snap.conformance.figures import Figures, FragmentCounter
from qcow2snap.conformance.findings import Finding, Findings
from qcow2snap.conformance.header_rules import judge_encryption, judge_header
from qcow2snap.conformance.overlaps import Structures
from qcow2snap.conformance.refcounts import RefcountStructures
from qcow2snap.conformance.references import ACTIVE, L1_OFFSET, References, State, all_states
from qcow2snap.conformance.snapshot_rules import SnapshotEntries, judge_snapshots, judge_vm_states, read_snapshots
from qcow2snap.conformance.subject import Region, Subject
from qcow2snap.conformance.table_rules import L1Judge, judge_data_file_offsets, judge_l1_copied, judge_l2


def _ignore(_nbytes: int) -> None:
    pass


class Options(NamedTuple):
    """What is asked of a check.

    quick    structures only: no L2 table is read, and no refcount block
    deep     decompress every compressed cluster, and read every data cluster
    expect   is told how many bytes of tables there are to read
    advance  is told how many are done
    """

    quick: bool = False
    deep: bool = False
    expect: Callable[[int], None] = _ignore
    advance: Callable[[int], None] = _ignore


class Report(NamedTuple):
    """What a check found.

    findings      by severity and rule, then place; of each rule the first thousand
    numbers       findings of each rule, all of them
    corruptions, leaks, check_errors  as qemu-img check counts them; where it sees none of the corruptions that there
                  are, their number
    states        the active disk (None) and the snapshots, by the numbers that findings give
    figures       what qemu-img check tells besides, unless the check was quick or could not be made
    nb_lost       entries of the snapshot table that are lost
    problems      what the file could not be read for, a line each
    """

    filename: str
    findings: tuple[Finding, ...]
    numbers: dict[Rule, int]
    corruptions: int
    leaks: int
    check_errors: int
    states: tuple[SnapshotInfo | None, ...] = (None,)
    figures: Figures | None = None
    cluster_size: int = 0
    nb_lost: int = 0
    problems: tuple[str, ...] = ()

    @property
    def exit_code(self) -> int:
        """As that of qemu-img check."""
        if self.check_errors:
            return 1
        return 2 if self.corruptions else 3 if self.leaks else 0

    def number_of(self, severity: Severity) -> int:
        """All findings of rules of this severity."""
        return sum(number for rule, number in self.numbers.items() if rule.severity is severity)

    def about(self, number: int) -> Report:
        """Only what touches one state, or stops QEMU whatever it wants of the image."""
        findings = tuple(f for f in self.findings if number in f.states or (f.stops and not f.states))
        kinds = [(finding.rule.severity, finding.stops) for finding in findings]
        return self._replace(
            findings=findings,
            numbers=_numbers(findings),
            corruptions=kinds.count((Severity.CORRUPTION, False)),
            leaks=kinds.count((Severity.LEAK, False)),
            check_errors=sum(stops for _, stops in kinds) + len(self.problems),
        )


def _numbers(findings: Sequence[Finding]) -> dict[Rule, int]:
    numbers: dict[Rule, int] = {}
    for finding in findings:
        numbers[finding.rule] = numbers.get(finding.rule, 0) + 1
    return numbers


def check(file: FileNode, options: Options = Options()) -> Report:  # noqa: B008
    """Check an image. Raises FileError; ImageFormatError only for a file that is no qcow2 image at all."""
    findings = Findings()
    header = judge_header(file, findings)
    if header is None:
        return _report(file, None, findings)
    subject = Subject(file, header, findings)
    subject.takes(Region(0, header.cluster_size, "the header"), rules.HEADER_COMPLETE)
    snapshots = read_snapshots(subject)
    states = all_states(header, snapshots.entries)
    _judge_active_l1(subject, states[ACTIVE])
    judge_snapshots(subject, snapshots.entries)
    judge_encryption(subject)
    judge_bitmaps(subject)
    structures = RefcountStructures(subject)
    walk = References(file, header, states, L1Judge(subject, tuple(states)))
    judge_vm_states(subject, walk)
    unread = sum(states[number].can_follow(header) for number in walk.left_out)
    if unread:
        findings.problems.append(f"the L1 tables of {unread} states are too much for one check, and were not read")
    if walk.nb_unread:
        findings.problems.append(f"{walk.nb_unread} L2 tables off the cluster grid are too much, and were not read")
    figures = None
    if not options.quick:
        figures = _Pass(subject, walk, structures, options).run()
    if options.deep and not options.quick:
        from qcow2snap.conformance.deep import judge_contents  # and the codecs

        judge_contents(subject, walk, options.advance)
    findings.replace(attributed(subject, walk, findings.kept))
    return _report(file, header, findings, states, snapshots, figures)


def _judge_active_l1(subject: Subject, active: State) -> None:
    header = subject.header
    if active.l1_table_offset + active.l1_length >= 1 << 63:
        what = f"the L1 table at {active.l1_table_offset:#x} lies beyond what a file can have"
        subject.findings.add(Finding(rules.HEADER_L1_OFFSET, 40, what, states=(ACTIVE,), stops=True))
    elif active.can_follow(header):
        region = Region(active.l1_table_offset, active.l1_length, "the active L1 table", (ACTIVE,))
        subject.takes(region, rules.L1_COMPLETE)


class _Pass:
    """The pass over all L2 tables, for each window of the file: rules for entries, references, COPIED bits."""

    def __init__(self, subject: Subject, walk: References, structures: RefcountStructures, options: Options) -> None:
        self._subject = subject
        self._walk = walk
        self._structures = structures
        self._options = options
        self._fragments = FragmentCounter(subject.header)
        self._l1_indexes = self._active_l1_indexes() if subject.header.has_data_file else {}

    def run(self) -> Figures:
        subject, structures = self._subject, self._structures
        highest = 0
        all_windows = windows(subject, structures) if subject.nb_clusters <= MAX_CLUSTERS else []
        passes = max(1, len(all_windows)) + self._options.deep
        self._options.expect(passes * len(self._walk.tables) * subject.header.cluster_size)
        all_structures = Structures(subject, self._walk, structures)
        if subject.nb_clusters > MAX_CLUSTERS:
            what = f"the file has {subject.nb_clusters} clusters, which are too many to count their references"
            subject.findings.add(Finding(rules.REFCOUNT_CLUSTERS, 0, what, stops=True))
            self._walk_tables(None, is_first=True)
        else:
            structures.judge_readable(subject)
            for start, stop in all_windows:
                window = Window(subject, structures, start, stop)
                window.add_metadata(self._walk)
                self._walk_tables(window, is_first=window.start == 0)
                window.settle()
                judge_mismatches(subject, all_structures, structures, window)
                highest = max(highest, window.highest())
            judge_l1_copied(subject, self._walk, structures)
        return self._fragments.figures(highest)

    def _walk_tables(self, window: Window | None, *, is_first: bool) -> None:
        subject = self._subject
        for batch in self._walk.batches():
            if is_first:
                judge_l2(subject, batch)
                self._fragments.add(batch)
                if subject.header.has_data_file:
                    judge_data_file_offsets(subject, batch, self._l1_indexes)
            if window is not None:
                window.add_batch(batch)
                window.judge_copied(batch)
            self._options.advance(batch.entries.size * 8)

    def _active_l1_indexes(self) -> dict[int, int]:
        """Where each active L2 table is in the L1 table."""
        if ACTIVE in self._walk.left_out:
            return {}
        offsets = self._walk.states[ACTIVE].read_l1(self._subject.file) & L1_OFFSET
        return {offset: index for index, offset in enumerate(offsets.tolist()) if offset}


def _report(
    file: FileNode,
    header: ImageHeader | None,
    findings: Findings,
    states: Sequence[State] = (),
    snapshots: SnapshotEntries | None = None,
    figures: Figures | None = None,
) -> Report:
    order = {severity: number for number, severity in enumerate(Severity)}
    kept = sorted(findings.kept, key=lambda f: (order[f.rule.severity], f.rule.id, f.host_offset, f.message))
    times = dict.fromkeys(Severity, 0)
    for rule, number in findings.times.items():
        times[rule.severity] += number
    unseen = sum(number for rule, number in findings.unseen.items() if rule.severity is Severity.CORRUPTION)
    return Report(
        filename=file.filename,
        findings=tuple(kept),
        numbers=dict(sorted(findings.numbers.items(), key=lambda item: (order[item[0].severity], item[0].id))),
        corruptions=times[Severity.CORRUPTION] or unseen,
        leaks=times[Severity.LEAK],
        check_errors=findings.nb_stops + len(findings.problems),
        problems=tuple(findings.problems),
        states=tuple(state.snapshot for state in states) or (None,),
        figures=figures,
        cluster_size=header.cluster_size if header is not None else 0,
        nb_lost=snapshots.nb_lost if snapshots is not None else 0,
    )
