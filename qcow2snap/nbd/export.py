"""What a server offers: exports, each with its name, its node and its contexts. No protocol and no driver."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import cached_property
from typing import Protocol

from qcow2snap.block.frozen_bitmap import FrozenBitmap
from qcow2snap.block.node import BlockNode, NBDError, SnapshotAccess, SnapshotInfo, SnapshotNotFound
from qcow2snap.block.snapshot_access import SnapshotAccessNode
from qcow2snap.nbd.contexts import Contexts
from qcow2snap.nbd.file_map import FileMap
from qcow2snap.nbd.names import VM_STATE_PREFIX, SnapshotNames
from qcow2snap.nbd.strings import is_string

logger = logging.getLogger(__name__)


class Client(Protocol):
    """A connection, as far as an export has to do with it."""

    def cut_off(self) -> None: ...


class Clients:
    """The connections that use an export. Any thread may call anything here."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._clients: set[Client] = set()
        self._closed = False
        self._when_gone: Callable[[], None] | None = None

    def __len__(self) -> int:
        return len(self._clients)

    def enter(self, client: Client) -> bool:
        """False if the export is there for nobody any more."""
        with self._lock:
            if not self._closed:
                self._clients.add(client)
            return not self._closed

    def leave(self, client: Client) -> None:
        with self._lock:
            self._clients.discard(client)
            gone = self._when_gone if not self._clients else None
        if gone is not None:
            gone()

    def close(self, *, only_if_unused: bool = False, when_gone: Callable[[], None] | None = None) -> bool:
        """Let nobody in any more, and cut off who is. `when_gone` is called by the last one to leave, or now.

        False, and all is as it was, if it is used and is to be closed `only_if_unused`.
        """
        with self._lock:
            if only_if_unused and self._clients:
                return False
            self._closed = True
            left = [*self._clients]
            self._when_gone = when_gone
        for client in left:
            client.cut_off()
        if not left and when_gone is not None:
            when_gone()
        return True


@dataclass(frozen=True)
class Export:
    """One thing to be read over NBD.

    name      as LIST shows it; "" is the default export
    open      gives the node; called when a client first asks, so that what is damaged fails alone
    threads   any, at any time
    owns      nothing: whoever made the image's node closes it, and with it what `open` gave
    """

    name: str
    open: Callable[[], BlockNode]
    description: str = ""
    preferred_block_size: int = 4096  # bytes, a power of 2
    snapshots: SnapshotNames | None = None  # with which the node can be compared
    may_trim: bool = False  # a read-only node: the reader may say what it needs no more
    bitmaps: Mapping[str, FrozenBitmap] = field(default_factory=dict)  # shown as well, by the names of contexts
    dirty_bitmaps: Sequence[str] | None = None  # those of the node that are shown; None: all
    clients: Clients = field(default_factory=Clients, compare=False)

    @cached_property
    def node(self) -> BlockNode:
        return self.open()

    @cached_property
    def contexts(self) -> Contexts:
        """What can be told of the node in BLOCK_STATUS."""
        return Contexts(self.node, self.snapshots, self.bitmaps, self.dirty_bitmaps)

    @cached_property
    def file_map(self) -> FileMap:
        """Where the bytes of the node lie, for all its connections."""
        return FileMap(self.node)


class Exports:
    """All exports of a server, in the order of LIST, and the further names that they answer to. Immutable."""

    def __init__(self, listed: Iterable[Export], aliases: Iterable[tuple[str, Export]] = ()) -> None:
        self._listed = tuple(listed)
        self._by_name = dict(aliases) | {export.name: export for export in self._listed}

    def __iter__(self) -> Iterator[Export]:
        return iter(self._listed)

    def __len__(self) -> int:
        return len(self._listed)

    def find(self, name: str) -> Export | None:
        """The export of exactly this name."""
        return self._by_name.get(name)

    def under(self, prefix: str) -> Iterator[tuple[Export, list[str]]]:
        """Each export as PREFIX/NAME, the default one as PREFIX, and all names that it answers to then."""
        names: dict[int, list[str]] = {id(export): [] for export in self._listed}
        for name, export in self._by_name.items():
            full = f"{prefix}/{name}" if name else prefix
            if is_string(full):
                names[id(export)].append(full)
        for export in self._listed:
            own = names[id(export)]
            if own:
                yield replace(export, name=own[0]), own
            else:
                logger.warning("%a under %a is too long for a name: not exported", export.name, prefix)


class LiveExports(Exports):
    """Exports that come and go while clients look; those who use one that goes have to be seen to by its `clients`.

    threads  add() and remove() from one, all else from any
    """

    def __init__(self) -> None:
        super().__init__(())

    def add(self, export: Export) -> None:
        self._by_name = self._by_name | {export.name: export}
        self._listed = (*self._listed, export)

    def remove(self, export: Export) -> None:
        self._listed = tuple(each for each in self._listed if each is not export)
        self._by_name = {each.name: each for each in self._listed}


def exports_of(image: BlockNode, *, snapshot: str | None = None, active: bool = True) -> Exports:
    """The exports of an image: its active disk as the default one, and each snapshot and VM state under its name.

    `snapshot` (NAME, id=ID or both) makes that one the default export, and the only one. Without `active` there is no
    default export: the disk of an image in use changes while it is read. A snapshot whose name and id are both another
    one's too cannot be told from it: it is left out, and the log says so.
    """
    if snapshot is not None:
        if not isinstance(image, SnapshotAccess):
            raise SnapshotNotFound(f'there is no snapshot "{snapshot}": this format has none')
        return Exports([_disk(image, image.find_snapshot(snapshot), "", SnapshotNames(image.snapshots()))])
    snapshots = SnapshotNames(image.snapshots() if isinstance(image, SnapshotAccess) else ())
    listed = [Export("", lambda: image, "active disk", snapshots=snapshots)] if active else []
    aliases: list[tuple[str, Export]] = []
    if isinstance(image, SnapshotAccess):
        for info, names in snapshots.names():
            if not names:
                logger.warning("snapshot %a shares its name and its id with others: not exported", str(info))
                continue
            listed.append(_disk(image, info, names[0], snapshots))
            aliases += [(name, listed[-1]) for name in names]
        for info, names in snapshots.names(VM_STATE_PREFIX):
            if info.vm_state_size > 0 and names:
                listed.append(_vm_state(image, info, VM_STATE_PREFIX + names[0]))
                aliases += [(VM_STATE_PREFIX + name, listed[-1]) for name in names]
    return Exports(listed, aliases)


def joined(images: Iterable[tuple[str, Exports]]) -> Exports:
    """The exports of several images, each with its own prefix.

    No prefix has a slash in it. So a name with a slash is in the image that is named before the first one, under the
    name that stands behind it, whatever is in that; and one without is an image's default export.
    """
    listed: list[Export] = []
    aliases: list[tuple[str, Export]] = []
    prefixes = set()
    for prefix, exports in images:
        if not prefix or "/" in prefix or prefix in prefixes or not is_string(prefix):
            raise NBDError(f"{prefix!a} cannot be the prefix of an image's exports: it has to be unique, without slash")
        prefixes.add(prefix)
        for export, names in exports.under(prefix):
            listed.append(export)
            aliases += [(name, export) for name in names]
    return Exports(listed, aliases)


def prefix_of(filename: str) -> str:
    """The prefix of an image's exports, if nothing else is said: its file's name without ".qcow2"."""
    return os.path.basename(filename).removesuffix(".qcow2")


def _disk(image: SnapshotAccess, info: SnapshotInfo, name: str, snapshots: SnapshotNames) -> Export:
    description = f"disk of {_described(info)}, {info.size} bytes"
    return Export(name, lambda: SnapshotAccessNode(image, info), description, snapshots=snapshots)


def _vm_state(image: SnapshotAccess, info: SnapshotInfo, name: str) -> Export:
    description = f"VM state of {_described(info)}, {info.vm_state_size} bytes"
    return Export(name, lambda: image.vm_state(info), description)


def _described(info: SnapshotInfo) -> str:
    """For a human being, from a table that anybody may have written: short, and printable UTF-8."""
    date = datetime.fromtimestamp(info.date_sec, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")  # 32 bits: always a date
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(info)[:256])
    return f"snapshot {text} of {date}"
