"""nbdkit as a server that other people run: it can be killed, and started again at the same place."""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from tests.support import require


class Nbdkit:
    """An nbdkit that serves on a socket, and can be killed and started again."""

    def __init__(self, path: Path, *arguments: str) -> None:
        self.uri = f"nbd+unix:///?socket={path}"
        self._path = path
        self._command = [require("nbdkit"), "-f", "-U", str(path), *arguments]
        self.start()

    def start(self) -> None:
        self._path.unlink(missing_ok=True)
        self.process = subprocess.Popen(self._command, stderr=subprocess.DEVNULL)
        for _ in range(200):
            with socket.socket(socket.AF_UNIX) as client, suppress(OSError):
                client.connect(str(self._path))
                return
            time.sleep(0.05)
        raise AssertionError("nbdkit does not start")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


Start = Callable[..., Nbdkit]
