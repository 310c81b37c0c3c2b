"""Metadata contexts: QEMU's and libnbd's clients read them as they are, and qemu-nbd says the same of its own."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from formats import nbd
from formats.nbd import CommandFlag, OptionType, ReplyType
from qcow2snap.block.graph import open_image
from qcow2snap.block.node import Change, ChangedExtent, ChangeTracking, SnapshotInfo
from qcow2snap.nbd import contexts as module
from qcow2snap.nbd.client import Client
from qcow2snap.nbd.contexts import CHANGED_SINCE, DIRTY_BITMAP, Contexts, MetaContext
from qcow2snap.nbd.export import Exports, exports_of
from qcow2snap.nbd.names import SnapshotNames
from qcow2snap.nbd.negotiation import MAX_CONTEXTS, PIECE
from tests.nbd.support import Serve, ZeroNode
from tests.nbd.test_negotiation import Session
from tests.nbd.wire import meta
from tests.support import Image, Library, qemu_img
from tests.support.qemu_nbd import nbdinfo_map, qemu_nbd
from tests.support.table import patch

NewImage = Callable[..., Image]
Offer = Callable[..., str]
KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
QEMU_NAMES = ["base:allocation", "qemu:allocation-depth"]


@pytest.fixture
def offer(serve: Serve) -> Iterator[Offer]:
    """Serve an image; gives the URI of an export by its name."""
    opened = []
    uris: dict[Path, str] = {}

    def uri(path: Path, export: str = "") -> str:
        if path not in uris:
            opened.append(open_image(str(path)))
            uris[path] = str(serve(exports_of(opened[-1])).listeners[0].uri)
        return uris[path].replace(":///?", f":///{export}?")

    yield uri
    for node in opened:
        node.close()


def qemu_dirty(uri: str, context: str) -> list[tuple[int, int]]:
    """Offset and length of what QEMU's client sees dirty, by its x-dirty-bitmap, which shows that as no data."""
    _, _, rest = uri.partition("///")
    export, _, socket = rest.partition("?socket=")
    options = f"driver=nbd,server.type=unix,server.path={socket},export={export},x-dirty-bitmap={context}"
    entries = qemu_img("map", "--output=json", "--image-opts", options).json()
    return [(entry["start"], entry["length"]) for entry in entries if not entry["data"]]


def joined(extents: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Extents of which none begins where another ends."""
    result: list[tuple[int, int]] = []
    for offset, length in extents:
        if result and sum(result[-1]) == offset:
            offset, length = result[-1][0], result[-1][1] + length
            result.pop()
        result.append((offset, length))
    return result


# What changed since a snapshot


@pytest.fixture
def image(new_image: NewImage) -> Image:
    """Three states over a backing file that is shorter, each with another size."""
    base = new_image("3M", name="base.qcow2").write(MIB, MIB)
    made = new_image("8M", backing=base).write(0, 700 * KIB).write(4 * MIB, 320 * KIB, compressed=True)
    made.snapshot("monday").write(64 * KIB, 100 * KIB).write_zeroes(1500 * KIB, 900 * KIB).write(5 * MIB, MIB)
    made.resize("10M").write(9 * MIB, 64 * KIB).snapshot("tuesday")
    return made.discard(0, 512 * KIB).write(4 * MIB, 512).resize("6M")


@pytest.mark.parametrize(
    ("export", "since", "old", "new"),
    [
        ("tuesday", "monday", "monday", "tuesday"),
        ("monday", "tuesday", "tuesday", "monday"),
        ("", "tuesday", "tuesday", None),
        ("", "id=1", "monday", None),
    ],
)
def test_an_older_copy_becomes_the_newer_state_by_what_changed_since(
    image: Image, offer: Offer, tmp_path: Path, export: str, since: str, old: str, new: str | None
) -> None:
    """QEMU's client, as it is, tells what to copy; libnbd's says the same; qemu-img converts what it has to become."""
    uri, context = offer(image.path, export), CHANGED_SINCE + since
    dirty = qemu_dirty(uri, context)
    assert dirty
    assert dirty == [(offset, length) for offset, length, flags in nbdinfo_map(uri, context) if flags == 1]

    expected = (image.active if new is None else image.reference(new)).read()
    copy = bytearray(image.reference(old).read())
    copy = (copy + bytes(max(0, len(expected) - len(copy))))[: len(expected)]
    with Client.connect(uri.replace(f"/{export}?", "/?")) as client:
        client.go(export)
        for offset, length in dirty:
            copy[offset : offset + length] = client.pread(offset, length)
    assert copy == expected
    assert sum(length for _, length in dirty) < len(expected)


def test_an_incremental_copy_with_qemus_tools_alone(new_image: NewImage, offer: Offer, tmp_path: Path) -> None:
    """As a user would do it: Monday's raw copy, QEMU's map of what changed, and qemu-io to copy just that."""
    image = new_image("8M").write(0, 2 * MIB).snapshot("monday").write(MIB, 200 * KIB).write(6 * MIB, 64 * KIB)
    image.snapshot("tuesday").write(0, 8 * MIB)
    uri = offer(image.path, "tuesday")
    backup, expected = tmp_path / "backup.raw", tmp_path / "tuesday.raw"
    qemu_img("convert", "-f", "qcow2", "-O", "raw", "-l", "monday", image.path, backup)
    qemu_img("convert", "-f", "qcow2", "-O", "raw", "-l", "tuesday", image.path, expected)
    assert backup.read_bytes() != expected.read_bytes()
    for offset, length in qemu_dirty(uri, CHANGED_SINCE + "monday"):
        piece = f"driver=raw,offset={offset},size={length},file.driver=nbd"
        _, _, socket = uri.partition("?socket=")
        source = f"{piece},file.server.type=unix,file.server.path={socket},file.export=tuesday"
        target = f"driver=raw,offset={offset},size={length},file.driver=file,file.filename={backup}"
        qemu_img("convert", "-n", "--image-opts", "--target-image-opts", source, target)
    assert backup.read_bytes() == expected.read_bytes()


def test_what_changed_is_what_diff_says(image: Image, offer: Offer) -> None:
    with_sizes = offer(image.path, "tuesday")
    node = open_image(str(image.path))
    for since in ("monday", "tuesday"):
        changes = node.changes(node.find_snapshot(since), node.find_snapshot("tuesday"))
        told = joined([(extent.offset, extent.length) for extent in changes])
        found = [(o, length) for o, length, flags in nbdinfo_map(with_sizes, CHANGED_SINCE + since) if flags]
        assert found == told
    node.close()


def test_a_single_export_can_be_compared_too(image: Image, serve: Serve) -> None:
    node = open_image(str(image.path))
    uri = serve(exports_of(node, snapshot="tuesday")).listeners[0].uri
    with Client.connect(uri) as client:
        assert CHANGED_SINCE + "monday" in client.list_contexts()
    assert nbdinfo_map(str(uri), CHANGED_SINCE + "tuesday") == [(0, 10 * MIB, 0)]
    node.close()


def test_several_contexts_are_told_at_once_and_one_run_of_each_where_one_is_asked_for(
    image: Image, offer: Offer
) -> None:
    wanted = [*QEMU_NAMES, CHANGED_SINCE + "monday", CHANGED_SINCE + "id=2", CHANGED_SINCE + "friday"]
    with Client.connect(offer(image.path)) as client:
        client.go("tuesday", wanted)
        assert client.contexts == {*wanted[:-1]}
        for context in client.contexts:
            runs = client.block_status(0, client.size, context)
            assert sum(length for length, _ in runs) == client.size
            [one] = client.block_status(0, client.size, context, flags=CommandFlag.REQ_ONE)
            assert one == runs[0]


# Names


def names(contexts: Contexts, *queries: str, wildcards: bool = True) -> list[str]:
    return [context.name for context in contexts.matching(queries, wildcards=wildcards)]


class Tracked(ZeroNode, ChangeTracking):
    """A disk of zeros all of which changes, in as many extents as it is told."""

    def __init__(self, size: int, step: int = 4096) -> None:
        super().__init__(size)
        self.step = step
        self.asked: list[tuple[int, int]] = []

    def changes_since(self, since: SnapshotInfo, offset: int, length: int) -> Iterator[ChangedExtent]:
        self.asked.append((offset, length))
        return (ChangedExtent(at, 512, Change.DATA) for at in range(offset, offset + length, self.step))

    def dirty_bitmaps(self) -> Sequence[str]:
        return ["b0", "a:b", "\udcff", "x" * 4096]

    def dirty_extents(self, bitmap: str, offset: int, length: int) -> Iterator[tuple[int, int]]:
        if bitmap not in self.dirty_bitmaps():
            return super().dirty_extents(bitmap, offset, length)
        return iter(())


def snapshots(*table: tuple[str, str]) -> list[SnapshotInfo]:
    return [SnapshotInfo(number, name, MIB, 0, 0, 0, 0, None, at) for at, (number, name) in enumerate(table)]


CONTEXTS = Contexts(Tracked(MIB), SnapshotNames(snapshots(("1", "monday"), ("2", "2"), ("3", "x"), ("4", "x"))))
BITMAPS = [DIRTY_BITMAP + "b0", DIRTY_BITMAP + "a:b"]
SINCE = [CHANGED_SINCE + name for name in ("monday", "2", "id=3", "id=4")]


def test_all_are_listed_where_nothing_is_asked_for() -> None:
    assert [context.name for context in CONTEXTS] == [*QEMU_NAMES, *BITMAPS, *SINCE]


@pytest.mark.parametrize(
    ("queries", "expected"),
    [
        (["base:"], ["base:allocation"]),
        (["qemu:"], ["qemu:allocation-depth", *BITMAPS]),
        (["qemu:dirty-bitmap:"], BITMAPS),
        (["qcow2snap:"], SINCE),
        (["qcow2snap:changed-since:"], SINCE),
        (["qcow2snap:changed-since:monday", "qcow2snap:"], SINCE),
        (["qcow2snap:", "qcow2snap:changed-since:monday", "qcow2snap:changed-since:"], SINCE),
        (["qemu:dirty-bitmap:", "qemu:", "base:"], [*BITMAPS, "qemu:allocation-depth", "base:allocation"]),
        (["qcow2snap:changed-since", "qemu:dirty-bitmap", "qemu:allocation-depth:", ":", "base:x:"], []),
    ],
)
def test_wildcards_mean_all_below_them_each_once(queries: list[str], expected: list[str]) -> None:
    assert names(CONTEXTS, *queries) == expected
    exact = [query for query in dict.fromkeys(queries) if query in expected]
    assert names(CONTEXTS, *queries, wildcards=False) == exact


@pytest.mark.parametrize("ref", ["monday", "id=1", "2", "id=2", "id=3", "id=4"])
def test_a_snapshot_goes_by_the_names_that_are_its_alone(ref: str) -> None:
    assert names(CONTEXTS, CHANGED_SINCE + ref, wildcards=False) == [CHANGED_SINCE + ref]


@pytest.mark.parametrize("ref", ["", "x", "1", "id=", "id=5", "Monday", "name=monday", "monday "])
def test_a_snapshots_name_is_never_guessed(ref: str) -> None:
    assert names(CONTEXTS, CHANGED_SINCE + ref, wildcards=False) == []


def test_a_name_that_is_too_long_behind_the_prefix_gives_way_to_the_id() -> None:
    made = Contexts(Tracked(MIB), SnapshotNames(snapshots(("1", "x" * 4096), ("2", "\udcff"))))
    assert names(made, "qcow2snap:") == [CHANGED_SINCE + "id=1", CHANGED_SINCE + "id=2"]


def test_a_node_that_tracks_nothing_has_no_such_contexts() -> None:
    made = Contexts(ZeroNode(MIB), SnapshotNames(snapshots(("1", "monday"))))
    assert [context.name for context in made] == QEMU_NAMES
    assert names(made, CHANGED_SINCE + "monday", DIRTY_BITMAP + "b0", wildcards=False) == []


def test_a_vm_state_has_no_changes(library: Library) -> None:
    node = open_image(str(library.path("demo")))
    export = exports_of(node).find("vmstate:before-upgrade")
    assert export is not None
    assert [context.name for context in export.contexts] == QEMU_NAMES
    node.close()


# Bounds


def test_65536_snapshots_are_listed_piece_by_piece_and_one_is_found_at_once() -> None:
    table = snapshots(*((str(number), f"snapshot {number}") for number in range(65536)))
    export = exports_of(ZeroNode(MIB)).find("")
    assert export is not None
    export = type(export)("", lambda: Tracked(MIB), snapshots=SnapshotNames(table))
    session = Session(Exports([export]))
    session.option(OptionType.STRUCTURED_REPLY)
    data = meta()
    session.server.receive(struct.pack(">8sII", nbd.IHAVEOPT, OptionType.LIST_META_CONTEXT, len(data)) + data)
    first = session.server.data_to_send()
    assert len(first) < PIECE + 8192
    assert len(first) + len(session.take()) > 65536 * (20 + 4 + len(CHANGED_SINCE))
    query = (CHANGED_SINCE + "snapshot 65535").encode()
    assert session.select(query) == [query]


def test_more_contexts_than_a_reply_should_have_are_refused() -> None:
    table = snapshots(*((str(number), str(number)) for number in range(MAX_CONTEXTS + 1)))
    node = Tracked(MIB)
    session = Session(Exports([type(exports_of(node).find(""))("", lambda: node, snapshots=SnapshotNames(table))]))
    session.option(OptionType.STRUCTURED_REPLY)
    queries = [f"{CHANGED_SINCE}{number}".encode() for number in range(MAX_CONTEXTS + 1)]
    assert session.only(OptionType.SET_META_CONTEXT, meta(*queries)) == ReplyType.ERR_TOO_BIG
    assert session.select(*queries[1:]) == queries[1:]


def changed_since(node: Tracked) -> MetaContext:
    context = Contexts(node, SnapshotNames(snapshots(("1", "monday")))).find(CHANGED_SINCE + "monday")
    assert context is not None
    return context


def test_one_reply_has_so_many_descriptors_and_no_more_is_looked_at() -> None:
    node = Tracked(1 << 50, step=1024)
    found = changed_since(node).descriptors(node, 512, 1 << 49, 1 << 20)
    assert len(found) == module.MAX_DESCRIPTORS
    assert found[:3] == [(512, 1), (512, 0), (512, 1)]
    assert node.asked == [(512, module.FIRST_STEP)]
    assert changed_since(node).descriptors(node, 0, 1 << 49, 1) == [(512, 1)]


def test_extents_that_touch_are_one_run_and_an_end_that_was_not_seen_is_not_told() -> None:
    node = Tracked(1 << 40, step=512)
    assert changed_since(node).descriptors(node, 0, 1 << 40, 8) == [(512 * module.MAX_EXTENTS, 1)]
    assert changed_since(node).descriptors(node, 0, 5120, 8) == [(5120, 1)]


def test_a_reply_ends_when_it_has_taken_long_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a disk that tells nothing before all of a range was looked at, as one that did not change."""
    node, clock = Tracked(1 << 50, step=1 << 60), itertools.count(0, 0.05)
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
    found = changed_since(node).descriptors(node, 512, 1 << 49, 1 << 20)
    assert [asked for _, asked in node.asked] == [module.FIRST_STEP << step for step in (0, 1, 1, 1, 1)]
    assert sum(length for length, _ in found) == sum(asked for _, asked in node.asked)
    assert changed_since(node).descriptors(node, 512, 1024, 1 << 20) == [(512, 1), (512, 0)]


# QEMU's own contexts


@pytest.mark.parametrize("granularity", ["512", "4k", "64k"])
def test_a_dirty_bitmap_is_what_qemu_nbd_says(new_image: NewImage, offer: Offer, granularity: str) -> None:
    image = new_image("40M", cluster_size=512)  # a cluster of bits is 2 MiB of disk, or more
    qemu_img("bitmap", "--add", "-g", granularity, image.path, "b 0")
    for offset, length in ((0, 512), (100 * KIB, 70000 // 512 * 512), (3 * MIB, 5 * MIB), (40 * MIB - 512, 512)):
        image.write_zeroes(offset, length)
    for offset in range(20 * MIB, 22 * MIB, 32 * KIB):
        image.write(offset, 1024)
    uri = offer(image.path)
    found = nbdinfo_map(uri, DIRTY_BITMAP + "b 0")
    assert len(found) > 6
    assert qemu_dirty(uri, DIRTY_BITMAP + "b 0") == [(offset, length) for offset, length, flags in found if flags]
    with qemu_nbd(image.path, "-B", "b 0") as theirs:
        assert nbdinfo_map(theirs, DIRTY_BITMAP + "b 0") == found


def test_a_bitmap_cluster_of_all_ones_need_not_be_stored(new_image: NewImage, offer: Offer) -> None:
    image = new_image("9M", cluster_size=512)
    qemu_img("bitmap", "--add", "-g", "512", image.path, "b")
    image.write(3 * MIB, 512)
    node = open_image(str(image.path))
    table = node._bitmaps()["b"].table_offset
    node.close()
    patch(image.path, table, (1).to_bytes(8, "big"))  # 2 MiB each
    patch(image.path, table + 4 * 8, (1).to_bytes(8, "big"))  # the last, of which half is beyond the disk
    expected = [(0, 2 * MIB, 1), (2 * MIB, MIB, 0), (3 * MIB, 512, 1), (3 * MIB + 512, 5 * MIB - 512, 0)]
    expected += [(8 * MIB, MIB, 1)]
    assert nbdinfo_map(offer(image.path), DIRTY_BITMAP + "b") == expected
    with qemu_nbd(image.path, "-B", "b") as theirs:
        assert nbdinfo_map(theirs, DIRTY_BITMAP + "b") == expected


def test_only_the_active_disk_has_bitmaps_and_only_those_that_can_be_trusted(new_image: NewImage, offer: Offer) -> None:
    image = new_image("4M")
    for name in ("kept", "lost"):
        qemu_img("bitmap", "--add", image.path, name)
    image.snapshot("monday")
    node = open_image(str(image.path))
    patch(image.path, node._bitmaps()["lost"].host_offset + 12, (1).to_bytes(4, "big"))  # in use
    node.close()
    with Client.connect(offer(image.path)) as client:
        assert client.list_contexts("", ["qemu:"]) == ["qemu:allocation-depth", DIRTY_BITMAP + "kept"]
        assert client.list_contexts("monday", ["qemu:"]) == ["qemu:allocation-depth"]
        client.go("", [DIRTY_BITMAP + "lost", DIRTY_BITMAP + "kept"])
        assert client.contexts == {DIRTY_BITMAP + "kept"}


@pytest.mark.parametrize(
    "name", ["backing-chain", "backing-raw-shorter", "backing-raw-longer", "discards", "extended-l2-backed", "sound"]
)
def test_the_depth_of_allocation_is_what_qemu_nbd_says(library: Library, offer: Offer, name: str) -> None:
    path = library.path(name)
    found = nbdinfo_map(offer(path), "qemu:allocation-depth")
    assert all(one[2] != other[2] for one, other in pairwise(found))
    with qemu_nbd(path, "-A") as theirs:
        assert found == nbdinfo_map(theirs, "qemu:allocation-depth")


def test_qemus_client_reads_the_depth(library: Library, offer: Offer) -> None:
    _, _, socket = offer(library.path("backing-chain")).partition("?socket=")
    options = f"driver=nbd,server.type=unix,server.path={socket},x-dirty-bitmap=qemu:allocation-depth"
    entries: list[dict[str, Any]] = qemu_img("map", "--output=json", "--image-opts", options).json()
    assert {entry["data"] for entry in entries} == {True, False}
