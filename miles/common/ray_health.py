"""The health of the Ray that this process has started: is it still whole?

Such a Ray is a GCS server and a raylet, children of this process, with agents whose death ends the
raylet. Where one of the two has died, nothing can be started on that Ray any more: it says that it
has no CPUs, or answers after minutes. A cluster that was joined looks after its own servers.
"""

from __future__ import annotations

import ray
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
        raise _died(" and ".join(dead))


def require_node() -> None:
    """Refuse to start on a Ray without a node. It asks the GCS server, which must be there.

    A raylet that ends with one of its agents leaves the cluster some seconds before its process
    ends. Until then, Ray only says that it has no CPUs.

    Raises:
        NoRoomError: no node is alive.
    """
    require_whole()
    if not any(node["Alive"] for node in ray.nodes()):
        raise _died("no node of it is alive")


def _died(how: str) -> NoRoomError:
    is_own = bool(worker._global_node and worker._global_node.all_processes)
    if not is_own:
        return NoRoomError(f"Ray has died ({how}): start the cluster, then give the same command")
    return NoRoomError(
        f"Ray itself has died ({how}), which this command had started for itself. The same command "
        "starts another one, and goes on from the last complete checkpoint"
    )
