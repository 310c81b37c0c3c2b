"""The options of `qcow2snap serve` by kind, and what goes with what among them. Opens and serves nothing.

Where to listen, and how to run, is said to `qcow2snap fleece` in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import click

from formats.nbd import NBD_PORT
from qcow2snap.cli.options import together
from qcow2snap.nbd.export import prefix_of
from qcow2snap.nbd.listen import Listener, listen_tcp, listen_unix, listen_vsock
from qcow2snap.nbd.negotiation import TLSMode

_LOOPBACK = "127.0.0.1"

_SECTIONS = {
    "Where to listen": ("sockets", "hosts", "ports", "vsock", "stdio"),
    "What to export": (
        "snapshot",
        "prefixes",
        "image_format",
        "writable",
        "no_unref",
        "force_share",
        "allow_paths",
        "l2_cache_size",
    ),
    "TLS": ("tls", "tls_certificates", "tls_verify_peer", "tls_psk"),
    "Clients": ("workers", "max_connections", "handshake_timeout"),
    "Running": ("once", "refresh", "exit_with_parent", "pid_path", "verbose"),
}


class SectionedCommand(click.Command):
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


listening_options = together(
    click.option("-k", "--socket", "sockets", metavar="PATH", help="A Unix socket. Repeatable.", multiple=True),
    click.option("-b", "--bind", "hosts", metavar="ADDR", multiple=True,
                 help=f"A TCP address, IPv4 or IPv6, or a host's name. Repeatable.  [default: {_LOOPBACK}]"),
    click.option("-p", "--port", "ports", type=click.IntRange(0, 65535), metavar="PORT", multiple=True,
                 help=f"Its port; 0: any that is free. Repeatable, in order of the addresses; one goes with all "
                      f"addresses, and one address with all ports.  [default: {NBD_PORT}]"),
    click.option("--vsock", is_flag=True,
                 help="vsock, for virtual machines and their host, on the ports of -p; TCP only with -b then."),
)  # fmt: skip

stdio_option = click.option(
    "--stdio", is_flag=True, help="Standard input and output are the one client: for inetd, systemd and ssh."
)

client_options = together(
    click.option("--workers", type=click.IntRange(0, 256), metavar="N",
                 help="Processes that serve; 0, 1 or --writable: threads of this one.  [default: one a processor]"),
    click.option("--max-connections", type=click.IntRange(1), default=512, show_default=True, metavar="N",
                 help="Refuse more clients than that at a time."),
    click.option("--handshake-timeout", type=click.FloatRange(0, min_open=True), default=10.0, show_default=True,
                 metavar="SECONDS", help="Cut off a client that has chosen no export by then."),
)  # fmt: skip

tls_options = together(
    click.option("--tls", type=click.Choice([mode.value for mode in TLSMode]), default="off", show_default=True,
                 help="Whether clients may (on), must (require) or cannot speak by TLS."),
    click.option("--tls-certificates", metavar="DIR",
                 help="With server-cert.pem and server-key.pem, and ca-cert.pem for --tls-verify-peer."),
    click.option("--tls-verify-peer", is_flag=True,
                 help="Serve only clients with a certificate that ca-cert.pem has signed."),
    click.option("--tls-psk", metavar="FILE",
                 help="Pre-shared keys, lines USERNAME:HEXKEY as psktool writes them (Python 3.13 or later)."),
)  # fmt: skip

running_options = together(
    click.option("--once", is_flag=True,
                 help="End when the first clients that chose an export have left, as qemu-nbd does without -t."),
    click.option("--refresh", type=click.FloatRange(0.1), metavar="SECONDS",
                 help="Look for new snapshots so often, and offer them as after SIGHUP."),
)  # fmt: skip

process_options = together(
    click.option("--exit-with-parent", is_flag=True, help="End when the process that started this one does."),
    click.option("--pid-file", "pid_path", metavar="FILE", help="Write the process id there when ready."),
    click.option("-v", "--verbose", is_flag=True, help="Log who connects, what they read and how much."),
)  # fmt: skip


def check_tls(mode: TLSMode, certificates: str | None, verify_peer: bool, psk_file: str | None) -> None:
    if mode is TLSMode.OFF and (certificates or verify_peer or psk_file):
        raise click.UsageError("--tls-... without --tls: say --tls=require, or on to serve others as well.")
    if mode is not TLSMode.OFF and not (certificates or psk_file):
        raise click.UsageError("--tls needs --tls-certificates DIR or --tls-psk FILE.")
    if verify_peer and not certificates:
        raise click.UsageError("--tls-verify-peer needs --tls-certificates DIR, with ca-cert.pem in it.")


def prefixed(images: Sequence[str], prefixes: Sequence[str]) -> list[tuple[str, str]]:
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


def places(
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
