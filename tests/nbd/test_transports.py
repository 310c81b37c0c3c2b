"""The ways to reach `qcow2snap serve`: sockets of all kinds, passed on or made, and standard input and output."""

from __future__ import annotations

import os
import resource
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from qcow2snap.block.node import FileError
from qcow2snap.nbd.framing import SIMPLE_REPLIES
from qcow2snap.nbd.listen import AF_VSOCK, listen_at_all, listen_unix, listen_vsock
from qcow2snap.nbd.server import Server
from qcow2snap.nbd.uri import URI
from tests.nbd.serving import Serving
from tests.nbd.support import ZeroNode, exports
from tests.nbd.support import run as output
from tests.nbd.test_server import SYSTEM_PYTHON
from tests.nbd.test_workers import is_alive
from tests.nbd.wire import handshake, packed, read
from tests.support import Image, Result, require
from tests.support.processes import process_tree
from tests.support.tools import REPOSITORY
from tests.support.waiting import until

NewImage = Callable[..., Image]

ENVIRONMENT = os.environ | {"PYTHONPATH": str(REPOSITORY)}
SERVE = [sys.executable, "-m", "qcow2snap", "serve"]


@pytest.fixture
def image(new_image: NewImage) -> Image:
    return new_image("1M").write(0, 100_000).snapshot("monday").resize("2M").write(0, 4096)


def monday(image: Image) -> bytes:
    return image.reference("monday").read()


# Sockets that it makes.


def test_it_listens_in_many_places_at_once(image: Image, tmp_path: Path) -> None:
    require("nbdcopy")
    places = ["-k", tmp_path / "a", "-k", tmp_path / "b", "-b", "127.0.0.1", "-b", "::1", "-p", "0"]
    serving = Serving(image.path, "-s", "monday", *places)
    starts = [
        f"nbd+unix:///?socket={tmp_path}/a",
        f"nbd+unix:///?socket={tmp_path}/b",
        "nbd://127.0.0.1:",
        "nbd://[::1]:",
    ]
    assert len(serving.uris) == len(starts)
    for uri, start in zip(serving.uris, starts, strict=True):
        assert uri.startswith(start)
        output("nbdcopy", uri, tmp_path / "copy")
        assert (tmp_path / "copy").read_bytes() == monday(image)
    assert serving.stop() == 0
    assert not (tmp_path / "a").exists()
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("options", "count"),
    [
        (["-p", "0"], 1),
        (["-p", "0", "-p", "0"], 2),
        (["-b", "127.0.0.1", "-b", "127.0.0.2", "-p", "0"], 2),
        (["-b", "127.0.0.1", "-b", "127.0.0.2", "-p", "0", "-p", "0"], 2),
        (["-b", "127.0.0.1", "-p", "0", "-p", "0", "-p", "0"], 3),
    ],
)
def test_addresses_and_ports_pair(image: Image, options: list[str], count: int) -> None:
    serving = Serving(image.path, "-s", "monday", "--workers", "0", *options)
    assert len(serving.uris) == count
    assert serving.stop() == 0


def test_if_one_place_cannot_be_had_none_is_left_behind(
    image: Image, tmp_path: Path, run: Callable[..., Result]
) -> None:
    (tmp_path / "file").write_text("precious")
    result = run("serve", image.path, "-k", tmp_path / "s", "-k", tmp_path / "file", "--pid-file", tmp_path / "pid")
    assert result.returncode == 1
    assert "not a socket" in result.stderr
    assert not (tmp_path / "s").exists()
    assert not (tmp_path / "pid").exists()
    with pytest.raises(FileError):
        listen_at_all([lambda: listen_unix(str(tmp_path / "s")), lambda: listen_unix(str(tmp_path / "file"))])
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["-b", "127.0.0.1", "-b", "::1", "-p", "1", "-p", "2", "-p", "3"], "do not pair"),
        (["--stdio", "-p", "0"], "no other place"),
        (["--prefix", "a", "--prefix", "b"], "one for each"),
        (["--prefix", "a/b"], "slash"),
        (["--refresh", "0"], "0"),
    ],
)
def test_what_makes_no_sense_together_is_a_usage_error(
    image: Image, run: Callable[..., Result], options: list[str], said: str
) -> None:
    result = run("serve", image.path, *options)
    assert result.returncode == 2, result
    assert said in result.stderr


def test_vsock_is_reached_through_the_loopback(tmp_path: Path) -> None:
    """VMADDR_CID_LOCAL, where the kernel has vsock_loopback; else what a URI says of it, and one clear error."""
    assert str(URI("a b", cid=2)) == "nbd+vsock://2/a%20b"
    assert str(URI(cid=3, port=7)) == "nbd+vsock://3:7/"
    try:
        socket.socket(AF_VSOCK, socket.SOCK_STREAM).close()
    except OSError:
        with pytest.raises(FileError, match="cannot listen there"):
            listen_vsock(10809)
        return
    listener = listen_vsock(10809)
    with Server(exports(default=ZeroNode(512)), [listener]), socket.socket(AF_VSOCK, socket.SOCK_STREAM) as client:
        client.settimeout(10)
        try:
            client.connect((1, 10809))
        except OSError:
            return  # it has vsock, but no loopback
        assert client.recv(18).startswith(b"NBDMAGIC")


# Sockets that are passed on.


def activated(image: Image, *options: str) -> list[str]:
    return ["[", *SERVE, str(image.path), *options, "]"]


def test_nbdinfo_and_nbdcopy_start_it_by_socket_activation(image: Image, tmp_path: Path) -> None:
    require("nbdcopy")
    command = activated(image, "-s", "monday")
    environment = ENVIRONMENT | {"PATH": os.environ["PATH"]}

    def client(*words: str) -> bytes:
        return subprocess.run(words, env=environment, capture_output=True, timeout=60, check=True).stdout

    assert client("nbdinfo", "--size", "--", *command).decode() == f"{1 << 20}\n"
    assert b'"exports"' in client("nbdinfo", "--json", "--list", "--", *command)
    client("nbdcopy", "--", *command, str(tmp_path / "copy"))
    assert (tmp_path / "copy").read_bytes() == monday(image)
    assert client("nbdcopy", "--", *command, "-") == monday(image)  # so nothing else is on standard output


def test_several_sockets_are_passed_by_systemd(image: Image, tmp_path: Path) -> None:
    """As systemd does it: descriptors from 3 on, LISTEN_PID the process itself. The sockets' files are systemd's."""
    sockets = [socket.socket(socket.AF_UNIX), socket.create_server(("127.0.0.1", 0))]
    sockets[0].bind(str(tmp_path / "s"))
    sockets[0].listen()
    for sock in sockets:
        os.set_inheritable(sock.fileno(), True)
    numbers = [sock.fileno() for sock in sockets]
    moves = f"exec 8<&{numbers[0]} 9<&{numbers[1]} 3<&8 4<&9 8<&- 9<&-"
    script = f"{moves}; LISTEN_PID=$$ LISTEN_FDS=2 exec {shlex.join([*SERVE, str(image.path)])}"
    with subprocess.Popen(["bash", "-c", script], env=ENVIRONMENT, pass_fds=numbers, stdout=subprocess.PIPE) as process:
        try:
            for uri in (
                f"nbd+unix:///monday?socket={tmp_path}/s",
                f"nbd://127.0.0.1:{sockets[1].getsockname()[1]}/monday",
            ):
                assert output("nbdinfo", "--size", uri) == f"{1 << 20}\n"
        finally:
            process.terminate()
        assert process.communicate(timeout=20)[0] == b""
        assert process.returncode == 0
    assert (tmp_path / "s").exists()
    for sock in sockets:
        sock.close()


@pytest.mark.parametrize(
    ("passed", "said"),
    [("exec 3<>/dev/null", "is no socket"), ("exec 3<&-", "is no socket"), ("exec 3<&9", "not a stream socket that")],
)
def test_what_is_passed_and_does_not_listen_is_one_error(image: Image, passed: str, said: str) -> None:
    one, other = socket.socketpair()
    script = (
        f"exec 9<&{one.fileno()}; {passed}; LISTEN_PID=$$ LISTEN_FDS=1 exec {shlex.join([*SERVE, str(image.path)])}"
    )
    done = subprocess.run(
        ["bash", "-c", script], env=ENVIRONMENT, pass_fds=[one.fileno()], capture_output=True, text=True, timeout=20
    )
    one.close()
    other.close()
    assert done.returncode == 1
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_sockets_for_another_process_are_not_taken(image: Image, tmp_path: Path) -> None:
    environment = ENVIRONMENT | {"LISTEN_PID": "1", "LISTEN_FDS": "1"}
    process = subprocess.Popen(
        [*SERVE, str(image.path), "-k", str(tmp_path / "s")], env=environment, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.readline().startswith(b"nbd+unix:")
    process.terminate()
    process.communicate(timeout=20)


# Standard input and output.

NBDSH = """
import nbd
h = nbd.NBD()
h.connect_command({command!r})
assert h.get_size() == {size}
data = b"".join(h.pread(min(65536, {size} - at), at) for at in range(0, {size}, 65536))
assert data == open({content!r}, "rb").read()
h.shutdown()
"""


def test_nbdsh_runs_it_on_standard_input_and_output(image: Image, tmp_path: Path) -> None:
    require("nbdsh")
    (tmp_path / "content").write_bytes(monday(image))
    command = ["env", f"PYTHONPATH={REPOSITORY}", *SERVE, "--stdio", "-v", "-s", "monday", str(image.path)]
    output(SYSTEM_PYTHON, "-c", NBDSH.format(command=command, size=1 << 20, content=str(tmp_path / "content")))


RELAY = """
import os, sys
while data := os.read(int(sys.argv[1]), 1 << 16):
    while data:
        data = data[os.write(int(sys.argv[2]), data):]
"""


def test_two_pipes_do_as_well_as_ssh_has_them(image: Image, tmp_path: Path) -> None:
    """nbdcopy wants a socket: two relays stand between it and the pipes."""
    require("nbdcopy")
    process = subprocess.Popen(
        [*SERVE, "--stdio", "-s", "monday", str(image.path)], env=ENVIRONMENT,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "s"))
        listening.listen()
        uri = f"nbd+unix:///?socket={tmp_path}/s"
        client = subprocess.Popen(["nbdcopy", "--connections=1", uri, str(tmp_path / "copy")])
        relay, _ = listening.accept()
    ways = [(relay.fileno(), process.stdin.fileno()), (process.stdout.fileno(), relay.fileno())]
    relays = [
        subprocess.Popen([sys.executable, "-c", RELAY, *map(str, way)], pass_fds=way, stderr=subprocess.DEVNULL)
        for way in ways
    ]
    process.stdin.close()
    relay.close()
    assert process.wait(30) == 0  # the client has left
    process.stdout.close()
    for each in relays:
        each.kill()
        each.wait()
    assert client.wait(10) == 0
    assert (tmp_path / "copy").read_bytes() == monday(image)


def test_a_terminal_or_file_for_a_client_is_one_error(image: Image) -> None:
    with open(image.path, "rb") as file:
        done = subprocess.run(
            [*SERVE, "--stdio", str(image.path)], env=ENVIRONMENT, stdin=file, stdout=file, stderr=subprocess.PIPE
        )
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1


def test_a_client_that_leaves_without_a_word_ends_stdio(image: Image) -> None:
    ours, theirs = socket.socketpair()
    process = subprocess.Popen(
        [*SERVE, "--stdio", "-v", str(image.path)], env=ENVIRONMENT, stdin=theirs, stdout=theirs, stderr=theirs
    )
    theirs.close()
    ours.settimeout(20)
    handshake(ours, SIMPLE_REPLIES)  # with nothing of the log in between
    ours.sendall(packed(read(0, 512)))
    time.sleep(0.1)
    assert len(ours.recv(1 << 16)) == 16 + 512
    ours.close()
    assert process.wait(10) == 0


# Running.


def test_once_ends_with_the_first_client_that_chose_an_export(image: Image, tmp_path: Path) -> None:
    require("nbdcopy")
    for workers in ("0", "2"):
        serving = Serving(image.path, "-k", tmp_path / "s", "--once", "--workers", workers)
        with socket.socket(socket.AF_UNIX) as curious:
            curious.connect(str(tmp_path / "s"))
            assert curious.recv(18)
        time.sleep(0.1)
        assert serving.process.poll() is None  # it chose nothing
        output("nbdcopy", "--connections=4", "--threads=4", serving.uris[0], tmp_path / "copy")
        assert serving.process.wait(10) == 0
        assert not (tmp_path / "s").exists()


def test_it_has_descriptors_for_as_many_connections_as_it_allows(image: Image, tmp_path: Path) -> None:
    serving = Serving(image.path, "-k", tmp_path / "s", "--max-connections", "1500")
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft, _ = resource.prlimit(serving.process.pid, resource.RLIMIT_NOFILE)
    assert soft > 1500 or soft == hard
    assert serving.stop() == 0


def test_the_pid_file_is_there_when_it_is_ready_and_goes_with_it(image: Image, tmp_path: Path) -> None:
    serving = Serving(image.path, "-k", tmp_path / "s", "--pid-file", tmp_path / "pid")
    assert (tmp_path / "pid").read_text() == f"{serving.process.pid}\n"
    assert serving.stop() == 0
    assert not (tmp_path / "pid").exists()


def test_a_pid_file_that_cannot_be_written_is_one_error_and_leaves_nothing(
    image: Image, tmp_path: Path, run: Callable[..., Result]
) -> None:
    result = run("serve", image.path, "-k", tmp_path / "s", "--workers", "0", "--pid-file", tmp_path / "no" / "pid")
    assert result.returncode == 1
    assert "cannot be written" in result.stderr
    assert not (tmp_path / "s").exists()


def test_it_ends_with_its_parent(image: Image, tmp_path: Path) -> None:
    command = shlex.join([*SERVE, str(image.path), "-k", str(tmp_path / "s"), "--exit-with-parent"])
    parent = subprocess.Popen(["bash", "-c", f"{command} & wait"], env=ENVIRONMENT, stdout=subprocess.PIPE)
    assert parent.stdout is not None
    assert parent.stdout.readline()
    descendants = process_tree(parent.pid)[1:]
    assert len(descendants) >= 1
    parent.kill()
    parent.wait()
    assert until(lambda: not any(map(is_alive, descendants)), 8)
    assert not (tmp_path / "s").exists()
    parent.stdout.close()


def test_new_snapshots_are_offered_by_themselves_with_refresh(image: Image, tmp_path: Path) -> None:
    require("nbdinfo")
    serving = Serving(image.path, "-U", "-k", tmp_path / "s", "--refresh", "0.2", "--workers", "2")
    pids = process_tree(serving.process.pid)
    time.sleep(0.6)
    assert process_tree(serving.process.pid) == pids  # nothing is new
    image.snapshot("tuesday")
    uri = f"nbd+unix:///tuesday?socket={tmp_path}/s"
    assert until(lambda: output("nbdinfo", "--size", uri, check=False) == f"{2 << 20}\n")
    assert serving.stop() == 0


def test_verbose_is_a_line_for_each_connection(image: Image, tmp_path: Path) -> None:
    require("nbdcopy")
    serving = Serving(image.path, "-k", tmp_path / "s", "-v", "-s", "monday")
    output("nbdcopy", "--connections=1", serving.uris[0], tmp_path / "copy")
    assert serving.stop(signal.SIGINT) == 0
    lines = [line for line in serving.stderr.splitlines() if "client 1 on" in line]
    assert any("reads export ''" in line for line in lines)
    [sent] = [int(words[0]) for line in lines if (words := line.partition("/s: ")[2].split())[1:2] == ["bytes"]]
    assert sent > 100_000


# Several images.


def test_several_images_are_told_apart_by_their_names(new_image: NewImage, tmp_path: Path) -> None:
    require("nbdcopy")
    images = [new_image("1M", name=f"{name}.qcow2").write(0, 5000).snapshot("monday") for name in ("a", "b")]
    images[1].write(7000, 4096).snapshot("x/y")
    serving = Serving(*(image.path for image in images), "-k", tmp_path / "s")
    names = ["a", "a%2Fmonday", "b", "b%2Fmonday", "b%2Fx%2Fy"]
    assert serving.uris == [f"nbd+unix:///{name}?socket={tmp_path}/s" for name in names]
    contents = [images[0].active, images[0].reference("monday"), images[1].active]
    contents += [images[1].reference("monday"), images[1].reference("x/y")]
    for uri, content in zip(serving.uris, contents, strict=True):
        output("nbdcopy", uri, tmp_path / "copy")
        assert (tmp_path / "copy").read_bytes() == content.read()
    assert output("nbdinfo", "--size", f"nbd+unix:///b%2Fid=2?socket={tmp_path}/s") == f"{1 << 20}\n"
    assert output("nbdinfo", "--size", f"nbd+unix:///?socket={tmp_path}/s", check=False) == ""
    assert serving.stop() == 0


def test_two_images_of_one_name_need_prefixes(new_image: NewImage, tmp_path: Path, run: Callable[..., Result]) -> None:
    paths = []
    for directory in ("vm1", "vm2"):
        (tmp_path / directory).mkdir()
        paths.append(new_image("1M", name=f"{directory}/disk.qcow2").snapshot("monday").path)
    result = run("serve", *paths, "-k", tmp_path / "s")
    assert result.returncode == 2
    assert "give each a --prefix" in result.stderr
    serving = Serving(*paths, "-k", tmp_path / "s", "--prefix", "one", "--prefix", "two", "-s", "monday")
    assert [uri.partition("?")[0] for uri in serving.uris] == ["nbd+unix:///one", "nbd+unix:///two"]
    assert serving.stop() == 0
    with suppress(FileNotFoundError):
        (tmp_path / "s").unlink()
