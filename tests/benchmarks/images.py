"""The images that the benchmarks read, made once by qemu-img and kept in .bench-cache."""

from __future__ import annotations

import os
import random
import subprocess
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

CACHE = Path(__file__).parents[2] / ".bench-cache"

SNAPSHOT = "before-upgrade"  # the one that is read

_MIB = 1 << 20
_GIB = 1 << 30
_CHUNK = 256 << 10  # the disk is written in chunks of this size: four clusters
_ROUNDS = 4  # a chunk's round is drawn at random, so that neighbours on the disk lie far apart in the image
_HOLES = 1 / 8  # share of the disk that is never written
_REWRITTEN = 1 / 8  # share that is written again after the snapshot


def fragmented(size: int, compression: str) -> Path:
    """A disk of `size` bytes with a snapshot in many pieces: each round of writes has its own part of the file.

    compression  none, zlib or zstd
    """
    path = CACHE / f"fragmented-{size // _MIB}M-{compression}.qcow2"
    if path.exists():
        return path
    CACHE.mkdir(exist_ok=True)
    image, disk = path.with_suffix(".part"), path.with_suffix(".raw")
    options = ["-o", f"compression_type={compression}"] if compression != "none" else []
    compressed = ["-c"] if compression != "none" else []

    choose = random.Random(size)
    chunks = range(size // _CHUNK)
    round_of = [choose.randrange(_ROUNDS) if choose.random() >= _HOLES else None for _ in chunks]
    rewritten = [chunk for chunk in chunks if choose.random() < _REWRITTEN]
    contents = _contents()

    def write(written: Iterable[int], *how: str) -> None:
        """Write chunks, and nothing else: the zeros of the source are left out."""
        with open(disk, "wb") as file:
            file.truncate(size)
            for chunk in written:
                os.pwrite(file.fileno(), next(contents), chunk * _CHUNK)
        _qemu_img("convert", "-n", "--target-is-zero", "-W", "-m", "16", *how, "-f", "raw", "-O", "qcow2", disk, image)

    _qemu_img("create", "-q", "-f", "qcow2", *options, image, str(size))
    for number in range(_ROUNDS):
        write((chunk for chunk in chunks if round_of[chunk] == number), *compressed)
        _qemu_img("snapshot", "-c", SNAPSHOT if number == _ROUNDS - 1 else f"round-{number}", image)
    write(rewritten)  # as a guest does it: never compressed
    disk.unlink()
    image.rename(path)
    return path


def preallocated(size: int) -> Path:
    """A disk with all of its metadata and no data."""
    path = CACHE / f"preallocated-{size // _GIB}G.qcow2"
    if not path.exists():
        CACHE.mkdir(exist_ok=True)
        image = path.with_suffix(".part")
        _qemu_img("create", "-q", "-f", "qcow2", "-o", "preallocation=metadata", image, str(size))
        image.rename(path)
    return path


def _contents() -> Iterator[bytes]:
    """What a system disk holds, in chunks, without end: programs, libraries, texts. They are this machine's own."""
    while True:
        chunk = b""
        for path in _files("/usr/lib", "/usr/share", sysconfig.get_path("stdlib")):
            with open(path, "rb") as file:
                while more := file.read(_CHUNK - len(chunk)):
                    chunk += more
                    if len(chunk) == _CHUNK:
                        yield chunk
                        chunk = b""


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
