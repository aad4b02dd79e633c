"""Join or start a Ray as a command does, and end: `python -m tests.support.join_ray [ADDRESS]`."""

from __future__ import annotations

import sys

import ray

from miles.cli.outcome import exit_status_of
from miles.common import local_ray


def join() -> None:
    local_ray.connect(1, 80 << 20, sys.argv[1] if len(sys.argv) > 1 else None)
    print("joined")
    ray.shutdown()


if __name__ == "__main__":
    sys.exit(exit_status_of(join))
