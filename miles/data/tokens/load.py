"""The name of a Hugging Face tokenizer -> the tokenizer with its template, and its fingerprint.

    "/models/Qwen3-4B", "s3://bucket/Qwen3-4B", "Qwen/Qwen3-4B"  ->  a fast tokenizer

Loading is cached in a process by the files' names, sizes and stamps, never by an object's identity:
a worker that encodes in many small tasks loads once. transformers, which brings torch, is imported
where a tokenizer is loaded: a process that only plans or hands out steps starts without it.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import xxhash

from miles.common import retry, storage
from miles.common.file_errors import in_own_words
from miles.common.first_contact import announced
from miles.common.local_paths import is_hub_name
from miles.common.near_names import meant_path
from miles.common.redact import redact
from miles.common.spared_torch import importing_transformers
from miles.common.untrusted_files import require_readable
from miles.data.config import EncodeConfig
from miles.data.tokens.library import not_loaded, require_well_formed
from miles.errors import MilesError, TemplateError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PINNED_DATE = datetime.date(2025, 1, 1)
"""The date for a template that writes today's, so that the tokens of a row never change."""

_VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")
_TOKENIZER_SUFFIXES = (".json", ".jinja", ".txt", ".model", ".tiktoken")
_TEMPLATES_FOLDER = "additional_chat_templates"
_HUB_TIMEOUT_SECONDS = 5.0
_STRFTIME_NOW = re.compile(r"""strftime_now\(\s*(["'])(?P<format>[^"']*)\1\s*\)""")

_pinned: set[str] = set()
"""templates that `pin_date` changed"""


class _Loaded(NamedTuple):
    """A tokenizer of this process."""

    tokenizer: PreTrainedTokenizerBase
    template: str
    """that it was given"""
    content: str | None
    """`content_hash` of the files that it was made of; None: they changed meanwhile"""


_loaded: dict[tuple[Any, ...], _Loaded] = {}
"""names, sizes and stamps of the files, and what else decides -> the tokenizer"""


_remote_content: dict[tuple[tuple[str, int, str], ...], str] = {}
"""names, sizes and stamps of files in a store -> `content_hash`, so that they are read once"""


def load_tokenizer(config: EncodeConfig) -> PreTrainedTokenizerBase:
    """Return the tokenizer that `config` names, with the chat template that it asks for.

    A date that the template would write (`strftime_now("...")`) is replaced by `PINNED_DATE`.

    Raises:
        TemplateError: there is no such folder or hub name, or no tokenizer in it; or it is not
            "fast" (without character offsets), or has not exactly one chat template.
    """
    return load_with_content(config)[0]


def load_with_content(config: EncodeConfig) -> tuple[PreTrainedTokenizerBase, str | None]:
    """Return what `load_tokenizer` does, and the `content_hash` of the files it was made of.

    None in place of the hash where it is not known, or the files changed while they were read.
    """
    url = config.tokenizer
    files = _tokenizer_files(url)
    key = (url, files, config.chat_template, config.trust_remote_code)
    if key in _loaded:
        tokenizer, template, content = _loaded[key]
        if tokenizer.chat_template == template:  # nobody has changed it in the meantime
            return tokenizer, content

    before = content_hash(config)
    if files is None:
        tokenizer = _from_hub(url, config.trust_remote_code)
    elif storage.is_local(url):
        tokenizer = _from_folder(storage.filesystem(url)[1], url, config.trust_remote_code)
    else:
        tokenizer = _from_store(url, [path for path, *_ in files], config.trust_remote_code)

    if not tokenizer.is_fast:
        raise TemplateError(
            f"{url}: {type(tokenizer).__name__} is not a fast tokenizer; the mask needs the "
            "character offsets that only those give. Save it with a tokenizer.json."
        )

    template = pin_date(_single_template(tokenizer, config))
    tokenizer.chat_template = template
    content = before if content_hash(config) == before else None
    _loaded[key] = _Loaded(tokenizer, template, content)
    return tokenizer, content


def content_hash(config: EncodeConfig) -> str | None:
    """Return the hash of the files that transformers makes a tokenizer of.

    None where there is no tokenizer.json: then other libraries have a say in what is made of the
    files. None as well for a name of the hub that is not in its cache, and where a file cannot be
    read.

    Raises:
        TemplateError: as `load_tokenizer`, where there is no tokenizer or its files are refused.
    """
    url = config.tokenizer
    files = _tokenizer_files(url)
    names = [path.rsplit("/", 1)[-1] for path, *_ in files or ()]
    if files is None:
        url = _hub_snapshot(url)
        names = [name for name in storage.names(url) if url and name.endswith(_TOKENIZER_SUFFIXES)]
    if "tokenizer.json" not in names:
        return None
    if files in _remote_content:
        return _remote_content[files]

    digest = hashlib.sha256()
    try:
        folder = storage.join(url, _TEMPLATES_FOLDER)
        names += [f"{_TEMPLATES_FOLDER}/{name}" for name in storage.names(folder)]
        for name in names:
            content = storage.read_bytes(storage.join(url, name))
            digest.update(f"{name}\0{len(content)}\0".encode())
            digest.update(content)
    except (MilesError, OSError):
        return None
    if files is not None and not storage.is_local(url):
        _remote_content[files] = digest.hexdigest()
    return digest.hexdigest()


def _hub_snapshot(name: str) -> str:
    """Return the folder in the hub's cache that its name means; "" if there is none."""
    import huggingface_hub

    try:
        path = huggingface_hub.try_to_load_from_cache(name, "tokenizer.json")
    except (OSError, ValueError):  # not a name of the hub's
        return ""
    return str(Path(path).parent) if isinstance(path, str) else ""


def pin_date(template: str) -> str:
    """Replace each `strftime_now("%d %b %Y")` by a literal with its text for `PINNED_DATE`."""
    pinned, num_dates = _STRFTIME_NOW.subn(
        lambda call: json.dumps(PINNED_DATE.strftime(call["format"]), ensure_ascii=False), template
    )
    if num_dates:
        _pinned.add(pinned)
    return pinned


def note_pinned_date(template: str) -> None:
    """Note that `pin_date` put its date into a template, in another process."""
    _pinned.add(template)


def has_pinned_date(template: str) -> bool:
    """Return whether `pin_date` put its date into a template."""
    return template in _pinned


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the hash of all that decides a tokenizer's ids, as 32 hex digits.

    It covers the vocabulary, the merges, the added tokens and the chat template.
    """
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()  # state of the last call, not of the tokenizer
    backend.no_padding()
    digest = xxhash.xxh3_128()
    for part in (
        backend.to_str(),
        json.dumps(tokenizer.chat_template),
        json.dumps(tokenizer.special_tokens_map, sort_keys=True, default=str),
    ):
        digest.update(part.encode("utf-8", "surrogatepass"))
        digest.update(b"\0")
    return digest.hexdigest()


def encoder_fingerprint(tokenizer: PreTrainedTokenizerBase, config: EncodeConfig) -> str:
    """Return the hash of all that decides the tokens and mask of a conversation, as 32 hex digits.

    Where the tokenizer lies does not count.
    """
    settings = {
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "template_kwargs": dict(config.template_kwargs),
        "turns": config.turns,
        "empty_think": config.empty_think,
        "history": config.history,
        "special_text": config.special_text,
        "too_long": config.too_long,
        "max_sample_tokens": config.max_sample_tokens,
    }
    return xxhash.xxh3_128_hexdigest(json.dumps(settings, sort_keys=True).encode())


def _tokenizer_files(url: str) -> tuple[tuple[str, int, str], ...] | None:
    """Return (path, size, stamp) of the files in a tokenizer's folder; None for a name of the hub.

    Raises:
        TemplateError: it is neither a folder with a tokenizer in it nor a possible hub name.
    """
    try:
        fs, path = storage.filesystem(url)
        is_folder = storage.is_folder(url)
        is_there = is_folder or storage.exists(url)
        if not is_there and is_hub_name(url):
            return None
        entries = retry.call(lambda: fs.ls(path, detail=True), url) if is_folder else []
    except (MilesError, OSError) as error:
        raise TemplateError(
            f"{url}: the tokenizer cannot be read ({redact(str(error))})"
        ) from error

    if not is_folder:
        there = "a file, not a folder" if is_there else "no such folder"
        raise TemplateError(
            f"{url}: {there}; expected the folder of a Hugging Face tokenizer, or its hub name"
            f"{meant_path(url)}"
        )

    names = sorted(entry["name"].rstrip("/").rsplit("/", 1)[-1] for entry in entries)
    if not set(names) & set(_VOCABULARY_FILES):
        raise TemplateError(
            f"{url}: no tokenizer in this folder; expected {' or '.join(_VOCABULARY_FILES)}, "
            f"found {', '.join(names[:8]) or 'nothing'}{', …' if len(names) > 8 else ''}"
        )
    _require_readable(url, names)
    return tuple(
        (entry["name"], int(entry["size"] or 0), storage.stamp_of(entry))
        for entry in sorted(entries, key=lambda entry: str(entry["name"]))
        if entry["type"] == "file" and entry["name"].endswith(_TOKENIZER_SUFFIXES)
    )


def _require_readable(url: str, names: Sequence[str]) -> None:
    """Refuse a folder in which transformers would wait, fill the memory, or read another folder.

    Args:
        names: of what is in it.

    Raises:
        TemplateError: names the first file of the kind.
    """
    if _TEMPLATES_FOLDER in names:
        folder = storage.join(url, _TEMPLATES_FOLDER)
        names = [*names, *(f"{_TEMPLATES_FOLDER}/{name}" for name in storage.names(folder))]
    for name in names:
        if name.endswith(_TOKENIZER_SUFFIXES):
            require_readable(storage.join(url, name), TemplateError)
            _require_own(url, name)


def _require_own(url: str, name: str) -> None:
    """Refuse a link that leads out of the folder: its text could get into rows and exports.

    The hub's cache, whose links lead to `blobs` beside it, is the only exception.
    """
    if not storage.is_local(url):
        return
    folder = Path(storage.filesystem(url)[1]).resolve()
    target = (folder / name).resolve()
    blobs = folder.parent.parent / "blobs"
    if folder not in target.parents and target.parent != blobs:
        raise TemplateError(
            f"{storage.join(url, name)}: leads out of the folder, to {target}: refused. Copy the "
            "file to its place, if it is yours"
        )


def _from_store(url: str, paths: list[str], trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """Load a tokenizer of a remote folder from a copy of its files.

    Args:
        paths: the tokenizer's files. Weights of a checkpoint may lie beside them.
    """
    fs, _ = storage.filesystem(url)
    with storage.temporary_folder("miles-tokenizer-") as staged:
        for path in paths:
            name = path.rsplit("/", 1)[-1]
            storage.copy_file(str(fs.unstrip_protocol(path)), staged / name)
        return _from_folder(str(staged), url, trust_remote_code)


def _from_folder(folder: str, url: str, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    require_well_formed(folder, url)
    with importing_transformers(may_need_torch=trust_remote_code):
        from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # transformers raises whatever its parsers raise
        if "trust_remote_code" in str(error):
            raise TemplateError(
                f"{url}: the tokenizer brings code of its own, which was not run. Read the code, "
                "and give --trust-remote-code if it may run here"
            ) from error
        raise not_loaded(folder, url, error) from error


def _from_hub(name: str, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    import huggingface_hub

    with importing_transformers(may_need_torch=trust_remote_code):
        from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            name, local_files_only=True, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # not in the local cache
        cached_error = error
    try:
        # One request with a time limit: without a network, from_pretrained alone tries for most of
        # a minute.
        with announced("the Hugging Face hub"):
            huggingface_hub.HfApi().model_info(name, timeout=_HUB_TIMEOUT_SECONDS)
        return AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise TemplateError(
            f"{name}: no such folder, and the Hugging Face hub did not give a tokenizer of that "
            f"name ({in_own_words(error)[:200]}). Expected a folder or URL with a "
            "tokenizer.json, or the name of a hub repository that can be reached from here"
            f"{meant_path(name) or '.'}"
        ) from cached_error


def _single_template(tokenizer: PreTrainedTokenizerBase, config: EncodeConfig) -> str:
    if config.chat_template is not None:
        return config.chat_template

    template = tokenizer.chat_template
    if not template:
        raise TemplateError(
            f"{config.tokenizer}: the tokenizer has no chat template; give one with "
            "--chat-template-path"
        )
    if not isinstance(template, str):
        raise TemplateError(
            f"{config.tokenizer}: the tokenizer has several chat templates "
            f"({', '.join(sorted(template))}); choose one with --chat-template-path"
        )
    return template
