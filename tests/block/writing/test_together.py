"""Many who write, zero, discard, flush and read one image at once: each finds what it wrote, nobody waits for all."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from qcow2snap.block.graph import open_writable
from qcow2snap.block.node import Buffer
from qcow2snap.block.qcow2.header import read_header
from qcow2snap.block.qcow2.writing.image_file import ImageFile
from qcow2snap.block.qcow2.writing.node import WritableQcow2Node
from tests.conftest import NewImage
from tests.support import qemu_img

TIME = 20.0  # seconds, in which everything here ends


def together(*work: Callable[[], None]) -> None:
    """All at once, to the end of each."""
    failures: list[BaseException] = []

    def run(each: Callable[[], None]) -> None:
        try:
            each()
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=run, args=[each], daemon=True) for each in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIME)
        assert not thread.is_alive(), "somebody waits for ever"
    if failures:
        raise failures[0]


@pytest.mark.parametrize("layout", [{"cluster_size": 4096}, {"cluster_size": 16384, "extended_l2": True}])
def test_guests_with_parts_of_their_own_find_there_what_they_wrote(
    new_image: NewImage, layout: dict[str, object]
) -> None:
    size, guests = 4 << 20, 4
    image = new_image(size, **layout).write(0, size // 2).snapshot("s")
    expected = image.reference("s").read()
    node = open_writable(str(image.path))
    info = node.find_snapshot("s")
    done = threading.Event()

    def guest(number: int) -> None:
        """Its sectors lie between those of the others."""
        chosen = random.Random(number)
        mine: dict[int, bytes] = {}
        for step in range(400):
            sector = chosen.randrange(size // 512 // guests) * guests + number
            what = chosen.random()
            if what < 0.6:
                mine[sector] = bytes([step % 255 + 1, number]) * 256
                node.pwritev(sector * 512, [memoryview(mine[sector])])
            elif what < 0.8:
                mine[sector] = bytes(512)
                node.pwrite_zeroes(sector * 512, 512, may_unmap=True)
            elif what < 0.85:
                node.flush()
            elif mine:
                sector = chosen.choice(list(mine))
                assert node.pread(sector * 512, 512) == mine[sector]
        for sector, data in mine.items():
            assert node.pread(sector * 512, 512) == data

    def reader() -> None:
        chosen = random.Random(99)
        while not done.is_set():
            start = chosen.randrange(size - 50_000)
            assert node.view(info).pread(start, 50_000) == expected[start : start + 50_000]

    try:
        watching = threading.Thread(target=reader, daemon=True)
        watching.start()
        together(*[lambda number=number: guest(number) for number in range(guests)])  # type: ignore[misc]
        done.set()
        watching.join(TIME)
        assert node.view(info).pread(0, size) == expected
    finally:
        node.close()
    qemu_img("check", "-q", image.path)


def test_overlapping_changes_of_any_kind_leave_a_sound_image(new_image: NewImage) -> None:
    size = 1 << 20
    image = new_image(size, cluster_size=4096).write(0, size).snapshot("s")
    expected = image.reference("s").read()
    node = open_writable(str(image.path))

    def guest(number: int) -> None:
        chosen = random.Random(number)
        for _ in range(300):
            offset = chosen.randrange(size)
            length = min(chosen.choice([100, 4096, 30_000, 200_000]), size - offset)
            what = chosen.choice(["write", "write", "zero", "discard", "flush", "read"])
            if what == "write":
                node.pwritev(offset, [memoryview(bytes([number + 1]) * length)])
            elif what == "zero":
                node.pwrite_zeroes(offset, length, may_unmap=chosen.random() < 0.5)
            elif what == "discard":
                node.pdiscard(offset, length)
            elif what == "flush":
                node.flush()
            else:
                assert set(node.pread(offset, length)) <= {*range(5)} | set(expected)

    try:
        together(*[lambda number=number: guest(number) for number in range(4)])  # type: ignore[misc]
        assert node.view(node.find_snapshot("s")).pread(0, size) == expected
    finally:
        node.close()
    qemu_img("check", "-q", image.path)


class HeldFile(ImageFile):
    """A file whose writes of data, and flushes, wait until they are let go."""

    def __init__(self, path: Path) -> None:
        self.go = threading.Event()
        self.go.set()
        self.waiting = threading.Event()
        super().__init__(str(path))

    def pwritev(self, offset: int, buffers: Sequence[Buffer]) -> None:
        self._hold()
        super().pwritev(offset, buffers)

    def flush(self) -> None:
        self._hold()
        super().flush()

    def _hold(self) -> None:
        if not self.go.is_set():
            self.waiting.set()
            assert self.go.wait(TIME)

    def hold(self) -> None:
        self.waiting.clear()
        self.go.clear()


@contextmanager
def held(path: Path) -> Iterator[tuple[WritableQcow2Node, HeldFile]]:
    file = HeldFile(path)
    node = WritableQcow2Node(file, read_header(file))
    try:
        yield node, file
    finally:
        file.go.set()
        node.close()


@pytest.mark.parametrize("what", ["allocating", "in place", "flush"])
def test_reads_wait_for_no_write_that_the_disk_is_slow_with(new_image: NewImage, what: str) -> None:
    image = new_image("1M", cluster_size=4096).write(0, 1 << 20, 7).snapshot("s").write(0, 65536, 8)
    with held(image.path) as (node, file):
        node.pwritev(600_000, [memoryview(b"y" * 5000)])
        file.hold()
        slow: dict[str, Callable[[], None]] = {
            "allocating": lambda: node.pwritev(300_000, [memoryview(b"x" * 5000)]),
            "in place": lambda: node.pwritev(0, [memoryview(b"x" * 5000)]),
            "flush": node.flush,
        }
        writer = threading.Thread(target=slow[what], daemon=True)
        writer.start()
        assert file.waiting.wait(TIME)
        together(
            lambda: _is(node.view(node.find_snapshot("s")).pread(0, 1 << 20), b"\7" * (1 << 20)),
            lambda: _is(node.pread(300_000, 5000), b"\7" * 5000),  # what is there until it is linked
            lambda: _is(node.pread(600_000, 5000), b"y" * 5000),
            lambda: _is([*node.block_status(0, 1 << 20)] != [], True),
        )
        assert writer.is_alive()
        file.go.set()
        writer.join(TIME)


def test_writes_elsewhere_wait_for_no_write_nor_flush(new_image: NewImage) -> None:
    """Each of these is held by the file; were there one lock around data, only the first would get there."""
    image = new_image("1M", cluster_size=4096).write(0, 1 << 20, 7).snapshot("s")
    with held(image.path) as (node, file):
        node.pwritev(0, [memoryview(b"a" * 4096)])
        file.hold()
        arrived = []
        original = file._hold

        def hold() -> None:
            arrived.append(threading.get_ident())
            original()

        file._hold = hold  # type: ignore[method-assign]
        changes: list[Callable[[], None]] = [
            lambda: node.pwritev(0, [memoryview(b"b" * 4096)]),  # in place
            lambda: node.pwritev(100_000, [memoryview(b"c" * 4096)]),  # copied
            lambda: node.pwritev(200_000, [memoryview(b"d" * 4096)]),
            node.flush,
        ]
        threads = [threading.Thread(target=change, daemon=True) for change in changes]
        for thread in threads:
            thread.start()
        deadline = threading.Event()
        for _ in range(200):
            if len(set(arrived)) == len(changes):
                break
            deadline.wait(0.05)
        assert len(set(arrived)) == len(changes)
        file.go.set()
        for thread in threads:
            thread.join(TIME)
        assert node.pread(100_000, 4096) == b"c" * 4096


def test_two_who_write_one_cluster_both_have_their_part_in_it(new_image: NewImage) -> None:
    image = new_image("1M").write(0, 65536, 7).snapshot("s")
    with held(image.path) as (node, file):
        file.hold()
        first = threading.Thread(target=lambda: node.pwritev(0, [memoryview(b"a" * 512)]), daemon=True)
        first.start()
        assert file.waiting.wait(TIME)
        second = threading.Thread(target=lambda: node.pwritev(1024, [memoryview(b"b" * 512)]), daemon=True)
        second.start()
        second.join(0.2)
        assert second.is_alive()  # it waits until the cluster has its place
        file.go.set()
        first.join(TIME)
        second.join(TIME)
        assert node.pread(0, 2048) == b"a" * 512 + b"\7" * 512 + b"b" * 512 + b"\7" * 512


def _is(found: object, expected: object) -> None:
    assert found == expected
