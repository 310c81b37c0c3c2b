"""A file that is counted in windows, as huge ones are, gives the report that it gives in one."""

from __future__ import annotations

from pathlib import Path

import pytest

from qcow2snap.block.file import FileNode
from qcow2snap.block.node import ImageFormatError
from qcow2snap.conformance import check as module
from qcow2snap.conformance.check import Report, check
from qcow2snap.conformance.counting import Window, windows
from qcow2snap.conformance.findings import Findings
from qcow2snap.conformance.header_rules import judge_header
from qcow2snap.conformance.refcounts import RefcountStructures
from qcow2snap.conformance.subject import Subject
from tests.conformance.broken import BREAKS, Break
from tests.conftest import NewImage

CASES = {**BREAKS, **{name: Break(name) for name in ("sound", "many", "compressed-mixed", "preallocation-metadata")}}


def report(path: Path) -> Report | str:
    file = FileNode(str(path))
    try:
        return check(file)
    except ImageFormatError as error:
        return str(error)
    finally:
        file.close()


@pytest.mark.parametrize("case", [name for name in CASES if name != "REF-012"])
@pytest.mark.parametrize("size", [5, 64])
def test_windows_change_nothing(case: str, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = CASES[case].write(tmp_path / "image")
    whole = report(path)

    def small(subject: Subject, _structures: RefcountStructures) -> list[tuple[int, int]]:
        end = subject.nb_clusters + 1
        return [(start, min(start + size, end)) for start in range(0, end, size)]

    monkeypatch.setattr(module, "windows", small)
    assert report(path) == whole


@pytest.mark.parametrize("bits", [1, 16, 32, 64])
def test_a_window_of_a_huge_file_takes_a_byte_for_each_cluster_and_144_mib(new_image: NewImage, bits: int) -> None:
    image = new_image("1M", cluster_size=512, refcount_bits=bits).path
    with image.open("r+b") as sparse:
        sparse.truncate(1 << 36)
    file, findings = FileNode(str(image)), Findings()
    header = judge_header(file, findings)
    assert header is not None
    subject = Subject(file, header, findings)
    structures = RefcountStructures(subject)
    window = Window(subject, structures, *windows(subject, structures)[0])
    assert window.counts.nbytes + window.refcounts.nbytes <= subject.nb_clusters + 1 + (144 << 20)
    file.close()
