"""The command line: the order of options, what is wrong with them in QEMU's words, the background, TLS."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcow2snap.block.blockdev.keyval import parse_keyval
from qcow2snap.block.blockdev.options import BLOCKDEV_OPTIONS
from qcow2snap.block.node import InvalidOption, Qcow2SnapError
from tests.daemon.conftest import StartDaemon
from tests.daemon.storage_daemon import OURS, PROGRAMS, program
from tests.nbd.support import run
from tests.nbd.test_tls import pki as pki
from tests.support import require
from tests.support.tools import REPOSITORY
from tests.support.waiting import until

FILE = "file,node-name=f,filename={disk}"
RAW = "driver=raw,node-name=r,file.driver=file,file.filename={disk}"

# Options that cannot be, and what is said of the last one.
MISTAKES = [
    (["--blockdev", FILE + ",foo=1"], "Parameter 'foo' is unexpected"),
    (["--blockdev", "node-name=f,filename={disk}"], "Parameter 'driver' is missing"),
    (["--blockdev", "driver=nope,node-name=f"], "Parameter 'driver' does not accept value 'nope'"),
    (["--blockdev", FILE + ",read-only"], "Expected '=' after parameter 'read-only'"),
    (["--blockdev", FILE + ",read-only=maybe"], "Parameter 'read-only' expects 'on' or 'off'"),
    (["--blockdev", RAW + ",offset=x"], "Parameter 'offset' expects integer"),
    (["--blockdev", RAW + ",file=f"], "Parameters 'file.*' used inconsistently"),
    (["--blockdev", "raw,node-name=r,file.0=3,file.1=2"], "Invalid parameter type for 'file', expected: BlockdevRef"),
    (["--blockdev", "raw,node-name=r,file..x=3"], "Invalid parameter 'file..x'"),
    (["--blockdev", "file,node-name=f,filename=/nowhere/x"], "Could not open '/nowhere/x': No such file or directory"),
    (["--blockdev", "file,filename={disk}"], "'node-name' must be specified for the root node"),
    (["--blockdev", FILE, "--blockdev", FILE], "Duplicate nodes with node-name='f'"),
    (["--blockdev", FILE, "--export", "nbd,id=e,node-name=f"], "NBD server not running"),
    (["--export", "nbd,id=e,node-name=f", "--blockdev", FILE], "Cannot find device='' nor node-name='f'"),
    (["--nbd-server", "addr.type=unix"], "Parameter 'addr.path' is missing"),
    (["--nbd-server", "addr.type=unix,addr.path={disk}.s,tls-creds=t"], "No TLS credentials with id 't'"),
    (["--monitor", "chardev=absent"], 'chardev "absent" not found'),
    (["--chardev", "socket,path={disk}.s"], "chardev: no id specified"),
    (["--object", "no-such-type,id=o"], "Parameter 'qom-type' does not accept value 'no-such-type'"),
]  # fmt: skip


@pytest.mark.parametrize("which", PROGRAMS)
def test_what_is_wrong_with_an_option_is_said_in_the_same_words(which: str, disk: Path) -> None:
    words = program(which)
    running = []
    for options, _ in MISTAKES:
        filled = [option.replace("{disk}", str(disk)) for option in options]
        running.append(
            subprocess.Popen(
                [*words, *filled], stderr=subprocess.PIPE, text=True, cwd=REPOSITORY, start_new_session=True
            )
        )
    for process, (options, text) in zip(running, MISTAKES, strict=True):
        said = process.communicate(timeout=60)[1]
        assert process.returncode == 1, options
        assert said.count("\n") == 1
        assert said.rstrip().endswith(text), (options, said)


@pytest.mark.parametrize(
    ("words", "text"),
    [(["--nope"], "--nope"), (["nope"], "nope: Unexpected argument"), (["--blockdev"], "requires argument")],
)
def test_other_words_are_a_mistake_of_usage(words: list[str], text: str) -> None:
    done = subprocess.run([*program(OURS), *words], capture_output=True, text=True, timeout=60, cwd=REPOSITORY)
    assert done.returncode == 2
    assert text in done.stderr


INET = "addr.type=inet,addr.host=127.0.0.1,addr.port="
REMOTE = "nbd,node-name=n,server.type=inet,server.host=127.0.0.1,server.port="


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--nbd-server", INET + "70000"], "'70000' is no port: say a number up to 65535"),
        (["--blockdev", REMOTE + "70000"], "'70000' is no port: say a number up to 65535"),
        (["--blockdev", REMOTE + "9" * 30], f"'{'9' * 30}' is no port: say a number up to 65535"),
        (["--chardev", "socket,id=m,host=127.0.0.1,port=" + "9" * 5000], "is no port: say a number up to 65535"),
        (["--chardev", "socket,id=m,host=a..b,port=7"], "Failed to connect to 'a..b:7': "),
    ],
)
def test_an_address_that_cannot_be_is_refused_in_one_line(words: list[str], text: str) -> None:
    done = subprocess.run([*program(OURS), *words], capture_output=True, text=True, timeout=60, cwd=REPOSITORY)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert text in done.stderr


def test_help_and_version_are_printed() -> None:
    said = run(*program(OURS), "--help")
    assert all(option in said for option in ("--blockdev", "--export", "--nbd-server", "--monitor", "--pidfile"))
    assert re.match(r"qcow2snap daemon, version \d+\.\d+", run(*program(OURS), "-V"))
    refused = subprocess.run([*program(OURS), "-T", "x"], capture_output=True, text=True, timeout=60, cwd=REPOSITORY)
    assert (refused.returncode, refused.stderr.count("\n")) == (1, 1)
    assert "no tracing" in refused.stderr


@pytest.mark.parametrize("which", PROGRAMS)
def test_who_comes_before_all_options_are_carried_out_finds_the_exports_that_they_make(
    which: str, disk: Path, tmp_path: Path
) -> None:
    nbd, late = tmp_path / "nbd", tmp_path / "late"
    words = [*program(which), "--nbd-server", f"addr.type=unix,addr.path={nbd}", "--blockdev", FILE.format(disk=disk)]
    words += ["--chardev", f"socket,id=late,path={late},server=on,wait=on", "--export", "nbd,id=e,node-name=f,name=e"]
    client = [require("nbdinfo"), "--size", f"nbd+unix:///e?socket={nbd}"]
    with subprocess.Popen(words, stderr=subprocess.DEVNULL, env=os.environ | {"PYTHONPATH": str(REPOSITORY)}) as daemon:
        try:
            assert until(late.exists)
            with subprocess.Popen(client, stdout=subprocess.PIPE, text=True) as early:
                assert not until(lambda: early.poll() is not None, 0.5), "it was told that there is no such export"
                with socket.socket(socket.AF_UNIX) as waited_for:
                    waited_for.connect(str(late))
                    assert early.communicate(timeout=30)[0] == f"{disk.stat().st_size}\n"
        finally:
            daemon.kill()


@pytest.mark.parametrize("which", PROGRAMS)
def test_it_goes_to_the_background_when_it_is_ready(which: str, disk: Path, tmp_path: Path) -> None:
    pidfile = tmp_path / "pid"
    options = [
        "--blockdev",
        f"file,node-name=f,filename={disk}",
        "--nbd-server",
        f"addr.type=unix,addr.path={tmp_path}/s",
    ]
    options += ["--export", "nbd,id=f,node-name=f", "--pidfile", str(pidfile), "--daemonize"]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    subprocess.run([*program(which), *options], check=True, timeout=60, env=environment)
    pid = int(pidfile.read_text())
    try:
        assert run("nbdinfo", "--size", f"nbd+unix:///f?socket={tmp_path}/s") == f"{disk.stat().st_size}\n"
    finally:
        os.kill(pid, signal.SIGTERM)
        assert until(lambda: not pidfile.exists())


@pytest.mark.parametrize("which", PROGRAMS)
def test_what_fails_in_the_background_is_told_by_the_exit_code(which: str) -> None:
    options = ["--daemonize", "--blockdev", "file,node-name=f,filename=/nowhere/x"]
    done = subprocess.run([*program(which), *options], capture_output=True, text=True, timeout=60, cwd=REPOSITORY)
    assert done.returncode == 1
    assert "Could not open '/nowhere/x'" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_end_it_and_nothing_is_left_behind(
    start_daemon: StartDaemon, tmp_path: Path, number: signal.Signals
) -> None:
    pidfile = tmp_path / "pid"
    daemon = start_daemon("--pidfile", str(pidfile))
    assert int(pidfile.read_text()) == daemon.process.pid
    daemon.process.send_signal(number)
    assert daemon.process.wait(20) == 0
    assert not list(daemon.directory.iterdir())
    assert not pidfile.exists()


@pytest.mark.parametrize("which", PROGRAMS)
def test_tls_is_required_where_credentials_are_given(
    start_daemon: StartDaemon, which: str, pki: Path, disk: Path
) -> None:
    port = free_port()
    words = [*program(which)]
    words += ["--object", f"tls-creds-x509,id=tls,dir={pki},endpoint=server,verify-peer=on"]
    words += ["--nbd-server", f"addr.type=inet,addr.host=127.0.0.1,addr.port={port},tls-creds=tls"]
    words += ["--blockdev", f"file,node-name=f,filename={disk}", "--export", "nbd,id=f,node-name=f"]
    with subprocess.Popen(words, cwd=REPOSITORY) as process:
        try:
            uri = f"nbds://localhost:{port}/f?tls-certificates={pki}"
            size = f"{disk.stat().st_size}\n"
            assert until(lambda: run("nbdinfo", "--size", uri, check=False) == size)
            assert run("nbdinfo", "--size", f"nbd://localhost:{port}/f", check=False) == ""
            far = start_daemon(
                "--object", f"tls-creds-x509,id=c,dir={pki},endpoint=client",
                "--blockdev", f"nbd,node-name=n,server.type=inet,server.host=localhost,server.port={port},export=f,"
                              "tls-creds=c,read-only=on",
                "--export", "nbd,id=n,node-name=n",
                which=which,
            )  # fmt: skip
            assert run("nbdinfo", "--size", far.uri("n")) == size
        finally:
            process.terminate()


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


# Keyval by itself.


def test_keyval_nests_and_lists_and_escapes() -> None:
    assert parse_keyval("raw,file.driver=file,file.filename=a,,b=c,x.0=1,x.1=2,y=1,y=2", "driver") == {
        "driver": "raw",
        "file": {"driver": "file", "filename": "a,b=c"},
        "x": ["1", "2"],
        "y": "2",
    }


@given(text=st.text(alphabet="a=,.0_\n'", max_size=40))
def test_any_text_is_options_or_a_mistake(text: str) -> None:
    with suppress(Qcow2SnapError):  # and nothing else
        BLOCKDEV_OPTIONS.read(parse_keyval(text, "driver"), "", strings=True)


@pytest.mark.parametrize(
    ("spelled", "expected"),
    [("on", True), ("yes", True), ("true", True), ("y", True), ("off", False), ("no", False), ("n", False)],
)
def test_booleans_are_spelled_as_in_qemu(spelled: str, expected: bool) -> None:
    options = {"driver": "file", "filename": "x", "read-only": spelled}
    assert BLOCKDEV_OPTIONS.read(options, "", strings=True)["read-only"] is expected


@pytest.mark.parametrize(("spelled", "expected"), [("64k", 65536), ("1M", 1 << 20), ("0x10000", 65536), ("512", 512)])
def test_sizes_are_spelled_as_in_qemu(spelled: str, expected: int) -> None:
    options = {"driver": "copy-before-write", "file": "a", "target": "b", "min-cluster-size": spelled}
    assert BLOCKDEV_OPTIONS.read(options, "", strings=True)["min-cluster-size"] == expected


@pytest.mark.parametrize("spelled", ["9" * 400, "9" * 400 + ".5k", "9" * 5000, "0x" + "f" * 5000])
@pytest.mark.parametrize("option", ["min-cluster-size", "cbw-timeout"])
def test_numbers_of_any_length_are_refused_in_words(option: str, spelled: str) -> None:
    options = {"driver": "copy-before-write", "file": "a", "target": "b", option: spelled}
    with pytest.raises(InvalidOption, match=option):
        BLOCKDEV_OPTIONS.read(options, "", strings=True)
