"""What a user may write to name a snapshot, and which snapshot that is. Ambiguity is an error, never a guess."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from qcow2snap.block.node import SnapshotAmbiguous, SnapshotInfo, SnapshotNotFound

_SHOWN = 10  # names in an error message


class SnapshotRef(NamedTuple):
    """A parsed reference: `bare` may be a name or an id. Names fit as they are and as they are shown."""

    bare: str | None = None
    id: str | None = None
    name: str | None = None

    def fits(self, snapshot: SnapshotInfo) -> bool:
        if self.bare is not None:
            return self.bare in (snapshot.id, snapshot.name, shown(snapshot.id), shown(snapshot.name))
        return (self.id is None or self.id in (snapshot.id, shown(snapshot.id))) and (
            self.name is None or self.name in (snapshot.name, shown(snapshot.name))
        )


def parse(ref: str) -> SnapshotRef:
    """NAME, name=NAME, id=ID, id=ID,name=NAME; QEMU's snapshot.id= and snapshot.name= are the same.

    As in QEMU's own option strings, a name that comes with an id goes up to the end or to `,id=`.
    """
    key, equals, value = ref.partition("=")
    key = key.removeprefix("snapshot.")
    if not equals or key not in ("id", "name"):
        return SnapshotRef(bare=ref)
    other = "name" if key == "id" else "id"
    for separator in (f",{other}=", f",snapshot.{other}="):
        first, found, second = value.partition(separator) if key == "id" else value.rpartition(separator)
        if found:
            return SnapshotRef(**{key: first, other: second})
    return SnapshotRef(**{key: value})


def find(snapshots: Sequence[SnapshotInfo], ref: str | None) -> SnapshotInfo:
    """The one snapshot that `ref` names. A snapshot whose very name looks like `id=3` is found by name=id=3."""
    if ref is None:
        if len(snapshots) == 1:
            return snapshots[0]
        kind, what = (SnapshotAmbiguous, "say which one") if snapshots else (SnapshotNotFound, "there is none")
        raise kind(f"no snapshot was named, and there are {len(snapshots)}: {what}")
    parsed = parse(ref)
    fitting = [snapshot for snapshot in snapshots if parsed.fits(snapshot)]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise SnapshotAmbiguous(_ambiguous(ref, parsed, fitting))
    raise SnapshotNotFound(_not_found(ref, parsed, snapshots))


def shown(text: str) -> str:
    """A name or id for people: bytes that are not UTF-8, and control characters, escaped as \\xNN."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in json_text(text))


def json_text(text: str) -> str:
    """A name for JSON, which can hold all but bytes that are not UTF-8: these escaped as \\xNN."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _ambiguous(ref: str, parsed: SnapshotRef, fitting: list[SnapshotInfo]) -> str:
    by_id = [s for s in fitting if s.id == parsed.bare]
    by_name = [s for s in fitting if s.name == parsed.bare]
    if len(by_id) == 1 and len(by_name) == 1:
        return (
            f'"{shown(ref)}" is the id of snapshot "{shown(by_id[0].name)}" and the name of the snapshot with id '
            f"{shown(by_name[0].id)}: say id={shown(ref)} or name={shown(ref)}"
        )
    listed = ", ".join(f'id={shown(s.id)} "{shown(s.name)}"' for s in fitting[:_SHOWN])
    more = f" and {len(fitting) - _SHOWN} more" if len(fitting) > _SHOWN else ""
    if len({s.id for s in fitting}) == len(fitting):
        return f'{len(fitting)} snapshots fit "{shown(ref)}": {listed}{more}; say which with id=ID'
    return f'{len(fitting)} snapshots fit "{shown(ref)}", and they share their id: {listed}{more}'


def _not_found(ref: str, parsed: SnapshotRef, snapshots: Sequence[SnapshotInfo]) -> str:
    if not snapshots:
        return f'no snapshot "{shown(ref)}": the image has no snapshots'
    from difflib import get_close_matches  # only when there is something to suggest

    wanted = parsed.bare or parsed.name or parsed.id or ""
    near = get_close_matches(wanted, [s.name for s in snapshots], n=3, cutoff=0.5)
    near += [s.name for s in snapshots if s.name.lower() == wanted.lower() and s.name not in near]
    if near:
        return f'no snapshot "{shown(ref)}"; did you mean {" or ".join(f"{shown(n)!r}" for n in near)}?'
    listed = ", ".join(f"{shown(s.name)!r} (id {shown(s.id)})" for s in snapshots[:_SHOWN])
    more = f" and {len(snapshots) - _SHOWN} more" if len(snapshots) > _SHOWN else ""
    return f'no snapshot "{shown(ref)}"; there are {listed}{more}'
