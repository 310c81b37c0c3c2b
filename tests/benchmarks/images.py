"""The images that the benchmarks read, made once by qemu-img and kept in .bench-cache.

All are written in pieces, in rounds with a snapshot between them, so that neighbours on the disk lie far apart in the
image; what is written is what a system disk holds.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

CACHE = Path(__file__).parents[2] / ".bench-cache"

SNAPSHOT = "before-upgrade"  # the one that is read

_MIB = 1 << 20
_GIB = 1 << 30
_ROUNDS = 4  # a chunk's round is drawn at random
_HOLES = 1 / 8  # share of the disk that is never written
_REWRITTEN = 1 / 8  # share that is written again after the snapshot


class Layout(NamedTuple):
    """How an image is laid out. `chunk`: bytes that are written in one piece."""

    options: str = ""
    chunk: int = 256 << 10  # four clusters
    compressed: bool = False
    layers: int = 1  # with its backing files


LAYOUTS = {
    "none": Layout(),
    "zlib": Layout("compression_type=zlib", compressed=True),
    "zstd": Layout("compression_type=zstd", compressed=True),
    "chain": Layout(layers=3),
    "extended-l2": Layout("extended_l2=on,cluster_size=128k", chunk=64 << 10),
    "4k-clusters": Layout("cluster_size=4k", chunk=64 << 10),
}


def fragmented(size: int, layout: str = "none") -> Path:
    """A disk of `size` bytes with a snapshot in many pieces: each round of writes has its own part of the file."""

    def build(image: Path) -> None:
        options, chunk, compressed, layers = LAYOUTS[layout]
        how = ["-c"] if compressed else []
        choose = random.Random(size)
        chunks = range(size // chunk)
        round_of = [choose.randrange(_ROUNDS) if choose.random() >= _HOLES else None for _ in chunks]
        rewritten = [number for number in chunks if choose.random() < _REWRITTEN]
        contents = _contents(chunk)
        # The lower layers of a chain get a round each, the image itself the others and the snapshots.
        backing = None
        for number in range(_ROUNDS):
            layer = image if number >= layers - 1 else image.with_name(f"{image.stem}-{number}.qcow2")
            if number < layers:
                layer.unlink(missing_ok=True)
                _create(layer, size, options, backing)
                backing = layer
            _write(layer, size, chunk, (each for each in chunks if round_of[each] == number), contents, *how)
            if layer == image:
                _snapshot(image, SNAPSHOT if number == _ROUNDS - 1 else f"round-{number}")
        _write(image, size, chunk, rewritten, contents)  # as a guest does it: never compressed

    return _made(f"fragmented-{size // _MIB}M-{layout}.qcow2", build)


def two_states(size: int, data: int, changed: int) -> tuple[Path, list[tuple[int, int]]]:
    """A disk with snapshots "monday" and "tuesday", and the extents, as offset and length, that differ.

    `data` bytes of it are written; `changed` of these again between the two, those at its end: `qemu-img compare` goes
    no further than the first difference, and is to read the rest before that.
    """
    chunk = LAYOUTS["none"].chunk
    shuffled = random.Random(size).sample(range(size // chunk), data // chunk)
    rewritten = sorted(shuffled)[-(changed // chunk) :]

    def build(image: Path) -> None:
        contents = _contents(chunk)
        _create(image, size)
        for number in range(_ROUNDS):
            _write(image, size, chunk, shuffled[number::_ROUNDS], contents)
        _snapshot(image, "monday")
        # Zeros would not be written, and then not differ.
        _write(image, size, chunk, rewritten, (data.replace(b"\0", b" ") for data in contents))
        _snapshot(image, "tuesday")

    return _made(f"two-states-{size // _MIB}M.qcow2", build), joined((number * chunk, chunk) for number in rewritten)


def joined(extents: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Extents, as offset and length, those that follow each other as one."""
    whole: list[tuple[int, int]] = []
    for offset, length in extents:
        if whole and sum(whole[-1]) == offset:
            offset, length = whole[-1][0], whole.pop()[1] + length
        whole.append((offset, length))
    return whole


def empty(size: int) -> Path:
    """A disk of which nothing is written."""
    return _made(f"empty-{size // _MIB}M.qcow2", lambda image: _create(image, size))


def full(size: int) -> Path:
    """A disk all of which is written, from its start to its end."""

    def build(image: Path) -> None:
        chunk = LAYOUTS["none"].chunk
        _create(image, size)
        _write(image, size, chunk, range(size // chunk), _contents(chunk))

    return _made(f"full-{size // _MIB}M.qcow2", build)


def kept(size: int) -> Path:
    """The same, and a snapshot has all of it."""

    def build(image: Path) -> None:
        shutil.copyfile(full(size), image)
        _snapshot(image, SNAPSHOT)

    return _made(f"kept-{size // _MIB}M.qcow2", build)


def many_snapshots(count: int) -> Path:
    """A disk of 1 GiB with snapshots "0", "1" and so on, between which 1 MiB was written here and there."""

    def build(image: Path) -> None:
        size, chunk = _GIB, 64 << 10
        choose = random.Random(count)
        contents = _contents(chunk)
        _create(image, size)
        for number in range(count):
            _write(image, size, chunk, choose.sample(range(size // chunk), 16), contents)
            _snapshot(image, str(number))

    return _made(f"snapshots-{count}.qcow2", build)


def shared_tables(size: int, count: int) -> Path:
    """A disk with all of its metadata, and snapshots between each two of which 64 KiB was written somewhere."""

    def build(image: Path) -> None:
        _create(image, size, "preallocation=metadata")
        for number in range(count):
            _snapshot(image, str(number))
            offset = size // count * number
            subprocess.run(
                ["qemu-io", "-f", "qcow2", "-t", "unsafe", "-c", f"write {offset} 64k", image],
                check=True,
                stdout=subprocess.DEVNULL,
            )

    return _made(f"shared-tables-{size // _GIB}G-{count}.qcow2", build)


def preallocated(size: int) -> Path:
    """A disk with all of its metadata and no data."""
    return _made(f"preallocated-{size // _GIB}G.qcow2", lambda image: _create(image, size, "preallocation=metadata"))


def raw(image: Path) -> Path:
    """What the snapshot of an image holds, as a raw file with holes."""
    named = f"snapshot.name={SNAPSHOT}"
    return _made(f"{image.stem}.raw", lambda path: _qemu_img("convert", "-W", "-l", named, "-O", "raw", image, path))


def _made(name: str, build: Callable[[Path], None]) -> Path:
    """The file of this name in the cache, built under another one where it is absent."""
    path = CACHE / name
    if not path.exists():
        CACHE.mkdir(exist_ok=True)
        part = CACHE / f"{path.stem}-part{path.suffix}"
        part.unlink(missing_ok=True)
        build(part)
        part.rename(path)
    return path


def _create(image: Path, size: int, options: str = "", backing: Path | None = None) -> None:
    with_options = ["-o", options] if options else []
    on_backing = ["-b", backing.name, "-F", "qcow2"] if backing is not None else []
    _qemu_img("create", "-q", "-f", "qcow2", *with_options, *on_backing, image, str(size))


def _snapshot(image: Path, name: str) -> None:
    _qemu_img("snapshot", "-c", name, image)


def _write(image: Path, size: int, chunk: int, numbers: Iterable[int], contents: Iterator[bytes], *how: str) -> None:
    """Write chunks of a disk, and nothing else: the zeros of the source are left out."""
    disk = image.with_suffix(".raw")
    with open(disk, "wb") as file:
        file.truncate(size)
        for number in numbers:
            os.pwrite(file.fileno(), next(contents), number * chunk)
    _qemu_img("convert", "-n", "--target-is-zero", "-W", "-m", "16", *how, "-f", "raw", "-O", "qcow2", disk, image)
    disk.unlink()


def _contents(chunk: int) -> Iterator[bytes]:
    """What a system disk holds, in chunks, without end: programs, libraries, texts. They are this machine's own."""
    while True:
        gathered = b""
        for path in _files("/usr/lib", "/usr/share", sysconfig.get_path("stdlib")):
            with open(path, "rb") as file:
                while more := file.read(chunk - len(gathered)):
                    gathered += more
                    if len(gathered) == chunk:
                        yield gathered
                        gathered = b""


def _files(*folders: str) -> Iterator[str]:
    """The regular files that we may read, in the order of their names."""
    for folder in folders:
        for parent, subfolders, names in os.walk(folder):
            subfolders.sort()
            for path in sorted(os.path.join(parent, name) for name in names):
                if os.path.isfile(path) and not os.path.islink(path) and os.access(path, os.R_OK):
                    yield path


def _qemu_img(*arguments: str | Path) -> None:
    subprocess.run(["qemu-img", *arguments], check=True, stdout=subprocess.DEVNULL)
