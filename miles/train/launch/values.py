"""Values of flags that more than one command takes."""

from __future__ import annotations

import argparse
import json
import re
from typing import Any

from miles.common import storage
from miles.errors import ConfigError, SourceError


def json_object(text: str) -> dict[str, Any]:
    """A JSON object, for argparse's `type`.

    Raises:
        argparse.ArgumentTypeError: something else.
    """
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"not JSON: {text}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"a JSON object was expected, such as {{}}; found {text}")
    return value


def chat_template(path: str | None) -> str | None:
    """The text of `--chat-template-path`.

    Raises:
        ConfigError: no such file, or one that is no text.
    """
    if path is None:
        return None
    try:
        with storage.reading(path):
            return storage.read_text(path)
    except SourceError as error:
        raise ConfigError(f"--chat-template-path {error}") from error


def positive(text: str) -> int:
    """A whole number from 1 on, for argparse's `type`.

    Raises:
        argparse.ArgumentTypeError: something else.
    """
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a number from 1 on was expected; found {text}")
    return int(text)


_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", re.IGNORECASE)


def num_bytes(text: str) -> int:
    """A size, such as 5GB (5,000,000,000 bytes), 512MiB or 1000, for argparse's `type`.

    Raises:
        argparse.ArgumentTypeError: something else, or nothing.
    """
    match = _SIZE.fullmatch(text.strip())
    size = 0
    if match:
        number, unit, binary = match.groups()
        size = int(float(number) * (1024 if binary else 1000) ** " KMGT".index(unit.upper() or " "))
    if size < 1:
        raise argparse.ArgumentTypeError(
            f"a size was expected, such as 5GB or 512MiB; found {text}"
        )
    return size
