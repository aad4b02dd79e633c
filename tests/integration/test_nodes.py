"""A Ray cluster of several nodes on this machine that loses one, and a job that Ray stops."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.commands import Workspace
from tests.support.fault_table import NOTHING, SINCE, observed
from tests.support.nodes import RAY, JobServer, Nodes, environment_of_ray
from tests.support.processes import PROJECT, environment, wait_until
from tests.support.runs import NUM_STEPS, lines, require_same, tracked

pytestmark = pytest.mark.slow


def relative(path: str | Path) -> str:
    """Return a path as it is typed in the folder of the driver, which is not that of the nodes."""
    return os.path.relpath(path, PROJECT)


def relative_inputs(workspace: Workspace) -> dict[str, Any]:
    """Return the flags of what a run reads, with relative paths."""
    words = []
    for name, path in workspace.sources.items():
        words += [name, relative(path)]
    folders = {"hf_checkpoint": workspace.folder / "hf", "ref_load": workspace.folder / "megatron"}
    return {"prompt_data": words, **{flag: relative(path) for flag, path in folders.items()}}


def test_lost_node_is_replaced_or_named(
    workspace: Workspace, unbroken: Path, tmp_path: Path
) -> None:
    save, nodes = tmp_path / "run", Nodes(cwd="/tmp")
    flags = {
        "ray_address": nodes.address,
        "actor_num_nodes": 2,
        "actor_num_gpus_per_node": 1,
        "distributed_timeout_minutes": 1.25,
        "no_bf16": True,  # the nodes call processors GPUs, on which bfloat16 would be the default
        "save_hf": save / "export",
    }

    def starts() -> int:
        return len([entry for entry in lines(save, "starts.jsonl") if "start" in entry])

    try:
        for _ in range(3):
            nodes.add()
        refuses_a_wrong_token(nodes.address)
        with workspace.command(save, **flags) as command:
            command.until(lambda: tracked(save) >= 4)
            assert len(nodes.with_trainers()) == 2, "a rank a node"
            nodes.lose(nodes.with_trainers()[-1])
            command.until(lambda: starts() == 2)
            observed("node lost, another is free", command.printed, "starting again from", SINCE)
            nodes.lose(nodes.with_trainers()[-1])
            printed = command.wait(4)
        assert (
            "waited 1.25 minutes (--distributed-timeout-minutes) "
            "for 2 nodes with 1 free GPUs and CPUs" in printed
        )
        assert "Ray has 2 nodes: " in printed
        observed("node lost, none is free", printed, "miles: error: waited", SINCE)
        nodes.add()
        flags |= {"save_hf": relative(save / "export"), "distributed_timeout_minutes": 4}
        with workspace.command(relative(save), **flags, **relative_inputs(workspace)) as command:
            command.wait(0)
        require_same(save, unbroken)
        observed("relative paths, and `--ray-address`", "", "", NOTHING)
    finally:
        nodes.end()


def refuses_a_wrong_token(address: str) -> None:
    """A plain `ray start` asks for the user's token, which the runs beside this one have."""
    words = [sys.executable, "-m", "tests.support.join_ray", address]
    env = {**environment(), "RAY_AUTH_TOKEN": "wrong"}
    done = subprocess.run(words, env=env, cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 4, done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    fault = "wrong token for a cluster that asks for one"
    observed(fault, done.stderr, "asks for a token", NOTHING)


def test_a_submitted_job_joins_its_cluster_and_saves_when_stopped(
    workspace: Workspace, tmp_path: Path
) -> None:
    """The job is Miles's: `ray job submit … -- python3 train_async.py …`."""
    save, name = tmp_path / "run", "sft"
    server = JobServer()
    env = {
        "RAY_JOB_STOP_WAIT_TIME_S": "120",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(PROJECT),
    }
    runtime_env = json.dumps({"env_vars": env})
    submit = [RAY, "job", "submit", "--no-wait", "--address", server.url, "--submission-id", name]
    flags = workspace.words(save)[4:]
    words = [*submit, "--runtime-env-json", runtime_env, "--", "python3", "train_async.py", *flags]

    def is_submitted() -> bool:  # the dashboard and its agent come up after the head
        done = subprocess.run(words, env=environment_of_ray(), capture_output=True)
        return done.returncode == 0

    try:
        wait_until(is_submitted, lambda: "no dashboard")
        job = server.job(name)
        wait_until(lambda: len(lines(save)) >= 6, lambda: job.logs)
        assert job.has_driver, "it is a driver of the job's cluster"
        job.stop()
        logs = job.wait()
    finally:
        server.end()

    kept = tracked(save)
    assert 6 <= kept == len(lines(save)) < NUM_STEPS, logs
    assert f"stopped by SIGTERM; the same command goes on at step {kept}" in logs
    observed("`ray job stop`", logs, "the same command goes on at step", NOTHING)
