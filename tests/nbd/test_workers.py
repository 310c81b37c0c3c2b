"""Worker processes: clients spread evenly, crashes cost little, limits hold over all, and none is left behind."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from formats import nbd
from qcow2snap.nbd.framing import SIMPLE_REPLIES
from tests.nbd.serving import Serving
from tests.nbd.support import run as output
from tests.nbd.wire import handshake, packed, read
from tests.support import Image, require
from tests.support.processes import open_files, process_tree
from tests.support.waiting import until

NewImage = Callable[..., Image]

SIZE = 4 << 20  # bytes
PATIENCE = 20  # seconds


class Client:
    """A connection to the export "monday", and the worker that serves it."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(PATIENCE)
        self.socket.connect(str(path))
        self._receive: Callable[[int], bytes] | None = None

    def read(self, length: int = 4096) -> bytes:
        if self._receive is None:
            self._receive = handshake(self.socket, SIMPLE_REPLIES, name=b"monday")
        self.socket.sendall(packed(read(0, length)))
        return self._receive(nbd.SIMPLE_REPLY.size + length)[nbd.SIMPLE_REPLY.size :]

    def greeted(self) -> bool:
        return bool(self.socket.recv(18))


@pytest.fixture
def image(new_image: NewImage) -> Image:
    return new_image(SIZE).write(0, SIZE).snapshot("monday")


@pytest.fixture
def serve(tmp_path: Path, image: Image) -> Iterator[Callable[..., Serving]]:
    running = []

    def start(*options: str) -> Serving:
        running.append(Serving(image.path, "-k", tmp_path / "s", *options))
        return running[-1]

    yield start
    for each in running:
        if each.process.poll() is None:
            assert each.stop() == 0


def workers(serving: Serving) -> list[int]:
    return process_tree(serving.process.pid)[1:]


def is_alive(pid: int) -> bool:
    with suppress(FileNotFoundError):
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    return False


def clients_of(pid: int) -> int:
    """How many sockets a worker has, but for the one to its parent."""
    return sum(file.startswith("socket:") for file in open_files(pid)) - 1


def test_there_are_as_many_as_asked_for(serve: Callable[..., Serving]) -> None:
    assert len(workers(serve("--workers", "3"))) == 3


@pytest.mark.parametrize("number", ["0", "1"])
def test_one_worker_is_this_process(serve: Callable[..., Serving], tmp_path: Path, number: str) -> None:
    serving = serve("--workers", number)
    assert not workers(serving)
    assert Client(tmp_path / "s").read()


def test_connections_are_spread_evenly(serve: Callable[..., Serving], tmp_path: Path, image: Image) -> None:
    serving = serve("--workers", "2")
    clients = [Client(tmp_path / "s") for _ in range(4)]
    expected = image.reference("monday").read()
    for client in clients:
        assert client.read() == expected[:4096]
    assert [clients_of(pid) for pid in workers(serving)] == [2, 2]
    for client in clients[::2]:  # whichever is free next gets the next
        client.socket.close()
    assert until(lambda: sum(clients_of(pid) for pid in workers(serving)) == 2)
    time.sleep(0.1)  # until the parent has heard of it
    clients += [Client(tmp_path / "s") for _ in range(2)]
    assert clients[-1].read()
    assert clients[-2].read()
    assert [clients_of(pid) for pid in workers(serving)] == [2, 2]


def test_nbdcopy_reads_through_all_of_them(serve: Callable[..., Serving], tmp_path: Path, image: Image) -> None:
    require("nbdcopy")
    serving = serve("--workers", "2")
    output("nbdcopy", "--connections=4", "--threads=4", serving.uris[1], tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == image.reference("monday").read()


def test_a_crash_costs_its_own_clients_only_and_the_worker_is_replaced(
    serve: Callable[..., Serving], tmp_path: Path
) -> None:
    serving = serve("--workers", "2")
    before = workers(serving)
    clients = [Client(tmp_path / "s") for _ in range(4)]
    content = clients[0].read()
    for client in clients:
        assert client.read() == content
    os.kill(before[0], signal.SIGKILL)
    lost = 0
    for client in clients:
        try:
            assert client.read() == content
        except (OSError, AssertionError):
            lost += 1
    assert lost == 2
    assert Client(tmp_path / "s").read() == content  # at once, by the one that is left
    assert until(lambda: len([pid for pid in workers(serving) if is_alive(pid)]) == 2)
    assert before[0] not in workers(serving)
    assert serving.stop() == 0
    assert "crashed; 2 clients lost" in serving.stderr


def test_a_worker_that_crashes_over_and_over_is_not_started_over_and_over(serve: Callable[..., Serving]) -> None:
    serving = serve("--workers", "2")
    seen = set(workers(serving))
    deadline = time.monotonic() + 1.5
    while time.monotonic() < deadline:
        for pid in workers(serving):
            seen.add(pid)
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    assert 3 <= len(seen) <= 6


def test_without_any_worker_clients_wait_for_the_next_one(serve: Callable[..., Serving], tmp_path: Path) -> None:
    serving = serve("--workers", "2")
    for pid in workers(serving):
        os.kill(pid, signal.SIGKILL)
    assert until(lambda: not workers(serving), 0.9)
    assert Client(tmp_path / "s").read()


def test_max_connections_holds_over_all_workers(serve: Callable[..., Serving], tmp_path: Path) -> None:
    serving = serve("--workers", "2", "--max-connections", "3")
    clients = [Client(tmp_path / "s") for _ in range(5)]
    assert [client.greeted() for client in clients] == [True, True, True, False, False]
    clients[0].socket.close()
    clients.append(Client(tmp_path / "s"))
    while not clients[-1].greeted():  # until the server has heard that there is room
        clients.append(Client(tmp_path / "s"))
    crowded = max(workers(serving), key=clients_of)
    os.kill(crowded, signal.SIGKILL)
    assert until(lambda: crowded not in workers(serving))
    clients += [Client(tmp_path / "s") for _ in range(3)]
    assert [client.greeted() for client in clients[-3:]] == [True, True, False]


def test_sigterm_answers_what_is_in_flight(serve: Callable[..., Serving], tmp_path: Path, image: Image) -> None:
    serving = serve("--workers", "2")
    pids = workers(serving)
    expected = image.reference("monday").read()
    receiving = []
    for _ in range(2):
        client = Client(tmp_path / "s")
        client.read()
        client.socket.sendall(packed(read(0, SIZE)))
        receiving.append(client)
    serving.process.terminate()
    time.sleep(0.3)
    for client in receiving:
        assert client._receive is not None
        assert client._receive(nbd.SIMPLE_REPLY.size + SIZE)[nbd.SIMPLE_REPLY.size :] == expected
        assert client.socket.recv(1) == b""
    assert serving.process.wait(5) == 0
    assert not any(map(is_alive, pids))


def test_a_client_that_never_receives_holds_up_sigterm_for_five_seconds(
    serve: Callable[..., Serving], tmp_path: Path
) -> None:
    serving = serve("--workers", "2")
    pids = workers(serving)
    client = Client(tmp_path / "s")
    client.read()
    client.socket.sendall(packed(read(0, SIZE)) * 20)
    time.sleep(0.1)
    started = time.monotonic()
    assert serving.stop() == 0
    assert 4 < time.monotonic() - started < 8
    assert not any(map(is_alive, pids))
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("stopped", [False, True])
def test_no_worker_outlives_its_parent(serve: Callable[..., Serving], tmp_path: Path, stopped: bool) -> None:
    serving = serve("--workers", "2")
    pids = workers(serving)
    client = Client(tmp_path / "s")
    assert client.read()
    if stopped:  # a worker that cannot end by itself
        os.kill(pids[0], signal.SIGSTOP)
        serving.process.terminate()
    else:
        serving.process.kill()
    serving.process.wait(PATIENCE)
    assert until(lambda: not any(map(is_alive, pids)), 8)


def test_ctrl_c_ends_all_of_them(tmp_path: Path, image: Image) -> None:
    serving = Serving(image.path, "-k", tmp_path / "s", "--workers", "2", process_group=0)
    pids = workers(serving)
    client = Client(tmp_path / "s")
    assert client.read()
    client.socket.sendall(packed(read(0, SIZE)))
    os.killpg(serving.process.pid, signal.SIGINT)  # as a terminal does
    assert client._receive is not None
    assert len(client._receive(nbd.SIMPLE_REPLY.size + SIZE)) == nbd.SIMPLE_REPLY.size + SIZE
    assert serving.process.wait(5) == 0
    assert not any(map(is_alive, pids))


def test_what_was_opened_before_is_in_memory_once(serve: Callable[..., Serving], tmp_path: Path) -> None:
    serving = serve("--workers", "4")
    clients = [Client(tmp_path / "s") for _ in range(4)]
    assert all(client.read() for client in clients)
    processes = [serving.process.pid, *workers(serving)]
    rollups = [Path(f"/proc/{pid}/smaps_rollup").read_text() for pid in processes]
    kib = {
        name: sum(int(line.split()[1]) for text in rollups for line in text.splitlines() if line.startswith(name))
        for name in ("Rss:", "Pss:")
    }
    assert kib["Pss:"] < kib["Rss:"] * 0.6, kib
