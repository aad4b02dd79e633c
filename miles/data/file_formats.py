"""The name of a file -> the format of its rows. One table for all who ask "is this a data file?".

a/b.jsonl.gz   format "jsonl", compression "gzip"
B.JSONL        format "jsonl"
README.md      none
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from miles.errors import SourceError

_COMPRESSIONS = {"": None, ".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".xz": "xz"}
_TEXTS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "tsv"}

FORMATS: dict[str, tuple[str, str | None]] = {
    ".parquet": ("parquet", None),
    **{
        text + packed: (format, compression)
        for packed, compression in _COMPRESSIONS.items()
        for text, format in _TEXTS.items()
    },
    ".arrow": ("arrow", None),
    ".feather": ("arrow", None),
    ".ipc": ("arrow", None),
}
"""Suffix, in small letters -> format and compression. None ends with another.

Between "jsonl" and "json" the file's beginning decides. Parquet compresses inside the file.
"""

FAMILIES: tuple[tuple[str, ...], ...] = (
    ("parquet",),
    ("jsonl", "json"),
    ("arrow",),
    ("csv", "tsv"),
)
"""Formats that are read together where a folder holds several."""

_ORDER = ("parquet", "jsonl", "arrow", "json", "csv", "tsv")
"""Of a folder that holds several, the first format that is there says which family is read: JSON
that stands alone beside tables describes them."""

_SIDECARS = re.compile(
    r"dataset_infos?\.json|dataset_dict\.json|state\.json"  # of `datasets` and LLaMA-Factory
    r"|dataset-metadata\.json|datapackage\.json|croissant\.json"  # of Kaggle and catalogues
    r"|package(-lock)?\.json"  # of npm
    r"|cache-.*\.arrow|tmp\w*\.arrow"  # what `datasets` computed and kept beside its data
    r"|(readme|licen[cs]e|notice|citation|makefile|dockerfile)(\..*)?"
    r"|.*\.(md|rst|crc|lock|log|py|sh|ipynb|ya?ml|toml|cfg|ini|cff|bib|pdf|html?|png|jpe?g|gif|svg)",
    re.IGNORECASE,
)
"""Names of files that hold no rows, whichever lie beside them."""


_OTHER_NAMES = {
    ".jsonlines": ".jsonl",
    ".ldjson": ".jsonl",
    ".jl": ".jsonl",
    ".gzip": ".gz",
    ".zstd": ".zst",
    ".bzip2": ".bz2",
    ".tab": ".tsv",
    ".pq": ".parquet",
}
"""A suffix that others write -> that of `FORMATS`."""


def suffix_of(path: str) -> str | None:
    """Return the suffix of a file's name in `FORMATS`; None: it has another one."""
    name = path.rsplit("/", 1)[-1].lower()
    return next((suffix for suffix in FORMATS if name.endswith(suffix)), None)


def known_suffixes() -> str:
    """Return the suffixes of `FORMATS` for an error: ".parquet, .jsonl, … (text also .gz, …)"."""
    plain = [suffix for suffix, (_, compression) in FORMATS.items() if compression is None]
    packed = [suffix for suffix, (_, compression) in FORMATS.items() if compression is not None]
    further = dict.fromkeys(f".{suffix.rsplit('.', 1)[1]}" for suffix in packed)
    return f"{', '.join(plain)} (text also packed: {', '.join(further)})"


def remedy_for(path: str) -> str:
    """Return what to do about a file whose suffix is not in `FORMATS`: a sentence."""
    stem, dot, end = path.rsplit("/", 1)[-1].rpartition(".")
    suffix = f"{dot}{end}".lower() if stem else ""
    if suffix in (".zip", ".tar", ".tgz", ".7z", ".rar") or ".tar." in path.lower():
        return "Unpack it, and name what was in it"
    if suffix in _OTHER_NAMES:
        return f"Name it {stem}{_OTHER_NAMES[suffix]}"
    if suffix in (".xls", ".xlsx", ".ods"):
        return "Save its table as CSV"
    return f"If it holds a JSON object a line, name it {stem or end}.jsonl"


def is_sidecar(path: str) -> bool:
    """Return whether a file is known, by its name, to hold no rows."""
    return bool(_SIDECARS.fullmatch(path.rsplit("/", 1)[-1]))


def of_one_family(paths: Sequence[str]) -> list[str]:
    """Return those of some files with rows that are read together."""
    formats = [format_of(path)[0] for path in paths]
    first = min(formats, key=_ORDER.index, default="")
    family = next((family for family in FAMILIES if first in family), ())
    return [path for path, format in zip(paths, formats, strict=True) if format in family]


def format_of(path: str) -> tuple[str, str | None]:
    """Return a file's format and compression, from its suffix: `a/b.jsonl.gz` -> ("jsonl", "gzip").

    Raises:
        SourceError: the suffix is not in `FORMATS`.
    """
    suffix = suffix_of(path)
    if suffix is None:
        raise SourceError(
            f"{path}: its name does not say what is in it; expected one ending in "
            f"{known_suffixes()}. {remedy_for(path)}"
        )
    return FORMATS[suffix]
