"""Every rule is broken by an image, and kept by the same image before it was changed."""

from __future__ import annotations

from pathlib import Path

import pytest

from qcow2snap.block.file import FileNode
from qcow2snap.block.node import ImageFormatError
from qcow2snap.block.qcow2.rules import RULES
from qcow2snap.conformance.check import Options, check
from tests.conformance.broken import BREAKS, Break


def broken_rules(path: Path) -> set[str]:
    """The ids of all rules that an image breaks, its contents included."""
    file = FileNode(str(path))
    try:
        return {rule.id for rule in check(file, Options(deep=True)).numbers}
    except ImageFormatError as error:
        return {error.rule}
    finally:
        file.close()


def test_no_rule_is_without_an_image() -> None:
    assert [f"QCOW2-{id_}" for id_ in BREAKS] == [rule.id for rule in RULES]


@pytest.mark.parametrize("id_", BREAKS)
def test_a_rule_is_broken_by_one_image_and_kept_by_another(id_: str, tmp_path: Path) -> None:
    case = BREAKS[id_]
    assert f"QCOW2-{id_}" in broken_rules(case.write(tmp_path / "broken"))
    assert f"QCOW2-{id_}" not in broken_rules(Break(case.of).write(tmp_path / "sound"))
