"""Errors of transformers and tokenizers on a broken tokenizer -> one that says what to do.

    tokenizer_config.json: {"model_max_length": "x"}
    ->  …/tokenizer_config.json: model_max_length = 'x'; a number was expected. Copy the folder …

The small files are checked before they are loaded: on a wrong type the libraries fail late and in
Python's words. Which of the other files is broken is found out only after a failure.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from miles.common import storage
from miles.common.file_errors import in_own_words
from miles.errors import MilesError, TemplateError

_TEXT = (str, type(None))
_TOKEN = (str, dict, type(None))
_SETTINGS: Mapping[str, tuple[tuple[type, ...], str]] = {
    "tokenizer_class": (_TEXT, "a text"),
    "model_max_length": ((int, float, type(None)), "a number"),
    "padding_side": (_TEXT, "a text"),
    "truncation_side": (_TEXT, "a text"),
    "chat_template": ((str, list, dict, type(None)), "a text, or a list of named ones"),
    "added_tokens_decoder": ((dict, type(None)), "a JSON object"),
}
_SPECIAL = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_NUM_CHARACTERS = 300


def remedy(where: str) -> str:
    """Return what can be done about a tokenizer that cannot be loaded."""
    return (
        "Copy the folder again from its source; the library's own view: python -c \"from "
        f"transformers import AutoTokenizer; AutoTokenizer.from_pretrained('{where}')\""
    )


def require_well_formed(folder: str, url: str) -> None:
    """Refuse a folder whose small files are no JSON objects, or have settings of a wrong type.

    Args:
        folder: where the files lie.
        url: names the folder in errors.

    Raises:
        TemplateError: names the file, the setting, and what was expected.
    """
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        path = Path(folder, name)
        if not path.is_file():
            continue
        where = storage.join(url, name)
        content = _json_object(path, where, url)
        for setting, (types, expected) in _SETTINGS.items():
            _require_type(content, setting, types, expected, where, url)
        for token in _SPECIAL:
            expected = "a text, or the object of an added token"
            _require_type(content, f"{token}_token", _TOKEN, expected, where, url)


def _require_type(
    content: Mapping[str, Any],
    setting: str,
    types: tuple[type, ...],
    expected: str,
    where: str,
    url: str,
) -> None:
    value = content.get(setting)
    if not isinstance(value, types) or isinstance(value, bool):
        raise TemplateError(
            f"{where}: cannot be loaded: {setting} = {repr(value)[:80]}; {expected} was expected. "
            f"{remedy(url)}"
        )


def _json_object(path: Path, where: str, url: str) -> dict[str, Any]:
    """Return the content of a JSON file.

    Raises:
        TemplateError: it is no JSON object.
    """
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise TemplateError(
            f"{where}: cannot be loaded: not JSON ({in_own_words(error)}). {remedy(url)}"
        ) from error
    if not isinstance(content, dict):
        raise TemplateError(
            f"{where}: cannot be loaded: a JSON object was expected, not "
            f"{type(content).__name__}. {remedy(url)}"
        )
    return content


def not_loaded(folder: str, url: str, error: BaseException) -> TemplateError:
    """Return the error for a folder that transformers could not load; it names the broken file.

    Args:
        folder: where the files lie.
        url: names the folder in the error.
        error: what transformers raised.
    """
    where = url
    for name in ("tokenizer.json", "config.json"):
        path = Path(folder, name)
        try:
            if path.is_file():
                _load_alone(path, storage.join(url, name), url)
        except TemplateError as broken:
            return broken
        except Exception as own:  # the library's, from the one file
            where, error = storage.join(url, name), own
            break
    said = in_own_words(error)[:_NUM_CHARACTERS]
    what = "cannot be loaded" if where != url else "the tokenizer in this folder cannot be loaded"
    return TemplateError(f"{where}: {what}: its library could not take it ({said}). {remedy(url)}")


def _load_alone(path: Path, where: str, url: str) -> None:
    """Load one file of a tokenizer's folder, for the error that it raises."""
    content = _json_object(path, where, url)
    if path.name == "tokenizer.json":
        for part in ("model", "added_tokens"):
            if part not in content:
                raise TemplateError(
                    f"{where}: cannot be loaded: no {part!r} in it, so it is no tokenizer. "
                    f"{remedy(url)}"
                )
        from tokenizers import Tokenizer

        Tokenizer.from_file(str(path))
    elif "auto_map" not in content:  # code of its own is not run for an error
        from transformers import AutoConfig

        AutoConfig.from_pretrained(str(path.parent), local_files_only=True)


@contextlib.contextmanager
def calling(where: str) -> Iterator[None]:
    """Turn any error of a tokenizer that is called into a TemplateError.

    Only the call stands within it: an error of our own code is no mistake of the tokenizer.

    Args:
        where: the tokenizer's folder or name.
    """
    try:
        yield
    except MilesError:
        raise
    except Exception as error:
        said = in_own_words(error)[:_NUM_CHARACTERS]
        raise TemplateError(
            f"{where}: the tokenizer loads, but its library fails when it is used ({said}). "
            f"{remedy(where)}"
        ) from error
