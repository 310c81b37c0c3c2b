"""`qcow2snap serve`: all snapshots of one image or several over NBD, each an export under its name."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, TypeVar

import click

from formats.nbd import NBD_PORT
from qcow2snap.block.graph import OpenOptions, open_raw
from qcow2snap.block.node import SnapshotAccess
from qcow2snap.block.qcow2.driver import Qcow2Node
from qcow2snap.block.raw import RawNode
from qcow2snap.cli import options
from qcow2snap.nbd.export import Exports, exports_of, joined, prefix_of
from qcow2snap.nbd.listen import Listener, listen_at_all, listen_tcp, listen_unix, listen_vsock, passed_listeners
from qcow2snap.nbd.log import LogHandler
from qcow2snap.nbd.negotiation import TLSMode
from qcow2snap.nbd.server import Server
from qcow2snap.nbd.service import Offer, Service, pid_file, signals_held, stop_with_parent
from qcow2snap.nbd.uri import URI

F = TypeVar("F", bound=Callable[..., Any])

# Bytes of URIs that are printed at most: half of what a pipe holds, so that nobody has to read for us to go on.
_MAX_URIS = 1 << 15

_LOOPBACK = "127.0.0.1"

_SECTIONS = {
    "Where to listen": ("sockets", "hosts", "ports", "vsock", "stdio"),
    "What to export": (
        "snapshot",
        "prefixes",
        "image_format",
        "writable",
        "force_share",
        "allow_paths",
        "l2_cache_size",
    ),
    "TLS": ("tls", "tls_certificates", "tls_verify_peer", "tls_psk"),
    "Clients": ("workers", "max_connections", "handshake_timeout"),
    "Running": ("once", "refresh", "exit_with_parent", "pid_path", "verbose"),
}


class _Sectioned(click.Command):
    """A command whose help has its many options in sections."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sectioned = {name for names in _SECTIONS.values() for name in names}
        others = {parameter.name for parameter in self.get_params(ctx)} - sectioned - {"images"}
        for title, names in {**_SECTIONS, "Other options": others}.items():
            parameters = [each for each in self.get_params(ctx) if each.name in names]
            records = [record for each in parameters if (record := each.get_help_record(ctx))]
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)


def _listening_options(function: F) -> F:
    several: dict[str, Any] = {"multiple": True}
    for option in reversed([
        click.option("-k", "--socket", "sockets", metavar="PATH", help="A Unix socket. Repeatable.", **several),
        click.option("-b", "--bind", "hosts", metavar="ADDR", **several,
                     help=f"A TCP address, IPv4 or IPv6, or a host's name. Repeatable.  [default: {_LOOPBACK}]"),
        click.option("-p", "--port", "ports", type=click.IntRange(0, 65535), metavar="PORT", **several,
                     help=f"Its port; 0: any that is free. Repeatable, in order of the addresses; one goes with all "
                          f"addresses, and one address with all ports.  [default: {NBD_PORT}]"),
        click.option("--vsock", is_flag=True,
                     help="vsock, for virtual machines and their host, on the ports of -p; TCP only with -b then."),
        click.option("--stdio", is_flag=True,
                     help="Standard input and output are the one client: for inetd, systemd and ssh."),
    ]):  # fmt: skip
        function = option(function)
    return function


def _client_options(function: F) -> F:
    for option in reversed([
        click.option("--workers", type=click.IntRange(0, 256), metavar="N",
                     help="Processes that serve; 0, 1 or --writable: threads of this one.  [default: one a processor]"),
        click.option("--max-connections", type=click.IntRange(1), default=512, show_default=True, metavar="N",
                     help="Refuse more clients than that at a time."),
        click.option("--handshake-timeout", type=click.FloatRange(0, min_open=True), default=10.0, show_default=True,
                     metavar="SECONDS", help="Cut off a client that has chosen no export by then."),
    ]):  # fmt: skip
        function = option(function)
    return function


def _tls_options(function: F) -> F:
    for option in reversed([
        click.option("--tls", type=click.Choice([mode.value for mode in TLSMode]), default="off", show_default=True,
                     help="Whether clients may (on), must (require) or cannot speak by TLS."),
        click.option("--tls-certificates", metavar="DIR",
                     help="With server-cert.pem and server-key.pem, and ca-cert.pem for --tls-verify-peer."),
        click.option("--tls-verify-peer", is_flag=True,
                     help="Serve only clients with a certificate that ca-cert.pem has signed."),
        click.option("--tls-psk", metavar="FILE",
                     help="Pre-shared keys, lines USERNAME:HEXKEY as psktool writes them (Python 3.13 or later)."),
    ]):  # fmt: skip
        function = option(function)
    return function


def _running_options(function: F) -> F:
    for option in reversed([
        click.option("--once", is_flag=True,
                     help="End when the first clients that chose an export have left, as qemu-nbd does without -t."),
        click.option("--refresh", type=click.FloatRange(0.1), metavar="SECONDS",
                     help="Look for new snapshots so often, and offer them as after SIGHUP."),
        click.option("--exit-with-parent", is_flag=True, help="End when the process that started this one does."),
        click.option("--pid-file", "pid_path", metavar="FILE", help="Write the process id there when ready."),
        click.option("-v", "--verbose", is_flag=True, help="A line on standard error for every connection."),
    ]):  # fmt: skip
        function = option(function)
    return function


@click.command("serve", cls=_Sectioned)
@click.argument("images", metavar="IMAGE...", nargs=-1, required=True)
@_listening_options
@options.snapshot_option
@click.option("--prefix", "prefixes", metavar="NAME", multiple=True,
              help="Begin the exports' names with NAME/; once for each IMAGE, in their order.")  # fmt: skip
@click.option("-f", "--format", "image_format", type=click.Choice(["qcow2", "raw"]), default="qcow2",
              help="What each IMAGE is; it is not guessed.  [default: qcow2]")  # fmt: skip
@click.option("--writable", is_flag=True, help="Let clients write IMAGE, which has to be raw: -f raw.")
@options.opening_options
@_tls_options
@_client_options
@_running_options
def command(
    images: tuple[str, ...],
    sockets: tuple[str, ...],
    hosts: tuple[str, ...],
    ports: tuple[int, ...],
    vsock: bool,
    stdio: bool,
    snapshot: str | None,
    prefixes: tuple[str, ...],
    image_format: str,
    writable: bool,
    opening: OpenOptions,
    tls: str,
    tls_certificates: str | None,
    tls_verify_peer: bool,
    tls_psk: str | None,
    workers: int | None,
    max_connections: int,
    handshake_timeout: float,
    once: bool,
    refresh: float | None,
    exit_with_parent: bool,
    pid_path: str | None,
    verbose: bool,
) -> None:
    """Export the snapshots of each IMAGE over NBD, read-only; or raw images, which may be written.

    The active disk is the default export (not with -U: it is changing), each snapshot the export of its name, and its
    VM state vmstate:NAME. With -s that snapshot is the default export, and the only one. Every snapshot also answers
    to id=ID. Several images are told apart by a prefix, their file's name without ".qcow2": the snapshot monday of
    a.qcow2 is a/monday, its active disk a.

    Prints the exports' URIs, and serves until SIGINT or SIGTERM; what has been asked for is still answered then. SIGHUP
    opens the images again: clients that come then see new snapshots. Sockets passed on by systemd, nbdinfo or nbdcopy
    (socket activation) take the place of all others, and no URIs are printed:

    \b
        nbdcopy -- [ qcow2snap serve disk.qcow2 -s monday ] monday.raw
    """
    logging.basicConfig(handlers=[LogHandler()], level=logging.INFO if verbose else logging.WARNING)
    named = _prefixed(images, prefixes)
    places = _places(sockets, hosts, ports, vsock)
    passed = passed_listeners()
    if (stdio or passed) and (sockets or hosts or ports or vsock):
        raise click.UsageError(f"{'--stdio' if stdio else 'Socket activation'} goes with no other place to listen.")
    if stdio and passed:
        raise click.UsageError("--stdio does not go with socket activation.")

    if writable and image_format != "raw":
        raise click.UsageError("--writable goes with -f raw only: qcow2 images cannot be written yet.")
    if writable and opening.force_share:
        raise click.UsageError("--writable does not go with -U: what others write cannot be written as well.")

    def open_image(image: str) -> Qcow2Node | RawNode:
        raw = image_format == "raw"
        return open_raw(image, opening, writable=writable) if raw else options.open_for(image, opening)

    mode = TLSMode(tls)
    _check_tls(mode, tls_certificates, tls_verify_peer, tls_psk)

    def open_offer() -> Offer:
        secure = None
        if mode is not TLSMode.OFF:
            from qcow2snap.nbd.tls import Credentials  # only here: ssl takes time to load

            secure = Credentials(tls_certificates, tls_verify_peer, tls_psk).read()
        return _open(named, open_image, snapshot, active=not opening.force_share)._replace(secure=secure)

    with ExitStack() as at_end:
        if stdio:
            from qcow2snap.nbd.stdio import StandardIO

            client = StandardIO()
            at_end.callback(client.close)
        offer = open_offer()
        at_end.enter_context(signals_held())
        listeners = [] if stdio else passed or listen_at_all(places)
        for listener in listeners:
            at_end.callback(listener.close)
        server = Server(
            offer.exports,
            listeners,
            max_connections=max_connections,
            handshake_timeout=handshake_timeout,
            tls=mode,
            secure=offer.secure,
            workers=0 if stdio or writable else len(os.sched_getaffinity(0)) if workers is None else workers,
            once=once,
            close=offer.close,
        )
        at_end.callback(server.stop)
        at_end.enter_context(pid_file(pid_path))
        if exit_with_parent:
            stop_with_parent(server)
        if stdio:
            server.serve_only(client.socket, "standard input")
        elif not passed:
            uris = [listener.uri._replace(tls=mode is not TLSMode.OFF) for listener in listeners]
            server.call_soon(lambda: _print_uris(uris, [export.name for export in offer.exports]))
        # What is being written stays open: to open it again would only find our own lock.
        service = Service(server, offer, None if writable else open_offer)
        if refresh:
            service.refresh_every(refresh)
        service.run()


def _check_tls(mode: TLSMode, certificates: str | None, verify_peer: bool, psk_file: str | None) -> None:
    if mode is TLSMode.OFF and (certificates or verify_peer or psk_file):
        raise click.UsageError("--tls-... without --tls: say --tls=require, or on to serve others as well.")
    if mode is not TLSMode.OFF and not (certificates or psk_file):
        raise click.UsageError("--tls needs --tls-certificates DIR or --tls-psk FILE.")
    if verify_peer and not certificates:
        raise click.UsageError("--tls-verify-peer needs --tls-certificates DIR, with ca-cert.pem in it.")


def _prefixed(images: Sequence[str], prefixes: Sequence[str]) -> list[tuple[str, str]]:
    """Each image, behind the prefix of its exports. A single one has none unless it is asked for."""
    if prefixes and len(prefixes) != len(images):
        raise click.UsageError(f"{len(prefixes)} times --prefix for {len(images)} images: give one for each.")
    if not prefixes:
        prefixes = [prefix_of(image) for image in images] if len(images) > 1 else [""]
    for prefix in prefixes:
        if list(prefixes).count(prefix) > 1:
            raise click.UsageError(f"Two images would be {prefix!r}: give each a --prefix.")
        if "/" in prefix:
            raise click.UsageError(f"--prefix {prefix!r} has a slash in it.")
    return list(zip(prefixes, images, strict=True))


def _open(
    named: Iterable[tuple[str, str]],
    open_image: Callable[[str], Qcow2Node | RawNode],
    snapshot: str | None,
    *,
    active: bool,
) -> Offer:
    with ExitStack() as nodes:
        parts: list[tuple[str, Exports]] = []
        state = []
        for prefix, image in named:
            node = open_image(image)
            nodes.callback(node.close)
            parts.append((prefix, exports_of(node, snapshot=snapshot, active=active)))
            snapshots = tuple(node.snapshots()) if isinstance(node, SnapshotAccess) else ()
            state.append((node.file.identity, node.size, snapshots))
        exports = parts[0][1] if parts[0][0] == "" else joined(parts)
        return Offer(exports, nodes.pop_all().close, state)


def _places(
    sockets: Iterable[str], hosts: Sequence[str], ports: Sequence[int], vsock: bool
) -> list[Callable[[], Listener]]:
    """Where the options say to listen."""
    places: list[Callable[[], Listener]] = [partial(listen_unix, path) for path in sockets]
    if vsock:
        places += [partial(listen_vsock, port) for port in ports or [NBD_PORT]]
    if hosts or (ports and not vsock) or not places:
        hosts, ports = hosts or [_LOOPBACK], ports or [NBD_PORT]
        if 1 != len(hosts) != len(ports) != 1:
            raise click.UsageError(f"{len(hosts)} times -b/--bind and {len(ports)} times -p/--port do not pair.")
        count = max(len(hosts), len(ports))
        pairs = zip(list(hosts) * (count // len(hosts)), list(ports) * (count // len(ports)), strict=True)
        places += [partial(listen_tcp, *pair) for pair in pairs]
    return places


def _print_uris(uris: Iterable[URI], names: list[str]) -> None:
    """One line for each export on each listener, in one write."""
    text = ""
    for uri in uris:
        for number, name in enumerate(names):
            line = f"{uri._replace(export=name)}\n"
            if number and len(text) + len(line) > _MAX_URIS:
                print(f"qcow2snap: {len(names) - number} more exports: nbdinfo --list '{uri}'", file=sys.stderr)
                break
            text += line
    sys.stdout.write(text)
    sys.stdout.flush()
