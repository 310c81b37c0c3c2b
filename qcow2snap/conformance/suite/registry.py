"""Where cases are registered: each is a function that makes an image, with a name, a sentence, and its sections."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase

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


def choose_cases(patterns: Sequence[str] = (), *, section: str = "", large: bool = False) -> list[Case]:
    """Those of all cases that have such names, with * and ?, and a section with `section` in its name.

    Without patterns it is any name. Large cases are among them only if that is asked for.
    """
    wanted = section.lower()
    return [
        case
        for case in all_cases()
        if (large or not case.large)
        and any(wanted in each.lower() for each in case.sections)
        and (not patterns or any(fnmatchcase(case.name, pattern) for pattern in patterns))
    ]
