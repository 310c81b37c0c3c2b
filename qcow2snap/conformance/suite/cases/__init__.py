"""The cases of the suite, by the sections of the specification. To import this is to register them all."""

# isort: off
# The order is that in which cases are listed and run: the specification's, more or less.
from qcow2snap.conformance.suite.cases import header, extensions, backing, mapping, compressed
from qcow2snap.conformance.suite.cases import extended_l2, data_file, snapshots, bitmaps, encryption
# isort: on

__all__ = [
    "backing",
    "bitmaps",
    "compressed",
    "data_file",
    "encryption",
    "extended_l2",
    "extensions",
    "header",
    "mapping",
    "snapshots",
]
