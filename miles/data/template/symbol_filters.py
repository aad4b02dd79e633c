"""Jinja's outputs, filters and tests, for values that are symbols or hold some.

    {{ value }}          `to_text`         a string, or a symbol
    a ~ b, {{ a }}b      `concat`          a string, or a symbol with the parts of all
    value | tojson       `to_json`         as transformers' filter; symbols may lie at any depth
    value | join(d)      `join`
    value | replace      `replace`
    value | trim         `by_method`       a filter that is a method of strings
    value is string      `refusing_test`   a test that gives no answer for what stands for a string

Jinja's other filters and tests either hand a value on or use it in a way that a symbol refuses.
`sandbox.py` installs all of them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jinja2
from markupsafe import Markup

from miles.data.template.symbols import (
    MAX_LITERAL_CHARACTERS,
    MAX_PARTS,
    Part,
    Safe,
    Symbol,
    Unbounded,
    Untraceable,
    replace_within_bounds,
)

_MAX_INDENT = 1024

# Around the number of a symbol in JSON text. They are no characters, so no text should hold them.
_STAND_IN_BEGIN = "\ufdd0"
_STAND_IN_END = "\ufdd1"


def to_text(value: Any) -> Any:
    """Return what Jinja puts out for a value: a string, or a symbol."""
    if type(value) is Safe:
        return value.of
    if type(value) is Symbol:
        return value
    _require_data(value)
    return str(value)


def _require_data(value: Any) -> None:
    """Require plain data, whose text is always the same, and not too much of it.

    A list that holds a list twice, which again holds one twice, and so on, is small until it is
    written out.
    """
    pending = [value]
    num_values = 0
    while pending:
        item = pending.pop()
        if isinstance(item, (list, tuple, dict)):
            num_values += len(item)
            if num_values > MAX_PARTS:
                raise Unbounded(f"data of more than {MAX_PARTS} values")
            pending += item.values() if isinstance(item, dict) else item
            continue

        is_scalar = item is None or isinstance(item, (str, int, float, range, Symbol))
        if not is_scalar and not isinstance(item, jinja2.Undefined):
            raise Untraceable(f"the text of {type(item).__name__}")


def concat(values: Iterable[Any]) -> Any:
    """Return the texts of some values, joined: a symbol if there is one among them.

    `values` may be a generator that runs the template, so the size is checked at every value.
    """
    parts: list[Part] = []
    log = None
    num_characters = 0
    for value in values:
        text = to_text(value)
        if type(text) is Symbol:
            log = text._log
            parts += text._parts
            num_characters += sum(len(part) for part in text._parts if type(part) is str)
        else:
            parts.append(text)
            num_characters += len(text)

        if num_characters > MAX_LITERAL_CHARACTERS or len(parts) > MAX_PARTS:
            raise Unbounded(
                f"more than {num_characters - 1} characters of its own, or {len(parts) - 1} parts"
            )

    if log is None:
        return "".join(parts)  # type: ignore[arg-type]
    return Symbol(log, tuple(parts))


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> Any:
    """Return a value as JSON, as transformers' filter of that name does.

    A stand-in is written for each symbol; the text is then cut at the stand-ins.
    """
    if any(type(option) is Symbol for option in (ensure_ascii, indent, separators, sort_keys)):
        raise Untraceable("a layout of JSON that is not known")
    _require_data(value)
    _require_small_layout(indent, separators)
    layout = {
        "ensure_ascii": ensure_ascii,
        "indent": indent,
        "separators": separators,
        "sort_keys": sort_keys,
    }

    symbols: list[Symbol] = []
    text = json.dumps(_with_stand_ins(value, symbols), **layout)

    begin = json.dumps(_STAND_IN_BEGIN, ensure_ascii=ensure_ascii)[1:-1]
    end = json.dumps(_STAND_IN_END, ensure_ascii=ensure_ascii)[1:-1]
    pieces: list[Any] = re.split(f'"{re.escape(begin)}([0-9]+){re.escape(end)}"', text)
    for place in range(1, len(pieces), 2):
        symbol = symbols[int(pieces[place])]
        pieces[place] = symbol._derive(lambda string: json.dumps(string, **layout))
    return concat(pieces)


def _require_small_layout(indent: Any, separators: Any) -> None:
    is_wide = isinstance(indent, int) and indent > _MAX_INDENT
    if is_wide or max(map(size_of, (indent, *(separators or ())))) > _MAX_INDENT:
        raise Unbounded(f"an indent of more than {_MAX_INDENT} characters")


def _with_stand_ins(value: Any, symbols: list[Symbol]) -> Any:
    """Return data with a stand-in for each symbol, which is appended to `symbols`."""
    if type(value) is Symbol:
        symbols.append(value)
        return f"{_STAND_IN_BEGIN}{len(symbols) - 1}{_STAND_IN_END}"
    if isinstance(value, str) and _STAND_IN_BEGIN in value:
        raise Untraceable("a character that is none")

    if isinstance(value, Mapping):
        return {
            _with_stand_ins(key, symbols): _with_stand_ins(item, symbols)
            for key, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [_with_stand_ins(item, symbols) for item in value]
    return value


def join(value: Iterable[Any], d: Any = "", attribute: Any = None) -> Any:
    """Return some values, joined by `d`; the names are those of Jinja's filter."""
    if attribute is not None:
        raise Untraceable("join by an attribute")
    pieces: list[Any] = []
    for item in value:
        pieces += (d, item)
    return concat(pieces[1:])


def join_strings(separator: str, strings: Iterable[Any]) -> Any:
    """Return `separator.join(strings)`, for strings and symbols."""
    pieces = list(strings)
    if not all(type(piece) in (str, Symbol) for piece in pieces):
        raise Untraceable("something that is not a string, joined")
    return join(pieces, separator)


def replace(value: Any, old: Any, new: Any, count: Any = None) -> Any:
    """Return a text with `old` replaced by `new`."""
    count = -1 if count is None else count
    text = to_text(value)
    if type(text) is Symbol:
        return text.replace(old, new, count)
    return replace_within_bounds(text, old, new, count)


def by_method(name: str) -> Callable[..., Any]:
    """Return the filter that is the method `name` of strings."""

    def apply(value: Any, *arguments: Any) -> Any:
        if isinstance(value, (Markup, Safe)):
            raise Untraceable("text that is marked as safe")
        return getattr(to_text(value), name)(*arguments)

    return apply


def for_symbols(
    of_symbol: Callable[[Symbol], Any], otherwise: Callable[[Any], Any]
) -> Callable[[Any], Any]:
    """Return a filter or test with a result of its own for symbols."""
    return lambda value: of_symbol(value) if type(value) is Symbol else otherwise(value)


def refusing_test(refused: tuple[type, ...], test: Callable[..., bool]) -> Callable[..., bool]:
    """Return a test that refuses some types, whose kind is not that of the value they stand for."""

    def ask(*values: Any) -> bool:
        if any(type(value) in refused for value in values):
            raise Untraceable("the kind of a value that stands for a string")
        return test(*values)

    return ask


def size_of(value: Any) -> int:
    """Return the length of a string or a collection, 0 for any other value."""
    return len(value) if isinstance(value, (str, list, tuple, dict, range)) else 0
