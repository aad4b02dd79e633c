"""Ray clusters of several nodes on this machine, and one that takes jobs."""

from __future__ import annotations

import contextlib
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from tests.support.processes import (
    LIMIT_SECONDS,
    PROJECT,
    environment,
    free_port,
    processes,
    wait_until,
)

RAY = str(Path(sys.executable).with_name("ray"))


def environment_of_ray() -> dict[str, str]:
    """Return the environment for Ray's own commands: unlike ours, they do not look for a token."""
    return {**environment(), "RAY_AUTH_MODE": "token"}


class Node:
    """A node of a Ray cluster, as `ray start` makes one: it is lost with all its processes.

    Args:
        cwd: where its workers run, which is another folder than that of a driver.
        gpus: Ray believes in those that it is told of; the trainers find none and use the CPU.
    """

    def __init__(self, *words: str, cpus: int, gpus: int, cwd: str | Path = PROJECT) -> None:
        sizes = f"--num-cpus {cpus} --num-gpus {gpus} --object-store-memory {150 << 20}"
        # The default port of the agent may be another Ray's.
        ports = (
            f"--min-worker-port 0 --max-worker-port 0 --dashboard-agent-listen-port {free_port()}"
        )
        self._process = subprocess.Popen(
            [RAY, "start", "--block", *words, *sizes.split(), *ports.split()],
            env=environment_of_ray(),
            cwd=cwd,  # in which Ray starts its jobs
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def processes(self, name: str = "") -> list[psutil.Process]:
        return processes(name, self._process.pid)

    def lose(self) -> None:
        with contextlib.suppress(psutil.Error):
            for process in [psutil.Process(self._process.pid), *self.processes()]:
                with contextlib.suppress(psutil.Error):
                    process.kill()
        self._process.wait()


class Nodes:
    """A cluster on localhost: a head without GPUs, and further nodes of one GPU each."""

    def __init__(self, *words: str, cwd: str | Path = PROJECT) -> None:
        self._cwd = cwd
        # A path of sockets has few characters to spend.
        self._folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
        port = free_port()
        self.address = f"127.0.0.1:{port}"
        head = f"--head --node-ip-address 127.0.0.1 --port {port} --temp-dir {self._folder}".split()
        self._head = Node(*head, *words, cpus=2, gpus=0, cwd=cwd)
        self.others: list[Node] = []

    def add(self) -> None:
        """Add a node and wait until the cluster has it. Of nodes that start at once, one may miss
        its ports.
        """
        wanted = f"/{len(self.others) + 1}.0 GPU"
        wait_until(lambda: listens(self.address), lambda: "the head does not start")
        for _ in range(3):
            words = ("--address", self.address, "--node-ip-address", "127.0.0.1")
            node = Node(*words, cpus=1, gpus=1, cwd=self._cwd)
            deadline = time.monotonic() + LIMIT_SECONDS / 4
            while time.monotonic() < deadline:
                if wanted in self.status():
                    self.others.append(node)
                    return
            node.lose()
        raise AssertionError(self.status())

    def status(self) -> str:
        words = [RAY, "status", "--address", self.address]
        return subprocess.run(
            words, capture_output=True, text=True, env=environment_of_ray()
        ).stdout

    def with_trainers(self) -> list[Node]:
        return [node for node in self.others if node.processes("ray::TrainerActor")]

    def lose(self, node: Node) -> None:
        self.others.remove(node)
        node.lose()

    def end(self) -> None:
        for node in [*self.others, self._head]:
            node.lose()
        shutil.rmtree(self._folder, ignore_errors=True)


class JobServer:
    """A cluster of one node that takes jobs."""

    def __init__(self) -> None:
        port = free_port()
        self._nodes = Nodes("--dashboard-host", "127.0.0.1", "--dashboard-port", str(port))
        self.url = f"http://127.0.0.1:{port}"
        """what `ray job submit --address` takes"""

    def submit(self, words: Sequence[str], runtime_env: Mapping[str, Any]) -> Job:
        """Send a job, as soon as the dashboard and its agent, which come up last, take one."""
        from ray.job_submission import JobSubmissionClient

        names: list[str] = []

        def is_submitted() -> bool:
            with contextlib.suppress(Exception):
                client = JobSubmissionClient(self.url)
                name = client.submit_job(
                    entrypoint=shlex.join(words), runtime_env=dict(runtime_env)
                )
                names.append(name)
            return bool(names)

        wait_until(is_submitted, lambda: "no dashboard")
        return self.job(names[0])

    def job(self, name: str) -> Job:
        """Return a job that was sent."""
        from ray.job_submission import JobSubmissionClient

        return Job(JobSubmissionClient(self.url), name)

    def end(self) -> None:
        self._nodes.end()


class Job:
    """A job that was sent to a cluster."""

    def __init__(self, client: Any, name: str) -> None:
        self._client = client
        self._name = name

    @property
    def logs(self) -> str:
        return str(self._client.get_job_logs(self._name))

    @property
    def has_driver(self) -> bool:
        """Return whether a process of the job has joined its cluster."""
        return self._client.get_job_info(self._name).driver_info is not None

    def stop(self) -> None:
        self._client.stop_job(self._name)

    def wait(self) -> str:
        """Wait for the end of the job; return its logs."""
        wait_until(self._has_ended, lambda: self.logs)
        return self.logs

    def _has_ended(self) -> bool:
        return bool(self._client.get_job_status(self._name).is_terminal())


def listens(address: str) -> bool:
    host, port = address.split(":")
    with contextlib.suppress(OSError), socket.create_connection((host, int(port)), timeout=1):
        return True
    return False
