"""The reason why none of the first rows of a JSON file can be read: the place, the cause and the remedy.

line 1, column 2: not JSON (…; it looks like single quotes, as Python writes a dict). In Python: …
line 1, column 46: not UTF-8 (byte 0xf6; it looks like Latin-1 or Windows-1252). Convert it: …
line 1: a list, no object. If each list is a conversation, …
"""

from __future__ import annotations

import json
import posixpath
from typing import Any

from miles.common.json_faults import (
    LATIN_1,
    PYTHON_WORDS,
    SINGLE_QUOTES,
    likely_encoding,
    likely_fault,
)
from miles.data.files import contents, json_scan
from miles.data.files.file import File
from miles.data.files.turn_values import has_turns
from miles.data.types import MAX_ROW_BYTES, OTHER_FIELDS_ROW

_KINDS: dict[type, str] = {list: "a list", str: "a text", bool: "true or false", type(None): "null"}
_EXPECTED = (
    "Each row must be a JSON object: write the file anew (in Python: json.dumps of each row)"
)


def describe(file: File, block: bytes, payload: bytes) -> str:
    """Return why the first row of a file cannot be read, and what to do.

    Args:
        file: whose first rows cannot be read.
        block: the bytes of its first row group that has rows.
        payload: its first row.
    """
    line = _lines_before(file) + 1
    if len(payload) > MAX_ROW_BYTES:
        return (
            f"line {line}: a row of {len(payload):,} bytes, and at most {MAX_ROW_BYTES:,} are "
            "read. If one object holds all rows, write one object a row"
        )

    if payload.startswith(OTHER_FIELDS_ROW):
        found = payload.removeprefix(OTHER_FIELDS_ROW).decode()
        return (
            f"line {line}: {found}. The file's first line must name the columns, without a comment "
            "before it; a field that holds the delimiter is put in quotation marks"
        )

    try:
        row = json.loads(payload.decode())
    except UnicodeDecodeError as error:
        return _not_utf8(file, line, payload, error)
    except json.JSONDecodeError as error:
        suffix = contents.csv_suffix(payload.decode())
        if suffix:
            return (
                f"line {line}: names with {'tabs' if suffix == '.tsv' else 'a delimiter'} between "
                f"them: it looks like CSV. If it is, give it a name that ends in {suffix}"
            )
        return _not_json(line, block, payload, error)
    except RecursionError:
        return f"line {line}: nested too deeply. Write such a value as a text, or leave it out"
    except ValueError:
        return f"line {line}: a number of too many digits. Write it as a text"
    return f"line {line}: {_not_an_object(row)}"


def _not_utf8(file: File, line: int, payload: bytes, error: UnicodeDecodeError) -> str:
    likely = likely_encoding(payload)
    old = "WINDOWS-1252" if likely == LATIN_1 else "ITS_ENCODING"
    name = posixpath.basename(file.path)
    before = payload[: error.start]
    return (
        f"{_place(line, before.decode('utf-8', 'replace'))}: not UTF-8 (byte "
        f"0x{payload[error.start]:02x}; it looks like {likely}). Convert it: iconv -f {old} -t "
        f"UTF-8 {name} > NEW"
    )


def _not_json(line: int, block: bytes, payload: bytes, error: json.JSONDecodeError) -> str:
    text = payload.decode()
    # What ends with its line may be the beginning of an object that goes on in the next ones.
    if error.pos >= len(text.rstrip()):
        whole = block.decode("utf-8", "replace")
        try:
            json.JSONDecoder().raw_decode(whole, len(whole) - len(whole.lstrip()))
        except json.JSONDecodeError as farther:
            text = whole
            error = farther
        except (ValueError, RecursionError):
            pass

    likely = likely_fault(error, text)
    looks = f"; it looks like {likely}" if likely else ""
    remedy = _EXPECTED
    if likely in (SINGLE_QUOTES, PYTHON_WORDS):
        remedy = "In Python: json.dumps(ast.literal_eval(line)) of each line"
    return f"{_place(line, text[: error.pos])}: not JSON ({error.msg}{looks}). {remedy}"


def _not_an_object(row: Any) -> str:
    """Return what a row is, and what to do."""
    kind = _KINDS.get(type(row), "a number")
    if has_turns(row):
        return (
            f"{kind}, no object. If each {kind.removeprefix('a ')} is a conversation, write it as "
            'one: in Python, json.dumps({"messages": row}) of each row'
        )
    if isinstance(row, list) and row and all(isinstance(item, dict) for item in row):
        return (
            "a list of objects, no object. If several lists follow each other, write their objects "
            "one a line: jq -c '.[]' FILE > NEW.jsonl"
        )
    return f"{kind}, no object. {_EXPECTED}"


def _place(line: int, before: str) -> str:
    """Return a place, behind a text that begins a line."""
    column = len(before) - (before.rfind("\n") + 1) + 1
    return f"line {line + before.count(chr(10))}, column {column}"


def _lines_before(file: File) -> int:
    """Return the newlines before a file's first row."""
    end = next(group for group in file.row_groups if group.num_rows).offset_bytes
    num_lines = at = 0
    for chunk in json_scan.read_chunks(file.path, file.compression):
        num_lines += chunk.count(b"\n", 0, max(end - at, 0))
        at += len(chunk)
        if at >= end:
            break
    return num_lines
