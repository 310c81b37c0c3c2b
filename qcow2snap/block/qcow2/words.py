"""Tables of 64-bit entries as the machine's integers, and back, without numpy. What an entry means is not said here."""

from __future__ import annotations

import sys
from array import array


def words(data: bytes) -> array[int]:
    """The big-endian entries of a table, all of them whole, as integers."""
    values = array("Q", data)
    if sys.byteorder == "little":
        values.byteswap()
    return values


def big_endian(values: array[int]) -> bytes:
    """The entries of a table as they stand in the file."""
    values = values[:]
    if sys.byteorder == "little":
        values.byteswap()
    return values.tobytes()
