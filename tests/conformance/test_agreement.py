"""Our check says of every image of the corpus what qemu-img's says, or it is known why not."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import pytest

from fixtures import corpus
from fixtures.corpus import Specimen
from tests.conformance.agreement import DOCUMENT, Disagreement, compare, explain, render, table
from tests.conformance.broken import Break, extension
from tests.conformance.crashes import CRASHES, Crash
from tests.conformance.disagreements import REASONS
from tests.conformance.verdict import Verdict, by_qemu, by_us

GROUPS: dict[str, list[Specimen]] = defaultdict(list)
for _each in corpus.specimens():
    GROUPS[_each.of if _each.faults else "as they are"].append(_each)
GROUPS |= {f"random faults, seed {seed}": list(corpus.random_specimens(seed, 150)) for seed in (1, 2)}


@pytest.mark.parametrize("group", GROUPS)
def test_the_verdict_is_qemus_or_it_is_known_why_not(group: str, tmp_path: Path) -> None:
    found = {row.name: row for row in compare(GROUPS[group], tmp_path)}
    if group.startswith("random"):
        assert [row for row in found.values() if not row.reasons] == []
    else:
        names = {each.name for each in GROUPS[group]}
        assert found == {row.name: row for row in table() if row.name in names}


# What QEMU does not open for reasons that no single field of the corpus gives.
BY_HAND = {
    "too little room for an end marker": Break(
        "sound", {"header.backing_file_offset": 0x77, "header.backing_file_size": 1}, {0x70: bytes(8)}
    ),
    "an end marker that the file's end cuts": Break("sound", bytes_at={0x70: bytes(4) + b"\xff\xff"}, size=0x76),
    "a second backing format that is too long": Break(
        "sound", bytes_at={0x70: extension(0xE2792ACA, b"raw") + extension(0xE2792ACA, b"q" * 16)}
    ),
    "a bitmap of a disk without a whole sector": Break("bitmaps", {"header.size": 36}),
}


@pytest.mark.parametrize("case", BY_HAND.values(), ids=BY_HAND)
def test_what_qemu_does_not_open_stops_its_check(case: Break, tmp_path: Path) -> None:
    path = case.write(tmp_path / "image.qcow2")
    assert (by_qemu(path).state, by_us(path).state) == ("stops", "stops")


@pytest.mark.parametrize("crash", CRASHES, ids=lambda crash: crash.name)
def test_what_a_killed_writer_left_is_judged_as_qemu_judges_it(crash: Crash, tmp_path: Path) -> None:
    for path in crash.images(tmp_path):
        qemu, ours = by_qemu(path), by_us(path)
        assert ours.is_same(qemu, counted=True), f"{path.name}: QEMU {qemu}, we {ours}"


def test_every_disagreement_is_of_the_corpus_and_has_a_reason_and_every_reason_is_needed() -> None:
    rows = table()
    assert {row.name for row in rows} <= {each.name for each in corpus.specimens()}
    assert all(row.reasons for row in rows)
    assert {key for row in rows for key in row.reasons} == REASONS.keys()


def test_the_page_shows_the_table() -> None:
    number = sum(1 for _ in corpus.specimens())
    version = DOCUMENT.read_text().partition("QEMU (")[2].partition(")")[0]
    assert DOCUMENT.read_text() == render(table(), number, version)


def test_a_disagreement_is_explained_by_what_we_found_alone() -> None:
    """Where QEMU finds nothing and we find a corruption that no reason is about, there is none."""
    unseen = Verdict("corruptions", 1, found={("QCOW2-REF-013", False): (1, 0)})
    counted = Verdict("corruptions", 1, found={("QCOW2-REF-007", False): (1, 1)})
    clean = Verdict("clean")
    assert explain(clean, unseen, counted=True) == ("overlap",)
    assert explain(clean, counted, counted=True) == ()
    assert explain(Verdict("leaks", 0, 1), unseen, counted=True) == ()
    assert explain(Verdict("stops", said="Could not open backing file"), clean, counted=True) == ("backing-file",)
    assert explain(Verdict("stops", said="anything else"), clean, counted=True) == ()


def test_a_row_of_the_table_reads_back() -> None:
    assert all(isinstance(row, Disagreement) and row.qemu != row.ours for row in table())
