"""The errors that a user can cause, and catch.

Each message says where (file, row, flag), what was found, what was expected and what to do. The
command line prints the message alone and ends with the `exit_status` of its kind; a traceback is
for our own mistakes (`MILES_DEBUG=1` shows it for all).

    2  usage      ConfigError
    3  input      SourceError, TemplateError, DataError, CheckpointError
    4  cluster    ClusterError: NoRoomError, LostError
    5  run        RunError: DivergedError, WriteError, LeaseError
"""

from __future__ import annotations

import re

_MOST_OF_A_WORD = 400
"""Characters. A path is as good as never longer."""
_MOST_OF_A_TEXT = 6000
_LONG_WORD = re.compile(rf"\S{{{_MOST_OF_A_WORD + 1},}}")


def brief(text: str) -> str:
    """Return the text of an error without the middle of what is too long to read.

    Values, paths and the texts of libraries stand in errors, and each may be of any length.
    """
    if len(text) > _MOST_OF_A_WORD:
        text = _LONG_WORD.sub(lambda word: _ends_of(word[0], _MOST_OF_A_WORD), text)
    return text if len(text) <= _MOST_OF_A_TEXT else _ends_of(text, _MOST_OF_A_TEXT)


def _ends_of(text: str, most: int) -> str:
    """Return the first two thirds of what may be shown, and the last third: there is the remedy."""
    head = text[: most * 2 // 3]
    tail = text[-(most // 3) :]
    return f"{head}… ({len(text) - len(head) - len(tail):,} characters left out) …{tail}"


class MilesError(Exception):
    """Base of every error that a user's input or surroundings can cause."""

    exit_status = 5
    """of the command that it ends"""
    errors: tuple[MilesError, ...] = ()
    """those that it stands for, where it names several (`common.mistakes`)"""

    def __str__(self) -> str:
        return brief(super().__str__())


class ConfigError(MilesError):
    """A flag or a combination of flags that cannot be run."""

    exit_status = 2


class SourceError(MilesError):
    """An input file that is missing, unreadable, corrupt or no longer what the manifest says."""

    exit_status = 3


class MissingFileError(SourceError, FileNotFoundError):
    """A file or folder that is not there."""


class BrokenFileError(SourceError):
    """A file of our own that is cut off, or is not what was written."""


class TemplateError(MilesError):
    """A tokenizer or chat template that cannot be loaded, or whose turns cannot be located."""

    exit_status = 3


class DataError(MilesError):
    """Rows that cannot be used, where a policy says that this ends the run."""

    exit_status = 3


class CheckpointError(MilesError):
    """A checkpoint that is missing, incomplete, or of another shape than the model asked for."""

    exit_status = 3


class ClusterError(MilesError):
    """A Ray cluster that cannot be used."""

    exit_status = 4


class NoRoomError(ClusterError):
    """A Ray cluster that cannot hold the run as it is asked for: starting again does not help."""


class LostError(ClusterError):
    """A part of the run died, or did not answer in time: the only error that is started again."""


class RunError(MilesError):
    """A run that failed in a way that another start would not mend."""

    remote_stack = ""
    """the traceback of the process that failed, if it is another one: for `train.log`"""


class DivergedError(RunError):
    """Training whose loss or gradient is not finite, step after step."""


class WriteError(RunError):
    """A file or folder that cannot be written: no room, no permission, no credentials."""


class LeaseError(RunError):
    """A folder that another run is writing, or has taken over."""
