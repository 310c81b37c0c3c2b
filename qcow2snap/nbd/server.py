"""Listening sockets, and a thread for each connection that they accept. What is said on a connection is elsewhere."""

from __future__ import annotations

import fcntl
import ipaddress
import logging
import os
import socket
import stat
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from types import TracebackType
from typing import Self

from qcow2snap.block.node import FileError
from qcow2snap.nbd.connection import Connection
from qcow2snap.nbd.export import Exports
from qcow2snap.nbd.uri import URI

logger = logging.getLogger(__name__)

BACKLOG = 128  # connections that wait to be accepted
STOP_TIMEOUT = 5.0  # seconds that replies in flight get when the server stops


class Listener:
    """A socket that listens, and where that is. Closing it removes what it made in the file system."""

    def __init__(self, sock: socket.socket, uri: URI) -> None:
        self.socket = sock
        self.uri = uri  # of the default export
        self._inode = os.stat(uri.socket).st_ino if uri.socket else 0

    def close(self) -> None:
        if self.uri.socket:
            with suppress(FileNotFoundError):
                if os.stat(self.uri.socket).st_ino == self._inode:  # not another server's, who took our place
                    os.unlink(self.uri.socket)
        with suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)  # wakes the thread in accept(); close() does not
        self.socket.close()


def listen_unix(path: str) -> Listener:
    """Listen at a path. A socket left there by a server that is gone is replaced; one that is listened on is not."""
    path = os.path.abspath(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        directory = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY)
        try:
            # Two servers that find the same stale socket must not each remove the other's new one.
            fcntl.flock(directory, fcntl.LOCK_EX)
            _remove_stale(path)
            sock.bind(path)
            sock.listen(BACKLOG)
            return Listener(sock, URI(socket=path))
        finally:
            os.close(directory)
    except FileError:
        sock.close()
        raise
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        sock.close()
        raise FileError(f"{path}: cannot listen there: {getattr(error, 'strerror', None) or error}") from error


def _remove_stale(path: str) -> None:
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise FileError(f"{path}: cannot listen there: it exists and is not a socket")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except OSError:
            pass  # a full backlog, no permission: somebody is there
    raise FileError(f"{path}: cannot listen there: another server does; stop it, or choose another path")


def listen_tcp(host: str, port: int) -> Listener:
    """Listen at an address or a host's name. Port 0 is any that is free."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        raise FileError(f"{host}: not an address to listen at: {error}") from error
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        raise FileError(f"{host}, port {port}: cannot listen there: {error.strerror or error}") from error
    bound_host, bound_port = sock.getsockname()[:2]
    if ipaddress.ip_address(bound_host).is_unspecified:
        bound_host = socket.gethostname()  # every address of this host: show one that leads here
    return Listener(sock, URI(host=bound_host, port=bound_port))


class Server:
    """Serves exports on listeners, from `start` until `stop`. As a context manager: from entry to exit.

    threads  start() and stop() from one; they return at once, and within `STOP_TIMEOUT` and a moment
    owns     the listeners and all connections; not the exports
    """

    def __init__(
        self,
        exports: Exports,
        listeners: Iterable[Listener],
        *,
        max_connections: int = 512,
        handshake_timeout: float = 10.0,
    ) -> None:
        self.listeners = tuple(listeners)
        self._exports = exports
        self._max_connections = max_connections
        self._handshake_timeout = handshake_timeout
        self._connections: dict[Connection, threading.Thread] = {}
        self._lock = threading.Lock()  # over _connections and _stopping
        self._stopping = False
        self._accepting: list[threading.Thread] = []

    def start(self) -> None:
        for listener in self.listeners:
            thread = threading.Thread(target=self._accept, args=[listener], name="nbd-accept", daemon=True)
            self._accepting.append(thread)
            thread.start()

    def stop(self) -> None:
        """Accept no more; answer what has arrived, for STOP_TIMEOUT at most; then cut off who does not receive it."""
        with self._lock:
            self._stopping = True
            connections = dict(self._connections)
        for listener in self.listeners:
            listener.close()
        for connection in connections:
            connection.stop()
        deadline = time.monotonic() + STOP_TIMEOUT
        for thread in connections.values():
            thread.join(max(0.0, deadline - time.monotonic()))
        for connection, thread in connections.items():
            if thread.is_alive():
                connection.cut_off()
        for thread in [*connections.values(), *self._accepting]:
            thread.join(1)  # what is stuck in the kernel ends with the process

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def _accept(self, listener: Listener) -> None:
        number = 0
        while not self._stopping:
            try:
                sock, address = listener.socket.accept()
            except OSError as error:
                if self._stopping:
                    return
                # Out of descriptors or memory, or a client that was gone before its turn: others may fare better.
                logger.warning("a connection could not be accepted: %s", error)
                time.sleep(0.1)
                continue
            number += 1
            peer = f"client {number} on {listener.uri.socket}" if listener.uri.socket else f"{address[0]}:{address[1]}"
            self._begin(sock, peer)

    def _begin(self, sock: socket.socket, peer: str) -> None:
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        connection = Connection(sock, peer, self._exports, handshake_timeout=self._handshake_timeout)
        thread = threading.Thread(target=self._run, args=[connection], name=f"nbd {peer}", daemon=True)
        with self._lock:
            full = len(self._connections) >= self._max_connections
            if not full and not self._stopping:
                self._connections[connection] = thread
                try:
                    thread.start()
                    return
                except RuntimeError:  # the system gives no more threads
                    del self._connections[connection]
                    full = True
        if full:
            logger.warning("%s: refused: %d connections are all there can be", peer, len(self._connections))
        sock.close()

    def _run(self, connection: Connection) -> None:
        try:
            connection.run()
        finally:
            with self._lock:
                del self._connections[connection]
