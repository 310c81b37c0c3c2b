"""The recorded suite: of every case its sections, the digests of its files, and what is expected; without building it.

`python -m qcow2snap.conformance.suite.manifest` writes manifest.json anew, for a new SUITE_VERSION.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qcow2snap.conformance.suite import SUITE_VERSION
from qcow2snap.conformance.suite.values import Case

PATH = Path(__file__).with_name("manifest.json")


def read_manifest() -> dict[str, Any]:
    """Cases by name, under "cases"; "version" is the suite's."""
    manifest: dict[str, Any] = json.loads(PATH.read_text())
    return manifest


def record(case: Case) -> dict[str, Any]:
    """What the manifest says of a case: all but the maps, which `conformance show` has."""
    fields = case.json(case.build())
    for disk in fields["disks"]:
        disk.pop("map", None)
    return fields


def main() -> None:
    from qcow2snap.conformance.suite.registry import all_cases

    cases = {case.name: record(case) for case in all_cases()}
    PATH.write_text(json.dumps({"version": SUITE_VERSION, "cases": cases}, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
