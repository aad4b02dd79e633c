"""Columns that the user named, and that no source has.

--tool-key apiz, and rows have prompt, completion, apis   ->  refused: did you mean apis?

A name that is looked for anyway, such as tools, is not refused: rows may do without. Rows that lack
a main column of their shape are dropped one by one, and are not looked at here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain

from miles.common.near_names import did_you_mean
from miles.data.config import SourceConfig
from miles.data.files.file import File
from miles.data.files.first_rows import first_rows
from miles.data.files.other_files import some_others
from miles.data.files.row_columns import USUAL_COLUMNS, known_columns
from miles.data.files.row_shapes import MAIN_FIELDS
from miles.errors import SourceError

_MAIN_FIELDS = frozenset(("prompt", "completion", *chain(*MAIN_FIELDS.values())))
_MOST_NAMES = 20


def require_named_columns(
    sources: Sequence[SourceConfig],
    files: Sequence[Sequence[File]],
    found: Sequence[Mapping[str, str]],
) -> None:
    """Refuse a name that the user gave, of a column that no source has in its first rows.

    The first rows of a few files of each source are looked at. What is evaluated may have fewer
    columns than what is trained.

    Args:
        files: of each source.
        found: field -> column of each source, as its first rows have them.

    Raises:
        SourceError: there is such a name.
    """
    missing: dict[str, str] = {}
    for source in sources:
        for field, name in source.format.columns.items():
            is_optional = field not in _MAIN_FIELDS and not source.is_evaluation
            if is_optional and name not in USUAL_COLUMNS[field]:
                missing[name] = field
    for columns in found:
        for name in columns.values():
            missing.pop(name, None)
    if not missing:
        return

    there = _all_columns(sources, files)
    for name, field in missing.items():
        if name in there or name.partition(".")[0] in there:
            continue
        hint = did_you_mean(name, there, otherwise="name one of these.")
        more = ", …" if len(there) > _MOST_NAMES else ""
        raise SourceError(
            f"column {name}, named for {field} by --column-names (or --input-key, --tool-key), is "
            f"in none of the first rows of source {', '.join(source.name for source in sources)}, "
            f"which have {', '.join(there[:_MOST_NAMES])}{more}{hint} Where only later rows have "
            "it, put one of them first"
        )


def _all_columns(sources: Sequence[SourceConfig], files: Sequence[Sequence[File]]) -> list[str]:
    """Return the columns of the first rows of a few files of each source, in their order."""
    there: dict[str, None] = {}
    for source, own in zip(sources, files, strict=True):
        first = next(file for file in own if file.num_rows)
        for file in (first, *some_others(first, own)):
            _, columns = first_rows(
                file, known_columns(source.format), transform=source.format.transform
            )
            there.update(dict.fromkeys(columns))
    return list(there)
