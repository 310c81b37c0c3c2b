"""What of the header changes while an image is written: feature bits, and where tables are. Each change is one write.

The fields that change together lie in one sector, and are written by one call: they are old or new as a whole.
"""

from __future__ import annotations

import logging
import threading

from formats.qcow2 import AutoclearFeature, IncompatibleFeature
from qcow2snap.block.node import ImageFormatError, Qcow2SnapError, UnsupportedFeature
from qcow2snap.block.qcow2 import rules
from qcow2snap.block.qcow2.header import ImageHeader
from qcow2snap.block.qcow2.writing.image_file import ImageFile

logger = logging.getLogger(__name__)

SIZE_OFFSET = 24  # 8 bytes
_INCOMPATIBLE_OFFSET = 72
_AUTOCLEAR_OFFSET = 88
_KNOWN_AUTOCLEAR = int(AutoclearFeature.BITMAPS | AutoclearFeature.RAW_EXTERNAL_DATA)


class HeaderState:
    """The feature bits of an image that is written, in memory and in the file.

    threads  any
    errors   FileError; what is_corrupt says, from prepare()
    """

    def __init__(self, file: ImageFile, header: ImageHeader) -> None:
        self._file = file
        self._version = header.version
        self._incompatible = int(header.incompatible_features)
        self._autoclear = header.autoclear_features
        self._lock = threading.Lock()
        self._broken: Qcow2SnapError | None = None

    def check(self) -> None:
        """Raise what made the image corrupt, if anything has."""
        if self._broken is not None:
            raise self._broken

    @property
    def may_be_written(self) -> bool:
        return self._broken is None

    def clear_unknown_autoclear(self) -> None:
        """As the specification asks of a writer that does not know what these bits stand for."""
        with self._lock:
            known = self._autoclear & _KNOWN_AUTOCLEAR
            if known != self._autoclear and self._version >= 3:
                self._write(_AUTOCLEAR_OFFSET, known)
                self._file.flush()
                self._autoclear = known

    def clear_dirty(self) -> None:
        """Say that the refcounts on disk are right."""
        with self._lock:
            self._set_incompatible(self._incompatible & ~int(IncompatibleFeature.DIRTY))

    def corrupt(self, host_offset: int, what: str) -> ImageFormatError:
        """Mark the image corrupt, for a write that would have destroyed it; gives the error that tells of it.

        No write succeeds from then on. Version 2 has no such mark.
        """
        error = rules.METADATA_OVERLAP.broken(host_offset, what)
        error.filename = self._file.filename
        with self._lock:
            if self._broken is None:
                self._broken = error
                logger.error("%s; it is marked corrupt and written no more: qemu-img check -r all", error)
                try:
                    self._set_incompatible(self._incompatible | int(IncompatibleFeature.CORRUPT))
                except Qcow2SnapError as failure:
                    logger.error("%s", failure)
        return error

    def give_up(self, error: Qcow2SnapError) -> None:
        """Refuse all changes from now on: what the file is, is not known any more."""
        with self._lock:
            self._broken = self._broken or error

    def _set_incompatible(self, features: int) -> None:
        if self._version >= 3 and features != self._incompatible:
            self._write(_INCOMPATIBLE_OFFSET, features)
            self._file.flush()
            self._incompatible = features

    def _write(self, offset: int, value: int) -> None:
        self._file.pwritev(offset, [memoryview(value.to_bytes(8, "big"))])


def refuse_unwritable(header: ImageHeader, filename: str) -> None:
    """UnsupportedFeature for an image that can be read, but must not be written."""
    if header.incompatible_features & IncompatibleFeature.CORRUPT:
        raise UnsupportedFeature(
            f"{filename}: is marked corrupt and cannot be written; repair it with qemu-img check -r all"
        )
    if header.crypt_method:
        method = header.crypt_method.name
        raise UnsupportedFeature(f"{filename}: is encrypted ({method}); encrypted images cannot be written")
