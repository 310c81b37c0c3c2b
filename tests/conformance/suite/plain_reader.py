"""The reader under test: python plain_reader.py [--flaw FLAW] IMAGE OUTPUT [SNAPSHOT-ID]. It shares no code with ours.

It reads standard and compressed clusters, extended L2 entries and snapshots, over no backing file. A flaw makes it do
one thing wrong, as readers do.
"""

import os
import signal
import struct
import sys
import time
import zlib


class Refused(Exception):
    pass


def main() -> None:
    words = sys.argv[1:]
    flaw = ""
    if words[0] == "--flaw":
        flaw, words = words[1], words[2:]
    path, output, *ref = words
    if flaw in MISDEEDS:
        MISDEEDS[flaw](path, output)
        return
    with open(path, "rb") as file:
        data = file.read()
    try:
        disk = read(data, ref[0] if ref else None, flaw)
    except Refused as error:
        sys.exit(f"refused: {error}")
    with open(output, "wb") as out:
        out.write(disk)


def read(data: bytes, ref: str | None, flaw: str) -> bytes:
    magic, version, backing, _, bits, size, crypt, _, l1_offset = struct.unpack(">4sIQIIQIIQ", data[:48])
    if magic != b"QFI\xfb" or version not in (2, 3) or backing or crypt:
        raise Refused("not for this reader")
    features = struct.unpack(">Q", data[72:80])[0] if version == 3 else 0
    if features & ~(0x13 if flaw != "accepts-features" else ~0):
        raise Refused("unknown features")
    if ref is not None:
        l1_offset, size = snapshot(data, ref, size)
    extended = bool(features & 16)
    cluster, width = 1 << bits, 16 if extended else 8
    per_table = cluster // width
    disk = bytearray(size)
    for number in range(-(-size // cluster)):
        index, entry = divmod(number, per_table)
        (l1_entry,) = struct.unpack_from(">Q", data, l1_offset + 8 * index)
        table = l1_entry & 0x00FFFFFFFFFFFE00
        if table % cluster:
            raise Refused("unaligned L2 table")
        if not table:
            continue
        (word,) = struct.unpack_from(">Q", data, table + width * entry)
        bitmap = None
        if extended and flaw != "no-subclusters":
            (bitmap,) = struct.unpack_from(">Q", data, table + width * entry + 8)
        piece = guest_cluster(data, word, bitmap, bits, version, flaw)
        end = min(cluster, size - number * cluster)
        disk[number * cluster : number * cluster + end] = piece[:end]
    return bytes(disk)


def guest_cluster(data: bytes, word: int, bitmap: int | None, bits: int, version: int, flaw: str) -> bytes:
    cluster = 1 << bits
    if word >> 62 & 1:
        shift = 62 - (bits - 8)
        offset = word & (1 << shift) - 1
        sectors = ((word & (1 << 62) - 1) >> shift) + 1
        packed = data[offset : offset // 512 * 512 + sectors * 512]
        try:
            whole = zlib.decompressobj(-15).decompress(packed, cluster)
        except zlib.error as error:
            raise Refused(error) from None
        if len(whole) < cluster:
            raise Refused("too little")
        return whole
    host = word & 0x00FFFFFFFFFFFE00
    if host % cluster:
        raise Refused("unaligned cluster")
    if bitmap is not None:
        unit = cluster // 32
        if bitmap & bitmap >> 32 & 0xFFFFFFFF or (bitmap & 0xFFFFFFFF and not host):
            raise Refused("contradiction")
        return b"".join(
            data[host + i * unit : host + (i + 1) * unit] if bitmap >> i & 1 else bytes(unit) for i in range(32)
        )
    if word & 1 and version == 2:
        raise Refused("zero bit")
    if not host or (word & 1 and flaw != "no-zero-bit"):
        return bytes(cluster)
    return data[host : host + cluster].ljust(cluster, b"\0")


def snapshot(data: bytes, ref: str, size: int) -> tuple[int, int]:
    count, position = struct.unpack(">IQ", data[60:72])
    for _ in range(count):
        l1_offset, _, id_size, name_size = struct.unpack_from(">QIHH", data, position)
        (extra,) = struct.unpack_from(">I", data, position + 36)
        own = struct.unpack_from(">Q", data, position + 48)[0] if extra >= 16 else size
        end = position + 40 + extra + id_size
        if data[end - id_size : end] == os.fsencode(ref):
            return l1_offset, own
        position = end + name_size + (-(end + name_size - position) % 8)
    raise Refused("no such snapshot")


def crash(path: str, output: str) -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def sleep(path: str, output: str) -> None:
    time.sleep(60)


def allocate(path: str, output: str) -> None:
    held = bytearray(1 << 32)  # not touched: it is the allocation that fails
    print(len(held))


def hold(path: str, output: str) -> None:
    """Little by little, in a child, so that nobody asks for much at once."""
    if os.fork() == 0:
        held = [b"x" * (1 << 20) for _ in range(20)]
        while True:
            held.append(os.urandom(1 << 20))
    os.wait()


def write_on(path: str, output: str) -> None:
    with open(output, "wb") as out:
        while True:
            out.write(bytes(1 << 20))


def modify(path: str, output: str) -> None:
    with open(path, "r+b") as file:
        file.seek(80)
        file.write(b"\1")
    sys.exit(1)


def say_nothing(path: str, output: str) -> None:
    pass


def make_directory(path: str, output: str) -> None:
    os.mkdir(output)


def replace_image(path: str, output: str) -> None:
    os.unlink(path)
    os.mkdir(path)


MISDEEDS = {
    "make-directory": make_directory,
    "replace-image": replace_image,
    "crash": crash,
    "sleep": sleep,
    "allocate": allocate,
    "hold": hold,
    "write-on": write_on,
    "modify": modify,
    "say-nothing": say_nothing,
}

if __name__ == "__main__":
    main()
