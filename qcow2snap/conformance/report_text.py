"""A report for people: groups with their numbers, the ten worst with where they are, what is at risk, what to do."""

from __future__ import annotations

from collections.abc import Iterator

from qcow2snap.block.qcow2.rules import Severity
from qcow2snap.conformance.advice import risk, what_to_do
from qcow2snap.conformance.check import Report
from qcow2snap.conformance.findings import Finding, short

WORST = 10
_NAMED = 5  # snapshots that are named in a line

_PLURALS = {
    Severity.CORRUPTION: ("corruption", "corruptions"),
    Severity.LEAK: ("leak", "leaks"),
    Severity.VIOLATION: ("violation of the specification", "violations of the specification"),
    Severity.ADVICE: ("piece of advice", "pieces of advice"),
}


def lines(report: Report, most: int = WORST) -> Iterator[str]:
    """The report, line by line, with no more than `most` single findings."""
    yield f"{report.filename}: {_summary(report)}"
    if report.findings:
        yield ""
        yield from _groups(report)
        yield ""
        yield from _worst(report, most)
    for problem in report.problems:
        yield f"could not be read: {problem}"
    advice = what_to_do(report)
    if advice:
        yield ""
        yield from advice
    if report.figures is not None:
        yield ""
        yield from _figures(report)


def where(report: Report, finding: Finding) -> str:
    """Whom a finding touches: `snapshot "tuesday" and 3 more, guest offset 0x10000`; empty where that is nobody."""
    names = []
    for number in finding.states[:_NAMED]:
        snapshot = report.states[number] if number < len(report.states) else None
        names.append(
            "active disk" if snapshot is None else f"snapshot {short(snapshot.name) or f'id {short(snapshot.id)}'}"
        )
    more = len(finding.states) - len(names)
    if more:
        names.append(f"{more} more")
    if finding.guest_offset is not None:
        names.append(f"{'VM state' if finding.in_vm_state else 'guest'} offset {finding.guest_offset:#x}")
    return ", ".join(names)


def _summary(report: Report) -> str:
    counts = {
        Severity.CORRUPTION: report.corruptions,
        Severity.LEAK: report.leaks,
        Severity.VIOLATION: report.number_of(Severity.VIOLATION),
        Severity.ADVICE: report.number_of(Severity.ADVICE),
    }
    parts = [f"{count} {_PLURALS[severity][count != 1]}" for severity, count in counts.items() if count]
    if report.check_errors:
        parts.insert(0, f"not checked to the end ({report.check_errors} errors that stop QEMU)")
    return ", ".join(parts) if parts else "no errors were found"


def _groups(report: Report) -> Iterator[str]:
    for rule, number in report.numbers.items():
        yield f"{rule.severity.value:10}  {rule.id:15}  {number:6} x  {rule.sentence}"
        yield f"{'':39}at risk: {risk(rule)}"


def _worst(report: Report, most: int) -> Iterator[str]:
    shown_findings = report.findings[:most]
    total = sum(report.numbers.values())
    yield f"The first {len(shown_findings)} of {total}:" if total > len(shown_findings) else "Where:"
    for finding in shown_findings:
        touched = f" [{whom}]" if (whom := where(report, finding)) else ""
        yield f"  {finding.host_offset:#12x}  {finding.rule.id:15}  {finding.message}{touched}"


def _figures(report: Report) -> Iterator[str]:
    figures = report.figures
    assert figures is not None
    total, allocated = figures.total_clusters, figures.allocated_clusters
    if total and allocated:
        yield (
            f"{allocated}/{total} = {100 * allocated / total:.2f}% allocated, "
            f"{100 * figures.fragmented_clusters / allocated:.2f}% fragmented, "
            f"{100 * figures.compressed_clusters / allocated:.2f}% compressed clusters"
        )
    yield f"Image end offset: {figures.image_end_offset}"
