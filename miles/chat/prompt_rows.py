"""Rows of a file -> conversations that wait for an answer.

    {"messages": [user "2+2?", assistant "4"]}   ->  user "2+2?"; reference "4"
    {"conversations": [{"from": "human", …}]}    ->  the same, of rows without an answer, too
    {"prompt": "2+2?"}                           ->  user "2+2?"

Rows are read as `miles train` reads them, in every shape. Only what is asked of a row differs: it
needs no answer, and the last one that it has is not shown to the model.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from miles.data.config import RowFormat, SourceConfig
from miles.data.files.file import describe_file
from miles.data.files.first_rows import first_rows
from miles.data.files.locate import locate
from miles.data.files.made_rows import transformed
from miles.data.files.manifest import Manifest, build_manifest
from miles.data.files.read import read_rows
from miles.data.rejecting import or_rejected
from miles.data.rows.normalize import normalize
from miles.data.types import Conversation, RowRejected
from miles.errors import SourceError

_SOURCE = "prompts"
_PROMPT_COLUMNS = ("prompt", "question", "instruction", "query", "input")
"""Columns of a question without an answer beside it, the likeliest first."""
_ANSWER = {"role": "assistant", "content": "ANSWER"}
"""Is put behind a conversation without an answer, so that it can be read, and taken away again."""


@dataclass(frozen=True)
class Prompt:
    """A conversation that waits for an answer."""

    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[Mapping[str, Any], ...] | None
    template_kwargs: Mapping[str, Any]
    reference: str | None
    """the answer that the row has; None: it has none"""


@dataclass(frozen=True)
class PromptRows:
    """The rows of files, by number."""

    manifest: Manifest
    column: str | None = None
    """column of questions that have no answer beside them; None: the rows have a usual shape"""

    @classmethod
    def open(cls, path: str, row_format: RowFormat, split: str | None = None) -> PromptRows:
        """Count the rows, and tell their shape.

        Args:
            path: fsspec URL, pattern or folder.
            split: of a folder, as for `miles train`; None: that for evaluation, where names say so.

        Raises:
            SourceError: no such file, no row, or rows of no known shape.
        """
        source = SourceConfig(_SOURCE, (path,), row_format, split, is_evaluation=True)
        try:
            return cls(build_manifest((source,)))
        except SourceError:
            column = _question_column(source) if row_format.shape == "auto" else None
            if column is None:
                raise
        shape = replace(row_format, shape="messages", columns={"messages": column})
        return cls(build_manifest((replace(source, format=shape),)), column)

    @property
    def num_rows(self) -> int:
        return self.manifest.num_rows

    def read(self, begin: int, end: int) -> Iterator[Prompt | RowRejected]:
        """Yield the prompts of rows [begin, end), or why a row gives none.

        Raises:
            SourceError: a file cannot be read, or has changed.
        """
        row_ids = np.arange(begin, end, dtype=np.int64)
        formats = [source.format for source in self.manifest.sources]
        sources = self.manifest.source_of(row_ids).tolist()
        for payload, source in zip(read_rows(self.manifest, row_ids), sources, strict=True):
            yield or_rejected(self._prompt_of, payload, formats[source])

    def _prompt_of(self, payload: bytes, row_format: RowFormat) -> Prompt:
        """Return the prompt of a row.

        Raises:
            RowRejected: the row has none.
        """
        if row_format.transform is not None:
            # What follows looks at the rows that the user's function makes.
            payload = transformed(payload, row_format.transform)
            row_format = replace(row_format, transform=None)
        if self.column is not None:
            payload = _as_turns(payload, self.column)
        try:
            conversation = normalize(payload, row_format)
        except RowRejected as rejected:
            if rejected.reason != "nothing_to_train":
                raise
            conversation = normalize(_answered(payload, row_format), row_format)
            return _prompt(conversation, has_answer=False)
        return _prompt(conversation, has_answer=True)


def _prompt(conversation: Conversation, *, has_answer: bool) -> Prompt:
    """Cut a conversation before its last answer."""
    if conversation.text is not None:
        raise RowRejected(
            "no_messages", "plain text, in which nobody asks; a question was expected"
        )
    messages = conversation.messages
    reference = None
    if messages[-1]["role"] == "assistant":
        content = messages[-1]["content"]
        reference = content if has_answer and isinstance(content, str) else None
        messages = messages[:-1]
    if not messages or messages[-1]["role"] not in ("user", "tool"):
        raise RowRejected("no_messages", "no question stands before the answer")
    return Prompt(messages, conversation.tools, conversation.template_kwargs, reference)


def _question_column(source: SourceConfig) -> str | None:
    """Return the column of questions of rows that have no other shape; None: there is none."""
    urls = locate(source.paths[0], source.split, is_evaluation=True).urls
    for url in urls:
        file = describe_file(url)
        if file.num_rows:
            names = frozenset(_PROMPT_COLUMNS)
            rows, columns = first_rows(file, names, transform=source.format.transform)
            for name in _PROMPT_COLUMNS:
                if name in columns and any(row.get(name) for row in rows):
                    return name
            return None
    return None


def _as_turns(payload: bytes, column: str) -> bytes:
    """Return a row whose question is a list of turns, where it is a text."""
    row = _object_of(payload)
    question = row.get(column)
    if isinstance(question, str) and question:
        row = {**row, column: [{"role": "user", "content": question}]}
    return json.dumps(row).encode()


def _answered(payload: bytes, row_format: RowFormat) -> bytes:
    """Return a row with an answer behind its turns.

    Raises:
        RowRejected: it has no list of turns.
    """
    row = _object_of(payload)
    for name, value in row.items():
        turns = _turns_in(value)
        if turns is not None:
            answer = _ANSWER
            if "from" in turns[-1]:
                answer = {"from": "assistant", "value": _ANSWER["content"]}
            return json.dumps({**row, name: [*turns, answer]}).encode()
    raise RowRejected("nothing_to_train", "no turn of an assistant, and no list of turns")


def _turns_in(value: Any) -> Sequence[Mapping[str, Any]] | None:
    """Return the turns of a column, a list or the JSON text of one; None: it holds none."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except ValueError:
            return None
    is_turns = isinstance(value, list) and len(value) > 0 and all(map(_is_turn, value))
    return value if is_turns else None


def _is_turn(value: Any) -> bool:
    return isinstance(value, Mapping) and any(key in value for key in ("role", "from", "speaker"))


def _object_of(payload: bytes) -> dict[str, Any]:
    """Return the object of a row.

    Raises:
        RowRejected: it is none.
    """
    try:
        row = json.loads(payload)
    except ValueError as error:
        raise RowRejected("malformed_json", "a JSON object was expected") from error
    if not isinstance(row, dict):
        raise RowRejected("malformed_json", "a JSON object was expected")
    return row
