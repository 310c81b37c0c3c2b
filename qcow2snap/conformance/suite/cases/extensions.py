"""Section "Header extensions" and those of single extensions, but for bitmaps and encryption."""

from __future__ import annotations

from formats.qcow2 import HeaderExtensionType
from qcow2snap.conformance.suite.builder import KIB, Image
from qcow2snap.conformance.suite.cases.header import some_disk
from qcow2snap.conformance.suite.registry import case
from qcow2snap.conformance.suite.values import Section

UNKNOWN = 0x6B697431


@case("extensions-none", "no header extension but the end marker", Section.EXTENSIONS)
def extensions_none(name: str) -> Image:
    return some_disk(Image(name, 64 * KIB))


for _length in (0, 1, 7, 8, 9, 300):

    @case(
        f"extensions-unknown-{_length}",
        f"an unknown extension of {_length} bytes, which is skipped, padding and all: another one follows",
        Section.EXTENSIONS,
    )
    def extensions_unknown(name: str) -> Image:
        image = Image(name, 64 * KIB).extension(UNKNOWN, b"\xff" * int(name.rpartition("-")[2]))
        return some_disk(image.extension(UNKNOWN + 1, b"\xff" * 40))


@case(
    "extensions-before-format",
    "an unknown extension, and behind it the format of the backing file: a raw one that looks like qcow2",
    Section.STRINGS,
    Section.EXTENSIONS,
    Section.BACKING_FILE,
)
def extensions_before_format(name: str) -> Image:
    image = Image(name, 64 * KIB).extension(UNKNOWN, b"five.")
    return some_disk(image.over_raw(b"QFI\xfb" + image.lines(32 * KIB - 4)))


@case("extensions-padding", "padding behind extensions that is not zeros", Section.EXTENSIONS)
def extensions_padding(name: str) -> Image:
    image = Image(name, 64 * KIB).extension(UNKNOWN, b"abc", padding=b"\xff" * 5)
    return some_disk(image.extension(UNKNOWN, b"abcd", padding=b"\xff" * 4))


@case("extensions-padding-of-string", "a format name with padding behind it that is not zeros", Section.STRINGS)
def extensions_padding_of_string(name: str) -> Image:
    image = Image(name, 64 * KIB)
    image.over_raw(image.lines(64 * KIB), stated=None)
    return some_disk(image.extension(HeaderExtensionType.BACKING_FILE_FORMAT, b"raw", padding=b"\xff" * 5))


@case("extensions-unknown-twice", "unknown extensions of one type, twice", Section.EXTENSIONS)
def extensions_unknown_twice(name: str) -> Image:
    return some_disk(Image(name, 64 * KIB).extension(UNKNOWN, b"one").extension(UNKNOWN, b"two"))


@case("extensions-many", "a hundred unknown extensions", Section.EXTENSIONS)
def extensions_many(name: str) -> Image:
    image = Image(name, 64 * KIB)
    for number in range(100):
        image.extension(UNKNOWN + number, b"%d" % number)
    return some_disk(image)


@case(
    "extensions-fill-cluster",
    "extensions up to the end of the first cluster, without an end marker",
    Section.EXTENSIONS,
)
def extensions_fill_cluster(name: str) -> Image:
    image = Image(name, 64 * KIB, cluster_bits=9)
    image.has_end_marker = False
    return some_disk(image.extension(UNKNOWN, b"\xff" * 200).extension(UNKNOWN, b"\xff" * (512 - 104 - 208 - 8)))


@case(
    "extensions-no-end-marker",
    "extensions that go on to where the name of the backing file starts, without an end marker",
    Section.BACKING_FILE,
    Section.EXTENSIONS,
)
def extensions_no_end_marker(name: str) -> Image:
    image = Image(name, 64 * KIB)
    image.has_end_marker = False
    return some_disk(image.extension(UNKNOWN, b"x" * 24).over_raw(image.lines(64 * KIB)))


@case(
    "extensions-behind-end-marker",
    "bytes behind the end marker that look like an extension: they are none",
    Section.EXTENSIONS,
)
def extensions_behind_end_marker(name: str) -> Image:
    image = Image(name, 64 * KIB).extension(0, b"")
    image.extension(HeaderExtensionType.FULL_DISK_ENCRYPTION, b"x" * 3)
    image.extension(UNKNOWN, b"", length=1 << 31)
    return some_disk(image)


@case("extensions-end-marker-length", "an end marker with a length, which means nothing", Section.EXTENSIONS)
def extensions_end_marker_length(name: str) -> Image:
    image = Image(name, 64 * KIB).extension(0, b"", length=24)
    image.has_end_marker = False
    return some_disk(image)


@case("extensions-feature-names", "a feature name table, as QEMU writes it", Section.FEATURE_NAMES)
def extensions_feature_names(name: str) -> Image:
    names = [(0, 0, "dirty bit"), (0, 1, "corrupt bit"), (0, 2, "external data file"), (1, 0, "lazy refcounts")]
    return some_disk(Image(name, 64 * KIB).feature_names(*names, (2, 0, "bitmaps")))


@case(
    "extensions-feature-names-odd",
    "a feature name table with a name of full length, bit 63, and a type that does not exist",
    Section.FEATURE_NAMES,
)
def extensions_feature_names_odd(name: str) -> Image:
    return some_disk(Image(name, 64 * KIB).feature_names((1, 63, "n" * 46), (2, 63, ""), (9, 200, "nothing")))


@case("extensions-feature-names-empty", "a feature name table without entries", Section.FEATURE_NAMES)
def extensions_feature_names_empty(name: str) -> Image:
    return some_disk(Image(name, 64 * KIB).feature_names())


@case(
    "refuse-extension-length",
    "an extension that reaches beyond the first cluster",
    Section.EXTENSIONS,
)
def refuse_extension_length(name: str) -> Image:
    image = some_disk(Image(name, 64 * KIB).extension(UNKNOWN, b"abc", length=5000))
    return image.refuse("the extension is longer than the room for extensions")


@case("refuse-extension-length-huge", "an extension of nearly 4 GiB", Section.EXTENSIONS)
def refuse_extension_length_huge(name: str) -> Image:
    image = some_disk(Image(name, 64 * KIB).extension(UNKNOWN, b"abc", length=0xFFFFFFF8))
    return image.refuse("the extension is longer than the room for extensions")
