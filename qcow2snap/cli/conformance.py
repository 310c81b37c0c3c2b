"""`qcow2snap conformance`: the suite of images that tests readers of qcow2, other people's and our own."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from qcow2snap.block.node import FileError
from qcow2snap.cli import options
from qcow2snap.cli.progress import ProgressBar
from qcow2snap.cli.terminable import stopped_by_signals

if TYPE_CHECKING:
    from qcow2snap.conformance.suite.command import ReaderCommand
    from qcow2snap.conformance.suite.values import Built, Case, Disk, MapEntry


@click.group("conformance")
def command() -> None:
    """Test a reader of qcow2 over a suite of images, each with what is right to find in it.

    The images are made here, the same bytes each time; no QEMU is needed.
    """


# Not `list`: the builtin is wanted here.
@command.command("list")
@click.option("--section", metavar="TEXT", help="Only cases of sections that have this in their names.")
@options.json_option
def list_command(section: str | None, as_json: bool) -> None:
    """List the cases, by the sections of the specification."""
    from qcow2snap.conformance.suite.manifest import read_manifest

    manifest = read_manifest()
    wanted = (section or "").lower()
    cases = {
        name: case
        for name, case in manifest["cases"].items()
        if any(wanted in each.lower() for each in case["sections"])
    }
    if not cases:
        raise click.UsageError(f"No section has {section!r} in its name; `qcow2snap conformance list` shows them all.")
    if as_json:
        listed = [{"name": name, **case} for name, case in cases.items()]
        click.echo(json.dumps({"version": manifest["version"], "cases": listed}, indent=4))
        return
    width = max(map(len, cases))
    by_section: dict[str, list[str]] = {}
    for name, case in cases.items():
        by_section.setdefault(case["sections"][0], []).append(f"  {name:{width}}  {case['about']}")
    blocks = ("\n".join([heading, *lines]) for heading, lines in by_section.items())
    click.echo("\n\n".join(blocks))
    click.echo(f"\n{len(cases)} cases of suite {manifest['version']}")


@command.command("show")
@click.argument("name", metavar="CASE")
@click.option("--output", metavar="FILE", help="Write the image there, and the files that it refers to beside it.")
@click.option("--json", "as_json", is_flag=True, help="JSON, with qemu-img's field names.")
@click.option("--force", is_flag=True, help="Replace files that are there.")
def show_command(name: str, output: str | None, as_json: bool, force: bool) -> None:
    """Show what CASE covers, what is right to find in it, and what lies where in its image."""
    from qcow2snap.conformance.suite import SUITE_VERSION

    case = _find(name)
    built = case.build()
    if output is not None:
        _write(built, Path(output), force)
    if as_json:
        shown = {
            "name": case.name,
            "version": SUITE_VERSION,
            **case.json(built),
            "layout": [region._asdict() for region in built.layout],
        }
        click.echo(json.dumps(shown, indent=4))
    else:
        click.echo("\n".join(_shown(case, built)))


def _find(name: str) -> Case:
    from qcow2snap.conformance.suite.registry import all_cases

    cases = {case.name: case for case in all_cases()}
    if name not in cases:
        from difflib import get_close_matches

        near = get_close_matches(name, cases, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else " `qcow2snap conformance list` shows them all."
        raise click.UsageError(f"No such case: {name!r}.{hint}")
    return cases[name]


def _write(built: Built, path: Path, force: bool) -> None:
    for each in built.paths(path):
        if not force and os.path.lexists(each):
            raise FileError(f"{each}: exists already; --force overwrites it")
    built.write(path.parent, path.name)


def _shown(case: Case, built: Built) -> list[str]:
    lines = [f"{case.name}: {case.about}", "", "Sections"]
    lines += [f"  {section}" for section in case.sections]
    lines += ["", "Files"]
    digests = built.digests()
    lines += [f"  {name}  {file.size} bytes, SHA-256 {digests[name]}" for name, file in built.files.items()]
    for disk in built.disks:
        lines += ["", *_shown_disk(disk)]
    lines += ["", f"Layout of {case.name}.qcow2"]
    lines += [f"  {region.offset:#10x}  {region.length:#10x}  {region.what}" for region in built.layout]
    return lines


def _shown_disk(disk: Disk) -> list[str]:
    what = "Active disk" if disk.snapshot is None else f"Snapshot {disk.snapshot}"
    if disk.content is None:
        return [f"{what}: to be refused, as {disk.reason}"]
    lines = [f"{what}: {disk.size} bytes, SHA-256 {disk.content.sha256}"]
    if disk.may_refuse is not None:
        lines.append(f"  (or refused: {disk.may_refuse})")
    return lines + [f"  {entry.start:#10x}  {entry.length:#10x}  {_kind(entry)}" for entry in disk.map or ()]


def _kind(entry: MapEntry) -> str:
    if not entry.present:
        return "unallocated"
    kind = "zeros" if entry.zero else "compressed" if entry.compressed else f"data at {entry.offset:#x}"
    return kind if not entry.depth else f"{kind}, of backing file {entry.depth}"


@command.command("run")
@click.option("--reader", metavar="COMMAND", help="Writes what {image} holds, of {snapshot}, to {output} or stdout.")
@click.option("--map-reader", metavar="COMMAND", help="Writes the map of {image} to stdout, as `qemu-img map` in JSON.")
@click.option("--adapter", metavar="NAME", help="A reader that is known here, instead of --reader.")
@click.option(
    "--cases", "patterns", metavar="PATTERN", multiple=True, help="Only these: a name, with * and ?. Repeatable."
)
@click.option("--section", metavar="TEXT", help="Only cases of sections that have this in their names.")
@click.option("--large", is_flag=True, help="Also cases whose disks have some GiB.")
@click.option(
    "--timeout", type=click.FloatRange(min=0.01), default=30, show_default=True, help="Seconds for each disk."
)
@click.option("--memory", type=options.Size(), default="1G", show_default=True, help="For each disk; 0 is no limit.")
@click.option("--jobs", type=click.IntRange(1, 256), default=None, help="Cases at once.  [default: one a processor]")
@click.option("--keep", metavar="DIR", help="Keep images, outputs and what the reader said, in a new directory.")
@click.option("--format", "form", type=click.Choice(["text", "junit", "json"]), default="text", show_default=True)
def run_command(
    reader: str | None,
    map_reader: str | None,
    adapter: str | None,
    patterns: tuple[str, ...],
    section: str | None,
    large: bool,
    timeout: float,
    memory: int,
    jobs: int | None,
    keep: str | None,
    form: str,
) -> int:
    """Run a reader over the suite, and report by sections of the specification. Exit code 1 if it fails anywhere.

    The command is split into words as a shell does it, and run without one, once for each disk. {image}, {output},
    {snapshot} (a name) and {id} stand for what it is asked; words in [brackets] with {snapshot} or {id} among them are
    left out for the active disk. It has to write the disk's bytes and exit with 0, or exit with another code to refuse.
    """
    from qcow2snap.conformance.suite import report
    from qcow2snap.conformance.suite.registry import choose_cases
    from qcow2snap.conformance.suite.runner import Outcome, Runner

    if adapter is not None:
        if reader is not None or map_reader is not None:
            raise click.UsageError("--adapter stands in place of --reader and --map-reader.")
        reader, map_reader = _adapted(adapter)
    if reader is None and map_reader is None:
        raise click.UsageError("Which reader? --reader COMMAND, or --adapter NAME.")
    chosen = choose_cases(patterns, section=section or "", large=large)
    if not chosen:
        raise click.UsageError("No case is left to run; `qcow2snap conformance list` shows them all.")
    runner = Runner(
        _command("--reader", reader),
        _command("--map-reader", map_reader),
        timeout=timeout,
        memory=memory,
        jobs=jobs or len(os.sched_getaffinity(0)),
        keep=None if keep is None else _new_directory(Path(keep)),
    )
    with stopped_by_signals(runner.stop), ProgressBar("conformance", len(chosen), counted=True) as bar:
        checks = runner.run(chosen, bar.advance)
    if form == "text":
        click.echo("\n".join(report.text(checks)))
    else:
        shown = " ; ".join(each for each in (reader, map_reader) if each)
        click.echo(report.junit(checks) if form == "junit" else report.as_json(checks, shown))
    return int(any(check.outcome is Outcome.FAILED for check in checks))


def _command(option: str, text: str | None) -> ReaderCommand | None:
    from qcow2snap.conformance.suite.command import CommandError, ReaderCommand

    try:
        return None if text is None else ReaderCommand(text)
    except CommandError as error:
        raise click.UsageError(f"{option}: {error}.") from None


def _adapted(name: str) -> tuple[str | None, str | None]:
    from qcow2snap.conformance.suite.adapters import ADAPTERS

    if name not in ADAPTERS:
        raise click.UsageError(f"No such adapter: {name!r}. There are {', '.join(ADAPTERS)}.")
    adapter = ADAPTERS[name]
    lacking = adapter.why_not()
    if lacking:
        raise click.UsageError(f"{lacking}.")
    return adapter.reader, adapter.map_reader


def _new_directory(path: Path) -> Path:
    try:
        path.mkdir(parents=True)
    except FileExistsError:
        raise FileError(f"{path}: exists already; name a new directory") from None
    return path.resolve()
