"""`qcow2snap digest`: hashes of every state of an image, and the manifest that proves later that nothing changed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.support import complaint, contents
from tests.conftest import NewImage
from tests.support import Library, Result, qemu_map
from tests.support.table import patch

Run = Callable[..., Result]


@pytest.mark.parametrize("name", ["demo", "backing-chain", "shrunk-by-revert", "sound", "unaligned", "vm-state-pc"])
def test_the_active_disk_and_all_snapshots_hash_to_what_qemu_img_read(library: Library, run: Run, name: str) -> None:
    image = library.images[name]
    entries = run("digest", "--json", library.path(name)).json()["entries"]
    assert [entry["name"] for entry in entries] == [None, *(s.name.decode() for s in image.snapshots)]
    expected = [image.active, *(snapshot.content for snapshot in image.snapshots)]
    assert [(entry["size"], entry["digests"]["sha256"], entry["digests"]["crc32c"]) for entry in entries] == [
        (content.size, content.sha256, content.crc32c) for content in expected
    ]


def test_the_table_for_people_has_the_same_hashes(library: Library, run: Run) -> None:
    image = library.images["demo"]
    heading, *lines = run("digest", library.path("demo")).stdout.splitlines()
    assert heading.split() == ["ID", "TAG", "SIZE", "SHA256", "CRC32C"]
    assert [line.split()[-1] for line in lines] == [
        c.crc32c for c in (image.active, *(s.content for s in image.snapshots))
    ]
    assert "(active disk)" in lines[0]


def test_one_snapshot_can_be_chosen_or_several_or_the_active_disk(library: Library, run: Run) -> None:
    path = library.path("demo")

    def chosen(*flags: str) -> list[str | None]:
        return [entry["name"] for entry in run("digest", "--json", "-a", "crc32c", *flags, path).json()["entries"]]

    assert chosen("-s", "tuesday") == ["tuesday"]
    assert chosen("-s", "id=3", "-s", "monday") == ["before-upgrade", "monday"]
    assert chosen("--active") == [None]
    assert chosen("--active", "-s", "monday") == [None, "monday"]


def test_other_hashes_can_be_asked_for(new_image: NewImage, run: Run) -> None:
    image = new_image("1M").write(0, 100_000).snapshot("first")
    data = image.reference("first").read()
    (entry,) = run("digest", "--json", "-s", "first", "-a", "md5", "-a", "sha512", image.path).json()["entries"]
    assert entry["digests"] == {"md5": hashlib.md5(data).hexdigest(), "sha512": hashlib.sha512(data).hexdigest()}


@pytest.mark.parametrize("algorithm", ["sha257", "shake_128", ""])
def test_an_unknown_hash_is_told_before_anything_is_read(library: Library, run: Run, algorithm: str) -> None:
    said = complaint(run("digest", "-a", algorithm, library.path("demo")))
    assert repr(algorithm) in said
    assert "sha256" in said


# Manifests


@pytest.mark.parametrize("name", ["demo", "names", "name-equals-id", "ids", "size-zero"])
def test_what_was_recorded_is_verified(library: Library, run: Run, tmp_path: Path, name: str) -> None:
    path, manifest = library.path(name), tmp_path / "manifest.json"
    assert run("digest", "--manifest", manifest, path).returncode == 0
    result = run("digest", "--verify", manifest, path)
    assert (result.returncode, result.stderr) == (0, "")
    assert [line.endswith(": OK") for line in result.stdout.splitlines()] == [True] * (
        1 + len(library.images[name].snapshots)
    )


def test_the_manifest_is_what_json_prints(library: Library, run: Run, tmp_path: Path) -> None:
    printed = run("digest", "--json", "-o", tmp_path / "m", library.path("demo")).json()
    assert json.loads((tmp_path / "m").read_text()) == printed


def test_a_changed_byte_is_told_with_the_states_that_have_it(new_image: NewImage, run: Run, tmp_path: Path) -> None:
    image = new_image("1M", cluster_size=65536).write(0, 65536).snapshot("old").write(65536, 65536).snapshot("new")
    run("digest", "-o", tmp_path / "m", image.path)
    offset = 70_000  # in the second cluster
    last = next(entry for entry in qemu_map(image.path) if entry["start"] + entry["length"] == 131_072)
    patch(image.path, last["offset"] + offset - last["start"], b"!")
    result = run("digest", "--verify", tmp_path / "m", image.path)
    assert result.returncode == 1
    told = dict(line.split(": ") for line in result.stdout.splitlines())
    assert told == {"old": "OK", "new": "sha256, crc32c differ", "(active disk)": "sha256, crc32c differ"}


def test_a_disk_that_grew_and_a_snapshot_that_is_gone_are_told(new_image: NewImage, run: Run, tmp_path: Path) -> None:
    image = new_image("1M").snapshot("kept").snapshot("lost")
    run("digest", "-o", tmp_path / "m", image.path)
    image.resize("2M").delete("lost")
    result = run("digest", "--verify", tmp_path / "m", image.path)
    assert result.returncode == 1
    lines = result.stdout.splitlines()
    assert "kept: OK" in lines
    assert "(active disk): size is 2097152, was 1048576" in lines
    assert any(line.startswith("lost: ") and "no snapshot" in line for line in lines)


def test_only_a_chosen_snapshot_is_verified(new_image: NewImage, run: Run, tmp_path: Path) -> None:
    image = new_image("1M").snapshot("kept")
    run("digest", "-o", tmp_path / "m", image.path)
    image.write(0, 512)
    assert run("digest", "--verify", tmp_path / "m", image.path).returncode == 1
    assert run("digest", "--verify", tmp_path / "m", "-s", "kept", image.path) == Result("kept: OK\n", "", 0)


def test_a_chosen_snapshot_that_the_manifest_does_not_have_is_not_passed_over(
    new_image: NewImage, run: Run, tmp_path: Path
) -> None:
    image = new_image("1M").snapshot("old")
    run("digest", "-o", tmp_path / "m", image.path)
    image.snapshot("new")
    result = run("digest", "--verify", tmp_path / "m", "-s", "new", image.path)
    assert result.returncode == 1
    assert "new" in result.stdout + result.stderr


@pytest.mark.parametrize("content", ["", "{}", "[]", "null", '{"format": "qcow2snap-manifest", "version": 1}', "\0"])
def test_what_is_no_manifest_is_refused(library: Library, run: Run, tmp_path: Path, content: str) -> None:
    (tmp_path / "m").write_text(content)
    assert "is no manifest" in complaint(run("digest", "--verify", tmp_path / "m", library.path("demo")))


@pytest.mark.parametrize("content", [b"\xff\xfe", b'{"a": "\xff"}'])
def test_a_manifest_that_is_no_text_is_refused(library: Library, run: Run, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m").write_bytes(content)
    assert "is no manifest" in complaint(run("digest", "--verify", tmp_path / "m", library.path("demo")))


@pytest.mark.parametrize("digests", [{"sha257": "00"}, {"sha256": None}, {"sha256": ["00"]}])
def test_a_manifest_with_odd_digests_gives_no_traceback(
    library: Library, run: Run, tmp_path: Path, digests: dict[str, object]
) -> None:
    entry = {"id": None, "name": None, "size": library.images["demo"].active.size, "digests": digests}
    content = {"format": "qcow2snap-manifest", "version": 1, "entries": [entry]}
    (tmp_path / "m").write_text(json.dumps(content))
    result = run("digest", "--verify", tmp_path / "m", library.path("demo"))
    assert result.returncode == 1
    assert "Traceback" not in result.stderr


def test_a_manifest_is_never_written_over_the_image(library: Library, run: Run, tmp_path: Path) -> None:
    image = Path(shutil.copyfile(library.path("demo"), tmp_path / "disk.qcow2"))
    before = image.read_bytes()
    result = run("digest", "--manifest", image, image)
    assert image.read_bytes() == before
    assert "disk.qcow2" in complaint(result)


def test_a_manifest_to_a_pipe_goes_through_it(library: Library, run: Run, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    try:
        assert run("digest", "-s", "monday", "-o", tmp_path / "pipe", library.path("demo")).returncode == 0
        assert stat.S_ISFIFO(os.stat(tmp_path / "pipe").st_mode)
        assert json.loads(os.read(reader, 65536))["entries"][0]["name"] == "monday"
    finally:
        os.close(reader)


def test_damage_is_an_error_and_leaves_no_manifest(library: Library, run: Run, tmp_path: Path) -> None:
    said = complaint(run("digest", "-o", tmp_path / "m", library.path("l2-beyond-end")))
    assert "QCOW2-L2-002" in said
    assert contents(tmp_path) == []


def test_a_manifest_that_cannot_be_written_is_told(library: Library, run: Run, tmp_path: Path) -> None:
    assert "No such file" in complaint(run("digest", "-o", tmp_path / "none" / "m", library.path("demo")))
