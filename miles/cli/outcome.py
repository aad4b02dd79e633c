"""The end of a command: its exit status, and one paragraph on the error stream.

    an error of ours          its text; the exit status of its kind (`miles.errors`)
    an error of the system    the file and the cause, as if it were ours
    any other exception       that this is a mistake in miles, and where; 1

With `MILES_DEBUG=1`, or `miles --debug`, the traceback stands above it.
"""

from __future__ import annotations

import select
import sys
import traceback
from collections.abc import Callable

from miles.common import output
from miles.common.debugging import is_debugging, mistake_of_ours
from miles.common.file_errors import cause_of, in_own_words
from miles.errors import MilesError, SourceError, WriteError, brief

MISTAKE_OF_OURS = 1
INTERRUPTED = 130
_READER_GONE = 141
"""As of a process that SIGPIPE ends: `miles certify … | head -1`."""

_INPUT_ERRORS = (FileNotFoundError, IsADirectoryError, NotADirectoryError)


def exit_status_of(command: Callable[[], None], *, is_printed: bool = False) -> int:
    """Run a command; print the error that ends it, if one does.

    Args:
        is_printed: what the command prints is all that it makes, so that it ends where nobody can
            read that any more.

    Returns:
        the exit status.
    """
    with output.outlived(is_result=is_printed):
        return _status_of(command)


def _status_of(command: Callable[[], None]) -> int:
    """Run a command, and return its exit status."""
    try:
        command()
        sys.stdout.flush()

    except KeyboardInterrupt as error:
        # A terminal has shown "^C" on the line before.
        begin = "\n" if sys.stderr.isatty() else ""
        print(f"{begin}miles: {str(error) or 'Ctrl-C: stopped'}", file=sys.stderr)
        return INTERRUPTED

    except MilesError as error:
        _print_error(error, str(error))
        return error.exit_status
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _is_reader_gone():
            output.drop(sys.stdout.fileno())
            return _READER_GONE
        _print_error(error, _of_the_system(error))
        is_input = isinstance(error, _INPUT_ERRORS)
        return SourceError.exit_status if is_input else WriteError.exit_status

    except Exception as error:
        _print_error(error, mistake_of_ours(error))
        return MISTAKE_OF_OURS
    return 0


def _of_the_system(error: OSError) -> str:
    """Return the paragraph on an error that the operating system, or a library, has given."""
    path = str(error.filename) if error.filename else "a file"
    return f"{path}: {cause_of(error, path) or in_own_words(error)}"


def _is_reader_gone() -> bool:
    """Return whether nobody reads the output of this process any more."""
    watched = select.poll()
    watched.register(sys.stdout, 0)
    return any(events & select.POLLERR for _, events in watched.poll(0))


def _print_error(error: Exception, text: str) -> None:
    """Print an error as one paragraph; in a pipe or a file as one line, which a search finds."""
    from rich.text import Text

    from miles.common.prose import Prose
    from miles.common.screen import Screen

    if is_debugging():
        traceback.print_exception(error)
    paragraph = " ".join(line.strip() for line in brief(text).splitlines())
    line = Text.assemble(("miles: error:", "red"), f" {paragraph}")
    Screen(stderr=True, highlight=False, markup=False).print(Prose(line), soft_wrap=True)
