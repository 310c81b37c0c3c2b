"""A progress bar on a terminal, for what takes over a second. Never on a pipe; rich is loaded only when it shows."""

from __future__ import annotations

import os
import sys
import time
from contextlib import suppress
from threading import Lock
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

_PATIENCE = 1.0  # seconds
_shown: set[ProgressBar] = set()


def show_cursor() -> None:
    """As it was before a bar hid it: for who ends the process next, from any thread."""
    if _shown:
        with suppress(OSError):
            os.write(2, b"\x1b[?25h\n")


class ProgressBar:
    """Counts bytes done of `total`, or with `counted` plain things; `advance` may be called from several threads."""

    def __init__(self, what: str, total: int, *, wanted: bool = True, counted: bool = False) -> None:
        self._what = what
        self._counted = counted
        self._total = total
        self._wanted = wanted and sys.stderr.isatty()
        self._done = 0
        self._start = time.monotonic()
        self._bar: tuple[Progress, TaskID] | None = None
        self._lock = Lock()

    def expect(self, total: int) -> None:
        """How many bytes there are, where that is known only now."""
        self._total = total

    def advance(self, count: int) -> None:
        if not self._wanted:
            return
        with self._lock:
            self._done += count
            if self._bar is None and time.monotonic() - self._start > _PATIENCE:
                self._bar = self._show()
            if self._bar is not None:
                self._bar[0].update(self._bar[1], completed=self._done)

    def _show(self) -> tuple[Progress, TaskID]:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn() if self._counted else DownloadColumn(binary_units=True),
            TimeRemainingColumn(),
        )
        progress = Progress(*columns, console=Console(stderr=True), transient=True)
        _shown.add(self)
        progress.start()
        return progress, progress.add_task(self._what, total=self._total)

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar[0].stop()
            _shown.discard(self)
