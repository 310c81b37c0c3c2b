"""The declarations of the rules, and the page that is made from them."""

from __future__ import annotations

import re

from qcow2snap.block.qcow2.rules import RULES
from qcow2snap.conformance.rule_list import page
from tests.support.tools import REPOSITORY

SECTIONS = {  # of docs/interop/qcow2.rst, and what is QEMU's own
    "General", "Header", "Additional fields", "Header padding", "Header extensions", "String header extensions",
    "Feature name table", "Bitmaps extension", "Full disk encryption header pointer", "Data encryption",
    "Host cluster management", "Cluster mapping", "Extended L2 Entries", "Snapshots", "Bitmaps", "Bitmap directory",
    "Bitmap table", "Bitmap data", "QEMU",
}  # fmt: skip


def test_ids_are_unique_and_of_one_form() -> None:
    ids = [rule.id for rule in RULES]
    assert len(set(ids)) == len(ids)
    assert all(re.fullmatch(r"QCOW2-(HDR|EXT|REF|L1|L2|CMP|DATA|CRYPT|SNAP|BMP)-\d{3}", id_) for id_ in ids)


def test_each_rule_is_one_sentence_of_a_section() -> None:
    for rule in RULES:
        assert rule.section in SECTIONS
        assert rule.sentence.endswith(".")
        assert rule.sentence.count(". ") == 0


def test_the_page_of_the_rules_is_current() -> None:
    written = (REPOSITORY / "docs" / "rules.md").read_text()
    assert written == page(), "python -m qcow2snap.conformance.rule_list > docs/rules.md"
