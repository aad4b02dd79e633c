"""The files beside the weights of a Hugging Face checkpoint: configuration, tokenizer, template.

    DIR/config.json, tokenizer.json, …             ->   SAVE/config.json, tokenizer.json, …
    the chat template that a run trained with      ->   SAVE/chat_template.jinja

They are copied byte by byte. Only another chat template changes them: it takes the place of every
template in DIR, wherever transformers would look for one.
"""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from miles.common import storage
from miles.common.patterns import expand
from miles.common.untrusted_files import parse_json, require_readable
from miles.convert.path_safety import require_inside
from miles.errors import CheckpointError

TEMPLATE = "chat_template.jinja"
"""Comes before every other place of a template in transformers (5.23)."""
_TOKENIZER_CONFIG = "tokenizer_config.json"
_OTHER_TEMPLATES = re.compile(r"chat_template\.json|additional_chat_templates/.*\.jinja")
"""A processor's template, and the named ones that would stand beside the default."""
_TOKENIZER = re.compile(
    r"tokenizer.*|added_tokens\.json|special_tokens_map\.json|vocab\.\w+|merges\.txt|spiece\.model|"
    + _OTHER_TEMPLATES.pattern
)
_WEIGHTS = re.compile(
    r".*\.(safetensors|bin|pt|pth|gguf|h5|msgpack|onnx|distcp)(\.index\.json)?"  # and their indices
)


def companions(hf_checkpoint: str) -> list[str]:
    """Return the files beside the weights, as paths in the folder.

    Raises:
        CheckpointError: a link that leads out of it.
    """
    root = storage.filesystem(hf_checkpoint)[1].rstrip("/")
    names = []
    for url in expand(hf_checkpoint, ("",)):
        name = posixpath.relpath(storage.filesystem(url)[1], root)
        folder, base = posixpath.split(name)
        if not _WEIGHTS.fullmatch(base):
            folder_url = storage.join(hf_checkpoint, folder)
            require_inside(folder_url, base, folder_url)
            require_readable(url, CheckpointError)
            names.append(name)
    return names


def write_companions(hf_checkpoint: str, folder: Path, chat_template: str | None = None) -> None:
    """Write the files beside the weights into a local folder.

    Args:
        hf_checkpoint: folder (fsspec URL) that they are copied from.
        chat_template: takes the place of the templates in them; None: they stay as they are.

    Raises:
        CheckpointError: a link that leads out of `hf_checkpoint`; a file that is not JSON.
    """
    _write(companions(hf_checkpoint), hf_checkpoint, folder, chat_template)


def _write(
    names: Sequence[str], hf_checkpoint: str, folder: Path, chat_template: str | None
) -> None:
    """Write some of the files beside the weights."""
    for name in names:
        url = storage.join(hf_checkpoint, name)
        if chat_template is not None and name == _TOKENIZER_CONFIG:
            (folder / name).write_text(_without_template(url), encoding="utf-8")
        elif chat_template is None or not _OTHER_TEMPLATES.fullmatch(name):
            storage.copy_file(url, folder / name)

    if chat_template is not None:
        (folder / TEMPLATE).write_bytes(chat_template.encode())


def write_tokenizer(hf_checkpoint: str, folder: Path, chat_template: str | None = None) -> None:
    """Write the files of the tokenizer into a local folder, as `write_companions` does.

    Raises:
        CheckpointError: as there.
    """
    _write(
        [name for name in companions(hf_checkpoint) if is_tokenizer(name)],
        hf_checkpoint,
        folder,
        chat_template,
    )


def is_tokenizer(name: str) -> bool:
    """Return whether a file beside the weights is one of the tokenizer, or a template."""
    return name == TEMPLATE or _TOKENIZER.fullmatch(name) is not None


def _without_template(url: str) -> str:
    """Return the text of a tokenizer_config.json without its template or templates.

    Raises:
        CheckpointError: it is not JSON.
    """
    text = storage.read_text(url)
    config: dict[str, Any] = parse_json(text, url, CheckpointError)
    if "chat_template" not in config:
        return text
    del config["chat_template"]
    return json.dumps(config, indent=2, ensure_ascii=False) + "\n"
