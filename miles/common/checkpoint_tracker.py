"""The tracker: the file that names the newest checkpoint of a folder, as Megatron-LM writes it.

FOLDER/latest_checkpointed_iteration.txt   "500"      ->  FOLDER/iter_0000500/
                                           "release"  ->  FOLDER/release/, converted weights
"""

from __future__ import annotations

from miles.common import storage
from miles.errors import CheckpointError

TRACKER = "latest_checkpointed_iteration.txt"
RELEASE = "release"


def folder_name(iteration: int) -> str:
    """Return the name of the folder of a checkpoint, in the folder of its run."""
    return f"iter_{iteration:07d}"


def tracked(url: str) -> tuple[str, int] | None:
    """Return the name of the newest checkpoint's folder, and its iteration; 0 for `release`.

    Args:
        url: the folder with the tracker (fsspec URL); None is returned where there is no tracker.

    Raises:
        CheckpointError: the tracker holds something else.
    """
    tracker = storage.join(url, TRACKER)
    if not storage.exists(tracker):
        return None
    word = storage.read_text(tracker).strip()
    if word != RELEASE and not (word.isascii() and word.isdigit()):
        found = f"found {word[:40]!r}" if word else "it is empty"
        raise CheckpointError(f"{tracker}: expected an iteration or 'release', {found}")
    return (RELEASE, 0) if word == RELEASE else (folder_name(int(word)), int(word))


def write_tracker(url: str, newest: int | str) -> None:
    """Name the newest checkpoint of a folder. All of its files must be there.

    Args:
        url: the folder (fsspec URL).
        newest: the iteration, or `RELEASE`.
    """
    storage.write_text(storage.join(url, TRACKER), str(newest))
