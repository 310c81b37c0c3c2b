"""`qcow2snap.open()`: images and snapshots as a Python program meets them."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

import qcow2snap
from tests.conftest import NewImage
from tests.support import Library, ToolFailed, qemu_img, qemu_io

MIB = 1 << 20


def test_an_image_knows_its_snapshots_in_the_order_of_the_table(library: Library) -> None:
    with qcow2snap.open(library.path("demo")) as image:
        assert image.size == image.active.size == 4 * MIB
        assert [(snapshot.id, snapshot.name, snapshot.size) for snapshot in image.snapshots] == [
            ("1", "monday", MIB),
            ("2", "tuesday", 3 * MIB),
            ("3", "before-upgrade", 2 * MIB),
        ]


def test_a_snapshot_tells_what_qemu_img_tells(library: Library) -> None:
    path = library.path("demo")
    theirs = qemu_img("info", "--output=json", path).json()["snapshots"]
    with qcow2snap.open(path) as image:
        for snapshot, their in zip(image.snapshots, theirs, strict=True):
            assert (snapshot.id, snapshot.name) == (their["id"], their["name"])
            assert (snapshot.date_sec, snapshot.date_nsec) == (their["date-sec"], their["date-nsec"])
            assert snapshot.vm_clock_nsec == their["vm-clock-sec"] * 10**9 + their["vm-clock-nsec"]
            assert snapshot.vm_state_size == their["vm-state-size"]
            assert snapshot.icount == their.get("icount")


@pytest.mark.parametrize("ref", ["tuesday", "2", "name=tuesday", "id=2", "id=2,name=tuesday", "snapshot.name=tuesday"])
def test_a_snapshot_is_found_by_name_id_or_both(library: Library, ref: str) -> None:
    with qcow2snap.open(library.path("demo")) as image:
        assert image.snapshot(ref).name == "tuesday"


def test_a_name_may_be_given_as_text_or_path(library: Library) -> None:
    path = library.path("demo")
    for name in (path, str(path)):
        with qcow2snap.open(name) as image:
            assert len(image.snapshots) == 3


def test_a_name_that_is_not_utf8_comes_as_python_has_file_names(library: Library) -> None:
    with qcow2snap.open(library.path("names")) as image:
        (name,) = (snapshot.name for snapshot in image.snapshots if snapshot.id == "3")
        assert name.encode(errors="surrogateescape") == b"\xff\xfe latin"
        assert image.snapshot(name).id == "3"


def test_a_snapshot_shows_itself_with_name_id_and_size(library: Library) -> None:
    with qcow2snap.open(library.path("demo")) as image:
        assert repr(image.snapshot("monday")) == "<Snapshot id='1' name='monday' size=1048576>"


def test_extents_cover_the_snapshot_and_say_where_bytes_need_not_be_read(new_image: NewImage) -> None:
    path = new_image("1M").write(65536, 65536).snapshot("s").resize("2M").path
    with qcow2snap.open(path) as image:
        extents = list(image.snapshot("s").extents())
        assert [(e.offset, e.length, e.must_read) for e in extents] == [
            (0, 65536, False),
            (65536, 65536, True),
            (131072, MIB - 131072, False),
        ]
        (part,) = image.snapshot("s").extents(70000, 1000)
        assert (part.offset, part.length) == (70000, 1000)


# Errors


def test_errors_have_one_root_and_kinds_to_tell_them_apart(library: Library, tmp_path: Path) -> None:
    with qcow2snap.open(library.path("name-equals-id")) as image:
        with pytest.raises(qcow2snap.SnapshotNotFound, match="no snapshot"):
            image.snapshot("nowhere")
        with pytest.raises(qcow2snap.SnapshotAmbiguous, match="say id=2 or name=2"):
            image.snapshot("2")
    with pytest.raises(qcow2snap.Qcow2SnapError, match="No such file"):
        qcow2snap.open(tmp_path / "nothing")
    (tmp_path / "raw").write_bytes(bytes(4096))
    with pytest.raises(qcow2snap.ImageFormatError, match="not a qcow2 image") as caught:
        qcow2snap.open(tmp_path / "raw")
    assert (caught.value.rule, caught.value.host_offset) == ("QCOW2-HDR-001", 0)
    for kind in (qcow2snap.ImageFormatError, qcow2snap.SnapshotNotFound, qcow2snap.ImageInUse):
        assert issubclass(kind, qcow2snap.Qcow2SnapError)


@pytest.mark.parametrize("name", ["FileError", "ReferenceRefused", "OutOfRange", "ImageInUse", "UnsupportedFeature"])
def test_every_error_that_opening_and_reading_raise_can_be_caught_by_name(name: str) -> None:
    assert issubclass(getattr(qcow2snap, name), qcow2snap.Qcow2SnapError)


def test_damage_says_which_bytes_of_the_guest_it_costs(library: Library) -> None:
    with qcow2snap.open(library.path("l2-unaligned")) as image, image.active.open() as file:
        with pytest.raises(qcow2snap.ImageFormatError, match="QCOW2-L2-003") as caught:
            file.read(65536)
        assert caught.value.guest_range == (0, 4096)
        assert caught.value.host_offset == 0xF000
        assert caught.value.filename == str(library.path("l2-unaligned"))


@pytest.mark.parametrize("name", ["luks", "aes"])
def test_encrypted_images_open_and_list_but_do_not_read(library: Library, name: str) -> None:
    with qcow2snap.open(library.path(name)) as image:
        assert [snapshot.name for snapshot in image.snapshots] == ["sealed"]
        with image.snapshot("sealed").open() as file, pytest.raises(qcow2snap.UnsupportedFeature, match="encrypted"):
            file.read(512)


def test_a_snapshot_without_a_vm_state_says_so(library: Library) -> None:
    with qcow2snap.open(library.path("demo")) as image, pytest.raises(qcow2snap.SnapshotNotFound, match="no VM state"):
        image.snapshot("monday").open_vm_state()


# Warnings


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("dirty", "marked dirty"),
        ("corrupt", "marked corrupt"),
        ("cut-in-table", "1 of 2 snapshots cannot be read"),
    ],
)
def test_what_may_not_be_trusted_is_opened_with_a_warning(library: Library, name: str, said: str) -> None:
    path = library.path(name)
    with pytest.warns(UserWarning, match=said) as caught, qcow2snap.open(path) as image:
        assert image.snapshots
    assert str(path) in str(caught[0].message)
    assert caught[0].filename == __file__  # whoever called open()


def test_a_sound_image_gives_no_warning(library: Library) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        qcow2snap.open(library.path("demo")).close()


# Others who use the image


def test_an_open_image_is_locked_against_qemu_writing_it_and_shared_with_its_readers(new_image: NewImage) -> None:
    path = new_image("1M").snapshot("s").path
    with qcow2snap.open(path), qcow2snap.open(path):
        with pytest.raises(ToolFailed, match="lock"):
            qemu_io(path, "write 0 512")
        qemu_img("info", path)
        qemu_io(path, "read 0 512", options=("-r",))
    qemu_io(path, "write 0 512")


def test_one_opened_with_force_share_is_not(new_image: NewImage) -> None:
    path = new_image("1M").write(0, 65536).snapshot("s").path
    with qcow2snap.open(path, force_share=True) as image:
        qemu_io(path, "write -P 0x55 0 512")
        with image.snapshot("s").open() as file:
            assert file.read(16) == b"000000000000000\n"


def test_a_failed_open_leaves_no_file_open(library: Library) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    for name in ("header-magic", "backing-missing", "backing-loop", "header-data-file-unnamed"):
        with pytest.raises(qcow2snap.Qcow2SnapError):
            qcow2snap.open(library.path(name))
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_close_closes_all_files_of_the_chain_and_may_be_repeated(library: Library) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    image = qcow2snap.open(library.path("backing-chain"))
    assert len(list(Path("/proc/self/fd").iterdir())) == before + 4
    image.close()
    image.close()
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_an_image_is_followed_outside_its_directory_only_where_that_is_allowed(
    new_image: NewImage, tmp_path: Path
) -> None:
    (tmp_path / "images").mkdir()
    base = new_image("1M", name="base.qcow2").write(0, 65536)
    path = new_image("1M", name="images/disk.qcow2", backing=base).snapshot("s").path
    with pytest.raises(qcow2snap.Qcow2SnapError, match=r"base\.qcow2"):
        qcow2snap.open(path)
    with qcow2snap.open(path, allow_paths=[str(tmp_path)]) as image, image.snapshot("s").open() as file:
        assert file.read(16) == b"000000000000000\n"
    with qcow2snap.open(path, allow_paths=[tmp_path]) as image:
        assert image.size == MIB
