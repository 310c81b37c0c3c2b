"""Every rule is broken by an image, and kept by the same image before it was changed."""

from __future__ import annotations

from pathlib import Path

import pytest

from fixtures import corpus
from qcow2snap.block.file import FileNode
from qcow2snap.block.graph import open_image
from qcow2snap.block.node import ImageFormatError, Qcow2SnapError
from qcow2snap.block.qcow2.rules import RULES
from qcow2snap.block.snapshot_access import SnapshotAccessNode
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


def raised_rules(path: Path) -> set[str]:
    """The ids that our readers raise when they open an image and read all that it holds."""
    raised = set()
    try:
        node = open_image(str(path))
    except ImageFormatError as error:
        return {error.rule}
    except Qcow2SnapError:
        return set()
    if node.snapshot_table.damage is not None:
        raised.add(node.snapshot_table.damage.rule)
    for disk in (node, *(SnapshotAccessNode(node, info) for info in node.snapshots())):
        for offset in range(0, min(disk.size, 1 << 23), 1 << 16):
            try:
                disk.pread(offset, min(1 << 16, disk.size - offset))
            except ImageFormatError as error:
                raised.add(error.rule)
            except Qcow2SnapError:
                break
    try:
        for name in node.dirty_bitmaps():
            list(node.dirty_extents(name, 0, node.size))
    except ImageFormatError as error:
        raised.add(error.rule)
    node.close()
    return raised


def test_what_readers_raise_the_checker_finds(tmp_path: Path) -> None:
    corpus.lay_out(tmp_path)
    seen = set()
    for id_, case in BREAKS.items():
        if id_ != "REF-012":
            path = case.write(tmp_path / f"{id_}.qcow2")
            raised = raised_rules(path)
            assert raised <= broken_rules(path), id_
            seen |= raised
    assert len(seen) >= 20
