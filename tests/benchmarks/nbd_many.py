"""One server of all snapshots against a qemu-nbd for each, and what a server holds when many clients read at once."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from pathlib import Path

from tests.benchmarks import images, pairs, servers

SNAPSHOTS = 100
CONNECTIONS = 64
MEMORY_LIMIT = 256 << 20  # bytes, with CONNECTIONS that read at once

Servers = AbstractContextManager[Sequence[servers.Server]]


def rows(quick: bool) -> Iterator[pairs.Row]:
    count = 20 if quick else SNAPSHOTS
    for what, target in {"ready": 2.0, "peak RSS": 10.0, "PSS": 1.0}.items():
        what = f"{count} snapshots, {what}"
        yield pairs.Row(what, partial(_compare, what, count, target))
    for layout in "none", "zlib":
        what = f"{CONNECTIONS} connections, {layout}"
        yield pairs.Row(what, partial(_connections, what, layout, 256 << 20 if quick else 2 << 30))


def _compare(what: str, count: int, target: float) -> pairs.Comparison:
    image = images.many_snapshots(count)
    _check_all(image, count)

    def seconds(start: Callable[[], Servers]) -> pairs.Run:
        started = time.perf_counter()
        with start() as running:
            ready = time.perf_counter()
            return pairs.Run(ready - started, sum(server.pss() for server in running))

    def memory(start: Callable[[], Servers]) -> pairs.Run:
        with start() as running:
            pss = sum(server.pss() for server in running)
            return pairs.Run(sum(server.peak_rss() for server in running) if what.endswith("RSS") else pss, pss)

    measure, unit, pairs_of_runs = memory, pairs.Unit.BYTES, 1
    if what.endswith("ready"):
        measure, unit, pairs_of_runs = seconds, pairs.Unit.SECONDS, 3
    return pairs.compare(
        what,
        partial(measure, partial(_one_server, image, count)),
        partial(measure, partial(_a_server_each, image, count)),
        f"{count} times qemu-nbd",
        pairs=pairs_of_runs,
        unit=unit,
        target=target,
    )


@contextmanager
def _one_server(image: Path, count: int) -> Iterator[Sequence[servers.Server]]:
    """Ready when it greets, and a client has opened the last snapshot."""
    with servers.Server(servers.qcow2snap(image, None)) as server:
        _open(server.wait().uri_of(str(count - 1)))
        yield [server]


@contextmanager
def _a_server_each(image: Path, count: int) -> Iterator[Sequence[servers.Server]]:
    """All started at once; ready when each greets, and a client has opened the last."""
    with ExitStack() as stack:
        settings = [servers.qemu_nbd(image, str(number))[0] for number in range(count)]
        running = [stack.enter_context(servers.Server(setting)) for setting in settings]
        for server in running:
            server.wait()
        _open(running[-1].uri)
        yield running


def _open(uri: str) -> None:
    pairs.run(["nbdinfo", "--size", uri])


def _check_all(image: Path, count: int) -> None:
    """Every snapshot can be opened by its name."""
    with servers.Server(servers.qcow2snap(image, None)) as server:
        for number in range(count):
            _open(server.wait().uri_of(str(number)))


def _connections(what: str, layout: str, size: int) -> pairs.Comparison:
    image = images.fragmented(size, layout)

    def measure(server: servers.Server) -> pairs.Run:
        """The most that the server held while nbdcopy read on all connections at once."""
        options = [f"--connections={CONNECTIONS}", f"--threads={CONNECTIONS}"]
        most = 0
        with subprocess.Popen(["nbdcopy", *options, server.uri, "null:"], stdin=subprocess.DEVNULL) as client:
            while client.poll() is None:
                most = max(most, server.pss())
                time.sleep(0.02)
        if client.returncode:
            raise pairs.BenchmarkError(f"nbdcopy with {CONNECTIONS} connections failed")
        return pairs.Run(most, most)

    with (
        servers.Server(servers.qcow2snap(image, images.SNAPSHOT)) as ours,
        servers.Server(servers.qemu_nbd(image, images.SNAPSHOT, shared=CONNECTIONS)[0]) as peer,
    ):
        ours.wait()
        peer.wait()
        return pairs.compare(
            what,
            partial(measure, ours),
            partial(measure, peer),
            f"qemu-nbd -e {CONNECTIONS}",
            pairs=3,
            unit=pairs.Unit.BYTES,
            target=pairs.Target(figure=MEMORY_LIMIT),
        )
