"""SIGHUP opens the images again: who comes then sees what there is then, who is there stays with what was."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.nbd.serving import Serving
from tests.nbd.support import run as output
from tests.nbd.test_workers import Client, workers
from tests.support import Image, require
from tests.support.processes import open_files
from tests.support.waiting import until

NewImage = Callable[..., Image]


@pytest.mark.parametrize("number", ["0", "2"])
def test_a_new_snapshot_is_there_after_sighup(new_image: NewImage, tmp_path: Path, number: str) -> None:
    require("nbdinfo")
    image = new_image("1M").write(0, 65536).snapshot("monday")
    serving = Serving(image.path, "-U", "-k", tmp_path / "s", "--workers", number)

    def exports() -> list[str]:
        listing = output("nbdinfo", "--list", f"nbd+unix:///?socket={tmp_path / 's'}")
        return [line for line in listing.splitlines() if line.startswith("export=")]

    before = workers(serving)
    client = Client(tmp_path / "s")
    content = client.read()
    image.write(0, 65536).snapshot("tuesday")
    assert exports() == ['export="monday":']
    serving.process.send_signal(signal.SIGHUP)
    assert until(lambda: exports() == ['export="monday":', 'export="tuesday":'])
    assert client.read() == content  # from the old state
    assert len(workers(serving)) == len(before) + (len(before) > 0)  # the idle one of before is gone
    client.socket.close()
    assert until(lambda: len(workers(serving)) == len(before))
    assert serving.stop() == 0


@pytest.mark.parametrize("number", ["0", "2"])
def test_files_of_former_states_are_closed_with_their_last_client(
    new_image: NewImage, tmp_path: Path, number: str
) -> None:
    image = new_image("1M").write(0, 65536).snapshot("monday")
    serving = Serving(image.path, "-k", tmp_path / "s", "--workers", number)

    def held() -> int:
        """How often any of its processes has the image open."""
        return sum(open_files(pid).count(str(image.path)) for pid in [serving.process.pid, *workers(serving)])

    before = held()
    for _ in range(3):
        client = Client(tmp_path / "s")
        assert client.read()
        serving.process.send_signal(signal.SIGHUP)
        assert until(lambda: held() > before)
        assert client.read()
        client.socket.close()
        assert until(lambda: held() == before)
    assert serving.stop() == 0


def test_an_image_that_cannot_be_opened_again_is_served_as_it_was(new_image: NewImage, tmp_path: Path) -> None:
    image = new_image("1M").write(0, 65536).snapshot("monday")
    serving = Serving(image.path, "-k", tmp_path / "s")
    content = Client(tmp_path / "s").read()
    image.path.rename(tmp_path / "moved")
    serving.process.send_signal(signal.SIGHUP)
    time.sleep(0.2)
    assert Client(tmp_path / "s").read() == content
    assert serving.stop() == 0
    assert "served as they were" in serving.stderr
