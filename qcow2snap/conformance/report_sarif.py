"""A report as SARIF 2.1.0 (OASIS), for services that gather findings of many tools."""

from __future__ import annotations

import os
from typing import Any
from urllib.parse import quote_from_bytes

from qcow2snap.block.qcow2.rules import RULES, Rule, Severity
from qcow2snap.block.snapshot_ref import json_text
from qcow2snap.conformance.advice import risk
from qcow2snap.conformance.check import Report
from qcow2snap.conformance.findings import Finding
from qcow2snap.conformance.report_json import finding_fields
from qcow2snap.conformance.report_text import where

_LEVELS = {
    Severity.CORRUPTION: "error",
    Severity.LEAK: "warning",
    Severity.VIOLATION: "warning",
    Severity.ADVICE: "note",
}
_LARGEST = (1 << 63) - 1  # what a reader of SARIF can be trusted to take for an integer


def sarif_log(report: Report, version: str, most: int | None = None) -> dict[str, Any]:
    """The log of one run of this version of the program, with no more than `most` results."""
    uri = "file://" + quote_from_bytes(os.fsencode(os.path.abspath(report.filename)))
    indexes = {rule: index for index, rule in enumerate(RULES)}
    invocation = {"executionSuccessful": not report.check_errors, "exitCode": report.exit_code}
    if report.problems:
        invocation["toolExecutionNotifications"] = [  # type: ignore[assignment]
            {"level": "error", "message": {"text": json_text(problem)}} for problem in report.problems
        ]
    run = {
        "tool": {"driver": {"name": "qcow2snap", "version": version, "rules": [_rule(rule) for rule in RULES]}},
        "invocations": [invocation],
        "artifacts": [{"location": {"uri": uri}}],
        "results": [_result(report, finding, uri, indexes[finding.rule]) for finding in report.findings[:most]],
    }
    return {"$schema": "https://json.schemastore.org/sarif-2.1.0.json", "version": "2.1.0", "runs": [run]}


def _rule(rule: Rule) -> dict[str, Any]:
    return {
        "id": rule.id,
        "shortDescription": {"text": rule.sentence},
        "help": {"text": f"At risk: {risk(rule)}."},
        "defaultConfiguration": {"level": _LEVELS[rule.severity]},
        "properties": {"section": rule.section, "severity": rule.severity.value},
    }


def _result(report: Report, finding: Finding, uri: str, index: int) -> dict[str, Any]:
    touched = where(report, finding)
    fields = finding_fields(report, finding)
    extra = ("guest-offset", "vm-state-offset", "active-disk", "snapshots", "more-snapshots", "stops-qemu")
    return {
        "ruleId": finding.rule.id,
        "ruleIndex": index,
        "level": _LEVELS[finding.rule.severity],
        "message": {"text": json_text(f"{finding.message} [{touched}]" if touched else finding.message)},
        "locations": [
            {
                "physicalLocation": {
                    "artifactLocation": {"uri": uri, "index": 0},
                    "region": {"byteOffset": min(finding.host_offset, _LARGEST)},
                }
            }
        ],
        "occurrenceCount": max(1, finding.times),
        "properties": {name: fields[name] for name in extra if name in fields},
    }
