"""Real images with random bytes changed or the end cut off: a result, or one error of ours, and soon."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import qcow2snap
from tests.cli.support import here
from tests.support import Library, read_table
from tests.support.table import cluster_size, field, patch

LIBRARY = Library(Path())
# One image of each kind; those with other files refer to names that the copy does not have beside it.
SEEDS = ["sound", "sound-zstd", "extended-l2-16k", "bitmaps", "vm-state-grown", "names", "data-file", "backing-json"]
PIECE = 64 << 10
READ_AT_MOST = 8 << 20  # bytes of each disk: damage may have made it huge

pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning")]


@dataclass(frozen=True)
class Change:
    """A number written into some structure of the image: which one, where in it, what."""

    structure: str
    position: int
    value: int
    size: int

    def apply(self, image: Path, sound: Path) -> None:
        """The place is looked up in the sound image: what was changed before may lead anywhere."""
        start, length = self._place(sound)
        offset = start + self.position % max(1, length)
        patch(image, offset, (self.value & ((1 << 8 * self.size) - 1)).to_bytes(self.size, "big"))

    def _place(self, image: Path) -> tuple[int, int]:
        l1, cluster = field(image, 40), cluster_size(image)
        entries = read_table(image)
        if self.structure == "header":
            return 0, 112
        if self.structure == "extensions":
            return 112, 400
        if self.structure == "table" and entries:
            return entries[0].host_offset, 64 * len(entries)
        if self.structure == "l1":
            return l1, 24
        if self.structure == "snapshot l1" and entries:
            return entries[self.position % len(entries)].l1_table_offset, 24
        if self.structure == "l2":
            return field(image, l1) & 0x00FFFFFFFFFFFE00, cluster
        return 0, image.stat().st_size


STRUCTURES = ("header", "header", "extensions", "table", "table", "l1", "snapshot l1", "l2", "l2", "anywhere")
VALUES = st.one_of(
    st.sampled_from([0, 1, 0xFF, 0xFFFF, 0xFFFFFFFF, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, (1 << 64) - 512, 1 << 62]),
    st.integers(0, (1 << 64) - 1),
    st.integers(0, 1 << 18).map(lambda number: number << 9),
)
CHANGES = st.builds(
    Change, st.sampled_from(STRUCTURES), st.integers(0, 1 << 20), VALUES, st.sampled_from([1, 2, 4, 8, 8])
)


@pytest.mark.timeout(120)
@settings(deadline=5000, max_examples=300, derandomize=True, suppress_health_check=list(HealthCheck))
@given(seed=st.sampled_from(SEEDS), changes=st.lists(CHANGES, min_size=1, max_size=4), cut=st.integers(0, 400))
def test_any_damage_gives_a_result_or_an_error_of_ours(
    library: Library, seed: str, changes: list[Change], cut: int
) -> None:
    survives(library, seed, changes, cut)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@settings(deadline=5000, max_examples=10_000, suppress_health_check=list(HealthCheck))
@given(seed=st.sampled_from(SEEDS), changes=st.lists(CHANGES, min_size=1, max_size=6), cut=st.integers(0, 400))
def test_much_more_damage_gives_a_result_or_an_error_of_ours(
    library: Library, seed: str, changes: list[Change], cut: int
) -> None:
    survives(library, seed, changes, cut)


def survives(library: Library, seed: str, changes: list[Change], cut: int) -> None:
    """Everything that reads runs to its end. `cut` takes up to 99 hundredths off the file's end, mostly none."""
    sound = library.path(seed)
    with tempfile.TemporaryDirectory() as directory:
        image = Path(directory, sound.name)
        for file in sound.parent.glob(f"{seed}.*"):
            Path(directory, file.name).write_bytes(file.read_bytes())
        for change in changes:
            change.apply(image, sound)
        if cut < 100:
            with image.open("r+b") as opened:
                opened.truncate(image.stat().st_size * cut // 100)
        for command in ("list", "info", "map", "list --usage"):
            assert here(*command.split(), image).returncode in (0, 1)
        read_all(image)


def read_all(image: Path) -> None:
    try:
        opened = qcow2snap.open(image)
    except qcow2snap.Qcow2SnapError:
        return
    with opened:
        for disk in (opened.active, *opened.snapshots[:10]):
            with disk.open() as file:
                for offset in range(0, min(disk.size, READ_AT_MOST), PIECE):
                    try:
                        file.seek(offset)
                        file.read(PIECE)
                    except qcow2snap.Qcow2SnapError:
                        continue
