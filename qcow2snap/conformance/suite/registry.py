"""Where cases are registered: each is a function that makes an image, with a name, a sentence, and its sections."""

from __future__ import annotations

from collections.abc import Callable

from qcow2snap.conformance.suite.builder import Image
from qcow2snap.conformance.suite.values import Built, Case, Section

CASES: dict[str, Case] = {}

Make = Callable[[str], Image]


def case(name: str, about: str, *sections: Section, large: bool = False) -> Callable[[Make], Make]:
    """The decorated function gets the case's name, and makes its image."""

    def register(make: Make) -> Make:
        def build(name: str) -> Built:
            return make(name).build()

        assert name not in CASES, name
        CASES[name] = Case(name, about, sections, build, large)
        return make

    return register


def all_cases() -> list[Case]:
    """Every case, in the order of the sections."""
    import qcow2snap.conformance.suite.cases  # noqa: F401  # registers them

    return [*CASES.values()]
