"""Access to the internal snapshots of qcow2 disk images.

>>> import qcow2snap
>>> with qcow2snap.open("fixtures/images/demo.qcow2") as image:
...     print([snapshot.name for snapshot in image.snapshots])
['monday', 'tuesday', 'before-upgrade']
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from qcow2snap.block.node import (
        Change,
        ChangedExtent,
        Extent,
        FileError,
        ImageFormatError,
        ImageInUse,
        OutOfRange,
        Qcow2SnapError,
        ReferenceRefused,
        SnapshotAmbiguous,
        SnapshotGone,
        SnapshotInfo,
        SnapshotNotFound,
        UnsupportedFeature,
    )
    from qcow2snap.image import Disk, Image, Snapshot, open  # noqa: A004

__all__ = [
    "Change",
    "ChangedExtent",
    "Disk",
    "Extent",
    "FileError",
    "Image",
    "ImageFormatError",
    "ImageInUse",
    "OutOfRange",
    "Qcow2SnapError",
    "ReferenceRefused",
    "Snapshot",
    "SnapshotAmbiguous",
    "SnapshotGone",
    "SnapshotInfo",
    "SnapshotNotFound",
    "UnsupportedFeature",
    "open",
]


def __getattr__(name: str) -> Any:
    """What is exported is imported when first used, so that `import qcow2snap` stays cheap (PEP 562)."""
    import importlib

    if name in __all__:
        home = "qcow2snap.image" if name in ("Disk", "Image", "Snapshot", "open") else "qcow2snap.block.node"
        return getattr(importlib.import_module(home), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
