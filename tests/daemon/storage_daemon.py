"""Storage daemons as programs: ours and QEMU's, started by the same words and told the same things over QMP."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.support.tools import REPOSITORY, TIME_LIMIT, require

PEERS = REPOSITORY / ".peers" / "bin"
OURS, QEMU, NEWER_QEMU = "qcow2snap", "qemu", "newer qemu"
PROGRAMS = (OURS, QEMU, NEWER_QEMU)


def program(which: str) -> list[str]:
    """The words that start one of PROGRAMS."""
    if which == OURS:
        return [sys.executable, "-m", "qcow2snap", "daemon"]
    if which == QEMU:
        return [require("qemu-storage-daemon")]
    path = PEERS / "qemu-storage-daemon"
    if not path.exists():
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)("make test gets the newer peers; see .peers")
    return [str(path)]


class Refused(AssertionError):
    """A QMP command's answer is an error."""

    def __init__(self, error: dict[str, str]) -> None:
        super().__init__(error["desc"])
        self.error_class = error["class"]


class Monitor:
    """A client of QMP, by hand: what is sent and received is exactly what a test says."""

    def __init__(self, path: Path, *, negotiate: bool = True) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(TIME_LIMIT)
        self.socket.connect(str(path))
        self._lines = self.socket.makefile("rb")
        self.greeting = self.receive()
        self.events: list[dict[str, Any]] = []
        if negotiate:
            self.execute("qmp_capabilities")

    def receive(self) -> dict[str, Any]:
        line = self._lines.readline()
        assert line, "the daemon hung up"
        message: dict[str, Any] = json.loads(line)
        return message

    def answer(self, request: object) -> dict[str, Any]:
        """The answer to a request: a message, or text as it is. Events before it are kept."""
        text = request if isinstance(request, str) else json.dumps(request)
        self.socket.sendall(text.encode() + b"\n")
        while "event" in (message := self.receive()):
            self.events.append(message)
        return message

    def execute(self, command: str, **arguments: Any) -> Any:
        """A command's return value. Underscores in names are hyphens, as in blockdev_add's node_name."""
        named = {name.replace("_", "-"): value for name, value in arguments.items()}
        spelled = command if command == "qmp_capabilities" else command.replace("_", "-")
        answer = self.answer({"execute": spelled, **({"arguments": named} if named else {})})
        if "error" in answer:
            raise Refused(answer["error"])
        return answer["return"]

    def add(self, driver: str, node_name: str, **options: Any) -> None:
        self.execute("blockdev_add", driver=driver, node_name=node_name, **options)

    def export(self, node_name: str, name: str | None = None, **options: Any) -> None:
        self.execute("block_export_add", type="nbd", id=name or node_name, node_name=node_name,
                     name=name or node_name, **options)  # fmt: skip

    def refusal(self, command: str, **arguments: Any) -> tuple[str, str]:
        """Class and text of the error that a command's answer has to be."""
        with pytest.raises(Refused) as refused:
            self.execute(command, **arguments)
        return refused.value.error_class, str(refused.value)

    def wait_for_event(self, name: str) -> dict[str, Any]:
        for event in self.events:
            if event["event"] == name:
                self.events.remove(event)
                return event
        while (message := self.receive()).get("event") != name:
            self.events.append(message)
        return message

    def close(self) -> None:
        self._lines.close()
        self.socket.close()


class StorageDaemon:
    """A daemon with an NBD server on `nbd` and a QMP monitor on `qmp`, in a directory of its own."""

    def __init__(self, which: str, directory: Path, *options: str) -> None:
        directory.mkdir(exist_ok=True)
        self.which = which
        self.directory = directory
        self._monitors: list[Monitor] = []
        chardev = f"socket,path={directory}/qmp,server=on,wait=off,id=qmp"
        words = [*program(which), "--chardev", chardev, "--monitor", "chardev=qmp"]
        words += ["--nbd-server", f"addr.type=unix,addr.path={directory}/nbd,max-connections=100", *options]
        environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
        self.process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=environment)
        try:
            self.qmp = self._first_monitor()
        except BaseException:
            self.kill()
            raise

    def _first_monitor(self) -> Monitor:
        deadline = time.monotonic() + TIME_LIMIT
        while self.process.poll() is None and time.monotonic() < deadline:
            try:
                return self.monitor()
            except (FileNotFoundError, ConnectionRefusedError):
                time.sleep(0.02)
        raise AssertionError(f"did not start: {self.process.communicate(timeout=TIME_LIMIT)[1]}")

    def monitor(self) -> Monitor:
        self._monitors.append(Monitor(self.directory / "qmp"))
        return self._monitors[-1]

    def uri(self, export: str) -> str:
        return f"nbd+unix:///{export}?socket={self.directory}/nbd"

    def stop(self) -> int:
        """Its exit code, when told to end."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self._ended()

    def kill(self) -> None:
        self.process.kill()
        self._ended()

    def _ended(self) -> int:
        for monitor in self._monitors:
            monitor.close()
        self.stderr = self.process.communicate(timeout=TIME_LIMIT)[1]
        return self.process.returncode
