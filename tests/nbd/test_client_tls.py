"""Our client by TLS, with other people's servers: who is trusted, and that nothing goes in the clear instead."""

from __future__ import annotations

import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from formats import nbd
from formats.nbd import OptionType, ReplyType
from qcow2snap.block.node import FileError, NBDError, UnsupportedFeature
from qcow2snap.nbd.client import Client
from tests.nbd.test_tls import make_certificates
from tests.support import require

CONTENT = bytes(range(256)) * 4096


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_certificates(tmp_path_factory.mktemp("tls") / "pki")


@pytest.fixture(params=["nbdkit", "qemu-nbd"])
def peer(request: pytest.FixtureRequest, pki: Path, tmp_path: Path) -> Iterator[str]:
    """Another server that insists on TLS and on the client's certificate, on a Unix socket."""
    (tmp_path / "disk").write_bytes(CONTENT)
    listen = tmp_path / "s"
    if request.param == "nbdkit":
        command = [require("nbdkit"), "-f", "-U", listen, "--tls=require", f"--tls-certificates={pki}",
                   "--tls-verify-peer", "file", tmp_path / "disk"]  # fmt: skip
    else:
        command = [require("qemu-nbd"), "-t", "-e", "4", "-f", "raw", "-k", listen, "--tls-creds", "tls0", "--object",
                   f"tls-creds-x509,id=tls0,endpoint=server,verify-peer=yes,dir={pki}", tmp_path / "disk"]  # fmt: skip
    server = subprocess.Popen([str(part) for part in command])
    for _ in range(200):
        with suppress(OSError), socket.socket(socket.AF_UNIX) as probe:
            probe.connect(str(listen))
            break
        time.sleep(0.05)
    yield f"socket={listen}"
    server.terminate()
    server.wait(20)


def test_it_reads_by_tls(peer: str, pki: Path) -> None:
    for name in ("", "&tls-hostname=localhost"):
        with Client.connect(f"nbds+unix:///?{peer}&tls-certificates={pki}{name}") as client:
            client.go()
            assert client.framing.structured
            assert client.pread(0, len(CONTENT)) == CONTENT


def test_only_the_right_server_is_trusted(peer: str, pki: Path, tmp_path: Path) -> None:
    other = make_certificates(tmp_path / "other")
    for uri, reason in (
        (f"nbds+unix:///?{peer}&tls-certificates={other}", "self.signed certificate|unable to get"),
        (f"nbds+unix:///?{peer}&tls-certificates={pki}&tls-hostname=elsewhere", "elsewhere"),
        (f"nbds+unix:///?{peer}", "unable to get|self.signed"),
    ):
        with pytest.raises(NBDError, match=reason):
            Client.connect(uri)
    # The client's own certificate, which has to be right, is of another CA than the server's, which need not be.
    for name in ("client-cert.pem", "client-key.pem"):
        (other / name).write_bytes((pki / name).read_bytes())
    with Client.connect(f"nbds+unix:///?{peer}&tls-certificates={other}&tls-verify-peer=false") as client:
        assert client.go().size == len(CONTENT)


def test_without_tls_that_server_says_no(peer: str) -> None:
    with Client.connect(f"nbd+unix:///?{peer}") as client, pytest.raises(NBDError):
        client.go()


def test_a_server_without_tls_is_not_spoken_to_in_the_clear(tmp_path: Path) -> None:
    """Whoever sits between could say that the server has none."""
    said = bytearray()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()

        def speak() -> None:
            sock, _ = listener.accept()
            with sock:
                sock.sendall(b"NBDMAGICIHAVEOPT\0\3")
                sock.sendall(struct.pack(">QIII", nbd.NBD_REP_MAGIC, OptionType.STARTTLS, ReplyType.ERR_UNSUP, 0))
                while piece := sock.recv(4096):
                    said.extend(piece)

        thread = threading.Thread(target=speak)
        thread.start()
        with pytest.raises(NBDError, match="does not speak TLS"):
            Client.connect(f"nbds+unix:///?socket={tmp_path}/s")
        thread.join(20)
    assert said == struct.pack(">I8sII", 3, nbd.IHAVEOPT, OptionType.STARTTLS, 0)


def test_certificates_that_are_none_are_one_error(peer: str, tmp_path: Path) -> None:
    with pytest.raises(FileError, match="no certificates"):
        Client.connect(f"nbds+unix:///?{peer}&tls-certificates={tmp_path}/none")
    if sys.version_info < (3, 13):
        with pytest.raises(UnsupportedFeature, match=r"3\.13"):
            Client.connect(f"nbds+unix:///?{peer}&tls-psk-file={tmp_path}/keys")
