"""The names that snapshots get: each means one thing, and what cannot be told apart is not served."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcow2snap.block.node import (
    BlockNode,
    Buffer,
    ChangedExtent,
    Extent,
    SnapshotAccess,
    SnapshotInfo,
    SnapshotNotFound,
)
from qcow2snap.nbd.export import Exports, exports_of
from qcow2snap.nbd.strings import is_string


class TableNode(BlockNode, SnapshotAccess):
    """A disk of 1,000 bytes with a table of snapshots; each reads as its own index."""

    def __init__(self, *snapshots: tuple[str, str] | tuple[str, str, int]) -> None:
        self.size = 1000
        self.table = [
            SnapshotInfo(number, name, 100 + index, state[0] if state else 0, 0, 0, 0, None, index)
            for index, (number, name, *state) in enumerate(snapshots)
        ]

    def snapshots(self) -> Sequence[SnapshotInfo]:
        return self.table

    def preadv(self, offset: int, buffers: Sequence[Buffer]) -> None:
        raise NotImplementedError

    def block_status(self, offset: int, length: int, *, want_zero: bool = True) -> Iterator[Extent]:
        raise NotImplementedError

    def preadv_snapshot(self, snapshot: SnapshotInfo, offset: int, buffers: Sequence[Buffer]) -> None:
        for buffer in buffers:
            buffer[:] = bytes([snapshot.position]) * len(buffer)

    def snapshot_block_status(
        self, snapshot: SnapshotInfo, offset: int, length: int, *, want_zero: bool = True
    ) -> Iterator[Extent]:
        raise NotImplementedError

    def changes(
        self, since: SnapshotInfo | None, state: SnapshotInfo | None, offset: int = 0, length: int | None = None
    ) -> Iterator[ChangedExtent]:
        raise NotImplementedError

    def vm_state(self, snapshot: SnapshotInfo) -> BlockNode:
        node = TableNode()
        node.size = snapshot.vm_state_size
        return node


def names(exports: Exports) -> list[str]:
    return [export.name for export in exports]


def index_of(exports: Exports, name: str) -> int:
    """Which snapshot a name leads to."""
    export = exports.find(name)
    assert export is not None
    return export.node.pread(0, 1)[0]


def test_the_active_disk_is_the_default_and_each_snapshot_has_its_name_and_size() -> None:
    exports = exports_of(TableNode(("1", "monday"), ("2", "tuesday")))
    assert names(exports) == ["", "monday", "tuesday"]
    assert [export.node.size for export in exports] == [1000, 100, 101]
    assert index_of(exports, "tuesday") == index_of(exports, "id=2") == 1


def test_an_image_in_use_has_no_default_export() -> None:
    exports = exports_of(TableNode(("1", "monday")), active=False)
    assert names(exports) == ["monday"]
    assert exports.find("") is None


def test_a_chosen_snapshot_is_the_default_and_the_only_export() -> None:
    exports = exports_of(TableNode(("1", "monday", 77), ("2", "tuesday")), snapshot="monday")
    assert names(exports) == [""]
    assert index_of(exports, "") == 0
    assert exports.find("tuesday") is exports.find("monday") is exports.find("id=1") is None
    with pytest.raises(SnapshotNotFound):
        exports_of(TableNode(("1", "monday")), snapshot="friday")


@pytest.mark.parametrize("name", ["", "\udcff", "x" * 4097, "ä" * 2049, "a\0b", "id=3", "id=7", "vmstate:other"])
def test_a_name_that_cannot_be_shown_or_is_ours_gives_way_to_the_id(name: str) -> None:
    exports = exports_of(TableNode(("7", name), ("3", "other", 5)), active=False)
    assert names(exports) == ["id=7", "other", "vmstate:other"]
    assert index_of(exports, "id=7") == 0
    assert index_of(exports, "id=3") == 1
    state = exports.find("vmstate:other")
    assert state is not None
    assert state.node.size == 5


def test_a_name_borne_by_two_is_nobodys() -> None:
    exports = exports_of(TableNode(("1", "x"), ("2", "x"), ("3", "y")), active=False)
    assert names(exports) == ["id=1", "id=2", "y"]
    assert exports.find("x") is None


def test_an_id_borne_by_two_is_nobodys(caplog: pytest.LogCaptureFixture) -> None:
    exports = exports_of(TableNode(("1", "x"), ("1", "y"), ("1", "y")), active=False)
    assert names(exports) == ["x"]
    assert exports.find("id=1") is None
    assert caplog.text.count("not exported") == 2


def test_the_longest_name_still_leaves_its_vm_state_an_export() -> None:
    exports = exports_of(TableNode(("1", "x" * 4096, 9)), active=False)
    assert names(exports) == ["x" * 4096, "vmstate:id=1"]


@pytest.mark.parametrize(
    "wrong", ["Monday", "monday ", "id=01", "1", "name=monday", "id=1,name=monday", "VMSTATE:monday"]
)
def test_a_name_is_never_guessed(wrong: str) -> None:
    assert exports_of(TableNode(("1", "monday", 5))).find(wrong) is None


NAMES = st.sampled_from(["", "x", "y", "1", "id=1", "id=2", "id=x", "vmstate:x", "vmstate:id=1", "\udcff", "id="])


@given(st.lists(st.tuples(NAMES, NAMES, st.integers(0, 1)), max_size=6))
def test_whatever_the_table_says_no_name_leads_to_the_wrong_snapshot(table: list[tuple[str, str, int]]) -> None:
    exports = exports_of(TableNode(*table))
    listed = names(exports)
    assert len(set(listed)) == len(listed)
    assert all(is_string(name) for name in listed)
    for number, name, _ in table:
        if (export := exports.find(f"id={number}")) is not None:
            assert table[export.node.pread(0, 1)[0]][0] == number
        if name and (export := exports.find(name)) is not None and not name.startswith(("id=", "vmstate:")):
            assert table[export.node.pread(0, 1)[0]][1] == name
