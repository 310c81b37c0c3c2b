"""A running server, on real sockets: real clients, rude ones, and how it starts and stops."""

from __future__ import annotations

import os
import socket
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from formats import nbd
from formats.nbd import OptionType
from qcow2snap.block.node import FileError
from qcow2snap.nbd.framing import SIMPLE_REPLIES, STRUCTURED_REPLIES
from qcow2snap.nbd.listen import listen_tcp, listen_unix
from qcow2snap.nbd.server import Server
from tests.nbd.support import NewNode, Serve, ZeroNode, exports, run
from tests.nbd.wire import handshake, packed, read
from tests.support import require

PATCHWORK = [("file", 3 << 20), ("zero", 5 << 20), ("memory", 100_000), ("file", 50_000), ("zero", 512), ("file", 77)]


def uri(server: Server, name: str = "") -> str:
    return str(server.listeners[0].uri._replace(export=name))


def greeted(path: str, timeout: float = 20) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(timeout)
    sock.connect(path)
    return sock


# Real clients.


def test_nbdinfo_lists_the_exports_with_their_sizes(serve: Serve) -> None:
    require("nbdinfo")
    server = serve(exports(default=ZeroNode(512), monday=ZeroNode(1 << 40), tuesday=ZeroNode(1234567)))
    listing = run("nbdinfo", "--list", uri(server))
    assert [line for line in listing.splitlines() if line.startswith("export=")] == [
        'export="":',
        'export="monday":',
        'export="tuesday":',
    ]
    assert run("nbdinfo", "--size", uri(server, "tuesday")).strip() == "1234567"
    assert "about monday" in run("nbdinfo", uri(server, "monday"))


def test_nbdinfo_maps_and_nbdcopy_copies(new_node: NewNode, serve: Serve, tmp_path: Path) -> None:
    require("nbdcopy")
    node = new_node(*PATCHWORK)
    server = serve(exports(default=node))
    assert [line.split()[:3] for line in run("nbdinfo", "--map", uri(server)).splitlines()] == [
        ["0", str(3 << 20), "0"],
        [str(3 << 20), str(5 << 20), "3"],
        [str(8 << 20), "150000", "0"],
        [str((8 << 20) + 150_000), "512", "3"],
        [str((8 << 20) + 150_512), "77", "0"],
    ]
    for options in (
        ["--connections=1"],
        ["--connections=4", "--threads=4"],
        ["--synchronous"],
        ["--request-size=4096"],
    ):
        run("nbdcopy", *options, uri(server), tmp_path / "copy")
        assert (tmp_path / "copy").read_bytes() == node.content


def test_qemu_reads_the_same_bytes(new_node: NewNode, serve: Serve, tmp_path: Path) -> None:
    require("qemu-img")
    node = new_node(("file", 3 << 20), ("zero", 5 << 20), ("memory", 1 << 20))
    server = serve(exports(default=node))
    run("qemu-img", "convert", "-f", "raw", "-O", "raw", uri(server), tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == node.content
    run("qemu-io", "-r", "-f", "raw", "-c", "read 1 4097", "-c", "aio_read 0 9M", "-c", "aio_flush", uri(server))


SYSTEM_PYTHON = "/usr/bin/python3"  # the one that Debian's python3-libnbd is for

LIBNBD = """
import nbd
h = nbd.NBD()
h.set_request_structured_replies({structured})
h.connect_uri({uri!r})
assert h.pread(5000, 77) == open({content!r}, "rb").read()[77:5077]
assert h.is_read_only() and h.can_cache() and h.can_flush() and h.can_multi_conn() and not h.can_trim()
h.flush()
h.cache(4096, 0)
h.set_strict_mode(0)  # let errors through to the server
try:
    h.pread(2, h.get_size() - 1)
    raise SystemExit("read beyond the end")
except nbd.Error as error:
    assert error.errno == "EINVAL", error
for call in (lambda: h.pwrite(b"x" * 512, 0), lambda: h.zero(512, 0), lambda: h.trim(512, 0)):
    try:
        call()
        raise SystemExit("written")
    except nbd.Error as error:
        assert error.errno == "EPERM", error
if {structured}:
    assert h.can_df() and h.pread(5000, 77, nbd.CMD_FLAG_DF) == h.pread(5000, 77)
assert h.pread(1, 0) == open({content!r}, "rb").read(1)
h.shutdown()
"""


@pytest.mark.parametrize("structured", [True, False])
def test_libnbd_gets_the_bytes_and_the_right_errors(
    new_node: NewNode, serve: Serve, tmp_path: Path, structured: bool
) -> None:
    if run(SYSTEM_PYTHON, "-c", "import nbd; print('yes')", check=False) != "yes\n":
        pytest.skip("python3-libnbd is not installed")
    node = new_node(*PATCHWORK)
    content = tmp_path / "content"
    content.write_bytes(node.content)
    where = uri(serve(exports(default=node)))
    run(SYSTEM_PYTHON, "-c", LIBNBD.format(structured=structured, uri=where, content=str(content)))


def test_nbdkit_serves_it_on(new_node: NewNode, serve: Serve, tmp_path: Path) -> None:
    require("nbdkit")
    node = new_node(*PATCHWORK)
    command = f'nbdcopy "$uri" {tmp_path / "copy"}'
    run("nbdkit", "-U", "-", "-r", "nbd", f"uri={uri(serve(exports(default=node)))}", "--run", command)
    assert (tmp_path / "copy").read_bytes() == node.content


def test_tcp_serves_as_well(new_node: NewNode, tmp_path: Path) -> None:
    require("nbdcopy")
    node = new_node(*PATCHWORK)
    with Server(exports(monday=node), [listen_tcp("127.0.0.1", 0), listen_tcp("::1", 0)]) as server:
        for listener in server.listeners:
            run("nbdcopy", str(listener.uri._replace(export="monday")), tmp_path / "copy")
            assert (tmp_path / "copy").read_bytes() == node.content


# Rude clients.


def test_a_client_that_says_nothing_is_cut_off_in_time(serve: Serve) -> None:
    server = serve(exports(default=ZeroNode(1)), handshake_timeout=0.3)
    with greeted(server.listeners[0].uri.socket) as sock:
        started = time.monotonic()
        while sock.recv(100):
            pass
        assert 0.2 < time.monotonic() - started < 5


def test_a_client_that_drips_its_handshake_is_cut_off_in_time(serve: Serve) -> None:
    server = serve(exports(default=ZeroNode(1)), handshake_timeout=0.5)
    started = time.monotonic()
    with greeted(server.listeners[0].uri.socket) as sock, suppress(OSError):
        for byte in struct.pack(">I", 3) + struct.pack(">8sII", nbd.IHAVEOPT, OptionType.LIST, 100) + bytes(100):
            sock.sendall(bytes([byte]))
            time.sleep(0.05)
    assert time.monotonic() - started < 3


def test_a_client_that_said_something_gets_no_more_time_for_it(serve: Serve) -> None:
    server = serve(exports(default=ZeroNode(1)), handshake_timeout=2)
    started = time.monotonic()
    with greeted(server.listeners[0].uri.socket) as sock:
        time.sleep(1.5)
        sock.sendall(struct.pack(">I", 3))
        while sock.recv(100):
            pass
    assert time.monotonic() - started < 3


def test_a_client_that_has_chosen_an_export_may_be_idle(serve: Serve) -> None:
    server = serve(exports(default=ZeroNode(512)), handshake_timeout=0.3)
    with greeted(server.listeners[0].uri.socket) as sock:
        receive = handshake(sock, SIMPLE_REPLIES)
        time.sleep(0.8)
        sock.sendall(packed(read(0, 512)))
        assert receive(16 + 512)[16:] == bytes(512)


def test_more_connections_than_allowed_are_closed_at_once_and_room_is_used_again(serve: Serve) -> None:
    server = serve(exports(default=ZeroNode(1)), max_connections=2)
    path = server.listeners[0].uri.socket
    first, second, third = greeted(path), greeted(path), greeted(path)
    assert first.recv(100)
    assert second.recv(100)
    assert third.recv(100) == b""
    first.close()
    for _ in range(100):
        with greeted(path) as again:
            if again.recv(100):
                break
        time.sleep(0.05)
    else:
        pytest.fail("no room was made")
    second.close()


def test_clients_that_never_receive_hold_up_nobody(new_node: NewNode, serve: Serve) -> None:
    node = new_node(("file", 4 << 20))
    server = serve(exports(default=node))
    path = server.listeners[0].uri.socket
    stuck = []
    for _ in range(5):
        sock = greeted(path)
        handshake(sock, STRUCTURED_REPLIES)
        sock.sendall(packed(read(0, node.size)) * 20)
        stuck.append(sock)
    with greeted(path) as sock:
        receive = handshake(sock, SIMPLE_REPLIES)
        sock.sendall(packed(read(0, 100)))
        assert receive(116)[16:] == node.content[:100]
    for sock in stuck:
        sock.close()


def test_clients_killed_in_the_middle_of_a_reply_leave_nothing_behind(new_node: NewNode, serve: Serve) -> None:
    server = serve(exports(default=new_node(("file", 4 << 20))))
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        with greeted(server.listeners[0].uri.socket) as sock:
            handshake(sock, STRUCTURED_REPLIES)
            sock.sendall(packed(read(0, 4 << 20)) * 3)
            sock.recv(1000)
    for _ in range(100):
        if threading.active_count() < 10 and len(os.listdir("/proc/self/fd")) <= before:
            break
        time.sleep(0.05)
    assert len(os.listdir("/proc/self/fd")) <= before


# Start and stop.


def test_stop_answers_what_is_in_flight_and_takes_the_socket_away(new_node: NewNode, tmp_path: Path) -> None:
    node = new_node(("memory", 32 << 20))
    server = Server(exports(default=node), [listen_unix(str(tmp_path / "s"))])
    server.start()
    with greeted(str(tmp_path / "s")) as sock, ThreadPoolExecutor() as pool:
        receive = handshake(sock, SIMPLE_REPLIES)
        sock.sendall(packed(read(0, node.size)))
        header = receive(16)
        sock.sendall(packed(read(7, 77)))  # waits in the socket while the first is being answered
        stopping = pool.submit(server.stop)
        time.sleep(0.2)
        assert header[4:8] == bytes(4)
        assert receive(node.size) == node.content
        assert receive(16 + 77)[16:] == node.content[7:84]
        assert sock.recv(1) == b""
        stopping.result(5)
    assert not (tmp_path / "s").exists()


def test_stop_waits_for_no_idle_client_and_not_for_long_for_a_stuck_one(new_node: NewNode, tmp_path: Path) -> None:
    node = new_node(("file", 4 << 20))
    for stuck in (False, True):
        server = Server(exports(default=node), [listen_unix(str(tmp_path / "s"))])
        server.start()
        with greeted(str(tmp_path / "s")) as silent, greeted(str(tmp_path / "s")) as idle:
            silent.recv(18)
            handshake(idle, STRUCTURED_REPLIES)
            if stuck:
                idle.sendall(packed(read(0, node.size)) * 20)
                time.sleep(0.1)
            started = time.monotonic()
            server.stop()
            took = time.monotonic() - started
            assert not [thread for thread in threading.enumerate() if thread.name.startswith("nbd")]
        assert took < 1 if not stuck else 4 < took < 7
        assert not (tmp_path / "s").exists()


def test_a_busy_client_cannot_put_off_the_stop(new_node: NewNode) -> None:
    server = Server(exports(default=new_node(("file", 4 << 20))), [listen_tcp("127.0.0.1", 0)])
    server.start()
    sock = socket.create_connection(("127.0.0.1", server.listeners[0].uri.port), 20)
    handshake(sock, SIMPLE_REPLIES)

    def ask_for_ever() -> None:
        with suppress(OSError):
            while True:
                sock.sendall(packed(read(0, 512)) * 100)

    def receive_for_ever() -> None:
        with suppress(OSError):
            while sock.recv(1 << 16):
                pass

    clients = [threading.Thread(target=each) for each in (ask_for_ever, receive_for_ever)]
    for client in clients:
        client.start()
    time.sleep(0.2)
    started = time.monotonic()
    server.stop()
    assert time.monotonic() - started < 3
    for client in clients:
        client.join(20)
    sock.close()


def test_a_socket_in_use_is_left_alone_and_a_stale_one_replaced(serve: Serve, tmp_path: Path) -> None:
    server = serve(exports(default=ZeroNode(1)))
    path = server.listeners[0].uri.socket
    with pytest.raises(FileError, match="another server"):
        listen_unix(path)
    with greeted(path) as sock:
        assert sock.recv(100)
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(str(tmp_path / "stale"))
    stale.close()
    listen_unix(str(tmp_path / "stale")).close()
    assert not (tmp_path / "stale").exists()


def test_a_file_is_never_replaced_by_a_socket(tmp_path: Path) -> None:
    (tmp_path / "disk").write_text("precious")
    with pytest.raises(FileError, match="not a socket"):
        listen_unix(str(tmp_path / "disk"))
    assert (tmp_path / "disk").read_text() == "precious"


def test_a_socket_that_another_server_made_in_our_place_stays(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    ours = listen_unix(path)
    os.unlink(path)
    other = listen_unix(path)
    ours.close()
    assert os.path.exists(path)
    other.close()


@pytest.mark.parametrize("path", ["x" * 200, "missing/s", "\0"])
def test_a_place_that_cannot_be_listened_at_is_one_error(tmp_path: Path, path: str) -> None:
    with pytest.raises(FileError, match="cannot listen"):
        listen_unix(str(tmp_path / path))


def test_an_address_in_use_or_of_nowhere_is_one_error() -> None:
    listener = listen_tcp("127.0.0.1", 0)
    with pytest.raises(FileError, match="cannot listen"):
        listen_tcp("127.0.0.1", listener.uri.port)
    with pytest.raises(FileError):
        listen_tcp("192.0.2.1", 0)
    with pytest.raises(FileError, match="not an address"):
        listen_tcp("host.invalid", 0)
    listener.close()
