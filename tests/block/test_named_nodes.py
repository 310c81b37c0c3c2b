"""The graph of named nodes by itself: bounds, and requests that hold up a change."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qcow2snap.block.blockdev import named_nodes
from qcow2snap.block.blockdev.backend import BlockBackend
from qcow2snap.block.blockdev.drivers import all_drivers
from qcow2snap.block.blockdev.named_nodes import Graph
from qcow2snap.block.blockdev.options import BLOCKDEV_OPTIONS
from qcow2snap.block.node import InvalidOption, NotSupported, OutOfRange, SnapshotGone
from qcow2snap.block.null import NullNode


@pytest.fixture
def graph() -> Iterator[Graph]:
    made = Graph(all_drivers())
    yield made
    made.close()


def add(graph: Graph, driver: str, name: str, **options: Any) -> None:
    graph.add(BLOCKDEV_OPTIONS.read({"driver": driver, "node-name": name, **options}, "", strings=False))


def test_nodes_are_not_piled_up_for_ever(graph: Graph) -> None:
    add(graph, "null-co", "n1", size=4096)
    for number in range(2, named_nodes.MAX_DEPTH + 1):
        add(graph, "raw", f"n{number}", file=f"n{number - 1}")
    with pytest.raises(NotSupported, match="above each other"):
        add(graph, "raw", "one-more", file=f"n{named_nodes.MAX_DEPTH}")
    assert len([*graph]) == named_nodes.MAX_DEPTH
    add(graph, "null-co", "other", size=4096)
    add(graph, "raw", "above", file="other")
    with pytest.raises(NotSupported, match="above each other"):
        graph.replace_child("above", "file", f"n{named_nodes.MAX_DEPTH}")
    assert graph.get("above").children["file"].child is graph.get("other")


def test_options_are_not_nested_for_ever() -> None:
    options: dict[str, Any] = {"driver": "null-co"}
    for _ in range(200):
        options = {"driver": "raw", "file": options}
    with pytest.raises(InvalidOption, match="nested too deeply"):
        BLOCKDEV_OPTIONS.read({"node-name": "n", **options}, "", strings=False)


def test_a_change_that_requests_hold_up_for_too_long_is_given_up(
    graph: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(named_nodes, "DRAIN_TIMEOUT", 0.05)
    for name in ("disk", "temp"):
        (tmp_path / name).write_bytes(bytes(65536))
        add(graph, "file", name, filename=str(tmp_path / name))
    add(graph, "raw", "top", file="disk")
    root = graph.attach("top", writable=True)
    begun, go_on = threading.Event(), threading.Event()
    disk = graph.get("disk").node
    write = disk.pwritev

    def slowly(offset: int, buffers: Any) -> None:
        begun.set()
        assert go_on.wait(20)
        write(offset, buffers)

    monkeypatch.setattr(disk, "pwritev", slowly)
    guest = threading.Thread(target=root.node.pwritev, args=[0, [b"x" * 512]])
    guest.start()
    try:
        assert begun.wait(20)
        with pytest.raises(NotSupported, match="nothing was changed"):
            add(graph, "copy-before-write", "cbw", file="disk", target="temp")
        assert {node.name for node in graph} == {"disk", "temp", "top"}
    finally:
        go_on.set()
        guest.join(20)
    add(graph, "copy-before-write", "cbw", file="disk", target="temp")
    assert root.node.pread(0, 512) == b"x" * 512
    graph.release(root)


class UnsureNode(NullNode):
    """What it reads may only be used once it was confirmed, and it never is."""

    must_confirm = True

    def preadv(self, offset: int, buffers: Any) -> None:
        raise SnapshotGone("it was deleted")

    def preadv_unconfirmed(self, offset: int, buffers: Any) -> None:
        super().preadv(offset, buffers)


def test_who_need_not_confirm_does_not_have_to_when_the_node_becomes_another() -> None:
    backend = BlockBackend(NullNode(4096), read_only=True)
    backend.preadv_unconfirmed(0, [bytearray(512)])
    backend.set_node(UnsureNode(4096))
    with pytest.raises(SnapshotGone):
        backend.preadv_unconfirmed(0, [bytearray(512)])


def test_what_was_opened_for_a_node_that_fails_is_closed(graph: Graph, tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(bytes(4096))
    file = {"driver": "file", "node-name": "inner", "filename": str(tmp_path / "disk")}
    before = len([*Path("/proc/self/fd").iterdir()])
    with pytest.raises(OutOfRange):
        add(graph, "raw", "n", offset=1 << 30, size=512, file=file)
    assert len([*Path("/proc/self/fd").iterdir()]) == before
    assert not [*graph]
    add(graph, "raw", "n", file=file)
    graph.delete("n")
    assert not [*graph]  # what was given inline goes with the node
