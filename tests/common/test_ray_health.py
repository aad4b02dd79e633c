"""A Ray that this process has started, and that has lost a server, is known at once."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.support.fault_table import SINCE, observed
from tests.support.processes import environment

pytestmark = pytest.mark.heavy

KILL_SERVERS = """
import psutil
from miles.common import local_ray, ray_health
from miles.errors import NoRoomError

def kill(name):
    for process in psutil.Process().children():
        if name in process.cmdline()[0]:
            process.kill()
            process.wait()

assert ray_health.dead_servers() == []
with local_ray.running(1, 100 << 20):
    ray_health.require_node()
    kill("gcs_server")
    try:
        ray_health.require_whole()
    except NoRoomError as error:
        print(error)
    kill("/raylet")
    assert ray_health.dead_servers() == ["its raylet", "its GCS server"]
"""


def test_dead_servers_are_named() -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILL_SERVERS],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment(),
    )
    assert "Ray itself has died (its GCS server)" in done.stdout, done.stdout + done.stderr
    assert "AssertionError" not in done.stderr
    fault = "Ray's GCS server killed, a Ray of the run's own"
    observed(fault, done.stdout, "Ray itself has died", SINCE)
