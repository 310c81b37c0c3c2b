"""What holds for the whole repository: the order of the rooms, cheap imports, and examples that run."""

from __future__ import annotations

import doctest
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.tools import REPOSITORY


def modules_after(statement: str) -> set[str]:
    """The modules that are loaded after a statement in a fresh Python."""
    code = f"import sys; {statement}; print('\\n'.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    return set(done.stdout.split("\n"))


def test_the_rooms_import_downward_only() -> None:
    lint_imports = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([lint_imports], cwd=REPOSITORY, capture_output=True, text=True, env={"PYTHONPATH": "."})
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import qcow2snap", {"numpy", "click", "rich", "construct"}),
        ("import qcow2snap.block.node", {"numpy", "click", "rich", "construct"}),
        ("import qcow2snap.cli", {"numpy", "rich", "construct"}),
        ("import qcow2snap.cli.list", {"numpy", "rich"}),
        ("import qcow2snap.image", {"numpy", "click", "rich"}),
        ("import qcow2snap.nbd.server", {"click", "rich"}),
        ("import qcow2snap.conformance.suite.cases", {"numpy", "click", "rich"}),
    ],
)
def test_nothing_heavy_is_loaded_before_it_is_needed(statement: str, absent: set[str]) -> None:
    assert not modules_after(statement) & absent


def test_the_examples_of_the_readme_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    result = doctest.testfile(str(REPOSITORY / "README.md"), module_relative=False)
    assert result.attempted > 5
    assert result.failed == 0


def test_the_example_of_the_package_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    import qcow2snap

    monkeypatch.chdir(REPOSITORY)
    assert doctest.testmod(qcow2snap).failed == 0
