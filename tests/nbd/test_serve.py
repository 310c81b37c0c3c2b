"""`qcow2snap serve` as a user runs it, on images that qemu-img made; QEMU says what is right."""

from __future__ import annotations

import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qcow2snap.nbd.client import Client
from tests.nbd.serving import Serving
from tests.nbd.support import run as output
from tests.support import Image, Result, require

NewImage = Callable[..., Image]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Serving]]:
    running = []

    def start(*arguments: str | Path) -> Serving:
        listen = [] if "-p" in arguments or "-k" in arguments else ["-k", tmp_path / "s"]
        running.append(Serving(*arguments, *listen))
        return running[-1]

    yield start
    for each in running:
        if each.process.poll() is None:
            each.stop()


def test_every_snapshot_is_an_export_of_its_own_size_and_content(
    new_image: NewImage, serve: Callable[..., Serving], tmp_path: Path
) -> None:
    require("nbdcopy")
    image = new_image("1M").write(0, 65536).snapshot("small").resize("2M").write(1 << 20, 100_000).snapshot("b ü/g")
    image.write(4096, 8192)
    serving = serve(image.path)
    path = tmp_path / "s"
    assert serving.uris == [
        f"nbd+unix:///?socket={path}",
        f"nbd+unix:///small?socket={path}",
        f"nbd+unix:///b%20%C3%BC%2Fg?socket={path}",
    ]
    expected = [image.active, image.reference("small"), image.reference("b ü/g")]
    assert [reference.size for reference in expected] == [2 << 20, 1 << 20, 2 << 20]
    for uri, reference in zip(serving.uris, expected, strict=True):
        assert output("nbdinfo", "--size", uri).strip() == str(reference.size)
        output("nbdcopy", uri, tmp_path / "copy")
        assert (tmp_path / "copy").read_bytes() == reference.read()


def test_a_chosen_snapshot_is_the_default_export(new_image: NewImage, serve: Callable[..., Serving]) -> None:
    image = new_image("1M").write(0, 65536).snapshot("small").resize("2M")
    [uri] = serve(image.path, "-s", "small").uris
    with Client.connect(uri) as client:
        assert client.list_exports()[0].name == ""
        assert client.go().size == 1 << 20
        assert client.pread(0, 1 << 20) == image.reference("small").read()


def test_an_image_in_use_has_no_default_export(new_image: NewImage, serve: Callable[..., Serving]) -> None:
    image = new_image("1M").snapshot("small")
    serving = serve(image.path, "-U")
    assert [uri.partition("?")[0] for uri in serving.uris] == ["nbd+unix:///small"]


def test_tcp_is_on_loopback_unless_told_otherwise(new_image: NewImage, serve: Callable[..., Serving]) -> None:
    [uri, _] = serve(new_image("1M").snapshot("small").path, "-p", "0").uris
    assert uri.startswith("nbd://127.0.0.1:")
    assert output("nbdinfo", "--size", uri).strip() == str(1 << 20)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_cleanly(
    new_image: NewImage, serve: Callable[..., Serving], tmp_path: Path, number: signal.Signals
) -> None:
    serving = serve(new_image("1M").path)
    with socket.socket(socket.AF_UNIX) as idle:
        idle.connect(str(tmp_path / "s"))
        assert idle.recv(100)
        assert serving.stop(number) == 0
    assert not (tmp_path / "s").exists()


def test_the_image_is_never_written(new_image: NewImage, serve: Callable[..., Serving], tmp_path: Path) -> None:
    image = new_image("1M").write(0, 65536).snapshot("small")
    before = image.path.read_bytes()
    image.path.chmod(0o444)
    serving = serve(image.path)
    output("nbdcopy", serving.uris[0], tmp_path / "copy")
    serving.stop()
    assert image.path.read_bytes() == before


def test_what_cannot_be_is_one_line_and_leaves_no_socket(
    new_image: NewImage, run: Callable[..., Result], tmp_path: Path
) -> None:
    image = new_image("1M").snapshot("small").path
    (tmp_path / "file").write_text("precious")
    for arguments, code, said in [
        ([image, "-s", "smal"], 1, "small"),
        ([tmp_path / "missing"], 1, "missing"),
        ([tmp_path], 1, str(tmp_path)),
        ([image, "-k", tmp_path / "file"], 1, "not a socket"),
        ([image, "-p", "70000"], 2, "70000"),
    ]:
        listen = [] if "-k" in arguments or "-p" in arguments else ["-k", tmp_path / "s"]
        result = run("serve", *arguments, *listen)
        assert result.returncode == code, result
        assert said in result.stderr
        assert code == 2 or result.stderr.count("\n") == 1
        assert not (tmp_path / "s").exists()
