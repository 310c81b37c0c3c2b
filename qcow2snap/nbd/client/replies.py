"""What both phases of a client share: how it says what it needs from the server, and what a server's no looks like."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, TypeVar

from construct import ConstructError

from formats.nbd import Errno
from qcow2snap.block.node import NBDError

T = TypeVar("T")

# What a step of the protocol needs next: so many bytes, which it is then sent; or a buffer that is to be filled.
Wanted = int | memoryview
Steps = Generator[Wanted, bytes, T]


class ReplyError(NBDError):
    """The server said no.

    error  a reply type of the handshake or an error value of the transmission; an int where it is none we know
    """

    def __init__(self, error: int, message: str) -> None:
        super().__init__(message)
        self.error = error


def failed(error: int, message: str) -> ReplyError:
    """A request's error, with the server's own words where it has any."""
    try:
        name = Errno(error).name
    except ValueError:
        name = f"error {error}"
    return ReplyError(error, f"{name}: {message}" if message else name)


def parsed(layout: Any, data: bytes) -> Any:
    try:
        return layout.parse(data)
    except ConstructError as error:
        raise NBDError(f"the server's reply cannot be understood: {error}") from error


def text(data: bytes) -> str:
    """A string of the server's for a human being."""
    return data.decode(errors="backslashreplace")
