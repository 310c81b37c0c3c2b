"""Coverage-guided fuzzing of the NBD server's negotiation and transmission with atheris.

    pip install -e '.[fuzz]'
    python -m tests.fuzz.nbd -max_len=600 -max_total_time=600 CORPUS

CORPUS is a directory, empty at first. What it finds becomes a test in tests/nbd/.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["formats", "qcow2snap"]):
    from qcow2snap.nbd.export import Export, Exports
    from tests.fuzz import sessions
    from tests.nbd.support import PatchworkNode

_directory = Path(tempfile.mkdtemp(prefix="qcow2snap-fuzz-"))
_good = PatchworkNode(_directory / "good", [("file", 40_000), ("zero", 70_000), ("memory", 5000), ("file", 7)])
_bad = PatchworkNode(_directory / "bad", [("file", 50_000), ("bad", 4096), ("zero", 9000), ("memory", 512)])
_exports = Exports([Export("", lambda: _good), Export("good", lambda: _good), Export("bad", lambda: _bad, "damaged")])
_disks = {b"": sessions.Disk(_good.content), b"good": sessions.Disk(_good.content)}
_disks[b"bad"] = sessions.Disk(_bad.content, tuple(_bad.bad))


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


def one_input(data: bytes) -> None:
    choices = sessions.Choices(data)
    sent = choices.pick([handshake, transmission, raw_handshake, raw_transmission])(choices)
    got, cut = sessions.plainly(_exports, choices.pieces(sent))
    sessions.judge(sent, got, _disks, cut=cut)


if __name__ == "__main__":
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()
