"""Which files an image may name. References are a way in: a hostile image may name /etc/shadow as its backing file.

Followed are files inside the directory tree of the image that the user named, and inside those that --allow-path adds.
Symbolic links are resolved first, so that what is judged is what would be opened.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Sequence

from qcow2snap.block.node import FileError, ReferenceRefused

# QEMU path_has_protocol: letters up to a colon that comes before any slash.
_PROTOCOL = re.compile(r"([^:/]+):")


class ReferencePolicy:
    """The directories whose files may be followed. Immutable."""

    def __init__(self, image_filename: str, allow_paths: Sequence[str] = ()) -> None:
        # Both where the user's name of the image is, and where the image itself is if that is a link.
        own = [os.path.dirname(os.path.abspath(image_filename)), os.path.dirname(os.path.realpath(image_filename))]
        self._directories = sorted({os.path.realpath(directory) for directory in [*own, *allow_paths]})

    def resolve(self, reference: str, referrer: str) -> str:
        """The path to open for a file that the image `referrer` names; relative names are relative to it.

        Raises ReferenceRefused, or FileError where there is no such file.
        """
        name = reference.removeprefix("file:")
        protocol = _PROTOCOL.match(name)
        if protocol and name == reference:
            raise ReferenceRefused(f"{referrer}: refers to {reference!r}; the protocol {protocol[1]!r} is not followed")
        path = os.path.join(os.path.dirname(referrer), name)
        try:
            real = os.path.realpath(path)
            if not any(os.path.commonpath([real, directory]) == directory for directory in self._directories):
                raise ReferenceRefused(
                    f"{referrer}: refers to {reference!r}, which is {real}, outside of the image's directory; if you "
                    f"trust the image, add --allow-path {os.path.dirname(real)}"
                )
            mode = os.stat(real).st_mode
        except (OSError, ValueError) as error:
            reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else "not a file name"
            raise FileError(f"{referrer}: refers to {reference!r}: {reason}") from None
        if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
            raise ReferenceRefused(f"{referrer}: refers to {reference!r}, no regular file or block device")
        return path
