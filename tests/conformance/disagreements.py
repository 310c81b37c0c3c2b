"""Why qcow2snap says something else of an image than `qemu-img check`, and is right. Each with the sentence for it.

Which images that concerns is in disagreements.tsv, which `python -m tests.conformance.agreement` writes.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Reason:
    """A reason holds where both say the same once our findings by `rules` are left out, or where QEMU says `qemu`.

    section, sentence  of the specification, QEMU's docs/interop/qcow2.rst
    qemu               a regular expression; QEMU does not open the image, and that is why
    ends               our check ends with these findings, and QEMU's goes on with what it made up
    """

    key: str
    about: str
    section: str
    sentence: str
    rules: frozenset[str] = frozenset()
    qemu: str = ""
    ends: bool = False


REASONS: dict[str, Reason] = {}


def _reason(key: str, section: str, sentence: str, about: str, *rules: str, qemu: str = "", ends: bool = False) -> None:
    REASONS[key] = Reason(key, about, section, sentence, frozenset(f"QCOW2-{rule}" for rule in rules), qemu, ends)


_reason(
    "overlap",
    "Host cluster management",
    "A refcount of 0 means that the cluster is free, 1 means that it is used, and >= 2 means that it is used and any "
    "write access must perform a COW (copy on write) operation.",
    "A cluster of metadata is used for something else as well. QEMU compares numbers only, and sees nothing if the "
    "refcount happens to be that of all its uses. Metadata is written in place, without COW, and so has one use.",
    "REF-013",
)
_reason(
    "data-file-offset",
    "Header",
    "The offset field in the Standard Cluster Descriptor must match the guest offset and neither compressed clusters "
    "nor internal snapshots are supported.",
    "With an external data file, an L2 entry leads to another place of the file. QEMU looks at this only when it reads "
    "the entry for the guest, and refuses the read then.",
    "DATA-001",
)
_reason(
    "zero-in-version-2",
    "Cluster mapping",
    "With version 2 or with extended L2 entries (see the next section), this is always 0.",
    "QEMU heeds bit 0 whatever the version is, and its check says nothing. Programs that know version 2 read data.",
    "L2-004",
)
_reason(
    "lost-entries-in-version-2",
    "Snapshots",
    "A directory of all snapshots is stored in the snapshot table, a contiguous area in the image file, whose starting "
    "offset and length are given by the header fields snapshots_offset and nb_snapshots.",
    "An entry of the snapshot table is all zeros, mostly as the table lies beyond the end of the file. QEMU takes it "
    "for a snapshot without id, name and L1 table, and reports what the lost snapshot refers to as leaked; its repair "
    "throws that away. In version 3 it reports the entry, for want of extra data.",
    "SNAP-001",
)
_reason(
    "backing-file",
    "Header",
    "Offset into the image file at which the backing file name is stored (NB: The string is not null terminated).",
    "The backing file is not there, or the format stated for it does not fit. That is no fault of the image that is "
    "checked, and its check does not read the other file.",
    qemu="Could not open backing file",
)
_reason(
    "data-file-name",
    "String header extensions",
    "In this case, the header extension length is the string length and the string is not '\\0' terminated.",
    "The data file is not there. Its clusters are not refcounted, and the check does not read it.",
    qemu="Could not open '(.|\\n)*': No such file or directory|The 'file' block driver requires a file name",
)
_reason(
    "bitmap-extra-data-compatible",
    "Bitmap directory",
    "If it is set, the bitmap may be used as expected, extra data must be left as is.",
    "The flag extra_data_compatible is part of the format, and the bitmap has no extra data. QEMU takes every flag but "
    "the first two for reserved, and refuses the whole image.",
    qemu="Bitmap '.*' doesn't satisfy the constraints",
)
_reason(
    "encryption-header-length",
    "Full disk encryption header pointer",
    "Length of the written encryption header in bytes.",
    "No file has 2^63 bytes. QEMU takes the length for a negative number, counts no cluster for the header, and "
    "reports all that it has as leaked: its repair throws the keys away, and the disk with them.",
    "CRYPT-003",
)
_reason(
    "header-cut",
    "Header",
    "For version 2, the header is exactly 72 bytes in length, and finishes here.",
    "The file ends before its header does. QEMU reads on in zeros, so that the place of the snapshot table becomes "
    "another one. A header of which a part is not there is none.",
    "HDR-002",
    ends=True,
)
_reason(
    "encryption-key",
    "Data encryption",
    "The image headers and metadata are never encrypted.",
    "QEMU opens the image with its key, and the key material is damaged. What the check is about can be read without.",
    qemu="Invalid password, cannot unlock any keyslot|Request for data outside of extension header",
)
