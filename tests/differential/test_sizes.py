"""Where other tools give a snapshot the wrong size, the wrong end or the wrong name; each case was met with QEMU."""

from __future__ import annotations

import pytest

import qcow2snap
from tests.cli.support import here
from tests.conftest import NewImage
from tests.differential import judge
from tests.support import Image, Reference, qemu_img, read_table

KIB, MIB = 1 << 10, 1 << 20

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

each_cluster = pytest.mark.parametrize("cluster", [512, 4 * KIB, 64 * KIB], ids="cluster={}".format)


def content(disk: qcow2snap.Disk) -> bytes:
    with disk.open() as file:
        data = file.readall()
    assert data is not None
    return data


# The disk is larger or smaller than the snapshot


@each_cluster
def test_a_snapshot_larger_than_the_disk_is_not_cut_off(new_image: NewImage, cluster: int) -> None:
    image = new_image("1M", cluster_size=cluster).write(0, 64 * KIB).snapshot("small")
    image.resize("2M").write(2 * MIB - 64 * KIB, 64 * KIB).snapshot("big").revert("small")
    with qcow2snap.open(image.path) as opened:
        assert opened.size == MIB
        assert opened.snapshot("big").size == 2 * MIB
        assert content(opened.snapshot("big")) == image.reference("big").read()


@each_cluster
def test_a_snapshot_smaller_than_the_disk_ends_where_it_ended(new_image: NewImage, cluster: int) -> None:
    image = new_image("1M", cluster_size=cluster).write(MIB - 64 * KIB, 64 * KIB).snapshot("small").resize("2M")
    image.write(MIB, MIB)
    with qcow2snap.open(image.path) as opened:
        assert opened.snapshot("small").size == MIB
        assert content(opened.snapshot("small")) == image.reference("small").read()


@each_cluster
def test_a_grown_disk_shows_nothing_of_the_backing_file_past_the_end_of_a_snapshot(
    new_image: NewImage, cluster: int
) -> None:
    base = new_image("2M", name="base.qcow2").write(0, 2 * MIB, 0xEE)
    image = new_image("1M", backing=base, cluster_size=cluster).snapshot("short").resize("2M")
    with qcow2snap.open(image.path) as opened:
        assert content(opened.snapshot("short")) == b"\xee" * MIB
        assert content(opened.active) == b"\xee" * MIB + bytes(MIB)


def test_reading_past_the_end_of_a_snapshot_is_an_error(new_image: NewImage) -> None:
    image = new_image("1M").snapshot("small").resize("2M")
    with qcow2snap.open(image.path) as opened, pytest.raises(qcow2snap.Qcow2SnapError):
        opened.snapshot("small").node.pread(MIB - 512, 1024)


def test_a_snapshot_keeps_its_size_when_the_disk_is_shrunk(new_image: NewImage) -> None:
    image = new_image("2M").write(MIB, 64 * KIB).snapshot("big").resize("1M")
    with qcow2snap.open(image.path) as opened:
        judge.disk_holds(opened.snapshot("big"), image.reference("big"))


def test_each_snapshot_has_the_size_of_its_moment(new_image: NewImage) -> None:
    image = new_image("1M")
    for megabytes in (3, 2, 5, 1):
        image.resize(f"{megabytes}M").write(megabytes * MIB - 4096, 4096).snapshot(f"of {megabytes} MiB")
    with qcow2snap.open(image.path) as opened:
        assert [s.size // MIB for s in opened.snapshots] == [3, 2, 5, 1]
    judge.image_holds(image)


# The VM state, which lies behind the end of the disk


@each_cluster
def test_a_grown_disk_does_not_turn_the_vm_state_into_guest_data(new_image: NewImage, cluster: int) -> None:
    image = new_image("1M", cluster_size=cluster).write(0, 4096).savevm("running", memory={0x1000: 0xC0FFEE})
    state = image.vm_state("running")
    image.resize("4M").write(2 * MIB, 4096)
    assert state.startswith(b"QEVM")
    with qcow2snap.open(image.path) as opened:
        running = opened.snapshot("running")
        assert content(running) == image.reference("running").read()
        assert b"QEVM" not in content(opened.active)
        with running.open_vm_state() as file:
            assert file.readall() == state


def test_the_vm_state_is_found_by_the_size_of_its_snapshot(new_image: NewImage) -> None:
    image = new_image("32K", cluster_size=512).savevm("first").resize("256K").write(0, 4096).savevm("second")
    image.resize("48K").write(0, 512)
    with qcow2snap.open(image.path) as opened:
        for name in ("first", "second"):
            with opened.snapshot(name).open_vm_state() as file:
                assert file.readall() == image.vm_state(name)


def test_without_a_vm_state_there_is_none_to_open(new_image: NewImage) -> None:
    image = new_image("1M").snapshot("disk only")
    with qcow2snap.open(image.path) as opened, pytest.raises(qcow2snap.SnapshotNotFound):
        opened.snapshot("disk only").open_vm_state()


# Names


def test_a_word_that_is_one_snapshots_id_and_anothers_name_is_ambiguous(new_image: NewImage) -> None:
    image = new_image("1M").snapshot("weekly").snapshot("1")
    with qcow2snap.open(image.path) as opened:
        with pytest.raises(qcow2snap.SnapshotAmbiguous, match="weekly"):
            opened.snapshot("1")
        assert opened.snapshot("id=1").name == "weekly"
        assert opened.snapshot("name=1").id == "2"


def test_a_name_borne_by_two_is_ambiguous_and_an_id_is_not(new_image: NewImage) -> None:
    image = new_image("1M").write(0, 4096).snapshot("dup").write(0, 4096).snapshot("dup")
    with qcow2snap.open(image.path) as opened:
        for ref in ("dup", "name=dup"):
            with pytest.raises(qcow2snap.SnapshotAmbiguous):
                opened.snapshot(ref)
        for reference in image.references:
            judge.disk_holds(opened.snapshot(f"id={reference.id},name=dup"), reference)


# Damage that makes other tools give up all snapshots


def cut_before_table(new_image: NewImage) -> tuple[Image, Reference]:
    """A file that ends within its snapshot table: after the first entry of two."""
    image = new_image("1M").write(0, 128 * KIB).snapshot("first").write(0, 64 * KIB).snapshot("second")
    second = image.entries[1]
    with image.path.open("r+b") as file:
        file.truncate(second.host_offset + 8)
    return image, image.reference("first")


def test_a_cut_snapshot_table_gives_the_entries_that_are_left(new_image: NewImage) -> None:
    image, first = cut_before_table(new_image)
    with qcow2snap.open(image.path) as opened:
        assert [snapshot.name for snapshot in opened.snapshots] == ["first"]
        judge.disk_holds(opened.snapshot("first"), first)
    result = here("list", image.path)
    assert (result.returncode, "first" in result.stdout) == (1, True)


def test_a_damaged_image_is_not_written(new_image: NewImage) -> None:
    """Where `qemu-img check -r` punches out the data of snapshots whose entries it cannot read."""
    image, first = cut_before_table(new_image)
    before = image.path.read_bytes(), image.path.stat().st_mtime_ns
    for command in (["list"], ["info"], ["map"], ["map", "-s", "first"]):
        here(*command, image.path)
    with qcow2snap.open(image.path) as opened:
        judge.disk_holds(opened.snapshot("first"), first)
    assert (image.path.read_bytes(), image.path.stat().st_mtime_ns) == before


# What QEMU itself does here, so that we notice when it changes


def test_qemu_img_converts_a_snapshot_with_the_size_of_the_active_disk(new_image: NewImage) -> None:
    image = new_image("1M").snapshot("small").resize("2M")
    raw = image.path.with_suffix(".raw")
    qemu_img("convert", "-l", "snapshot.name=small", "-O", "raw", image.path, raw)
    assert read_table(image.path)[0].disk_size == MIB
    assert raw.stat().st_size == 2 * MIB
