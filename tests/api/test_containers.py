"""Libraries that read files read snapshots: archives, and file systems through The Sleuth Kit."""

from __future__ import annotations

import io
import subprocess
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest

import qcow2snap
from tests.conftest import NewImage
from tests.support import Image
from tests.support.tools import TIME_LIMIT, require

SECTOR = 512
FILES = {"hello.txt": b"hello\n" * 100, "empty": b"", "deep/in/here.bin": bytes(range(256)) * 2000}


def frozen(new_image: NewImage, content: Path) -> Image:
    """A disk that holds a file byte by byte, frozen, and then written over and grown."""
    size = -(-content.stat().st_size // SECTOR) * SECTOR
    image = new_image(size, cluster_size=4096).io(f"write -s {content} 0 {content.stat().st_size}").snapshot("frozen")
    return image.write(0, size, 0xFF).resize("16M")


@pytest.mark.parametrize("is_buffered", [False, True], ids=["raw", "buffered"])
@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED], ids=["stored", "deflated"])
def test_a_zip_archive(new_image: NewImage, tmp_path: Path, method: int, is_buffered: bool) -> None:
    with zipfile.ZipFile(tmp_path / "zip", "w", method) as archive:
        for name, data in FILES.items():
            archive.writestr(name, data)
    with qcow2snap.open(frozen(new_image, tmp_path / "zip").path) as image, image.snapshot("frozen").open() as file:
        source: Any = io.BufferedReader(file) if is_buffered else file
        with zipfile.ZipFile(source) as archive:
            assert archive.testzip() is None
            assert {name: archive.read(name) for name in archive.namelist()} == FILES


@pytest.mark.parametrize("mode", ["r:", "r:gz", "r:xz", "r:*", "r|*"])
def test_a_tar_archive(new_image: NewImage, tmp_path: Path, mode: str) -> None:
    with tarfile.open(tmp_path / "tar", {"r:gz": "w:gz", "r:xz": "w:xz"}.get(mode, "w:")) as archive:
        for name, data in FILES.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    with qcow2snap.open(frozen(new_image, tmp_path / "tar").path) as image, image.snapshot("frozen").open() as file:
        found = {}
        with tarfile.open(fileobj=file, mode=mode) as archive:  # type: ignore[call-overload]
            for member in archive:
                source = archive.extractfile(member)
                assert source is not None
                found[member.name] = source.read()
        assert found == FILES


def test_a_file_system_through_the_sleuth_kit(new_image: NewImage, tmp_path: Path) -> None:
    """As its users do it: an Img_Info over anything that seeks and reads."""
    pytsk3 = pytest.importorskip("pytsk3", reason="pytsk3 is not installed")
    root = tmp_path / "root"
    (root / "etc").mkdir(parents=True)
    (root / "etc" / "motd").write_bytes(b"as it was\n" * 5000)
    subprocess.run(
        [require("mke2fs"), "-q", "-t", "ext4", "-d", root, tmp_path / "fs", "2M"], check=True, timeout=TIME_LIMIT
    )

    class Img(pytsk3.Img_Info):  # type: ignore[misc, name-defined]
        def __init__(self, file: io.RawIOBase) -> None:
            self.file = file
            super().__init__(url="", type=pytsk3.TSK_IMG_TYPE_EXTERNAL)

        def close(self) -> None:
            self.file.close()

        def read(self, offset: int, size: int) -> bytes:
            self.file.seek(offset)
            return self.file.read(size) or b""

        def get_size(self) -> int:
            return self.file.seek(0, io.SEEK_END)

    with qcow2snap.open(frozen(new_image, tmp_path / "fs").path) as image:
        file_system = pytsk3.FS_Info(Img(image.snapshot("frozen").open()))
        names = [entry.info.name.name for entry in file_system.open_dir("/etc")]
        motd = file_system.open("/etc/motd")
        assert b"motd" in names
        assert motd.read_random(0, motd.info.meta.size) == b"as it was\n" * 5000
