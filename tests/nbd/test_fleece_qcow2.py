"""`qcow2snap fleece -f qcow2`: the active disk of an image in use, and what changed since one of its snapshots."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from tests.nbd.fleecing import CLUSTER, MiB, copy
from tests.nbd.serving import Serving
from tests.nbd.support import run as output
from tests.nbd.test_fleece_incremental import look
from tests.support import qemu_img, qemu_io, require
from tests.support import run as cli

SIZE = 8 * MiB


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Data, a snapshot, and two writes since, which a bitmap has as well."""
    raw, image = tmp_path / "content.raw", tmp_path / "disk.qcow2"
    raw.write_bytes(random.Random(1).randbytes(6 * MiB) + bytes(2 * MiB))
    qemu_img("convert", "-f", "raw", "-O", "qcow2", raw, image)
    qemu_img("snapshot", "-c", "monday", image)
    qemu_img("bitmap", "--add", "-g", "65536", image, "since-monday")
    qemu_io(image, f"write -P 9 {MiB} 128k", f"write -P 8 {7 * MiB} 64k")
    return image


DIRTY = [[MiB, 2 * CLUSTER], [7 * MiB, CLUSTER]]


def fleece(image: Path, *options: str | Path) -> Serving:
    where = ("--target", image.parent / "temp.raw", "-k", image.parent / "s")
    return Serving(image, "-f", "qcow2", *where, *options, command="fleece")


def raw_of(image: Path, *options: str) -> bytes:
    qemu_img("convert", *options, "-O", "raw", image, image.parent / "out.raw")
    return (image.parent / "out.raw").read_bytes()


def test_the_active_disk_of_an_image_is_fleeced(image: Path, tmp_path: Path) -> None:
    before, monday = raw_of(image), raw_of(image, "-l", "monday")
    serving = fleece(image)
    guest, backup = serving.uris
    commands = ["write -P 1 0 1M", "write -z 3M 64k", "discard 5M 1M", "write -P 2 7M 1M", "flush"]
    each = [argument for command in commands for argument in ("-c", command)]
    output(require("qemu-io"), "-f", "raw", "-d", "unmap", *each, guest)
    assert copy(backup, tmp_path / "backup.raw") == before
    now = copy(guest, tmp_path / "now.raw")
    assert now[:MiB] == b"\1" * MiB
    assert serving.stop() == 0
    assert "2.06 MiB of" in serving.stderr or "copied" in serving.stderr
    assert raw_of(image) == now
    assert raw_of(image, "-l", "monday") == monday
    assert qemu_img("check", image).returncode == 0


@pytest.mark.parametrize(
    ("option", "context"),
    [
        (("--changed-since", "monday"), "qcow2snap:changed-since:monday"),
        (("--changed-since", "id=1"), "qcow2snap:changed-since:id=1"),
        (("--bitmap", "since-monday"), "qemu:dirty-bitmap:since-monday"),
    ],
)
def test_only_what_changed_since_is_kept(image: Path, tmp_path: Path, option: tuple[str, str], context: str) -> None:
    """A copy of monday, and over it what is dirty in the backup, is the disk as it was."""
    before = tmp_path / "before.raw"
    before.write_bytes(raw_of(image))
    serving = fleece(image, *option)
    output(require("qemu-io"), "-f", "raw", "-c", "write -P 1 0 8M", serving.uris[0])
    readable, dirty = look(serving.uris[1], context, before)
    assert dirty == DIRTY
    clusters = {n * 4096 // CLUSTER for n, is_right in enumerate(readable) if is_right is True}
    assert clusters == {16, 17, 112}
    assert set(map(str, readable)) == {"True", "EINVAL"}
    assert serving.stop() == 0
    restored = bytearray(raw_of(image, "-l", "monday"))
    for start, length in dirty:
        restored[start : start + length] = before.read_bytes()[start : start + length]
    assert restored == before.read_bytes()


def test_what_the_image_does_not_have_is_refused(image: Path, tmp_path: Path) -> None:
    before = image.read_bytes()
    arguments = ("fleece", image, "-f", "qcow2", "--target", tmp_path / "temp.raw", "-k", tmp_path / "s")
    for options, message in (
        (("--bitmap", "b1"), 'no dirty bitmap "b1"'),
        (("--changed-since", "friday"), 'no snapshot "friday"'),
        (("--target", image), "is the disk itself"),
    ):
        result = cli(*arguments, *options)
        assert (result.returncode, result.stderr.count("\n")) == (1, 1)
        assert message in result.stderr
    assert image.read_bytes() == before
    assert not (tmp_path / "temp.raw").exists()
    guessed = cli("fleece", image, "--target", tmp_path / "temp.raw", "-k", tmp_path / "s")
    assert "say -f qcow2" in guessed.stderr
    assert json.loads(qemu_img("info", "--output=json", image).stdout)["snapshots"]
