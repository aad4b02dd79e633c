"""The rows of a source as settings: their shape, columns, roles, and the function that makes them.

{"problem": "2+2?", "solution": "4"}     RowFormat()      told from the first rows: prompt_completion
{"a": {"b": "2+2?"}, "c": "4"}           RowFormat(columns={"prompt": "a.b", "completion": "c"})
anything else                            RowFormat(transform="my_rows:to_messages")
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated

from miles.common.flags import Flag, check_settings
from miles.common.mistakes import Mistakes
from miles.common.shown import shown
from miles.data import transforms
from miles.data.transforms import Transform

_COMMON_FIELDS = ("system", "tools", "template_kwargs")
ROW_FIELDS: Mapping[str, tuple[str, ...]] = {
    "messages": ("messages", *_COMMON_FIELDS),
    "alpaca": ("instruction", "input", "output", "history", "reasoning", *_COMMON_FIELDS),
    "prompt_completion": ("prompt", "completion", "reasoning", *_COMMON_FIELDS),
    "preference": ("chosen", "prompt", "input", *_COMMON_FIELDS),
    "transcript": ("transcript", *_COMMON_FIELDS),
    "text": ("text",),
}
"""Row shape -> its fields. "messages" are ShareGPT's and OpenAI's, told apart turn by turn; of
"preference" the chosen side is taken."""

ROLE_NAMES = ("system", "user", "assistant", "tool", "tool_call")
"""Roles that a name in the rows can stand for. A turn of the role "tool_call" is the assistant's, and
its content a call; a message has one of the others."""


@dataclass(frozen=True)
class RowFormat:
    """The rows of a source: their shape, columns and roles."""

    shape: Annotated[
        str,
        Flag(
            "--row-shape",
            "SHAPE",
            "layout of a row; auto: found from the schema and the first rows of each source",
            choices=("auto", *ROW_FIELDS),
        ),
    ] = "auto"
    columns: Annotated[
        Mapping[str, str],
        Flag(
            "--column-names",
            "JSON",
            'field of the row shape -> the column that holds it, such as {"prompt": "question"}',
            default="the usual names",
            also=(
                Flag(
                    "--input-key",
                    "COLUMN",
                    "column of the conversation",
                    default="found",
                    key="messages",
                ),
                Flag("--tool-key", "COLUMN", "column of the tools", default="tools", key="tools"),
            ),
        ),
    ] = field(default_factory=dict)
    roles: Annotated[
        Mapping[str, str],
        Flag(
            "--role-names",
            "JSON",
            f"role in the rows -> {', '.join(ROLE_NAMES)}; beside the known ones",
        ),
    ] = field(default_factory=dict)
    transform: Annotated[
        Transform | None,
        Flag(
            transforms.FLAG,
            "MODULE:FUNCTION",
            "a function row -> row, list of messages, or None (the row is left out), for rows of no "
            "known shape; all else sees the rows that it makes",
            written_as=str,
        ),
    ] = None
    """Its name and its code's hash; a name or a function, when it is given."""

    def __post_init__(self) -> None:
        check_settings(self)
        if self.transform is not None:
            object.__setattr__(self, "transform", Transform.of(self.transform))
        fields = ROW_FIELDS[self.shape] if self.shape != "auto" else sum(ROW_FIELDS.values(), ())

        mistakes = Mistakes()
        for name, column in self.columns.items():
            known = ", ".join(dict.fromkeys(fields))
            mistakes.require(
                name in fields,
                f"--column-names: {shown(name)} is no field of --row-shape {self.shape}: {known}",
            )
            mistakes.require(
                isinstance(column, str),
                f"--column-names: {shown(name)} must be the name of a column, not {shown(column)}",
            )

        for name, role in self.roles.items():
            mistakes.require(
                role in ROLE_NAMES,
                f"--role-names: {shown(name)} must be one of {', '.join(ROLE_NAMES)}, not {shown(role)}",
            )
        mistakes.raise_all()
