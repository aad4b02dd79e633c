"""Finds rows that can be rendered together: conversations of texts, of the same roles.

    (user, assistant)                        rows 0 1 3     strings ("2+2?", "4"), …
    (user, assistant, user, assistant)       rows 2         strings ("Hi", "Hello", "2+2?", "4")

A row with tools, variables, plain text, or a message of more than role and content is no such row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

from miles.data.types import Conversation

_KEYS = ("role", "content")
_ROLE_OF = itemgetter("role")
_CONTENT_OF = itemgetter("content")


class PlainRows(NamedTuple):
    """Rows of the same roles."""

    roles: tuple[str, ...]
    """[messages]: their shape, as `trace.shape_of` returns it"""
    rows: list[int]
    contents: list[tuple[str, ...]]
    """[rows][messages]"""

    def subset(self, numbers: Sequence[int]) -> PlainRows:
        """Return some of the rows, by their numbers in this group."""
        if len(numbers) == len(self.rows):
            return self
        rows = [self.rows[number] for number in numbers]
        return PlainRows(self.roles, rows, [self.contents[number] for number in numbers])


def plain_rows(conversations: Sequence[Conversation]) -> list[PlainRows]:
    """Return the groups of rows that can be rendered together; the other rows are in none."""
    by_length: dict[int, list[int]] = {}
    for row, conversation in enumerate(conversations):
        if conversation.tools is None and not conversation.template_kwargs:
            by_length.setdefault(len(conversation.messages), []).append(row)
    by_length.pop(0, None)  # plain text

    groups = []
    for rows in by_length.values():
        groups += _by_roles(conversations, rows)
    return groups


def _by_roles(conversations: Sequence[Conversation], rows: list[int]) -> list[PlainRows]:
    """Divide rows of as many messages by their roles; leave out those that are not plain."""
    columns = list(zip(*[conversations[row].messages for row in rows], strict=True))
    if not all(map(_is_plain, columns)):
        rows = [row for row in rows if _is_plain(conversations[row].messages)]
        columns = list(zip(*[conversations[row].messages for row in rows], strict=True))

    shapes = list(zip(*[map(_ROLE_OF, column) for column in columns], strict=True))
    contents = list(zip(*[map(_CONTENT_OF, column) for column in columns], strict=True))
    if not shapes:
        return []
    if shapes.count(shapes[0]) == len(shapes):  # most tables
        return [PlainRows(shapes[0], rows, contents)]

    groups: dict[tuple[str, ...], PlainRows] = {}
    for shape, row, texts in zip(shapes, rows, contents, strict=True):
        group = groups.setdefault(shape, PlainRows(shape, [], []))
        group.rows.append(row)
        group.contents.append(texts)
    return list(groups.values())


def _is_plain(messages: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether each message has a role and a content, in this order, and both are texts."""
    if list(map(tuple, messages)).count(_KEYS) != len(messages):
        return False
    types = {*map(type, map(_ROLE_OF, messages)), *map(type, map(_CONTENT_OF, messages))}
    return types == {str}
