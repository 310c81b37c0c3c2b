"""Every shipped image: list, map and content are what QEMU says they are."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

import qcow2snap
from tests.cli.support import here
from tests.differential import judge
from tests.support import FixtureImage, Library, read_table

LIBRARY = Library(Path())  # for the names of the tests; images are unpacked by the fixture of the same name
READABLE = [image for image in LIBRARY.images.values() if image.passphrase is None]
SEALED = [image for image in LIBRARY.images.values() if image.passphrase is not None]

# Snapshots that `qemu-img snapshot -a` cannot revert to, and why.
NOT_REVERTED = {
    "bitmaps": ["1"],  # there are bitmaps
    "corrupt": ["1", "2"],  # the image is read-only
    "unaligned": ["1", "2"],  # sizes that are no multiple of 512
}

COMPARED = 64 << 20  # bytes; larger disks take long to compare byte by byte

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # dirty and corrupt images are announced as such

each_image = pytest.mark.parametrize("image", LIBRARY.images.values(), ids=str)
each_readable = pytest.mark.parametrize("image", READABLE, ids=str)


@each_image
def test_list_is_that_of_qemu_img(image: FixtureImage, library: Library) -> None:
    judge.lists_agree(library.path(image.name))


@each_image
def test_table_is_that_of_the_manifest(image: FixtureImage, library: Library) -> None:
    with qcow2snap.open(library.path(image.name)) as opened:
        assert [
            (s.id.encode(errors="surrogateescape"), s.name.encode(errors="surrogateescape"), s.size, s.vm_state_size)
            for s in opened.snapshots
        ] == [(s.id, s.name, s.content.size, s.vm_state_size) for s in image.snapshots]


@each_readable
def test_map_of_the_active_disk_is_that_of_qemu_img(image: FixtureImage, library: Library) -> None:
    judge.maps_agree(library.path(image.name))


@each_readable
def test_map_of_each_snapshot_is_that_of_qemu_img(image: FixtureImage, library: Library) -> None:
    assert judge.snapshot_maps_agree(library.path(image.name)) == NOT_REVERTED.get(image.name, [])


@pytest.mark.parametrize("image", [image for image in READABLE if image.active.size <= COMPARED], ids=str)
def test_the_differences_of_any_two_states_are_those_of_their_bytes(image: FixtureImage, library: Library) -> None:
    judge.diffs_agree(library.path(image.name))


@each_readable
def test_active_disk_holds_what_qemu_img_read(image: FixtureImage, library: Library) -> None:
    with qcow2snap.open(library.path(image.name)) as opened:
        judge.disk_holds(opened.active, image.active)
        judge.extents_are_true(opened.active)


@each_readable
def test_each_snapshot_holds_what_the_disk_held_when_it_was_taken(image: FixtureImage, library: Library) -> None:
    with qcow2snap.open(library.path(image.name)) as opened:
        for snapshot, expected in zip(opened.snapshots, image.snapshots, strict=True):
            judge.disk_holds(snapshot, expected.content)
            judge.extents_are_true(snapshot)


@each_readable
def test_digests_are_those_of_what_qemu_img_read(image: FixtureImage, library: Library) -> None:
    judge.digests_agree(library.path(image.name), [image.active, *(snapshot.content for snapshot in image.snapshots)])


@each_readable
def test_extract_writes_what_qemu_img_read(image: FixtureImage, library: Library, tmp_path: Path) -> None:
    snapshots = [(f"id={s.id.decode(errors='surrogateescape')}", s.content) for s in image.snapshots]
    judge.extracts_agree(library.path(image.name), [(None, image.active), *snapshots], tmp_path / "raw")


@pytest.mark.parametrize("image", [i for i in READABLE if any(s.vm_state_size for s in i.snapshots)], ids=str)
def test_vm_state_is_what_qemu_reads_after_a_revert(image: FixtureImage, library: Library) -> None:
    with qcow2snap.open(library.path(image.name)) as opened:
        for snapshot, expected in zip(opened.snapshots, image.snapshots, strict=True):
            if expected.vm_state_size:
                with snapshot.open_vm_state() as state:
                    content = state.read()
                assert len(content) == expected.vm_state_size
                assert hashlib.sha256(content).hexdigest() == expected.vm_state_sha256


@pytest.mark.parametrize("image", SEALED, ids=str)
def test_encrypted_content_is_refused_and_nothing_else_is(image: FixtureImage, library: Library) -> None:
    path = library.path(image.name)
    with qcow2snap.open(path) as opened, pytest.raises(qcow2snap.UnsupportedFeature):
        opened.snapshots[0].open().read(1)
    assert here("info", path).returncode == 0


@pytest.mark.parametrize("image", [image for image in LIBRARY.images.values() if image.others], ids=str)
def test_list_needs_no_other_file(image: FixtureImage, library: Library, tmp_path: Path) -> None:
    alone = tmp_path / image.file
    alone.write_bytes(library.path(image.name).read_bytes())
    listed = here("list", "--json", alone).json()
    assert [snapshot["id"].encode() for snapshot in listed] == [entry.id for entry in read_table(alone)]
