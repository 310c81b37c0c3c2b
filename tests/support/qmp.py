"""A QEMU that has an image open and changes it while tests look on, told what to do over QMP. Guests are optional."""

from __future__ import annotations

import json
import socket
import subprocess
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.support.tools import TIME_LIMIT, ToolFailed, require

_NO_GUEST = ("-machine", "none", "-S")


class RunningQemu:
    """qemu-system-x86_64 with one image as the node "disk". A context manager; on exit the process is gone.

    file     blockdev options of what is below the node
    driver   the node's
    flush    whether QEMU waits for the disk; it is several times slower
    machine  command line options of the machine; without, there is none, and only the monitor writes
    """

    def __init__(
        self,
        file: dict[str, Any],
        *,
        driver: str = "qcow2",
        discard: str = "unmap",
        flush: bool = False,
        machine: tuple[str, ...] = _NO_GUEST,
    ) -> None:
        self._node = {"driver": driver, "node-name": "disk", "discard": discard, "file": {**file, "discard": discard}}
        if not flush:
            self._node["cache"] = self._node["file"]["cache"] = {"no-flush": True}
        self._machine = machine

    def __enter__(self) -> Self:
        ours, theirs = socket.socketpair()
        ours.settimeout(TIME_LIMIT)
        command = [require("qemu-system-x86_64"), "-nodefaults", "-display", "none", *self._machine]
        command += ["-chardev", f"socket,id=qmp,fd={theirs.fileno()}", "-mon", "chardev=qmp,mode=control"]
        command += ["-blockdev", json.dumps(self._node)]
        self._printed = tempfile.TemporaryFile()
        self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdout=self._printed)
        theirs.close()
        self._socket, self._lines = ours, ours.makefile("rb")
        self._lines.readline()  # the greeting
        self.execute("qmp_capabilities")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self.execute("quit")
            self._process.wait(TIME_LIMIT)
        finally:
            self._process.kill()
            self._process.wait()
            self._lines.close()
            self._socket.close()
            self._printed.seek(0)
            printed = self._printed.read()
            self._printed.close()
        if b"fail" in printed or b"rror" in printed:
            raise ToolFailed(printed[-1000:].decode(errors="replace"))

    def execute(self, command: str, **arguments: Any) -> Any:
        """A QMP command's return value. Underscores in names are hyphens."""
        named = {name.replace("_", "-"): value for name, value in arguments.items()}
        self._socket.sendall(json.dumps({"execute": command, "arguments": named}).encode() + b"\n")
        while line := self._lines.readline():
            answer = json.loads(line)
            if "error" in answer:
                raise ToolFailed(f"{command} {named}: {answer['error']['desc']}")
            if "return" in answer:
                return answer["return"]
        raise ToolFailed(f"QEMU ended during {command}")

    def monitor(self, command: str) -> None:
        """A command of the human monitor."""
        if said := self.execute("human-monitor-command", command_line=command):
            raise ToolFailed(f"{command}: {said}")

    def io(self, command: str) -> None:
        """A qemu-io command on the disk. That it failed comes out at the end, when QEMU gives away what it printed."""
        self.execute("human-monitor-command", command_line=f'qemu-io disk "{command}"')

    def snapshot(self, name: str) -> None:
        self.execute("blockdev-snapshot-internal-sync", device="disk", name=name)

    def delete(self, name: str) -> None:
        self.execute("blockdev-snapshot-delete-internal-sync", device="disk", name=name)

    def resize(self, size: int) -> None:
        self.execute("block_resize", node_name="disk", size=size)


def file_node(path: Path) -> dict[str, Any]:
    return {"driver": "file", "filename": str(path)}
