"""OpenHermes-2.5 as a source: from files of the user's own, or from the Hugging Face hub.

On the hub its Parquet branch is taken where it has one, else the one JSON array that the repository
holds. No file is opened; the hub is only asked which files it has.
"""

from __future__ import annotations

from collections.abc import Sequence
from urllib.parse import quote

from miles.common import storage
from miles.common.first_contact import announced
from miles.data.config import RowFormat, SourceConfig
from miles.errors import ConfigError, MilesError, SourceError

OPENHERMES = "teknium/OpenHermes-2.5"
_PARQUET_BRANCH = "refs/convert/parquet"  # kept by the hub beside every data set
_ARRAY = "openhermes2_5.json"
_DETECTED = RowFormat()
"""Shape and columns are detected from the first rows."""


def openhermes_sources(
    source: str | Sequence[str] | None,
    revision: str | None = None,
    format: RowFormat = _DETECTED,
    split: str | None = None,
) -> tuple[SourceConfig, ...]:
    """Return OpenHermes-2.5 as the one source of a run.

    Args:
        source: files, globs or folders; None: the hub.
        revision: branch, tag or commit on the hub; only its files are taken, Parquet where it has
            any, else the array. None: what the hub has now.
        format: how the rows are laid out.
        split: of a folder, as for `SourceConfig`.

    Raises:
        SourceError: the hub cannot be reached, asks for a login, or has no such revision.
        ConfigError: a revision is given together with `source`.
    """
    if source is None:
        paths = _hub_files((revision,) if revision else (_PARQUET_BRANCH, "main"))
    elif revision is None:
        paths = (source,) if isinstance(source, str) else tuple(source)
    else:
        raise ConfigError(
            f"revision {revision!r} is one of the hub's; with source= there is none to choose"
        )
    return (SourceConfig("openhermes", paths, format, split),)


def _hub_files(revisions: Sequence[str]) -> tuple[str, ...]:
    """Return the URLs of the first revision that has Parquet files or the array."""
    for revision in revisions:
        names = _names_at(revision)
        tables = tuple(f"hf://{name}" for name in sorted(names) if name.endswith(".parquet"))
        array = tuple(f"hf://{name}" for name in names if name.endswith("/" + _ARRAY))
        if tables or array:
            return tables or array
    raise _hub_error(f"nothing to read at revision {' or '.join(revisions)}")


def _names_at(revision: str) -> list[str]:
    """Return the files at a revision; none if there is no such revision."""
    url = f"hf://datasets/{OPENHERMES}@{quote(revision, safe='')}"
    try:
        fs, path = storage.filesystem(url)
        with announced("the Hugging Face hub"):
            fs.info(path)  # raises where find() would quietly return nothing
            names: list[str] = fs.find(path)
        return names

    except MilesError as error:
        raise _hub_error(str(error)) from error
    except FileNotFoundError as error:
        if type(error.__cause__).__name__ == "RevisionNotFoundError":
            return []
        raise _hub_error(
            f"the hub asks for a login, or does not have it ({_first_line(error)})"
        ) from error
    # The hub's client raises errors of its HTTP library, which changes from release to release.
    except Exception as error:
        raise _hub_error(
            f"the Hugging Face hub cannot be reached ({_first_line(error)})"
        ) from error


def _hub_error(reason: str) -> SourceError:
    return SourceError(
        f"{OPENHERMES}: {reason}. Either log in where the network is (HF_TOKEN in the "
        "environment), or fetch the files elsewhere and name them: --source PATH, or "
        "prepare('openhermes', source='PATH'), with PATH a file, glob or folder of Parquet, JSON "
        f"lines, or {_ARRAY}"
    )


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]
