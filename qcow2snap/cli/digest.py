"""`qcow2snap digest`: hashes of the active disk and of snapshots, as a manifest; and checking one."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any

import click

from qcow2snap.block.graph import OpenOptions, files_of
from qcow2snap.block.node import SnapshotInfo, SnapshotNotFound
from qcow2snap.block.output import OutputFile, is_stream
from qcow2snap.block.qcow2.driver import Qcow2Node
from qcow2snap.block.snapshot_ref import shown
from qcow2snap.cli import options, text
from qcow2snap.cli.progress import ProgressBar
from qcow2snap.cli.signals import ended_by_signals
from qcow2snap.forensics.digest import DEFAULT_ALGORITHMS, Subject, digests, manifest, new_hasher, read_manifest


@click.command("digest")
@options.image_argument
@click.option("-s", "--snapshot", "-l", "refs", metavar="REF", multiple=True, help="Only this snapshot. Repeatable.")
@click.option("--active", is_flag=True, help="Only the active disk, or it besides the snapshots that -s names.")
@click.option(
    "-a",
    "--algorithm",
    "algorithms",
    multiple=True,
    metavar="NAME",
    help="sha256, crc32c, or any of Python's hashlib. Repeatable. Default: sha256 and crc32c.",
)
@click.option("-o", "--manifest", "out", metavar="FILE", help="Write the manifest there as well.")
@click.option(
    "--verify", "verify", metavar="MANIFEST", help="Compare with a manifest: exit code 1 if anything differs."
)
@options.json_option
@options.opening_options
def command(
    image: str,
    refs: tuple[str, ...],
    active: bool,
    algorithms: tuple[str, ...],
    out: str | None,
    verify: str | None,
    as_json: bool,
    opening: OpenOptions,
) -> int:
    """Hash the active disk and all snapshots of IMAGE, reading what they share once."""
    for algorithm in algorithms:
        new_hasher(algorithm)  # an unknown one is told before anything is read
    if verify is not None and out is not None:
        raise click.UsageError("--manifest and --verify exclude each other")
    disk = options.open_for(image, opening)
    if verify is not None:
        outcome = _verify(disk, read_manifest(verify)["entries"], refs)
        disk.close()
        return outcome
    output = None if out is None or is_stream(out) else OutputFile(out, 0, force=True, inputs=files_of(disk))
    subjects = _subjects(disk, refs, active)
    names = list(dict.fromkeys(algorithms or DEFAULT_ALGORITHMS))
    entries = _entries(subjects, names)
    content = manifest(image, names, entries)
    text_of_manifest = json.dumps(content, indent=4) + "\n"
    if output is not None:
        with ended_by_signals(), output:
            os.write(output.fd, text_of_manifest.encode())
    elif out is not None:
        with open(out, "w", encoding="utf-8") as stream:
            stream.write(text_of_manifest)
    if as_json:
        print(text_of_manifest, end="")
    else:
        print("\n".join(_lines(entries, names)))
    disk.close()
    return 0


def _active(disk: Qcow2Node) -> Subject:
    return Subject(disk.view(None), {"id": None, "name": None, "size": disk.size})


def _snapshot(disk: Qcow2Node, snapshot: SnapshotInfo) -> Subject:
    entry = {"id": text.json_text(snapshot.id), "name": text.json_text(snapshot.name), "size": snapshot.size}
    return Subject(disk.view(snapshot), entry, snapshot)


def _subjects(disk: Qcow2Node, refs: Sequence[str], active: bool) -> list[Subject]:
    """The active disk and every snapshot, unless some are chosen."""
    chosen = [disk.find_snapshot(ref) for ref in refs] if refs or active else list(disk.snapshots())
    first = [_active(disk)] if active or not refs else []
    return first + [_snapshot(disk, snapshot) for snapshot in dict.fromkeys(chosen)]


def _entries(subjects: Sequence[Subject], algorithms: Sequence[str]) -> list[dict[str, Any]]:
    with ended_by_signals(), ProgressBar("digest", sum(subject.view.size for subject in subjects)) as bar:
        results = digests(subjects, algorithms, bar.advance)
    return [{**subject.entry, "digests": result} for subject, result in zip(subjects, results, strict=True)]


def _lines(entries: Sequence[dict[str, Any]], algorithms: Sequence[str]) -> list[str]:
    rows = [
        (entry["id"] or "-", _title(entry), str(entry["size"]), *(entry["digests"][name] for name in algorithms))
        for entry in entries
    ]
    headings = ("ID", "TAG", "SIZE", *(name.upper() for name in algorithms))
    return text.table(headings, rows, left=("ID", "TAG", *headings[3:]))


def _title(entry: dict[str, Any]) -> str:
    return "(active disk)" if entry.get("name") is None else shown(str(entry["name"]))


def _verify(disk: Qcow2Node, entries: Sequence[dict[str, Any]], refs: Sequence[str]) -> int:
    """Compare with the entries of a manifest, those only that -s names if it names any; tell what differs."""
    wanted = {disk.find_snapshot(ref) for ref in refs}
    subjects: list[tuple[Subject, dict[str, Any]]] = []
    differing: list[str] = []
    resized: set[SnapshotInfo | None] = set()
    for entry in entries:
        try:
            subject = _subject_of(disk, entry)
        except SnapshotNotFound as error:
            if not wanted:
                differing.append(f"{_title(entry)}: {error}")
            continue
        if wanted and subject.snapshot not in wanted:
            continue
        if subject.view.size != entry["size"]:
            resized.add(subject.snapshot)
            differing.append(f"{_title(entry)}: size is {subject.view.size}, was {entry['size']}")
        else:
            subjects.append((subject, entry))
    found = {subject.snapshot for subject, _ in subjects}
    differing += [f"{shown(s.name)}: is not in the manifest" for s in sorted(wanted - found - resized)]
    algorithms = list(dict.fromkeys(name for _, entry in subjects for name in entry["digests"]))
    results = _entries([subject for subject, _ in subjects], algorithms)
    for (_, entry), result in zip(subjects, results, strict=True):
        wrong = [name for name, value in entry["digests"].items() if result["digests"][name] != str(value).lower()]
        if wrong:
            differing.append(f"{_title(entry)}: {', '.join(wrong)} differ")
        else:
            print(f"{_title(entry)}: OK")
    for line in differing:
        print(f"{line}")
    return 1 if differing else 0


def _subject_of(disk: Qcow2Node, entry: dict[str, Any]) -> Subject:
    """What an entry of a manifest is about: found by id and name together, as names alone may repeat."""
    if entry.get("id") is None and entry.get("name") is None:
        return _active(disk)
    for snapshot in disk.snapshots():
        if (text.json_text(snapshot.id), text.json_text(snapshot.name)) == (entry.get("id"), entry.get("name")):
            return _snapshot(disk, snapshot)
    raise SnapshotNotFound(f"the image has no snapshot with id {shown(str(entry.get('id')))} and this name")
