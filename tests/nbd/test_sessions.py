"""Any client at all: thousands of random sessions, sound and broken, cut into pieces of any size.

Each is judged by tests/fuzz/judge.py: whole replies in the protocol's form, one final reply to each option and one
answer to each request, the right bytes and errors, no exception but NBDError, and little held between two calls.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcow2snap.block.node import BlockNode, FileError
from qcow2snap.nbd.export import Export, Exports
from tests.fuzz.judge import Disk, judge
from tests.fuzz.servers import plainly, quickly
from tests.fuzz.sessions import MODES, Choices, agreed, going_on, handshake, requests
from tests.nbd.support import PatchworkNode

GOOD = [("file", 40_000), ("zero", 70_000), ("memory", 5000), ("file", 100_001), ("zero", 300), ("file", 7)]
BAD = [("file", 50_000), ("bad", 4096), ("zero", 9000), ("bad", 1), ("memory", 512)]


class Served(NamedTuple):
    """Exports, and what is known of them. One of them cannot be opened."""

    exports: Exports
    disks: dict[bytes, Disk]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    def fail() -> BlockNode:
        raise FileError("its L1 table is gone")

    directory = tmp_path_factory.mktemp("sessions")
    good, bad = PatchworkNode(directory / "good", GOOD), PatchworkNode(directory / "bad", BAD, seed=2)
    exports = Exports(
        [
            Export("", lambda: good, "the default one"),
            Export("good", lambda: good),
            Export("bad", lambda: bad, "damaged"),
            Export("closed", fail, "cannot be opened"),
        ]
    )
    known = Disk(good.content)
    yield Served(exports, {b"": known, b"good": known, b"bad": Disk(bad.content, tuple(bad.bad))})
    for node in (good, bad):
        node.close()


RANDOM = st.binary(min_size=100, max_size=500)


@settings(max_examples=4000)
@given(RANDOM)
def test_any_handshake_is_answered_or_cut_off(served: Served, data: bytes) -> None:
    choices = Choices(data)
    sent = handshake(choices) + going_on(choices, len(served.disks[b"good"].content))
    got, cut = plainly(served.exports, choices.pieces(sent))
    verdict = judge(sent, got, served.disks, cut=cut)
    whole, cut_too = plainly(served.exports, [sent])
    assert cut_too == cut
    if not cut:  # what came before a cut may have been answered, or not
        assert whole == got
    assert verdict.export is None or verdict.export in served.disks


@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=2000)
@given(RANDOM)
def test_any_request_is_answered_or_ends_the_session(served: Served, mode: str, data: bytes) -> None:
    choices = Choices(data)
    name = choices.pick([b"good", b"bad", b""])
    sent = agreed(mode, name, contexts=bool(choices.number(4)))
    sent += requests(choices, len(served.disks[name].content), extended=mode == "extended")
    got, cut = plainly(served.exports, choices.pieces(sent))
    assert judge(sent, got, served.disks, cut=cut).export == name


@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=200)
@given(RANDOM)
def test_the_fast_way_and_the_plain_way_answer_any_session_alike(served: Served, mode: str, data: bytes) -> None:
    choices = Choices(data)
    name = choices.pick([b"good", b"bad"] if mode != "simple" else [b"good"])  # a simple reply may be broken off
    sent = agreed(mode, name)
    sent += requests(choices, len(served.disks[name].content), extended=mode == "extended")
    got, cut = plainly(served.exports, [sent])
    plain = judge(sent, got, served.disks, cut=cut)
    got, cut = quickly(served.exports, sent)
    assert judge(sent, got, served.disks, cut=cut) == plain
