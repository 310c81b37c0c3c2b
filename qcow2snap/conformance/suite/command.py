"""A reader's command line, as it is given to `conformance run`: words with placeholders, and no shell.

{image}     the image's path
{output}    where to write the disk's bytes; without it they are read from standard output
{snapshot}  the snapshot's name; nothing for the active disk
{id}        the snapshot's id; nothing for the active disk
{directory} the image's directory, for readers that look for data files in the current one: `env -C {directory} ...`

Words in square brackets are there only if a snapshot is asked for: `qemu-img convert [-l snapshot.name={snapshot}] ...`
"""

from __future__ import annotations

import os
import re
import shlex
import shutil

from qcow2snap.conformance.suite.values import Ref

_SNAPSHOT, _ID = "{snapshot}", "{id}"


class CommandError(ValueError):
    """The command cannot be used, and why."""


class ReaderCommand:
    """A command that is run for one disk at a time. Building it raises CommandError."""

    def __init__(self, text: str) -> None:
        try:
            self._words = shlex.split(text)
        except ValueError as error:
            raise CommandError(f"{text!r} is no command: {error}") from None
        if not self._words:
            raise CommandError("the command is empty")
        if not any("{image}" in word for word in self._words):
            raise CommandError("the command has no {image}, so it cannot know what to read")
        if shutil.which(self._words[0]) is None:
            raise CommandError(f"there is no program {self._words[0]!r}")
        self.to_stdout = not any("{output}" in word for word in self._words)
        self._by_name = any(_SNAPSHOT in word for word in self._words)
        self._by_id = any(_ID in word for word in self._words)
        self._optional = _bracketed(self._words)

    def why_not(self, ref: Ref | None) -> str | None:
        """Why this command cannot be asked for a snapshot; None if it can."""
        if ref is None or (self._by_id and ref.id):
            return None
        if not self._by_name:
            return "the command has no {snapshot}"
        return None if ref.by_name else "the snapshot's name is not its alone, and the command has no {id}"

    def words(self, image: str, output: str, ref: Ref | None) -> list[str]:
        """The command for one disk. What is put in stays one word, and is not looked at again."""
        name, id_ = ("", "") if ref is None else (os.fsdecode(ref.name), os.fsdecode(ref.id))
        values = {
            "{image}": image,
            "{output}": output,
            "{directory}": os.path.dirname(image),
            _SNAPSHOT: name,
            _ID: id_,
        }
        placeholders = "|".join(map(re.escape, values))
        words = []
        for index, word in enumerate(self._words):
            if index in self._optional:
                if ref is None:
                    continue
                word = word[self._optional[index][0] : len(word) - self._optional[index][1]]
            words.append(re.sub(placeholders, lambda match: values[match[0]], word))
        return words


def _bracketed(words: list[str]) -> dict[int, tuple[int, int]]:
    """Words between brackets that hold a placeholder for a snapshot, with the characters to take off both ends."""
    found: dict[int, tuple[int, int]] = {}
    start: int | None = None
    for index, word in enumerate(words):
        if word.startswith("["):
            start = index
        if start is not None and word.endswith("]"):
            group = range(start, index + 1)
            if any(_SNAPSHOT in words[each] or _ID in words[each] for each in group):
                found |= {each: (int(each == start), int(each == index)) for each in group}
            start = None
    return found
