"""Peers that speak extended headers, as `scripts/newer-peers` unpacks them, with our server and our client."""

from __future__ import annotations

import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest

from qcow2snap.block.node import BlockNode, Extent, NBDError
from qcow2snap.nbd import contexts
from qcow2snap.nbd.client import Client
from tests.nbd.support import NewNode, Serve, ZeroNode, exports, run

ODD_SIZE = (5 << 40) + 123  # bytes: over 4 GiB, and its tail is no round size


def uri(serve: Serve, node: BlockNode) -> str:
    return str(serve(exports(default=node)).listeners[0].uri)


def test_nbdinfo_says_extended(peers: Path, serve: Serve, new_node: NewNode) -> None:
    said = run(peers / "nbdinfo", uri(serve, new_node(("file", 4096))))
    assert "using extended packets" in said
    assert "can_block_status_payload: true" in said
    assert "can_df: true" in said


def test_terabytes_are_mapped_by_one_request(peers: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    node = ZeroNode(ODD_SIZE)
    asked: list[tuple[int, int]] = []

    def block_status(offset: int, length: int, *, want_zero: bool = True) -> list[Extent]:
        asked.append((offset, length))
        return list(ZeroNode.block_status(node, offset, length))

    monkeypatch.setattr(node, "block_status", block_status)
    said = run(peers / "nbdinfo", "--map", uri(serve, node))
    assert said.split() == ["0", str(ODD_SIZE), "3", "hole,zero"]
    # Each request begins with a step of this length.
    assert [length for _, length in asked].count(contexts.FIRST_STEP) == 1
    assert sum(length for _, length in asked) == ODD_SIZE


def test_nbdcopy_and_qemu_read_the_same_bytes(peers: Path, serve: Serve, new_node: NewNode, tmp_path: Path) -> None:
    node = new_node(("file", 1 << 20), ("zero", 8 << 20), ("memory", 1 << 20), ("file", 70_000))
    where = uri(serve, node)
    run(peers / "nbdcopy", where, tmp_path / "copied")
    assert (tmp_path / "copied").read_bytes() == node.content
    run(peers / "qemu-img", "convert", "-f", "raw", "-O", "raw", where, tmp_path / "converted")
    assert (tmp_path / "converted").read_bytes()[: node.size] == node.content


def test_qemu_maps_what_is_behind_4_gib(peers: Path, serve: Serve) -> None:
    where = uri(serve, ZeroNode(5 << 40))
    assert '"start": 0, "length": 5497558138880, "depth": 0, "present": true, "zero": true' in run(
        peers / "qemu-img", "map", "-f", "raw", "--output=json", where
    )
    assert "transaction size: 64-bit" in run(peers / "qemu-nbd", "--list", "-k", where.partition("socket=")[2])


def test_our_client_maps_their_terabytes_by_one_request(peers: Path, tmp_path: Path) -> None:
    size = (5 << 40) + 512
    with (tmp_path / "disk").open("wb") as disk:
        disk.truncate(size)
    command = [peers / "qemu-nbd", "-t", "-r", "-f", "raw", "-k", tmp_path / "s", tmp_path / "disk"]
    server = subprocess.Popen([str(part) for part in command])
    where = f"nbd+unix:///?socket={tmp_path}/s"
    try:
        for _ in range(200):
            with suppress(NBDError):
                Client.connect(where).close()
                break
            time.sleep(0.05)
        with Client.connect(where) as client:
            assert client.go().size == size
            assert client.framing.extended
            assert sum(length for length, _ in client.block_status(0, size)) == size
    finally:
        server.terminate()
        server.wait(20)
