"""The command line runs within the process of the tests, but where it needs one of its own."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.cli.support import here
from tests.support import Result
from tests.support import run as in_a_process
from tests.support.tools import Argument


@pytest.fixture
def run() -> Callable[..., Result]:
    """run("list", image, "--json").json(). Starting Python each time would take most of the time of these tests."""

    def run(*args: Argument, env: dict[str, str] | None = None) -> Result:
        return in_a_process(*args, env=env) if env or "-" in args else here(*args)

    return run
