"""The key, server, team, folder and id of Weights & Biases, from a launch line to a server."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from miles.common import run_folder
from tests.support.launch import write_model
from tests.support.wandb_server import WandbServer, wandb_server

KEY = "0123456789abcdef" * 3

RUN = """
import dataclasses, os, sys
from pathlib import Path
from miles.common import run_folder
from miles.train.driver.resolved_settings import describe
from miles.train.driver.metrics_log import MetricsLog
from miles.train.driver.sinks import open_sinks
from miles.train.launch.arguments import parse

config = parse([*sys.argv[1:], "--use-wandb", "--wandb-key", sys.stdin.read()])
folder = config.run_dir
Path(folder, run_folder.CONFIG).write_text(describe(config))
print(config)
sinks = open_sinks(config.logging, folder, 0, dataclasses.asdict(config))
with MetricsLog(folder, 0, sinks) as log:
    log.write({"step": 0, "sft/loss": 2.0})
print(os.environ)
"""


def run(folder: Path, key: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Log one step of a launch line in a process of its own, which has no other login."""
    write_model(folder)
    (folder / "home").mkdir()
    (folder / "run").mkdir()
    line = ["--hf-checkpoint", str(folder), "--prompt-data", "rows.parquet"]
    inherited = {name: text for name, text in os.environ.items() if not name.startswith("WANDB")}
    return subprocess.run(
        [sys.executable, "-c", RUN, *line, "--save", str(folder / "run"), *words],
        cwd=Path(__file__).parents[3],
        env={**inherited, "HOME": str(folder / "home"), "WANDB_HTTP_TIMEOUT": "5"},
        input=key,
        capture_output=True,
        text=True,
        timeout=120,
    )


def files_with(folder: Path, text: str) -> list[Path]:
    """Return the files below a folder that hold a text."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return [path for path in files if text.encode() in path.read_bytes()]


def test_a_key_reaches_the_server_and_nothing_else(tmp_path: Path) -> None:
    with wandb_server() as server:
        words = ["--wandb-host", server.url, "--wandb-team", "team", "--wandb-run-id", "run7"]
        done = run(tmp_path, KEY, *words, "--wandb-dir", str(tmp_path / "sent"))
    assert (done.returncode, done.stderr) == (0, "")

    assert server.keys == {KEY}
    created = server.runs[0]
    assert (created["entity"], created["project"], created["name"]) == ("team", "miles", "run7")
    assert b"sft/loss" in b"".join(server.bodies)

    assert KEY not in done.stdout
    assert "wandb_key=(hidden)" in done.stdout
    assert not any(KEY.encode() in body for body in server.bodies)
    assert files_with(tmp_path, KEY) == []
    assert '"wandb_key": "(hidden)"' in (tmp_path / "run" / run_folder.CONFIG).read_text()

    assert list((tmp_path / "sent").rglob("*run7.wandb"))
    assert not (tmp_path / "run/wandb").exists()
    assert (tmp_path / "run" / run_folder.WANDB_ID).read_text() == "run7"


def refused(folder: Path, key: str, server: WandbServer) -> str:
    server.accepts = False
    done = run(folder, key, "--wandb-host", server.url)
    assert done.returncode == 1
    assert key not in done.stderr + done.stdout
    assert files_with(folder, key) == []
    return done.stderr.splitlines()[-1]


def test_a_refused_key_is_not_quoted(tmp_path: Path) -> None:
    folders = [tmp_path / "unknown", tmp_path / "short"]
    for folder in folders:
        folder.mkdir()
    with wandb_server() as server:
        assert "--use-wandb: " in refused(folders[0], KEY, server)
        assert "--use-wandb: --wandb-key invalid" in refused(folders[1], "hunter2", server)
