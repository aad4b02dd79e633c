"""The looks of rows that fit no row shape, and the flag that would mend it.

    {"role": "user", "text": "Hi", "parent_id": null}      a message a row, which no flag can join
    {"id": 1, "steps": [{"role": "user", …}, …]}           --input-key steps
    {"extra": {"question": "2+2?", "answer": "4"}}         --column-names '{"prompt": "extra.question", …
    {"prompt": "2+2?"}                                     questions without answers

A hint names columns and types, and roles; it never quotes a row's text.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from miles.common.shown import cut, shown
from miles.data.files.row_columns import FURTHER_PAIRS, PROMPTS, USUAL_PAIRS, name_in, value_at
from miles.data.files.turn_values import CONTENT_KEYS, ROLE_KEYS, TREE_KEYS, has_turns, is_turn

_SPEAKERS = frozenset(
    ("user", "human", "prompter", "assistant", "gpt", "bot", "model", "system", "tool", "chatgpt")
)
_MOST_LEVELS = 6
_MOST_PATHS = 200
_ROLE_CHARACTERS = 40
_MOST_NAMES = 8
_PAIRS = (*USUAL_PAIRS, ("instruction", "output"), ("instruction", "response"), *FURTHER_PAIRS)


@dataclass(frozen=True)
class Hint:
    """Two sentences, without their stops: what rows look like, and what to do about it."""

    found: str
    remedy: str


def in_place_of_text(rows: Sequence[Mapping[str, Any]]) -> Hint | None:
    """Return what stands beside a column called text and is a stronger sign than its name."""
    return _message_a_row(rows) or _turns_elsewhere(rows)


def closest(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> Hint | None:
    """Return what rows come closest to that fit no shape; None: to nothing.

    Args:
        columns: all columns of the rows.
    """
    return (
        _message_a_row(rows)
        or _turns_elsewhere(rows)
        or _answer_without_question(rows)
        or _nested(rows)
        or _empty_side(rows, columns)
        or _questions_without_answers(rows)
        or _two_texts(rows, columns)
        or _one_text(rows)
    )


def column_flag(columns: Mapping[str, str]) -> str:
    """Return the flag that names columns, to be typed in a shell."""
    return f"--column-names {shlex.quote(json.dumps(dict(columns), ensure_ascii=False))}"


def _message_a_row(rows: Sequence[Mapping[str, Any]]) -> Hint | None:
    """Return a hint where most rows are one message each, as in a tree of messages."""
    found = [keys for keys in map(_message_keys, rows) if keys is not None]
    if not found or 2 * len(found) < len(rows):
        return None

    role, content, group = found[0]
    roles = sorted({row[role] for row in rows if type(row.get(role)) is str})
    quoted = ", ".join(shown(cut(name, _ROLE_CHARACTERS)) for name in roles[:4])
    belongs = f", and {group} to which others it belongs" if group else ""
    return Hint(
        f"Each row is one message of a conversation: column {role} is its speaker ({quoted}), "
        f"{content} what is said{belongs}",
        "Miles cannot join rows. Join them with a script: group the rows by "
        f"{group or 'their conversation'}, follow each conversation from its first message to an "
        'answer, and write it as one row, {"messages": [{"role": "user", "content": "…"}, '
        '{"role": "assistant", "content": "…"}]}; or take a set that is joined already, as '
        "openassistant-guanaco is of the trees of oasst",
    )


def _message_keys(row: Mapping[str, Any]) -> tuple[str, str, str] | None:
    """Return the columns of the speaker, of what is said and of what joins messages, of a row that
    is one message; None: it is none."""
    role = next((key for key in ROLE_KEYS if type(row.get(key)) is str), None)
    content = next((key for key in CONTENT_KEYS if type(row.get(key)) is str), None)
    if role is None or content is None:
        return None
    group = next((key for key in TREE_KEYS if key in row), "")
    is_speaker = row[role].lower() in _SPEAKERS
    is_linked = bool(group) and role != "from"  # who wrote a mail is no speaker
    return (role, content, group) if is_linked or is_speaker else None


def _turns_elsewhere(rows: Sequence[Mapping[str, Any]]) -> Hint | None:
    """Return a hint where a column of no usual name holds objects with a speaker."""
    for row in rows:
        for name, value in row.items():
            if type(value) in (list, dict) and _has_speakers(value):
                return Hint(
                    f"Column {name} holds the turns of a conversation",
                    f"Take it: --input-key {shlex.quote(name)}",
                )
    return None


def _has_speakers(value: Any) -> bool:
    """Return whether a value is a list of turns that name their speakers, one an answer's."""
    if type(value) is dict:
        return has_turns(value)
    roles = [turn.get(key) for turn in value if is_turn(turn) for key in ROLE_KEYS]
    return len({role for role in roles if type(role) is str}) > 1


def _answer_without_question(rows: Sequence[Mapping[str, Any]]) -> Hint | None:
    for row in rows:
        if type(row.get("chosen")) is str:
            return Hint(
                "Column chosen holds the preferred answer of a pair, without its question",
                f"Name the question's column: {column_flag({'prompt': 'COLUMN'})}",
            )
    return None


def _nested(rows: Sequence[Mapping[str, Any]]) -> Hint | None:
    """Return a hint where a question and its answer lie inside of columns."""
    for row in rows:
        paths = dict(_paths(row))
        columns = _nested_pair(paths) or _nested_turns(paths)
        if columns is None:
            continue
        many = _many_rows(rows, columns) or _rows_by_key(row, columns)
        if many is not None:
            return many

        found = " and ".join(columns.values())
        if "messages" in columns:
            return Hint(
                f"Column {found} holds the turns of a conversation",
                f"Take it: --input-key {shlex.quote(found)}",
            )
        return Hint(
            f"Columns {found} look like a question and its answer",
            f"Take them: {column_flag(columns)}",
        )
    return None


def _many_rows(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> Hint | None:
    """Return a hint where paths lead to the first item of a list of which some row has more."""
    for path in columns.values():
        parts = path.split(".")
        for number, part in enumerate(parts):
            holder = ".".join(parts[:number])
            lists = [value_at(row, holder) for row in rows] if part == "0" and holder else []
            most = max((len(value) for value in lists if type(value) is list), default=0)
            if most > 1:
                is_exchange = set(parts[number + 1 :]) <= set(sum(USUAL_PAIRS, ()))
                chat = f"; or, if they are one conversation: --input-key {shlex.quote(holder)}"
                return Hint(
                    f"Column {holder} holds many rows within one: a list of up to {most}",
                    "Miles does not divide rows: write one row for each, with a script"
                    f"{chat if is_exchange else ''}",
                )
    return None


def _rows_by_key(row: Mapping[str, Any], columns: Mapping[str, str]) -> Hint | None:
    """Return a hint where an object holds rows under their keys, as pandas writes an index."""
    parents = {path.rpartition(".")[0] for path in columns.values()}
    if len(parents) > 1:
        return None

    holder, _, _ = parents.pop().rpartition(".")
    items = value_at(row, holder) if holder else row
    names = [path.rpartition(".")[2] for path in columns.values()]
    keys = []
    for key, item in items.items() if isinstance(items, Mapping) else ():
        if type(item) is dict and all(_is_filled(item.get(name)) for name in names):
            keys.append(key)

    if len(keys) < 2:
        return None
    return Hint(
        f"{f'Column {holder}' if holder else 'The object'} holds many rows within one, each under "
        f"a key of its own ({_few(keys)})",
        "Write one row for each, with a script: a JSON object a line",
    )


def _few(names: Sequence[str]) -> str:
    more = ", …" if len(names) > _MOST_NAMES else ""
    return ", ".join(cut(name, _ROLE_CHARACTERS) for name in names[:_MOST_NAMES]) + more


def _nested_pair(paths: Mapping[str, Any]) -> dict[str, str] | None:
    """Return prompt and completion where they lie in one object under usual names."""
    for prompt, completion in USUAL_PAIRS + FURTHER_PAIRS:
        for path, value in paths.items():
            parent, dot, name = path.rpartition(".")
            answer = f"{parent}{dot}{completion}"
            if dot and name == prompt and _is_filled(value) and _is_filled(paths.get(answer)):
                return {"prompt": path, "completion": answer}
    return None


def _nested_turns(paths: Mapping[str, Any]) -> dict[str, str] | None:
    """Return the path of a conversation; or of turns that ask, and of what answers them."""
    questions: list[str] = []
    answers: list[str] = []
    for path, value in paths.items():
        turns = value if type(value) is list else [value]
        if not turns or not all(map(is_turn, turns)):
            continue
        if all(map(_is_answer, turns)):
            answers.append(path)
        elif _is_answer(turns[-1]):
            return {"messages": path}
        elif type(value) is list:
            questions.append(path)

    for question in questions:
        for answer in answers:
            if not answer.startswith(question + "."):
                return {"prompt": question, "completion": answer}
    return None


def _is_answer(turn: Mapping[str, Any]) -> bool:
    return turn.get("role", turn.get("from")) in ("assistant", "gpt")


def _is_filled(value: Any) -> bool:
    return isinstance(value, (str, list)) and bool(value)


def _paths(row: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the paths and values of what a row holds, its first list items included."""
    waiting: list[tuple[str, Any, int]] = [(name, value, 1) for name, value in row.items()]
    for path, value, level in waiting:
        yield path, value
        if level >= _MOST_LEVELS or len(waiting) >= _MOST_PATHS:
            continue
        if type(value) is dict:
            waiting += [(f"{path}.{key}", item, level + 1) for key, item in value.items()]
        elif type(value) is list and value and type(value[0]) is dict:
            waiting.append((f"{path}.0", value[0], level + 1))


def _empty_side(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> Hint | None:
    """Return a hint where one of a pair of columns is there, and says nothing in any row."""
    spelled = {name.lower(): name for name in columns}
    for pair in _PAIRS:
        names = [spelled[name] for name in pair if name in spelled]
        empty = [name for name in names if not any(map(_says, (row.get(name) for row in rows)))]
        if len(names) < 2 or len(empty) != 1:
            continue

        (name,) = empty
        values = [row[name] for row in rows if name in row]
        cause = "empty" if any(value is not None for value in values) else "null"
        cause = cause if values else "null, or of a type that is not read,"
        flag = {"prompt": names[0], "completion": names[1]}
        flag["prompt" if name == names[0] else "completion"] = "COLUMN"

        return Hint(
            f"Column {name} is {cause} in all of the first {len(rows)} rows, and column "
            f"{next(other for other in names if other != name)} has what belongs to it",
            f"Fill it, or name the column that has it: {column_flag(flag)}",
        )
    return None


def _says(value: Any) -> bool:
    return value is not None and value != "" and value != []


def _questions_without_answers(rows: Sequence[Mapping[str, Any]]) -> Hint | None:
    """Return a hint where rows have a question, and no column of a usual name for its answer."""
    for row in rows:
        asked = next((name for name in PROMPTS if _is_filled(row.get(name_in(row, name)))), None)
        if asked is None:
            continue

        asked = name_in(row, asked)
        others = [name for name in row if name != asked and _is_filled(row[name])]
        found = f"Column {asked} holds a question, and no column has a usual name of an answer"
        if len(others) == 1:
            columns = {"prompt": asked, "completion": others[0]}
            return Hint(found, f"If column {others[0]} is the answer: {column_flag(columns)}")
        if others:
            columns = {"prompt": asked, "completion": "COLUMN"}
            return Hint(found, f"If one of {_few(others)} is the answer: {column_flag(columns)}")

        return Hint(
            f"Column {asked} holds questions, and no column holds their answers: there is nothing "
            "to train (such rows serve reinforcement learning)",
            "Give rows with answers",
        )
    return None


def _two_texts(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> Hint | None:
    texts = [name for name in columns if any(type(row.get(name)) is str for row in rows)]
    if len(texts) != 2:
        return None
    flag = column_flag({"prompt": texts[0], "completion": texts[1]})
    return Hint(
        f"Columns {texts[0]} and {texts[1]} hold texts, and their names do not say which of them "
        "asks, nor whether they are a question and its answer",
        f"If {texts[0]} is what is asked and {texts[1]} the answer: {flag}",
    )


def _one_text(rows: Sequence[Mapping[str, Any]]) -> Hint | None:
    for row in rows:
        names = [name for name, value in row.items() if type(value) is str]
        if len(names) == 1:
            return Hint(
                f"Column {names[0]} is the only one that holds text",
                f"To train all of it without a chat template: {column_flag({'text': names[0]})}",
            )
    return None
