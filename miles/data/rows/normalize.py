"""A raw row -> a conversation: OpenAI messages, tools, and a flag for each turn; or a text.

    {"conversations": [{"from": "human", "value": "2+2?"},
                       {"from": "gpt", "value": "4", "weight": 1}], "system_prompt": "Be brief."}
    ->  messages  system "Be brief.", user "2+2?", assistant "4"
        flags     None, None, True

A `RowFormat` says which shape the row has:

    messages           turns of ShareGPT or OpenAI (`turns`)
    alpaca             [system,] pairs of the history, then instruction and input -> output
    prompt_completion  two texts; or two lists of messages, where only the completion's are trained
    preference         the chosen side of two answers (`exchanges`, like the two above)
    transcript         one text with the names of its speakers (`transcripts`)
    text               one text, all of it trained

A null at the top of a row or directly in a turn is as good as absent, and NaN is as null. Below
that a null is what its author wrote (Arrow's padding is gone before a row is JSON). The detail of a
rejected row gives positions and types, never its text; a role that is not known is quoted.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from miles.common.json_faults import described, likely_encoding, likely_fault
from miles.data.config import RowFormat
from miles.data.files.made_rows import transformed
from miles.data.files.raw_values import has_too_many_values
from miles.data.files.row_columns import (
    BESIDE_TURNS,
    column_of,
    possible_columns,
    with_usual_names,
)
from miles.data.files.turn_values import CONTENT_KEYS
from miles.data.rows.content_parts import text_of as text_of_parts
from miles.data.rows.exchanges import (
    alpaca,
    as_functions,
    calls_tools,
    conversation_of,
    missing,
    preference,
    prompt_and_completion,
    text_of,
)
from miles.data.rows.json_text import ROW_DECODER, is_encodable, require_encodable, strict_object
from miles.data.rows.media import require_no_media
from miles.data.rows.number_texts import (
    FINITE_DECODER,
    NotFiniteError,
    require_finite,
    text_of_row,
    with_number_texts,
)
from miles.data.rows.reject import reject, type_of
from miles.data.rows.template_variables import template_kwargs_of
from miles.data.rows.tools import Tools, shows_tools, tools_of
from miles.data.rows.transcripts import with_announced_tools
from miles.data.rows.turn_forms import first_key
from miles.data.rows.turn_lists import turn_list
from miles.data.rows.turns import Flags, Messages, read_turns
from miles.data.types import (
    MAX_ROW_BYTES,
    MAX_ROW_VALUES,
    OTHER_FIELDS_ROW,
    OVERSIZED_ROW,
    UNREADABLE_ROW,
    Conversation,
)

MESSAGES = RowFormat("messages")

NO_VARIABLES: Mapping[str, Any] = {}


def normalize(payload: bytes, format: RowFormat = MESSAGES) -> Conversation:
    """Read one row.

    Args:
        payload: the row, a JSON object in UTF-8.
        format: its shape, which is not "auto" (`row_shapes.detect_format`), and the columns and
            roles that the user named.

    Raises:
        RowRejected: the row cannot be used, with one of `REJECT_REASONS`.
    """
    assert format.shape != "auto", "the shape is detected before rows are read"
    if format.transform is not None:
        payload = transformed(payload, format.transform)
    row: Mapping[str, Any] | None = None
    if len(payload) <= MAX_ROW_VALUES:  # most rows are much shorter
        row = strict_object(payload)
    # Halves of surrogate pairs come from elsewhere, or from JSON within a transcript.
    has_no_halves = row is not None and format.shape == "messages"
    if row is None:
        row = _parse(payload, format)
    if format.columns or not "".join(row).islower():  # most rows have the usual names
        row = with_usual_names(row, format.columns)
    if format.shape == "messages":
        messages, flags = read_turns(_turns(row, format), "turn", format)
    else:
        row = with_number_texts(row, payload, format)
        if format.shape == "text":
            return _plain_text(row, format)
        messages, flags = _messages(row, format)
    _require_trainable(messages, flags)
    if not format.columns and _has_nothing_beside(row):  # most rows
        tools, template_kwargs = None, NO_VARIABLES
    else:
        tools, template_kwargs = _take_beside(row, format, messages, flags)

    # An escape may be half of a character.
    if not has_no_halves and (b"\\ud" in payload or b"\\uD" in payload):
        require_encodable(messages, tools)
    return Conversation(tuple(messages), tools, tuple(flags), None, template_kwargs)


def normalize_turns(turns: Sequence[Any], format: RowFormat) -> Conversation:
    """Read a row of which the turns are known, and that has nothing of meaning beside them.

    Args:
        turns: objects with a role and a content, both text.
        format: as for `normalize`.

    Raises:
        RowRejected: as from `normalize`.
    """
    messages, flags = read_turns(turns, "turn", format)
    _require_trainable(messages, flags)
    require_encodable(messages, None)
    return Conversation(tuple(messages), None, tuple(flags), None, NO_VARIABLES)


def _has_nothing_beside(row: Mapping[str, Any]) -> bool:
    """Return whether a row has no column that matters beside its turns, or only null ones."""
    return all(row[name] is None for name in BESIDE_TURNS.intersection(row))


def _take_beside(
    row: Mapping[str, Any], format: RowFormat, messages: Messages, flags: Flags
) -> tuple[Tools | None, Mapping[str, Any]]:
    """Return the tools and the template variables of a row; add its system turn to its messages."""
    column, prompt = _system(row, format)
    tools = tools_of(row, format)
    if format.shape == "transcript" and prompt is not None:
        prompt, tools = with_announced_tools(prompt, tools)
    elif tools is not None and format.shape == "prompt_completion" and calls_tools(row, format):
        tools = as_functions(tools)

    if prompt:
        _add_system(prompt, column, messages, flags)

    require_no_media(row, messages)
    if tools is not None and shows_tools(messages, tools):
        tools = None
    return tools, template_kwargs_of(row, format)


def _add_system(prompt: str, column: str, messages: Messages, flags: Flags) -> None:
    """Add the text of a system column to the messages, whose system turns may hold it already."""
    turns = [number for number, message in enumerate(messages) if message["role"] == "system"]
    told = [messages[number]["content"] for number in turns]
    if not turns:
        messages.insert(0, {"role": "system", "content": prompt})
        flags.insert(0, None)
    elif not any(text.strip() for text in told):
        messages[turns[0]] = {**messages[turns[0]], "content": prompt}
    elif not any(prompt.strip() in text for text in told):
        reject(
            "bad_message",
            f"column {column} holds a system turn, and message {turns[0]} is another one: which of "
            "them is meant is not clear. Remove one of them, or write the same text in both",
        )


def _messages(row: Mapping[str, Any], format: RowFormat) -> tuple[Messages, Flags]:
    """Return the turns of a row whose column is no list of them."""
    if format.shape == "alpaca":
        return alpaca(row, format)
    if format.shape == "prompt_completion":
        return prompt_and_completion(row, format)
    if format.shape == "preference":
        return preference(row, format)
    return conversation_of(row, format)


def _parse(payload: bytes, format: RowFormat) -> Mapping[str, Any]:
    _require_moderate(payload)
    try:
        try:
            row = FINITE_DECODER.decode(text_of_row(payload))
        except NotFiniteError:  # read as null
            row = ROW_DECODER.decode(text_of_row(payload))
            if format.shape != "text" and type(row) is dict:
                require_finite(payload)
    except UnicodeDecodeError as error:
        _reject_stand_in(payload)
        cause = f"not UTF-8 at byte {error.start}"
        reject("malformed_json", described(cause, likely_encoding(payload)))
    except json.JSONDecodeError as error:
        cause = f"{error.msg} at character {error.pos}"
        reject("malformed_json", described(cause, likely_fault(error, error.doc)))
    except ValueError:
        reject("malformed_json", "a number of too many digits")
    except RecursionError:
        reject("malformed_json", "nested too deeply")

    if type(row) is not dict:
        reject("not_an_object", f"the row is {type_of(row)}")
    return row


def _require_moderate(payload: bytes) -> None:
    """Reject a row that would take a loader's memory when it is decoded."""
    if len(payload) > MAX_ROW_BYTES:
        _reject_oversized(len(payload))
    if has_too_many_values(payload):
        reject("malformed_json", f"lists and objects of more than {MAX_ROW_VALUES:,} values")


def _reject_stand_in(payload: bytes) -> None:
    """Reject what stands for a row that was not read, as what it says."""
    if payload.startswith(OVERSIZED_ROW):
        _reject_oversized(int(payload.removeprefix(OVERSIZED_ROW)))
    if payload.startswith(OTHER_FIELDS_ROW):
        reject("malformed_json", payload.removeprefix(OTHER_FIELDS_ROW).decode())
    if payload == UNREADABLE_ROW:
        reject("malformed_json", "a value that cannot be made text, such as bytes not UTF-8")


def _reject_oversized(num_bytes: int) -> NoReturn:
    reject("too_long", f"{num_bytes:,} bytes of JSON, at most {MAX_ROW_BYTES:,}")


def _require_trainable(messages: Messages, flags: Flags) -> None:
    for message, flag in zip(messages, flags, strict=True):
        if flag is not False and message["role"] == "assistant":
            return
    reject(
        "nothing_to_train", f"none of {len(messages)} turns is an assistant's that may be trained"
    )


def _plain_text(row: Mapping[str, Any], format: RowFormat) -> Conversation:
    text = text_of(row, "text", format)
    if text is None:
        reject("no_messages", missing("text", format))
    if not text or text.isspace():
        reject("nothing_to_train", "the text is empty")
    if not is_encodable(text):
        reject("bad_message", "the text: half of a surrogate pair, which is not text")
    return Conversation((), None, (), text)


def _turns(row: Mapping[str, Any], format: RowFormat) -> list[Any]:
    """Return the turns of a row of the shape "messages": a list, or the JSON text of one."""
    column = column_of("messages", row, format.columns)
    if column is None:
        reject("no_messages", missing("messages", format))
    turns = row[column]
    return turns if type(turns) is list and turns else turn_list(turns, column)


def _system(row: Mapping[str, Any], format: RowFormat) -> tuple[str, str | None]:
    """Return the column of the system turn, and its text; None if there is none, or it is empty."""
    for column in possible_columns("system", format.columns):
        if value := row.get(column):
            if type(value) is dict:  # a message, as Gemini's system instruction
                key = first_key(value, CONTENT_KEYS)
                value = value if key is None else value[key]
            text = value if type(value) is str else text_of_parts(value, f"column {column}")
            return column, text
    return "", None
