"""A guest that writes a recorded image, and the judgement of what a crash leaves: sound, with all that was flushed.

Run by itself it goes on for as long as it is told, with other seeds and disks than the suite's:

    python -m tests.block.writing.crash --seconds 600
"""

from __future__ import annotations

import argparse
import random
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from qcow2snap.block.graph import open_image
from qcow2snap.block.node import Qcow2SnapError
from qcow2snap.block.qcow2.driver import Qcow2Node
from qcow2snap.block.qcow2.writing.node import WritableQcow2Node
from tests.block.writing import soundness
from tests.block.writing.recorded import SECTOR, Log, Mark, Write, open_recorded
from tests.support import Image, ToolFailed, qemu_img

SIZE = 256 << 10
_ZERO = bytes(SECTOR)


@dataclass(frozen=True)
class Disk:
    """How an image is made before a guest writes it."""

    name: str
    options: dict[str, object]
    snapshots: int = 0
    compressed: bool = False
    backing: bool = False
    data_file: bool = False
    size: int = SIZE
    bitmaps: bool = False
    no_unref: bool = False
    first_free: int = 0  # no cluster before this one is given out

    def make(self, directory: Path, seed: int) -> Path:
        options: dict[str, object] = dict(self.options)
        data_file = directory / "data.raw" if self.data_file else None
        if data_file is not None:
            options["data_file"] = data_file
        backing = None
        if self.backing:
            backing = directory / "base.raw"
            backing.write_bytes(random.Random(seed).randbytes(self.size - 3 * SECTOR))
        image = Image.create(
            directory / "disk.qcow2", self.size, backing=backing, backing_fmt="raw" if backing else None, **options
        )
        cluster_size = int(str(options.get("cluster_size", 65536)))
        if self.compressed:
            for offset in range(0, self.size // 2, cluster_size):
                image.write(offset, cluster_size, compressed=True)
        for number in range(self.snapshots):
            image.write(number * self.size // 4, self.size // 2)
            image.write_zeroes(number * self.size // 8, self.size // 16)
            image.snapshot(f"s{number}")
        if self.bitmaps:
            for name, granularity in BITMAPS.items():
                qemu_img("bitmap", "--add", "-g", granularity, image.path, name)
            image.write(self.size // 3, self.size // 5)
            qemu_img("bitmap", "--disable", image.path, "rests")
        return image.path


BITMAPS = {"fine": "512", "coarse": "64k", "rests": "4k"}

DISKS = [
    Disk("plain", {"cluster_size": 4096}),
    Disk("snapshots", {"cluster_size": 4096}, snapshots=2),
    Disk("smallest clusters", {"cluster_size": 512, "refcount_bits": 64}, snapshots=1),
    Disk("one bit", {"cluster_size": 512, "refcount_bits": 1}),
    Disk("two bits", {"cluster_size": 1024, "refcount_bits": 2}, snapshots=2),
    Disk("default", {}, snapshots=1, size=1 << 20),
    Disk("version 2", {"cluster_size": 4096, "compat": "0.10"}, snapshots=1),
    Disk("subclusters", {"cluster_size": 16384, "extended_l2": True}, snapshots=1, size=512 << 10),
    Disk("compressed", {"cluster_size": 4096}, compressed=True, snapshots=1),
    Disk("compressed subclusters", {"cluster_size": 16384, "extended_l2": True}, compressed=True, size=512 << 10),
    Disk("backing", {"cluster_size": 4096}, backing=True),
    Disk("data file", {"cluster_size": 4096}, data_file=True),
    Disk(
        "refcount table grows", {"cluster_size": 512, "refcount_bits": 64}, snapshots=1, size=64 << 10, first_free=4000
    ),
    Disk("bitmaps", {"cluster_size": 512}, bitmaps=True, snapshots=1),
    Disk("bitmaps of default", {}, bitmaps=True, size=1 << 20),
    Disk("discard-no-unref", {"cluster_size": 4096}, snapshots=1, no_unref=True),
    Disk("lazy", {"cluster_size": 4096, "lazy_refcounts": True}, snapshots=1),
]


@dataclass
class Guest:
    """What each sector may hold: as it was at the last flush, and as it was written since."""

    size: int
    now: list[bytes]
    versions: list[tuple[bytes, ...]] = field(default_factory=list)

    @classmethod
    def of(cls, content: bytes) -> Guest:
        sectors = [content[i : i + SECTOR] for i in range(0, len(content), SECTOR)]
        return cls(len(content), sectors, [(sector,) for sector in sectors])

    def change(self, first: int, data: list[bytes]) -> None:
        for number, sector in enumerate(data, first):
            self.now[number] = sector
            self.versions[number] = (*self.versions[number], sector)

    def may_be_zero(self, first: int, count: int) -> None:
        """A discard: what was there, or zeros, and nobody may rely on either."""
        for number in range(first, first + count):
            self.versions[number] = (*self.versions[number], _ZERO)

    def flushed(self, content: bytes) -> None:
        self.now = [content[i : i + SECTOR] for i in range(0, len(content), SECTOR)]
        self.versions = [(sector,) for sector in self.now]


@dataclass
class Session:
    """One guest's life with an image, and what it may find after a crash at any moment of it."""

    disk: Disk
    path: Path
    log: Log
    snapshots: list[bytes]
    before: bytes = b""  # the disk
    dirty: dict[str, list[tuple[int, int]]] = field(default_factory=dict)  # by each bitmap, then
    guests: int = 1  # each has the sectors whose numbers leave its own, divided by this

    def allowed_at(self, position: int) -> list[tuple[bytes, ...]]:
        """By sector: what its guest's last mark before a position says. A mark stands before the write it allows."""
        last: dict[int, list[tuple[bytes, ...]]] = {}
        for event in reversed(self.log.events[:position]):
            if isinstance(event, Mark):
                last.setdefault(event.guest, event.allowed)
                if len(last) == self.guests:
                    break
        return [last[number % self.guests][number] for number in range(len(last[0]))]


def live(disk: Disk, directory: Path, seed: int, steps: int) -> Session:
    """A guest that does `steps` things to a new image, of which everything is recorded."""
    chosen = random.Random(seed)
    path = disk.make(directory, seed)
    with _opened(path) as before:
        snapshots = [_content(before.view(info)) for info in before.snapshots()]
        content = _content(before.view(None))
        dirty = {name: list(before.dirty_extents(name, 0, disk.size)) for name in before.dirty_bitmaps()}
    assert set(dirty) == (set(BITMAPS) if disk.bitmaps else set())
    guest = Guest.of(content)
    data_file = directory / "data.raw" if disk.data_file else None
    node, log = open_recorded(path, data_file=data_file, discard_no_unref=disk.no_unref)
    with node.metadata.lock:
        node.metadata.refcounts.look_from(disk.first_free)
    log.mark(guest.versions)
    sectors = disk.size // SECTOR
    for step in range(1, steps + 1):
        first = chosen.randrange(sectors)
        count = min(chosen.choice([1, 2, 8, 8, 16, 60]), sectors - first)
        what = chosen.choices(["write", "zero", "unmap", "discard", "flush"], [6, 1, 1, 1, 2])[0]
        if what == "flush":
            node.flush()
            guest.flushed(_content(node))
        elif what == "write":
            data = [(step << 24 | number).to_bytes(8, "big") * (SECTOR // 8) for number in range(count)]
            guest.change(first, data)
            log.mark(guest.versions)
            node.pwritev(first * SECTOR, [memoryview(b"".join(data))])
        elif what == "discard":
            guest.may_be_zero(first, count)
            log.mark(guest.versions)
            node.pdiscard(first * SECTOR, count * SECTOR)
        else:
            guest.change(first, [_ZERO] * count)
            log.mark(guest.versions)
            node.pwrite_zeroes(first * SECTOR, count * SECTOR, may_unmap=what == "unmap")
        log.mark(guest.versions)
    _finish(node, log, [guest])
    with _opened(path) as after:
        assert set(after.dirty_bitmaps()) == set(dirty)
    return Session(disk, path, log, snapshots, content, dirty)


def live_together(disk: Disk, directory: Path, seed: int, steps: int, guests: int = 3) -> Session:
    """The same with several guests at once, whose sectors lie side by side in the same clusters."""
    path = disk.make(directory, seed)
    with _opened(path) as before:
        snapshots = [_content(before.view(info)) for info in before.snapshots()]
        content = _content(before.view(None))
    node, log = open_recorded(path)
    all_guests = [Guest.of(content) for _ in range(guests)]
    for number, guest in enumerate(all_guests):
        log.mark(guest.versions, number)

    def run(number: int) -> None:
        guest, chosen = all_guests[number], random.Random(seed * 100 + number)
        for step in range(1, steps + 1):
            sector = chosen.randrange(disk.size // SECTOR // guests) * guests + number
            if chosen.random() < 0.2:
                node.flush()
                guest.flushed(b"".join(guest.now))
            else:
                data = (number << 56 | step << 24 | sector).to_bytes(8, "big") * (SECTOR // 8)
                data = _ZERO if chosen.random() < 0.2 else data
                guest.change(sector, [data])
                log.mark(guest.versions, number)
                if data is _ZERO:
                    node.pwrite_zeroes(sector * SECTOR, SECTOR, may_unmap=True)
                else:
                    node.pwritev(sector * SECTOR, [memoryview(data)])
            log.mark(guest.versions, number)

    threads = [threading.Thread(target=run, args=[number]) for number in range(guests)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    now = _content(node)
    for number, guest in enumerate(all_guests):
        mine = range(number, disk.size // SECTOR, guests)
        assert all(now[n * SECTOR : (n + 1) * SECTOR] == guest.now[n] for n in mine)
    _finish(node, log, all_guests)
    return Session(disk, path, log, snapshots, guests=guests)


def _finish(node: WritableQcow2Node, log: Log, guests: list[Guest]) -> None:
    """The end of an image's life: a clean close, after which everything is durable."""
    final = _content(node)
    node.close()
    for number, guest in enumerate(guests):
        guest.flushed(final)
        log.mark(guest.versions, number)


class _opened:  # noqa: N801  # a context manager, used as one
    """An image, open as any reader has it."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> Qcow2Node:
        self._node = open_image(str(self._path))
        return self._node

    def __exit__(self, *_: object) -> None:
        self._node.close()


def _content(node: object) -> bytes:
    content: bytes = node.pread(0, node.size)  # type: ignore[attr-defined]
    return content


def crash_points(
    session: Session, chosen: random.Random, random_points: int
) -> Iterator[tuple[int, dict[Path, bytes]]]:
    """Every state that a killed process leaves, and so many of those that a power cut may leave."""
    writes = [n for n, event in enumerate(session.log.events, 1) if isinstance(event, Write)]
    files = {path: bytearray(data) for path, data in session.log.before.items()}
    yield session.guests, {path: bytes(data) for path, data in files.items()}
    for number, event in enumerate(session.log.events, 1):
        if isinstance(event, Write):
            content = files[event.path]
            content += bytes(max(0, event.offset - len(content)))
            content[event.offset : event.offset + len(event.data)] = event.data
            yield number, {path: bytes(data) for path, data in files.items()}
    for _ in range(random_points):
        position = chosen.choice(writes) + chosen.randrange(3)
        yield position, session.log.crashed(position, chosen)


def judge(session: Session, position: int, state: dict[Path, bytes], *, by_qemu: bool) -> None:
    """Nothing but leaks, every snapshot as it was, and every sector as it was at the last flush or later."""
    for path, data in state.items():
        path.write_bytes(data)
    soundness.check(state[session.path])
    if by_qemu:
        _judged_by_qemu(session.path)
    allowed = session.allowed_at(position)
    with _opened(session.path) as node:
        content = _content(node.view(None))
        for number, versions in enumerate(allowed):
            sector = content[number * SECTOR : (number + 1) * SECTOR]
            if sector not in versions:
                raise AssertionError(f"sector {number} holds {sector[:16].hex()}, not what was flushed to it or later")
        for info, expected in zip(node.snapshots(), session.snapshots, strict=True):
            if _content(node.view(info)) != expected:
                raise AssertionError(f"snapshot {info} has changed")
        for name in node.dirty_bitmaps():
            _judge_bitmap(session, name, list(node.dirty_extents(name, 0, node.size)), content)


def _judge_bitmap(session: Session, name: str, found: list[tuple[int, int]], content: bytes) -> None:
    """A bitmap that says that it can be believed has all that it had, and all that was written since."""
    if name == "rests":
        if found != session.dirty[name]:
            raise AssertionError(f"dirty bitmap {name} has changed")
        return
    dirty = {number for offset, length in found for number in range(offset // SECTOR, -(-(offset + length) // SECTOR))}
    for offset, length in session.dirty[name]:
        if not dirty.issuperset(range(offset // SECTOR, (offset + length) // SECTOR)):
            raise AssertionError(f"dirty bitmap {name} has lost what was dirty at {offset}")
    for number in range(len(content) // SECTOR):
        place = slice(number * SECTOR, (number + 1) * SECTOR)
        if content[place] != session.before[place] and number not in dirty:
            raise AssertionError(f"dirty bitmap {name} does not know of sector {number}, which was written")


def _judged_by_qemu(path: Path) -> None:
    result = qemu_img("check", "-q", path, check=False)
    if result.returncode not in (0, 3):
        raise AssertionError(f"qemu-img check: {result.returncode} {result.stdout[-500:]}{result.stderr[-500:]}")


def judge_all(session: Session, seed: int, random_points: int, *, qemu_every: int) -> int:
    """How many crash points there were. The first that fails is named, and its image left where it is."""
    count = 0
    for position, state in crash_points(session, random.Random(seed), random_points):
        try:
            judge(session, position, state, by_qemu=count % qemu_every == 0)
        except (AssertionError, Qcow2SnapError, ToolFailed) as error:
            event = session.log.events[min(position, len(session.log.events)) - 1]
            raise AssertionError(
                f"{session.disk.name}, seed {seed}, after {position} events ({event!r:.100}): {error}"
            ) from error
        count += 1
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description="Crash after crash, until the time is over.")
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    arguments = parser.parse_args()
    until, seed, total = time.monotonic() + arguments.seconds, arguments.seed, 0
    while time.monotonic() < until:
        disk = random.Random(seed).choice(DISKS)
        with tempfile.TemporaryDirectory() as directory:
            session = live(disk, Path(directory), seed, 60)
            total += judge_all(session, seed, 300, qemu_every=25)
        print(f"seed {seed}: {disk.name}; {total} crash points so far", flush=True)
        seed += 1


if __name__ == "__main__":
    main()
