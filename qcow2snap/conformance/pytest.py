"""A pytest plugin: the suite's cases as fixtures, for Python projects that read qcow2.

    pytest_plugins = ["qcow2snap.conformance.pytest"]

    def test_my_reader(qcow2_disk):  # once for each disk and snapshot of each case
        qcow2_disk.judge(lambda: myreader.read(qcow2_disk.path, qcow2_disk.snapshot))

`qcow2_case` is one case instead, with its disks. The marker qcow2_cases, or the ini option of that name, chooses cases
by name: `@pytest.mark.qcow2_cases("snapshot-*", large=True)`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from qcow2snap.conformance.suite.judge import judge_content, judge_map
from qcow2snap.conformance.suite.manifest import read_manifest
from qcow2snap.conformance.suite.registry import choose_cases
from qcow2snap.conformance.suite.values import Case, Disk, MapEntry

_MARKER = "qcow2_cases"


class CaseDisk:
    """The active disk or a snapshot of a case, and what is right to find in it.

    path         the image, in a directory of the test's own, with the files that it refers to
    snapshot     its name; None for the active disk
    snapshot_id  its id; where two snapshots have one name, only that tells them apart
    must_refuse  reading it has to raise an exception; `reason` says why
    may_refuse   why raising one is no fault; None if it is
    size, sha256, map   of what can be read
    """

    def __init__(self, path: Path, disk: Disk) -> None:
        self.path = path
        self._disk = disk
        self.snapshot = None if disk.snapshot is None else os.fsdecode(disk.snapshot.name)
        self.snapshot_id = None if disk.snapshot is None else os.fsdecode(disk.snapshot.id)
        self.must_refuse = disk.must_refuse
        self.may_refuse = disk.may_refuse
        self.reason = disk.reason
        self.size = disk.size
        self.sha256 = None if disk.content is None else disk.content.sha256
        self.map: Sequence[MapEntry] | None = disk.map

    def read(self) -> bytes:
        """All that the disk holds."""
        assert self._disk.content is not None, f"to be refused, as {self.reason}"
        return self._disk.content.read()

    def judge(self, read: Callable[[], bytes | os.PathLike[str]]) -> None:
        """Call `read`, which gives the disk's bytes, or a file with them, or raises an exception; fail if it is wrong.

        What it does not support it may say by NotImplementedError: then the test is skipped.
        """
        try:
            given = read()
        except NotImplementedError as error:
            pytest.skip(f"not supported: {error}")
        except Exception as error:
            if self.must_refuse:
                return
            if self.may_refuse is not None:
                pytest.skip(f"refused, and may be: {self.may_refuse} ({error})")
            raise
        if self.must_refuse:
            pytest.fail(f"not refused, although {self.reason}")
        self.check(given)

    def check(self, given: bytes | os.PathLike[str]) -> None:
        """Fail if these bytes, or those of this file, are not what the disk holds."""
        if isinstance(given, (bytes, bytearray, memoryview)):
            output = self.path.with_name(f".{self.path.name}.given")
            output.write_bytes(given)
        else:
            output = Path(given)
        wrong = judge_content(self._disk, output)
        if wrong is not None:
            pytest.fail(wrong)

    def check_map(self, entries: Sequence[dict[str, Any]]) -> None:
        """Fail if extents with the fields of `qemu-img map` are not the disk's."""
        wrong = judge_map(self._disk, json.dumps(entries))
        if wrong is not None:
            pytest.fail(wrong)


class BuiltCase:
    """A case whose files are there."""

    def __init__(self, case: Case, directory: Path) -> None:
        built = case.build()
        self.name = case.name
        self.about = case.about
        self.sections = case.sections
        self.path = built.write(directory)
        self.disks = [CaseDisk(self.path, disk) for disk in built.disks]

    def expected(self, snapshot: str | None = None, *, id: str | None = None) -> CaseDisk:  # noqa: A002
        """Of the active disk, or of a snapshot by its name or its id. No such snapshot, or several: LookupError."""
        found = [
            disk for disk in self.disks if (disk.snapshot_id == id if id is not None else disk.snapshot == snapshot)
        ]
        if len(found) != 1:
            raise LookupError(f"{self.name} has {len(found)} such disks: {snapshot!r}, id {id!r}")
        return found[0]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addini(_MARKER, "Cases of the qcow2 suite to run, by name, with * and ?. Default: all.", type="args")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", f"{_MARKER}(*patterns, large=False): run only these cases of the qcow2 suite, by name, with * and ?."
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "qcow2_case" in metafunc.fixturenames:
        cases = _chosen(metafunc)
        metafunc.parametrize("qcow2_case", cases, indirect=True, ids=[case.name for case in cases])
    if "qcow2_disk" in metafunc.fixturenames:
        disks = [*_disks(_chosen(metafunc))]
        labels = [f"{case.name}@{label}" if label else case.name for case, _, label in disks]
        metafunc.parametrize("qcow2_disk", [(case, index) for case, index, _ in disks], indirect=True, ids=labels)


@pytest.fixture
def qcow2_case(request: pytest.FixtureRequest, tmp_path: Path) -> BuiltCase:
    """One case of the suite."""
    return BuiltCase(request.param, tmp_path)


@pytest.fixture
def qcow2_disk(request: pytest.FixtureRequest, tmp_path: Path) -> CaseDisk:
    """One disk of one case: the active one, or a snapshot."""
    case, index = request.param
    disks = BuiltCase(case, tmp_path).disks
    return disks[int(index)]


def _chosen(metafunc: pytest.Metafunc) -> list[Case]:
    marker = metafunc.definition.get_closest_marker(_MARKER)
    patterns = (marker.args if marker else ()) or metafunc.config.getini(_MARKER)
    chosen = choose_cases(patterns, large=bool(marker and marker.kwargs.get("large")))
    if not chosen:
        raise pytest.UsageError(f"no case of the qcow2 suite is called {' or '.join(patterns)}")
    return chosen


def _disks(cases: Sequence[Case]) -> Iterator[tuple[Case, int, str]]:
    """Cases, numbers of their disks, and snapshots' ids, by the manifest: nothing is built to collect tests."""
    recorded = read_manifest()["cases"]
    for case in cases:
        for index, disk in enumerate(recorded[case.name]["disks"]):
            yield case, index, f"id={disk['snapshot']['id']}" if disk["snapshot"] else ""
