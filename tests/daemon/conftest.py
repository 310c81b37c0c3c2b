"""Fixtures for tests of the storage daemon: ours, or each program in turn, for what has to be the same with all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.daemon.storage_daemon import OURS, PROGRAMS, StorageDaemon
from tests.nbd.fleecing import disk as disk

StartDaemon = Callable[..., StorageDaemon]


@pytest.fixture
def start_daemon(tmp_path: Path) -> Iterator[StartDaemon]:
    """Start a daemon with options; which one, by `which`."""
    running: list[StorageDaemon] = []

    def start(*options: str, which: str = OURS) -> StorageDaemon:
        running.append(StorageDaemon(which, tmp_path / f"daemon{len(running)}", *options))
        return running[-1]

    yield start
    for each in running:
        if each.process.poll() is None:
            each.stop()


@pytest.fixture
def daemon(start_daemon: StartDaemon) -> StorageDaemon:
    """Ours, with nothing in it."""
    return start_daemon()


@pytest.fixture(params=PROGRAMS)
def any_daemon(request: pytest.FixtureRequest, start_daemon: StartDaemon) -> StorageDaemon:
    """Each of the programs in turn: what a test says of it holds for QEMU's as well."""
    return start_daemon(which=request.param)
