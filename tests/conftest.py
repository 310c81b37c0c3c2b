"""Fixtures for all tests: a builder of real images, the shipped images, and the command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from tests.support import Image, Library, Result
from tests.support import run as run_cli

NewImage = Callable[..., Image]

# Machines are shared and noisy: how long one example takes says nothing about the code.
settings.register_profile("qcow2snap", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("qcow2snap")


@pytest.fixture
def new_image(tmp_path: Path) -> NewImage:
    """Builder of qcow2 images: new_image("1M", cluster_size=4096).write(0, 65536).snapshot("small").resize("2M")."""
    made: list[Image] = []

    def new(size: str | int = "1M", *, name: str | None = None, **options: Any) -> Image:
        file = name or ("disk.qcow2" if not made else f"disk-{len(made)}.qcow2")
        image = Image.create(tmp_path / file, size, **options)
        made.append(image)
        return image

    return new


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Library:
    """The shipped images: library.path("demo"), library.images["demo"].active.sha256, library.damaged."""
    return Library(tmp_path_factory.mktemp("fixtures"))


@pytest.fixture
def run() -> Callable[..., Result]:
    """Our command line as a process: run("list", image, "--json").json()."""
    return run_cli
