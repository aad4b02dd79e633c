"""The looks of a text that is not JSON, or not UTF-8: in plain words, without quoting it.

{'a': 1}            single quotes, as Python writes a dict
{"a": 1},           a comma behind the object
{"a": 1,}           a comma behind the last entry
{"a": None}         None, True or False, as Python writes them
b'{"a": "\\xf6"}'    Latin-1 or Windows-1252
"""

from __future__ import annotations

import json
import re

SINGLE_QUOTES = "single quotes, as Python writes a dict"
PYTHON_WORDS = "None, True or False, as Python writes them"
LATIN_1 = "Latin-1 or Windows-1252"

_WORD = re.compile(r"(None|True|False)\b")
_NAME = re.compile(r"[A-Za-z_$][\w$]*\s*:")
_NOT_ASCII = re.compile(rb"[\x80-\xff]")
_RUN = re.compile(rb"[\x80-\xff]{3,}")
"""Letters of a Western language stand between ASCII ones."""
_TYPOGRAPHIC = ("\u201c", "\u201d", "\u201e", "\u2018", "\u2019", "\xe2\x80\x9c", "\xe2\x80\x9d")
"""Quotes, and those of UTF-8 that is read as Latin-1."""


def likely_fault(error: json.JSONDecodeError, text: str) -> str:
    """Return what a text looks like that is not JSON.

    Args:
        error: the decoder's.
        text: that it decoded.

    Returns:
        a noun phrase; "": nothing is known.
    """
    at = error.pos
    found = text[at : at + 1]
    before = text[:at].rstrip()[-1:] if at < len(text) else ""
    if found == "'":
        return SINGLE_QUOTES

    if found == "," and error.msg == "Extra data":
        return "a comma behind the object"
    if found == "{" and error.msg == "Extra data":
        return "another object on the same line"
    if (before == "," and found in ("}", "]")) or error.msg.startswith("Illegal trailing comma"):
        return "a comma behind the last entry"

    if _WORD.match(text, at):
        return PYTHON_WORDS
    if text.startswith(("//", "/*", "#"), at):
        return "a comment"
    if text.startswith(_TYPOGRAPHIC, at):
        return "typographic quotes"
    if error.msg.startswith("Expecting property name") and _NAME.match(text, at):
        return "a name without quotes"
    if error.msg.startswith("Invalid control character"):
        return "a line break or control character within a text"

    is_cut = at >= len(text.rstrip()) or error.msg.startswith("Unterminated")
    return "cut off" if is_cut and text.strip() else ""


def likely_encoding(content: bytes) -> str:
    """Return what text looks like that is not UTF-8.

    Returns:
        a noun phrase; "": nothing is known.
    """
    if b"\0" in content:
        return "UTF-16"
    num_bytes = len(_NOT_ASCII.findall(content))
    valid = content.decode("utf-8", "ignore").encode()
    if 2 * len(_NOT_ASCII.findall(valid)) > num_bytes:
        return "damaged UTF-8, or several encodings"
    if 2 * sum(map(len, _RUN.findall(content))) > num_bytes:
        return "another encoding, such as GBK, Shift-JIS or Windows-1251"
    return LATIN_1


def described(cause: str, likely: str) -> str:
    """Return a cause with what it looks like: "Extra data (it looks like …)"."""
    return f"{cause} (it looks like {likely})" if likely else cause
