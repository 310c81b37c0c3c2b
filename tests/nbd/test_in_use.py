"""Clients of `serve -U` while QEMU writes the image, makes and deletes snapshots: right bytes, or EIO and why."""

from __future__ import annotations

import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from formats.nbd import Command, Errno
from qcow2snap.nbd.client import Client, ReplyError, Request
from qcow2snap.nbd.uri import URI
from tests.nbd.serving import Serving
from tests.support import Image
from tests.support.busy import BLOCK, BusyDisk, Key

NewImage = Callable[..., Image]
SECONDS = 15
GONE = "was deleted from the image"


def read_together(client: Client, ranges: list[tuple[int, int]]) -> list[bytes | ReplyError]:
    """Several reads in flight: the data of each, or the error in its place."""
    replies = list(client.submit(Request(Command.READ, offset, length) for offset, length in ranges))
    replies.sort(key=lambda reply: reply.cookie)
    return [reply.error or bytes(reply.data) for reply in replies]


class Reader(threading.Thread):
    """A client that connects again when a snapshot is gone. Which one of a name it has follows from what it reads."""

    def __init__(self, disk: BusyDisk, path: Path, seed: int, deadline: float) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()
        self.failure: BaseException | None = None
        self._disk, self._path, self._deadline = disk, path, deadline
        self._random = random.Random(seed)

    def run(self) -> None:
        try:
            while time.monotonic() < self._deadline:
                name = self._random.choice(["kept", *["daily", "hourly", "now"] * 3])
                with Client.connect(URI(socket=str(self._path))) as client:
                    try:
                        client.go(name)
                    except ReplyError:
                        assert name != "kept"  # the others may have been away when the image was opened
                        continue
                    self._read(client, name)
        except BaseException as failure:
            self.failure = failure

    def _read(self, client: Client, name: str) -> None:
        keys = self._disk.keys_named(name)
        for _ in range(200 if name != "kept" else 20):
            if time.monotonic() > self._deadline:
                break
            length = self._random.choice([512, BLOCK, BLOCK, 16 * BLOCK, 100 * BLOCK])
            count = self._random.choice([1, 16]) if length <= 16 * BLOCK else 1
            ranges = [(self._random.randrange(0, client.size - length + 1, 512), length) for _ in range(count)]
            failed = 0
            for (offset, _), answer in zip(ranges, read_together(client, ranges), strict=True):
                if isinstance(answer, ReplyError):
                    assert answer.error == Errno.EIO
                    assert GONE in str(answer)
                    failed += 1
                else:
                    keys = self._who_holds(answer, offset, keys)
            if failed:
                assert name != "kept"
                assert self._disk.deleted & set(keys), "called gone while it stood"
                self.count["gone"] += 1
                with pytest.raises(ReplyError, match=GONE):  # for ever
                    client.pread(0, 512)
                return

    def _who_holds(self, data: bytes, offset: int, keys: list[Key]) -> list[Key]:
        """Those of these snapshots that hold these bytes."""
        holders = [key for key in keys if self._disk.expected(key, offset, len(data)) == data]
        assert holders, f"bytes at {offset} that none of {keys[-3:]} has"
        self.count["bytes"] += len(data)
        self.count["right"] += 1
        return holders


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[[Image], Serving]]:
    started: list[Serving] = []

    def start(image: Image) -> Serving:
        started.append(Serving("-U", image.path, "-k", tmp_path / "s"))
        return started[-1]

    yield start
    for serving in started:
        if serving.process.poll() is None:
            serving.stop()


def test_a_snapshot_that_is_gone_answers_eio_and_says_why(
    new_image: NewImage, serve: Callable[[Image], Serving]
) -> None:
    image = new_image("1M").write(0, 1 << 20, 0x11).snapshot("daily").snapshot("kept")
    serving = serve(image)
    with Client.connect(serving.uris[0]) as client, Client.connect(serving.uris[0]) as other:
        client.go("daily")
        other.go("kept")
        assert client.pread(0, 1 << 20) == b"\x11" * (1 << 20)
        image.delete("daily").write(0, 1 << 20, 0x22).snapshot("daily").write(0, 1 << 20, 0x33).path  # noqa: B018
        for offset, length in ((0, 512), (4096, 1 << 19), (0, 1 << 20)):
            with pytest.raises(ReplyError, match=r'EIO: .*disk.qcow2: snapshot "daily" \(id 1\) was deleted'):
                client.pread(offset, length)
            assert other.pread(offset, length) == b"\x11" * length
        with pytest.raises(ReplyError, match="was deleted"):
            client.block_status(0, 1 << 20)
        refused = [(0, 512), (1 << 20, 512)]
        assert [answer.error for answer in read_together(client, refused)] == [Errno.EIO, Errno.EINVAL]
    serving.process.send_signal(signal.SIGHUP)
    deadline = time.monotonic() + 20
    content = b""
    while content != b"\x22" * 512 and time.monotonic() < deadline:  # until the image was opened again
        with Client.connect(serving.uris[0]) as client:
            client.go("daily")
            with suppress(ReplyError):
                content = bytes(client.pread(0, 512))
    assert content == b"\x22" * 512
    serving.stop()
    assert "export 'daily': " in serving.stderr
    assert GONE in serving.stderr


@pytest.mark.slow
@pytest.mark.parametrize("discard", ["unmap", "ignore"])
def test_clients_get_what_the_snapshot_holds_or_hear_that_it_is_gone(tmp_path: Path, discard: str) -> None:
    with BusyDisk(tmp_path / "disk.qcow2", discard=discard) as disk:
        serving = Serving("-U", disk.path, "-k", tmp_path / "s")
        try:
            readers = [Reader(disk, tmp_path / "s", seed, time.monotonic() + SECONDS) for seed in range(2)]
            for reader in readers:
                reader.start()
            while any(reader.is_alive() for reader in readers):
                serving.process.send_signal(signal.SIGHUP)  # new snapshots
                readers[0].join(0.2)
        finally:
            for reader in readers:
                reader.join()
            serving.stop()
    for reader in readers:
        if reader.failure is not None:
            raise reader.failure
        assert reader.count["right"] > 100  # a machine that does much else reads slowly
        assert reader.count["gone"] > 0
