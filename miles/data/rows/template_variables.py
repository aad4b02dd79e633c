"""Variables for the chat template that a row brings: an object, or the JSON text of one.

    {"messages": […], "chat_template_kwargs": {"enable_thinking": false}}  ->  the object
    {"messages": […], "chat_template_kwargs": "{\\"enable_thinking\\": false}"}  ->  the same

What its author wrote stays, nulls too. Which names may stand here depends on the tokenizer, so the
encoder checks them (`template/row_variables.py`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from miles.data.config import RowFormat
from miles.data.files.row_columns import column_of
from miles.data.rows.json_text import require_json
from miles.data.rows.reject import reject, type_of

_NONE: Mapping[str, Any] = {}


def template_kwargs_of(row: Mapping[str, Any], format: RowFormat) -> Mapping[str, Any]:
    """Return the template variables of a row; none where it has no such column, or a blank one.

    Raises:
        RowRejected: malformed_json, or bad_message where it is no object.
    """
    column = column_of("template_kwargs", row, format.columns)
    if column is None:
        return _NONE

    value = row[column]
    # An object is checked as its text is: for its depth, and for text without an encoding.
    text = value if type(value) is str else json.dumps(value)
    variables = require_json(text, f"column {column}") if text.strip() else None
    if variables is None:
        return _NONE
    if type(variables) is not dict:
        reject("bad_message", f"column {column} is {type_of(variables)}, not an object")
    return variables
