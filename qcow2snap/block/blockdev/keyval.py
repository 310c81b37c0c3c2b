"""Options as one writes them on a command line: `key=value,group.key=value`, and the nested ones that they stand for.

QEMU's keyval syntax (util/keyval.c): dots in keys nest, fragments 0, 1, 2, ... are a list, `,,` is a comma in a value,
and of a key that is given twice the last value counts. What keys there are is not known here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from qcow2snap.block.node import InvalidOption

MAX_FRAGMENT = 127  # characters of a key between two dots, as in QEMU
MAX_LIST = 1 << 10  # elements

_FRAGMENT = re.compile(r"[A-Za-z0-9_-]+")
_VALUE = re.compile(r"(?:[^,]|,,)*")


def parse_keyval(text: str, implied: str | None = None) -> dict[str, Any]:
    """The options of a text as nested dictionaries and lists of strings. `implied`: the key of a first value without.

    InvalidOption, in QEMU's words.
    """
    options: dict[str, Any] = {}
    position = 0
    while position < len(text):
        start: int
        key, equals, _ = text[position:].partition("=")
        if not equals or "," in key:
            key = key.partition(",")[0]
            if position or implied is None or not key:
                _fragments(key)
                raise InvalidOption(f"Expected '=' after parameter '{key}'")
            start = position
            key = implied
        else:
            start = position + len(key) + 1
        value = _VALUE.match(text, start)
        assert value is not None
        _put(options, _fragments(key), value[0].replace(",,", ","))
        position = value.end() + 1
    return {key: _with_lists(value, key) for key, value in options.items()}


def nested(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options some of whose keys are dotted (`file.filename`, as in the json: names of images) as nested ones."""
    result: dict[str, Any] = {}
    for key, value in options.items():
        first, dot, rest = key.partition(".")
        if not dot:
            result[key] = value
        elif isinstance(result.setdefault(first, {}), dict):
            result[first][rest] = value
    return result


def _fragments(key: str) -> list[str]:
    fragments = key.split(".")
    if not all(_FRAGMENT.fullmatch(fragment) and len(fragment) <= MAX_FRAGMENT for fragment in fragments):
        raise InvalidOption(f"Invalid parameter '{key[:200]}'")
    return fragments


def _put(options: dict[str, Any], fragments: list[str], value: str) -> None:
    for number, fragment in enumerate(fragments[:-1], 1):
        below = options.setdefault(fragment, {})
        if not isinstance(below, dict):
            raise _inconsistent(".".join(fragments[:number]))
        options = below
    if isinstance(options.get(fragments[-1]), dict):
        raise _inconsistent(".".join(fragments))
    options[fragments[-1]] = value


def _with_lists(value: Any, path: str) -> Any:
    """Dictionaries whose keys are 0, 1, 2, ... as lists."""
    if not isinstance(value, dict):
        return value
    below = {key: _with_lists(each, f"{path}.{key}") for key, each in value.items()}
    numbers = [key for key in below if key.isascii() and key.isdigit()]
    if not numbers:
        return below
    if len(numbers) < len(below):
        raise _inconsistent(path)
    if len(below) > MAX_LIST:
        raise InvalidOption(f"Parameter '{path}' has more than {MAX_LIST} elements")
    for number in range(len(below)):
        if str(number) not in below:
            raise InvalidOption(f"Parameter '{path}.{number}' missing")
    return [below[str(number)] for number in range(len(below))]


def _inconsistent(path: str) -> InvalidOption:
    return InvalidOption(f"Parameters '{path}.*' used inconsistently")
