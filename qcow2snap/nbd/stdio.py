"""Standard input and output as one connection, for inetd, systemd and ssh: one socket for both, or two pipes.

From then on nothing else can write to standard output, nor to standard error where that is the same: the client would
take it for a reply.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable
from contextlib import suppress

from qcow2snap.block.node import FileError

CHUNK = 1 << 18  # bytes that are moved at once


class StandardIO:
    """Takes standard input and output away from this process, until close().

    socket  a client's connection; whoever serves it owns it
    """

    def __init__(self) -> None:
        try:
            is_one = os.path.sameopenfile(0, 1)
            if os.path.sameopenfile(1, 2):
                _put(os.open(os.devnull, os.O_WRONLY), 2)
            received, sent = os.dup(0), os.dup(1)
            _put(os.open(os.devnull, os.O_RDONLY), 0)
            _put(os.dup(2), 1)
        except OSError as error:
            raise FileError(f"standard input and output cannot be served: {error.strerror}") from error
        self._pumps: list[threading.Thread] = []
        if is_one:
            os.close(sent)
            self.socket = self._only(received)
        else:
            self.socket = self._pumped(received, sent)

    def close(self) -> None:
        """Wait a while until the last bytes are with the client. The connection must be closed."""
        for pump in self._pumps[1:]:
            pump.join(1)

    def _only(self, descriptor: int) -> socket.socket:
        try:
            sock = socket.socket(fileno=descriptor)
        except OSError as error:
            raise FileError("standard input is no socket, nor are input and output two pipes") from error
        if sock.type != socket.SOCK_STREAM or sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            raise FileError("standard input is no socket with a client; one that listens comes by socket activation")
        sock.setblocking(True)
        return sock

    def _pumped(self, received: int, sent: int) -> socket.socket:
        """A socket whose bytes two threads move from one pipe and to the other."""
        ours, theirs = socket.socketpair()

        def end_of_input() -> None:
            theirs.shutdown(socket.SHUT_WR)
            os.close(received)

        def end_of_output() -> None:
            theirs.shutdown(socket.SHUT_RDWR)  # where the client takes no more, our side learns it
            os.close(sent)

        for source, target, end in (
            (received, theirs.fileno(), end_of_input),
            (theirs.fileno(), sent, end_of_output),
        ):
            self._pumps.append(threading.Thread(target=_pump, args=[source, target, end], daemon=True))
            self._pumps[-1].start()
        return ours


def _put(descriptor: int, at: int) -> None:
    os.dup2(descriptor, at)
    os.close(descriptor)


def _pump(source: int, target: int, end: Callable[[], None]) -> None:
    """Move bytes until there are no more or their target is gone, and pass that on.

    Not by splice(): between Unix sockets and pipes, Linux 6.18 leaves small pieces lie until more arrives.
    """
    with suppress(OSError):
        while data := os.read(source, CHUNK):
            view = memoryview(data)
            while view:
                view = view[os.write(target, view) :]
    with suppress(OSError):
        end()
