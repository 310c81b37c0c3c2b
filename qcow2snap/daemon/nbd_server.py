"""The one NBD server of a daemon: where it listens, and with which credentials. Its exports are `exports`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qcow2snap.block.blockdev.options import SOCKET_ADDRESS, UINT32
from qcow2snap.block.blockdev.qapi import Integer, String, Struct, Type, Union, optional
from qcow2snap.block.node import FileError, NBDError, UnsupportedFeature
from qcow2snap.daemon.numbers import read_number
from qcow2snap.daemon.objects import Objects
from qcow2snap.nbd.export import Exports
from qcow2snap.nbd.listen import Listener, listen_tcp, listen_unix, listen_vsock
from qcow2snap.nbd.negotiation import TLSMode
from qcow2snap.nbd.server import Server
from qcow2snap.nbd.service import allow_connections

MAX_CONNECTIONS = 100  # unless told otherwise, as in QEMU since 9.1
UNLIMITED = 1 << 14  # what 0 comes to

_MEMBERS: dict[str, Type] = optional(
    tls_creds=String(), max_connections=Integer(0, UINT32), handshake_max_seconds=Integer(0, UINT32)
)
SERVER_OPTIONS = Struct({"addr": SOCKET_ADDRESS, **_MEMBERS})
# QMP says addresses in an older way.
SERVER_START_OPTIONS = Struct(
    {
        "addr": Union(
            {},
            "type",
            {
                "unix": Struct({"data": Struct({"path": String()})}),
                "inet": Struct({"data": Struct({"host": String(), "port": String()})}),
                "vsock": Struct({"data": Struct({"cid": String(), "port": String()})}),
                "fd": Struct({"data": Struct({"str": String()})}),
            },
        ),
        **_MEMBERS,
    }
)


class NBDServer:
    """Serves exports while it runs; there is one at a time.

    It listens from start() on, but takes nobody before accept(): who connects while the command line is being carried
    out waits, and finds the exports that it makes. So it is in QEMU, whose loop accepts.

    threads  one, the daemon's
    owns     the server and its sockets
    """

    def __init__(self, exports: Exports, objects: Objects) -> None:
        self._exports = exports
        self._objects = objects
        self._server: Server | None = None
        self._is_accepting = False

    @property
    def is_running(self) -> bool:
        return self._server is not None

    def start(self, options: Mapping[str, Any]) -> None:
        """By options of SERVER_OPTIONS, or of SERVER_START_OPTIONS."""
        if self._server is not None:
            raise NBDError("NBD server already running")
        secure, mode = None, TLSMode.OFF
        if "tls-creds" in options:
            secure = self._objects.credentials(options["tls-creds"], server=True).read()
            mode = TLSMode.REQUIRE
        address = options["addr"]
        listener = _listen({**address, **address.get("data", {})})
        most = options.get("max-connections", MAX_CONNECTIONS) or UNLIMITED
        allow_connections(most)
        self._server = Server(
            self._exports,
            [listener],
            max_connections=most,
            handshake_timeout=options.get("handshake-max-seconds", 10) or float(UINT32),
            tls=mode,
            secure=secure,
            lets_wait=True,
        )
        if self._is_accepting:
            self._server.start()

    def accept(self) -> None:
        """Take clients from now on, whenever it runs."""
        self._is_accepting = True
        if self._server is not None:
            self._server.start()

    def stop(self) -> None:
        """Cut off all clients, and listen no more."""
        self.check_running()
        server, self._server = self._server, None
        if server is not None:
            server.stop()

    def check_running(self) -> None:
        if self._server is None:
            raise NBDError("NBD server not running")


def _listen(address: Mapping[str, Any]) -> Listener:
    kind = address["type"]
    if kind == "unix" and not address.get("abstract"):
        try:
            return listen_unix(address["path"])
        except FileError as error:
            raise FileError(f"Failed to bind socket to {address['path']}: {str(error).rpartition(': ')[2]}") from None
    if kind == "inet":
        return listen_tcp(address["host"], read_number(address["port"], "port"))
    if kind == "vsock":
        return listen_vsock(read_number(address["port"], "port of vsock", UINT32))
    raise UnsupportedFeature("an address is of type unix (not abstract), inet or vsock")
