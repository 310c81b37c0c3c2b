"""What a snapshot uses is what really deleting it with qemu-img gives back, to the cluster."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings

import qcow2snap
from qcow2snap.conformance import usage as usage_module
from qcow2snap.conformance.usage import ImageUsage, Usage
from tests.cli.support import here
from tests.conformance.refcounts import refcounts
from tests.conftest import NewImage
from tests.differential.judge import reverted
from tests.differential.test_random_images import Plan, plans
from tests.support import Library, Result, copy_with_holes, qemu_img, read_table
from tests.support.table import cluster_size, field, patch

Run = Callable[..., Result]
LIBRARY = Library(Path())
DELETIONS = 8  # of one image; each takes a process
QEMU_NAME_LIMIT = 255  # bytes; qemu-img finds no snapshot by a longer name
# qemu-img does not write these: encrypted, and marked corrupt.
REFUSED = {"luks", "aes", "corrupt"}
SLOW = {"cluster-2M"}  # as cluster-256k
SOUND = [name for name, image in LIBRARY.images.items() if name not in REFUSED | SLOW and image.snapshots]

pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning")]


@contextmanager
def copy_of(path: Path) -> Iterator[Path]:
    copy = copy_with_holes(path, path.with_name(f"{path.name}.copy"))
    try:
        yield copy
    finally:
        copy.unlink()


def measured(path: Path) -> ImageUsage:
    with qcow2snap.open(path) as image:
        return image.usage()


def allocated(path: Path) -> int:
    """How many host clusters have a refcount that is not 0. Refcount blocks are left out: QEMU never frees one."""
    start, length = field(path, 48), field(path, 56, 4) * cluster_size(path)
    table = path.read_bytes()[start : start + length]
    return len(refcounts(path)) - sum(any(table[index : index + 8]) for index in range(0, len(table), 8))


def deletions_agree(path: Path) -> int:
    """Each snapshot is deleted from a copy, then all of them. Returns how many could be, by their names alone."""
    usage, unit, before = measured(path), cluster_size(path), allocated(path)
    entries = read_table(path)
    deleted = 0
    for index, (entry, expected) in enumerate(zip(entries, usage.snapshots, strict=True)):
        is_found = index == [other.name for other in entries].index(entry.name) and len(entry.name) <= QEMU_NAME_LIMIT
        if is_found and deleted < DELETIONS:
            with copy_of(path) as copy:
                if qemu_img("snapshot", "-d", entry.name, copy, check=False).returncode == 0:
                    deleted += 1
                    assert expected is not None
                    assert (before - allocated(copy)) * unit == expected.used, entry.name
    with copy_of(path) as copy:
        done = [qemu_img("snapshot", "-d", entry.name, copy, check=False).returncode for entry in entries]
        if not any(done):
            after = allocated(copy)
            assert (before - after) * unit == usage.by_snapshots
            assert usage.active is not None
            if not has_bitmaps(copy):
                assert usage.active.refer // unit == after - 1 - field(copy, 56, 4)  # header, refcount table
    return deleted


def references_agree(path: Path) -> None:
    """A copy that is reverted to a snapshot and has lost all of them holds what the snapshot refers to, and no more.

    The L1 tables are left out, since reverting never makes the active one smaller; the snapshot table is gone.
    """
    usage, unit = measured(path), cluster_size(path)
    for entry, expected in zip(read_table(path), usage.snapshots, strict=True):
        assert expected is not None
        assert expected.refer == expected.shared + expected.used
        with reverted(path, entry.id) as copy:
            if copy is None:
                continue
            names = [each.name for each in read_table(copy)]
            if any(qemu_img("snapshot", "-d", name, copy, check=False).returncode for name in names):
                continue
            fixed = 1 + field(copy, 56, 4) + clusters(8 * field(copy, 36, 4), unit)  # header, refcount table, L1 table
            table = clusters(sum(len(each.build()) for each in read_table(path)), unit) if len(names) == 1 else 0
            assert expected.refer // unit - table - clusters(8 * entry.l1_size, unit) == allocated(copy) - fixed


def has_bitmaps(path: Path) -> bool:
    return bool(field(path, 4, 4) >= 3 and field(path, 88) & 1)


def clusters(nbytes: int, unit: int) -> int:
    return -(-nbytes // unit)


# Against real deletion


@pytest.mark.parametrize("name", SOUND)
def test_deleting_a_snapshot_gives_back_what_it_uses(library: Library, name: str) -> None:
    with copy_of(library.path(name)) as path:
        if field(path, 72) & 1:  # marked dirty: its refcounts are wrong until it is repaired
            qemu_img("check", "-q", "-r", "all", path, check=False)
        assert deletions_agree(path) > 0


@pytest.mark.parametrize("name", ["sound", "compressed-mixed", "extended-l2-16k", "grown", "vm-state", "cluster-512"])
def test_a_snapshot_refers_to_what_is_left_where_it_is_all_there_is(library: Library, name: str) -> None:
    references_agree(library.path(name))


@pytest.mark.parametrize("name", [name for name in SOUND if len(LIBRARY.images[name].snapshots) == 1])
def test_two_states_share_the_same_with_each_other(library: Library, name: str) -> None:
    usage = measured(library.path(name))
    assert usage.active is not None
    assert [each.shared for each in usage.snapshots if each] == [usage.active.shared]


def test_compressed_clusters_that_two_tables_share_a_host_cluster_for_count_once(new_image: NewImage) -> None:
    """An L2 table of clusters of 512 bytes maps 32 KiB; what is written at its end and at the next start is packed."""
    image = new_image("256k", cluster_size=512)
    for offset in range(24 << 10, 104 << 10, 512):
        image.write(offset, 512, 0x11, compressed=True)
    image.snapshot("packed").write(40 << 10, 512, 0x22).write(120 << 10, 9 << 10, 0x33, compressed=True)
    image.snapshot("again")
    image.discard(0, 128 << 10).write(0, 512)
    references_agree(image.path)
    assert deletions_agree(image.path) == 2


def test_a_snapshot_table_that_gets_shorter_counts(new_image: NewImage) -> None:
    image = new_image("64k", cluster_size=512)
    for number in range(6):
        image.snapshot(f"{number}" * 150)
    assert deletions_agree(image.path) == 6
    used = [each.used for each in measured(image.path).snapshots if each]
    assert len(set(used)) == 1
    only = new_image("64k", cluster_size=512).snapshot("only")
    assert measured(only.path).snapshots == (Usage(1024, 0, 1024),)


EXAMPLES = settings(deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)


@settings(EXAMPLES, max_examples=10, derandomize=True)
@given(plans())
def test_random_images_use_what_deleting_gives_back(plan: Plan) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = plan.build(Path(directory)).path
        deletions_agree(path)
        references_agree(path)


# However it is counted


@pytest.mark.parametrize("name", ["many", "compressed-mixed", "vm-state-grown", "zlib-512", "sound"])
def test_the_size_of_the_window_changes_nothing(library: Library, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = library.path(name)
    expected = measured(path)
    monkeypatch.setattr(usage_module, "_WINDOW", 5)
    assert measured(path) == expected


def test_clusters_too_far_apart_to_be_counted_are_an_error(
    library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = copy_with_holes(library.path("sound"), tmp_path / "wide.qcow2")
    monkeypatch.setattr(usage_module, "_MAX_WINDOWS", 4)
    monkeypatch.setattr(usage_module, "_WINDOW", 5)
    result = here("list", "--usage", path)
    assert (result.returncode, result.stdout) == (1, "")
    assert "too far apart" in result.stderr


# How it is told


def test_list_shows_it_as_zfs_does(library: Library, run: Run) -> None:
    result = run("list", "--usage", library.path("demo"))
    assert [line.split("  ")[:1] + line.split()[2:8] for line in result.stdout.splitlines()[1:]] == [
        ["1", "12", "KiB", "56", "KiB", "44", "KiB"],
        ["2", "16", "KiB", "64", "KiB", "48", "KiB"],
        ["3", "76", "KiB", "132", "KiB", "56", "KiB"],
    ]
    assert result.stdout.split()[:5] == ["ID", "TAG", "USED", "REFER", "SHARED"]


def test_json_has_bytes(library: Library, run: Run) -> None:
    path = library.path("demo")
    listed = run("list", "--usage", "--json", path).json()
    assert [(each["used"], each["refer"], each["shared"]) for each in listed] == [
        (usage.used, usage.refer, usage.shared) for usage in measured(path).snapshots if usage
    ]
    assert [each.keys() - {"used", "refer", "shared"} for each in listed] == [
        each.keys() for each in run("list", "--json", path).json()
    ]


def test_info_adds_the_active_disk_and_all_snapshots_together(library: Library, run: Run) -> None:
    path = library.path("demo")
    fields = run("info", "--usage", "--json", path).json()
    usage = measured(path)
    assert usage.active is not None
    active = {"used": usage.active.used, "refer": usage.active.refer, "shared": usage.active.shared}
    assert fields["usage"] == {"active": active, "used-by-snapshots": usage.by_snapshots}
    assert [each["used"] for each in fields["snapshots"]] == [each.used for each in usage.snapshots if each]
    assert "used by snapshots: 128 KiB" in run("info", "--usage", path).stdout


def test_without_a_data_file_it_is_told_all_the_same(library: Library, tmp_path: Path, run: Run) -> None:
    path = copy_with_holes(library.path("data-file"), tmp_path / "alone.qcow2")
    assert run("info", "--usage", "--json", path).json()["usage"]["used-by-snapshots"] == 0


def test_a_snapshot_whose_l1_table_is_nowhere_has_none(library: Library, tmp_path: Path, run: Run) -> None:
    path = copy_with_holes(library.path("sound"), tmp_path / "damaged.qcow2")
    first, second = read_table(path)
    patch(path, first.host_offset, (12345).to_bytes(8, "big"))
    listed = run("list", "--usage", "--json", path).json()
    assert [each["refer"] is None for each in listed] == [True, False]
    assert run("list", "--usage", path).stdout.splitlines()[1].split()[2:5] == ["-", "-", "-"]
    assert second.id == b"2"
