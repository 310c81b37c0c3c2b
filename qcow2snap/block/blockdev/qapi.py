"""What options and commands may look like, in the terms of QEMU's schema language (QAPI), and the check that they do.

A type turns what was said into what is meant, or raises InvalidOption in QEMU's words, with the name of what is wrong.
Values come in two forms: from JSON they have types; from keyval all are strings, and numbers and booleans are read
from them (QEMU's qobject-input-visitor and its keyval variant).
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

from qcow2snap.block.node import InvalidOption
from qcow2snap.block.sizes import parse_size

MAX_DEPTH = 32  # of options in options
_INT64 = range(-(1 << 63), 1 << 63)
_NUMBER = re.compile(r"[+-]?(0[xX][0-9a-fA-F]+|[0-9]+)")
_MAX_DIGITS = 1 << 10  # of a number, zeros before it included; Python takes some thousands
_BOOLEANS = {"on": True, "yes": True, "true": True, "y": True, "off": False, "no": False, "false": False, "n": False}


class Type(ABC):
    """What a value may be. Immutable."""

    @abstractmethod
    def read(self, value: Any, path: str, *, strings: bool) -> Any:
        """The value as it is meant. `path` names it; `strings`: it comes from keyval."""


class String(Type):
    def read(self, value: Any, path: str, *, strings: bool) -> str:
        if not isinstance(value, str):
            raise _mistyped(path, "string")
        return value


class Boolean(Type):
    def read(self, value: Any, path: str, *, strings: bool) -> bool:
        if strings and isinstance(value, str):
            if value not in _BOOLEANS:
                raise InvalidOption(f"Parameter '{path}' expects 'on' or 'off'")
            return _BOOLEANS[value]
        if not isinstance(value, bool):
            raise _mistyped(path, "boolean")
        return value


class Integer(Type):
    """A number within bounds."""

    def __init__(self, least: int = _INT64.start, most: int = _INT64.stop - 1) -> None:
        self._least = least
        self._most = most

    def read(self, value: Any, path: str, *, strings: bool) -> int:
        if strings and isinstance(value, str):
            if not _NUMBER.fullmatch(value) or len(value) > _MAX_DIGITS:
                raise InvalidOption(f"Parameter '{path}' expects integer")
            value = int(value, 16 if "x" in value.lower() else 10)
        elif isinstance(value, bool) or not isinstance(value, int):
            raise _mistyped(path, "integer")
        if not self._least <= value <= self._most:
            raise InvalidOption(f"Value '{value}' is out of range for parameter '{path}'")
        return int(value)


class Size(Integer):
    """Bytes; a string may have one of QEMU's suffixes (512, 64k, 1.5G)."""

    def __init__(self) -> None:
        super().__init__(0)

    def read(self, value: Any, path: str, *, strings: bool) -> int:
        if strings and isinstance(value, str):
            try:
                if len(value) > _MAX_DIGITS:
                    raise ValueError
                value = parse_size(value)
            except ValueError:
                raise InvalidOption(f"Parameter '{path}' expects a non-negative number below 2^64") from None
        return super().read(value, path, strings=False)


class Enum(Type):
    def __init__(self, *values: str) -> None:
        self._values = values

    def read(self, value: Any, path: str, *, strings: bool) -> str:
        if not isinstance(value, str):
            raise _mistyped(path, "string")
        if value not in self._values:
            raise InvalidOption(f"Parameter '{path.rpartition('.')[2]}' does not accept value '{value[:200]}'")
        return value


class ListOf(Type):
    def __init__(self, element: Type) -> None:
        self._element = element

    def read(self, value: Any, path: str, *, strings: bool) -> list[Any]:
        if not isinstance(value, list):
            raise _mistyped(path, "array")
        return [self._element.read(each, f"{path}[{number}]", strings=strings) for number, each in enumerate(value)]


class Struct(Type):
    """Named members; those whose names end with a star are optional, as QEMU's schema writes it."""

    def __init__(self, members: Mapping[str, Type]) -> None:
        self.members = {name.rstrip("*"): (kind, name.endswith("*")) for name, kind in members.items()}

    def read(self, value: Any, path: str, *, strings: bool) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise _mistyped(path, "object")
        if path.count(".") >= MAX_DEPTH:
            raise InvalidOption(f"Parameter '{path}' is nested too deeply")
        result = self._read_members(value, path, strings=strings)
        for name in value:
            if name not in result:
                raise InvalidOption(f"Parameter '{_join(path, name)[:200]}' is unexpected")
        return result

    def _read_members(self, value: Mapping[str, Any], path: str, *, strings: bool) -> dict[str, Any]:
        result = {}
        for name, (kind, is_optional) in self.members.items():
            if name in value:
                result[name] = kind.read(value[name], _join(path, name), strings=strings)
            elif not is_optional:
                raise InvalidOption(f"Parameter '{_join(path, name)}' is missing")
        return result


class Union(Struct):
    """A struct whose further members depend on the value of one: the tag."""

    def __init__(self, members: Mapping[str, Type], tag: str, variants: Mapping[str, Struct]) -> None:
        super().__init__({tag: Enum(*variants), **members})
        self._tag = tag
        self._variants = variants

    def _read_members(self, value: Mapping[str, Any], path: str, *, strings: bool) -> dict[str, Any]:
        result = super()._read_members(value, path, strings=strings)
        variant = self._variants[result[self._tag]]
        return result | variant._read_members(value, path, strings=strings)


class Alternate(Type):
    """One of several types, told apart by what JSON has: a string, an object, null."""

    def __init__(self, name: str, *, string: Type | None = None, obj: Type | None = None, null: bool = False) -> None:
        self._name = name
        self._string = string
        self._object = obj
        self._null = null

    def read(self, value: Any, path: str, *, strings: bool) -> Any:
        if value is None and self._null:
            return None
        kind = self._string if isinstance(value, str) else self._object if isinstance(value, dict) else None
        if kind is None:
            raise _mistyped(path, self._name)
        return kind.read(value, path, strings=strings)


class Later(Type):
    """A type that has itself in it."""

    def __init__(self, find: Callable[[], Type]) -> None:
        self._find = find

    def read(self, value: Any, path: str, *, strings: bool) -> Any:
        return self._find().read(value, path, strings=strings)


def optional(**members: Type) -> dict[str, Type]:
    """Members that need not be there; underscores in names are hyphens."""
    return {f"{name.replace('_', '-')}*": kind for name, kind in members.items()}


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _mistyped(path: str, expected: str) -> InvalidOption:
    return InvalidOption(f"Invalid parameter type for '{path}', expected: {expected}")
