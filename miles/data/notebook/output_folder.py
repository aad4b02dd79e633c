"""The folder that `miles prepare` writes: may its content be replaced?

nothing, or nothing that is visible                              yes
what a prepare of the same rows and settings wrote               yes
what a prepare left that never ended (no manifest)               yes
rows of other files, or under other settings                     with --overwrite
files that no prepare wrote                                      with --overwrite: they stay
Parquet files that no prepare wrote: they would be read as rows  no
"""

from __future__ import annotations

import json
import re

from miles.common import run_folder, storage
from miles.common.redact import redact
from miles.data.files.manifest import Manifest
from miles.errors import ConfigError

PART = re.compile(r"part-\d{5,}\.parquet")
"""Names of the files with rows."""
UNFINISHED = re.compile(r"\.part-\d{5,}\.parquet\.[0-9a-f]{32}\.tmp")
"""Names of what is left of one by a process that was killed while it wrote."""
_OTHERS = (run_folder.MANIFEST, run_folder.SUMMARY, run_folder.REJECTS)
ENCODER = "encoder_fingerprint"
"""Key in `summary.json`."""


def require_replaceable(
    url: str, manifest: Manifest, encoder_fingerprint: str, *, overwrite: bool
) -> None:
    """Refuse a folder with content that would be lost, or mixed with what is written.

    Args:
        url: the folder (fsspec URL).
        manifest: of the rows to write.
        encoder_fingerprint: of the settings that they are written under.
        overwrite: prepared rows may be lost.

    Raises:
        ConfigError: says what is there, and what to do.
    """
    names = [name for name in storage.names(url) if not name.startswith(".")]
    foreign = [name for name in names if not PART.fullmatch(name) and name not in _OTHERS]
    rows = [name for name in foreign if name.endswith(".parquet") and not name.startswith("_")]
    if rows:
        raise ConfigError(
            f"{redact(url)}: holds {_some(rows)}, which no prepare wrote, and which would be read "
            "as rows of this data set: give another folder"
        )
    if overwrite or not names:
        return

    if foreign:
        raise ConfigError(
            f"{redact(url)}: holds {_some(foreign)}, which no prepare wrote: give another folder, "
            "or --overwrite to write beside them"
        )

    if run_folder.MANIFEST in names:
        if not _is_same(url, manifest, encoder_fingerprint):
            raise ConfigError(
                f"{redact(url)}: holds prepared rows of other files (or of files that were written "
                "since), or under other settings: give another folder, or --overwrite to replace "
                "them"
            )
    elif run_folder.REJECTS not in names:  # a prepare writes it before the first rows
        raise ConfigError(
            f"{redact(url)}: holds {_some(names)}, which no prepare wrote: give another folder, or "
            "--overwrite to replace them"
        )


def _is_same(url: str, manifest: Manifest, encoder_fingerprint: str) -> bool:
    """Return whether a complete folder is of the same rows and settings."""
    try:
        found = json.loads(storage.read_text(storage.join(url, run_folder.MANIFEST)))
        summary = json.loads(storage.read_text(storage.join(url, run_folder.SUMMARY)))
        fingerprints = (found["fingerprint"], summary[ENCODER])
    except (ValueError, KeyError, TypeError, FileNotFoundError):
        return False
    return bool(fingerprints == (manifest.fingerprint, encoder_fingerprint))


def _some(names: list[str]) -> str:
    """Return the first names of a list."""
    shown = ", ".join(names[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown
