"""The columns of a row: which one holds which field of its shape.

    {"Question": "2+2?", "Response": "4"}        ->  prompt in question, completion in response
    {"extra": {"q": "2+2?"}}, prompt: extra.q    ->  prompt in extra.q

A field is looked for row by row under its usual names, and the first that is not null is taken:
files of one source may call their columns differently. A name in other letters (`Question`) counts
where the usual one is absent or null. Where the user named a column, only that one is looked at: by
its name as it is, then as a path into the row, whose parts are keys of objects or indexes of lists.

`USUAL_COLUMNS` and `USUAL_PAIRS` are looked at before `FURTHER_COLUMNS` and `FURTHER_PAIRS`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

from miles.data.config import ROW_FIELDS, RowFormat
from miles.data.files.media_columns import MEDIA
from miles.data.files.turn_values import CONTENT_KEYS, ROLE_KEYS, TREE_KEYS, has_turns

USUAL_COLUMNS: Mapping[str, tuple[str, ...]] = {
    "messages": ("messages", "conversations", "conversation"),
    "system": (
        *("system_prompt", "system", "meta_instruction"),
        *("system_instruction", "systeminstruction"),
    ),
    "tools": ("tools", "functions", "available_tools"),
    "template_kwargs": ("chat_template_kwargs",),
    "instruction": ("instruction",),
    "input": ("input", "context"),
    "output": ("output", "response"),
    "history": ("history",),
    "reasoning": (
        "reasoning_content",
        "reasoning",
        "thinking",
        "complex_cot",
        "cot",
        "chain_of_thought",
        "thinking_trajectories",
        "thinking_trajectory",
    ),
    "chosen": ("chosen",),
    "transcript": ("chat", "transcript"),
    "text": ("text",),
}
"""Field -> where it is looked for. A prompt and its completion are a pair: `USUAL_PAIRS`."""

FURTHER_COLUMNS: Mapping[str, tuple[str, ...]] = {
    "messages": ("chat", "data", "dialog", "dialogue", "contents"),
    "output": ("answer", "completion", "target", "solution"),
}
"""Field -> where it is looked for, too. Of "messages" such a name is a weak sign: a column of it
counts where it holds turns."""

TOOLS_WITHIN = "metadata"
"""Column that may hold tools within an object, or within its JSON text."""

BESIDE_TURNS = frozenset(
    chain(
        *(USUAL_COLUMNS[field] for field in ("system", "tools", "template_kwargs")),
        (TOOLS_WITHIN,),
        MEDIA,
    )
)
"""Columns that matter beside the turns."""

USUAL_PAIRS = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("prompt", "answer"),
    ("question", "answer"),
    ("question", "response"),
    ("query", "answer"),
    ("query", "response"),
    ("input", "output"),
)
"""Columns of a prompt and its completion; the first pair without a null is taken."""

_SHOWN_PAIRS = (("prompt", "completion"), ("prompt", "response"), ("question", "answer"))
"""Pairs that stand for all in an error."""

FURTHER_PAIRS = (
    ("question", "attempt"),  # where a column of reasoning stands beside
    ("question", "solution"),
    ("question", "output"),
    ("problem", "solution"),
    ("problem", "generated_solution"),
    ("problem", "answer"),
    ("problem", "response"),
    ("prompt", "output"),
    ("query", "answers"),  # xLAM: calls of the row's tools
    ("inputs", "targets"),
    ("input", "target"),
    ("input", "response"),
    ("input", "answer"),
    ("context", "response"),
    ("user", "assistant"),
    ("human", "assistant"),
)
"""Pairs that are looked for behind the usual ones."""

_ALL_PAIRS = USUAL_PAIRS + FURTHER_PAIRS
PROMPTS = ("prompt", "question", "query", "instruction", "problem", "input")
"""Columns of the question that stands beside a chosen answer."""

_SWITCHES = frozenset(("on", "off", "true", "false", "yes", "no", "none", "low", "medium", "high"))
"""Texts of a column of reasoning that say how much to think, and are no thoughts."""

_REASONING = frozenset(USUAL_COLUMNS["reasoning"])
_NAMES = frozenset(chain(*USUAL_COLUMNS.values(), *FURTHER_COLUMNS.values(), *_ALL_PAIRS, PROMPTS))


def with_usual_names(row: Mapping[str, Any], columns: Mapping[str, str]) -> Mapping[str, Any]:
    """Return a row with its columns under the names by which they are looked for, too.

    Args:
        columns: the ones that the user named: `RowFormat.columns`.

    Returns:
        The row, with the values of named paths, and of columns whose names differ from usual ones
        in case only.
    """
    added: dict[str, Any] = {}
    for name in columns.values():
        if name not in row:
            added[name] = value_at(row, name)
    for name, value in row.items():
        usual = name.lower()
        is_usual = usual != name and usual in _NAMES
        if is_usual and row.get(usual) is None and added.get(usual) is None:
            added[usual] = value
    return {**row, **added} if added else row


def value_at(row: Mapping[str, Any], path: str) -> Any:
    """Return what a path leads to, such as `body.choices.0.message`; None: to nothing."""
    value: Any = row
    for part in path.split("."):
        if isinstance(value, Mapping):
            value = value.get(part)
        elif isinstance(value, list) and part.isdecimal() and len(part) < 10:
            value = value[int(part)] if int(part) < len(value) else None
        else:
            return None
    return value


def column_of(field: str, row: Mapping[str, Any], columns: Mapping[str, str]) -> str | None:
    """Return the column of a row that holds a field of `USUAL_COLUMNS`.

    Args:
        row: as `with_usual_names` returns it.
        columns: the ones that the user named: `RowFormat.columns`.

    Returns:
        None: there is no such column, or it is null.
    """
    named = columns.get(field)
    if named is not None:
        return named if row.get(named) is not None else None

    for name in USUAL_COLUMNS[field]:
        if row.get(name) is not None:
            return name
    for name in FURTHER_COLUMNS.get(field, ()):
        value = row.get(name)
        if value is not None and (field != "messages" or has_turns(value)):
            return name
    return None


def possible_columns(field: str, columns: Mapping[str, str]) -> tuple[str, ...]:
    """Return the columns where a field of `USUAL_COLUMNS` is looked for first, in order."""
    named = columns.get(field)
    return USUAL_COLUMNS[field] if named is None else (named,)


def pair_of(row: Mapping[str, Any], columns: Mapping[str, str]) -> tuple[str, str] | None:
    """Return the columns of a row that hold a prompt and its completion.

    Args:
        row, columns: as for `column_of`.

    Returns:
        None: there is no pair without a null.
    """
    named_prompt, named_completion = columns.get("prompt"), columns.get("completion")
    for usual_prompt, usual_completion in _ALL_PAIRS:
        prompt = named_prompt or usual_prompt
        completion = named_completion or usual_completion
        if row.get(prompt) is None or row.get(completion) is None:
            continue
        if completion == "attempt" and reasoning_of(row, columns) is None:
            continue
        return prompt, completion
    return None


def prompt_of(row: Mapping[str, Any], columns: Mapping[str, str]) -> str | None:
    """Return the column of the question beside a chosen answer; None: there is none.

    Args:
        row, columns: as for `column_of`.
    """
    names = (columns["prompt"],) if "prompt" in columns else PROMPTS
    return next((name for name in names if row.get(name) is not None), None)


def reasoning_of(row: Mapping[str, Any], columns: Mapping[str, str]) -> tuple[str, Any] | None:
    """Return the column that holds the reasoning before an answer, and its value.

    Args:
        row, columns: as for `column_of`.

    Returns:
        None: there is no such column, or none with thoughts in it.
    """
    named = columns.get("reasoning")
    if named is not None:
        return (named, row[named]) if row.get(named) is not None else None

    if _REASONING.isdisjoint(row):  # most rows
        return None
    for name in USUAL_COLUMNS["reasoning"]:
        value = row.get(name)
        if type(value) is list and len(value) == 1:
            value = value[0]
        if type(value) is str and value.strip() and value.strip().lower() not in _SWITCHES:
            return name, value
    return None


def describe_pairs(columns: Mapping[str, str]) -> str:
    """Return some of the pairs of columns that `pair_of` looks for: "a and b or a and c"."""
    pairs = [
        f"{columns.get('prompt', prompt)} and {columns.get('completion', completion)}"
        for prompt, completion in _SHOWN_PAIRS
    ]
    return " or ".join(dict.fromkeys(pairs))


def known_columns(format: RowFormat) -> frozenset[str]:
    """Return every column that matters for the shape of a row, usual names in lower case.

    Some tell that a row is one message, and no conversation.
    """
    named = list(format.columns.values())
    roots = [name.partition(".")[0] for name in named]
    return _NAMES.union(named, roots, ROLE_KEYS, CONTENT_KEYS, TREE_KEYS)


def columns_of_shape(format: RowFormat) -> frozenset[str]:
    """Return every column from which a row of the format's shape could be read, by strong names."""
    names = set(format.columns.values())
    for field in ROW_FIELDS[format.shape]:
        names.update(USUAL_COLUMNS.get(field, ()))
    if format.shape == "alpaca":
        names.update(FURTHER_COLUMNS["output"])
    if format.shape == "prompt_completion":
        names.update(*_ALL_PAIRS)
    if format.shape == "preference":
        names.update(PROMPTS)
    return frozenset(names)


def name_in(row: Mapping[str, Any], name: str) -> str:
    """Return a usual name as the row spells it."""
    if row.get(name) is not None:
        return name
    return next(_in_other_case(row, name), name)


def _in_other_case(row: Mapping[str, Any], name: str) -> Iterator[str]:
    for key, value in row.items():
        if key.lower() == name and value is not None:
            yield key
