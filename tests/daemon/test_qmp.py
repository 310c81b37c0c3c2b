"""QMP: by hand, byte by byte, against what QEMU's daemons say; and by the client library that QEMU's people publish."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from qemu.qmp import ExecuteError, QMPClient

from qcow2snap.block.node import InvalidOption
from qcow2snap.daemon.json_stream import MAX_VALUE, JSONStream
from qcow2snap.daemon.qmp import QMPSession
from tests.daemon.storage_daemon import Monitor, StorageDaemon, program
from tests.support.tools import REPOSITORY

# What is sent, and the class and text of the error that comes back.
MISTAKES = [
    ({"execute": "no-such-command"}, "CommandNotFound", "The command no-such-command has not been found"),
    ({"exec": "quit"}, "GenericError", "QMP input member 'exec' is unexpected"),
    ({}, "GenericError", "QMP input lacks member 'execute'"),
    ([1], "GenericError", "QMP input must be a JSON object"),
    ({"execute": 5}, "GenericError", "QMP input member 'execute' must be a string"),
    ({"execute": "query-version", "arguments": []}, "GenericError", "QMP input member 'arguments' must be an object"),
    ({"execute": "query-version", "arguments": {"x": 1}}, "GenericError", "Parameter 'x' is unexpected"),
    ({"execute": "blockdev-del", "arguments": {}}, "GenericError", "Parameter 'node-name' is missing"),
    ("garbage", "GenericError", "JSON parse error, invalid keyword 'garbage'"),
    (
        {"execute": "block-export-del", "arguments": {"id": "e", "mode": "weird"}},
        "GenericError",
        "Parameter 'mode' does not accept value 'weird'",
    ),
    (
        {"execute": "qmp_capabilities"},
        "CommandNotFound",
        "Capabilities negotiation is already complete, command ignored",
    ),
]


def test_mistakes_are_answered_in_the_same_words(any_daemon: StorageDaemon) -> None:
    for request, error_class, text in MISTAKES:
        assert any_daemon.qmp.answer(request) == {"error": {"class": error_class, "desc": text}}
    assert "qemu" in any_daemon.qmp.execute("query_version")


def test_a_client_negotiates_first(any_daemon: StorageDaemon) -> None:
    monitor = Monitor(any_daemon.directory / "qmp", negotiate=False) if any_daemon.which == "qcow2snap" else None
    if monitor is None:  # QEMU's has one client at a time
        any_daemon.qmp.close()
        monitor = Monitor(any_daemon.directory / "qmp", negotiate=False)
    assert set(monitor.greeting["QMP"]) == {"version", "capabilities"}
    assert set(monitor.greeting["QMP"]["version"]) == {"qemu", "package"}
    assert monitor.answer({"execute": "query-version"})["error"]["class"] == "CommandNotFound"
    assert monitor.answer({"execute": "qmp_capabilities", "arguments": {"enable": ["oob"]}, "id": 1}) == {
        "return": {},
        "id": 1,
    }
    monitor.close()


@pytest.mark.parametrize(
    "spelling", ["{'execute': 'query-version', 'id': \"it's\"}", '{"execute":"query-version","id":"it\'s"}']
)
def test_ids_come_back_and_single_quotes_do_as_well(any_daemon: StorageDaemon, spelling: str) -> None:
    assert any_daemon.qmp.answer(spelling)["id"] == "it's"
    whatever = {"a": [1, None, {"b": 1.5}]}
    assert any_daemon.qmp.answer({"execute": "query-version", "id": whatever})["id"] == whatever
    assert any_daemon.qmp.answer({"execute": "no", "id": 0})["id"] == 0


def test_requests_may_come_in_any_pieces(daemon: StorageDaemon) -> None:
    chosen = random.Random(5)
    text = b"".join(json.dumps({"execute": "query-status", "id": number}).encode() for number in range(50))
    while text:
        length = chosen.randrange(1, 40)
        daemon.qmp.socket.sendall(text[:length])
        text = text[length:]
        time.sleep(0.001)
    assert [daemon.qmp.receive()["id"] for _ in range(50)] == list(range(50))


def test_several_clients_are_served_and_hear_of_what_happens(daemon: StorageDaemon) -> None:
    others = [daemon.monitor() for _ in range(5)]
    daemon.qmp.add("null-co", "n", size=4096)
    daemon.qmp.export("n")
    assert others[0].execute("query_block_exports")[0]["id"] == "n"
    others[1].execute("block_export_del", id="n")
    for each in (daemon.qmp, *others):
        event = each.wait_for_event("BLOCK_EXPORT_DELETED")
        assert event["data"] == {"id": "n"}
        assert abs(event["timestamp"]["seconds"] - time.time()) < 60


def test_a_client_that_never_ends_a_value_is_told_and_costs_nothing(daemon: StorageDaemon) -> None:
    monitor = daemon.monitor()
    monitor.socket.sendall(b'{"execute": "' + b"x" * (MAX_VALUE + 4096))
    assert "limit" in monitor.receive()["error"]["desc"]
    assert daemon.qmp.execute("query_status")["running"] is True


def test_a_client_that_takes_no_answers_does_not_hold_up_the_others(daemon: StorageDaemon) -> None:
    deaf = daemon.monitor()
    deaf.socket.setblocking(False)
    request = json.dumps({"execute": "query-commands"}).encode() * 1000
    with suppress(BlockingIOError):
        for _ in range(50):
            deaf.socket.sendall(request)
            time.sleep(0.01)
        pytest.fail("it is heard however much it does not take")
    assert daemon.qmp.execute("query_status")["running"] is True


def test_the_client_library_of_qemu_speaks_with_it(daemon: StorageDaemon) -> None:
    async def talk() -> None:
        client = QMPClient("test")
        await client.connect(str(daemon.directory / "qmp"))
        names = {each["name"] for each in await client.execute("query-commands")}
        assert {"blockdev-add", "blockdev-reopen", "block-export-add", "query-snapshots", "quit"} <= names
        await client.execute("blockdev-add", {"driver": "null-co", "node-name": "n", "size": 4096})
        await client.execute("block-export-add", {"type": "nbd", "id": "e", "node-name": "n"})
        with pytest.raises(ExecuteError, match="Node n is in use"):
            await client.execute("blockdev-del", {"node-name": "n"})
        with client.listener("BLOCK_EXPORT_DELETED") as events:
            await client.execute("block-export-del", {"id": "e"})
            assert (await asyncio.wait_for(events.get(), 20))["data"] == {"id": "e"}
        await client.execute("quit")
        with suppress(EOFError):  # the daemon may have hung up already
            await client.disconnect()

    asyncio.run(asyncio.wait_for(talk(), 60))
    assert daemon.process.wait(20) == 0


def test_standard_input_and_output_are_a_monitor() -> None:
    words = [*program("qcow2snap"), "--chardev", "stdio,id=m", "--monitor", "m"]
    requests = '{"execute": "qmp_capabilities"}\n{"execute": "query-status"}\n{"execute": "quit"}\n'
    done = subprocess.run(words, input=requests, capture_output=True, text=True, timeout=60, cwd=REPOSITORY)
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert (done.returncode, done.stderr) == (0, "")
    assert [list(answer) for answer in answers] == [["QMP"], ["return"], ["return"], ["return"]]


def test_a_monitor_may_be_a_listener_that_waits_for_us(tmp_path: Path) -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "s"))
    listener.listen()
    words = [sys.executable, "-m", "qcow2snap", "daemon"]
    words += ["--chardev", f"socket,id=m,path={tmp_path}/s", "--monitor", "chardev=m,pretty=on"]
    with subprocess.Popen(words, cwd=REPOSITORY) as process:
        listener.settimeout(60)
        sock, _ = listener.accept()
        sock.settimeout(20)
        received = b""
        while received.count(b"}") < 4:
            received += sock.recv(4096)
        assert received.startswith(b'{\n    "QMP": {\n')
        sock.sendall(b'{"execute": "qmp_capabilities"} {"execute": "quit"}')
        assert process.wait(20) == 0
    listener.close()


def test_it_waits_for_its_first_client_where_that_is_asked_for(tmp_path: Path) -> None:
    words = [*program("qcow2snap"), "--chardev", f"socket,id=m,path={tmp_path}/s,server=on", "--monitor", "m"]
    for ends_early in (True, False):
        with subprocess.Popen(words, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY) as process:
            assert process.stderr is not None
            assert "waiting for a client" in process.stderr.readline()
            if ends_early:
                process.terminate()
            else:
                Monitor(tmp_path / "s").execute("quit")
            assert process.wait(20) == 0


# The stream of values by itself.

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(values=st.lists(st.dictionaries(st.text(), VALUES, max_size=4), min_size=1, max_size=4), data=st.data())
def test_values_come_out_as_they_went_in_however_they_are_cut(
    values: list[dict[str, object]], data: st.DataObject
) -> None:
    text = b" ".join(json.dumps(value, ensure_ascii=data.draw(st.booleans())).encode() for value in values)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    stream, found = JSONStream(), []
    for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        found += stream.feed(text[start:end])
    assert found == values


@given(noise=st.binary(max_size=200))
def test_noise_without_brackets_is_answered_and_what_comes_behind_it_is_understood(noise: bytes) -> None:
    answers: list[bytes] = []
    session = QMPSession(lambda command, arguments: {}, answers.append)
    session.receive(noise.translate(None, b"[]{}'\"") + b"\n")
    session.receive(b"{'execute': 'qmp_capabilities', 'id': 77}\n")
    assert json.loads(answers[-1]) == {"return": {}, "id": 77}


@given(noise=st.lists(st.binary(max_size=50) | st.sampled_from([b"{", b"'", b'"', b"\\", b"]"]), max_size=20))
def test_noise_of_any_kind_is_harmless(noise: list[bytes]) -> None:
    stream = JSONStream()
    for piece in noise:
        for value in stream.feed(piece):
            assert value is None or isinstance(value, dict | list | str | int | float | InvalidOption)


def test_values_that_are_too_deep_or_no_json_are_errors() -> None:
    for text in (b"[" * 100_000, b"{]", b"nul ", b"NaN ", b'"\xff"', b"{'a' 1}", b"}"):
        first = next(JSONStream().feed(text))
        assert isinstance(first, InvalidOption)
        assert "JSON parse error" in str(first)
