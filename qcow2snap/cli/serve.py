"""`qcow2snap serve`: all snapshots of one image or several over NBD, each an export under its name."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable
from contextlib import ExitStack

import click

from qcow2snap.block.graph import OpenOptions, files_of, open_raw, open_writable
from qcow2snap.block.node import SnapshotAccess
from qcow2snap.block.qcow2.driver import Qcow2Node
from qcow2snap.block.raw import RawNode
from qcow2snap.cli import options, serve_options
from qcow2snap.nbd.export import Exports, exports_of, joined
from qcow2snap.nbd.listen import listen_at_all, passed_listeners
from qcow2snap.nbd.log import log_to_stderr
from qcow2snap.nbd.negotiation import TLSMode
from qcow2snap.nbd.server import Server
from qcow2snap.nbd.service import Offer, Service, allow_connections, pid_file, signals_held, stop_with_parent
from qcow2snap.nbd.uri import URI

# Bytes of URIs that are printed at most: half of what a pipe holds, so that nobody has to read for us to go on.
_MAX_URIS = 1 << 15


@click.command("serve", cls=serve_options.SectionedCommand)
@click.argument("images", metavar="IMAGE...", nargs=-1, required=True)
@serve_options.listening_options
@serve_options.stdio_option
@options.snapshot_option
@click.option("--prefix", "prefixes", metavar="NAME", multiple=True,
              help="Begin the exports' names with NAME/; once for each IMAGE, in their order.")  # fmt: skip
@click.option("-f", "--format", "image_format", type=click.Choice(["qcow2", "raw"]), default="qcow2",
              help="What each IMAGE is; it is not guessed.  [default: qcow2]")  # fmt: skip
@click.option("--writable", is_flag=True, help="Let clients write the active disk; its snapshots stay as they are.")
@click.option("--discard-no-unref", "no_unref", is_flag=True,
              help="What clients discard keeps its clusters in IMAGE, so that it is not fragmented by what they write "
                   "there later.")  # fmt: skip
@options.opening_options
@serve_options.tls_options
@serve_options.client_options
@serve_options.running_options
@serve_options.process_options
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
    no_unref: bool,
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
    """Export the active disk and the snapshots of each IMAGE over NBD, read-only; or raw images.

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
    named = serve_options.prefixed(images, prefixes)
    places = serve_options.places(sockets, hosts, ports, vsock)
    passed = passed_listeners()
    if (stdio or passed) and (sockets or hosts or ports or vsock):
        raise click.UsageError(f"{'--stdio' if stdio else 'Socket activation'} goes with no other place to listen.")
    if stdio and passed:
        raise click.UsageError("--stdio does not go with socket activation.")

    if writable and opening.force_share:
        raise click.UsageError("--writable does not go with -U: what others write cannot be written as well.")
    if no_unref and not (writable and image_format == "qcow2"):
        raise click.UsageError("--discard-no-unref goes with --writable and qcow2 images only.")
    opening = opening._replace(discard_no_unref=no_unref)

    def open_image(image: str) -> Qcow2Node | RawNode:
        if image_format == "raw":
            return open_raw(image, opening, writable=writable)
        return open_writable(image, opening) if writable else options.open_for(image, opening)

    mode = TLSMode(tls)
    serve_options.check_tls(mode, tls_certificates, tls_verify_peer, tls_psk)

    def open_offer() -> Offer:
        secure = None
        if mode is not TLSMode.OFF:
            from qcow2snap.nbd.tls import Credentials  # only here: ssl takes time to load

            secure = Credentials(tls_certificates, tls_verify_peer, tls_psk).read()
        return _open(named, open_image, snapshot, active=not opening.force_share)._replace(secure=secure)

    with ExitStack() as at_end:
        if stdio:
            from qcow2snap.nbd.stdio import StandardIO

            client = StandardIO()  # first of all: standard error may be the client's as well
            at_end.callback(client.close)
        log_to_stderr(verbose=verbose)
        allow_connections(max_connections)
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
            state.append((files_of(node)[0].identity, node.size, snapshots))
        exports = parts[0][1] if parts[0][0] == "" else joined(parts)
        return Offer(exports, nodes.pop_all().close, state)


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
