"""One conversion at a time into a folder of object storage, and none where a run writes.

On a disk, a conversion locks the hidden folder that it fills (`common.atomic_folders`), and the
folder takes its place at once. A store has neither: the files arrive one by one, so the folder is held
by a lease, as that of a run is.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

from miles.common import lease


@contextlib.contextmanager
def hold_remote(save: str) -> Iterator[None]:
    """Hold a folder of object storage while its files are replaced.

    Raises:
        LeaseError: a run, or another conversion, writes there.
    """
    with lease.hold(save, "--save", "miles convert", _notify):
        yield


def _notify(text: str) -> None:
    print(f"miles: {text}", file=sys.stderr, flush=True)
