"""`conformance run`: readers that do one thing wrong are told so, and nothing that they do harms who tests them."""

from __future__ import annotations

import json
import shlex
import signal
import sys
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from tests.cli.support import here, start
from tests.conformance.suite import plain_reader
from tests.support import Result
from tests.support.processes import process_tree
from tests.support.tools import require
from tests.support.waiting import until

# -S -E: Python starts in half the time.
PLAIN = shlex.join([sys.executable, "-S", "-E", plain_reader.__file__])
READABLE = ("cluster-bits-9", "mapping-full", "zero-*", "deflate-*", "extended-[a-h]*", "snapshot-[o-s]*", "l1-*")


def conformance(command: str, *arguments: str, cases: tuple[str, ...] = ("mapping-full",)) -> Result:
    return here(
        "conformance", "run", "--reader", command, *(word for each in cases for word in ("--cases", each)), *arguments
    )


def checks(command: str, *arguments: str, cases: tuple[str, ...] = ("mapping-full",)) -> list[dict[str, Any]]:
    """What a run came to, check by check."""
    result = conformance(command, "--format", "json", *arguments, cases=cases)
    report = json.loads(result.stdout)
    assert result.returncode == int(report["failed"] > 0)
    found: list[dict[str, Any]] = report["checks"]
    return found


def flawed(flaw: str) -> str:
    return f"{PLAIN} --flaw {flaw} {{image}} {{output}} [{{id}}]"


def names(found: list[dict[str, Any]], outcome: str) -> set[str]:
    return {check["case"] for check in found if check["outcome"] == outcome}


# -- verdicts ----------------------------------------------------------------------------------------------------------


def test_a_reader_that_is_right_passes() -> None:
    found = checks(f"{PLAIN} {{image}} {{output}} [{{id}}]", cases=READABLE)
    assert [check for check in found if check["outcome"] == "failed" and "backing" not in check["case"]] == []
    assert len(names(found, "passed")) > 40
    assert any(check["snapshot"] for check in found)


def test_a_reader_that_knows_no_subclusters_fails_those_sections_and_no_other() -> None:
    result = conformance(
        flawed("no-subclusters"), "--format", "json", cases=("extended-[a-h]*", "mapping-*", "zero-p*")
    )
    report = json.loads(result.stdout)
    failing = {each["section"] for each in report["sections"] if each["failed"]}
    assert failing == {"Extended L2 Entries"}
    failed = [check for check in report["checks"] if check["outcome"] == "failed"]
    assert {check["failure"] for check in failed} == {"wrong"}
    assert len(failed) >= 8
    assert result.returncode == 1


def test_a_reader_that_ignores_the_zero_bit_is_told_where() -> None:
    (check,) = checks(flawed("no-zero-bit"), cases=("zero-allocated",))
    assert check["failure"] == "wrong"
    assert check["detail"] == "the content is wrong from byte 0x1000 on, where it is zeros"


def test_a_reader_that_opens_what_it_must_not_fails() -> None:
    found = checks(flawed("accepts-features"), cases=("feature-*",))
    assert (
        names(found, "failed") == {case for case in names(found, "failed") if "unknown-incompatible" in case} != set()
    )
    assert {check["failure"] for check in found if check["outcome"] == "failed"} == {"accepted"}


def test_to_refuse_what_can_be_read_is_a_failure() -> None:
    (check,) = checks(f"{PLAIN} {{image}} {{output}}", cases=("backing-raw",))
    assert (check["failure"], check["detail"]) == ("refused", "refused with exit code 1: refused: not for this reader")


def test_to_refuse_an_optional_feature_is_not_supported() -> None:
    (check,) = checks(f"{PLAIN} {{image}} {{output}}", cases=("zstd-raw",))
    assert check["outcome"] == "not-supported"
    assert "incompatible feature bit 3" in check["detail"]


def test_a_reader_without_snapshots_is_asked_for_none() -> None:
    found = checks(f"{PLAIN} {{image}} {{output}}", cases=("snapshot-smaller",))
    assert [(check["snapshot"], check["outcome"]) for check in found] == [(None, "passed"), ("small", "not-supported")]


def test_where_names_are_not_unique_only_ids_are_asked() -> None:
    by_name = checks(f"{PLAIN} {{image}} {{output}} [{{snapshot}}]", cases=("snapshot-name-duplicate",))
    by_id = checks(f"{PLAIN} {{image}} {{output}} [{{id}}]", cases=("snapshot-name-duplicate",))
    assert [check["outcome"] for check in by_name] == ["passed", "not-supported", "not-supported", "failed"]
    assert [check["outcome"] for check in by_id] == ["passed"] * 4


def test_standard_output_is_read_where_there_is_no_output() -> None:
    require("qemu-img")
    (check,) = checks(f"{PLAIN} {{image}} /dev/stdout")
    assert check["outcome"] == "passed"


def test_maps_are_judged_too(tmp_path: Path) -> None:
    require("qemu-img")
    maps = ("--map-reader", "qemu-img map -f qcow2 --output=json {image}")
    found = checks("qemu-img convert -O raw {image} {output}", *maps, cases=("mapping-*", "zero-*", "refuse-l1-short"))
    assert {check["outcome"] for check in found} == {"passed"}
    assert {check["what"] for check in found} == {"read", "map"}
    lie = tmp_path / "map.json"
    lie.write_text('[{"start": 0, "length": 65536, "depth": 0, "zero": false, "data": true, "offset": 4096}]')
    result = here("conformance", "run", "--map-reader", f"sed n {lie} {{image}}", "--cases", "mapping-reverse")
    assert "wrong map" in result.stdout
    assert result.returncode == 1


# -- limits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flaw", "failure"),
    [
        ("crash", "crash"),
        ("sleep", "timeout"),
        ("allocate", "memory"),
        ("hold", "memory"),
        ("write-on", "output"),
        ("modify", "modified"),
        ("replace-image", "modified"),
        ("say-nothing", "wrong"),
        ("make-directory", "wrong"),
    ],
)
def test_misdeeds_are_failures_of_their_own_kind(flaw: str, failure: str) -> None:
    began = time.monotonic()
    timeout = "1" if flaw == "sleep" else "20"
    found = checks(
        flawed(flaw), "--timeout", timeout, "--memory", "200M", cases=("refuse-crypt-method-3", "mapping-full")
    )
    assert time.monotonic() - began < 60  # of two cases; without limits they would never end
    expected = {failure, "accepted"} if failure == "wrong" else {failure}
    assert {check["failure"] for check in found} == expected


def test_a_run_that_is_ended_ends_its_readers_and_leaves_nothing(tmp_path: Path) -> None:
    command = ["conformance", "run", "--reader", flawed("sleep"), "--cases", "mapping-*", "--timeout", "60"]
    process = start(*command, env={"TMPDIR": str(tmp_path)})
    try:
        assert until(lambda: len(process_tree(process.pid)) > 1)
        readers = process_tree(process.pid)[1:]
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 128 + signal.SIGTERM
    finally:
        process.kill()
    assert not any(Path(f"/proc/{reader}").exists() for reader in readers)
    assert list(tmp_path.iterdir()) == []


def test_no_shell_sees_a_command_or_a_name(tmp_path: Path) -> None:
    target = tmp_path / "made"
    found = checks(f"{PLAIN} {{image}} {{output}} [{{id}}] ; touch {target}", cases=("snapshot-name-odd",))
    assert not target.exists()
    assert names(found, "failed") == {"snapshot-name-odd"}  # as the command has words that the reader does not expect
    by_name = f"{sys.executable} -S -c 'import sys; print(sys.argv[1:])' {{image}} [--name={{snapshot}}]"
    result = conformance(by_name, "--keep", str(tmp_path / "kept"), cases=("snapshot-name-odd",))
    assert result.returncode == 1
    said = [path.read_text() for path in sorted((tmp_path / "kept" / "snapshot-name-odd").glob("read-*.out"))]
    assert "--name=$(false)" in said[3]
    assert "--name=" not in said[0]


def test_images_and_what_was_said_can_be_kept(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    conformance(f"{PLAIN} {{image}} {{output}}", "--keep", str(kept), cases=("backing-raw",))
    names_kept = sorted(path.name for path in (kept / "backing-raw").iterdir())
    assert names_kept == ["backing-raw.base.raw", "backing-raw.qcow2", "read-0.log"]
    again = conformance(f"{PLAIN} {{image}} {{output}}", "--keep", str(kept), cases=("backing-raw",))
    assert again.returncode == 1
    assert "exists already" in again.stderr


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--reader", "no-such-program {image}"], "no program"),
        (["--reader", "cat"], "no {image}"),
        (["--reader", "cat '{image}"], "no command"),
        (["--reader", "cat {image}", "--cases", "nothing*"], "No case"),
        (["--adapter", "nothing"], "No such adapter"),
        ([], "Which reader?"),
    ],
)
def test_a_command_that_cannot_be_run_is_a_usage_error(arguments: list[str], complaint: str) -> None:
    result = here("conformance", "run", *arguments)
    assert result.returncode == 2
    assert complaint in result.stderr


# -- reports -----------------------------------------------------------------------------------------------------------


def test_the_text_has_a_row_for_each_section_and_a_line_for_each_failure() -> None:
    result = conformance(f"{PLAIN} {{image}} {{output}}", cases=("mapping-full", "zstd-raw", "backing-raw"))
    rows = {line.rsplit(maxsplit=3)[0]: line.split()[-3:] for line in result.stdout.splitlines()[1:5]}
    assert rows["Cluster mapping, Standard Cluster Descriptor"] == ["1", "0", "0"]
    assert rows["Header, backing_file_offset"] == ["0", "1", "0"]
    assert rows["Cluster mapping, Compressed Clusters Descriptor"] == ["0", "0", "1"]
    assert rows["Total"] == ["1", "1", "1"]
    assert "  backing-raw: refused with exit code 1" in result.stdout


def test_junit_has_a_test_case_for_each_check() -> None:
    cases = ("mapping-full", "zstd-raw", "backing-raw", "snapshot-name-not-utf-8")
    result = conformance(f"{PLAIN} {{image}} {{output}}", "--format", "junit", cases=cases)
    (suite,) = ET.fromstring(result.stdout)
    assert (suite.get("tests"), suite.get("failures"), suite.get("skipped")) == ("6", "1", "3")
    failed = suite.find("testcase/failure/..")
    assert failed is not None
    assert (failed.get("classname"), failed.get("name")) == ("Header, backing_file_offset", "backing-raw")


def test_cases_run_side_by_side_are_reported_in_order() -> None:
    one, many = (
        [check | {"seconds": 0} for check in checks(f"{PLAIN} {{image}} {{output}}", "--jobs", jobs, cases=("l1-*",))]
        for jobs in ("1", "4")
    )
    assert one == many


def test_our_own_reader_passes_by_way_of_its_adapter() -> None:
    result = here("conformance", "run", "--adapter", "qcow2snap", "--cases", "snapshot-sm*", "--cases", "data-file")
    assert result.returncode == 0, result.stdout


def test_qemu_img_fails_only_where_it_takes_a_snapshot_for_the_active_disks_size() -> None:
    require("qemu-img")
    result = here("conformance", "run", "--adapter", "qemu-img", "--section", "snap", "--format", "json")
    failed = {check["case"] for check in json.loads(result.stdout)["checks"] if check["outcome"] == "failed"}
    assert failed == {
        "snapshot-v2-size",
        "snapshot-smaller",
        "snapshot-larger",
        "snapshot-larger-l1",
        "snapshot-sizes",
        "snapshot-size-zero",
        "snapshot-size-part-of-sector",
        "snapshot-smaller-over-backing",
        "snapshot-larger-over-backing",
        "snapshot-vm-state-grown",
        "refuse-snapshot-l1-short",  # QEMU reads zeros where the table ends
    }
