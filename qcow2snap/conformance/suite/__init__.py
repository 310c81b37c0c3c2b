"""A suite of images, each with what a reader of qcow2 has to find in it, and what runs programs over it.

values                            what the parts exchange
content, deflate, zstd            the bytes of disks, and compressed ones that are the same each time
host, state, builder              images, and beside them what a reader has to find
registry, cases, manifest         the cases, by sections of the specification, and their digests
command, process, runner          a reader is run over the cases, within limits
judge, report, adapters           what it gave is judged, and told; readers that are known here
"""

# Changed whenever an image or an expectation does: results of one version can be compared.
SUITE_VERSION = "1"
