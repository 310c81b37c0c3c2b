"""What came of a run, by sections of the specification: for people, as JUnit XML, and as JSON. Judges nothing."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any
from xml.etree import ElementTree as ET

from qcow2snap.conformance.suite import SUITE_VERSION
from qcow2snap.conformance.suite.runner import Check, Outcome
from qcow2snap.conformance.suite.values import Section

_OUTCOMES = (Outcome.PASSED, Outcome.FAILED, Outcome.NOT_SUPPORTED)


def by_section(checks: Sequence[Check]) -> dict[Section, Counter[Outcome]]:
    """How many checks of each section came to what. A check counts once: in the section that its case is about."""
    counts = {section: Counter[Outcome]() for section in Section}
    for check in checks:
        counts[check.sections[0]][check.outcome] += 1
    return {section: counted for section, counted in counts.items() if counted}


def text(checks: Sequence[Check]) -> list[str]:
    """A table by section, then each failure with what was wrong."""
    sections = by_section(checks)
    width = max((len(section) for section in sections), default=0)
    lines = [f"{'SECTION':{width}}  PASSED  FAILED  NOT SUPPORTED"]
    for section, counted in sections.items():
        lines.append(f"{section:{width}}  {_cells(counted)}")
    total = Counter(check.outcome for check in checks)
    lines.append(f"{'Total':{width}}  {_cells(total)}")
    failed = [check for check in checks if check.outcome is Outcome.FAILED]
    if failed:
        kinds = Counter(check.failure.value for check in failed if check.failure)
        lines += ["", "Failures: " + ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())]
        lines += [f"  {check.name}: {check.detail}" for check in failed]
    lines += ["", f"{len({check.case for check in checks})} cases of suite {SUITE_VERSION}"]
    return [_printable(line) for line in lines]


def _cells(counted: Counter[Outcome]) -> str:
    return f"{counted[Outcome.PASSED]:6}  {counted[Outcome.FAILED]:6}  {counted[Outcome.NOT_SUPPORTED]:13}"


def as_json(checks: Sequence[Check], command: str) -> str:
    total = Counter(check.outcome for check in checks)
    return json.dumps(
        {
            "version": SUITE_VERSION,
            "reader": command,
            **_counts(total),
            "sections": [{"section": section, **_counts(each)} for section, each in by_section(checks).items()],
            "checks": [_check_json(check) for check in checks],
        },
        indent=4,
    )


def _counts(counted: Counter[Outcome]) -> dict[str, int]:
    return {outcome.value.replace(" ", "-"): counted[outcome] for outcome in _OUTCOMES}


def _check_json(check: Check) -> dict[str, Any]:
    return {
        "case": check.case,
        "what": check.what,
        "snapshot": check.snapshot,
        "sections": [*check.sections],
        "outcome": check.outcome.value.replace(" ", "-"),
        "failure": check.failure.name.lower() if check.failure else None,
        "detail": check.detail,
        "seconds": round(check.seconds, 3),
    }


def junit(checks: Sequence[Check]) -> str:
    """One test case for each check; its class is the section that the case is about."""
    total = Counter(check.outcome for check in checks)
    suite = ET.Element(
        "testsuite",
        name=f"qcow2 suite {SUITE_VERSION}",
        tests=str(len(checks)),
        failures=str(total[Outcome.FAILED]),
        errors="0",
        skipped=str(total[Outcome.NOT_SUPPORTED]),
        time=f"{sum(check.seconds for check in checks):.3f}",
    )
    for check in checks:
        name, detail = _printable(check.name), _printable(check.detail)
        element = ET.SubElement(suite, "testcase", classname=check.sections[0], name=name, time=f"{check.seconds:.3f}")
        if check.outcome is Outcome.FAILED and check.failure is not None:
            ET.SubElement(element, "failure", type=check.failure.name.lower(), message=detail).text = detail
        elif check.outcome is Outcome.NOT_SUPPORTED:
            ET.SubElement(element, "skipped", message=detail)
    root = ET.Element("testsuites")
    root.append(suite)
    ET.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ET.tostring(root, encoding="unicode")


def _printable(line: str) -> str:
    """Without characters that move the cursor, or that XML does not have."""
    return "".join(char if char.isprintable() else f"\\x{ord(char):02x}" for char in line)
