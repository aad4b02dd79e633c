"""The address of a Ray cluster as it is typed: what it says, without Ray, and without asking anyone.

    "10.0.0.7:6379", "[::1]:6379", "ray://head:10001"   host and port
    "auto"                                              the Ray of this machine
    "local", ""                                         none: a run starts its own
    "head", "http://head:8265", "head:many"             no address

Whether a Ray answers there is asked when one is joined (`ray_address`).
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from miles.errors import ConfigError

AUTO = "auto"
LOCAL = "local"
VARIABLE = "RAY_ADDRESS"
FLAG = "--ray-address"
CLIENT_SCHEME = "ray://"

_HOST_AND_PORT = re.compile(r"(?P<host>\[[\w:.%]+\]|[\w:.%-]+):(?P<port>\d{1,5})")


@dataclass(frozen=True)
class RayAddress:
    """An address to join, and where the user gave it."""

    text: str
    origin: str
    """`FLAG` or `VARIABLE`"""

    def __str__(self) -> str:
        return f"{self.origin} {self.text}"

    def host_and_port(self, text: str | None = None) -> tuple[str, int]:
        """Return where the cluster listens.

        Args:
            text: what "auto" stands for here; None: the address itself.

        Raises:
            ConfigError: it is no address.
        """
        text = self.text if text is None else text
        match = _HOST_AND_PORT.fullmatch(text.removeprefix(CLIENT_SCHEME).rstrip("/"))
        port = int(match["port"]) if match else 0
        if match is None or not 0 < port < 65536:
            raise ConfigError(
                f"{self}: expected HOST:PORT of the head node (`ray start --head` prints it; its "
                "port is 6379 by default), auto for the Ray of this machine, or local for a Ray of "
                "the run's own"
            )
        return match["host"].strip("[]"), port


def find_address(given: str | None) -> RayAddress | None:
    """Return the address to join; None: a Ray of this process's own is to be started.

    Args:
        given: of the flag; None: that in RAY_ADDRESS, where a submitted job finds its cluster.
    """
    address = RayAddress(given, FLAG) if given else None
    if address is None and os.environ.get(VARIABLE):
        address = RayAddress(os.environ[VARIABLE], VARIABLE)
    if address is None or address.text == LOCAL:
        return None
    return address


def require_address(given: str | None) -> None:
    """Refuse what is no address of a cluster. Nobody is asked: a dry run needs no Ray.

    Args:
        given: as of `find_address`.

    Raises:
        ConfigError: says what was expected.
    """
    if given is not None and not given.strip():
        raise ConfigError(
            f"{FLAG} is empty, such as a variable that is not set; give an address, or leave the "
            "flag out: the run starts its own Ray"
        )
    address = find_address(given)
    if address is not None and address.text != AUTO:
        address.host_and_port()
