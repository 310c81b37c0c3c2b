"""The daemon as a whole: what there is, and what options and commands do to it. Each part knows its own business."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from qcow2snap.block.blockdev.drivers import all_drivers
from qcow2snap.block.blockdev.named_nodes import Graph
from qcow2snap.block.graph import OpenOptions
from qcow2snap.block.node import InvalidOption, Qcow2SnapError
from qcow2snap.daemon.chardev import Chardev, make_chardev
from qcow2snap.daemon.commands import execute
from qcow2snap.daemon.exports import BlockExports
from qcow2snap.daemon.loop import Loop
from qcow2snap.daemon.nbd_server import NBDServer
from qcow2snap.daemon.objects import Objects
from qcow2snap.daemon.remote_driver import RemoteDriver


class Daemon:
    """A graph, its exports, a server for them, and monitors.

    threads  one, which is the loop's
    errors   Qcow2SnapError; what failed has changed nothing
    owns     all of it, until close()
    """

    def __init__(self, opening: OpenOptions = OpenOptions()) -> None:  # noqa: B008
        self.loop = Loop()
        self.objects = Objects()
        self.graph = Graph({**all_drivers(opening), "nbd": RemoteDriver(self.objects)})
        self.exports = BlockExports(self.graph, self.loop.call_soon, self.event)
        self.server = NBDServer(self.exports.live, self.objects)
        self._chardevs: dict[str, Chardev] = {}

    def add_export(self, options: Mapping[str, Any]) -> None:
        self.exports.add(options, is_served=self.server.is_running)

    def stop_server(self) -> None:
        """With all exports, whoever uses them."""
        self.server.check_running()
        self.exports.delete_all()
        self.server.stop()

    def add_chardev(self, options: Mapping[str, Any]) -> None:
        name = options["id"]
        if name in self._chardevs:
            raise InvalidOption(f"Chardev with id '{name}' already exists")
        self._chardevs[name] = make_chardev(options, self.loop)

    def add_monitor(self, options: Mapping[str, Any]) -> None:
        """Speak QMP on a character device."""
        name = options["chardev"]
        chardev = self._chardevs.get(name)
        if chardev is None:
            raise InvalidOption(f'chardev "{name}" not found')
        if options.get("mode", "control") != "control":
            raise InvalidOption("Only QMP is supported")
        if chardev.is_used:
            raise InvalidOption(f"chardev '{name}' is already in use")
        chardev.is_used = True
        chardev.serve(self._execute, pretty=options.get("pretty", False))

    def event(self, name: str, data: Mapping[str, Any]) -> None:
        """Tell every monitor's clients."""
        for chardev in self._chardevs.values():
            chardev.event(name, data)

    def quit(self) -> None:
        """End when this command has been answered."""
        self.loop.stop()

    def run(self) -> None:
        """Until a signal, or the command `quit`."""
        self.server.accept()
        self.loop.run()

    def close(self) -> None:
        with suppress(Qcow2SnapError):
            self.stop_server()
        for chardev in self._chardevs.values():
            chardev.close()
        self.graph.close()

    def _execute(self, command: str, arguments: Mapping[str, Any]) -> Any:
        return execute(self, command, arguments)
