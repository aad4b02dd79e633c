"""Which checkpoint of a folder is the newest, as Megatron-LM says it.

FOLDER/latest_checkpointed_iteration.txt   "500"      ->  FOLDER/iter_0000500/
                                           "release"  ->  FOLDER/release/, weights that were converted
"""

from __future__ import annotations

from miles.common import storage
from miles.errors import CheckpointError

TRACKER = "latest_checkpointed_iteration.txt"
RELEASE = "release"


def folder_name(iteration: int) -> str:
    return f"iter_{iteration:07d}"


def tracked(url: str) -> tuple[str, int] | None:
    """The folder that the tracker of a folder (fsspec URL) names, and its iteration (0 of `release`); None without one.

    Raises:
        CheckpointError: the tracker holds something else.
    """
    tracker = storage.join(url, TRACKER)
    if not storage.exists(tracker):
        return None
    word = storage.read_text(tracker).strip()
    if word != RELEASE and not word.isdigit():
        raise CheckpointError(f"{tracker}: expected an iteration or 'release', found {word[:40]!r}")
    return (RELEASE, 0) if word == RELEASE else (folder_name(int(word)), int(word))
