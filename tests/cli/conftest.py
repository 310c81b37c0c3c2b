"""The command line runs within the process of the tests, but where it needs one of its own."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.cli.support import here
from tests.conftest import NewImage
from tests.support import Image, Result
from tests.support import run as in_a_process
from tests.support.table import field
from tests.support.tools import Argument


@pytest.fixture
def run() -> Callable[..., Result]:
    """run("list", image, "--json").json(). Starting Python each time would take most of the time of these tests."""

    def run(*args: Argument, env: dict[str, str] | None = None) -> Result:
        return in_a_process(*args, env=env) if env or "-" in args else here(*args)

    return run


@pytest.fixture
def slow_image(new_image: NewImage) -> Image:
    """A gigabyte that takes a while: all of its clusters are compressed, and all are the same one."""
    cluster = 2 << 20
    image = new_image("1G", cluster_size=cluster).write(0, cluster, compressed=True)
    l1_table = field(image.path, 40)
    l2_table = field(image.path, l1_table) & 0x00FF_FFFF_FFFF_FE00
    entry = field(image.path, l2_table)
    return image.patch(l2_table, entry.to_bytes(8, "big") * 512)
