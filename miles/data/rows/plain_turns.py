"""Plain turns in Arrow -> conversations, as `normalize` makes them of the same rows in JSON.

    [{role: human, content: 2+2?}, {role: gpt, content: "4"}]
    ->  messages  user "2+2?", assistant "4"

The names of roles are looked up once, and the texts become Python's all together. A row with a turn
that is more than a role and a text, such as a call, or that is rejected, takes `read_turns`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from miles.common.offsets import offsets_of
from miles.data.config import RowFormat
from miles.data.rejecting import or_rejected
from miles.data.rows.normalize import NO_VARIABLES, normalize_turns
from miles.data.rows.roles import find_role
from miles.data.rows.turns import CLOSE
from miles.data.types import Bool, Conversation, Int32, Int64, RowRejected

_ROLES = ("system", "user", "assistant", "tool")
_ASSISTANT = _ROLES.index("assistant")
_TOOL = _ROLES.index("tool")
_OTHER = -1


def normalize_plain(
    turns: pa.Array, source_ids: Int32, formats: Sequence[RowFormat]
) -> list[Conversation | RowRejected]:
    """Read rows that are plain turns.

    Args:
        turns: `TURNS` [rows], none of them null.
        source_ids: int32 [rows].
        formats: the row format of each source.

    Returns:
        The conversation of each row, or why it cannot be used.
    """
    lengths = turns.value_lengths().to_numpy()
    offsets = offsets_of(lengths)
    fields = turns.flatten()
    names = fields.field("role").dictionary_encode()
    contents = fields.field("content")
    roles = _roles(names, np.repeat(source_ids, lengths), formats)
    _set_aside_wrapped(roles, contents)
    is_other_row = _sums(roles == _OTHER, offsets) > 0
    is_other_row |= _sums(roles == _ASSISTANT, offsets) == 0

    role_names = np.array((*_ROLES, None), object)[roles].tolist()
    messages = tuple(
        {"role": role, "content": text}
        for role, text in zip(role_names, contents.to_pylist(), strict=True)
    )
    rows: list[Conversation | RowRejected] = list(_conversations(messages, offsets))
    for row in np.flatnonzero(is_other_row).tolist():
        format = formats[source_ids[row]]
        rows[row] = or_rejected(normalize_turns, turns[row].as_py(), format)
    return rows


def _roles(names: pa.DictionaryArray, source_ids: Int32, formats: Sequence[RowFormat]) -> Int64:
    """Return the number of each turn's role in `_ROLES`; `_OTHER`: none of these.

    Args:
        names: [turns].
        source_ids: int32 [turns].
        formats: the row format of each source.
    """
    words = names.dictionary.to_pylist()
    table = np.full((len(formats), len(words)), _OTHER, np.int64)
    for source_id in np.unique(source_ids).tolist():
        for number, word in enumerate(words):
            role = find_role(word, formats[source_id].roles)
            if role in _ROLES:
                table[source_id, number] = _ROLES.index(role)
    roles: Int64 = table[source_ids, names.indices.to_numpy()]
    return roles


def _set_aside_wrapped(roles: Int64, contents: pa.Array) -> None:
    """Mark tools' turns that may hold several results as other turns, in place."""
    tools = np.flatnonzero(roles == _TOOL)
    if len(tools):
        is_wrapped = pc.match_substring(contents.take(pa.array(tools)), CLOSE)
        roles[tools[is_wrapped.to_numpy(zero_copy_only=False)]] = _OTHER


def _sums(is_counted: Bool, offsets: Int64) -> Int64:
    """Return how many turns of each row count: int64 [rows]."""
    sums: Int64 = np.diff(offsets_of(is_counted)[offsets])
    return sums


def _conversations(
    messages: tuple[Mapping[str, Any], ...], offsets: Int64
) -> Iterator[Conversation]:
    """Yield conversations with nothing but turns, in a third of their constructor's time.

    Args:
        messages: of all rows, end to end.
        offsets: int64 [rows + 1].
    """
    no_flags = (None,) * int(np.diff(offsets).max(initial=0))
    for begin, end in pairwise(offsets.tolist()):
        conversation = Conversation.__new__(Conversation)
        fields = vars(conversation)  # setting a field of a frozen record costs a call
        fields["messages"] = messages[begin:end]
        fields["tools"] = None
        fields["flags"] = no_flags[: end - begin]
        fields["text"] = None
        fields["template_kwargs"] = NO_VARIABLES
        yield conversation
