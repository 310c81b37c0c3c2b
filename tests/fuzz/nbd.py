"""Coverage-guided fuzzing with atheris: the NBD server, all of it but sockets, and what our client meets in a server.

    pip install -e '.[fuzz]'
    python -m tests.fuzz.nbd -max_len=600 -max_total_time=600 CORPUS

CORPUS is a directory, empty at first. What it finds becomes a test in tests/nbd/.
"""

from __future__ import annotations

import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["formats", "qcow2snap"]):
    from formats.nbd import Command
    from qcow2snap.block.node import NBDError
    from qcow2snap.nbd.client import Request
    from qcow2snap.nbd.client.negotiation import ClientNegotiation
    from qcow2snap.nbd.client.transmission import Transmission
    from qcow2snap.nbd.export import Export, Exports
    from qcow2snap.nbd.framing import EXTENDED_HEADERS, SIMPLE_REPLIES, STRUCTURED_REPLIES
    from tests.fuzz import sessions
    from tests.fuzz.judge import Disk, judge
    from tests.fuzz.servers import plainly
    from tests.nbd.support import PatchworkNode
    from tests.nbd.test_lying_servers import steps

_directory = Path(tempfile.mkdtemp(prefix="qcow2snap-fuzz-"))
_good = PatchworkNode(_directory / "good", [("file", 40_000), ("zero", 70_000), ("memory", 5000), ("file", 7)])
_bad = PatchworkNode(_directory / "bad", [("file", 50_000), ("bad", 4096), ("zero", 9000), ("memory", 512)])
_exports = Exports([Export("", lambda: _good), Export("good", lambda: _good), Export("bad", lambda: _bad, "damaged")])
_disks = {b"": Disk(_good.content), b"good": Disk(_good.content)}
_disks[b"bad"] = Disk(_bad.content, tuple(_bad.bad))


def handshake(choices: sessions.Choices) -> bytes:
    return sessions.handshake(choices) + sessions.going_on(choices, _good.size)


def transmission(choices: sessions.Choices) -> bytes:
    mode, name = choices.pick(sessions.MODES), choices.pick([b"good", b"bad"])
    size = len(_disks[name].content)
    return sessions.agreed(mode, name) + sessions.requests(choices, size, extended=mode == "extended")


def raw_handshake(choices: sessions.Choices) -> bytes:
    return choices.some(600)


def raw_transmission(choices: sessions.Choices) -> bytes:
    return sessions.agreed(choices.pick(sessions.MODES), b"good") + choices.some(600)


def client_handshake(choices: sessions.Choices) -> None:
    """A server's side of a handshake is a server's, with some damage."""
    sent = sessions.agreed(choices.pick(sessions.MODES), b"good")
    said = bytearray(plainly(_exports, [sent])[0])
    for _ in range(choices.number(4)):
        at = choices.number(len(said))
        said[at : at + 4] = choices.some(8)
    machine = ClientNegotiation()
    with suppress(NBDError, EOFError):
        steps(machine.greet(), bytes(said[:18]))
        steps(machine.go("good", ["base:allocation"]), bytes(said[18:]))


def client_transmission(choices: sessions.Choices) -> None:
    """Replies to three requests in flight, from a server that damages some."""
    framing = choices.pick([STRUCTURED_REPLIES, EXTENDED_HEADERS, SIMPLE_REPLIES])
    machine = Transmission(framing, {0: "base:allocation"})
    commands = [choices.pick([Command.READ, Command.BLOCK_STATUS, Command.FLUSH]) for _ in range(3)]
    asked = b"".join(machine.request(Request(each, 512, 512 * (each != Command.FLUSH))) for each in commands)
    sent = sessions.agreed(
        sessions.MODES[[SIMPLE_REPLIES, STRUCTURED_REPLIES, EXTENDED_HEADERS].index(framing)], b"good"
    )
    greeted = len(plainly(_exports, [sent])[0])
    said = bytearray(plainly(_exports, [sent, asked])[0][greeted:]) or bytearray(1)
    for _ in range(choices.number(4)):
        at = choices.number(len(said))
        said[at : at + 4] = choices.some(8)
    with suppress(NBDError, EOFError):
        reply = steps(machine.next_reply(), bytes(said))
        assert reply.error or len(reply.data) == (512 if reply.request.command == Command.READ else 0)


def one_input(data: bytes) -> None:
    choices = sessions.Choices(data)
    if choices.number(3) == 2:
        choices.pick([client_handshake, client_transmission])(choices)
        return
    sent = choices.pick([handshake, transmission, raw_handshake, raw_transmission])(choices)
    got, cut = plainly(_exports, choices.pieces(sent))
    judge(sent, got, _disks, cut=cut)


if __name__ == "__main__":
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()
