"""A suite of images, each with what a reader of qcow2 has to find in it, and what runs programs over it.

values      what the parts exchange               content, deflate, zstd   the bytes of disks, and compressed ones
state, builder    images, and what is expected    registry, cases    the cases, by sections of the specification
process, judge, runner, report    a program is run over the cases, within limits, and what came of it is told
"""

# Changed whenever an image or an expectation does: results of one version can be compared.
SUITE_VERSION = "1"
