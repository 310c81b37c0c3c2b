"""Strings as the NBD protocol has them: UTF-8 without NUL, of at most 4,096 bytes."""

from __future__ import annotations

from formats.nbd import MAX_STRING


def is_string(text: str) -> bool:
    """The protocol can carry it. Bytes that were not UTF-8 are surrogates here, which do not encode."""
    try:
        return len(text.encode()) <= MAX_STRING and "\0" not in text
    except UnicodeEncodeError:
        return False


def message(text: str) -> bytes:
    """A message for a human being as a string of the protocol, whatever is in it: escaped and cut where need be."""
    encoded = text.replace("\0", "\\0").encode(errors="backslashreplace")
    return encoded[:MAX_STRING].decode(errors="ignore").encode()
