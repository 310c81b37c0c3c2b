"""What the server says of its clients: every line of an honest day, and not all of a flood."""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from qcow2snap.nbd.log import BURST, RATE, LogHandler


class Clock:
    """Time that goes when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def logger_to(clock: Clock) -> Callable[[int], logging.Logger]:
    logger = logging.Logger("test")

    def to(descriptor: int) -> logging.Logger:
        logger.addHandler(LogHandler(descriptor, clock=clock))
        return logger

    return to


def test_lines_of_a_flood_are_counted(tmp_path: Path, clock: Clock, logger_to: Callable[[int], logging.Logger]) -> None:
    with (tmp_path / "log").open("wb") as file:
        logger = logger_to(file.fileno())
        for number in range(BURST + 500):
            logger.warning("client %d: refused", number)
        clock.now += 1
        for _ in range(2 * RATE):
            logger.warning("later")
        clock.now += 3600
        logger.warning("next day")
    lines = (tmp_path / "log").read_text().splitlines()
    assert lines[:BURST] == [f"qcow2snap: client {number}: refused" for number in range(BURST)]
    assert lines[BURST] == "qcow2snap: 500 lines left out"
    assert lines[BURST + 1 : -2] == ["qcow2snap: later"] * RATE
    assert lines[-2:] == [f"qcow2snap: {RATE} lines left out", "qcow2snap: next day"]


@pytest.mark.parametrize("kind", ["pipe", "socket"])
def test_nobody_waits_for_who_does_not_read(
    kind: str, clock: Clock, logger_to: Callable[[int], logging.Logger]
) -> None:
    if kind == "pipe":
        reading, writing = os.pipe()
    else:
        reading, writing = (end.detach() for end in socket.socketpair())
    logger = logger_to(writing)

    def flood() -> None:
        for _ in range(3000):
            clock.now += 1
            logger.warning("x" * 1000)

    thread = threading.Thread(target=flood, daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive()
    assert os.get_blocking(writing), "others may write there too, and want to wait"
    os.set_blocking(reading, False)
    with suppress(BlockingIOError):
        while os.read(reading, 1 << 20):
            pass
    logger.warning("now somebody reads")
    said = os.read(reading, 1 << 16).decode().splitlines()
    assert said[0].endswith("lines left out")
    assert said[1] == "qcow2snap: now somebody reads"
    os.close(reading)
    logger.warning("nobody is there any more")
    os.close(writing)


def test_a_line_is_one_line_and_text_whatever_is_in_it(
    tmp_path: Path, logger_to: Callable[[int], logging.Logger]
) -> None:
    with (tmp_path / "log").open("wb") as file:
        logger = logger_to(file.fileno())
        logger.warning("disk-\udcff.qcow2: bad")
    assert (tmp_path / "log").read_bytes() == b"qcow2snap: disk-\\udcff.qcow2: bad\n"
