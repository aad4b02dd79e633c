"""The reason why Ray did not start, or could not be joined: one paragraph with what to do.

OSError: [Errno 28] No space left on device: '/tmp/ray/session_…'
->  Ray could not be started: OSError: … No space left …. Make room in the folder of its files …
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from miles.common.debugging import one_paragraph
from miles.errors import ClusterError

_FOLDER = (
    "Ray keeps its files in the folder RAY_TMPDIR (or TMPDIR, or /tmp): name one that can be "
    "written and has room"
)
_LOGS = "the newest session_*/logs of its folder (RAY_TMPDIR, or /tmp/ray)"
_REMEDIES: tuple[tuple[str, str], ...] = (
    (
        r"Version mismatch",
        "The driver needs the cluster's versions of Ray and Python: install the same ones here",
    ),
    (
        r"AuthenticationError",
        "Correct or remove RAY_AUTH_TOKEN_PATH, RAY_AUTH_TOKEN and RAY_AUTH_MODE",
    ),
    (
        r"AF_UNIX path length",
        "The path of Ray's sockets is too long: set RAY_TMPDIR to a short one, such as /tmp",
    ),
    (
        r"No space left|Disk quota|Read-only|Permission denied|No such file|Not a directory",
        _FOLDER,
    ),
    (
        r"object store memory size|amount of memory|minimum allowed|/dev/shm",
        "This machine, or its container, has too little memory free for Ray: end other programs, or "
        "give the container more memory and a larger /dev/shm (docker run --shm-size=2g)",
    ),
    (
        r"can't start new thread|Resource temporarily unavailable|Cannot allocate memory|fork",
        "This user may start too few processes or threads: raise `ulimit -u` and the container's "
        "limit of processes",
    ),
    (
        r"Too many open files",
        "This process may open too few files: raise the limit with `ulimit -n 65536`",
    ),
    (
        r"expects this IP|not found in GCS|raylet .*not",
        "A driver needs a node of the cluster on its own machine: run it on one, or start one here "
        "with `ray start --address HOST:PORT`",
    ),
    (
        r"timed out|Failed to connect|exited|died|terminated|killed|Failed to start",
        f"The machine may be too busy or short of memory: give the same command again when it is "
        f"less busy. Ray's own logs are in {_LOGS}",
    ),
)


def is_slow_start(error: ClusterError) -> bool:
    """Return whether Ray did not come up in the time that it gives itself."""
    return "timed out during startup" in str(error.__cause__)


def explained(error: BaseException, doing: str) -> ClusterError:
    """Return the error of ours for one that Ray raised while it was started or joined.

    Args:
        doing: begins the message: "Ray could not be started".
    """
    chain = list(_chain(error))
    texts = [f"{type(link).__name__}: {one_paragraph(_without_help(link))}" for link in chain]
    for text in reversed(texts):
        for pattern, remedy in _REMEDIES:
            if re.search(pattern, text, re.IGNORECASE):
                return ClusterError(f"{doing}: {text.rstrip('.')}. {remedy}")
    return ClusterError(
        f"{doing}: {texts[-1].rstrip('.')}. MILES_DEBUG=1 shows where; Ray's own logs are in "
        f"{_LOGS}"
    )


def _without_help(error: BaseException) -> str:
    """Return an error's text without what Ray says on tokens, which is longer than the error."""
    return str(error).partition(" Ensure that the token")[0]


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and those that caused it."""
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__
