"""Paths as they are typed -> paths that mean the same in every process and every folder.

    rows.jsonl, ./rows.jsonl        /home/me/rows.jsonl     typed in /home/me
    ~/rows.jsonl                    /home/me/rows.jsonl     a shell leaves the ~ of `--save=~/run`
    file:///data/rows.jsonl         /data/rows.jsonl
    s3://bucket/rows.jsonl          as it is
    Qwen/Qwen3-4B                   as it is, for a tokenizer, where no folder has that name

Loaders, the feed and the ranks run in working directories of their own, so a path is made absolute
once, where it enters: by the records of settings (`flags.check_settings`) and by the commands. No
library is loaded, and the disk is asked only about names that may mean something else.
"""

from __future__ import annotations

import os
import re

from miles.errors import ConfigError

_LOCAL_URL = re.compile(r"(?:file|local)://")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_ONE_SLASH = re.compile(
    r"(?P<protocol>s3a?|gs|gcs|hf|https?|file|abfss?|az|memory):/(?!/)(?P<rest>.*)"
)
"""A URL that lacks a slash. As a path, it would be a folder `s3:` in the working directory."""
_VARIABLE = re.compile(r"\$\{\w+\}|^\$[A-Za-z_]\w*(?=/|$)", re.ASCII)
"""`${RUNS}/a`, `$HOME/a`: a shell would have put a value there; in YAML and notebooks nothing does."""
_CHAINED = re.compile(r"[A-Za-z0-9+.-]+::")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def absolute(path: str) -> str:
    """Return a URL as it is, and a local path as an absolute one; a pattern stays a pattern.

    Links are not followed, and `..` stays: it is the path that the user knows. "" stays "".

    Raises:
        ConfigError: control characters, bytes that are not UTF-8, a URL with one slash, or the name
            of a variable.
    """
    _require_printable(path)
    _require_no_variable(path)
    is_local_url = bool(_LOCAL_URL.match(path))
    if path and not is_local_url and (match := _ONE_SLASH.match(path)) and not os.path.exists(path):
        url = f"{match['protocol']}://{match['rest']}"
        raise ConfigError(f"{path}: a URL has two slashes behind the colon: {url}")
    is_url = bool(_URL.match(path)) and not is_local_url
    if not path or is_url or _is_chained_url(path):
        return path

    local = _LOCAL_URL.sub("", path, count=1)
    if local.startswith("~"):
        local = os.path.expanduser(local)
    while local.startswith("./"):
        local = local[2:].lstrip("/")
    if local in ("", "."):
        local = os.getcwd()
    if not local.startswith("/"):
        local = f"{os.getcwd().rstrip('/')}/{local}"
    return local.rstrip("/") or "/"


def absolute_or_hub_name(name: str) -> str:
    """Return the same, for what may be a name of the Hugging Face hub: a folder goes before it."""
    return name if is_hub_name(name) else absolute(name)


def is_hub_name(name: str) -> bool:
    """Return whether a word can be a name of the Hugging Face hub, and is no path of this machine."""
    return bool(_HUB_NAME.fullmatch(name)) and not os.path.exists(name)


def is_utf8(path: str) -> bool:
    """Return whether the bytes of a path are UTF-8. Others cannot be printed, or kept in a file."""
    try:
        path.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _require_printable(path: str) -> None:
    if not is_utf8(path):
        raise ConfigError(f"{path!a}: the name is not UTF-8; rename the file or the folder")
    if any(ord(character) < 32 or ord(character) == 127 for character in path):
        raise ConfigError(
            f"{path!a}: a path with a line break or another control character; rename it, or "
            "take the character out"
        )


def _require_no_variable(path: str) -> None:
    """Refuse a variable that nothing has replaced, unless a file or folder has that very name."""
    if (match := _VARIABLE.search(path)) and not os.path.exists(path):
        raise ConfigError(
            f"{path}: {match[0]} would be the name of a folder, for only a shell replaces "
            "variables; write its value"
        )


def _is_chained_url(path: str) -> bool:
    """Return whether it is fsspec's `zip://a::s3://b`, or `simplecache::s3://b`."""
    return bool(_CHAINED.match(path)) and "://" in path
