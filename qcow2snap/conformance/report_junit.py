"""A report as JUnit XML, for CI systems: a test case for each rule, which fails with all findings of that rule."""

from __future__ import annotations

import re
from xml.etree import ElementTree as Xml

from qcow2snap.block.qcow2.rules import RULES, Rule, Severity
from qcow2snap.block.snapshot_ref import json_text
from qcow2snap.conformance.advice import risk
from qcow2snap.conformance.check import Report
from qcow2snap.conformance.report_text import where

_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def junit(report: Report, most: int | None = None) -> str:
    """The document, with no more than `most` single findings. Advice does not fail."""
    failed = [rule for rule in report.numbers if rule.severity is not Severity.ADVICE]
    stopped = {finding.rule for finding in report.findings if finding.stops}
    nb_errors = len(stopped) + len(report.problems)
    numbers = {"tests": len(RULES) + len(report.problems), "errors": nb_errors, "failures": len({*failed} - stopped)}
    attributes = {name: str(number) for name, number in numbers.items()}
    root = Xml.Element("testsuites", {"name": "qcow2snap check", **attributes})
    suite = Xml.SubElement(root, "testsuite", {"name": _xml(report.filename), **attributes})
    for rule in RULES:
        case = Xml.SubElement(suite, "testcase", {"classname": f"qcow2.{rule.section}", "name": rule.id})
        if rule in report.numbers:
            _tell(report, rule, case, most, is_error=rule in stopped)
    for problem in report.problems:
        case = Xml.SubElement(suite, "testcase", {"classname": "qcow2", "name": "reading the file"})
        Xml.SubElement(case, "error", {"message": _xml(problem)})
    Xml.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + Xml.tostring(root, encoding="unicode")


def _tell(report: Report, rule: Rule, case: Xml.Element, most: int | None, *, is_error: bool) -> None:
    kind = "error" if is_error else "system-out" if rule.severity is Severity.ADVICE else "failure"
    attributes = {} if kind == "system-out" else {"type": rule.severity.value, "message": rule.sentence}
    lines = [f"{report.numbers[rule]} x {rule.sentence} At risk: {risk(rule)}."]
    for finding in report.findings[:most]:
        if finding.rule is rule:
            touched = where(report, finding)
            lines.append(f"{finding.host_offset:#x}: {finding.message}{f' [{touched}]' if touched else ''}")
    Xml.SubElement(case, kind, attributes).text = _xml("\n".join(lines))


def _xml(name: str) -> str:
    """A text without the characters that XML cannot hold: these escaped."""
    return _NOT_XML.sub(lambda match: f"\\x{ord(match[0]):02x}", json_text(name))
