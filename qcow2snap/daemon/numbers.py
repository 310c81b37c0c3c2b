"""Numbers in addresses of sockets, which QEMU's options have as strings. Where they lead is not known here."""

from __future__ import annotations

from qcow2snap.block.node import InvalidOption

MAX_PORT = (1 << 16) - 1


def read_number(text: str, what: str, most: int = MAX_PORT) -> int:
    """A port, or whatever else `what` says. InvalidOption if it is none."""
    if not (text.isascii() and text.isdigit() and len(text) < 100 and int(text) <= most):
        raise InvalidOption(f"'{text[:200]}' is no {what}: say a number up to {most}")
    return int(text)
