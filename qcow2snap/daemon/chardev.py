"""Character devices, where QMP's clients come from: sockets, to listen on or connect by, and standard input and output.

Bytes come and go here, in the daemon's loop, and nothing waits for a slow client; what they mean is `qmp`'s.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from qcow2snap.block.blockdev.keyval import parse_keyval
from qcow2snap.block.blockdev.qapi import Boolean, String, Struct, Union, optional
from qcow2snap.block.node import FileError, InvalidOption
from qcow2snap.daemon.loop import Loop
from qcow2snap.daemon.numbers import read_number
from qcow2snap.daemon.qmp import Execute, QMPSession
from qcow2snap.nbd.listen import Listener, listen_tcp, listen_unix

logger = logging.getLogger(__name__)

MAX_CLIENTS = 64  # of one device; those beyond wait
MAX_OUTPUT = 16 << 20  # bytes that a client has not taken yet; one that lets more come is cut off
ENOUGH_OUTPUT = 1 << 16  # bytes; a client that has not taken so many is not heard
RECEIVE = 1 << 16  # bytes at a time
CONNECT_TIMEOUT = 10.0  # seconds

CHARDEV_OPTIONS = Union(
    {"id": String()},
    "backend",
    {
        "socket": Struct(
            optional(
                path=String(), host=String(), port=String(), server=Boolean(), wait=Boolean(), fd=String(),
                reconnect=String(), ipv4=Boolean(), ipv6=Boolean(), nodelay=Boolean(), delay=Boolean(),
            )
        ),
        "stdio": Struct(optional(signal=Boolean(), mux=Boolean())),
    },
)  # fmt: skip


def parse_chardev(text: str) -> dict[str, Any]:
    """Options of --chardev, which has an older syntax: `server` for server=on, `nowait` for wait=off."""
    words = [_SHORT.get(word, word) for word in text.split(",")]
    result: dict[str, Any] = parse_keyval(",".join(words), "backend")
    if "id" not in result:
        raise InvalidOption("chardev: no id specified")
    if result.get("backend") not in ("socket", "stdio"):
        name = str(result.get("backend"))[:200]
        raise InvalidOption(f"'{name}' is not a valid char driver name; socket and stdio are")
    options: dict[str, Any] = CHARDEV_OPTIONS.read(result, "", strings=True)
    return options


_SHORT = {"server": "server=on", "noserver": "server=off", "wait": "wait=on", "nowait": "wait=off"}


class Chardev(ABC):
    """A device, and those who speak on it once it is a monitor."""

    is_used = False

    def __init__(self, loop: Loop) -> None:
        self._loop = loop

    @abstractmethod
    def serve(self, execute: Execute, *, pretty: bool) -> None:
        """Have QMP spoken with whoever is there, or comes."""

    def event(self, name: str, data: Mapping[str, Any]) -> None:
        """Tell all of them."""

    def close(self) -> None:
        """Give them what they are still to get, if they take it at once, and end."""


class Client:
    """One client's bytes, in and out."""

    def __init__(
        self, loop: Loop, descriptors: tuple[int, int], execute: Execute, gone: Callable[[Client], None], pretty: bool
    ) -> None:
        """`descriptors`: to read, and to write. Both are the client's, who closes them, in `gone`."""
        self._loop = loop
        self._input, self._output = descriptors
        self._gone = gone
        self._is_gone = False
        self._pending = bytearray()
        for descriptor in descriptors:
            os.set_blocking(descriptor, False)
        loop.on_read(self._input, self._receive)
        self.session = QMPSession(execute, self._send, pretty=pretty)

    def end(self) -> None:
        if not self._is_gone:
            self._flush()
        if not self._is_gone:
            self._is_gone = True
            self._loop.on_read(self._input, None)
            self._loop.on_write(self._output, None)
            self._gone(self)

    def _receive(self) -> None:
        try:
            data = os.read(self._input, RECEIVE)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.end()
            return
        self.session.receive(data)

    def _send(self, data: bytes) -> None:
        if self._is_gone:
            return
        self._pending += data
        self._flush()
        if len(self._pending) > MAX_OUTPUT:
            logger.warning("a QMP client takes no answers: cut off")
            self._pending.clear()
            self.end()

    def _flush(self) -> None:
        try:
            while self._pending:
                count = os.write(self._output, self._pending)
                del self._pending[:count]
        except BlockingIOError:
            pass
        except OSError:
            self._pending.clear()  # nobody is there; what is read next says so
        if not self._is_gone:
            self._loop.on_write(self._output, self._flush if self._pending else None)
            self._loop.on_read(self._input, self._receive if len(self._pending) < ENOUGH_OUTPUT else None)


class SocketChardev(Chardev):
    """A socket that listens, for any number of clients, or one that is connected to a listener."""

    def __init__(self, options: Mapping[str, Any], loop: Loop) -> None:
        """With server=on and without wait=off, only when the first client is there, or the loop is stopped."""
        super().__init__(loop)
        self._listener: Listener | None = None
        self._first: list[socket.socket] = []  # who is there before anybody speaks with them
        self._clients: dict[Client, socket.socket] = {}
        self._start: Callable[[socket.socket], None] | None = None
        if "path" in options:
            where: tuple[str, ...] = (options["path"],)
        elif "host" in options and "port" in options:
            where = (options["host"], options["port"])
        else:
            raise InvalidOption("chardev: socket: give a path, or host and port")
        if options.get("server", False):
            self._listener = (
                listen_unix(*where) if len(where) == 1 else listen_tcp(where[0], read_number(where[1], "port"))
            )
            if options.get("wait", True):
                print(f"qcow2snap: waiting for a client on {', '.join(where)}", file=sys.stderr, flush=True)
                self._wait()
        else:
            self._first.append(_connect(where))

    def _wait(self) -> None:
        self._start = self._first.append
        self._watch()
        while not self._first and not self._loop.is_stopping:
            self._loop.turn()
        assert self._listener is not None
        self._loop.on_read(self._listener.socket.fileno(), None)  # the others, when somebody speaks with them

    def serve(self, execute: Execute, *, pretty: bool) -> None:
        def start(sock: socket.socket) -> None:
            descriptor = sock.fileno()
            client = Client(self._loop, (descriptor, descriptor), execute, self._gone, pretty)
            self._clients[client] = sock
            self._watch()

        self._start = start
        first, self._first = self._first, []
        for sock in first:
            start(sock)
        self._watch()

    def event(self, name: str, data: Mapping[str, Any]) -> None:
        for client in [*self._clients]:
            client.session.event(name, data)

    def close(self) -> None:
        for client in [*self._clients]:
            client.end()
        if self._listener is not None:
            self._loop.on_read(self._listener.socket.fileno(), None)
            self._listener.close()
        for sock in self._first:
            sock.close()

    def _watch(self) -> None:
        if self._listener is not None:
            is_full = len(self._clients) >= MAX_CLIENTS
            self._loop.on_read(self._listener.socket.fileno(), None if is_full else self._accept)

    def _accept(self) -> None:
        assert self._listener is not None
        assert self._start is not None
        try:
            sock, _ = self._listener.accept()
        except OSError as error:
            logger.warning("a QMP client could not be accepted: %s", error)
            return
        self._start(sock)

    def _gone(self, client: Client) -> None:
        self._clients.pop(client).close()
        self._watch()


class StdioChardev(Chardev):
    """Standard input and output. When the input ends, that client has gone, and the daemon goes on."""

    _client: Client | None = None

    def serve(self, execute: Execute, *, pretty: bool) -> None:
        self._client = Client(self._loop, (0, 1), execute, self._gone, pretty)

    def event(self, name: str, data: Mapping[str, Any]) -> None:
        if self._client is not None:
            self._client.session.event(name, data)

    def close(self) -> None:
        if self._client is not None:
            self._client.end()

    def _gone(self, client: Client) -> None:
        self._client = None
        for descriptor in (0, 1):
            with suppress(OSError):
                os.set_blocking(descriptor, True)  # others may have it, too


def make_chardev(options: Mapping[str, Any], loop: Loop) -> Chardev:
    return StdioChardev(loop) if options["backend"] == "stdio" else SocketChardev(options, loop)


def _connect(where: tuple[str, ...]) -> socket.socket:
    try:
        if len(where) == 2:
            return socket.create_connection((where[0], read_number(where[1], "port")), CONNECT_TIMEOUT)
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(CONNECT_TIMEOUT)
        sock.connect(where[0])
    except (OSError, UnicodeError) as error:  # UnicodeError: no name of a host
        reason = getattr(error, "strerror", None) or error
        raise FileError(f"Failed to connect to '{':'.join(where)}': {reason}") from None
    return sock
