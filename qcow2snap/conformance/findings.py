"""What is found: one value for each fault, and the collector, which counts all and keeps the first of each rule."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from qcow2snap.block.node import ImageFormatError
from qcow2snap.block.qcow2.rules import RULES, Rule
from qcow2snap.block.snapshot_ref import shown

_SHORT = 80  # characters of a name
KEPT = 1000  # findings of one rule that are kept; the others are counted


def short(name: str) -> str:
    """A name of the image, which may have 64 KiB of anything, for a line of text."""
    return shown(name if len(name) <= _SHORT else name[:_SHORT] + "…")


class L2Place(NamedTuple):
    """An L2 entry: where its table is, and which entry of it. Whose it is, and where for the guest, is found later."""

    table_offset: int
    column: int


class Finding(NamedTuple):
    """One fault.

    host_offset   byte of the image file where it is
    times         how often qemu-img counts it: an L2 entry is checked again for each state that has its table; 0 for
                  what it does not see
    states        numbers of the states it touches (0 is the active disk, then the snapshots in the table's order)
    guest_offset  byte of their disk, or of their VM state, from which on data is concerned
    in_vm_state   whether that is the VM state
    stops         QEMU refuses the image for it, or ends its check: the check is not complete (qemu-img's check-errors)
    """

    rule: Rule
    host_offset: int
    message: str
    times: int = 1
    states: tuple[int, ...] = ()
    guest_offset: int | None = None
    in_vm_state: bool = False
    stops: bool = False
    place: L2Place | None = None


class Findings:
    """Collects findings. Not for several threads."""

    def __init__(self) -> None:
        self.kept: list[Finding] = []
        self.numbers: Counter[Rule] = Counter()  # findings of each rule, kept or not
        self.times: Counter[Rule] = Counter()  # as qemu-img counts them; without those that stop it
        self.unseen: Counter[Rule] = Counter()  # those that qemu-img does not see
        self.nb_stops = 0
        self.problems: list[str] = []  # what could not be read, a line each

    def add(self, finding: Finding) -> None:
        self._count(finding.rule, 1, finding.times, finding.times == 0, finding.stops)
        if self.numbers[finding.rule] <= KEPT:
            self.kept.append(finding)

    def add_error(self, error: ImageFormatError, *, stops: bool, states: tuple[int, ...] = ()) -> None:
        """What a reader raises."""
        self.add(Finding(_BY_ID[error.rule], error.host_offset, error.message, states=states, stops=stops))

    def add_each(self, rule: Rule, times: Sequence[int] | int, number: int, make: Callable[[int], Finding]) -> None:
        """`number` findings of one rule, of which only those that are kept are made: make(index)."""
        if not number:
            return
        room = max(0, KEPT - self.numbers[rule])
        total = times * number if isinstance(times, int) else int(sum(times))
        self._count(rule, number, total, 0 if total else number)
        self.kept.extend(make(index) for index in range(min(number, room)))

    def replace(self, kept: Iterable[Finding]) -> None:
        """The same findings, with more known of them."""
        self.kept = list(kept)

    def _count(self, rule: Rule, number: int, times: int, unseen: int, stops: bool = False) -> None:
        self.numbers[rule] += number
        self.unseen[rule] += unseen
        if stops:
            self.nb_stops += times
        else:
            self.times[rule] += times


_BY_ID = {rule.id: rule for rule in RULES}
