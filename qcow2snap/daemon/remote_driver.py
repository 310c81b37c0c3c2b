"""The driver `nbd` of the graph: another server's export. The node itself is nbd/remote_node.py's."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from qcow2snap.block.blockdev.drivers import Driver
from qcow2snap.block.blockdev.options import UINT32
from qcow2snap.block.node import BlockNode, NBDError, ReadOnly, UnsupportedFeature
from qcow2snap.daemon.numbers import read_number
from qcow2snap.daemon.objects import Objects
from qcow2snap.nbd.remote_node import RemoteNode
from qcow2snap.nbd.uri import URI

if TYPE_CHECKING:
    from qcow2snap.block.blockdev.edges import NamedNode
    from qcow2snap.block.blockdev.named_nodes import Graph

RETRY_DELAY = 0.2  # seconds between two tries to connect within open-timeout


class RemoteDriver(Driver):
    def __init__(self, objects: Objects) -> None:
        self._objects = objects

    def open(self, node: NamedNode, graph: Graph) -> BlockNode:
        options = node.options
        where = self._uri(options)
        deadline = time.monotonic() + options.get("open-timeout", 0)
        while True:
            try:
                return self._connect(node, where)
            except NBDError as error:
                if time.monotonic() >= deadline:
                    raise NBDError(f"{error}") from None
            time.sleep(RETRY_DELAY)

    def _connect(self, node: NamedNode, where: URI) -> RemoteNode:
        delay = float(node.options.get("reconnect-delay", 0))
        if node.read_only:
            return RemoteNode(where, writable=False, reconnect_delay=delay)
        try:
            return RemoteNode(where, writable=True, reconnect_delay=delay)
        except ReadOnly:
            if not node.options.get("auto-read-only"):
                raise ReadOnly("request on write denied without write permission: the export is read-only") from None
        return RemoteNode(where, writable=False, reconnect_delay=delay)

    def _uri(self, options: dict[str, Any]) -> URI:
        server, name = options["server"], options.get("export", "")
        if server["type"] == "unix" and not server.get("abstract"):
            where = URI(name, socket=server["path"])
        elif server["type"] == "inet":
            where = URI(name, host=server["host"], port=read_number(server["port"], "port"))
        elif server["type"] == "vsock":
            cid = read_number(server["cid"], "address of vsock", UINT32)
            where = URI(name, cid=cid, port=read_number(server["port"], "port of vsock", UINT32))
        else:
            raise UnsupportedFeature("a server is reached by unix (not abstract), inet or vsock")
        if "tls-creds" not in options:
            return where
        credentials = self._objects.credentials(options["tls-creds"], server=False)
        return where._replace(tls=True, tls_parameters=credentials.parameters(options.get("tls-hostname", "")))
