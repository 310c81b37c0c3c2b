"""A report as values for JSON: the fields of `qemu-img check --output=json`, with its meanings, and the findings."""

from __future__ import annotations

from typing import Any

from qcow2snap.block.node import SnapshotInfo
from qcow2snap.block.qcow2.rules import RULES, Rule, Severity
from qcow2snap.block.qcow2.snapshot_entry import MAX_NAME_SIZE
from qcow2snap.block.snapshot_ref import json_text
from qcow2snap.conformance.advice import risk, stakes
from qcow2snap.conformance.check import Report
from qcow2snap.conformance.findings import Finding

_MOST_SNAPSHOTS = 100  # that one finding names


def report_fields(report: Report, most: int | None = None) -> dict[str, Any]:
    """The whole report, with no more than `most` findings. Sizes and offsets in bytes."""
    fields: dict[str, Any] = {
        "filename": report.filename,
        "format": "qcow2",
        "check-errors": report.check_errors,
        "corruptions": report.corruptions,
        "leaks": report.leaks,
        "violations": report.number_of(Severity.VIOLATION),
        "advice": report.number_of(Severity.ADVICE),
    }
    if report.figures is not None:
        fields |= {name.replace("_", "-"): value for name, value in report.figures._asdict().items()}
    if report.nb_lost:
        fields["snapshots-lost"] = report.nb_lost
        fields["warning"] = stakes(report)
    if report.problems:
        fields["problems"] = list(report.problems)
    fields["rules"] = {rule.id: rule_fields(rule) | {"count": number} for rule, number in report.numbers.items()}
    fields["findings"] = [finding_fields(report, finding) for finding in report.findings[:most]]
    return fields


def finding_fields(report: Report, finding: Finding) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "rule": finding.rule.id,
        "severity": finding.rule.severity.value,
        "section": finding.rule.section,
        "message": json_text(finding.message),
        "host-offset": finding.host_offset,
        "count": finding.times,
        "stops-qemu": finding.stops,
        "risk": risk(finding.rule),
    }
    if finding.guest_offset is not None:
        fields["vm-state-offset" if finding.in_vm_state else "guest-offset"] = finding.guest_offset
    if finding.states:
        fields["active-disk"] = finding.states[0] == 0
        snapshots = [report.states[number] for number in finding.states if 0 < number < len(report.states)]
        named = [snapshot for snapshot in snapshots[:_MOST_SNAPSHOTS] if snapshot is not None]
        fields["snapshots"] = [_snapshot_fields(snapshot) for snapshot in named]
        if len(snapshots) > len(named):
            fields["more-snapshots"] = len(snapshots) - len(named)
    return fields


def _snapshot_fields(snapshot: SnapshotInfo) -> dict[str, str]:
    return {"id": json_text(_cut(snapshot.id)), "name": json_text(_cut(snapshot.name))}


def _cut(text: str) -> str:
    """An id or a name that can be one. What damage makes of it may have 64 KiB, and be in thousands of findings."""
    return text if len(text) <= MAX_NAME_SIZE else text[:MAX_NAME_SIZE] + "…"


def rule_fields(rule: Rule) -> dict[str, Any]:
    return {"severity": rule.severity.value, "section": rule.section, "sentence": rule.sentence}


def all_rules() -> list[dict[str, Any]]:
    return [{"id": rule.id, **rule_fields(rule)} for rule in RULES]
