"""From a file name or blockdev options (QEMU's names) to a graph of nodes. Opens children, closes them on failure.

What an image refers to (backing file, external data file, json: names) goes through ReferencePolicy. Chains are
bounded, and loops refused.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from qcow2snap.block.blockdev.keyval import nested
from qcow2snap.block.file import FileNode, Locking
from qcow2snap.block.node import BlockNode, ImageFormatError, Qcow2SnapError, ReferenceRefused, UnsupportedFeature
from qcow2snap.block.qcow2 import rules
from qcow2snap.block.qcow2.driver import CLUSTER_CACHE_SIZE, TABLE_CACHE_SIZE, Qcow2Node
from qcow2snap.block.qcow2.header import ImageHeader, as_text, read_header
from qcow2snap.block.raw import RawNode
from qcow2snap.block.references import ReferencePolicy
from qcow2snap.block.writable_file import WritableFileNode

if TYPE_CHECKING:
    from qcow2snap.block.qcow2.writing.image_file import ImageFile
    from qcow2snap.block.qcow2.writing.node import WritableQcow2Node

MAX_DEPTH = 200  # images in a chain; QEMU knows no bound but its stack
_PROBE_SIZE = 2048  # bytes that decide a format: QEMU BLOCK_PROBE_BUF_SIZE

Options = dict[str, Any]


class OpenOptions(NamedTuple):
    """How images are opened, whatever their place in the graph."""

    force_share: bool = False
    allow_paths: Sequence[str] = ()
    table_cache_size: int = TABLE_CACHE_SIZE
    cluster_cache_size: int = CLUSTER_CACHE_SIZE
    discard_no_unref: bool = False  # of an image that is written: what is discarded keeps its clusters


class Link(NamedTuple):
    """One image of a backing chain below the first: what the image above calls it, and its node or why it has none."""

    reference: str
    format: str | None  # as stated by the image above
    node: BlockNode | None
    error: Qcow2SnapError | None


def open_writable(filename: str, options: OpenOptions = OpenOptions()) -> WritableQcow2Node:  # noqa: B008
    """Open a qcow2 image for writing; its backing files are read only. close() of the node closes all, and may fail."""
    return _Opener(filename, options, with_children=True).writable(filename)


def open_image(filename: str, options: OpenOptions = OpenOptions(), *, with_children: bool = True) -> Qcow2Node:  # noqa: B008
    """Open a qcow2 image that the user names; close() of the node closes all that was opened.

    Without `with_children` neither backing nor data file is opened: the image can be described, not read.
    """
    return _Opener(filename, options, with_children).qcow2(filename)


def open_image_in(
    file: FileNode,
    options: OpenOptions = OpenOptions(),  # noqa: B008
    children: Mapping[str, BlockNode | None] | None = None,
) -> Qcow2Node:
    """The qcow2 image in a file that is open. `children` take the place of what it names as `backing` and `data-file`.

    The node owns what it opened itself: neither the file nor those children.
    """
    opener = _Opener(file.filename, options, with_children=True)
    given = children or {}
    return opener.qcow2_in(file, children=given, borrowed=[file, *(node for node in given.values() if node)])


def open_writable_in(
    file: FileNode,
    options: OpenOptions = OpenOptions(),  # noqa: B008
    children: Mapping[str, BlockNode | None] | None = None,
) -> WritableQcow2Node:
    """As open_image_in(), for writing. The node has a way of its own into the file, by which it grows."""
    from qcow2snap.block.qcow2.writing.image_file import ImageFile

    return _Opener(file.filename, options, with_children=True).writable_in(ImageFile.of(file), children or {})


def open_raw(filename: str, options: OpenOptions = OpenOptions(), *, writable: bool = False) -> RawNode:  # noqa: B008
    """Open a raw image that the user names as one: what it holds is not looked at. close() of the node closes it."""
    if writable:
        return RawNode(WritableFileNode(filename))
    return RawNode(FileNode(filename, locking=Locking.NONE if options.force_share else Locking.DATA))


def backing_chain(filename: str, options: OpenOptions = OpenOptions()) -> list[Link]:  # noqa: B008
    """The images below one, as far as they can be opened; nodes are opened to be described, and are the caller's."""
    opener = _Opener(filename, options, with_children=False)
    above: BlockNode | None = opener.qcow2(filename)
    links: list[Link] = []
    while isinstance(above, Qcow2Node) and above.header.backing_file is not None:
        reference = as_text(above.header.backing_file)
        node, error = None, None
        try:
            node = opener.backing(reference, above.header.backing_format, above.file, {})
        except Qcow2SnapError as refused:
            error = refused
        links.append(Link(reference, above.header.backing_format, node, error))
        if len(links) == 1:
            above.close()
        above = node
    if not links and above is not None:
        above.close()
    return links


def files_of(node: BlockNode | None) -> list[FileNode]:
    """All files of the host that a graph reads."""
    if isinstance(node, Qcow2Node):
        return [node.file, *([node.data_file] if node.data_file else []), *files_of(node.backing)]
    return [node.file] if isinstance(node, RawNode) and isinstance(node.file, FileNode) else []


def probe(file: FileNode) -> str:
    """The format of a file whose format nobody states, by its first bytes, as QEMU guesses it."""
    start = file.pread_available(0, _PROBE_SIZE)
    if start[:4] == b"QFI\xfb":
        return "qcow" if start[4:8] == b"\0\0\0\1" else "qcow2"
    for name, offset, magic in _MAGICS:
        if start[offset : offset + len(magic)] == magic:
            return name
    return "raw"


# Formats that QEMU would recognise, so that their containers are not taken for raw disks.
_MAGICS = (
    ("luks", 0, b"LUKS\xba\xbe"),
    ("parallels", 0, b"WithoutFreeSpace"),
    ("parallels", 0, b"WithouFreSpacExt"),
    ("qed", 0, b"QED\0"),
    ("vdi", 0x40, b"\x7f\x10\xda\xbe"),
    ("vhdx", 0, b"vhdxfile"),
    ("vmdk", 0, b"# Disk DescriptorFile"),
    ("vmdk", 0, b"COWD"),
    ("vmdk", 0, b"KDMV"),
    ("vpc", 0, b"conectix"),
)


class _Opener:
    """Opens one graph: knows what may be followed, and what is open on the way down."""

    def __init__(self, filename: str, options: OpenOptions, with_children: bool) -> None:
        self._options = options
        self._with_children = with_children
        self._policy = ReferencePolicy(filename, options.allow_paths)
        self._open: list[tuple[int, int]] = []  # identities of the chain's images, top first

    def qcow2(self, filename: str, *, children: Mapping[str, Any] | None = None) -> Qcow2Node:
        """A qcow2 image by the path to open. `children` overrides what the image says of `backing` and `data-file`."""
        file = self._file(filename)
        try:
            return self.qcow2_in(file, children=children)
        except BaseException:
            file.close()
            raise

    def qcow2_in(
        self, file: FileNode, *, children: Mapping[str, Any] | None = None, borrowed: Collection[BlockNode] = ()
    ) -> Qcow2Node:
        """As qcow2(), of an image whose file is open, and stays so on failure. Those `borrowed` are never closed."""
        nodes: list[BlockNode] = []
        try:
            header = self._enter_qcow2(file)
            data_file = backing = None
            if self._with_children:
                data_file = self._data_file(header.data_file, header.has_data_file, file, children or {})
                nodes += [data_file] if data_file else []
                reference = None if header.backing_file is None else as_text(header.backing_file)
                backing = self.backing(reference, header.backing_format, file, children or {})
            return Qcow2Node(
                file,
                header,
                data_file=data_file,
                backing=backing,
                has_children=self._with_children,
                table_cache_size=self._options.table_cache_size,
                cluster_cache_size=self._options.cluster_cache_size,
                borrowed=borrowed,
            )
        except BaseException:
            for node in nodes:
                if node not in borrowed:
                    node.close()
            raise

    def writable(self, filename: str) -> WritableQcow2Node:
        """The image at the top of a graph, for writing."""
        from qcow2snap.block.qcow2.writing.image_file import ImageFile

        return self.writable_in(ImageFile(filename), {})

    def writable_in(self, file: ImageFile, children: Mapping[str, BlockNode | None]) -> WritableQcow2Node:
        """As writable(), of an image whose file is open; it is the node's, and closed on failure. Children are not."""
        from qcow2snap.block.qcow2.writing.image_file import ImageFile
        from qcow2snap.block.qcow2.writing.node import WritableQcow2Node

        borrowed = [node for node in children.values() if node is not None]
        nodes: list[BlockNode] = [file]
        try:
            header = self._enter_qcow2(file)
            data_file = None
            if header.has_data_file:
                given = children.get("data-file")
                if isinstance(given, FileNode):
                    data_file = ImageFile.of(given)
                else:
                    data_file = ImageFile(self._data_file_path(header.data_file, file))
                nodes.append(data_file)
            reference = None if header.backing_file is None else as_text(header.backing_file)
            backing = self.backing(reference, header.backing_format, file, children)
            nodes += [backing] if backing and backing not in borrowed else []
            return WritableQcow2Node(
                file,
                header,
                data_file=data_file,
                backing=backing,
                table_cache_size=self._options.table_cache_size,
                cluster_cache_size=self._options.cluster_cache_size,
                borrowed=borrowed,
                discard_no_unref=self._options.discard_no_unref,
            )
        except BaseException:
            for node in nodes:
                node.close()
            raise

    def _data_file_path(self, reference: str | None, file: FileNode) -> str:
        """The file of the host that an image names as its data file."""
        reference = _named_data_file(reference, file)
        if reference.startswith("json:"):
            options = nested(_json_options(reference, file.filename))
            below = options.get("file", options) if options.get("driver") == "raw" else options
            reference = str(nested(below).get("filename", "")) if isinstance(below, dict) else ""
            if not reference:
                raise UnsupportedFeature(f"{file.filename}: its data file must be a plain file to be written")
        return self._policy.resolve(reference, file.filename)

    def _file(self, filename: str) -> FileNode:
        if self._options.force_share:
            return FileNode(filename, locking=Locking.NONE)
        return FileNode(filename, locking=Locking.DATA if self._with_children else Locking.METADATA)

    def _enter_qcow2(self, file: FileNode) -> ImageHeader:
        """Count an image among those of the chain; its header, or an error that says what the file is instead."""
        self._enter(file)
        try:
            return read_header(file)
        except (ImageFormatError, UnsupportedFeature) as error:
            raise _explained(error, file) from None

    def _enter(self, file: FileNode) -> None:
        if file.identity in self._open:
            raise ReferenceRefused(f"{file.filename}: is its own backing file; the backing chain is a loop")
        if len(self._open) >= MAX_DEPTH:
            raise ReferenceRefused(f"{file.filename}: more than {MAX_DEPTH} images in the backing chain")
        self._open.append(file.identity)

    def _data_file(
        self, reference: str | None, is_needed: bool, file: FileNode, children: Mapping[str, Any]
    ) -> FileNode | None:
        if not is_needed:
            return None
        override = children.get("data-file")
        if override is not None:
            node = override if isinstance(override, BlockNode) else self._from_options(override, file.filename)
            if isinstance(node, RawNode) and isinstance(node.file, FileNode):
                return node.file
            if isinstance(node, FileNode):
                return node
            node.close()
            raise UnsupportedFeature(f"{file.filename}: its data file must be a plain file")
        reference = _named_data_file(reference, file)
        if reference.startswith("json:"):
            return self._data_file(None, True, file, {"data-file": _json_options(reference, file.filename)})
        return self._file(self._policy.resolve(reference, file.filename))

    def backing(
        self, reference: str | None, stated_format: str | None, file: FileNode, children: Mapping[str, Any]
    ) -> BlockNode | None:
        """The backing node of the image in `file`, if it has one."""
        if "backing" in children:
            override = children["backing"]
            if override is None or isinstance(override, BlockNode):
                return override
            return self._from_options(override, file.filename)
        if not reference:
            return None
        if reference.startswith("json:"):
            options = _json_options(reference, file.filename)
            if stated_format and options.get("driver") not in _FORMATS:
                options = {"driver": stated_format, "file": options}
            return self._from_options(options, file.filename)
        return self._image(self._policy.resolve(reference, file.filename), stated_format)

    def _image(self, path: str, image_format: str | None, children: Mapping[str, Any] | None = None) -> BlockNode:
        """An image of a stated or guessed format."""
        if image_format is None:
            unknown = FileNode(path, locking=Locking.NONE)
            try:
                image_format = probe(unknown)
            finally:
                unknown.close()
        if image_format == "qcow2":
            return self.qcow2(path, children=children)
        if image_format in ("raw", "file", "host_device"):
            file = self._file(path)
            try:
                self._enter(file)
                return _raw(file, children or {})
            except BaseException:
                file.close()
                raise
        raise UnsupportedFeature(f"{path}: images of format {image_format!r} are not read; raw and qcow2 are")

    def _from_options(self, options: Any, referrer: str) -> BlockNode:
        """A node from blockdev options that stand in an image, as json: names and their parts do."""
        if isinstance(options, str):
            raise UnsupportedFeature(f"{referrer}: refers to the node {options!r}; there are no named nodes here")
        options = nested(options)
        driver = options.get("driver")
        if "filename" in options and "file" not in options:  # a protocol node
            if driver not in (None, "file", "host_device"):
                raise ReferenceRefused(f"{referrer}: refers to {options}; the driver {driver!r} is not followed")
            return self._image(self._policy.resolve(str(options["filename"]), referrer), "file" if driver else None)
        below = options.get("file")
        if driver not in (None, *_FORMATS) or not isinstance(below, (dict, str)):
            raise UnsupportedFeature(f"{referrer}: refers to {options}, which this program cannot open")
        filename = below if isinstance(below, str) else nested(below).get("filename")
        protocol = None if isinstance(below, str) else nested(below).get("driver")
        if not isinstance(filename, str) or protocol not in (None, "file", "host_device"):
            raise ReferenceRefused(f"{referrer}: refers to {options}; only local files are followed")
        return self._image(self._policy.resolve(filename, referrer), driver, options)


_FORMATS = ("qcow2", "raw")


def _raw(file: FileNode, options: Mapping[str, Any]) -> RawNode:
    """A raw node, with offset and size as an image states them for its backing file."""
    try:
        offset = int(options.get("offset") or 0)
        size = None if options.get("size") is None else int(options["size"])
    except (TypeError, ValueError):
        raise UnsupportedFeature(f"{file.filename}: offset and size of a raw node must be numbers of bytes") from None
    return RawNode(file, offset=offset, size=size)


def _named_data_file(reference: str | None, file: FileNode) -> str:
    """What an image calls the data file that it needs."""
    if not reference:
        error = rules.DATA_FILE_NAME.broken(72, "the image needs an external data file and does not name it")
        raise _explained(error, file)
    return reference


def _json_options(reference: str, referrer: str) -> Options:
    try:
        options = json.loads(reference.removeprefix("json:"))
    except (ValueError, RecursionError) as error:
        raise UnsupportedFeature(f"{referrer}: its reference {reference[:80]!r} is not JSON: {error}") from None
    if not isinstance(options, dict):
        raise UnsupportedFeature(f"{referrer}: its reference {reference[:80]!r} is not a JSON object")
    return options


def _explained(error: Qcow2SnapError, file: FileNode) -> Qcow2SnapError:
    """An error of the header with the file's name, and what the file seems to be where it is no qcow2."""
    if isinstance(error, ImageFormatError):
        error.filename = file.filename
        if error.rule == rules.HEADER_MAGIC.id:
            guess = probe(file) if file.size else "empty"
            what = {
                "raw": "it may be a raw disk, which has no snapshots",
                "empty": "the file is empty",
            }.get(guess, f"it looks like {guess}")
            error.message = f"not a qcow2 image: {what}"
        return error
    return type(error)(f"{file.filename}: {error}")
