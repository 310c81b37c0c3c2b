"""`qcow2snap daemon`: qemu-storage-daemon's command line. What its options mean is daemon/options.py's."""

from __future__ import annotations

import os
import sys
from contextlib import ExitStack

import click

from qcow2snap import __version__
from qcow2snap.block.graph import OpenOptions
from qcow2snap.daemon import options
from qcow2snap.daemon.background import Background
from qcow2snap.daemon.daemon import Daemon
from qcow2snap.nbd.log import log_to_stderr
from qcow2snap.nbd.service import pid_file


@click.command(
    "daemon",
    add_help_option=False,
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
)
@click.argument("words", nargs=-1, type=click.UNPROCESSED)
def command(words: tuple[str, ...]) -> None:
    try:
        arguments = options.parse(words)
    except options.Usage as error:
        raise click.UsageError(f"{error}; see: qcow2snap daemon --help") from None
    if "help" in arguments.flags:
        sys.stdout.write(options.HELP)
        return
    if "version" in arguments.flags:
        print(f"qcow2snap daemon, version {__version__}")
        return
    background = Background() if "daemonize" in arguments.flags else None
    log_to_stderr(verbose="verbose" in arguments.flags)
    with ExitStack() as at_end:
        daemon = Daemon(OpenOptions(allow_paths=arguments.allow_paths))
        at_end.callback(daemon.close)
        at_end.enter_context(daemon.loop.stopped_by_signals())
        options.carry_out(daemon, arguments.ordered)
        pidfile = arguments.pidfile and os.path.abspath(arguments.pidfile)
        at_end.enter_context(pid_file(pidfile))
        if background is not None:
            background.ready()
        daemon.run()
