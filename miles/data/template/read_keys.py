"""A message that notes which of its keys a chat template reads.

    {{ message.content }}                      content
    {% if 'name' in message %}, message.get    name
    {{ message | tojson }}, a loop over it     every key

A template is traced once for all rows of a shape that answer its guards alike, so this costs a row
nothing. A key that is read under a condition counts where the condition was asked.
"""

from __future__ import annotations

from collections.abc import ItemsView, Iterator, KeysView, ValuesView
from typing import Any


class WatchedMessage(dict[str, Any]):
    """A message for a template. It behaves as the plain dict, and notes what is read of it."""

    def __init__(self, message: dict[str, Any]) -> None:
        super().__init__(message)
        self._read: set[str] = set()
        self._is_read_whole = False

    def has_read(self, *names: str) -> bool:
        """Return whether any of these keys has been read, or the message as a whole."""
        return self._is_read_whole or not self._read.isdisjoint(names)

    # Reading one key

    def __getitem__(self, key: str) -> Any:
        self._note(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self._note(key)
        return super().__contains__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self._note(key)
        return super().get(key, default)

    def _note(self, key: object) -> None:
        if isinstance(key, str):
            self._read.add(key)

    # Reading all of it

    def __iter__(self) -> Iterator[str]:
        self._is_read_whole = True
        return super().__iter__()

    def __reversed__(self) -> Iterator[str]:
        self._is_read_whole = True
        return super().__reversed__()

    def keys(self) -> KeysView[str]:  # type: ignore[override]
        self._is_read_whole = True
        return super().keys()

    def values(self) -> ValuesView[Any]:  # type: ignore[override]
        self._is_read_whole = True
        return super().values()

    def items(self) -> ItemsView[str, Any]:  # type: ignore[override]
        self._is_read_whole = True
        return super().items()

    def copy(self) -> dict[str, Any]:
        self._is_read_whole = True
        return super().copy()
