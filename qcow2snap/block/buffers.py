"""Filling the buffers of a vectored read piece by piece. Moves bytes in memory, nothing else."""

from __future__ import annotations

from collections.abc import Sequence

from qcow2snap.block.node import Buffer

_ZEROS = memoryview(bytes(1 << 16))


class Cursor:
    """A place in a list of buffers, moving on as they are filled."""

    def __init__(self, buffers: Sequence[Buffer]) -> None:
        self._views = [view for view in map(_bytes_of, buffers) if view]
        self._views.reverse()  # the next one is the last: taking it off costs nothing
        self.remaining = sum(map(len, self._views))

    def take(self, length: int) -> list[memoryview]:
        """The next `length` bytes of the buffers, for someone else to fill."""
        self.remaining -= length
        taken = []
        while length:
            view = self._views.pop()
            if len(view) > length:
                self._views.append(view[length:])
                view = view[:length]
            taken.append(view)
            length -= len(view)
        return taken

    def zero(self, length: int) -> None:
        for view in self.take(length):
            fill_with_zeros(view)

    def copy(self, data: memoryview) -> None:
        for view in self.take(len(data)):
            view[:] = data[: len(view)]
            data = data[len(view) :]


def fill_with_zeros(view: memoryview) -> None:
    for start in range(0, len(view), len(_ZEROS)):
        piece = view[start : start + len(_ZEROS)]
        piece[:] = _ZEROS[: len(piece)]


def _bytes_of(buffer: Buffer) -> memoryview:
    view = memoryview(buffer)
    return view if view.format == "B" and view.ndim == 1 else view.cast("B")
