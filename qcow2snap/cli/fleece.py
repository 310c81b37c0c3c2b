"""`qcow2snap fleece`: what a disk is now, to be read over NBD, while the disk itself is written over NBD."""

from __future__ import annotations

import re
import sys
from contextlib import ExitStack
from functools import partial

import click

from qcow2snap.block.copy_before_write import OnCbwError
from qcow2snap.block.fleecing import Fleecing, open_disk
from qcow2snap.block.graph import OpenOptions
from qcow2snap.block.node import BlockNode
from qcow2snap.cli import dirty, options, serve_options, text
from qcow2snap.cli.options import Size
from qcow2snap.nbd.export import Export, Exports
from qcow2snap.nbd.listen import listen_at_all, listen_unix
from qcow2snap.nbd.log import log_to_stderr
from qcow2snap.nbd.negotiation import TLSMode
from qcow2snap.nbd.remote_node import RemoteNode
from qcow2snap.nbd.server import Server
from qcow2snap.nbd.service import Offer, Service, pid_file, signals_held, stop_with_parent


@click.command("fleece")
@click.argument("disk", metavar="DISK")
@click.option("--target", metavar="TEMP", required=True,
              help="Where to keep what is overwritten. If it is not there: made now, removed at the end.")  # fmt: skip
@serve_options.listening_options
@click.option("--guest-socket", metavar="PATH",
              help="A Unix socket for guest alone, without TLS; backup is at the others then.")  # fmt: skip
@click.option("-f", "--format", "image_format", type=click.Choice(["raw", "qcow2"]),
              help="What DISK is. Without this it is raw, and refused if it looks like qcow2.")  # fmt: skip
@options.allow_path_option
@click.option("--force", is_flag=True, help="Overwrite TEMP if there is something in it.")
@click.option("--max-temp", type=Size(), help="Let TEMP hold no more than that at a time.  [default: no limit]")
@dirty.bitmap_options
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
@click.option("--reconnect-delay", type=click.FloatRange(0), default=0.0, show_default=True, metavar="SECONDS",
              help="Look so long for the server of an NBD URI that is gone, before that is an error.")  # fmt: skip
@serve_options.tls_options
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
    allow_paths: tuple[str, ...],
    force: bool,
    max_temp: int | None,
    bitmaps: tuple[str, ...],
    references: tuple[str, ...],
    backup_trim: bool,
    on_cbw_error: str,
    cbw_timeout: float,
    min_cluster_size: int,
    server_timeout: float,
    reconnect_delay: float,
    tls: str,
    tls_certificates: str | None,
    tls_verify_peer: bool,
    tls_psk: str | None,
    exit_with_parent: bool,
    pid_path: str | None,
    verbose: bool,
) -> int:
    """Keep what DISK is now, to be read over NBD, while it is written over NBD.

    DISK and TEMP are files, or NBD URIs of what another server exports. DISK is raw, or with -f qcow2 the active disk
    of an image, whose snapshots stay as they are.

    There are two exports: guest is DISK, for its only writer (a virtual machine, nbd-client, nbdfuse), backup what DISK
    was when this began, read-only. Before a part of DISK is overwritten for the first time it is copied to TEMP, as by
    QEMU's copy-before-write. Prints the exports' URIs, serves until SIGINT or SIGTERM, and says then how much was
    copied. The exit code is 1 if the snapshot was lost.

    For an incremental backup, --bitmap and --changed-since say what is wanted: only that is kept and can be read from
    backup, in clusters; all else is an error (EACCES in QEMU's words, EINVAL in NBD's). The export tells which it is by
    the metadata context qemu:dirty-bitmap:NAME (of FILE: its name without .json) or qcow2snap:changed-since:REF.

    \b
        qcow2snap fleece disk.raw --target temp.raw -k /tmp/s &
        nbdcopy 'nbd+unix:///backup?socket=/tmp/s' backup.raw
    """
    log_to_stderr(verbose=verbose)
    places = serve_options.places(sockets, hosts, ports, vsock)
    mode = TLSMode(tls)
    serve_options.check_tls(mode, tls_certificates, tls_verify_peer, tls_psk)
    wanted = dirty.sources(bitmaps, references)
    with ExitStack() as at_end:
        at_end.enter_context(signals_held())
        secure = None
        if mode is not TLSMode.OFF:
            from qcow2snap.nbd.tls import Credentials  # only here: ssl takes time to load

            secure = Credentials(tls_certificates, tls_verify_peer, tls_psk).read()
        remote = partial(RemoteNode, writable=True, timeout=server_timeout, reconnect_delay=reconnect_delay)
        if is_uri(disk):
            disk_node: BlockNode = remote(disk, contexts=[source.context for source in wanted if source.is_of_disk])
        else:
            disk_node = open_disk(disk, image_format, OpenOptions(allow_paths=allow_paths))
        with ExitStack() as opened:
            opened.callback(disk_node.close)
            frozen = dirty.read(wanted, disk_node)
            kept = remote(target) if is_uri(target) else target
            opened.pop_all()  # the fleecing's from here on
        fleecing = Fleecing(
            disk_node,
            kept,
            force=force,
            bitmap=dirty.union(frozen.values()) if frozen else None,
            on_cbw_error=OnCbwError(on_cbw_error),
            cbw_timeout=cbw_timeout,
            min_cluster_size=min_cluster_size,
            max_target=max_temp,
        )
        at_end.callback(fleecing.close)
        for name, bitmap in frozen.items():
            told = f"{text.size(bitmap.count)} of {text.size(bitmap.size)} are dirty by {name}"
            print(f"qcow2snap: {told}", file=sys.stderr)
        guest = Export("guest", lambda: fleecing.guest, "the disk, to be read and written")
        backup = Export("backup", lambda: fleecing.backup, "what the disk was", may_trim=backup_trim, bitmaps=frozen)
        listeners = listen_at_all(places)
        for listener in listeners:
            at_end.callback(listener.close)
        main = Server(Exports([backup] if guest_socket else [guest, backup]), listeners, tls=mode, secure=secure)
        at_end.callback(main.stop)
        uris = [listener.uri._replace(tls=mode is not TLSMode.OFF) for listener in listeners]
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


def is_uri(child: str) -> bool:
    """Of an NBD export, and not the name of a file."""
    return re.match(r"nbds?(\+unix|\+vsock)?://", child) is not None
