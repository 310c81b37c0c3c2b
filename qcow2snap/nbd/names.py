"""The names by which clients know the snapshots of an image. No protocol and no driver.

Two rules make a name safe to look up: it means one thing or nothing, and it is never guessed at. The prefixes `id=` and
`vmstate:` are ours; a snapshot whose own name begins with one of them is shown by its id, so that no name in an image
can take the place of another snapshot's id or VM state.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cached_property

from qcow2snap.block.node import SnapshotInfo
from qcow2snap.nbd.strings import is_string

ID_PREFIX = "id="
VM_STATE_PREFIX = "vmstate:"


class SnapshotNames:
    """Snapshots by name. Made for an image once, and when it is first asked: a table may have 65,536 entries."""

    def __init__(self, snapshots: Sequence[SnapshotInfo]) -> None:
        self._snapshots = snapshots

    def names(self, prefix: str = "") -> Iterator[tuple[SnapshotInfo, list[str]]]:
        """Each snapshot with the names that are its alone and, behind `prefix`, fit NBD; first the one to show."""
        for info, names in self._own:
            yield info, [name for name in names if is_string(prefix + name)]

    def shown(self, prefix: str = "") -> Iterator[tuple[str, SnapshotInfo]]:
        """The one name to show of each snapshot that has any."""
        for info, names in self.names(prefix):
            if names:
                yield names[0], info

    def find(self, name: str) -> SnapshotInfo | None:
        """The snapshot of exactly this name."""
        return self._by_name.get(name)

    @cached_property
    def _own(self) -> Sequence[tuple[SnapshotInfo, list[str]]]:
        names = Counter(info.name for info in self._snapshots)
        ids = Counter(info.id for info in self._snapshots)
        result = []
        for info in self._snapshots:
            own = []
            if info.name and names[info.name] == 1 and not info.name.startswith((ID_PREFIX, VM_STATE_PREFIX)):
                own.append(info.name)
            if ids[info.id] == 1:
                own.append(ID_PREFIX + info.id)
            result.append((info, own))
        return result

    @cached_property
    def _by_name(self) -> dict[str, SnapshotInfo]:
        return {name: info for info, names in self._own for name in names}
