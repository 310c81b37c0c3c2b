"""VM states made by a real QEMU: the smallest machine there is, stopped before its first instruction."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.support.tools import TIME_LIMIT, ToolFailed, require

# What it takes to attach a drive named "disk" to each machine.
_DEVICES = {"microvm": "virtio-blk-device,drive=disk", "pc": "virtio-blk-pci,drive=disk", "none": None}


def savevm(image: Path, name: str, *, memory: dict[int, int], machine: str = "microvm", megabytes: int = 1) -> None:
    """Take a snapshot of disk and machine. `memory` maps guest-physical addresses to 64-bit words planted there."""
    program = require("qemu-system-x86_64")
    device = _DEVICES[machine]
    drive = f"if=none,id=disk,file={image},format=qcow2"
    command = [program, "-machine", machine, "-accel", "tcg", "-m", str(megabytes), "-S", "-display", "none"]
    command += ["-nodefaults", "-vga", "none", "-monitor", "stdio", "-drive", drive]
    command += ["-device", device] if device else []
    for address, word in memory.items():
        command += ["-device", f"loader,addr={address:#x},data={word:#x},data-len=8"]
    done = subprocess.run(
        command, input=f'savevm "{name}"\nquit\n', text=True, capture_output=True, timeout=TIME_LIMIT, check=False
    )
    if done.returncode != 0 or "Error" in done.stdout:
        raise ToolFailed(f"savevm failed: {done.stderr}{done.stdout}")
