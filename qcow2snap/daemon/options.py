"""The command line of the daemon, taken in order: what an option needs has to be made by one before it.

Options and their meanings are qemu-storage-daemon's, `--allow-path` and `--verbose` are ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from getopt import GetoptError, gnu_getopt
from typing import NamedTuple

from qcow2snap.block.blockdev.options import BLOCKDEV_OPTIONS, parse_argument
from qcow2snap.block.blockdev.qapi import Boolean, Enum, String, Struct, optional
from qcow2snap.block.node import InvalidOption, Qcow2SnapError, UnsupportedFeature
from qcow2snap.daemon.chardev import parse_chardev
from qcow2snap.daemon.daemon import Daemon
from qcow2snap.daemon.exports import EXPORT_OPTIONS
from qcow2snap.daemon.nbd_server import SERVER_OPTIONS
from qcow2snap.daemon.objects import OBJECT_OPTIONS

HELP = """\
Usage: qcow2snap daemon [OPTIONS]

  Export a graph of block nodes over NBD, and change it by QMP: the options and commands of
  qemu-storage-daemon, for what there is here. Options are carried out in order.

  --blockdev [driver=]DRIVER,node-name=NAME[,OPTION=VALUE...]   or JSON
        Make a node. Drivers: file, host_device, raw, qcow2, nbd, copy-before-write,
        snapshot-access, null-co. Of all: read-only, auto-read-only, force-share, discard,
        detect-zeroes, cache.direct, cache.no-flush.
        snapshot-access,file=NODE,snapshot=REF is one snapshot of the qcow2 image NODE.
  --nbd-server addr.type=unix,addr.path=PATH[,tls-creds=ID][,max-connections=N]
  --nbd-server addr.type=inet,addr.host=HOST,addr.port=PORT[,...]
        Serve exports there.
  --export [type=]nbd,id=ID,node-name=NODE[,name=NAME][,description=TEXT][,writable=on|off]
           [,bitmaps.0=BITMAP...]
        Export a node.
  --object tls-creds-x509|tls-creds-psk|secret,id=ID[,dir=DIR][,endpoint=server|client][,...]
  --chardev socket,id=ID,path=PATH,server=on,wait=off    (also host=, port=)
  --chardev stdio,id=ID
  --monitor [chardev=]ID[,pretty=on|off]
        Speak QMP there, with any number of clients.
  --allow-path DIR
        Follow backing and data files of images that are in this directory. Comes before --blockdev.
  --daemonize      Go to the background when all of this has been done.
  --pidfile PATH   Write the process id there then.
  -v, --verbose    Log who connects, what they read and how much.
  -V, --version    Show the version and exit.
  -h, --help       Show this message and exit.
"""

_MONITOR_OPTIONS = Struct(
    {"chardev": String(), **optional(id=String(), mode=Enum("control", "readline"), pretty=Boolean())}
)
_FLAGS = ("daemonize", "verbose", "version", "help")
_WITH_VALUE = ("blockdev", "nbd-server", "export", "object", "chardev", "monitor", "allow-path", "pidfile", "trace")


class Usage(Exception):
    """The command line is not made of the options that there are."""


class Arguments(NamedTuple):
    """Options in order, and those of them whose place does not matter."""

    ordered: list[tuple[str, str]]
    flags: frozenset[str]
    allow_paths: list[str]
    pidfile: str | None


def parse(words: Iterable[str]) -> Arguments:
    """The words of a command line. Usage if they are none."""
    long = [*_FLAGS, *(f"{name}=" for name in _WITH_VALUE)]
    try:
        options, rest = gnu_getopt([*words], "hvVT:", long)
    except GetoptError as error:
        raise Usage(error.msg) from None
    if rest:
        raise Usage(f"{rest[0]}: Unexpected argument")
    full = {"-h": "--help", "-v": "--verbose", "-V": "--version", "-T": "--trace"}
    named = [(full.get(name, name).removeprefix("--"), value) for name, value in options]
    pidfiles = [value for name, value in named if name == "pidfile"]
    return Arguments(
        [(name, value) for name, value in named if name in _STEPS or name == "trace"],
        frozenset(name for name, _ in named if name in _FLAGS),
        [value for name, value in named if name == "allow-path"],
        pidfiles[-1] if pidfiles else None,
    )


def carry_out(daemon: Daemon, ordered: Iterable[tuple[str, str]]) -> None:
    """Do what the options say, in their order. An error begins with the option that it comes from."""
    for name, value in ordered:
        try:
            if name == "trace":
                raise UnsupportedFeature("there is no tracing here; --verbose logs what clients do")
            if value.partition(",")[0] == "help" or value.endswith(",help"):
                raise InvalidOption("Help is not available for this option")
            _STEPS[name](daemon, value)
        except Qcow2SnapError as error:
            raise Qcow2SnapError(f"--{name} {value[:1000]}: {error}") from error


_STEPS: dict[str, Callable[[Daemon, str], object]] = {
    "blockdev": lambda daemon, value: daemon.graph.add(parse_argument(value, BLOCKDEV_OPTIONS, "driver")),
    "nbd-server": lambda daemon, value: daemon.server.start(parse_argument(value, SERVER_OPTIONS)),
    "export": lambda daemon, value: daemon.add_export(parse_argument(value, EXPORT_OPTIONS, "type")),
    "object": lambda daemon, value: daemon.objects.add(parse_argument(value, OBJECT_OPTIONS, "qom-type")),
    "chardev": lambda daemon, value: daemon.add_chardev(parse_chardev(value)),
    "monitor": lambda daemon, value: daemon.add_monitor(parse_argument(value, _MONITOR_OPTIONS, "chardev")),
}
