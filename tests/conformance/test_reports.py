"""Reports in forms that other programs read: SARIF 2.1.0, JUnit XML, JSON; and that they come out the same again."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse
from xml.etree import ElementTree

import pytest

from qcow2snap.block.qcow2.rules import RULES
from tests.cli.support import here
from tests.conformance.broken import BREAKS, Break

# Several faults at once, names that are no text, offsets of all sizes, and what cannot be checked at all.
CASES = ["HDR-003", "HDR-008", "L1-002", "SNAP-010", "SNAP-001", "REF-001", "REF-007", "HDR-017"]


@pytest.fixture(params=CASES)
def image(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return BREAKS[request.param].write(tmp_path / "disk & co ü.qcow2")


def fields(image: Path) -> Any:
    return json.loads(here("check", "--json", image).stdout)


def test_sarif_has_a_result_for_each_finding(image: Path) -> None:
    """What the schema of SARIF 2.1.0 requires of the objects that are used, and that what they refer to is there."""
    log, told = json.loads(here("check", "--format=sarif", image).stdout), fields(image)
    assert log["version"] == "2.1.0"
    (run,) = log["runs"]
    driver, (artifact,), (invocation,) = run["tool"]["driver"], run["artifacts"], run["invocations"]
    assert driver["name"] == "qcow2snap"
    assert [rule["id"] for rule in driver["rules"]] == [rule.id for rule in RULES]
    uri = artifact["location"]["uri"]
    assert re.fullmatch(r"file:///[A-Za-z0-9%/._~-]*", uri)
    assert unquote(urlparse(uri).path) == str(image)
    assert invocation["executionSuccessful"] == (told["check-errors"] == 0)
    assert len(run["results"]) == len(told["findings"])
    for result, finding in zip(run["results"], told["findings"], strict=True):
        assert driver["rules"][result["ruleIndex"]]["id"] == result["ruleId"] == finding["rule"]
        assert result["level"] in ("error", "warning", "note")
        assert result["message"]["text"].startswith(finding["message"])
        assert result["occurrenceCount"] >= 1
        place = result["locations"][0]["physicalLocation"]
        assert place["artifactLocation"] == {"uri": uri, "index": 0}
        assert place["region"] == {"byteOffset": finding["host-offset"]}


def test_junit_has_a_case_for_each_rule(image: Path) -> None:
    root, told = ElementTree.fromstring(here("check", "--format=junit", image).stdout), fields(image)
    (suite,) = root
    cases = {case.get("name"): case for case in suite}
    assert [case.get("name") for case in suite] == [rule.id for rule in RULES]
    assert int(suite.get("tests", "")) == len(suite)
    for kind, number in (("failure", "failures"), ("error", "errors")):
        assert len(suite.findall(f"testcase/{kind}")) == int(suite.get(number, ""))
    for id_, rule in told["rules"].items():
        (verdict,) = cases[id_]
        assert (verdict.tag == "system-out") == (rule["severity"] == "advice")
        assert str(rule["count"]) in (verdict.text or "")
    assert all(not len(case) for id_, case in cases.items() if id_ not in told["rules"])


@pytest.mark.parametrize("form", ["text", "json", "sarif", "junit"])
def test_a_report_is_the_same_each_time(image: Path, form: str) -> None:
    first, second = (here("check", f"--format={form}", image) for _ in range(2))
    assert first == second
    assert first.stdout


def test_a_name_that_damage_made_long_is_not_told_whole_with_each_finding(tmp_path: Path) -> None:
    """It has 60 KiB here; with some thousand findings the report had gigabytes."""
    case = Break("sound", {"snapshots.0.name_size": 60_000, "header.nb_snapshots": 1}, size=1 << 20)
    snapshots = [
        each for finding in fields(case.write(tmp_path / "image"))["findings"] for each in finding.get("snapshots", [])
    ]
    assert 255 < max(len(each["name"]) for each in snapshots) < 1024
