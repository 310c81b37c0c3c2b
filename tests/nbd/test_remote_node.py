"""A remote export as a node: what is read, what errors become, and a server that dies, comes back, or says nothing."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from pathlib import Path

import pytest

from qcow2snap.block.node import NBDError, NoSpace, NotSupported, OutOfRange, ReadOnly, Status, UnsupportedFeature
from qcow2snap.nbd.remote_node import RemoteNode
from tests.block.memory import Task
from tests.nbd.nbdkit import Start

SIZE = (1 << 20) + 512


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(random.Random(1).randbytes(SIZE))
    return path


PLAIN = ["--filter=nozero", "--filter=noextents", "--filter=multi-conn", "multi-conn-mode=disable"]


@pytest.mark.parametrize("filters", [[], PLAIN])
def test_what_is_read_is_what_was_written(nbdkit: Start, path: Path, filters: list[str]) -> None:
    node = RemoteNode(nbdkit("file", str(path), *filters).uri, writable=True)
    expected = bytearray(path.read_bytes())
    choose = random.Random(1)
    for step in range(100):
        start = choose.randrange(SIZE)
        length = choose.randrange(min(SIZE - start, 300_000) + 1)
        what = choose.choice(["write", "zero", "unmap", "flush", "read", "status"])
        if what == "write":
            data = bytes([step]) * length
            node.pwritev(start, [bytearray(data[:100]), bytearray(), memoryview(data[100:])])
            expected[start : start + length] = data
        elif what in ("zero", "unmap"):
            node.pwrite_zeroes(start, length, may_unmap=what == "unmap")
            expected[start : start + length] = bytes(length)
        elif what == "flush":
            node.flush()
        elif what == "read":
            buffers = [bytearray(length // 2), bytearray(length - length // 2)]
            node.preadv(start, buffers)
            assert b"".join(buffers) == expected[start : start + length]
        else:
            at = start
            for extent in node.block_status(start, length):
                assert extent.offset == at
                at = extent.end
                assert not (extent.status & Status.ZERO and any(expected[extent.offset : extent.end]))
            assert at == start + length
    node.pdiscard(0, 4096)
    node.close()
    assert path.read_bytes()[4096:] == expected[4096:]


def test_threads_share_its_connections(nbdkit: Start, path: Path) -> None:
    node = RemoteNode(nbdkit("file", str(path)).uri, writable=True, max_connections=3)
    expected = path.read_bytes()

    def read(number: int) -> None:
        choose = random.Random(number)
        for _ in range(100):
            start = choose.randrange(SIZE - 1000)
            assert node.pread(start, 1000) == expected[start : start + 1000]

    for task in [Task(read, number) for number in range(8)]:
        task.result()
    node.close()
    with pytest.raises(NBDError, match="closed"):
        node.pread(0, 1)


@pytest.mark.parametrize(("what", "error"), [("ENOSPC", NoSpace), ("EIO", NBDError), ("EPERM", ReadOnly)])
def test_a_server_that_refuses_is_asked_on(nbdkit: Start, path: Path, what: str, error: type[Exception]) -> None:
    server = nbdkit("--filter=error", "file", str(path), f"error-pwrite={what}", "error-pwrite-rate=100%")
    node = RemoteNode(server.uri, writable=True)
    with pytest.raises(error, match="nbd"):
        node.pwritev(0, [bytearray(1)])
    assert node.pread(0, 100) == path.read_bytes()[:100]
    with pytest.raises(OutOfRange):
        node.pread(SIZE, 1)
    node.close()


def test_what_cannot_be_written_is_refused_when_it_is_opened(nbdkit: Start, path: Path) -> None:
    with pytest.raises(ReadOnly):
        RemoteNode(nbdkit("-r", "file", str(path)).uri, writable=True)
    with pytest.raises(UnsupportedFeature, match="512 bytes"):
        RemoteNode(nbdkit("--filter=blocksize-policy", "file", str(path), "blocksize-minimum=512").uri, writable=True)
    with pytest.raises(NBDError, match="cannot connect"):
        RemoteNode("nbd+unix:///?socket=/nowhere")
    node = RemoteNode(nbdkit("file", str(path)).uri)
    with pytest.raises(ReadOnly):
        node.pwritev(0, [bytearray(1)])
    node.close()


def test_zeros_keep_their_space_unless_it_may_be_given_back(nbdkit: Start, path: Path) -> None:
    node = RemoteNode(nbdkit("file", str(path)).uri, writable=True)
    before = path.stat().st_blocks
    node.pwrite_zeroes(0, 1 << 19)
    node.flush()
    assert path.stat().st_blocks == before
    node.pwrite_zeroes(0, 1 << 19, may_unmap=True)
    assert path.stat().st_blocks < before
    node.close()


def test_zeros_that_are_not_known_to_be_fast_are_refused_if_that_is_asked(nbdkit: Start, path: Path) -> None:
    node = RemoteNode(nbdkit("--filter=nozero", "file", str(path)).uri, writable=True)
    with pytest.raises(NotSupported):
        node.pwrite_zeroes(0, 4096, no_fallback=True)
    node.close()
    assert any(path.read_bytes()[:4096])


def test_a_refusal_of_one_of_several_requests_costs_a_connection_only(nbdkit: Start, path: Path) -> None:
    limits = ["blocksize-maximum=64k", "blocksize-error-policy=error"]
    filters = ["--filter=error", "--filter=blocksize-policy"]
    server = nbdkit(*filters, "file", str(path), *limits, "error-pread=EIO", "error-pread-rate=4%")
    node = RemoteNode(server.uri)
    results, refusals = set(), 0
    for _ in range(50):
        try:
            results.add(node.pread(0, SIZE) == path.read_bytes())
            results.add(node.pread(0, 512) == path.read_bytes()[:512])
        except NBDError as error:
            results.add("EIO" in str(error))
            refusals += 1
    assert results == {True}
    assert 0 < refusals < 50
    node.close()


def test_a_server_that_comes_back_is_read_on(nbdkit: Start, path: Path) -> None:
    server = nbdkit("file", str(path))
    node = RemoteNode(server.uri, writable=True)
    node.pwritev(0, [bytearray(b"x")])
    node.flush()
    server.kill()
    with pytest.raises(NBDError):
        node.pread(0, 1)
    server.start()
    assert node.pread(0, 1) == b"x"
    server.kill()
    server.start()
    assert node.pread(0, 1) == b"x", "tried once more"
    node.close()


def test_a_server_is_waited_for_as_long_as_is_said(nbdkit: Start, path: Path) -> None:
    server = nbdkit("file", str(path))
    node = RemoteNode(server.uri, reconnect_delay=20)
    server.kill()
    reader = Task(node.pread, 0, 1)
    assert reader.waits()
    server.start()
    assert reader.result() == path.read_bytes()[:1]
    node.close()


def test_what_may_have_lost_writes_is_not_used_on(nbdkit: Start, path: Path) -> None:
    server = nbdkit("file", str(path))
    node = RemoteNode(server.uri, writable=True, reconnect_delay=5)
    node.pwritev(0, [bytearray(b"x")])
    server.kill()
    server.start()
    for act in (lambda: node.pread(0, 1), lambda: node.pwritev(0, [bytearray(1)]), node.flush):
        with pytest.raises(NBDError, match="not flushed"):
            act()
    node.close()


def test_a_write_that_may_come_later_is_the_last_one(nbdkit: Start, path: Path) -> None:
    """The server is only slow: if it were asked again meanwhile, the old write could undo a newer one."""
    node = RemoteNode(nbdkit("--filter=delay", "file", str(path), "wdelay=1").uri, writable=True, timeout=0.3)
    with pytest.raises(NBDError):
        node.pwritev(0, [bytearray(1)])
    with pytest.raises(NBDError, match="not flushed"):
        node.pread(0, 1)
    node.close()


def test_a_disk_that_comes_back_with_another_size_is_refused(nbdkit: Start, path: Path) -> None:
    server = nbdkit("file", str(path))
    node = RemoteNode(server.uri)
    server.kill()
    os.truncate(path, SIZE - 512)
    server.start()
    with pytest.raises(NBDError, match="has 1048576 bytes now"):
        node.pread(0, 1)
    node.close()


def test_a_server_that_says_nothing_is_given_up(nbdkit: Start, path: Path) -> None:
    threads = threading.active_count()  # some of other tests may be about to end
    server = nbdkit("file", str(path))
    node = RemoteNode(server.uri, timeout=0.3)
    server.process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, server.process.pid, os.WSTOPPED)
    started = time.monotonic()
    with pytest.raises(NBDError):
        node.pread(0, 1)
    assert time.monotonic() - started < 5
    server.process.send_signal(signal.SIGCONT)
    assert node.pread(0, 1) == path.read_bytes()[:1]
    node.close()
    assert threading.active_count() <= threads
