"""What a new image is to be: the options of `qemu-img create -o`, under its names and within its limits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from enum import Enum
from typing import Any, NamedTuple

from formats import qcow2 as layout
from formats.qcow2 import CompressionType
from qcow2snap.block.node import Qcow2SnapError
from qcow2snap.block.qcow2.header import as_bytes
from qcow2snap.block.sizes import parse_size


class InvalidOption(Qcow2SnapError):
    """An image cannot be made as it is asked for."""


class Preallocation(Enum):
    """What is allocated of an image when it is made (QEMU: PreallocMode)."""

    OFF = "off"
    METADATA = "metadata"  # every guest cluster has its host cluster; the file has holes there
    FALLOC = "falloc"  # and space, which the file system keeps as zeros without writing them
    FULL = "full"  # and written zeros


class CreateOptions(NamedTuple):
    """A new image. Sizes in bytes; the disk's is a multiple of 512. Built by `made`, which judges them together."""

    size: int
    version: int = 3
    cluster_size: int = 65536
    refcount_bits: int = 16
    lazy_refcounts: bool = False
    extended_l2: bool = False
    compression_type: CompressionType = CompressionType.DEFLATE
    backing_file: str | None = None
    backing_fmt: str | None = None
    data_file: str | None = None
    data_file_raw: bool = False
    preallocation: Preallocation = Preallocation.OFF

    @property
    def cluster_bits(self) -> int:
        return self.cluster_size.bit_length() - 1

    @property
    def refcount_order(self) -> int:
        return self.refcount_bits.bit_length() - 1

    @property
    def l2_entries(self) -> int:
        """In one L2 table."""
        return self.cluster_size // (16 if self.extended_l2 else 8)

    @property
    def l1_size(self) -> int:
        """Entries of the L1 table."""
        return -(-self.size // (self.l2_entries * self.cluster_size))

    @property
    def is_preallocated(self) -> bool:
        """Every guest cluster has an L2 entry: also where a data file is to be right without the image."""
        return self.data_file_raw or self.preallocation is not Preallocation.OFF

    def __str__(self) -> str:
        """As `qemu-img create` says what it makes."""
        words = {
            "cluster_size": self.cluster_size,
            "extended_l2": self.extended_l2,
            "preallocation": self.preallocation.value if self.preallocation is not Preallocation.OFF else None,
            "compression_type": _COMPRESSION_NAMES[self.compression_type],
            "size": self.size,
            "backing_file": self.backing_file,
            "backing_fmt": self.backing_fmt,
            "compat": "0.10" if self.version == 2 else None,
            "data_file": self.data_file,
            "data_file_raw": self.data_file_raw or None,
            "lazy_refcounts": self.lazy_refcounts,
            "refcount_bits": self.refcount_bits,
        }
        shown = {True: "on", False: "off"}
        return " ".join(
            f"{name}={shown[value] if isinstance(value, bool) else value}"
            for name, value in words.items()
            if value is not None
        )


def split_options(text: str) -> dict[str, str]:
    """`name=value,name=value` as QEMU splits it: ",," is a comma of the value, a name alone is switched on."""
    options: dict[str, str] = {}
    for part in text.replace(",,", "\0").split(","):
        name, equals, value = part.replace("\0", ",").partition("=")
        if name:
            options[name] = value if equals else "on"
    return options


def made(size: int, options: Mapping[str, str] | Iterable[tuple[str, str]] = ()) -> CreateOptions:
    """A disk of so many bytes, rounded up to whole sectors as in QEMU, with these options of `-o`.

    Raises InvalidOption for a name or value that is none, and for what does not go together.
    """
    values: dict[str, Any] = {}
    for name, value in dict(options).items():
        if name not in _PARSERS:
            raise InvalidOption(f"there is no option {name!r}: {_known()}")
        field, parse = _PARSERS[name]
        try:
            parsed = parse(value)
        except ValueError as error:
            raise InvalidOption(f"{name}={value}: {error}") from None
        if field is not None:
            values[field] = parsed
    sector = layout.SECTOR_SIZE
    chosen = CreateOptions(-(-size // sector) * sector, **values)
    _judge(chosen)
    return chosen


def _judge(options: CreateOptions) -> None:
    """The limits of qcow2_co_create in QEMU's block/qcow2.c, in its order."""
    is_old = options.version < 3
    if is_old and options.extended_l2:
        raise InvalidOption("extended_l2 needs compat=1.1")
    if not 1 << layout.MIN_CLUSTER_BITS <= options.cluster_size <= 1 << layout.MAX_CLUSTER_BITS or not _is_power_of_2(
        options.cluster_size
    ):
        raise InvalidOption(f"cluster_size {options.cluster_size} is not a power of two from 512 to 2M")
    if options.extended_l2 and options.cluster_bits < layout.MIN_CLUSTER_BITS_EXTENDED_L2:
        raise InvalidOption(f"extended_l2 needs a cluster_size of 16k or more, not {options.cluster_size}")
    if options.backing_file is not None and options.preallocation is not Preallocation.OFF and not options.extended_l2:
        raise InvalidOption("a backing file and preallocation go together only with extended_l2=on")
    if options.backing_fmt is not None and options.backing_file is None:
        raise InvalidOption("a backing format needs a backing file")
    if options.backing_file is not None and options.backing_fmt is None:
        raise InvalidOption("a backing file needs its format: -F qcow2, or -F raw")
    if is_old and options.lazy_refcounts:
        raise InvalidOption("lazy_refcounts needs compat=1.1")
    if options.refcount_bits > 1 << layout.MAX_REFCOUNT_ORDER or not _is_power_of_2(options.refcount_bits):
        raise InvalidOption(f"refcount_bits {options.refcount_bits} is not a power of two from 1 to 64")
    if is_old and options.refcount_bits != 16:
        raise InvalidOption("refcount_bits other than 16 need compat=1.1")
    if options.data_file_raw and options.data_file is None:
        raise InvalidOption("data_file_raw needs a data_file")
    if options.data_file_raw and options.backing_file is not None:
        raise InvalidOption("data_file_raw and a backing file do not go together")
    if options.data_file is not None and is_old:
        raise InvalidOption("an external data file needs compat=1.1")
    if is_old and options.compression_type != CompressionType.DEFLATE:
        raise InvalidOption("compression_type=zstd needs compat=1.1")
    if options.backing_file is not None and not 0 < len(as_bytes(options.backing_file)) <= layout.MAX_BACKING_FILE_SIZE:
        raise InvalidOption("the name of the backing file is empty, or longer than 1023 bytes")
    if options.l1_size * 8 > layout.MAX_L1_TABLE_SIZE:
        most = layout.MAX_L1_TABLE_SIZE // 8 * options.l2_entries * options.cluster_size
        raise InvalidOption(
            f"a disk of {options.size} bytes is too large for clusters of {options.cluster_size}, which reach to "
            f"{most}; try a larger cluster_size"
        )


def _is_power_of_2(number: int) -> bool:
    return number > 0 and number & number - 1 == 0


def _switch(text: str) -> bool:
    if text in ("on", "yes", "true", "y"):
        return True
    if text in ("off", "no", "false", "n"):
        return False
    raise ValueError("is not on or off")


def _version(text: str) -> int:
    if text in ("0.10", "v2"):
        return 2
    if text in ("1.1", "v3"):
        return 3
    raise ValueError("is not 0.10 or 1.1")


def _number(text: str) -> int:
    if not text.isascii() or not text.isdigit():
        raise ValueError("is not a number")
    return int(text)


_COMPRESSION_NAMES = {CompressionType.DEFLATE: "zlib", CompressionType.ZSTD: "zstd"}


def _compression_type(text: str) -> CompressionType:
    for kind, name in _COMPRESSION_NAMES.items():
        if text == name:
            return kind
    raise ValueError("is not zlib or zstd")


def _preallocation(text: str) -> Preallocation:
    try:
        return Preallocation(text)
    except ValueError:
        raise ValueError("is not off, metadata, falloc or full") from None


def _only_off(text: str) -> None:
    if _switch(text):
        raise ValueError("is not supported here")


# By QEMU's name: the field of CreateOptions, and what reads a value.
_PARSERS: dict[str, tuple[str | None, Callable[[str], Any]]] = {
    "backing_file": ("backing_file", str),
    "backing_fmt": ("backing_fmt", str),
    "cluster_size": ("cluster_size", parse_size),
    "compat": ("version", _version),
    "compression_type": ("compression_type", _compression_type),
    "data_file": ("data_file", str),
    "data_file_raw": ("data_file_raw", _switch),
    "encryption": (None, _only_off),
    "extended_l2": ("extended_l2", _switch),
    "lazy_refcounts": ("lazy_refcounts", _switch),
    "nocow": (None, _only_off),
    "preallocation": ("preallocation", _preallocation),
    "refcount_bits": ("refcount_bits", _number),
}


def _known() -> str:
    return "there are " + ", ".join(name for name, (field, _) in _PARSERS.items() if field is not None)
