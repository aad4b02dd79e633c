"""Whether the Ray that this process has started is still whole.

Such a Ray is a GCS server and a raylet, children of this process, with agents whose death ends the
raylet. Where one of the two has died, nothing can be started on that Ray any more: it says that it
has no CPUs, or answers after minutes. A cluster that was joined looks after its own servers.
"""

from __future__ import annotations

from ray._private import worker

from miles.errors import NoRoomError

_SERVERS = {"raylet": "its raylet", "gcs_server": "its GCS server"}


def dead_servers() -> list[str]:
    """Return which servers have died; none where this process has started no Ray."""
    node = worker._global_node
    if node is None:
        return []
    kinds = {kind for kind, _ in node.dead_processes()}
    return [name for kind, name in _SERVERS.items() if kind in kinds]


def require_whole() -> None:
    """Refuse to go on with a Ray of this process's own that has lost a server. It asks nobody.

    Ray (2.60) ends this process without a word of ours a minute after its GCS server has died.

    Raises:
        NoRoomError: it has.
    """
    dead = dead_servers()
    if dead:
        raise NoRoomError(
            f"Ray itself has died ({' and '.join(dead)}), which this command had started for "
            "itself. The same command starts another one, and goes on from the last complete "
            "checkpoint"
        )
