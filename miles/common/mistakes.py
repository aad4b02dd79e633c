"""All mistakes of a line, or of a run's settings, in one error: nobody mends them one by one.

(1) there is no flag --lrr; did you mean --lr? (2) --save is missing
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from miles.errors import ConfigError, MilesError

T = TypeVar("T")

_MOST_TOLD = 10
"""Mistakes that an error tells: a file of another program has hundreds."""


class Mistakes:
    """Collects the errors of checks that do not depend on one another.

    Args:
        ending: stands behind their number: "2 mistakes, and nothing was started: …".
    """

    def __init__(self, ending: str = "") -> None:
        self.found: list[MilesError] = []
        self._ending = ending

    def add(self, errors: Iterable[MilesError]) -> None:
        """Add errors that were found elsewhere."""
        self.found.extend(errors)

    def require(self, is_met: bool, text: str) -> None:
        """Keep a ConfigError where a condition is not met."""
        if not is_met:
            self.found.append(ConfigError(text))

    def of(self, check: Callable[[], T]) -> T | None:
        """Return the result of a check; None, and its error is kept, where it fails."""
        try:
            return check()
        except MilesError as error:
            # One that names several is divided again, so that the numbers are those of all.
            self.found += error.errors if len(error.errors) > 1 else [error]
            return None

    def raise_all(self, hint: str = "") -> None:
        """Raise one error that names all that were found; where there are none, do nothing.

        Args:
            hint: stands behind them, such as "see miles prepare --help", unless a question does.

        Raises:
            MilesError: of the class of the first, with all of them in `errors`.
        """
        if self.found:
            raise self.joined(hint) from self.found[0].__cause__

    def joined(self, hint: str = "") -> MilesError:
        """Return the error that `raise_all` raises; at least one was found."""
        first = self.found[0]
        if len(self.found) == 1 and not hint:
            return first

        text = _joined(self.found, self._ending)
        if hint and not text.endswith("?"):
            text += f"; {hint}"
        error = type(first)(text)
        error.errors = tuple(self.found)
        return error


def _joined(errors: Sequence[MilesError], ending: str) -> str:
    """Return the text of an error, or the texts of several, numbered."""
    if len(errors) == 1:
        return str(errors[0])
    text = f"{len(errors):,} mistakes{ending}:"
    for number, error in enumerate(errors[:_MOST_TOLD], 1):
        text += f" ({number}) {error}"
        if number < len(errors) and not text.endswith(("?", ".")):
            text += ";"
    if len(errors) > _MOST_TOLD:
        text += f" and {len(errors) - _MOST_TOLD:,} more"
    return text
