"""Writable exports: every command that writes, by the plain way, on a socket, and by the clients that people use."""

from __future__ import annotations

import json
import resource
import signal
import struct
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from formats import nbd
from formats.nbd import Command, CommandFlag, Errno, InfoType, OptionType, TransmissionFlag
from qcow2snap.block.graph import open_raw
from qcow2snap.block.node import BlockNode
from qcow2snap.block.raw import RawNode
from qcow2snap.nbd.framing import EXTENDED_HEADERS, Framing
from qcow2snap.nbd.transmission import Request
from tests.nbd.serving import Serving
from tests.nbd.support import Serve, connected, exports, run
from tests.nbd.test_negotiation import Session
from tests.nbd.test_transmission import EACH, FRAMINGS, WAYS, Way, quickly, slowly
from tests.nbd.wire import Answer, ask, handshake, packed, read, understand
from tests.support import qemu_io, require
from tests.support import run as cli

SIZE = (1 << 20) + 512  # bytes
FUA, NO_HOLE, FAST_ZERO = CommandFlag.FUA, CommandFlag.NO_HOLE, CommandFlag.FAST_ZERO


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(b"x" * SIZE)
    return path


@pytest.fixture
def node(path: Path) -> Iterator[RawNode]:
    node = open_raw(str(path), writable=True)
    yield node
    node.close()


def write(offset: int, length: int, framing: Framing, flags: int = 0) -> Request:
    flags |= CommandFlag.PAYLOAD_LEN if framing.extended else 0
    return Request(flags, Command.WRITE, 7, offset, length)


def request(command: Command, offset: int, length: int, flags: int = 0) -> Request:
    return Request(flags, command, 7, offset, length)


def test_a_writable_export_says_what_it_can(node: RawNode) -> None:
    session = Session(exports(default=node))
    session.option(OptionType.EXTENDED_HEADERS)
    [(_, told), *_] = session.option(OptionType.INFO, ask(b"", InfoType.EXPORT))
    can = TransmissionFlag(struct.unpack(">HQH", told)[2])
    assert can == TransmissionFlag.HAS_FLAGS | TransmissionFlag.SEND_FLUSH | TransmissionFlag.SEND_FUA | (
        TransmissionFlag.SEND_TRIM | TransmissionFlag.SEND_WRITE_ZEROES | TransmissionFlag.SEND_FAST_ZERO
        | TransmissionFlag.SEND_DF | TransmissionFlag.CAN_MULTI_CONN | TransmissionFlag.SEND_CACHE
        | TransmissionFlag.BLOCK_STATUS_PAYLOAD
    )  # fmt: skip


@EACH
@WAYS
def test_what_is_written_is_read(node: RawNode, path: Path, way: Way, framing: Framing) -> None:
    data = bytes(range(256)) * 1200
    requests = [
        write(5, len(data), framing),
        request(Command.WRITE_ZEROES, 100, 1000),
        request(Command.WRITE_ZEROES, 2000, 1000, NO_HOLE | FUA),
        request(Command.WRITE_ZEROES, 4000, 1000, FAST_ZERO),
        request(Command.TRIM, 8192, 4096, FUA),
        write(SIZE - 1, 1, framing, FUA),
        write(0, 0, framing),
        request(Command.FLUSH, 0, 0),
        read(0, SIZE),
    ]
    answers = way(node, requests, framing, [data, *[b""] * 4, b"!"])
    assert [answer.error for answer in answers] == [0] * len(requests)
    expected = bytearray(b"x" * SIZE)
    expected[5 : 5 + len(data)] = data
    for start, length in ((100, 1000), (2000, 1000), (4000, 1000), (8192, 4096)):
        expected[start : start + length] = bytes(length)
    expected[-1:] = b"!"
    assert answers[-1].data == expected
    assert path.read_bytes() == expected


@EACH
@WAYS
def test_each_bad_write_has_its_error_and_does_nothing(node: RawNode, path: Path, way: Way, framing: Framing) -> None:
    cases = [
        (write(SIZE - 1, 2, framing), Errno.ENOSPC),
        (write((1 << 64) - 1, 2, framing), Errno.ENOSPC),
        (request(Command.WRITE_ZEROES, SIZE, 1), Errno.ENOSPC),
        (request(Command.TRIM, SIZE, 1), Errno.EINVAL),
        (read(SIZE, 1), Errno.EINVAL),
        (write(0, 2, framing, NO_HOLE), Errno.EINVAL),
        (request(Command.WRITE_ZEROES, 0, 1, CommandFlag.DF), Errno.EINVAL),
        (request(Command.TRIM, 0, 1, NO_HOLE), Errno.EINVAL),
        (request(Command.FLUSH, 0, 1), Errno.EINVAL),
        (request(Command.FLUSH, 0, 0, FAST_ZERO), Errno.EINVAL),
        (read(0, 1), 0),
    ]
    payloads = [b"yy" if each.type == Command.WRITE else b"" for each, _ in cases]
    answers = way(node, [each for each, _ in cases], framing, payloads)
    assert [answer.error for answer in answers] == [error for _, error in cases]
    assert path.read_bytes() == b"x" * SIZE


@EACH
@WAYS
def test_any_command_may_carry_fua_where_it_is_offered(node: RawNode, way: Way, framing: Framing) -> None:
    requests = [read(0, 9, FUA), request(Command.FLUSH, 0, 0, FUA), request(Command.CACHE, 0, 9, FUA)]
    assert [answer.error for answer in way(node, requests, framing)] == [0, 0, 0]


@WAYS
def test_with_extended_headers_a_write_need_not_announce_its_payload(node: RawNode, way: Way) -> None:
    """QEMU's client does not, though the protocol asks for it."""
    wrote, data = way(node, [request(Command.WRITE, 0, 9), read(0, 10)], EXTENDED_HEADERS, [b"123456789"])
    assert wrote.error == 0
    assert data.data == b"123456789x"


@WAYS
def test_zeros_of_64_bits(tmp_path: Path, way: Way) -> None:
    size = (6 << 30) + 123
    (tmp_path / "large.raw").touch()
    with (tmp_path / "large.raw").open("r+b") as file:
        file.truncate(size)
        file.seek(5 << 30)
        file.write(b"x" * 8192)
    node = open_raw(str(tmp_path / "large.raw"), writable=True)
    zero, trim, left = way(
        node,
        [
            request(Command.WRITE_ZEROES, 1, size - 1, FAST_ZERO),
            request(Command.TRIM, 0, size),
            read(5 << 30, 8192),
        ],
        EXTENDED_HEADERS,
    )
    node.close()
    assert (zero.error, trim.error) == (0, 0)
    assert left.data == bytes(8192)


@EACH
@WAYS
def test_no_space_is_its_own_error(node: RawNode, way: Way, framing: Framing) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))
    try:
        full, after = way(node, [write(4096, 600_000, framing), read(0, 1)], framing, [b"y" * 600_000])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert full.error == Errno.ENOSPC
    assert after.data == b"x", "what was left of the payload was passed over"


@EACH
def test_the_longest_write_is_taken_and_a_longer_one_ends_it(tmp_path: Path, framing: Framing) -> None:
    (tmp_path / "disk").write_bytes(bytes(nbd.MAX_PAYLOAD))
    node = open_raw(str(tmp_path / "disk"), writable=True)
    data = b"0123456789abcdef" * (nbd.MAX_PAYLOAD // 16)
    with connected(exports(default=node)) as sock:
        receive = handshake(sock, framing)
        longest = write(0, nbd.MAX_PAYLOAD, framing)
        sock.sendall(packed(longest, framing) + data)
        assert understand(receive, longest, framing).error == 0
        sock.sendall(packed(write(0, nbd.MAX_PAYLOAD + 1, framing), framing))
        assert sock.recv(1) == b""
    node.close()
    assert (tmp_path / "disk").read_bytes() == data


def test_a_client_that_leaves_within_a_write_does_no_harm(node: RawNode, path: Path) -> None:
    for framing in FRAMINGS:
        with connected(exports(default=node)) as sock:
            handshake(sock, framing)
            sock.sendall(packed(write(0, 1 << 20, framing), framing) + b"y" * 1000)
        [answer] = quickly(node, [read(1000, SIZE - 1000)], framing)
        assert answer.data == b"x" * (SIZE - 1000)


def in_turn(node: BlockNode, requests: Sequence[Request], framing: Framing, payloads: Sequence[bytes]) -> list[Answer]:
    """As a client that waits for each reply: of overlapping requests in flight, any may come first."""
    with connected(exports(default=node)) as sock:
        receive = handshake(sock, framing)
        answers = []
        for each, payload in zip(requests, payloads, strict=True):
            sock.sendall(packed(each, framing) + payload)
            answers.append(understand(receive, each, framing))
        return answers


OFFSETS = st.integers(0, 20_000)
COMMANDS = st.tuples(
    st.sampled_from([Command.WRITE, Command.WRITE_ZEROES, Command.TRIM, Command.READ, Command.FLUSH]),
    OFFSETS,
    st.sampled_from([1, 511, 4096, 70_000]),
    st.sampled_from([0, FUA]),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    commands=st.lists(COMMANDS, max_size=12), framing=st.sampled_from(FRAMINGS), way=st.sampled_from([slowly, in_turn])
)
def test_any_sequence_of_requests_is_as_if_on_bytes(
    tmp_path: Path, commands: list[tuple[Command, int, int, int]], framing: Framing, way: Way
) -> None:
    expected = bytearray(b"x" * 100_000)
    (tmp_path / "disk").write_bytes(expected)
    requests, payloads, reads = [], [], []
    for number, (command, offset, length, flags) in enumerate(commands):
        payload = b""
        if command == Command.FLUSH:
            offset = length = 0
        if command == Command.WRITE:
            payload = bytes([number + 1]) * length
            expected[offset : offset + length] = payload
            flags |= CommandFlag.PAYLOAD_LEN if framing.extended else 0
        elif command in (Command.WRITE_ZEROES, Command.TRIM):
            expected[offset : offset + length] = bytes(length)
        reads.append(bytes(expected[offset : offset + length]) if command == Command.READ else None)
        requests.append(Request(flags, command, number, offset, length))
        payloads.append(payload)
    node = open_raw(str(tmp_path / "disk"), writable=True)
    try:
        answers = way(node, requests, framing, payloads)
    finally:
        node.close()
    assert [answer.error for answer in answers] == [0] * len(answers)
    assert [answer.data for answer in answers] == reads
    assert (tmp_path / "disk").read_bytes() == expected


# The clients that people use.


@pytest.fixture
def uri(node: RawNode, serve: Serve) -> str:
    return str(serve(exports(default=node)).listeners[0].uri)


def test_qemu_io_writes_reads_and_discards(uri: str, path: Path) -> None:
    commands = [
        "write -P 1 0 65536", "write -f -P 2 65536 512", "write -z 4096 4096", "write -z -u 16384 8192",
        "discard 32768 4096", "aio_write -P 3 131072 262144", "aio_flush", "flush",
        "read -P 1 0 4096", "read -P 0 4096 4096", "read -P 0 16384 8192", "read -P 2 65536 512",
        "read -P 3 131072 262144",
    ]  # fmt: skip
    said = run(require("qemu-io"), "-f", "raw", *[part for each in commands for part in ("-c", each)], uri)
    assert "failed" not in said
    assert path.read_bytes()[131072 : 131072 + 262144] == b"\3" * 262144


def sparse(folder: Path) -> bytes:
    """A file of some data and some holes at folder/source."""
    content = (b"a" * 65536 + bytes(131072) + b"b" * 65536 + bytes(262144)).ljust(SIZE, b"c")
    (folder / "source").write_bytes(content)
    run(require("qemu-img"), "convert", "-f", "raw", "-O", "raw", folder / "source", folder / "sparse")
    (folder / "sparse").replace(folder / "source")
    with (folder / "source").open("r+b") as file:
        file.truncate(SIZE)
    return content[: SIZE // 512 * 512]


def test_qemu_img_converts_onto_it(uri: str, path: Path, tmp_path: Path) -> None:
    content = sparse(tmp_path)
    run(require("qemu-img"), "convert", "-n", "-f", "raw", "-O", "raw", tmp_path / "source", uri)
    assert path.read_bytes()[: len(content)] == content


@pytest.mark.parametrize("options", [(), ("--destination-is-zero",), ("--connections=1", "--requests=1", "--flush")])
def test_nbdcopy_copies_onto_it(uri: str, path: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    content = sparse(tmp_path)
    if "--destination-is-zero" in options:
        with path.open("r+b") as file:
            file.truncate(0)
            file.truncate(SIZE)  # the same file, so that the server has it still
    run(require("nbdcopy"), *options, tmp_path / "source", uri)
    assert path.read_bytes()[: len(content)] == content


def test_nbdkit_passes_writes_on(uri: str, path: Path, tmp_path: Path) -> None:
    content = sparse(tmp_path)
    command = [require("nbdkit"), "-U", "-", "nbd", f"uri={uri}", "--run", f"nbdcopy --flush {tmp_path}/source $uri"]
    subprocess.run(command, check=True, timeout=60)
    assert path.read_bytes()[: len(content)] == content


FIO = ["--name=t", "--ioengine=nbd", "--size=1m", "--bs=4k", "--rw=randwrite", "--iodepth=32", "--verify=crc32c",
       "--fsync=16", "--do_verify=1", "--verify_fatal=1", "--randseed=7"]  # fmt: skip


def test_fio_verifies_what_it_wrote(uri: str, tmp_path: Path) -> None:
    subprocess.run([require("fio"), *FIO, f"--uri={uri}"], check=True, timeout=60, cwd=tmp_path, capture_output=True)


LIBNBD = """
import nbd
h = nbd.NBD()
h.connect_uri({uri!r})
assert not h.is_read_only() and h.can_fua() and h.can_trim()
assert h.can_zero() and h.can_fast_zero() and h.can_multi_conn()
h.pwrite(b"1" * 3000, 17, nbd.CMD_FLAG_FUA)
h.zero(1000, 17, nbd.CMD_FLAG_NO_HOLE)
h.zero(4096, 4096, nbd.CMD_FLAG_FAST_ZERO)
h.trim(4096, 8192, nbd.CMD_FLAG_FUA)
h.flush()
assert h.pread(3000, 17) == bytearray(1000) + b"1" * 2000
h.set_strict_mode(0)
for call, error in (
    (lambda: h.pwrite(b"12", {size} - 1), "ENOSPC"),
    (lambda: h.zero(2, {size} - 1), "ENOSPC"),
    (lambda: h.trim(2, {size} - 1), "EINVAL"),
    (lambda: h.pread(2, {size} - 1), "EINVAL"),
):
    try:
        call()
    except nbd.Error as refused:
        assert refused.errno == error, (refused.errno, error)
    else:
        raise AssertionError(error)
h.shutdown()
"""


def test_libnbd_writes_and_gets_the_right_errors(uri: str) -> None:
    if run("/usr/bin/python3", "-c", "import nbd; print('yes')", check=False) != "yes\n":
        require("python3-libnbd")
    run("/usr/bin/python3", "-c", LIBNBD.format(uri=uri, size=SIZE))


@pytest.mark.parametrize("writable", [True, False])
def test_serve_shows_a_raw_image(path: Path, tmp_path: Path, writable: bool) -> None:
    serving = Serving("-f", "raw", *(["--writable"] if writable else []), path, "-k", tmp_path / "s")
    try:
        [uri] = serving.uris
        info = json.loads(run(require("nbdinfo"), "--json", uri))["exports"][0]
        assert (info["export-size"], info["is_read_only"], info["can_fua"]) == (SIZE, not writable, writable)
        done = qemu_io(uri, "write -P 7 512 1024", "flush", options=("-f", "raw"), check=False)
        assert (done.returncode == 0) == writable
        assert path.read_bytes()[512:1536] == (b"\7" if writable else b"x") * 1024
        serving.process.send_signal(signal.SIGHUP)
        assert run(require("nbdinfo"), "--size", uri).strip() == str(SIZE)
        again = cli("serve", "-f", "raw", "--writable", path, "-k", tmp_path / "t")
        assert (again.returncode, again.stderr.count("\n")) == (1, 1)
        assert "in use" in again.stderr
    finally:
        assert serving.stop() == 0


def test_serve_does_not_guess_what_it_writes_and_writes_nothing_that_others_write(path: Path) -> None:
    for options, code, reason in ((["--writable"], 1, "not a qcow2"), (["--writable", "-f", "raw", "-U"], 2, "-U")):
        refused = cli("serve", *options, path)
        assert (refused.returncode, reason in refused.stderr) == (code, True)


def test_newer_peers_write_with_extended_headers(peers: Path, uri: str, path: Path, tmp_path: Path) -> None:
    content = sparse(tmp_path)
    run(peers / "nbdcopy", tmp_path / "source", uri)
    assert path.read_bytes()[: len(content)] == content
    said = run(
        peers / "qemu-io", "-f", "raw", "-c", "write -P 9 77 5000", "-c", "write -z -u 8k 8k", "-c", "flush", uri
    )
    assert "failed" not in said
    assert path.read_bytes()[77:5077] == b"\x09" * 5000


def test_what_one_connection_flushed_another_reads(node: RawNode) -> None:
    with ExitStack() as stack:
        pairs = []
        for framing in FRAMINGS:
            sock = stack.enter_context(connected(exports(default=node)))
            pairs.append((sock, handshake(sock, framing), framing))
        for number, (sock, receive, framing) in enumerate(pairs):
            data = bytes([number]) * 512
            for each, payload in ((write(0, 512, framing), data), (request(Command.FLUSH, 0, 0), b"")):
                sock.sendall(packed(each, framing) + payload)
                assert understand(receive, each, framing).error == 0
            for other, other_receive, other_framing in pairs:
                other.sendall(packed(read(0, 512), other_framing))
                assert understand(other_receive, read(0, 512), other_framing).data == data
