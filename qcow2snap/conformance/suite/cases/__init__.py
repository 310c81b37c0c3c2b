"""The cases of the suite, by the sections of the specification. To import this is to register them all."""

from qcow2snap.conformance.suite.cases import header as header  # isort: skip
from qcow2snap.conformance.suite.cases import extensions as extensions  # isort: skip
from qcow2snap.conformance.suite.cases import backing as backing  # isort: skip
from qcow2snap.conformance.suite.cases import mapping as mapping  # isort: skip
from qcow2snap.conformance.suite.cases import compressed as compressed  # isort: skip
from qcow2snap.conformance.suite.cases import extended_l2 as extended_l2  # isort: skip
from qcow2snap.conformance.suite.cases import data_file as data_file  # isort: skip
from qcow2snap.conformance.suite.cases import snapshots as snapshots  # isort: skip
from qcow2snap.conformance.suite.cases import bitmaps as bitmaps  # isort: skip
from qcow2snap.conformance.suite.cases import encryption as encryption  # isort: skip
