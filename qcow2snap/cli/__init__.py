"""The command line: one file per command, loaded when called, and what all of them share: errors and exit codes."""

from __future__ import annotations

import atexit
import errno
import gc
import io
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress

import click

from qcow2snap import __version__
from qcow2snap.block.node import Qcow2SnapError

# numpy's linear algebra, which is not used here, would start a thread for each processor and let it spin for a while.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# The 45,000 objects that a command makes at its start stay to its end. To look through them for garbage on the way, and
# once more when the process ends, took 10 to 15 % of the time of a short command.
gc.set_threshold(50_000)
atexit.register(gc.freeze)

# Name and one line of help, so that `--help` imports no command. (Once `list` and `map` are imported, these names mean
# the modules here, not the builtins.)
_COMMANDS = {
    "list": "List the snapshots of an image.",
    "info": "Describe an image: its size, format, features, snapshots and chain.",
    "map": "Show which parts of a disk or snapshot are allocated, and where they lie.",
    "create": "Make an empty qcow2 image.",
    "resize": "Make the disk of an image larger.",
    "snapshot": "Make, delete, apply and rename snapshots.",
    "extract": "Copy a disk, a snapshot or a VM state to a raw file or qcow2 image.",
    "diff": "Show which bytes differ between two snapshots, and how.",
    "check": "Check an image against the specification, rule by rule.",
    "digest": "Hash snapshots, and check them against a manifest.",
    "serve": "Export all snapshots over NBD.",
    "fleece": "Keep what a raw disk is now, while it is written over NBD.",
    "daemon": "Export a graph of block nodes, and change it by QMP, as qemu-storage-daemon.",
    "conformance": "Test a reader of qcow2 over a suite of images.",
}

# Exit codes of commands that could not, where it is not 1. As in `qemu-img compare`, 1 says that there is a difference.
_COULD_NOT = {"diff": 2}


class _LazyGroup(click.Group):
    """A group that imports a command's module when the command is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*_COMMANDS]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        from importlib import import_module

        command: click.Command = import_module(f"qcow2snap.cli.{cmd_name}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([*_COMMANDS.items()])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            from difflib import get_close_matches

            near = get_close_matches(args[0], _COMMANDS, n=1)
            if not near:
                raise
            raise click.UsageError(f"No such command {args[0]!r}. Did you mean {near[0]!r}?", ctx) from error


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, "-V", "--version", prog_name="qcow2snap")
def cli() -> None:
    """Get at the internal snapshots of qcow2 disk images."""


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 could not (one line on stderr), 2 usage; 128 + N for signal N."""
    _let_interrupts_end()
    words = [*(sys.argv[1:] if args is None else args)]
    could_not = _COULD_NOT.get(words[0], 1) if words else 1
    _occupy_standard_descriptors()
    if sys.stdout is None:
        _fail("standard output is closed", could_not)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that cannot show a name gets it escaped
    try:
        # Not cli.main(): it has ways of its own for broken pipes and interrupts.
        with cli.make_context("qcow2snap", words) as context:
            result = cli.invoke(context)
        sys.stdout.flush()
        sys.exit(result if isinstance(result, int) else 0)
    except click.exceptions.Exit as end:  # --help, --version
        sys.exit(end.exit_code)
    except click.ClickException as error:  # usage
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(130)
    except Qcow2SnapError as error:
        _fail(str(error), could_not)
    except OSError as error:
        if error.errno == errno.EPIPE:  # the reader of our output has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            sys.exit(141)
        name = f"{error.filename}: " if error.filename else ""
        _fail(f"{name}{error.strerror or error}", could_not)
    except MemoryError:
        _fail("not enough memory", could_not)


def _let_interrupts_end() -> None:
    """^C ends us as it ends other programs: Python's exception would wait for who reads our output, or for a lock."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not so if it is switched off
        with suppress(ValueError):  # not the main thread
            signal.signal(signal.SIGINT, signal.SIG_DFL)


def _occupy_standard_descriptors() -> None:
    """Let those that are closed, as by the shell's 2>&-, lead nowhere.

    Files that are opened later would get their numbers: what is logged would be written into an image.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  # for all that follows


def _fail(message: str, exit_code: int) -> None:
    line = " ".join(message.split())
    print(f"qcow2snap: {line}".encode("utf-8", "backslashreplace").decode(), file=sys.stderr)
    sys.exit(exit_code)
