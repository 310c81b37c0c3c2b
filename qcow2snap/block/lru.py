"""A cache bounded in bytes that forgets what was not used for longest. Knows nothing of what it keeps."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from threading import Lock
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class BoundedCache(Generic[Key, Value]):
    """Values by key, their sizes in bytes adding up to at most `capacity`. For any number of threads."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._entries: OrderedDict[Key, tuple[Value, int]] = OrderedDict()
        self._size = 0
        self._lock = Lock()

    def get(self, key: Key) -> Value | None:
        with self._lock:
            entry = self._entries.get(key)
            if entry is None:
                return None
            self._entries.move_to_end(key)
            return entry[0]

    def __contains__(self, key: Key) -> bool:
        return key in self._entries

    def put(self, key: Key, value: Value, nbytes: int) -> None:
        """Keep a value; one larger than the whole cache is let go at once."""
        with self._lock:
            old = self._entries.pop(key, None)
            if old is not None:
                self._size -= old[1]
            self._entries[key] = (value, nbytes)
            self._size += nbytes
            while self._size > self.capacity and self._entries:
                _, (_, freed) = self._entries.popitem(last=False)
                self._size -= freed

    def clear(self) -> None:
        with self._lock:
            self._entries.clear()
            self._size = 0
