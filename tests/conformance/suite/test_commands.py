"""`conformance list` and `show`, our own reader over the whole suite, and the pytest plugin in a project of its own."""

from __future__ import annotations

import hashlib
import zlib
from pathlib import Path

import pytest

import qcow2snap
from qcow2snap.block.node import Qcow2SnapError
from qcow2snap.conformance.suite import deflate, zstd
from qcow2snap.conformance.suite.content import lines, noise
from qcow2snap.conformance.suite.judge import judge_content, judge_map
from qcow2snap.conformance.suite.registry import all_cases
from qcow2snap.conformance.suite.values import Case, Disk
from tests.cli.support import here
from tests.support.tools import qemu_img

pytest_plugins = ["pytester"]


def test_list_groups_cases_by_section() -> None:
    out = here("conformance", "list").stdout
    headings = [line for line in out.splitlines() if line and not line.startswith(" ")]
    assert headings[:2] == ["Header", "Header padding"]
    assert f"{len(all_cases())} cases" in headings[-1]


def test_list_as_json_has_what_is_expected_of_each_disk() -> None:
    listed = here("conformance", "list", "--json", "--section", "table entry").json()["cases"]
    assert {"Snapshots, Snapshot table entry", "Cluster mapping, L1 table entry"} <= {
        section for case in listed for section in case["sections"]
    }
    (case,) = (case for case in listed if case["name"] == "snapshot-smaller")
    assert [(disk["snapshot"], disk["expect"], disk["size"]) for disk in case["disks"]] == [
        (None, "open", 262144),
        ({"id": "1", "name": "small"}, "open", 65536),
    ]


def test_show_writes_an_image_that_has_the_digest_it_shows(tmp_path: Path) -> None:
    image = tmp_path / "mine.qcow2"
    shown = here("conformance", "show", "backing-chain", "--json", "--output", image).json()
    assert hashlib.sha256(image.read_bytes()).hexdigest() == shown["files"]["backing-chain.qcow2"]
    assert qemu_img("convert", "-O", "raw", image, tmp_path / "raw").returncode == 0
    content = (tmp_path / "raw").read_bytes()
    assert hashlib.sha256(content).hexdigest() == shown["disks"][0]["sha256"]
    assert sum(entry["length"] for entry in shown["disks"][0]["map"]) == len(content)
    again = here("conformance", "show", "backing-chain", "--output", image)
    assert again.returncode == 1
    assert "exists already" in again.stderr


def test_show_names_the_case_that_may_be_meant() -> None:
    result = here("conformance", "show", "snapshot-smalle")
    assert result.returncode == 2
    assert "snapshot-smaller" in result.stderr


# -- our own reader ----------------------------------------------------------------------------------------------------

SMALL = [case for case in all_cases() if not case.large]


@pytest.mark.filterwarnings("ignore::UserWarning")  # of images that are marked dirty or corrupt, or whose table is cut
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_our_reader_finds_what_the_builder_put_in(case: Case, tmp_path: Path) -> None:
    built = case.build()
    image = built.write(tmp_path)
    wrong = [verdict for disk in built.disks if (verdict := _judged(image, disk)) is not None]
    assert wrong == []


def _judged(image: Path, disk: Disk) -> str | None:
    raw = image.with_name("disk.raw")
    try:
        with qcow2snap.open(image) as opened:
            found = opened.active if disk.snapshot is None else opened.snapshot(f"id={disk.snapshot.id.decode()}")
            with found.open() as file:
                raw.write_bytes(file.read() or b"")
            ref = [] if disk.snapshot is None else ["-s", f"id={disk.snapshot.id.decode()}"]
    except Qcow2SnapError as error:
        return None if disk.must_refuse or disk.may_refuse is not None else str(error)
    if disk.must_refuse:
        return f"not refused, although {disk.reason}"
    listed = here("map", "--json", *ref, image)
    return judge_content(disk, raw) or (None if disk.map is None else judge_map(disk, listed.stdout))


# -- the encoders ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [lines(0, 5000), noise(1, 700), bytes(70000), noise(2, 3000) * 4, b"a"], ids=len)
def test_deflate_streams_are_what_zlib_reads(data: bytes) -> None:
    for window in (4096, 32768):
        found = deflate.tokens(data, window)
        half = len(found) // 2
        for stream in (
            deflate.fixed(found),
            deflate.dynamic(found),
            deflate.dynamic(found[:half], found[half:]),
            deflate.stored(data, block=999),
        ):
            assert zlib.decompress(stream, -15) == data


def test_zstandard_frames_are_what_zstandard_reads() -> None:
    import zstandard

    for frame, data in (
        (zstd.RECORDED, lines(0, 4096)),
        (zstd.raw(noise(1, 300000), block=1000), noise(1, 300000)),
        (zstd.run(7, 300000), b"\7" * 300000),
        (zstd.repeated(b"0123456789abcde\n"), b"0123456789abcde\n" * 256),
    ):
        assert zstandard.ZstdDecompressor().decompress(frame, max_output_size=len(data)) == data


# -- the pytest plugin -------------------------------------------------------------------------------------------------


@pytest.fixture
def project(pytester: pytest.Pytester) -> pytest.Pytester:
    """A project that uses the plugin. Its pytest runs in a process of its own."""
    pytester.makeconftest('pytest_plugins = ["qcow2snap.conformance.pytest"]')
    return pytester


def test_a_project_tests_its_reader_disk_by_disk(project: pytest.Pytester) -> None:
    project.makepyfile(
        """
        import pytest, qcow2snap

        @pytest.mark.qcow2_cases("snapshot-smaller", "mapping-full", "refuse-magic", "backing-name-json", "zstd-raw")
        def test_reader(qcow2_disk):
            def read():
                if "zstd" in qcow2_disk.path.name:
                    raise NotImplementedError("Zstandard")
                if "json" in qcow2_disk.path.name:
                    raise ValueError("what is that?")
                with qcow2snap.open(qcow2_disk.path) as image:
                    disk = image.active if qcow2_disk.snapshot is None else image.snapshot(qcow2_disk.snapshot)
                    return disk.open().read()
            qcow2_disk.judge(read)

        @pytest.mark.qcow2_cases("snapshot-smaller", "refuse-magic", "backing-raw")
        def test_reader_that_is_wrong(qcow2_disk):
            qcow2_disk.judge(lambda: qcow2_disk.path.read_bytes())
        """
    )
    result = project.runpytest_subprocess("-v", "-p", "no:cacheprovider")
    result.assert_outcomes(passed=4, skipped=2, failed=4)
    result.stdout.fnmatch_lines(["*test_reader?snapshot-smaller@id=1? PASSED*", "*not refused, although the magic*"])


def test_a_project_looks_at_cases_and_what_they_expect(project: pytest.Pytester) -> None:
    project.makeini("[pytest]\nqcow2_cases = snapshot-smaller")
    project.makepyfile(
        """
        import hashlib, pytest

        def test_case(qcow2_case):
            assert qcow2_case.path.stat().st_size and "Snapshots" in qcow2_case.sections
            small = qcow2_case.expected("small")
            assert small is qcow2_case.expected(id="1") and small.size == 65536
            assert hashlib.sha256(small.read()).hexdigest() == small.sha256
            assert qcow2_case.expected().size == 262144
            small.check(small.read())
            small.check_map([entry.json() for entry in small.map])
            with pytest.raises(pytest.fail.Exception, match="262144 bytes"):
                small.check(small.read() + bytes(262144 - 65536))
            with pytest.raises(LookupError):
                qcow2_case.expected("none")
        """
    )
    project.runpytest_subprocess("-p", "no:cacheprovider").assert_outcomes(passed=1)
