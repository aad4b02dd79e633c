"""The errors that a user can cause, and catch.

Each message says where (file, row, flag), what was found, what was expected and what to do. The
command line prints the message alone; a traceback is for our own mistakes.
"""

from __future__ import annotations


class MilesError(Exception):
    """Base of every error that a user's input or surroundings can cause."""


class ConfigError(MilesError):
    """A flag or a combination of flags that cannot be run."""


class SourceError(MilesError):
    """An input file that is missing, unreadable, corrupt or no longer what the manifest says."""


class TemplateError(MilesError):
    """A tokenizer or chat template that cannot be loaded, or whose turns cannot be located."""


class DataError(MilesError):
    """Rows that cannot be used, where a policy says that this ends the run."""


class CheckpointError(MilesError):
    """A checkpoint that is missing, incomplete, or of another shape than the model asked for."""


class ClusterError(MilesError):
    """A Ray cluster that cannot hold the run, or lost a part of it."""


class NoRoomError(ClusterError):
    """A Ray cluster that cannot hold the run as it is asked for: starting again does not help."""


class DivergedError(MilesError):
    """Training whose loss or gradient is not finite, step after step."""
