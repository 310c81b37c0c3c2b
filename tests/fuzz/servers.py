"""The two ways in which our server takes a whole session: plainly, without a socket, and by a connection."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterable
from contextlib import suppress

from formats.nbd import Command
from qcow2snap.block.node import NBDError
from qcow2snap.nbd.connection import Connection
from qcow2snap.nbd.export import Exports
from qcow2snap.nbd.negotiation import Agreement, ServerNegotiation
from qcow2snap.nbd.transmission import Answers, Requests

MAX_HELD = (1 << 16) + 16  # bytes of a handshake that wait for the rest of their option
MAX_SENT = (1 << 16) + (1 << 13)  # bytes of a handshake's answers made at once


def plainly(exports: Exports, pieces: Iterable[bytes]) -> tuple[bytes, bool]:
    """A whole session without a socket: what was said, and whether the client was cut off."""
    out = bytearray()
    negotiation = ServerNegotiation(exports)
    transmission: Transmission | None = None
    try:
        _drain(negotiation, out)
        for piece in pieces:
            if transmission is None:
                negotiation.receive(piece)
                _drain(negotiation, out)
                if not negotiation.ended:
                    assert len(negotiation.unused) <= MAX_HELD + len(piece)
                    continue
                if negotiation.agreement is None:
                    return bytes(out), False
                transmission = Transmission(negotiation.agreement)
                piece = negotiation.unused
            transmission.receive(piece, out)
            if transmission.over:
                break
    except NBDError:
        return bytes(out), True
    return bytes(out), False


def _drain(negotiation: ServerNegotiation, out: bytearray) -> None:
    while data := negotiation.data_to_send():
        assert len(data) <= MAX_SENT
        out += data


class Transmission:
    """The plain twin of a connection after its handshake."""

    def __init__(self, agreement: Agreement) -> None:
        self._requests = Requests(agreement.framing)
        self._answers = Answers(agreement)
        self.over = False

    def receive(self, data: bytes, out: bytearray) -> None:
        for request, payload in self._requests.receive(data):
            if request.type == Command.DISC:
                self.over = True
                return
            for piece in self._answers.answer(request, [payload] if payload else []):
                out += piece


def quickly(exports: Exports, sent: bytes) -> tuple[bytes, bool]:
    """The same by a Connection on a socket."""
    ours, theirs = socket.socketpair()
    ours.settimeout(20)
    connection = Connection(theirs, "test", exports, handshake_timeout=20)
    server = threading.Thread(target=connection.run)
    server.start()
    sender = threading.Thread(target=_send_all, args=[ours, sent])
    sender.start()
    out = bytearray()
    with ours, suppress(ConnectionError):
        while piece := ours.recv(1 << 16):
            out += piece
    for thread in (sender, server):
        thread.join(20)
        assert not thread.is_alive()
    return bytes(out), True  # it cannot be told from its going because the client had said all


def _send_all(sock: socket.socket, data: bytes) -> None:
    with suppress(OSError):  # the server may hang up in the middle
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
