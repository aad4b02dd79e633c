"""Values of flags that more than one command takes."""

from __future__ import annotations

import argparse
import json
from typing import Any

from miles import storage
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
