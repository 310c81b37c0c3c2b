"""The rules as a page of documentation. `python -m qcow2snap.conformance.rule_list > docs/rules.md` writes it anew."""

from __future__ import annotations

from itertools import groupby

from qcow2snap.block.qcow2.rules import RULES, Rule

_GROUPS = {
    "HDR": "The header",
    "EXT": "Header extensions",
    "REF": "Refcounts",
    "L1": "L1 tables",
    "L2": "L2 tables",
    "CMP": "Compressed clusters",
    "DATA": "External data file",
    "CRYPT": "Encryption",
    "SNAP": "Snapshots",
    "BMP": "Bitmaps",
}

_INTRODUCTION = """\
# The rules that `qcow2snap check` goes by

Made from qcow2snap/block/qcow2/rules.py, which the readers raise their errors from; do not edit.

Sections are those of QEMU's docs/interop/qcow2.rst; "QEMU" stands for a limit or habit of QEMU's that the specification
mentions in a note or not at all. A *corruption* puts data at risk, and a *leak* wastes space: these two are what
`qemu-img check` counts, and what decides the exit code. A *violation* breaks the specification without putting the data
that is there at risk. *Advice* is about what is allowed, and worth knowing.
"""


def page() -> str:
    parts = [_INTRODUCTION]
    for group, rules in groupby(RULES, _group):
        parts.append(f"\n## {_GROUPS[group]}\n\n| Rule | Severity | What has to be | Section |\n|---|---|---|---|\n")
        parts.extend(f"| {r.id} | {r.severity.value} | {r.sentence} | {r.section} |\n" for r in rules)
    return "".join(parts)


def _group(rule: Rule) -> str:
    return rule.id.split("-")[1]


if __name__ == "__main__":
    print(page(), end="")
