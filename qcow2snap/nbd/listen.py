"""Sockets that listen, and their URIs: Unix, TCP, vsock, and those that systemd or a client passes on.

Who accepts on them, and what is said then, is elsewhere.
"""

from __future__ import annotations

import fcntl
import ipaddress
import os
import socket
import stat
import struct
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

from qcow2snap.block.node import FileError
from qcow2snap.nbd.uri import URI

BACKLOG = 128  # connections that wait to be accepted
FIRST_PASSED = 3  # the first descriptor of socket activation, sd_listen_fds(3)

# linux/vm_sockets.h. Python has them where it was built with that header.
AF_VSOCK = getattr(socket, "AF_VSOCK", 40)
VMADDR_CID_ANY = 0xFFFFFFFF
IOCTL_VM_SOCKETS_GET_LOCAL_CID = 0x7B9


class Listener:
    """A socket that listens, and where that is. Closing it removes what it made in the file system.

    threads  one at a time
    errors   OSError from accept(); BlockingIOError if the client was gone before its turn
    """

    def __init__(self, sock: socket.socket, uri: URI, *, is_ours: bool = True) -> None:
        """`is_ours`: we made its place in the file system, and are to remove it."""
        sock.setblocking(False)
        self.socket = sock
        self.uri = uri  # of the default export
        self._inode = os.stat(uri.socket).st_ino if uri.socket and is_ours else None
        self._accepted = 0

    def accept(self) -> tuple[socket.socket, str]:
        """A client that waits, and what the log calls it."""
        sock, address = self.socket.accept()
        self._accepted += 1
        return sock, self._peer(address)

    def _peer(self, address: Any) -> str:
        if self.socket.family == socket.AF_UNIX:
            return f"client {self._accepted} on {self.uri.socket or 'a socket without a path'}"
        host, port = address[:2]
        if self.socket.family == AF_VSOCK:
            return f"vsock {host}:{port}"
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    def close(self) -> None:
        if self._inode is not None:
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
    """Listen at an address or a host's name, at its first address. Port 0 is any that is free."""
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
    return Listener(sock, _uri(sock))


def listen_vsock(port: int) -> Listener:
    """Listen for virtual machines, and their host, at all addresses of this machine."""
    try:
        sock = socket.socket(AF_VSOCK, socket.SOCK_STREAM)
        try:
            sock.bind((VMADDR_CID_ANY, port))
            sock.listen(BACKLOG)
        except OSError:
            sock.close()
            raise
    except OSError as error:
        raise FileError(f"vsock port {port}: cannot listen there: {error.strerror or error}") from error
    return Listener(sock, _uri(sock))


def listen_at_all(places: Iterable[Callable[[], Listener]]) -> list[Listener]:
    """Listen at all places, or at none."""
    listeners: list[Listener] = []
    try:
        for listen in places:
            listeners.append(listen())
    except BaseException:
        for listener in listeners:
            listener.close()
        raise
    return listeners


def passed_listeners() -> list[Listener]:
    """Those that come by socket activation, as sd_listen_fds(3) has it; none if this process was not started so."""
    count = os.environ.pop("LISTEN_FDS", "")
    if os.environ.pop("LISTEN_PID", "") != str(os.getpid()) or not count.isdecimal():
        return []
    os.environ.pop("LISTEN_FDNAMES", None)
    return [_passed(descriptor) for descriptor in range(FIRST_PASSED, FIRST_PASSED + min(int(count), 1 << 10))]


def _passed(descriptor: int) -> Listener:
    try:
        os.set_inheritable(descriptor, False)
        sock = socket.socket(fileno=descriptor)
        if sock.type == socket.SOCK_STREAM and sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            return Listener(sock, _uri(sock), is_ours=False)
    except OSError as error:
        raise FileError(f"socket activation: descriptor {descriptor} is no socket: {error.strerror}") from error
    raise FileError(
        f"socket activation: descriptor {descriptor} is not a stream socket that listens; with Accept=yes in the "
        f"systemd unit, use --stdio and StandardInput=socket"
    )


def _uri(sock: socket.socket) -> URI:
    """Where a socket that listens can be reached, as far as a URI can say it."""
    address = sock.getsockname()
    if sock.family == socket.AF_UNIX:
        is_path = isinstance(address, str) and os.path.exists(address)  # not so in the abstract namespace
        return URI(socket=os.path.abspath(address)) if is_path else URI()
    host, port = address[:2]
    if sock.family == AF_VSOCK:
        return URI(cid=_local_cid() if host == VMADDR_CID_ANY else host, port=port)
    if ipaddress.ip_address(host).is_unspecified:
        host = socket.gethostname()  # every address of this host: show one that leads here
    return URI(host=host, port=port)


def _local_cid() -> int:
    """The vsock address of this machine. Guests reach their host at 2 in any case, so that is it where nobody says."""
    with suppress(OSError), open("/dev/vsock", "rb") as device:
        (cid,) = struct.unpack("I", fcntl.ioctl(device, IOCTL_VM_SOCKETS_GET_LOCAL_CID, bytes(4)))
        if cid != VMADDR_CID_ANY:
            return int(cid)
    return 2
