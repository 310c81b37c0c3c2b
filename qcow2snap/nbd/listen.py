"""Sockets that listen, and their URIs. Who accepts on them, and what is said then, is elsewhere."""

from __future__ import annotations

import fcntl
import ipaddress
import os
import socket
import stat
from contextlib import suppress
from typing import Any

from qcow2snap.block.node import FileError
from qcow2snap.nbd.uri import URI

BACKLOG = 128  # connections that wait to be accepted


class Listener:
    """A socket that listens, and where that is. Closing it removes what it made in the file system.

    threads  one at a time
    errors   OSError from accept(); BlockingIOError if the client was gone before its turn
    """

    def __init__(self, sock: socket.socket, uri: URI) -> None:
        sock.setblocking(False)
        self.socket = sock
        self.uri = uri  # of the default export
        self._inode = os.stat(uri.socket).st_ino if uri.socket else 0
        self._accepted = 0

    def accept(self) -> tuple[socket.socket, str]:
        """A client that waits, and what the log calls it."""
        sock, address = self.socket.accept()
        self._accepted += 1
        return sock, self._peer(address)

    def _peer(self, address: Any) -> str:
        if self.uri.socket:
            return f"client {self._accepted} on {self.uri.socket}"
        host, port = address[:2]
        return f"[{host}]:{port}" if ":" in str(host) else f"{host}:{port}"

    def close(self) -> None:
        if self.uri.socket:
            with suppress(FileNotFoundError):
                if os.stat(self.uri.socket).st_ino == self._inode:  # not another server's, who took our place
                    os.unlink(self.uri.socket)
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
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)  # IPv4 is another address, for another socket
        sock.bind(address)
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        raise FileError(f"{host}, port {port}: cannot listen there: {error.strerror or error}") from error
    return Listener(sock, _tcp_uri(sock))


def _tcp_uri(sock: socket.socket) -> URI:
    host, port = sock.getsockname()[:2]
    if ipaddress.ip_address(host).is_unspecified:
        host = socket.gethostname()  # every address of this host: show one that leads here
    return URI(host=host, port=port)
