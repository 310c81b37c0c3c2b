"""All that a reader does with an image, bounded: what every fuzzed image goes through.

Anything but a result or a Qcow2SnapError is a bug, and so is taking long or much memory. Used by the atheris target
(image.py) and by tests/block/test_hostile.py.
"""

from __future__ import annotations

import json
import random
import warnings
from collections.abc import Callable, Iterator
from itertools import islice, pairwise
from xml.etree import ElementTree

from qcow2snap.block.file import FileNode
from qcow2snap.block.graph import OpenOptions, open_image
from qcow2snap.block.node import BlockNode, ImageFormatError, Qcow2SnapError
from qcow2snap.block.qcow2.driver import Qcow2Node
from qcow2snap.block.snapshot_access import SnapshotAccessNode
from qcow2snap.cli.list import snapshot_json, snapshot_lines
from qcow2snap.conformance import report_text
from qcow2snap.conformance.check import Options, check
from qcow2snap.conformance.report_json import report_fields
from qcow2snap.conformance.report_junit import junit
from qcow2snap.conformance.report_sarif import sarif_log
from qcow2snap.forensics import describe
from qcow2snap.forensics.diff import verified

MAX_SNAPSHOTS = 8
MAX_EXTENTS = 20_000
MAX_FINDINGS = 100
MAX_READ = 1 << 20  # bytes at a time


def exercise(filename: str) -> str:
    """Check, open, describe, list, map, read and compare the states of an image; returns how far that went."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _check(filename)
        for with_children in (True, False):
            try:
                image = open_image(filename, OpenOptions(), with_children=with_children)
            except Qcow2SnapError as error:
                if "\n" in str(error):
                    raise AssertionError("an error of more than one line") from error
                continue
            try:
                _describe(image)
                if with_children:
                    _read_everything(image)
                    _compare(image)
                    _read_bitmaps(image)
            finally:
                image.close()
            return "read" if with_children else "described"
    return "refused"


def _check(filename: str) -> None:
    """The checker, whatever the readers say of the image; and its reports, which hold names and numbers of it."""
    file = FileNode(filename)
    try:
        report = check(file, Options(deep=True))
    except ImageFormatError:  # no qcow2 image at all
        return
    finally:
        file.close()
    assert all("\n" not in finding.message for finding in report.findings)
    assert bool(report.findings or report.problems) == bool(report.exit_code) or report.exit_code == 0
    json.dumps([report_fields(report, MAX_FINDINGS), sarif_log(report, "0", MAX_FINDINGS)])
    ElementTree.fromstring(junit(report, MAX_FINDINGS))
    "\n".join(report_text.lines(report))


def _describe(image: Qcow2Node) -> None:
    assert all("\n" not in warning for warning in image.warnings)
    snapshot_lines(list(image.snapshots()))
    for snapshot in image.snapshots():
        snapshot_json(snapshot)
    describe.describe(image, [])
    for tell in (describe.features, describe.extensions, describe.sharing):
        tell(image)


def _read_everything(image: Qcow2Node) -> None:
    for get in _nodes(image):
        try:
            _read(get())
        except Qcow2SnapError:
            continue


def _nodes(image: Qcow2Node) -> Iterator[Callable[[], BlockNode]]:
    yield lambda: image
    for snapshot in image.snapshots()[:MAX_SNAPSHOTS]:
        yield lambda snapshot=snapshot: SnapshotAccessNode(image, snapshot)  # type: ignore[misc]
        yield lambda snapshot=snapshot: image.vm_state(snapshot)  # type: ignore[misc]


def _read(node: BlockNode) -> None:
    position = 0
    for count, extent in enumerate(node.block_status(0, node.size)):
        assert extent.offset == position, "extents leave a gap or overlap"
        position = extent.end
        if extent.must_read:
            try:
                node.pread(extent.offset, min(extent.length, MAX_READ))
            except Qcow2SnapError:
                continue
        if count >= MAX_EXTENTS:
            return


def _compare(image: Qcow2Node) -> None:
    """Each state with the one before it, as `diff --verify` does."""
    states = [None, *image.snapshots()[:MAX_SNAPSHOTS]]
    for since, state in pairwise(states):
        try:
            nodes = [image if info is None else SnapshotAccessNode(image, info) for info in (since, state)]
            position = 0
            for extent in islice(image.changes(since, state), MAX_EXTENTS):
                assert extent.length > 0
                assert extent.offset >= position, "changes overlap"
                position = extent.end
                small = extent._replace(length=min(extent.length, MAX_READ))
                list(verified([small], *nodes, image.header.subcluster_size, workers=1))
        except Qcow2SnapError:
            continue


def _read_bitmaps(image: Qcow2Node) -> None:
    try:
        for name in image.dirty_bitmaps()[:MAX_SNAPSHOTS]:
            position = 0
            for offset, length in islice(image.dirty_extents(name, 0, image.size), MAX_EXTENTS):
                assert position <= offset < offset + length <= image.size, "dirty extents overlap"
                position = offset + length
    except Qcow2SnapError:
        return


def damaged(data: bytes, choose: random.Random) -> bytes:
    """The same bytes with some damage: fields set to boundary values, most of them where the metadata is."""
    result = bytearray(data)
    for _ in range(choose.choice([1, 1, 2, 4, 16, 200])):
        where = choose.random()
        if where < 0.4:
            at = choose.randrange(min(len(result), 120))  # the header
        elif where < 0.7:
            at = choose.randrange(len(result))
        else:
            at = choose.randrange(-(-len(result) // 512)) * 512 + choose.randrange(64)  # where tables start
        width = choose.choice([1, 1, 2, 4, 8])
        value = choose.choice(
            [choose.getrandbits(8 * width), (1 << 8 * width) - 1, 0, 1 << choose.randrange(8 * width)]
        )
        result[at : at + width] = value.to_bytes(width, "big")
    if choose.random() < 0.2:
        del result[choose.randrange(len(result)) :]
    return bytes(result)
