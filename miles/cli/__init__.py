"""The `miles` command: one file a subcommand, with its flags and what it runs.

In: a command line. Out: the exit status: 0, or that of an error, with one paragraph on the error
stream (`outcome.py`). It runs in the process that the user starts. It may import every room, but
only when a command runs: `miles --help` loads none of them.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence

_INTERRUPTED = 130
_WITHOUT_MODELS = ("prepare", "certify", "train", "report")
"""Commands for which transformers is imported without torch, where the process is theirs."""


def main(words: Sequence[str] | None = None) -> int:
    """Run a command line.

    Args:
        words: the command line without the program's name; None: the process's own.

    Returns:
        the exit status: 0; that of the error's kind (`miles.errors`) with one message on the error
        stream; 1 for a mistake of our own; 130 after Ctrl-C.
    """
    try:
        # Imported here: Ctrl-C while that lasts is said in one line, too.
        from miles.cli.commands import run_line
        from miles.common.spared_torch import spare_torch

        if words is None and sys.argv[1:2] and sys.argv[1] in _WITHOUT_MODELS:
            spare_torch()

        status = run_line(sys.argv[1:] if words is None else list(words))
    except KeyboardInterrupt:
        print("miles: Ctrl-C: stopped", file=sys.stderr)
        status = _INTERRUPTED
    if words is None:
        # The process is about to end: another Ctrl-C would only add a traceback of Python's.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    return status
