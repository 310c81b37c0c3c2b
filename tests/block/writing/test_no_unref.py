"""discard-no-unref: what is discarded keeps its clusters, as with QEMU 10, and what snapshots share keeps its data."""

from __future__ import annotations

import random
import subprocess
from pathlib import Path

import pytest

from qcow2snap.block.graph import OpenOptions, open_writable
from qcow2snap.block.node import InvalidOption
from qcow2snap.block.qcow2.writing.node import WritableQcow2Node
from tests.conftest import NewImage
from tests.daemon.storage_daemon import NEWER_QEMU, PEERS, program
from tests.support import qemu_img, qemu_io, qemu_map, run
from tests.support.tools import TIME_LIMIT

MIB = 1 << 20
LAYOUTS = [{"cluster_size": 4096}, {"cluster_size": 16384, "extended_l2": True}]


def opened(path: Path) -> WritableQcow2Node:
    return open_writable(str(path), OpenOptions(discard_no_unref=True))


def by_qemu(path: Path, *commands: str) -> None:
    """QEMU 10's qemu-io with the option, which 7.2 does not have."""
    program(NEWER_QEMU)  # or skip
    options = f"driver=qcow2,discard=unmap,discard-no-unref=on,file.driver=file,file.filename={path}"
    each = [word for command in commands for word in ("-c", command)]
    words = [PEERS / "qemu-io", "-t", "unsafe", "-d", "unmap", *each, "--image-opts", options]
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL, timeout=TIME_LIMIT)


def sectors_of(path: Path) -> list[tuple[bool, bool, bool]]:
    """Of each sector: whether it is zero, data, and whether it has a place in the file.

    Not whether it is there: of what was never written, QEMU makes zero clusters, and we leave it.
    """
    return [
        (each["zero"], each["data"], "offset" in each) for each in qemu_map(path) for _ in range(each["length"] // 512)
    ]


@pytest.mark.parametrize("layout", LAYOUTS, ids=["standard", "subclusters"])
@pytest.mark.parametrize("seed", [1, 2])
def test_the_map_is_that_of_qemu(new_image: NewImage, layout: dict[str, object], seed: int) -> None:
    chosen, size = random.Random(seed), int(str(layout["cluster_size"]))
    ours, theirs = (new_image("1M", name=name, **layout).path for name in ("ours.qcow2", "theirs.qcow2"))
    commands, node = [], opened(ours)
    for number in range(60):
        offset = chosen.randrange(MIB // size) * size
        length = min(chosen.choice([1, 1, 2, 5, 20]) * size, MIB - offset)
        what = chosen.choice(["write", "write", "discard", "unmap"])
        if what == "write":
            commands.append(f"write -P {number + 1} {offset} {length}")
            node.pwritev(offset, [memoryview(bytes([number + 1]) * length)])
        elif what == "unmap":
            commands.append(f"write -zu {offset} {length}")
            node.pwrite_zeroes(offset, length, may_unmap=True)
        else:
            commands.append(f"discard {offset} {length}")
            node.pdiscard(offset, length)
    node.close()
    by_qemu(theirs, *commands)
    assert sectors_of(ours) == sectors_of(theirs)
    assert any(zero and placed for zero, _, placed in sectors_of(ours))
    assert abs(ours.stat().st_size - theirs.stat().st_size) < 2 * 65536
    for path in (ours, theirs):
        qemu_img("check", path)
    qemu_img("compare", ours, theirs)


@pytest.mark.parametrize("layout", LAYOUTS, ids=["standard", "subclusters"])
def test_the_space_goes_back_and_the_place_stays(new_image: NewImage, layout: dict[str, object]) -> None:
    path = new_image("8M", **layout).write(0, 8 * MIB, 5).path
    places = {each["start"]: each["offset"] for each in qemu_map(path)}
    before, length = path.stat().st_blocks * 512, path.stat().st_size
    node = opened(path)
    node.pdiscard(0, 4 * MIB)
    node.pwrite_zeroes(4 * MIB, 2 * MIB, may_unmap=True)
    node.flush()
    assert before - path.stat().st_blocks * 512 > 5 * MIB
    assert node.pread(0, 6 * MIB) == bytes(6 * MIB)
    node.pwritev(0, [memoryview(b"\6" * MIB)])
    node.pwritev(3 * MIB + 100, [memoryview(b"\6" * 100)])
    node.close()
    assert path.stat().st_size == length
    assert qemu_map(path)[0]["offset"] == places[0]
    qemu_img("check", path)
    qemu_io(path, "read -P 6 0 1M", f"read -P 0 {MIB} {2 * MIB + 100}", f"read -P 6 {3 * MIB + 100} 100")
    qemu_io(path, f"read -P 0 {3 * MIB + 200} {3 * MIB - 200}", "read -P 5 6M 2M")


@pytest.mark.parametrize("layout", LAYOUTS, ids=["standard", "subclusters"])
def test_what_a_snapshot_shares_keeps_its_data(new_image: NewImage, layout: dict[str, object]) -> None:
    """With QEMU 10 it loses it: there, `discard` punches the clusters, whoever else refers to them."""
    image = new_image("1M", **layout).write(0, MIB).snapshot("s").write(MIB // 2, 65536, 6)
    node = opened(image.path)
    node.pdiscard(0, MIB)
    assert node.pread(0, MIB) == bytes(MIB)
    node.pwritev(0, [memoryview(b"x" * 100)])
    info = node.find_snapshot("s")
    assert node.view(info).pread(0, MIB) == image.reference("s").read()
    node.close()
    qemu_img("check", image.path)
    node = opened(image.path)
    node.delete_snapshot(node.find_snapshot("s"))
    node.pwritev(MIB // 4, [memoryview(b"y" * 100)])
    assert node.pread(0, MIB) == b"x" * 100 + bytes(MIB // 4 - 100) + b"y" * 100 + bytes(3 * MIB // 4 - 100)
    node.close()
    qemu_img("check", image.path)


def test_version_2_cannot_say_so(new_image: NewImage) -> None:
    path = new_image("1M", compat="0.10").path
    with pytest.raises(InvalidOption, match="only supported since qcow2 version 3"):
        opened(path)
    open_writable(str(path)).close()


def test_serve_takes_it_with_writable_qcow2_images_only(new_image: NewImage) -> None:
    for words in ((), ("--writable", "-f", "raw")):
        result = run("serve", "--discard-no-unref", *words, "-k", "/nonexistent/s", new_image("1M").path)
        assert result.returncode == 2
        assert "--discard-no-unref goes with --writable and qcow2 images only" in result.stderr
