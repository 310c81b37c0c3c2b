"""Clients that mean harm, against `qcow2snap serve` as users run it: what each gets, and that nobody else notices.

What single bytes are answered with is in test_negotiation and test_transmission. Here an honest client reads on through
every attack, and afterwards the server has no thread, no descriptor and next to no memory more than before.
"""

from __future__ import annotations

import os
import random
import resource
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path

import pytest

from formats import nbd
from formats.nbd import Command, Errno, OptionType, ReplyType
from qcow2snap.nbd.framing import SIMPLE_REPLIES, STRUCTURED_REPLIES, Framing
from tests.nbd.serving import Serving
from tests.nbd.test_negotiation import replies
from tests.nbd.wire import ask, handshake, meta, packed, read, receiver, understand
from tests.support import Image
from tests.support.memory import memory_limit
from tests.support.processes import process_tree
from tests.support.table import write_table
from tests.support.waiting import until

SIZE = 8 << 20  # bytes of the snapshot that is served
HANDSHAKE_TIMEOUT = 2  # seconds
MAX_CONNECTIONS = 128
PATIENCE = 20  # seconds until something that has to happen has not


class Target:
    """A server that is being attacked, and the content that it serves as the export "monday"."""

    def __init__(self, image: Image, path: str, *options: str) -> None:
        self.path = path
        self.content = image.reference("monday").read()
        self.log = Path(f"{path}.log")
        with self.log.open("wb") as log:
            self.serving = Serving(image.path, "-k", path, *options, stderr=log)
        self.pid = self.serving.process.pid

    def dial(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(self.path)  # waits where many do; with a timeout it would not
        sock.settimeout(PATIENCE)
        return sock

    def reading(self, sock: socket.socket, framing: Framing = STRUCTURED_REPLIES) -> Callable[[int], bytes]:
        return handshake(sock, framing, name=b"monday")

    def held(self) -> tuple[int, int]:
        """Threads and descriptors of all its processes."""
        processes = process_tree(self.pid)
        return tuple(sum(len(os.listdir(f"/proc/{each}/{what}")) for each in processes) for what in ("task", "fd"))

    def processor_time(self) -> float:
        """Seconds that all its processes have taken."""
        fields = [Path(f"/proc/{each}/stat").read_text().rpartition(")")[2].split() for each in process_tree(self.pid)]
        return sum(int(each[11]) + int(each[12]) for each in fields) / os.sysconf("SC_CLK_TCK")


class Honest:
    """A client that reads here and there for ever, in a thread, and compares each byte."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._socket = target.dial()
        self._receive = target.reading(self._socket, SIMPLE_REPLIES)
        self._leaving = False
        self.reads = 0
        self.longest = 0.0  # seconds from a request to its whole reply
        self.fault: BaseException | None = None
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        choose = random.Random(1)
        content = self._target.content
        try:
            while not self._leaving:
                length = choose.choice([1, 4096, 65536, 300_000])
                offset = choose.randrange(len(content) - length)
                started = time.monotonic()
                self._socket.sendall(packed(read(offset, length)))
                assert self._receive(16)[4:8] == bytes(4)
                assert self._receive(length) == content[offset : offset + length]
                self.longest = max(self.longest, time.monotonic() - started)
                self.reads += 1
                time.sleep(0.001)
        except BaseException as error:  # told by whoever waits for it
            self.fault = error

    def reads_on(self, count: int = 30) -> None:
        """Wait until it has read so often again."""
        goal, deadline = self.reads + count, time.monotonic() + PATIENCE
        while self.reads < goal and self.fault is None and time.monotonic() < deadline:
            time.sleep(0.01)
        assert self.fault is None
        assert self.reads >= goal

    def leave(self) -> None:
        self._leaving = True
        self._thread.join(PATIENCE)
        self._socket.close()
        assert self.fault is None
        assert not self._thread.is_alive()


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Image:
    """Every second cluster of 4 KiB written, then a second snapshot's worth of other bytes."""
    image = Image.create(tmp_path_factory.mktemp("hostile") / "disk.qcow2", SIZE, cluster_size=4096)
    image.write(0, SIZE // 2)
    for offset in range(SIZE // 2, SIZE, 8192):
        image.write(offset, 4096)
    return image.snapshot("monday").write(12345, 1 << 20)


@pytest.fixture(scope="module")
def target(image: Image) -> Iterator[Target]:
    options = ["--handshake-timeout", str(HANDSHAKE_TIMEOUT), "--max-connections", str(MAX_CONNECTIONS)]
    target = Target(image, str(image.path.with_name("s")), *options)
    yield target
    assert target.serving.stop() == 0, "after all this it still ends cleanly"
    assert not os.path.exists(target.path)


@pytest.fixture
def honest(target: Target) -> Iterator[Honest]:
    honest = Honest(target)
    yield honest
    honest.leave()


def option(number: int, data: bytes = b"", *, length: int | None = None) -> bytes:
    return struct.pack(">8sII", nbd.IHAVEOPT, number, len(data) if length is None else length) + data


FLAGS = struct.pack(">I", 3)
GO = option(OptionType.GO, ask(b"monday"))
SELECT = option(OptionType.STRUCTURED_REPLY) + option(
    OptionType.SET_META_CONTEXT, meta(b"base:allocation", name=b"monday")
)
STATUS = packed(read(0, SIZE)._replace(type=Command.BLOCK_STATUS))
DISCONNECT = packed(read(0, 0)._replace(type=Command.DISC))
SESSION = FLAGS + SELECT + option(OptionType.LIST) + GO + packed(read(0, 4096)) + STATUS + packed(read(4096, 1 << 20))

Dial = Callable[[], socket.socket]


def ends(sock: socket.socket, limit: int = 1 << 30) -> int:
    """Receive until the server ends the connection: how many bytes came before that."""
    count = 0
    with suppress(OSError):
        while piece := sock.recv(1 << 16):
            count += len(piece)
            assert count < limit
    return count


def hang_up(sock: socket.socket) -> None:
    """Also where a thread of ours is waiting in it."""
    with suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)


def push(sock: socket.socket, data: bytes) -> None:
    """Send as much as the server takes before it hangs up, or does not take any more."""
    with suppress(OSError):
        sock.sendall(data)


# Each attack gets a way to connect; what it connects stays so until the honest client has been watched.


def garbage_at_any_point(target: Target, dial: Dial) -> None:
    choose = random.Random(2)
    for number in range(60):
        sock = dial()
        push(sock, SESSION[: choose.randrange(len(SESSION))] + choose.randbytes(choose.choice([1, 30, 500, 5000])))
        if number % 2:  # else it may be waited for more, which is what a handshake's timeout is for
            with suppress(OSError):
                sock.shutdown(socket.SHUT_WR)
            ends(sock)
            sock.close()


def options_of_gigabytes(target: Target, dial: Dial) -> None:
    for number in (OptionType.EXPORT_NAME, OptionType.LIST, OptionType.GO, OptionType.SET_META_CONTEXT, 0xFFFFFFFF):
        sock = dial()
        sock.sendall(FLAGS + option(number, length=0xFFFFFFFF))
        assert ends(sock) == 18, "at once, without waiting for the data"
        for _ in range(5):
            push(dial(), FLAGS + option(number, length=nbd.MAX_PAYLOAD) + bytes(1 << 20))


def a_hundred_thousand_options(target: Target, dial: Dial) -> None:
    for number in (OptionType.LIST, OptionType.STRUCTURED_REPLY, 99):
        sock = dial()
        sender = threading.Thread(target=push, args=[sock, FLAGS + option(number) * 100_000])
        sender.start()
        assert ends(sock, 16 << 20) > 20 * 1000
        sender.join(PATIENCE)
        sock.close()


def lists_that_nobody_receives(target: Target, dial: Dial) -> None:
    for _ in range(20):
        sock = dial()
        sock.setblocking(False)
        push(sock, FLAGS + option(OptionType.LIST) * 4000)


def connections_that_say_nothing(target: Target, dial: Dial) -> None:
    refused = 0
    for _ in range(2000):
        sock = dial()
        refused += not until_told(sock)
        if refused > 1000:
            return
    assert refused >= 2000 - MAX_CONNECTIONS


def until_told(sock: socket.socket) -> bytes:
    try:
        return sock.recv(18)
    except ConnectionError:
        return b""


def a_handshake_a_byte_at_a_time(target: Target, dial: Dial) -> None:
    socks = [dial() for _ in range(50)]
    for byte in SESSION[:30]:
        for sock in socks:
            push(sock, bytes([byte]))
        time.sleep(0.03)


def requests_a_byte_at_a_time(target: Target, dial: Dial) -> None:
    socks = [dial() for _ in range(30)]
    for sock in socks:
        target.reading(sock)
    for byte in packed(read(0, 4096)) * 3:
        for sock in socks:
            sock.sendall(bytes([byte]))


def reads_that_nobody_receives(target: Target, dial: Dial) -> None:
    for number in range(60):
        sock = dial()
        target.reading(sock, STRUCTURED_REPLIES if number % 2 else SIMPLE_REPLIES)
        sock.setblocking(False)
        push(sock, packed(read(0, SIZE)) * 500)


def block_status_that_nobody_receives(target: Target, dial: Dial) -> None:
    for _ in range(20):
        sock = dial()
        target.reading(sock)
        sock.setblocking(False)
        push(sock, STATUS * 500)


def block_status_for_ever(target: Target, dial: Dial) -> None:
    for _ in range(10):
        sock = dial()
        target.reading(sock)
        threading.Thread(target=ends, args=[sock], daemon=True).start()
        threading.Thread(target=push, args=[sock, STATUS * 100], daemon=True).start()


def clients_killed_in_the_middle_of_a_reply(target: Target, dial: Dial) -> None:
    for number in range(100):
        with target.dial() as sock:
            target.reading(sock, STRUCTURED_REPLIES if number % 2 else SIMPLE_REPLIES)
            sock.sendall(packed(read(0, SIZE)) * 3)
            sock.recv(1000)


def clients_that_come_and_go(target: Target, dial: Dial) -> None:
    for number in range(1000):
        with target.dial() as sock:
            if number % 3:
                push(sock, SESSION[: number % len(SESSION)])


def writes_of_gigabytes(target: Target, dial: Dial) -> None:
    for length in (0xFFFFFFFF, nbd.MAX_PAYLOAD + 1):
        sock = dial()
        target.reading(sock)
        sock.sendall(packed(read(0, length)._replace(type=Command.WRITE)))
        assert ends(sock) == 0, "at once, without waiting for the data"
    write = read(0, 4 << 20)._replace(type=Command.WRITE)
    for _ in range(10):
        sock = dial()
        receive = target.reading(sock)
        sock.sendall(packed(write) + bytes(write.length))
        answer = understand(receive, write, STRUCTURED_REPLIES)
        assert answer.error == Errno.EPERM
        assert b"read-only" in answer.message
        push(sock, packed(write) + bytes(1000))  # and then leaves in the middle of one


def no_request_in_the_middle(target: Target, dial: Dial) -> None:
    for number in range(30):
        sock = dial()
        receive = target.reading(sock)
        sock.sendall(packed(read(5, 9)) + random.Random(number).randbytes(100_000) + packed(read(5, 9)))
        assert understand(receive, read(5, 9), STRUCTURED_REPLIES).data == target.content[5:14]
        assert ends(sock) == 0


ATTACKS = [
    garbage_at_any_point,
    options_of_gigabytes,
    a_hundred_thousand_options,
    lists_that_nobody_receives,
    connections_that_say_nothing,
    a_handshake_a_byte_at_a_time,
    requests_a_byte_at_a_time,
    reads_that_nobody_receives,
    block_status_that_nobody_receives,
    block_status_for_ever,
    clients_killed_in_the_middle_of_a_reply,
    clients_that_come_and_go,
    writes_of_gigabytes,
    no_request_in_the_middle,
]


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)
def test_nobody_else_notices(target: Target, honest: Honest, attack: Callable[[Target, Dial], None]) -> None:
    honest.reads_on()
    before = target.held()
    with memory_limit(48 << 20, target.pid), ExitStack() as connections:

        def dial() -> socket.socket:
            sock = connections.enter_context(target.dial())
            connections.callback(hang_up, sock)
            return sock

        attack(target, dial)
        honest.reads_on()
        assert honest.longest < 5
    assert until(lambda: target.held() <= before), "threads or descriptors are left behind"
    with target.dial() as sock:
        receive = target.reading(sock)
        sock.sendall(packed(read(0, 4096)))
        assert understand(receive, read(0, 4096), STRUCTURED_REPLIES).data == target.content[:4096]


# What is unusual, and right.


def test_a_whole_session_may_come_in_one_packet(target: Target) -> None:
    requests = [
        read(0, 4096, cookie=1),
        read(SIZE - 5, 5, cookie=2),
        read(SIZE, 1, cookie=3),
        read(7, 70_000, cookie=4),
    ]
    with target.dial() as sock:
        sock.sendall(FLAGS + SELECT + GO + b"".join(map(packed, requests)) + DISCONNECT + packed(read(0, 1)))
        receive = receiver(sock)
        assert receive(18) == b"NBDMAGICIHAVEOPT\0\3"
        finals = 0
        while finals < 3:
            _, _, kind, length = struct.unpack(">QIII", receive(20))
            receive(length)
            finals += kind == ReplyType.ACK
        answers = {request.cookie: understand(receive, request, STRUCTURED_REPLIES) for request in requests}
        assert answers[1].data == target.content[:4096]
        assert answers[2].data == target.content[-5:]
        assert answers[3].error == Errno.EINVAL
        assert answers[4].data == target.content[7:70_007]
        assert ends(sock) == 0, "nothing comes after the disconnect"


@pytest.mark.parametrize("framing", [SIMPLE_REPLIES, STRUCTURED_REPLIES])
def test_a_client_that_only_stopped_sending_gets_every_reply(target: Target, framing: Framing) -> None:
    with target.dial() as sock:
        receive = target.reading(sock, framing)
        requests = [read(number << 16, 1 << 20, cookie=number) for number in range(50)]
        sock.sendall(b"".join(map(packed, requests)))
        sock.shutdown(socket.SHUT_WR)
        for request in requests:
            data = understand(receive, request, framing).data
            assert data == target.content[request.offset : request.offset + request.length]
        assert ends(sock) == 0


def test_a_client_that_stopped_receiving_is_let_go(target: Target) -> None:
    before = target.held()
    with target.dial() as sock:
        target.reading(sock)
        sock.shutdown(socket.SHUT_RD)
        push(sock, packed(read(0, SIZE)) * 10)
        assert until(lambda: target.held() <= before)


@pytest.mark.parametrize("number", [OptionType.SET_META_CONTEXT, OptionType.LIST_META_CONTEXT])
def test_what_made_qemu_nbd_abort_is_an_error_like_any_other(target: Target, number: OptionType) -> None:
    trailing = meta(b"base:allocation", name=b"monday") + option(OptionType.LIST)
    with target.dial() as sock:
        sock.sendall(FLAGS + option(OptionType.STRUCTURED_REPLY) + option(number, trailing) + option(OptionType.ABORT))
        receive = receiver(sock)
        receive(18 + 20)
        _, _, kind, length = struct.unpack(">QIII", receive(20))
        assert kind == ReplyType.ERR_INVALID
        assert b"length" in receive(length)
        assert replies(receive(20), OptionType.ABORT) == [(ReplyType.ACK, b"")]
        assert ends(sock) == 0


def test_idle_clients_take_no_processor_time(target: Target) -> None:
    with ExitStack() as connections:
        for _ in range(50):
            sock = connections.enter_context(target.dial())
            receive = target.reading(sock)
            sock.sendall(packed(read(0, 512)))
            understand(receive, read(0, 512), STRUCTURED_REPLIES)
        time.sleep(0.2)
        before = target.processor_time()
        time.sleep(1)
        assert target.processor_time() - before < 0.1


def test_a_server_without_descriptors_serves_on_and_recovers(image: Image, tmp_path: Path) -> None:
    target = Target(image, str(tmp_path / "s"))
    honest = Honest(target)
    try:
        honest.reads_on(3)  # by then all that is opened late is open
        for each in process_tree(target.pid):
            resource.prlimit(each, resource.RLIMIT_NOFILE, (24, 24))
        with ExitStack() as connections:
            for _ in range(60):
                connections.enter_context(target.dial())
            honest.reads_on()
            assert until(lambda: "could not be accepted" in target.log.read_text())

        def is_served() -> bool:
            with target.dial() as sock:
                return bool(sock.recv(18))

        assert until(is_served)
        honest.reads_on()
    finally:
        honest.leave()
        assert target.serving.stop() == 0


def test_a_log_that_nobody_reads_holds_up_nobody_and_does_not_grow_with_the_attack(
    image: Image, tmp_path: Path
) -> None:
    serving = Serving(image.path, "-k", tmp_path / "s", "--max-connections", "1")  # its standard error is a pipe
    with socket.socket(socket.AF_UNIX) as first:
        first.connect(str(tmp_path / "s"))
        first.settimeout(PATIENCE)
        receive = handshake(first, SIMPLE_REPLIES, b"monday")
        for _ in range(3000):
            with socket.socket(socket.AF_UNIX) as sock:
                sock.connect(str(tmp_path / "s"))
                ends(sock)
        first.sendall(packed(read(5, 9)))
        assert receive(16 + 9)[16:] == image.reference("monday").read()[5:14]
    serving.process.send_signal(signal.SIGTERM)
    said = serving.process.communicate(timeout=PATIENCE)[1].decode()
    assert "refused: 1 connections are all there can be" in said
    assert 100 <= said.count("\n") < 1000


def test_an_image_of_many_large_tables_does_not_fill_memory(tmp_path: Path) -> None:
    """Twenty snapshots, each with an L1 table of 32 MiB: all of them the same hole of the file."""
    image = Image.create(tmp_path / "disk.qcow2", "1M").snapshot("template")
    hole, size, [entry] = 1 << 20, 32 << 20, image.entries
    os.truncate(image.path, hole + size)
    state = struct.pack(">QQ", 1 << 20, 1 << 20)
    write_table(
        image.path,
        [replace(entry, l1_table_offset=hole, l1_size=size >> 3, id=b"%d" % n, name=b"n%d" % n, extra=state)
         for n in range(1, 21)],
    )  # fmt: skip
    serving = Serving(image.path, "-k", tmp_path / "s", "--workers", "0")
    with memory_limit(256 << 20, serving.process.pid):  # L1 tables have a budget of 64 MiB; one is read at a time
        for n in range(1, 21):
            for name in (b"n%d" % n, b"vmstate:n%d" % n):
                with socket.socket(socket.AF_UNIX) as sock:
                    sock.connect(str(tmp_path / "s"))
                    sock.settimeout(PATIENCE)
                    receive = handshake(sock, SIMPLE_REPLIES, name)
                    sock.sendall(packed(read(0, 512)))
                    assert receive(16 + 512)[4:] == bytes(4) + struct.pack(">Q", 7) + bytes(512)
    assert serving.stop() == 0


def test_connections_that_are_reset_over_tcp_leave_nothing_behind(image: Image, tmp_path: Path) -> None:
    with (tmp_path / "log").open("wb") as log:
        serving = Serving(image.path, "-p", "0", stderr=log)
    port = int(serving.uris[0].rpartition(":")[2].strip("/"))
    reset = struct.pack("ii", 1, 0)  # SO_LINGER of no time: close() sends RST
    for number in range(200):
        with socket.create_connection(("127.0.0.1", port), PATIENCE) as sock:
            if number % 2:
                handshake(sock, STRUCTURED_REPLIES, name=b"monday")
                sock.sendall(packed(read(0, SIZE)) * 3)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
    with socket.create_connection(("127.0.0.1", port), PATIENCE) as sock:
        receive = handshake(sock, SIMPLE_REPLIES, name=b"monday")
        sock.sendall(packed(read(5, 9)))
        assert receive(16 + 9)[16:] == image.reference("monday").read()[5:14]
    assert serving.stop() == 0
    assert "Traceback" not in (tmp_path / "log").read_text()
