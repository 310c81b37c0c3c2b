"""The smallest guest that uses a disk: a boot sector that writes 4 MiB from end to end, again and again, by int 13h."""

from __future__ import annotations

from pathlib import Path

SIZE = 4 << 20  # bytes of its disk
_BOOT_SIZE = 1 << 20  # the BIOS reads no disk of less than a cylinder

# 16-bit code, loaded at 0x7c00.
_CODE = bytes.fromhex(
    "31c0 8ed8 8ed0 bc007c fc"  #    ax = ds = ss = 0; sp = 0x7c00; count upwards
    "6631ed"  #                      ebp = 0
    "6645"  #               0x0d:    ebp += 1: the generation
    "b80010 8ec0 31ff 6689e8"  #     es:di = 0x1000:0; eax = ebp
    "b90020 66f3ab"  #               cx = 0x2000; fill 32 KiB with eax
    "66c706547c00000000"  #          sector = 0
    "be4c7c b80043 b281 cd13"  # 0x28: si = 0x7c4c; write by int 13h, function 43h, to the second disk
    "7213"  #                        failed: go to 0x47
    "668306547c40"  #                sector += 64
    "66813e547c00200000 72e3"  #     sector < 0x2000: go to 0x28
    "ebc6"  #                        go to 0x0d
    "f4 ebfd"  #            0x47:    halt
    "6690"
    "1000 4000 0000 0010 0000000000000000"  # 0x4c: address packet: 64 sectors from 0x1000:0; 0x54: the sector
)


def machine(directory: Path) -> tuple[str, ...]:
    """QEMU's options for a machine that boots it, and writes the node "disk"."""
    boot = directory / "boot.img"
    boot.write_bytes(_CODE.ljust(510, b"\0") + b"\x55\xaa" + bytes(_BOOT_SIZE - 512))
    options = ["-machine", "pc", "-accel", "tcg", "-m", "16", "-vga", "none"]
    options += ["-drive", f"if=none,id=boot,format=raw,readonly=on,file={boot}"]
    options += ["-device", "virtio-blk-pci,drive=boot,bootindex=1", "-device", "virtio-blk-pci,drive=disk,bootindex=2"]
    return tuple(options)


def generations(data: bytes) -> list[int]:
    """The generations that follow each other from the start of the disk on."""
    found: list[int] = []
    for sector in range(0, len(data), 512):
        word = data[sector : sector + 4]
        assert data[sector : sector + 512] == word * 128, f"sector at {sector} is of no single generation"
        generation = int.from_bytes(word, "little")
        if not found or found[-1] != generation:
            found.append(generation)
    return found
