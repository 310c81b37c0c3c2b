"""The commands of QMP by name: which arguments each takes, and what of the daemon it calls. The work is done there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from qcow2snap.block.blockdev.options import BLOCKDEV_OPTIONS
from qcow2snap.block.blockdev.qapi import Boolean, Enum, ListOf, String, Struct, Union, optional
from qcow2snap.daemon import internal_snapshots, queries
from qcow2snap.daemon.exports import EXPORT_OPTIONS, SERVER_ADD_OPTIONS
from qcow2snap.daemon.nbd_server import SERVER_START_OPTIONS
from qcow2snap.daemon.objects import OBJECT_OPTIONS
from qcow2snap.daemon.qmp import VERSION, CommandFailed, ErrorClass

if TYPE_CHECKING:
    from qcow2snap.daemon.daemon import Daemon

_MODE = Enum("safe", "hard")


class Command(NamedTuple):
    """What a command takes, and what carries it out; that gives what the command returns, None for {}."""

    arguments: Struct
    run: Callable[[Daemon, dict[str, Any]], Any]


def execute(daemon: Daemon, name: str, arguments: Mapping[str, Any]) -> Any:
    command = _COMMANDS.get(name)
    if command is None:
        raise CommandFailed(ErrorClass.COMMAND_NOT_FOUND, f"The command {name[:200]} has not been found")
    returned = command.run(daemon, command.arguments.read(dict(arguments), "", strings=False))
    return {} if returned is None else returned


def _add_to_server(daemon: Daemon, arguments: dict[str, Any]) -> None:
    options = {name: value for name, value in arguments.items() if name != "device"}
    name = options.setdefault("name", arguments["device"])
    daemon.graph.get(arguments["device"], device=arguments["device"])
    daemon.add_export({"type": "nbd", "id": name, "node-name": arguments["device"], **options})


def _replace(daemon: Daemon, arguments: dict[str, Any]) -> None:
    new = arguments["new-child"]
    if arguments["parent-type"] == "driver":
        daemon.graph.replace_child(arguments["node-name"], arguments["child"], new)
    else:
        daemon.graph.replace_root(daemon.exports.get(arguments["export-id"]).root, new)


def _commands() -> dict[str, Command]:
    nothing = Struct({})
    node = Struct({"node-name": String()})
    deletion = optional(mode=_MODE)
    replacement = Union(
        {"new-child": String()},
        "parent-type",
        {"driver": Struct({"node-name": String(), "child": String()}), "export": Struct({"export-id": String()})},
    )
    return {
        "blockdev-add": Command(BLOCKDEV_OPTIONS, lambda d, a: _nothing(d.graph.add(a))),
        "blockdev-del": Command(node, lambda d, a: d.graph.delete(a["node-name"])),
        "blockdev-reopen": Command(
            Struct({"options": ListOf(BLOCKDEV_OPTIONS)}), lambda d, a: d.graph.reopen(a["options"])
        ),
        "blockdev-replace": Command(replacement, _replace),
        "blockdev-snapshot-internal-sync": Command(
            internal_snapshots.CREATE_OPTIONS, lambda d, a: internal_snapshots.create(d.graph, a)
        ),
        "blockdev-snapshot-delete-internal-sync": Command(
            internal_snapshots.DELETE_OPTIONS, lambda d, a: internal_snapshots.delete(d.graph, a)
        ),
        "block-export-add": Command(EXPORT_OPTIONS, lambda d, a: d.add_export(a)),
        "block-export-del": Command(
            Struct({"id": String(), **deletion}), lambda d, a: d.exports.delete(a["id"], hard=a.get("mode") == "hard")
        ),
        "nbd-server-start": Command(SERVER_START_OPTIONS, lambda d, a: d.server.start(a)),
        "nbd-server-add": Command(SERVER_ADD_OPTIONS, _add_to_server),
        "nbd-server-remove": Command(
            Struct({"name": String(), **deletion}),
            lambda d, a: d.exports.delete(a["name"], hard=a.get("mode") == "hard"),
        ),
        "nbd-server-stop": Command(nothing, lambda d, a: d.stop_server()),
        "object-add": Command(OBJECT_OPTIONS, lambda d, a: d.objects.add(a)),
        "object-del": Command(Struct({"id": String()}), lambda d, a: d.objects.remove(a["id"])),
        "query-block-exports": Command(nothing, lambda d, a: queries.exports(d.exports)),
        "query-named-block-nodes": Command(
            Struct(optional(flat=Boolean())), lambda d, a: queries.nodes(d.graph, flat=a.get("flat", False))
        ),
        "x-debug-query-block-graph": Command(nothing, lambda d, a: queries.block_graph(d.graph)),
        "query-snapshots": Command(node, lambda d, a: queries.snapshots(d.graph.get(a["node-name"]))),
        "query-version": Command(nothing, lambda d, a: VERSION),
        "query-status": Command(nothing, lambda d, a: {"status": "running", "running": True, "singlestep": False}),
        "query-commands": Command(nothing, lambda d, a: [{"name": name} for name in (*_COMMANDS, "qmp_capabilities")]),
        "quit": Command(nothing, lambda d, a: d.quit()),
    }


def _nothing(made: object) -> None:
    """What was made is not told."""


_COMMANDS = _commands()
