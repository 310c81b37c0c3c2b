"""Compressed clusters: where their descriptors point, and what deflate and Zstandard may look like there."""

from __future__ import annotations

from formats.qcow2 import compressed_l2_entry
from qcow2snap.conformance.suite import deflate, zstd
from qcow2snap.conformance.suite.builder import KIB, Image
from qcow2snap.conformance.suite.content import lines, noise
from qcow2snap.conformance.suite.registry import case
from qcow2snap.conformance.suite.values import Section

STOPS = "decompression stops when it has produced a cluster of data"


def packed(data: bytes) -> bytes:
    """As an ordinary compressor would."""
    return deflate.dynamic(deflate.tokens(data))


def store(image: Image, cluster: int, *, at: int | None = None, more_sectors: int = 0) -> bytes:
    """A compressed cluster of lines of its own; returns them."""
    data = image.lines(image.cluster_size)
    image.active.compressed(cluster, packed(data), data, at=at, more_sectors=more_sectors)
    return data


# -- descriptors -------------------------------------------------------------------------------------------------------

for _bits in (9, 10, 12, 16):

    @case(
        f"compressed-cluster-bits-{_bits}",
        f"compressed clusters of {1 << _bits} bytes, one behind the other, with data and holes between",
        Section.COMPRESSED,
    )
    def compressed_cluster_bits(name: str) -> Image:
        bits = int(name.rpartition("-")[2])
        image = Image(name, 12 << bits, cluster_bits=bits)
        for cluster in (0, 1, 2, 5, 11):
            store(image, cluster)
        image.active.data(3).zero(4).data(10)
        return image


@case(
    "compressed-cluster-bits-21",
    "compressed clusters of 2 MiB: the descriptor has 13 bits for sectors",
    Section.COMPRESSED,
)
def compressed_cluster_bits_21(name: str) -> Image:
    image = Image(name, 3 << 21, cluster_bits=21)
    size, noisy = 1 << 21, noise(21, 700 * KIB)
    stream = deflate.stored(noisy, final=False) + deflate.fixed(deflate.run(0, size - len(noisy)))
    image.active.compressed(0, stream, noisy.ljust(size, b"\0"), at=100)
    image.active.compressed(2, deflate.dynamic(deflate.run(7, size)), b"\7" * size)
    return image


@case("compressed-v2", "compressed clusters in version 2", Section.COMPRESSED)
def compressed_v2(name: str) -> Image:
    image = Image(name, 64 * KIB, version=2)
    store(image, 0)
    store(image, 7)
    image.active.data(1)
    return image


for _at, _where in (
    (0, "at the start of a sector"),
    (1, "one byte into a sector"),
    (511, "in the last byte of a sector"),
    (3900, "near the end of a host cluster, and goes on in the next"),
    (4095, "in the last byte of a host cluster"),
):

    @case(f"compressed-at-{_at}", f"a compressed cluster that starts {_where}", Section.COMPRESSED)
    def compressed_at(name: str) -> Image:
        image = Image(name, 32 * KIB)
        store(image, 1, at=int(name.rpartition("-")[2]))
        image.active.data(0)
        store(image, 6)
        return image


@case("compressed-share-sector", "many small compressed clusters in one sector", Section.COMPRESSED)
def compressed_share_sector(name: str) -> Image:
    image = Image(name, 64 * KIB)
    for cluster in range(16):
        data = bytes([cluster + 1]) * image.cluster_size
        image.active.compressed(cluster, packed(data), data)
    return image


@case("compressed-same-data", "guest clusters that share compressed data", Section.COMPRESSED)
def compressed_same_data(name: str) -> Image:
    image = Image(name, 32 * KIB)
    store(image, 1)
    image.active.same(3, 1).same(7, 1)
    return image


@case("compressed-more-sectors", "a descriptor of more sectors than the data needs", Section.COMPRESSED)
def compressed_more_sectors(name: str) -> Image:
    image = Image(name, 32 * KIB)
    store(image, 1, at=300, more_sectors=3)
    image.active.data(2).data(3)
    return image


@case("compressed-most-sectors", "a descriptor with all bits of its number of sectors set", Section.COMPRESSED)
def compressed_most_sectors(name: str) -> Image:
    image = Image(name, 32 * KIB)
    data = image.lines(image.cluster_size)
    stream = packed(data)
    used = (len(stream) - 1) // 512
    image.active.compressed(1, stream, data, at=0, more_sectors=(1 << (12 - 8)) - 1 - used)
    for cluster in (2, 3, 4, 5):
        image.active.data(cluster)
    return image


@case(
    "compressed-ends-file",
    "a file that ends with the last byte of compressed data, within a sector",
    Section.COMPRESSED,
)
def compressed_ends_file(name: str) -> Image:
    image = Image(name, 32 * KIB).metadata_first()
    image.active.data(0)
    data = image.lines(image.cluster_size)
    stream = packed(data)
    image.active.compressed(3, stream, data, at=700)
    image.ends_at = image.host.end - image.cluster_size + 700 + len(stream)
    return image


@case("compressed-part-of-cluster", "a compressed cluster within which the disk ends", Section.COMPRESSED)
def compressed_part_of_cluster(name: str) -> Image:
    image = Image(name, 28 * KIB + 512, cluster_bits=14)
    store(image, 0)
    store(image, 1)
    return image


@case("compressed-over-backing", "compressed clusters over a backing file", Section.COMPRESSED, Section.UNALLOCATED)
def compressed_over_backing(name: str) -> Image:
    image = Image(name, 32 * KIB)
    image.over_raw(image.lines(32 * KIB))
    store(image, 1)
    store(image, 6)
    return image


@case(
    "compressed-in-snapshot", "compressed clusters that a snapshot has too, some of them rewritten", Section.COMPRESSED
)
def compressed_in_snapshot(name: str) -> Image:
    image = Image(name, 32 * KIB)
    for cluster in range(4):
        store(image, cluster)
    image.snapshot("packed")
    image.active.data(1)
    store(image, 2)
    return image


# -- deflate -----------------------------------------------------------------------------------------------------------


def stream_case(name: str, about: str, stream: bytes, content: bytes, *, cluster_bits: int = 12) -> None:
    """A case of one compressed cluster, in the middle of a disk."""

    @case(name, about, Section.COMPRESSED)
    def make(name: str) -> Image:
        image = Image(name, 8 << cluster_bits, cluster_bits=cluster_bits)
        image.active.data(2).compressed(3, stream, content, at=40).data(4)
        return image


_LINES = lines(1000, 4096)
_TOKENS = deflate.tokens(_LINES)
_NOISE = noise(12, 4096)
stream_case("deflate-fixed", "deflate with fixed Huffman codes", deflate.fixed(_TOKENS), _LINES)
stream_case("deflate-dynamic", "deflate with Huffman codes of its own", deflate.dynamic(_TOKENS), _LINES)
stream_case("deflate-literals", "deflate without any match", deflate.dynamic([*_LINES]), _LINES)
stream_case("deflate-stored", "deflate without compression: longer than the cluster", deflate.stored(_NOISE), _NOISE)
stream_case("deflate-stored-blocks", "many small blocks without compression", deflate.stored(_NOISE, block=100), _NOISE)
stream_case(
    "deflate-blocks",
    "blocks of all three kinds in one stream",
    deflate.stored(_LINES[:100], final=False)
    + deflate.stored(b"", final=False)
    + deflate.stored(_LINES[100:1000], final=False)
    + deflate.dynamic(deflate.tokens(_LINES[1000:])),
    _LINES,
)
stream_case(
    "deflate-many-blocks",
    "a stream of eight blocks with codes of their own",
    deflate.dynamic(*[_TOKENS[i : i + 1 + len(_TOKENS) // 8] for i in range(0, len(_TOKENS), 1 + len(_TOKENS) // 8)]),
    _LINES,
)
_DISTANT = noise(7, 3900) + noise(7, 196)
stream_case(
    "deflate-distance-3900",
    "a match at a distance of 3,900 bytes, nearly the window of 4 KiB that QEMU writes with",
    deflate.dynamic(deflate.tokens(_DISTANT)),
    _DISTANT,
)
_ONE_WINDOW = noise(8, 4096) + noise(8, 4096) + bytes(8192)
stream_case(
    "deflate-distance-4096",
    "matches at a distance of 4,096 bytes, the whole window that QEMU writes with",
    deflate.dynamic(deflate.tokens(_ONE_WINDOW)),
    _ONE_WINDOW,
    cluster_bits=14,
)
_WIDE = noise(9, 32768) + noise(9, 32768)
stream_case(
    "deflate-distance-32768",
    "matches at a distance of 32,768 bytes, which the format has and QEMU does not write",
    deflate.dynamic(deflate.tokens(_WIDE, 32768)),
    _WIDE,
    cluster_bits=16,
)
_RUN = b"\xaa" * 4096
stream_case("deflate-overlapping", "matches that overlap themselves", deflate.fixed(deflate.tokens(_RUN)), _RUN)
stream_case(
    "deflate-longer",
    "a stream of more than a cluster: " + STOPS,
    deflate.dynamic(deflate.tokens(_LINES + b"not to be read" * 50)),
    _LINES,
)
stream_case(
    "deflate-garbage-behind",
    "bytes behind the stream that are no deflate",
    deflate.fixed(_TOKENS) + _NOISE[:200],
    _LINES,
)


@case("deflate-no-final-block", "a stream without a last block: " + STOPS, Section.COMPRESSED)
def deflate_no_final_block(name: str) -> Image:
    image = Image(name, 32 * KIB)
    image.active.data(2).compressed(3, deflate.fixed(_TOKENS, final=False), _LINES, at=40)
    return image.may_refuse("decoders that look for the next block, as zlib does, find none")


def broken_stream(name: str, about: str, stream: bytes, reason: str, *, is_zstd: bool = False) -> None:
    @case(name, about, Section.COMPRESSED)
    def make(name: str) -> Image:
        image = Image(name, 32 * KIB, zstd=is_zstd)
        image.active.data(0).compressed(3, stream, b"", at=40)
        return image.refuse(reason)


_SHORT = "the data does not decompress to a cluster"
broken_stream("refuse-deflate-garbage", "compressed data that is no deflate", b"\xff" * 700, _SHORT)
broken_stream("refuse-deflate-short", "a stream of less than a cluster", packed(_LINES[:4000]), _SHORT)
broken_stream("refuse-deflate-cut", "a stream that its descriptor cuts off", deflate.stored(_NOISE)[: 512 * 4], _SHORT)
broken_stream(
    "refuse-deflate-zlib-header",
    "a zlib stream, with zlib's header, where bare deflate has to be",
    b"\x78\x9c" + packed(_LINES),
    _SHORT,
)


@case("refuse-compressed-beyond-file", "compressed data behind the end of the file", Section.COMPRESSED)
def refuse_compressed_beyond_file(name: str) -> Image:
    image = Image(name, 32 * KIB)
    fields = {"offset": 1 << 30, "additional_sectors": 1, "compressed": 1, "copied": 0}
    image.active.data(0).entry(3, int.from_bytes(compressed_l2_entry(12).build(fields), "big"))
    return image.refuse("there is no such data")


# -- Zstandard ---------------------------------------------------------------------------------------------------------


def zstd_case(name: str, about: str, stream: bytes, content: bytes, *, cluster_bits: int = 12) -> None:
    @case(name, about, Section.COMPRESSED, Section.ADDITIONAL)
    def make(name: str) -> Image:
        image = Image(name, 8 << cluster_bits, cluster_bits=cluster_bits, zstd=True)
        image.active.data(2).compressed(3, stream, content, at=40).compressed(5, stream, content).data(6)
        return image


_UNIT = b"0123456789 abcd\n"
zstd_case("zstd-recorded", "a frame of a real compressor, with size and checksum", zstd.RECORDED, lines(0, 4096))
zstd_case("zstd-raw", "a frame of one block without compression: longer than the cluster", zstd.raw(_NOISE), _NOISE)
zstd_case("zstd-raw-blocks", "a frame of many small blocks", zstd.raw(_NOISE, block=100), _NOISE)
zstd_case("zstd-run", "a frame of one byte, repeated", zstd.run(0x5A, 4096), b"\x5a" * 4096)
zstd_case("zstd-sequences", "a frame with a match that overlaps itself", zstd.repeated(_UNIT), _UNIT * 256)
zstd_case(
    "zstd-cluster-bits-18",
    "blocks of the largest size: clusters of 256 KiB",
    zstd.run(0x33, 1 << 18),
    b"\x33" * (1 << 18),
    cluster_bits=18,
)
zstd_case("zstd-cluster-bits-9", "clusters of 512 bytes", zstd.raw(_LINES[:512]), _LINES[:512], cluster_bits=9)
zstd_case(
    "zstd-garbage-behind", "bytes behind the frame that are no frame", zstd.repeated(_UNIT) + b"\xff" * 900, _UNIT * 256
)

zstd_case(
    "zstd-two-frames",
    "two frames, one behind the other",
    zstd.raw(_LINES[:1000]) + zstd.raw(_LINES[1000:]),
    _LINES,
)
zstd_case(
    "zstd-skippable", "a frame that is to be skipped, then data", zstd.skippable(b"skip") + zstd.raw(_LINES), _LINES
)

broken_stream("refuse-zstd-garbage", "compressed data that is no frame", b"\xff" * 700, _SHORT, is_zstd=True)
broken_stream("refuse-zstd-short", "a frame of less than a cluster", zstd.raw(_LINES[:4000]), _SHORT, is_zstd=True)
broken_stream("refuse-zstd-deflate", "deflate, where the header says Zstandard", packed(_LINES), _SHORT, is_zstd=True)
