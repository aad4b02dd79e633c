"""Which columns of an Arrow table have a place in a JSON object.

    text, numbers, booleans, dates, structs and lists of them    yes
    dictionaries, views, maps with text as keys, JSON, UUIDs     yes
    binary                                                       where a field of the row is in it,
                                                                 as text: Spark writes text so
    anything else (unions, fixed-size bytes, intervals, …)       no: the column is not read

Extension types of others can run code when they are loaded. A file that has one is refused.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass, field

import pyarrow as pa

from miles.data.files.arrow_types import is_binary, is_plain, is_text, parts
from miles.data.files.arrow_values import is_convertible
from miles.errors import SourceError

_TYPE_CHARACTERS = 80


@dataclass(frozen=True)
class Columns:
    """The columns of a table, by what can be read of them."""

    names: tuple[str, ...]
    """all of them, in order"""
    schema: pa.Schema
    no_json: dict[str, str] = field(default_factory=dict)
    """column -> why it has no place in JSON: the end of a sentence that begins with its name"""
    binary: dict[str, str] = field(default_factory=dict)
    """column with binary values that can be read as text -> the same"""

    @property
    def unread(self) -> tuple[str, ...]:
        """The columns that are not read where no field of the row is in them, in order."""
        return tuple(name for name in self.names if name in self.no_json or name in self.binary)

    def require_readable(self, url: str, named: Set[str]) -> None:
        """Refuse a file where a column that holds a field has no place in JSON.

        Args:
            url: of the file, for the error.
            named: names of columns that hold fields of the rows.

        Raises:
            SourceError: one of them has no place.
        """
        for name, why in self.no_json.items():
            if name in named:
                raise SourceError(
                    f"{url}: column {name!r} {why}, and has no place in JSON; expected text, "
                    "numbers, booleans, dates, structs, lists, or maps with text as keys. Write it "
                    "as one of them, or as JSON text"
                )


def columns_of(url: str, schema: pa.Schema) -> Columns:
    """Judge the columns of a table by their types.

    Args:
        url: of the file, for the error.

    Raises:
        SourceError: two columns share a name, or one is of a foreign extension type.
    """
    repeated = _first_repeated(schema.names)
    if repeated is not None:
        raise SourceError(
            f"{url}: two columns are called {repeated!r}, and a row has one value of a name. "
            "Rename one of them"
        )

    columns = Columns(tuple(schema.names), schema)
    for column in schema:
        fields = list(parts(column))
        for part in fields:
            _require_no_code(url, column, part)

        reasons = filter(None, (_why_no_json(column, part) for part in fields))
        reason = next(reasons, None)
        if reason is None and not is_convertible(column.type):
            reason = f"{_typed(column)}, which this version of pyarrow does not take apart"
        if reason is not None:
            columns.no_json[column.name] = reason
        elif any(is_binary(part.type) for part in fields):
            columns.binary[column.name] = _typed(column)
    return columns


def _require_no_code(url: str, column: pa.Field, part: pa.Field) -> None:
    """Refuse a field, nested in a column or the column itself, whose type can run code.

    Raises:
        SourceError: it is of an extension type that is not Arrow's own.
    """
    # Arrow's own are of C++; those that Python code registers derive from `ExtensionType`.
    is_foreign = isinstance(part.type, pa.ExtensionType)
    if is_foreign or b"ARROW:extension:name" in (part.metadata or {}):
        raise SourceError(
            f"{url}: column {column.name!r} is of an Arrow extension type ({part.type}), which is "
            "not read: such types can run code when they are loaded. Write the column as plain "
            "Arrow data, or leave it out"
        )


def _why_no_json(column: pa.Field, part: pa.Field) -> str | None:
    """Return why a field has no place in JSON, as in `Columns.no_json`; None: it has one."""
    kind = part.type
    if pa.types.is_map(kind):
        if is_text(kind.key_type):
            return None
        return f"{_typed(column)}, a map whose keys are not text"

    if pa.types.is_struct(kind):
        repeated = _first_repeated([inner.name for inner in kind])
        return None if repeated is None else f"has two fields called {repeated!r}"
    return None if is_plain(kind) or is_binary(kind) else _typed(column)


def _typed(column: pa.Field) -> str:
    """Return "is of type …", in few characters."""
    name = str(column.type)
    is_long = len(name) > _TYPE_CHARACTERS
    return f"is of type {name[:_TYPE_CHARACTERS]}{'…' if is_long else ''}"


def _first_repeated(names: Sequence[str]) -> str | None:
    """Return the first name that occurs again."""
    return next((name for number, name in enumerate(names) if name in names[:number]), None)
