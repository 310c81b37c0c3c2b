"""TLS: other people's clients by certificates and keys, and what somebody in between could try."""

from __future__ import annotations

import socket
import ssl
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from formats import nbd
from formats.nbd import ClientFlag, OptionType, ReplyType
from qcow2snap.block.node import FileError, NBDError, UnsupportedFeature
from qcow2snap.nbd.framing import EXTENDED_HEADERS, SIMPLE_REPLIES, STRUCTURED_REPLIES
from qcow2snap.nbd.listen import listen_unix
from qcow2snap.nbd.negotiation import ServerNegotiation, TLSMode
from qcow2snap.nbd.server import Server
from qcow2snap.nbd.tls import Credentials
from tests.nbd.serving import Serving
from tests.nbd.support import NewNode, ZeroNode, exports
from tests.nbd.support import run as output
from tests.nbd.test_negotiation import replies
from tests.nbd.wire import ask, handshake, meta, packed, read
from tests.support import Image, Result, require

NewImage = Callable[..., Image]

AUTHORITY = "cn = test CA\nca\ncert_signing_key\n"
SERVER = "cn = localhost\ndns_name = localhost\nip_address = 127.0.0.1\ntls_www_server\nsigning_key\n"
CLIENT = "cn = somebody\ntls_www_client\nsigning_key\n"


def make_certificates(directory: Path) -> Path:
    """What nbdkit(1) and libnbd(3) say to make: a CA, and certificates of it for a server and a client."""
    require("certtool")
    directory.mkdir()

    def certtool(*arguments: str) -> None:
        output("certtool", *arguments)

    for name, template in (("ca", AUTHORITY), ("server", SERVER), ("client", CLIENT)):
        (directory / f"{name}.info").write_text(f"{template}expiration_days = 2\n")
        certtool("--generate-privkey", "--key-type=ecdsa", "--outfile", f"{directory}/{name}-key.pem")
        what = ["--template", f"{directory}/{name}.info", "--outfile", f"{directory}/{name}-cert.pem"]
        if name == "ca":
            certtool("--generate-self-signed", "--load-privkey", f"{directory}/ca-key.pem", *what)
        else:
            authority = ["--load-ca-certificate", f"{directory}/ca-cert.pem", "--load-ca-privkey"]
            certtool("--generate-certificate", *authority, f"{directory}/ca-key.pem", *what,
                     "--load-privkey", f"{directory}/{name}-key.pem")  # fmt: skip
    return directory


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_certificates(tmp_path_factory.mktemp("tls") / "pki")


@pytest.fixture(scope="module")
def anonymous(pki: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a client has that has no certificate of its own."""
    directory = tmp_path_factory.mktemp("anonymous")
    (directory / "ca-cert.pem").write_bytes((pki / "ca-cert.pem").read_bytes())
    return directory


@pytest.fixture
def image(new_image: NewImage) -> Image:
    return new_image("3M").write(0, 1_000_000).write(2 << 20, 77_777).snapshot("monday").write(0, 4096)


@pytest.fixture
def serve(image: Image, pki: Path) -> Iterator[Callable[..., Serving]]:
    running = []

    def start(*options: str | Path) -> Serving:
        running.append(Serving(image.path, "-p", "0", "--tls-certificates", pki, *options))
        return running[-1]

    yield start
    for each in running:
        if each.process.poll() is None:
            assert each.stop() == 0


def by_name(uri: str, certificates: Path, *, scheme: str = "nbds") -> str:
    """The certificate is for this name."""
    host = uri.partition("://")[2].replace("127.0.0.1", "localhost")
    return f"{scheme}://{host}?tls-certificates={certificates}"


# Real clients.


@pytest.mark.parametrize("workers", ["0", "2"])
def test_libnbd_and_qemu_read_by_tls(
    serve: Callable[..., Serving], image: Image, anonymous: Path, tmp_path: Path, workers: str
) -> None:
    require("nbdcopy")
    uri = serve("--tls=require", "--workers", workers).uris[1]
    assert uri.startswith("nbds://127.0.0.1:")
    assert "with TLS" in output("nbdinfo", by_name(uri, anonymous))
    expected = image.reference("monday").read()
    for options in (["--connections=1"], ["--connections=4", "--threads=4"], ["--request-size=4096", "--synchronous"]):
        output("nbdcopy", *options, by_name(uri, anonymous), tmp_path / "copy")
        assert (tmp_path / "copy").read_bytes() == expected
    port = uri.rpartition(":")[2].partition("/")[0]
    output(
        "qemu-img", "convert", "-O", "raw",
        "--object", f"tls-creds-x509,id=tls0,endpoint=client,dir={anonymous}",
        "--image-opts", f"driver=nbd,server.type=inet,server.host=localhost,server.port={port},export=monday,"
                        "tls-creds=tls0",
        tmp_path / "copy",
    )  # fmt: skip
    assert (tmp_path / "copy").read_bytes() == expected


def test_a_client_must_show_its_certificate_if_asked(serve: Callable[..., Serving], pki: Path, anonymous: Path) -> None:
    require("nbdinfo")
    serving = serve("--tls=require", "--tls-verify-peer", "--workers", "0")
    uri = serving.uris[1]
    assert output("nbdinfo", "--size", by_name(uri, anonymous), check=False) == ""
    assert output("nbdinfo", "--size", by_name(uri, pki)) == f"{3 << 20}\n"
    assert serving.stop() == 0
    assert "the TLS handshake failed: PEER_DID_NOT_RETURN_A_CERTIFICATE" in serving.stderr


def test_without_tls_no_client_is_served_where_it_is_required(serve: Callable[..., Serving], anonymous: Path) -> None:
    require("nbdinfo")
    uri = serve("--tls=require").uris[1]
    refused = subprocess.run(["nbdinfo", by_name(uri, anonymous, scheme="nbd")], capture_output=True, text=True)
    assert refused.returncode != 0
    listing = subprocess.run(
        ["nbdinfo", "--list", by_name(uri, anonymous, scheme="nbd")], capture_output=True, text=True
    )
    assert "monday" not in listing.stdout
    assert output("nbdinfo", "--size", by_name(uri, anonymous)) == f"{3 << 20}\n"


def test_where_tls_is_on_both_are_served(serve: Callable[..., Serving], anonymous: Path) -> None:
    require("nbdinfo")
    uri = serve("--tls=on").uris[1]
    for scheme, protocol in (("nbd", "without TLS"), ("nbds", "with TLS")):
        assert protocol in output("nbdinfo", by_name(uri, anonymous, scheme=scheme))


def test_where_tls_is_off_a_client_that_wants_it_leaves(image: Image, anonymous: Path) -> None:
    require("nbdinfo")
    serving = Serving(image.path, "-p", "0", "--workers", "0")
    assert output("nbdinfo", by_name(serving.uris[0], anonymous), check=False) == ""
    assert serving.stop() == 0


def test_sighup_reads_the_certificates_again(image: Image, pki: Path, tmp_path: Path, anonymous: Path) -> None:
    require("nbdinfo")
    used = make_certificates(tmp_path / "used")
    serving = Serving(image.path, "-p", "0", "--tls=require", "--tls-certificates", used)
    where = by_name(serving.uris[0], anonymous)
    assert output("nbdinfo", "--size", where, check=False) == ""  # another CA's
    for path in pki.glob("server-*.pem"):
        (used / path.name).write_bytes(path.read_bytes())
    serving.process.send_signal(1)
    deadline = time.monotonic() + 10
    while output("nbdinfo", "--size", where, check=False) != f"{3 << 20}\n":
        assert time.monotonic() < deadline
    assert serving.stop() == 0


def test_by_pre_shared_keys(image: Image, tmp_path: Path) -> None:
    require("psktool")
    output("psktool", "-u", "alice", "-p", tmp_path / "keys.psk")
    if not hasattr(ssl.SSLContext, "set_psk_server_callback"):  # before Python 3.13
        with pytest.raises(UnsupportedFeature, match=r"Python 3\.13"):
            Credentials(psk_file=str(tmp_path / "keys.psk")).read()
        return
    require("nbdinfo")
    serving = Serving(image.path, "-k", tmp_path / "s", "--tls=require", "--tls-psk", tmp_path / "keys.psk")
    uri = f"nbds+unix://alice@/monday?socket={tmp_path}/s&tls-psk-file={tmp_path}/keys.psk"
    assert output("nbdinfo", "--size", uri) == f"{3 << 20}\n"
    output("psktool", "-u", "mallory", "-p", tmp_path / "others.psk")
    uri = f"nbds+unix://mallory@/monday?socket={tmp_path}/s&tls-psk-file={tmp_path}/others.psk"
    assert output("nbdinfo", "--size", uri, check=False) == ""
    assert serving.stop() == 0


# Rude clients.


class Dialog:
    """A client of a server in this process, before and after STARTTLS."""

    def __init__(self, server: Server) -> None:
        self.plain = socket.socket(socket.AF_UNIX)
        self.plain.settimeout(20)
        self.plain.connect(server.listeners[0].uri.socket)

    def start_tls(self) -> None:
        assert len(self.plain.recv(18)) == 18
        self.plain.sendall(struct.pack(">I8sII", 3, nbd.IHAVEOPT, OptionType.STARTTLS, 0))
        assert replies(self.plain.recv(100), OptionType.STARTTLS) == [(ReplyType.ACK, b"")]

    def secure(self, context: ssl.SSLContext) -> ssl.SSLSocket:
        self.start_tls()
        return context.wrap_socket(self.plain, server_hostname="localhost")


@pytest.fixture
def server(new_node: NewNode, pki: Path, tmp_path: Path) -> Iterator[Server]:
    node = new_node(("file", 4 << 20), ("memory", 1 << 20))
    secure = Credentials(str(pki)).read()
    places = [listen_unix(str(tmp_path / "s"))]
    with Server(exports(default=node), places, tls=TLSMode.REQUIRE, secure=secure, handshake_timeout=1.5) as server:
        yield server


@pytest.fixture
def context(pki: Path) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=str(pki / "ca-cert.pem"))


class AfterGreeting:
    """An SSLSocket in a handshake that has been greeted in the clear."""

    def __init__(self, sock: ssl.SSLSocket) -> None:
        self.socket = sock
        self._greeting = bytes(18)
        self._flags_sent = False

    def recv(self, size: int) -> bytes:
        if self._greeting:
            taken, self._greeting = self._greeting[:size], self._greeting[size:]
            return taken
        return self.socket.recv(size)

    def sendall(self, data: bytes) -> None:
        if self._flags_sent:
            self.socket.sendall(data)
        self._flags_sent = True


@pytest.mark.parametrize("framing", [SIMPLE_REPLIES, STRUCTURED_REPLIES, EXTENDED_HEADERS])
def test_requests_in_one_record_or_torn_over_many_are_answered(
    server: Server, context: ssl.SSLContext, framing
) -> None:  # type: ignore[no-untyped-def]
    sock = Dialog(server).secure(context)
    receive = handshake(AfterGreeting(sock), framing)  # type: ignore[arg-type]
    requests = [packed(read(512 * number, 512, cookie=number), framing) for number in range(100)]
    sock.sendall(b"".join(requests))
    for byte in packed(read(0, 100, cookie=100), framing):
        sock.sendall(bytes([byte]))
    header = {SIMPLE_REPLIES: 16, STRUCTURED_REPLIES: 28, EXTENDED_HEADERS: 40}[framing]
    for _ in range(100):
        assert len(receive(header + 512)) == header + 512
    assert len(receive(header + 100)) == header + 100
    sock.close()


@pytest.mark.parametrize(
    "said",
    [b"", b"\x16", b"\x16\x03\x01\x00\x05", b"GET / HTTP/1.1\r\n\r\n" * 100, struct.pack(">8sII", nbd.IHAVEOPT, 3, 0)],
)
def test_what_is_no_tls_is_cut_off_in_time(server: Server, context: ssl.SSLContext, said: bytes) -> None:
    dialog = Dialog(server)
    dialog.start_tls()
    started = time.monotonic()
    with suppress(OSError):
        dialog.plain.sendall(said)
        while dialog.plain.recv(1 << 12):
            pass
    assert time.monotonic() - started < 5
    dialog.plain.close()
    Dialog(server).secure(context).close()  # others are served


def drip_in_vain(dialog: Dialog, data: bytes, started: float) -> None:
    """Send byte by byte; the server ends it within the time that a handshake has."""
    with suppress(OSError):
        for byte in data:
            dialog.plain.sendall(bytes([byte]))
            time.sleep(0.05)
    assert 1 < time.monotonic() - started < 5
    dialog.plain.close()


def test_a_tls_handshake_that_drips_is_cut_off_in_time(server: Server, context: ssl.SSLContext) -> None:
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    with suppress(ssl.SSLWantReadError):
        context.wrap_bio(incoming, outgoing, server_hostname="localhost").do_handshake()
    dialog = Dialog(server)
    dialog.start_tls()
    drip_in_vain(dialog, outgoing.read(), time.monotonic())


def test_records_that_drip_after_the_handshake_get_no_more_time(server: Server, context: ssl.SSLContext) -> None:
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = context.wrap_bio(incoming, outgoing, server_hostname="localhost")
    dialog = Dialog(server)
    dialog.start_tls()
    started = time.monotonic()
    while True:
        try:
            tls.do_handshake()
            break
        except ssl.SSLWantReadError:
            dialog.plain.sendall(outgoing.read())
            incoming.write(dialog.plain.recv(1 << 16))
    tls.write(struct.pack(">8sII", nbd.IHAVEOPT, OptionType.LIST, 0) * 10)
    drip_in_vain(dialog, outgoing.read(), started)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_old_versions_are_refused(server: Server, context: ssl.SSLContext) -> None:
    context.minimum_version = ssl.TLSVersion.TLSv1
    context.maximum_version = ssl.TLSVersion.TLSv1_1
    context.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.raises(ssl.SSLError):
        Dialog(server).secure(context)


def test_records_that_somebody_changed_end_the_connection(server: Server, context: ssl.SSLContext) -> None:
    sock = Dialog(server).secure(context)
    handshake(AfterGreeting(sock), SIMPLE_REPLIES)  # type: ignore[arg-type]
    raw = socket.socket(fileno=sock.detach())
    raw.settimeout(20)
    raw.sendall(b"\x17\x03\x03\x00\x20" + bytes(32))
    with suppress(OSError):
        while raw.recv(1 << 12):
            pass
    raw.close()


def test_stop_answers_by_tls_what_is_in_flight_and_says_that_it_is_the_end(
    server: Server, context: ssl.SSLContext
) -> None:
    sock = Dialog(server).secure(context)
    receive = handshake(AfterGreeting(sock), SIMPLE_REPLIES)  # type: ignore[arg-type]
    sock.sendall(packed(read(0, 5 << 20)))
    start = receive(16)
    with ThreadPoolExecutor() as pool:
        stopping = pool.submit(server.stop)
        time.sleep(0.2)
        assert start[4:8] == bytes(4)
        assert len(receive(5 << 20)) == 5 << 20
        sock.suppress_ragged_eofs = False
        assert sock.recv(1) == b""
        stopping.result(5)
    sock.close()


def test_a_client_that_never_receives_is_cut_off_at_the_end(server: Server, context: ssl.SSLContext) -> None:
    sock = Dialog(server).secure(context)
    handshake(AfterGreeting(sock), STRUCTURED_REPLIES)  # type: ignore[arg-type]
    sock.sendall(packed(read(0, 5 << 20)) * 20)
    time.sleep(0.1)
    started = time.monotonic()
    server.stop()
    assert 4 < time.monotonic() - started < 7
    sock.close()


# The handshake, byte by byte.


class Session:
    """A client of a negotiation."""

    def __init__(self, mode: TLSMode) -> None:
        self.server = ServerNegotiation(exports(default=ZeroNode(1000)), mode)
        self.take()
        self.server.receive(struct.pack(">I", ClientFlag.FIXED_NEWSTYLE | ClientFlag.NO_ZEROES))

    def take(self) -> bytes:
        return b"".join(iter(self.server.data_to_send, b""))

    def option(self, option: int, data: bytes = b"") -> int:
        """The type of the last reply."""
        self.server.receive(struct.pack(">8sII", nbd.IHAVEOPT, option, len(data)) + data)
        return replies(self.take(), option)[-1][0]


@pytest.mark.parametrize(
    "option", [*set(OptionType) - {OptionType.STARTTLS, OptionType.ABORT, OptionType.EXPORT_NAME}, 99]
)
def test_where_tls_is_required_every_other_option_waits_for_it(option: int) -> None:
    session = Session(TLSMode.REQUIRE)
    assert session.option(option, b"\0\0\0\0\0\0") == ReplyType.ERR_TLS_REQD
    assert session.option(OptionType.STARTTLS) == ReplyType.ACK
    session.server.tls_started()
    assert session.option(OptionType.GO, ask()) == ReplyType.ACK
    assert session.server.agreement is not None


def test_where_tls_is_required_export_name_is_cut_off_and_abort_acknowledged() -> None:
    session = Session(TLSMode.REQUIRE)
    with pytest.raises(NBDError, match="without TLS"):
        session.option(OptionType.EXPORT_NAME)
    session = Session(TLSMode.REQUIRE)
    assert session.option(OptionType.ABORT) == ReplyType.ACK
    assert session.server.ended
    assert session.server.agreement is None


def test_starttls_is_refused_with_data_twice_or_where_there_is_no_tls() -> None:
    assert Session(TLSMode.OFF).option(OptionType.STARTTLS) == ReplyType.ERR_UNSUP
    session = Session(TLSMode.ON)
    assert session.option(OptionType.STARTTLS, b"x") == ReplyType.ERR_INVALID
    assert not session.server.starts_tls
    assert session.option(OptionType.STARTTLS) == ReplyType.ACK
    assert session.server.starts_tls
    session.server.tls_started()
    assert session.option(OptionType.STARTTLS) == ReplyType.ERR_INVALID
    assert session.option(OptionType.GO, ask()) == ReplyType.ACK


def test_what_was_agreed_on_in_the_clear_is_void() -> None:
    session = Session(TLSMode.ON)
    assert session.option(OptionType.EXTENDED_HEADERS) == ReplyType.ACK
    assert session.option(OptionType.SET_META_CONTEXT, meta(b"base:allocation")) == ReplyType.ACK
    assert session.option(OptionType.STARTTLS) == ReplyType.ACK
    session.server.tls_started()
    assert session.option(OptionType.GO, ask()) == ReplyType.ACK
    assert session.server.agreement is not None
    assert session.server.agreement.framing is SIMPLE_REPLIES
    assert session.server.agreement.contexts == ()


def test_nothing_said_in_the_clear_behind_starttls_is_taken_for_the_clients() -> None:
    starttls = struct.pack(">8sII", nbd.IHAVEOPT, OptionType.STARTTLS, 0)
    injected = struct.pack(">8sII", nbd.IHAVEOPT, OptionType.LIST, 0)
    session = Session(TLSMode.ON)
    session.server.receive(starttls + injected[:1])
    with pytest.raises(NBDError, match="in the clear"):
        session.take()
    session = Session(TLSMode.ON)
    session.server.receive(starttls)
    session.take()
    with pytest.raises(NBDError, match="in the clear"):
        session.server.receive(injected)


# Credentials.


@pytest.mark.parametrize("missing", ["server-cert.pem", "server-key.pem", "ca-cert.pem"])
def test_a_file_that_is_missing_or_wrong_is_named(pki: Path, tmp_path: Path, missing: str) -> None:
    for path in pki.glob("*.pem"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    Credentials(str(tmp_path), verify_peer=True).read()
    (tmp_path / missing).write_text("nonsense")
    with pytest.raises(FileError, match=missing):
        Credentials(str(tmp_path), verify_peer=True).read()
    (tmp_path / missing).unlink()
    with pytest.raises(FileError, match=missing):
        Credentials(str(tmp_path), verify_peer=True).read()


@pytest.mark.skipif(sys.version_info < (3, 13), reason="Python has had pre-shared keys since 3.13")
@pytest.mark.parametrize("content", ["", "# nobody\n", "alice", "alice:", "alice:xyz", ":00"])
def test_a_bad_file_of_keys_is_one_error(tmp_path: Path, content: str) -> None:
    (tmp_path / "keys.psk").write_text(content)
    with pytest.raises(FileError, match=r"keys\.psk"):
        Credentials(psk_file=str(tmp_path / "keys.psk")).read()


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (["--tls=require"], 2, "needs --tls-certificates"),
        (["--tls-certificates", "x"], 2, "without --tls"),
        (["--tls=on", "--tls-psk", "x", "--tls-verify-peer"], 2, "with ca-cert.pem in it"),
        (["--tls=on", "--tls-certificates", "missing"], 1, "missing/server-cert.pem: the server certificate cannot be"),
    ],
)
def test_what_is_not_enough_for_tls_is_said_and_leaves_no_socket(
    image: Image, tmp_path: Path, run: Callable[..., Result], options: list[str], code: int, said: str
) -> None:
    result = run("serve", image.path, "-k", tmp_path / "s", *options)
    assert result.returncode == code, result
    assert said in result.stderr
    assert code == 2 or len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "s").exists()
