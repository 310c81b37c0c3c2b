"""Exports that come and go under their clients, and nodes that stay as long as somebody has them."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.daemon.conftest import StartDaemon
from tests.daemon.storage_daemon import StorageDaemon
from tests.nbd.support import run
from tests.support import require
from tests.support.waiting import until

GENERIC = "GenericError"


@contextmanager
def client(uri: str) -> Iterator[subprocess.Popen[str]]:
    """A qemu-io that has connected, and waits for commands."""
    words = [require("qemu-io"), "-r", "-f", "raw", uri]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen(words, text=True, **pipes) as it:
        assert it.stdin is not None
        it.stdin.write("read 0 512\n")
        it.stdin.flush()
        assert it.stdout is not None
        while "read 512/512" not in (line := it.stdout.readline()):
            assert line, "the client has ended"
        yield it
        it.kill()


def test_an_export_in_use_is_deleted_only_by_force(any_daemon: StorageDaemon) -> None:
    qmp = any_daemon.qmp
    qmp.add("null-co", "n", size=65536, read_zeroes=True)
    qmp.export("n", writable=True)
    with client(any_daemon.uri("n")) as it:
        assert qmp.refusal("block_export_del", id="n") == (GENERIC, "export 'n' still in use")
        assert qmp.refusal("block_export_del", id="n", mode="safe") == (GENERIC, "export 'n' still in use")
        assert qmp.refusal("blockdev_del", node_name="n") == (GENERIC, "Node n is in use")
        qmp.execute("block_export_del", id="n", mode="hard")
        qmp.wait_for_event("BLOCK_EXPORT_DELETED")
        assert qmp.execute("query_block_exports") == []
        assert it.stdin is not None
        it.stdin.write("read 0 512\nquit\n")
        it.stdin.close()
        assert it.stdout is not None
        assert "read failed" in it.stdout.read()
    assert "not available" in run(require("nbdinfo"), any_daemon.uri("n"), check=False) + _complaint(
        any_daemon.uri("n")
    )
    qmp.execute("blockdev_del", node_name="n")


def _complaint(uri: str) -> str:
    return subprocess.run([require("qemu-io"), "-f", "raw", uri], capture_output=True, text=True, timeout=60).stderr


def test_when_the_client_has_left_no_force_is_needed(any_daemon: StorageDaemon) -> None:
    qmp = any_daemon.qmp
    qmp.add("null-co", "n", size=65536, read_zeroes=True)
    qmp.export("n")
    with client(any_daemon.uri("n")):
        pass

    def is_deleted() -> bool:
        return "return" in qmp.answer({"execute": "block-export-del", "arguments": {"id": "n"}})

    assert until(is_deleted)
    assert qmp.refusal("block_export_del", id="n") == (GENERIC, "Export 'n' is not found")


def test_exports_that_cannot_be_are_refused_and_change_nothing(any_daemon: StorageDaemon, disk: Path) -> None:
    qmp = any_daemon.qmp
    qmp.add("file", "f", filename=str(disk), read_only=True)
    qmp.add("null-co", "n", size=65536)
    qmp.export("n", "taken")
    before = qmp.execute("query_block_exports"), qmp.execute("query_named_block_nodes", flat=True)
    for options, text in [
        ({"id": "taken", "node-name": "n"}, "Block export id 'taken' is already in use"),
        ({"id": "1", "node-name": "n"}, "Invalid block export id"),
        ({"id": "e", "node-name": "absent"}, "Cannot find device='' nor node-name='absent'"),
        ({"id": "e", "node-name": "n", "name": "taken"}, "NBD server already has export named 'taken'"),
        ({"id": "e", "node-name": "f", "writable": True}, "Cannot export read-only node as writable"),
        ({"id": "e", "node-name": "n", "bitmaps": ["b"]}, "Bitmap 'b' is not found"),
        ({"id": "e", "node-name": "n", "surprise": 1}, "Parameter 'surprise' is unexpected"),
        ({"node-name": "n"}, "Parameter 'id' is missing"),
    ]:
        arguments = {"type": "nbd", **options}
        answer = qmp.answer({"execute": "block-export-add", "arguments": arguments})
        assert answer == {"error": {"class": GENERIC, "desc": text}}
    assert (qmp.execute("query_block_exports"), qmp.execute("query_named_block_nodes", flat=True)) == before
    assert "export='taken'" in run("nbdinfo", "--list", any_daemon.uri("")).replace('"', "'")


@pytest.mark.parametrize("text", ["\ud800", "a\0b"])
@pytest.mark.parametrize("what", ["name", "description"])
def test_what_nbd_cannot_carry_is_refused(daemon: StorageDaemon, what: str, text: str) -> None:
    daemon.qmp.add("null-co", "n", size=65536)
    options = {"type": "nbd", "id": "e", "node_name": "n", what: text}
    assert "is no UTF-8 without NUL" in daemon.qmp.refusal("block_export_add", **options)[1]
    assert daemon.qmp.execute("query_block_exports") == []


def test_the_server_comes_and_goes_with_all_exports(any_daemon: StorageDaemon) -> None:
    qmp = any_daemon.qmp
    qmp.add("null-co", "n", size=65536)
    qmp.export("n", "one")
    where = {"type": "unix", "data": {"path": f"{any_daemon.directory}/other"}}
    assert qmp.refusal("nbd_server_start", addr=where) == (GENERIC, "NBD server already running")
    qmp.execute("nbd_server_add", device="n", name="two", writable=True)
    assert {each["id"] for each in qmp.execute("query_block_exports")} == {"one", "two"}
    assert qmp.refusal("nbd_server_add", device="absent")[1] == "Cannot find device='absent' nor node-name='absent'"
    qmp.execute("nbd_server_remove", name="two")
    qmp.execute("nbd_server_stop")
    assert qmp.execute("query_block_exports") == []
    assert qmp.refusal("nbd_server_stop") == (GENERIC, "NBD server not running")
    refused = qmp.refusal("block_export_add", type="nbd", id="e", node_name="n")
    assert refused == (GENERIC, "NBD server not running")
    qmp.execute("nbd_server_start", addr=where, max_connections=5)
    qmp.export("n", "three", description="again")
    said = run("nbdinfo", f"nbd+unix:///three?socket={any_daemon.directory}/other")
    assert "again" in said
    assert "export-size: 65536" in said


def test_clients_beyond_the_most_wait_for_their_turn(start_daemon: StartDaemon, tmp_path: Path) -> None:
    daemon = start_daemon()
    daemon.qmp.execute("nbd_server_stop")
    where = {"type": "unix", "data": {"path": f"{daemon.directory}/nbd"}}
    daemon.qmp.execute("nbd_server_start", addr=where, max_connections=1)
    daemon.qmp.add("null-co", "n", size=65536, read_zeroes=True)
    daemon.qmp.export("n")
    with client(daemon.uri("n")):
        second = subprocess.Popen(["nbdinfo", "--size", daemon.uri("n")], stdout=subprocess.PIPE, text=True)
        with pytest.raises(subprocess.TimeoutExpired):
            second.wait(0.5)
    assert second.communicate(timeout=20)[0] == "65536\n"


def test_tcp_is_served_as_well(daemon: StorageDaemon) -> None:
    daemon.qmp.execute("nbd_server_stop")
    for port in range(21_000, 21_100):
        where = {"type": "inet", "data": {"host": "127.0.0.1", "port": str(port)}}
        answer = daemon.qmp.answer({"execute": "nbd-server-start", "arguments": {"addr": where}})
        if "return" in answer:
            break
    daemon.qmp.add("null-co", "n", size=65536)
    daemon.qmp.export("n")
    assert run("nbdinfo", "--size", f"nbd://127.0.0.1:{port}/n") == "65536\n"


@pytest.mark.parametrize("mode", ["safe", "hard"])
def test_many_exports_come_and_go_while_clients_look(daemon: StorageDaemon, mode: str) -> None:
    qmp = daemon.qmp
    qmp.add("null-co", "n", size=65536)
    qmp.export("n", "stays")
    for number in range(30):
        qmp.export("n", f"e{number}")
        assert "stays" in run("nbdinfo", "--list", daemon.uri(""))
        qmp.execute("block_export_del", id=f"e{number}", mode=mode)
    assert [each["id"] for each in qmp.execute("query_block_exports")] == ["stays"]
