"""Coverage-guided fuzzing of the image reader with atheris.

    pip install -e '.[fuzz]'
    python -m tests.fuzz.image -max_len=65536 -max_total_time=600 CORPUS

CORPUS is a directory; copies of small images in fixtures/images/ are good seeds. What it finds becomes a test in
tests/block/test_hostile.py.
"""

from __future__ import annotations

import os
import sys
import tempfile

import atheris

with atheris.instrument_imports(include=["formats", "qcow2snap"]):
    import qcow2snap.block.qcow2.view
    import qcow2snap.conformance.check  # noqa: F401  # these are loaded late otherwise, without instruments
    from tests.fuzz.exercise import exercise

_directory = tempfile.mkdtemp(prefix="qcow2snap-fuzz-")
_filename = os.path.join(_directory, "image.qcow2")


def one_input(data: bytes) -> None:
    with open(_filename, "wb") as file:
        file.write(data)
    exercise(_filename)


if __name__ == "__main__":
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()
