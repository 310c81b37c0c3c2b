"""Fixtures for the tests of the NBD server and client."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from qcow2snap.nbd.export import Exports
from qcow2snap.nbd.listen import listen_unix
from qcow2snap.nbd.server import Server
from tests.nbd.fleecing import disk, fleece, qemu_graph
from tests.nbd.nbdkit import Nbdkit, Start
from tests.nbd.support import NewNode, PatchworkNode, Serve
from tests.support.tools import REPOSITORY

__all__ = ["disk", "fleece", "qemu_graph"]  # fixtures, too

PEERS = REPOSITORY / ".peers" / "bin"


@pytest.fixture
def new_node(tmp_path: Path) -> Iterator[NewNode]:
    nodes = []

    def make(*runs: tuple[str, int], stable: bool = True) -> PatchworkNode:
        nodes.append(PatchworkNode(tmp_path / f"node{len(nodes)}", runs, stable=stable))
        return nodes[-1]

    yield make
    for node in nodes:
        node.close()


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Serve exports on a Unix socket; gives the running server."""
    servers = []

    def start(what: Exports, **options: float) -> Server:
        server = Server(what, [listen_unix(str(tmp_path / f"s{len(servers)}"))], **options)  # type: ignore[arg-type]
        servers.append(server)
        server.start()
        return server

    yield start
    for server in servers:
        server.stop()


@pytest.fixture
def nbdkit(tmp_path: Path) -> Iterator[Start]:
    running: list[Nbdkit] = []

    def start(*arguments: str) -> Nbdkit:
        running.append(Nbdkit(tmp_path / f"k{len(running)}", *arguments))
        return running[-1]

    yield start
    for each in running:
        each.kill()


@pytest.fixture
def peers() -> Path:
    """The folder of the newer programs. Without it the test is skipped, but where CI=true it fails."""
    if not (PEERS / "nbdinfo").exists():
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)("make test gets the newer peers; see .peers")
    return PEERS
