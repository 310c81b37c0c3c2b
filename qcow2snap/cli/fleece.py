"""`qcow2snap fleece`: what a raw disk is now, to be read over NBD, while the disk itself is written over NBD."""

from __future__ import annotations

import re
import sys
from contextlib import ExitStack

import click

from qcow2snap.block.copy_before_write import OnCbwError
from qcow2snap.block.fleecing import Fleecing
from qcow2snap.block.node import BlockNode
from qcow2snap.cli import serve_options, text
from qcow2snap.cli.options import Size
from qcow2snap.nbd.export import Export, Exports
from qcow2snap.nbd.listen import listen_at_all, listen_unix
from qcow2snap.nbd.log import log_to_stderr
from qcow2snap.nbd.server import Server
from qcow2snap.nbd.service import Offer, Service, pid_file, signals_held, stop_with_parent


@click.command("fleece")
@click.argument("disk", metavar="DISK")
@click.option("--target", metavar="TEMP", required=True,
              help="Where to keep what is overwritten. If it is not there: made now, removed at the end.")  # fmt: skip
@serve_options.listening_options
@click.option("--guest-socket", metavar="PATH", help="A Unix socket for guest alone; backup is at the others then.")
@click.option("-f", "--format", "image_format", type=click.Choice(["raw"]),
              help="What DISK is. Without this, a DISK that looks like something else is refused.")  # fmt: skip
@click.option("--force", is_flag=True, help="Overwrite TEMP if there is something in it.")
@click.option("--max-temp", type=Size(), help="Let TEMP hold no more than that at a time.  [default: no limit]")
@click.option("--backup-trim", is_flag=True,
              help="Clients of backup may TRIM what they need no more: TEMP gives it back.")  # fmt: skip
@click.option("--on-cbw-error", type=click.Choice([policy.value for policy in OnCbwError]),
              default=OnCbwError.BREAK_GUEST_WRITE.value, show_default=True,
              help="What fails when something cannot be copied, for example because TEMP is full.")  # fmt: skip
@click.option("--cbw-timeout", type=click.FloatRange(0), default=0.0, metavar="SECONDS",
              help="What is not copied by then could not be copied.  [default: none]")  # fmt: skip
@click.option("--min-cluster-size", type=Size(), default=0, help="Copy so much at a time, or more.  [default: 64k]")
@click.option("--server-timeout", type=click.FloatRange(0, min_open=True), default=60.0, show_default=True,
              metavar="SECONDS", help="The server of an NBD URI is lost if it says nothing for so long.")  # fmt: skip
@serve_options.process_options
def command(
    disk: str,
    target: str,
    sockets: tuple[str, ...],
    hosts: tuple[str, ...],
    ports: tuple[int, ...],
    vsock: bool,
    guest_socket: str | None,
    image_format: str | None,
    force: bool,
    max_temp: int | None,
    backup_trim: bool,
    on_cbw_error: str,
    cbw_timeout: float,
    min_cluster_size: int,
    server_timeout: float,
    exit_with_parent: bool,
    pid_path: str | None,
    verbose: bool,
) -> int:
    """Keep what the raw disk DISK is now, to be read over NBD, while it is written over NBD.

    DISK and TEMP are files, or NBD URIs of what another server exports.

    There are two exports: guest is DISK, for its only writer (a virtual machine, nbd-client, nbdfuse), backup what DISK
    was when this began, read-only. Before a part of DISK is overwritten for the first time it is copied to TEMP, as by
    QEMU's copy-before-write. Prints the exports' URIs, serves until SIGINT or SIGTERM, and says then how much was
    copied. The exit code is 1 if the snapshot was lost.

    \b
        qcow2snap fleece disk.raw --target temp.raw -k /tmp/s &
        nbdcopy 'nbd+unix:///backup?socket=/tmp/s' backup.raw
    """
    log_to_stderr(verbose=verbose)
    places = serve_options.places(sockets, hosts, ports, vsock)
    with ExitStack() as at_end:
        at_end.enter_context(signals_held())
        children = [_opened(child, server_timeout) for child in (disk, target)]
        fleecing = Fleecing(
            *children,
            raw=image_format == "raw",
            force=force,
            on_cbw_error=OnCbwError(on_cbw_error),
            cbw_timeout=cbw_timeout,
            min_cluster_size=min_cluster_size,
            max_target=max_temp,
        )
        at_end.callback(fleecing.close)
        guest = Export("guest", lambda: fleecing.guest, "the disk, to be read and written")
        backup = Export("backup", lambda: fleecing.backup, "what the disk was", may_trim=backup_trim)
        listeners = listen_at_all(places)
        for listener in listeners:
            at_end.callback(listener.close)
        main = Server(Exports([backup] if guest_socket else [guest, backup]), listeners)
        at_end.callback(main.stop)
        uris = [listener.uri for listener in listeners]
        names = ["backup"] if guest_socket else ["guest", "backup"]
        named = [uri._replace(export=name) for uri in uris for name in names]
        if guest_socket:
            listener = listen_unix(guest_socket)
            at_end.callback(listener.close)
            named.insert(0, listener.uri._replace(export="guest"))
            at_end.enter_context(Server(Exports([guest]), [listener]))
        at_end.enter_context(pid_file(pid_path))
        if exit_with_parent:
            stop_with_parent(main)
        sys.stdout.write("".join(f"{uri}\n" for uri in named))  # in one piece, for who reads it from a pipe
        sys.stdout.flush()
        Service(main, Offer(Exports([]), lambda: None)).run()
    node = fleecing.guest
    print(f"qcow2snap: {text.size(node.copied)} of {disk} were copied to {target}", file=sys.stderr)
    if node.snapshot_error is not None:
        print(f"qcow2snap: the snapshot was lost: {node.snapshot_error}", file=sys.stderr)
        return 1
    return 0


def _opened(child: str, timeout: float) -> str | BlockNode:
    """A remote export as a node; a file's name is left to who opens it."""
    if not re.match(r"nbds?(\+unix|\+vsock)?://", child):
        return child
    from qcow2snap.nbd.remote_node import RemoteNode

    return RemoteNode(child, writable=True, timeout=timeout)
