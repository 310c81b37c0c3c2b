"""`qcow2snap serve`: all snapshots of an image over NBD, each an export under its name, until a signal comes."""

from __future__ import annotations

import logging
import os
import sys

import click

from formats.nbd import NBD_PORT
from qcow2snap.block.graph import OpenOptions, open_raw
from qcow2snap.block.node import BlockNode
from qcow2snap.cli import options
from qcow2snap.nbd.export import exports_of
from qcow2snap.nbd.listen import Listener, listen_tcp, listen_unix
from qcow2snap.nbd.server import Server
from qcow2snap.nbd.service import Offer, run, signals_held

# Bytes of URIs that are printed at most: half of what a pipe holds, so that nobody has to read for us to go on.
_MAX_URIS = 1 << 15


@click.command("serve")
@options.image_argument
@options.snapshot_option
@click.option("-k", "--socket", "path", metavar="PATH", help="Listen on a Unix socket.")
@click.option("-b", "--bind", "host", metavar="ADDR", help="Listen on a TCP address.  [default: 127.0.0.1]")
@click.option("-p", "--port", type=click.IntRange(0, 65535), help=f"TCP port; 0: any.  [default: {NBD_PORT}]")
@click.option(
    "-f",
    "--format",
    "image_format",
    type=click.Choice(["qcow2", "raw"]),
    default="qcow2",
    help="What IMAGE is; it is not guessed.  [default: qcow2]",
)
@click.option("--writable", is_flag=True, help="Let clients write IMAGE, which has to be raw: -f raw.")
@options.opening_options
@click.option(
    "--workers",
    type=click.IntRange(0, 256),
    metavar="N",
    help="Processes that serve; 0 or 1, or with --writable: threads of this one.  [default: one for each processor]",
)
@click.option("--max-connections", type=click.IntRange(1), default=512, show_default=True, metavar="N")
@click.option(
    "--handshake-timeout",
    type=click.FloatRange(0, min_open=True),
    default=10.0,
    show_default=True,
    metavar="SECONDS",
    help="Cut off a client that has chosen no export by then.",
)
def command(
    image: str,
    snapshot: str | None,
    path: str | None,
    host: str | None,
    port: int | None,
    image_format: str,
    writable: bool,
    opening: OpenOptions,
    workers: int | None,
    max_connections: int,
    handshake_timeout: float,
) -> None:
    """Export the snapshots of IMAGE over NBD, read-only; or a raw IMAGE, which may be written.

    The active disk is the default export (not with -U: it is changing), each snapshot the export of its name, and its
    VM state vmstate:NAME. With -s that snapshot is the default export, and the only one. Every snapshot also answers
    to id=ID. Prints the exports' URIs, and serves until SIGINT or SIGTERM.
    """
    if path is not None and (host is not None or port is not None):
        raise click.UsageError("-k/--socket goes with neither -b/--bind nor -p/--port.")
    if writable and image_format != "raw":
        raise click.UsageError("--writable goes with -f raw only: qcow2 images cannot be written yet.")
    if writable and opening.force_share:
        raise click.UsageError("--writable does not go with -U: what others write cannot be written as well.")
    logging.basicConfig(format="qcow2snap: %(message)s", level=logging.WARNING)

    def open_offer() -> Offer:
        raw = image_format == "raw"
        node: BlockNode = open_raw(image, opening, writable=writable) if raw else options.open_for(image, opening)
        try:
            return Offer(exports_of(node, snapshot=snapshot, active=not opening.force_share), node.close)
        except BaseException:
            node.close()
            raise

    offer = open_offer()
    with signals_held():
        listener = listen_unix(path) if path else listen_tcp(host or "127.0.0.1", NBD_PORT if port is None else port)
        server = Server(
            offer.exports,
            [listener],
            max_connections=max_connections,
            handshake_timeout=handshake_timeout,
            workers=0 if writable else len(os.sched_getaffinity(0)) if workers is None else workers,
            close=offer.close,
        )
        server.call_soon(lambda: _print_uris(listener, [export.name for export in offer.exports]))
        # What is being written stays open: to open it again would only find our own lock.
        run(server, None if writable else open_offer)


def _print_uris(listener: Listener, names: list[str]) -> None:
    """One line for each export, in one write."""
    text = ""
    for number, name in enumerate(names):
        line = f"{listener.uri._replace(export=name)}\n"
        if number and len(text) + len(line) > _MAX_URIS:
            print(f"qcow2snap: {len(names) - number} more exports: nbdinfo --list '{listener.uri}'", file=sys.stderr)
            break
        text += line
    sys.stdout.write(text)
    sys.stdout.flush()
