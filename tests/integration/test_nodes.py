"""A Ray cluster of several nodes on this machine that loses one, and a job that Ray stops."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest

from tests.support.commands import Workspace
from tests.support.fault_table import NOTHING, SINCE, observed
from tests.support.processes import (
    LIMIT_SECONDS,
    PROJECT,
    environment,
    free_port,
    processes,
    wait_until,
)
from tests.support.runs import NUM_STEPS, lines, require_same, tracked

pytestmark = pytest.mark.slow

RAY = str(Path(sys.executable).with_name("ray"))


class Node:
    """A node of a Ray cluster, as `ray start` makes one: it is lost with all its processes.

    Args:
        gpus: Ray believes in those that it is told of; the trainers find none and use the CPU.
    """

    def __init__(self, *words: str, cpus: int, gpus: int) -> None:
        sizes = (
            "--num-cpus",
            str(cpus),
            "--num-gpus",
            str(gpus),
            "--object-store-memory",
            str(150 << 20),
        )
        self._process = subprocess.Popen(
            [
                *(
                    RAY,
                    "start",
                    "--block",
                    *words,
                    *sizes,
                    "--min-worker-port",
                    "0",
                    "--max-worker-port",
                    "0",
                ),
                *(
                    "--dashboard-agent-listen-port",
                    str(free_port()),
                ),  # the default one may be another Ray's
            ],
            env=environment(),
            cwd=PROJECT,  # in which Ray starts its jobs
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

    def __init__(self, *words: str) -> None:
        self._folder = tempfile.mkdtemp(
            prefix="ray-", dir="/tmp"
        )  # a path of sockets has few characters to spend
        port = free_port()
        self.address = f"127.0.0.1:{port}"
        head = (
            "--head",
            "--node-ip-address",
            "127.0.0.1",
            "--port",
            str(port),
            "--temp-dir",
            self._folder,
        )
        self._head = Node(*head, *words, cpus=2, gpus=0)
        self.others: list[Node] = []

    def add(self) -> None:
        """Add a node and wait until the cluster has it. Of nodes that start at once, one may miss
        its ports.
        """
        wanted = f"/{len(self.others) + 1}.0 GPU"
        wait_until(lambda: listens(self.address), lambda: "the head does not start")
        for _ in range(3):
            node = Node("--address", self.address, "--node-ip-address", "127.0.0.1", cpus=1, gpus=1)
            deadline = time.monotonic() + LIMIT_SECONDS / 4
            while time.monotonic() < deadline:
                if wanted in self.status():
                    self.others.append(node)
                    return
            node.lose()
        raise AssertionError(self.status())

    def status(self) -> str:
        words = [RAY, "status", "--address", self.address]
        return subprocess.run(words, capture_output=True, text=True, env=environment()).stdout

    def with_trainers(self) -> list[Node]:
        return [node for node in self.others if node.processes("ray::TrainerActor")]

    def lose(self, node: Node) -> None:
        self.others.remove(node)
        node.lose()

    def end(self) -> None:
        for node in [*self.others, self._head]:
            node.lose()
        shutil.rmtree(self._folder, ignore_errors=True)


def listens(address: str) -> bool:
    host, port = address.split(":")
    with contextlib.suppress(OSError), socket.create_connection((host, int(port)), timeout=1):
        return True
    return False


def test_lost_node_is_replaced_or_named(
    workspace: Workspace, unbroken: Path, tmp_path: Path
) -> None:
    save, nodes = tmp_path / "run", Nodes()
    flags = {
        "ray_address": nodes.address,
        "actor_num_nodes": 2,
        "actor_num_gpus_per_node": 1,
        "distributed_timeout_minutes": 0.75,
        "save_hf": save / "export",
    }

    def starts() -> int:
        return len([entry for entry in lines(save, "starts.jsonl") if "start" in entry])

    try:
        for _ in range(3):
            nodes.add()
        with workspace.command(save, **flags) as command:
            command.until(lambda: tracked(save) >= 4)
            assert len(nodes.with_trainers()) == 2, "a rank a node"
            nodes.lose(nodes.with_trainers()[-1])
            command.until(lambda: starts() == 2)
            observed("node lost, another is free", command.printed, "starting again from", SINCE)
            nodes.lose(nodes.with_trainers()[-1])
            printed = command.wait(1)
        assert (
            "waited 0.75 minutes (--distributed-timeout-minutes) "
            "for 2 node(s) with 1 free GPUs and CPUs" in printed
        )
        assert "Ray has 2 node(s): " in printed
        observed("node lost, none is free", printed, "miles: error: waited", SINCE)
        nodes.add()
        with workspace.command(save, **flags) as command:
            command.wait(0)
        require_same(save, unbroken)
    finally:
        nodes.end()


def test_a_submitted_job_joins_its_cluster_and_saves_when_stopped(
    workspace: Workspace, tmp_path: Path
) -> None:
    """The job is Miles's: `ray job submit … -- python3 train_async.py …`."""
    from ray.job_submission import JobSubmissionClient

    save, port, job = tmp_path / "run", free_port(), "sft"
    nodes = Nodes("--dashboard-host", "127.0.0.1", "--dashboard-port", str(port))
    server = f"http://127.0.0.1:{port}"
    env = {
        "RAY_JOB_STOP_WAIT_TIME_S": "120",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(PROJECT),
    }
    runtime_env = json.dumps({"env_vars": env})
    submit = [RAY, "job", "submit", "--no-wait", "--address", server, "--submission-id", job]
    flags = workspace.words(save)[4:]
    words = [*submit, "--runtime-env-json", runtime_env, "--", "python3", "train_async.py", *flags]

    def submitted() -> bool:  # the dashboard and its agent come up after the head
        return subprocess.run(words, env=environment(), capture_output=True).returncode == 0

    try:
        wait_until(submitted, lambda: "no dashboard")
        client = JobSubmissionClient(server)
        wait_until(lambda: len(lines(save)) >= 6, lambda: client.get_job_logs(job))
        assert client.get_job_info(job).driver_info, "it is a driver of the job's cluster"
        client.stop_job(job)
        wait_until(
            lambda: client.get_job_status(job).is_terminal(), lambda: client.get_job_logs(job)
        )
        logs = client.get_job_logs(job)
        kept = tracked(save)
        assert 6 <= kept == len(lines(save)) < NUM_STEPS, logs
        assert f"stopped by SIGTERM; the same command goes on at step {kept}" in logs
        observed("`ray job stop`", logs, "the same command goes on at step", NOTHING)
    finally:
        nodes.end()
