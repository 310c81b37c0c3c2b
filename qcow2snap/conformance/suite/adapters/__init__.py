"""Readers that are known here, as command lines for `conformance run`. Those that are libraries have a script each.

The scripts import nothing of qcow2snap, so that they can be copied, and run by the Python that has the library.
"""

from __future__ import annotations

import shlex
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

_PYTHON = shlex.quote(sys.executable)
_HERE = shlex.quote(str(Path(__file__).parent))


class Adapter(NamedTuple):
    """Commands for a reader, and what they need: a program, or a Python module."""

    reader: str
    map_reader: str | None = None
    program: str | None = None
    module: str | None = None

    def why_not(self) -> str | None:
        """What is missing here; None if nothing is."""
        if self.program is not None and shutil.which(self.program) is None:
            return f"{self.program} is not installed"
        if self.module is not None and _is_missing(self.module):
            return f"the module {self.module} is not installed for {sys.executable}"
        return None


def _is_missing(module: str) -> bool:
    try:
        return find_spec(module) is None
    except ModuleNotFoundError:  # of the package that it would be in
        return True


ADAPTERS = {
    # QEMU looks for an external data file in the current directory, and for backing files beside the image.
    "qemu-img": Adapter(
        "env -C {directory} qemu-img convert -f qcow2 [-l snapshot.id={id}] -O raw {image} {output}",
        "env -C {directory} qemu-img map -f qcow2 --output=json {image}",
        program="qemu-img",
    ),
    "qcow2snap": Adapter(
        f"{_PYTHON} -m qcow2snap extract [-s id={{id}}] {{image}} {{output}}",
        f"{_PYTHON} -m qcow2snap map --json [-s id={{id}}] {{image}}",
    ),
    "7z": Adapter("7z x -so -tqcow {image}", program="7z"),
    "libqcow": Adapter(f"{_PYTHON} {_HERE}/libqcow.py {{image}} {{output}}", module="pyqcow"),
    "dissect": Adapter(
        f"{_PYTHON} {_HERE}/dissect_hypervisor.py {{image}} {{output}} [{{id}}]", module="dissect.hypervisor"
    ),
}
