"""scripts/conformance-table, by which the table of docs/conformance-kit.md is made."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from qcow2snap.conformance.suite import SUITE_VERSION
from tests.cli.support import here
from tests.support.tools import REPOSITORY, require


def test_reports_become_a_table(tmp_path: Path) -> None:
    require("qemu-img")
    for name, command in (("good", "qemu-img convert -O raw {image} {output}"), ("bad", "cp {image} {output}")):
        run = here("conformance", "run", "--format", "json", "--reader", command, "--cases", "mapping-full")
        (tmp_path / name).write_text(run.stdout)
    words = [f"{name}={tmp_path / name}" for name in ("good", "bad")]
    done = subprocess.run(
        [sys.executable, REPOSITORY / "scripts" / "conformance-table", *words],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines() == [
        "| section | good | bad |",
        "| --- | --- | --- |",
        "| Cluster mapping, Standard Cluster Descriptor | 1/0 | 0/1 |",
        "| **all** | **1/0** | **0/1** |",
        "| `wrong` |  | 1 |",
    ]


def test_the_table_of_the_manual_is_of_this_suite() -> None:
    manual = (REPOSITORY / "docs" / "conformance-kit.md").read_text()
    assert f"suite {SUITE_VERSION} " in " ".join(manual.split())
