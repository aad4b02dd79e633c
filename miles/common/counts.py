"""A number and its noun, as a person writes them: "1 row", "2,000 rows"."""

from __future__ import annotations


def counted(number: float, singular: str, plural: str = "") -> str:
    """Return a number and its noun.

    Args:
        number: a count; a fraction, such as 0.5 GPUs, takes the plural.
        singular: the noun of one: "row", "micro-batch".
        plural: of any other number; "": the singular with an "s".
    """
    noun = singular if number == 1 else plural or f"{singular}s"
    digits = f"{number:,}" if isinstance(number, int) else f"{number:,g}"
    return f"{digits} {noun}"
