"""What an image refers to: followed as QEMU follows it where it may be, refused with the reason where it may not."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from formats.qcow2 import HeaderExtensionType
from qcow2snap.block.graph import OpenOptions, backing_chain, open_image
from qcow2snap.block.node import FileError, ImageInUse, ReferenceRefused, UnsupportedFeature
from tests.conftest import NewImage
from tests.support import qemu_img, qemu_io


def overlay(path: Path, backing: str, backing_format: str | None = "raw", size: str = "1M") -> Path:
    """An overlay that names any backing file, there or not."""
    qemu_img("create", "-q", "-u", "-f", "qcow2", "-b", backing, "-F", backing_format or "raw", path, size)
    if backing_format is None:  # qemu-img wants one stated: make the extension one that nobody knows
        data = bytearray(path.read_bytes())
        at = data.index(HeaderExtensionType.BACKING_FILE_FORMAT.to_bytes(4, "big"))
        data[at : at + 4] = b"none"
        path.write_bytes(data)
    return path


def base(path: Path, fill: int = 0xAA) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes([fill]) * 65536)
    return path


def first_byte(path: Path, **options: object) -> int:
    node = open_image(str(path), OpenOptions(**options))  # type: ignore[arg-type]
    try:
        return node.pread(0, 1)[0]
    finally:
        node.close()


def test_a_relative_name_is_relative_to_the_image_and_not_to_us(tmp_path: Path) -> None:
    base(tmp_path / "deep" / "base.raw")
    assert first_byte(overlay(tmp_path / "deep" / "top.qcow2", "base.raw")) == 0xAA


def test_files_below_the_directory_of_the_image_are_followed(tmp_path: Path) -> None:
    base(tmp_path / "below" / "base.raw")
    assert first_byte(overlay(tmp_path / "top.qcow2", "below/base.raw")) == 0xAA


def test_an_absolute_name_within_the_directory_is_followed(tmp_path: Path) -> None:
    assert first_byte(overlay(tmp_path / "top.qcow2", str(base(tmp_path / "base.raw")))) == 0xAA


@pytest.mark.parametrize("spelling", ["{outside}", "../outside/base.raw", "file:{outside}", "link.raw"])
def test_a_file_elsewhere_is_refused_by_name_and_allowed_by_option(tmp_path: Path, spelling: str) -> None:
    outside = base(tmp_path / "outside" / "base.raw")
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "link.raw").symlink_to(outside)
    top = overlay(tmp_path / "images" / "top.qcow2", spelling.format(outside=outside))
    with pytest.raises(ReferenceRefused, match=f"{outside}.*--allow-path {outside.parent}"):
        open_image(str(top))
    assert first_byte(top, allow_paths=[str(outside.parent)]) == 0xAA


def test_a_directory_whose_name_only_starts_alike_is_elsewhere(tmp_path: Path) -> None:
    outside = base(tmp_path / "images-of-others" / "base.raw")
    (tmp_path / "images").mkdir()
    with pytest.raises(ReferenceRefused):
        open_image(str(overlay(tmp_path / "images" / "top.qcow2", str(outside))))


@pytest.mark.parametrize("name", ["/etc/passwd", "/dev/null", "/dev/zero", "/proc/self/environ"])
def test_files_of_the_system_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ReferenceRefused):
        open_image(str(overlay(tmp_path / "top.qcow2", name)))


@pytest.mark.parametrize("allowed", [False, True])
def test_a_fifo_is_refused_and_not_waited_for(tmp_path: Path, allowed: bool) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(ReferenceRefused, match="no regular file"):
        open_image(
            str(overlay(tmp_path / "top.qcow2", "fifo")), OpenOptions(allow_paths=[str(tmp_path)] if allowed else [])
        )


@pytest.mark.parametrize("name", ["nbd://localhost/x", "http://localhost/x", "nbd:localhost:10809", "ssh://h/x"])
def test_other_protocols_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ReferenceRefused, match="protocol"):
        open_image(str(overlay(tmp_path / "top.qcow2", name)))


def test_a_missing_backing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"top.qcow2: refers to 'gone.raw': No such file"):
        open_image(str(overlay(tmp_path / "top.qcow2", "gone.raw")))


def test_a_loop_is_refused(tmp_path: Path) -> None:
    overlay(tmp_path / "a.qcow2", "b.qcow2", "qcow2")
    overlay(tmp_path / "b.qcow2", "a.qcow2", "qcow2")
    with pytest.raises(ReferenceRefused, match="loop"):
        open_image(str(tmp_path / "a.qcow2"))


def test_a_loop_through_a_link_is_refused(tmp_path: Path) -> None:
    overlay(tmp_path / "a.qcow2", "b.qcow2", "qcow2")
    (tmp_path / "b.qcow2").symlink_to("a.qcow2")
    with pytest.raises(ReferenceRefused, match="loop"):
        open_image(str(tmp_path / "a.qcow2"))


def test_a_chain_of_a_thousand_images_is_refused_and_one_of_a_hundred_is_read(tmp_path: Path) -> None:
    template = overlay(tmp_path / "template.qcow2", "0000.qcow2", "qcow2").read_bytes()
    base(tmp_path / "0000.raw")
    overlay(tmp_path / "0000.qcow2", "0000.raw")
    for index in range(1, 1000):
        data = template.replace(b"0000.qcow2", b"%04d.qcow2" % (index - 1))
        (tmp_path / f"{index:04}.qcow2").write_bytes(data)
    assert first_byte(tmp_path / "0100.qcow2") == 0xAA
    with pytest.raises(ReferenceRefused, match="more than 200 images"):
        open_image(str(tmp_path / "0999.qcow2"))


JSON_NAMES = {
    "nested": {"driver": "raw", "file": {"driver": "file", "filename": "base.raw"}},
    "dotted": {"driver": "raw", "file.driver": "file", "file.filename": "base.raw"},
    "protocol only": {"driver": "file", "filename": "base.raw"},
    "short": {"file": "base.raw"},
}


@pytest.mark.parametrize("kind", JSON_NAMES)
def test_json_names_are_followed(tmp_path: Path, kind: str) -> None:
    base(tmp_path / "base.raw")
    options = JSON_NAMES[kind] if kind != "short" else {"driver": "raw", "file": {"filename": "base.raw"}}
    text = json.dumps(options).replace("base.raw", str(tmp_path / "base.raw"))
    assert first_byte(overlay(tmp_path / "top.qcow2", f"json:{text}")) == 0xAA


def test_a_json_name_may_cut_a_stretch_out_of_a_raw_file(tmp_path: Path) -> None:
    (tmp_path / "base.raw").write_bytes(b"\x11" * 65536 + b"\x22" * 65536)
    options = {
        "driver": "raw",
        "offset": 65536,
        "size": 65536,
        "file": {"driver": "file", "filename": str(tmp_path / "base.raw")},
    }
    top = overlay(tmp_path / "top.qcow2", f"json:{json.dumps(options)}")
    assert first_byte(top) == 0x22
    qemu_io(top, "read -P 0x22 0 65536", "read -P 0 65536 65536", options=("-r",))


@pytest.mark.parametrize(
    "options",
    [
        {"driver": "nbd", "host": "localhost", "export": "x"},
        {"driver": "raw", "file": {"driver": "http", "filename": "http://localhost/x"}},
        {"driver": "raw", "file": {"driver": "file", "filename": "/etc/passwd"}},
        {"driver": "raw", "file.driver": "file", "file.filename": "/etc/passwd"},
        {"driver": "qcow2", "file": {"driver": "file", "filename": "/dev/zero"}},
    ],
)
def test_json_names_are_no_way_around_the_rules(tmp_path: Path, options: dict[str, object]) -> None:
    with pytest.raises((ReferenceRefused, UnsupportedFeature)):
        open_image(str(overlay(tmp_path / "top.qcow2", f"json:{json.dumps(options)}", None)))


@pytest.mark.parametrize(
    "text", ["json:", "json:{", "json:[]", "json:" + "[" * 900, 'json:{"file":1}', 'json:{"a":{}}']
)
def test_json_names_that_make_no_sense_are_refused(tmp_path: Path, text: str) -> None:
    top = overlay(tmp_path / "top.qcow2", "x" * len(text), None)
    top.write_bytes(top.read_bytes().replace(b"x" * len(text), text.encode()))
    with pytest.raises((ReferenceRefused, UnsupportedFeature)):
        open_image(str(top))


def test_an_unstated_format_is_guessed_as_qemu_does(tmp_path: Path, new_image: NewImage) -> None:
    inner = new_image("1M", name="inner.qcow2").write(0, 65536, 0x5A)
    assert first_byte(overlay(tmp_path / "top.qcow2", inner.path.name, None)) == 0x5A
    base(tmp_path / "base.raw")
    assert first_byte(overlay(tmp_path / "over-raw.qcow2", "base.raw", None)) == 0xAA


@pytest.mark.parametrize("image_format", ["vmdk", "vdi", "vhdx", "qed", "parallels"])
def test_a_container_of_another_format_is_not_taken_for_a_raw_disk(tmp_path: Path, image_format: str) -> None:
    qemu_img("create", "-q", "-f", image_format, tmp_path / "base.img", "1M")
    with pytest.raises(UnsupportedFeature, match=image_format):
        open_image(str(overlay(tmp_path / "top.qcow2", "base.img", None)))


def test_a_backing_file_that_somebody_writes_is_refused(tmp_path: Path, new_image: NewImage) -> None:
    from tests.block.test_image_lock import qemu_io_holding

    inner = new_image("1M", name="inner.qcow2")
    top = overlay(tmp_path / "top.qcow2", "inner.qcow2", "qcow2")
    with qemu_io_holding(inner.path):
        with pytest.raises(ImageInUse):
            open_image(str(top))
        assert first_byte(top, force_share=True) == 0


def test_a_failed_opening_leaves_no_file_open(tmp_path: Path) -> None:
    overlay(tmp_path / "a.qcow2", "b.qcow2", "qcow2")
    overlay(tmp_path / "b.qcow2", "gone.raw")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        with pytest.raises(FileError):
            open_image(str(tmp_path / "a.qcow2"))
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_chain_is_told_as_far_as_it_can_be_opened(tmp_path: Path) -> None:
    overlay(tmp_path / "a.qcow2", "b.qcow2", "qcow2")
    overlay(tmp_path / "b.qcow2", "gone.raw")
    links = backing_chain(str(tmp_path / "a.qcow2"))
    assert [link.reference for link in links] == ["b.qcow2", "gone.raw"]
    assert links[0].node is not None
    assert links[0].error is None
    links[0].node.close()
    assert links[1].node is None
    assert "No such file" in str(links[1].error)


def test_a_data_file_elsewhere_is_refused(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "images").mkdir()
    image = tmp_path / "images" / "disk.qcow2"
    data = tmp_path / "outside" / "data.raw"
    qemu_img("create", "-q", "-f", "qcow2", "-o", f"data_file={data}", image, "1M")
    with pytest.raises(ReferenceRefused, match="--allow-path"):
        open_image(str(image))
    assert first_byte(image, allow_paths=[str(data.parent)]) == 0
    open_image(str(image), with_children=False).close()
