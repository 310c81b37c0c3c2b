"""Numbers of bytes as QEMU's tools read them (QEMU util/cutils.c: qemu_strtosz)."""

from __future__ import annotations

import re

_SIZE = re.compile(r"(?:(0[xX][0-9a-fA-F]+)|([0-9]+)(\.[0-9]*)?([bkmgtpeBKMGTPE]?))")
_SHIFTS = {"": 0, "b": 0, "k": 10, "m": 20, "g": 30, "t": 40, "p": 50, "e": 60}


def parse_size(text: str) -> int:
    """Bytes: 512, 0x200, 64k, 1.5G. What a fraction leaves of a byte is dropped. Anything else: ValueError."""
    match = _SIZE.fullmatch(text)
    if not match:
        raise ValueError(f"{text!r} is not a number of bytes (512, 64k, 10M, 0x200)")
    hexadecimal, whole, fraction, suffix = match.groups()
    if hexadecimal:
        return int(hexadecimal, 16)
    if not fraction:
        return int(whole) << _SHIFTS[suffix.lower()]
    if suffix in ("", "b", "B"):
        raise ValueError(f"{text!r} is no whole number of bytes")
    from decimal import Decimal  # every command reads sizes, hardly any of them one with a fraction

    return int(Decimal(whole + fraction) * (1 << _SHIFTS[suffix.lower()]))
