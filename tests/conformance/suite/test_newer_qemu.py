"""A newer QEMU (.peers) finds in the suite what the system's does."""

from __future__ import annotations

import json
import os

import pytest

from tests.cli.support import here
from tests.support.tools import REPOSITORY, require

NEWER = REPOSITORY / ".peers" / "bin"
# Without refuse-backing-loop, which QEMU takes up to a minute for.
PATTERNS = ("snapshot-*", "extended-*", "data-file*", "zstd-*", "deflate-*", "backing-*", "refuse-*[!p]")


@pytest.mark.slow
def test_a_newer_qemu_fails_where_the_systems_does(monkeypatch: pytest.MonkeyPatch) -> None:
    require("qemu-img")
    if not (NEWER / "qemu-img").exists():
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)("make test gets the newer peers; see .peers")
    system = failures()
    monkeypatch.setenv("PATH", f"{NEWER}:{os.environ['PATH']}")
    assert failures() == system
    assert len(system) > 10


def failures() -> set[tuple[str, str | None, str]]:
    cases = [word for pattern in PATTERNS for word in ("--cases", pattern)]
    report = json.loads(here("conformance", "run", "--adapter", "qemu-img", "--format", "json", *cases).stdout)
    return {
        (check["case"], check["snapshot"], check["failure"])
        for check in report["checks"]
        if check["outcome"] == "failed"
    }
