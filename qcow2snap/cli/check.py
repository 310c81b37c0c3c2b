"""`qcow2snap check`: an image against the specification. Exit codes and JSON fields are those of qemu-img check."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from qcow2snap import __version__
from qcow2snap.block.file import FileNode, Locking
from qcow2snap.block.node import ImageFormatError
from qcow2snap.block.qcow2.rules import RULES
from qcow2snap.block.snapshot_ref import find, json_text
from qcow2snap.cli import options
from qcow2snap.cli.progress import ProgressBar
from qcow2snap.cli.signals import ended_by_signals

if TYPE_CHECKING:
    from qcow2snap.conformance.check import Report

NOT_SUPPORTED = 63  # the format has no checks
_FORMATS = ("text", "json", "sarif", "junit")


@click.command("check")
@click.argument("image", metavar="IMAGE", required=False)
@click.option("-s", "--snapshot", "-l", "snapshot", metavar="REF", help="Only what touches this snapshot.")
@click.option("--quick", is_flag=True, help="Structures only: no L2 table is read, and no refcount compared.")
@click.option("--deep", is_flag=True, help="Decompress every compressed cluster, and read every data cluster.")
@click.option("--format", "form", type=click.Choice(_FORMATS), default="text", help="[default: text]")
@click.option("--max-findings", type=click.IntRange(min=0), metavar="N", help="Tell N single findings at most.")
@click.option("--rules", "list_rules", is_flag=True, help="List the rules, and check nothing.")
@options.json_option
@options.force_share_option
def command(
    image: str | None,
    snapshot: str | None,
    quick: bool,
    deep: bool,
    form: str,
    max_findings: int | None,
    list_rules: bool,
    as_json: bool,
    force_share: bool,
) -> int:
    """Check IMAGE against the qcow2 specification, rule by rule. The image is never written.

    Exit code as of qemu-img check: 0 no errors, 2 corruptions, 3 leaks only, 1 could not check, 63 not a format that
    can be checked. Violations that put no data at risk, and advice, are told, and leave it 0.
    """
    form = "json" if as_json else form
    if list_rules:
        _list_rules(form)
        return 0
    if image is None:
        raise click.UsageError("Missing argument 'IMAGE'.")
    if quick and deep:
        raise click.UsageError("--quick and --deep exclude each other")
    return _check(image, snapshot, quick, deep, form, max_findings, force_share)


def _check(
    image: str, snapshot: str | None, quick: bool, deep: bool, form: str, most: int | None, force_share: bool
) -> int:
    from qcow2snap.conformance.check import Options, check

    file = FileNode(image, locking=Locking.NONE if force_share else Locking.DATA)
    try:
        with ended_by_signals(), ProgressBar("check", 0) as bar:
            report = check(file, Options(quick, deep, bar.expect, bar.advance))
    except ImageFormatError as error:
        error.filename = image
        print(f"qcow2snap: {error}", file=sys.stderr)
        return NOT_SUPPORTED
    finally:
        file.close()
    if snapshot is not None:
        chosen = find([info for info in report.states if info is not None], snapshot)
        report = report.about(report.states.index(chosen))
    _print(report, form, most)
    if report.check_errors:
        stopping = next((finding for finding in report.findings if finding.stops), None)
        why = report.problems[0] if stopping is None else f"{stopping.message} ({stopping.rule.id})"
        print(f"qcow2snap: {image}: the check is not complete: {json_text(why)}", file=sys.stderr)
    return report.exit_code


def _print(report: Report, form: str, most: int | None) -> None:
    if form == "text":
        from qcow2snap.conformance import report_text

        print("\n".join(report_text.lines(report, report_text.WORST if most is None else most)))
    elif form == "json":
        import json

        from qcow2snap.conformance.report_json import report_fields

        print(json.dumps(report_fields(report, most), indent=4))
    elif form == "sarif":
        import json

        from qcow2snap.conformance.report_sarif import sarif_log

        print(json.dumps(sarif_log(report, __version__, most), indent=2))
    else:
        from qcow2snap.conformance.report_junit import junit

        print(junit(report, most))


def _list_rules(form: str) -> None:
    if form == "json":
        import json

        from qcow2snap.conformance.report_json import all_rules

        print(json.dumps(all_rules(), indent=4))
    else:
        from qcow2snap.cli import text

        headings = ("RULE", "SEVERITY", "SECTION", "SENTENCE")
        rows = [(rule.id, rule.severity.value, rule.section, rule.sentence) for rule in RULES]
        print("\n".join(text.table(headings, rows, left=headings)))
