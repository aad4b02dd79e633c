"""Small files in a folder that a stranger may have made: read only where that ends.

config.json, an ordinary file       its content
config.json, a pipe                 refused: to open it would wait for ever
tokenizer.json -> /dev/zero         refused: it has no end
tokenizer.json of 5 GB              refused: no tokenizer has so much
config.json of 10,000 brackets      refused: nested too deeply
"""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

from miles.common import storage
from miles.errors import MilesError

MAX_FILE_BYTES = 512 << 20
"""The limit of a configuration, an index or a part of a tokenizer. The largest known have 40 MB."""


def require_readable(url: str, error: type[MilesError]) -> None:
    """Refuse a file that is none, or that is too large to be what its name says.

    Args:
        url: of a file or a folder, or of nothing.
        error: to raise.
    """
    if storage.is_local(url):
        path = Path(storage.filesystem(url)[1])
        if not path.exists():
            return
        facts = path.stat()
        if stat.S_ISDIR(facts.st_mode):
            return
        if not stat.S_ISREG(facts.st_mode):
            raise error(f"{url}: a pipe or a device: refused. An ordinary file was expected there")
        num_bytes = facts.st_size
    else:
        try:
            num_bytes = int(storage.info(url).get("size") or 0)
        except FileNotFoundError:
            return

    if num_bytes > MAX_FILE_BYTES:
        raise error(
            f"{url}: {num_bytes:,} bytes: refused. Files of this kind have a few megabytes, at "
            f"most {MAX_FILE_BYTES:,} bytes are read"
        )


def read_json(url: str, error: type[MilesError]) -> Any:
    """Return the content of a JSON file.

    Args:
        error: to raise where the file is not ordinary, too large, or no JSON.

    Raises:
        SourceError: nothing is there, or it is not UTF-8 text.
    """
    require_readable(url, error)
    return parse_json(storage.read_text(url), url, error)


def parse_json(text: str, where: str, error: type[MilesError]) -> Any:
    """Return the value of JSON text.

    Args:
        where: names it in errors.
        error: to raise where it is no JSON.
    """
    try:
        return json.loads(text)
    except ValueError as cause:
        raise error(f"{where}: not JSON ({cause})") from cause
    except RecursionError as cause:
        raise error(f"{where}: not JSON that is read: nested too deeply") from cause
