"""What a user may write to name a snapshot: found when it is clear, refused when it is not, never guessed."""

from __future__ import annotations

import pytest

from qcow2snap.block.node import SnapshotAmbiguous, SnapshotInfo, SnapshotNotFound
from qcow2snap.block.snapshot_ref import find, shown


def snapshot(id_: str, name: str) -> SnapshotInfo:
    return SnapshotInfo(id_, name, 0, 0, 0, 0, 0, None, position=int(id_) if id_.isdigit() else 0)


WEEKLY, MONDAY, TWO, TWIN_A, TWIN_B = ALL = [
    snapshot("2", "weekly"),
    snapshot("3", "monday"),
    snapshot("5", "2"),
    snapshot("6", "twin"),
    snapshot("7", "twin"),
]


@pytest.mark.parametrize(
    ("ref", "expected"),
    [
        ("weekly", WEEKLY),
        ("name=weekly", WEEKLY),
        ("id=2", WEEKLY),
        ("name=2", TWO),
        ("3", MONDAY),
        ("id=7,name=twin", TWIN_B),
        ("name=twin,id=6", TWIN_A),
        ("snapshot.name=monday", MONDAY),
        ("snapshot.id=6", TWIN_A),
        ("snapshot.id=6,snapshot.name=twin", TWIN_A),
    ],
)
def test_a_clear_reference_finds_its_snapshot(ref: str, expected: SnapshotInfo) -> None:
    assert find(ALL, ref) is expected


def test_an_id_that_is_also_a_name_is_refused_and_both_are_shown() -> None:
    with pytest.raises(SnapshotAmbiguous, match=r'"2" is the id of snapshot "weekly" .* id 5: say id=2 or name=2'):
        find(ALL, "2")


def test_a_name_borne_by_two_is_refused_with_their_ids() -> None:
    with pytest.raises(SnapshotAmbiguous, match=r'2 snapshots fit "twin": id=6 "twin", id=7 "twin"; .* id=ID'):
        find(ALL, "twin")


@pytest.mark.parametrize(("ref", "near"), [("wekly", "weekly"), ("MONDAY", "monday"), ("name=mondy", "monday")])
def test_a_wrong_name_suggests_near_ones(ref: str, near: str) -> None:
    with pytest.raises(SnapshotNotFound, match=f"did you mean '{near}'"):
        find(ALL, ref)


def test_a_name_like_no_other_is_told_what_there_is() -> None:
    with pytest.raises(SnapshotNotFound, match=r"there are 'weekly' \(id 2\)"):
        find(ALL, "xyzzy")


def test_id_and_name_must_both_fit() -> None:
    with pytest.raises(SnapshotNotFound):
        find(ALL, "id=2,name=monday")


def test_an_image_without_snapshots_says_so() -> None:
    with pytest.raises(SnapshotNotFound, match="has no snapshots"):
        find([], "any")


def test_names_with_commas_and_equal_signs_are_names() -> None:
    odd = [snapshot("1", "a,b"), snapshot("2", "x=y"), snapshot("3", "id=9"), snapshot("4", "a,id=b")]
    assert find(odd, "a,b") is odd[0]
    assert find(odd, "x=y") is odd[1]
    assert find(odd, "name=id=9") is odd[2]
    assert find(odd, "id=4,name=a,id=b") is odd[3]


def test_bytes_that_are_no_text_are_shown_escaped_and_found_by_either_form() -> None:
    odd = [snapshot("1", b"caf\xe9".decode("utf-8", "surrogateescape")), snapshot("2", "line\nbreak"), MONDAY]
    assert shown(odd[0].name) == r"caf\xe9"
    assert find(odd, odd[0].name) is odd[0]
    assert find(odd, r"caf\xe9") is odd[0]
    assert find(odd, r"line\nbreak") is odd[1]
