"""What a finding puts at risk, and what to do about it, in a sentence each. For people who are not qcow2 developers."""

from __future__ import annotations

from qcow2snap.block.qcow2 import rules
from qcow2snap.block.qcow2.rules import Rule, Severity
from qcow2snap.conformance.check import Report

_BY_RULE: dict[Rule, str] = {
    rules.REFCOUNT_TOO_LOW: "a writer may take the cluster for free or for its own, and overwrite what is in it",
    rules.REFCOUNT_WIDTH: "a writer may take the cluster for free or for its own, and overwrite what is in it",
    rules.METADATA_OVERLAP: "what is written to one of the two destroys the other",
    rules.REFCOUNT_BLOCK_ALONE: "what is written to one of the two destroys the other",
    rules.L1_COPIED: "a write may change a snapshot, or copy what need not be copied",
    rules.L2_COPIED: "a write may change a snapshot, or copy what need not be copied",
    rules.HEADER_DIRTY: "nothing for a reader; a writer has to repair the refcounts first",
    rules.BACKING_FORMAT: "a guest that can write the first bytes of a raw backing file can choose its format",
    rules.L2_ENTRY_IN_FILE: "what the guest has there is not in the file",
    rules.COMPRESSED_IN_FILE: "what the guest has there is not in the file",
    rules.L2_COMPLETE: "what the guest has in the range of the table is not in the file",
    rules.L1_COMPLETE: "all that the L1 table describes",
    rules.COMPRESSED_DATA: "what the guest has there cannot be read",
    rules.SNAPSHOT_NAME_UNIQUE: "a command that is given the name may take the wrong snapshot",
    rules.SNAPSHOT_ID_UNIQUE: "a command that is given the id may take, or delete, the wrong snapshot",
}
_BY_GROUP = {
    "HDR": "the whole image: readers refuse it, or read it in another way than it was written",
    "EXT": "what the extension tells: names of formats, features and files",
    "REF": "a writer may overwrite what is in use",
    "L1": "what the guest has in the range of the entry: it may be lost, or be something else",
    "L2": "what the guest has there: it may be lost, or be something else",
    "CMP": "what the guest has there: it may be lost, or be something else",
    "DATA": "what the guest has there, or the whole disk, if its data file cannot be found",
    "CRYPT": "the whole disk, which cannot be decrypted without its header",
    "SNAP": "the snapshot: it may not be found, or not be reverted to",
    "BMP": "incremental backups, which go by the bitmap; QEMU may refuse the image",
}


def risk(rule: Rule) -> str:
    """What is at risk where a rule is broken."""
    if rule in _BY_RULE:
        return _BY_RULE[rule]
    if rule.severity is Severity.LEAK:
        return "nothing: the space is wasted"
    if rule.severity in (Severity.ADVICE, Severity.VIOLATION):
        return "nothing now; other programs may read it in another way"
    return _BY_GROUP[rule.id.split("-")[1]]


def stakes(report: Report) -> str | None:
    """The warning that a damaged snapshot table is worth: a repair takes what the lost entries held for leaks."""
    if not report.nb_lost:
        return None
    number = f"{report.nb_lost} snapshot{'' if report.nb_lost == 1 else 's'}"
    held = ""
    if report.leaks:
        nbytes = report.leaks * report.cluster_size
        held = f", and {report.leaks} clusters ({nbytes} bytes) that nothing refers to are most likely theirs"
    return (
        f"The snapshot table is cut: {number} cannot be found{held}. Do not run qemu-img check -r: it would free these "
        f"clusters and punch them out of the file, which destroys the data of the snapshots for good. Work on a copy."
    )


def what_to_do(report: Report) -> list[str]:
    """Lines for people, none if there is nothing to do."""
    lines = []
    if (warning := stakes(report)) is not None:
        lines.append(warning)
    elif report.check_errors:
        lines.append(
            "QEMU does not open this image, or ends its check early. Copy the file before anything else; "
            "qcow2snap list, map and extract read what can be read."
        )
    elif report.corruptions:
        lines.append(
            "Do not write to the image, and do not start a guest from it. Copy the file, save what matters with "
            "qcow2snap extract, and try qemu-img check -r all on the copy."
        )
    elif report.leaks:
        lines.append(
            "No data is at risk. qemu-img check -r leaks gives the space back; stop what uses the image before."
        )
    return lines
