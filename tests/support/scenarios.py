"""Scenarios that need a process and a Ray of their own.

    run("stream", {"settings": …, "clusters": …})  ->  a process  ->  `stream(…)`  ->  JSON

A scenario takes and returns plain JSON. Its Ray ends with its process.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import tempfile
import threading
import urllib.request
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import ray
from rich.console import Console

from miles.common import local_ray
from miles.common.secret import Secret
from miles.data.files.manifest import build_manifest
from miles.data.packing.shards import unpack
from miles.data.stream import pipeline
from miles.train.driver.loop import train
from tests.support.processes import PROJECT, environment, free_port, processes, wait_until
from tests.support.stand_ins import SlowPack
from tests.support.streams import Seen, config_of, follow, opened, seen, seen_of

OBJECT_STORE_BYTES = 200 << 20


def stream_over_ray(settings: Mapping[str, Any]) -> list[Seen]:
    """Return what must be the same of every step, streamed over the Ray that is running."""
    config = config_of(settings)
    dataset = pipeline.build(build_manifest(config.sources), config)
    return [seen(step) for block in pipeline.blocks(dataset) for step in unpack(block)]


def stream(settings: dict[str, Any], clusters: Iterable[Any]) -> list[list[Seen]]:
    """Stream over several clusters, one after another.

    Args:
        clusters: pairs of a number of CPUs and the layouts to stream there, each of them settings
            that replace "pack" and "stream".

    Returns:
        The steps of each layout.
    """
    results = []
    for num_cpus, layouts in clusters:
        with local_ray.running(num_cpus, OBJECT_STORE_BYTES):
            results += [stream_over_ray({**settings, **layout}) for layout in layouts]
    return results


class Killer(threading.Thread):
    """Kills loaders at random moments: in turn one in the midst of a step, and any one."""

    def __init__(self, folder: str, num_kills: int, seed: int) -> None:
        super().__init__(daemon=True)
        self.folder = Path(folder)
        self.num_kills = num_kills
        self.random = random.Random(seed)
        self.killed: list[int] = []
        self.has_to_end = threading.Event()

    def run(self) -> None:
        while len(self.killed) < self.num_kills:
            if self.has_to_end.wait(self.random.uniform(0, 0.5)):
                return
            victims = processes("ray::MapBatches")
            if len(self.killed) % 2 == 0:
                busy = self._in_a_step()
                victims = [process for process in victims if process.pid in busy]
            if victims:
                victim = self.random.choice(victims)
                victim.send_signal(signal.SIGKILL)
                self.killed.append(victim.pid)

    def _in_a_step(self) -> set[int]:
        """Return the processes that began a step and have not made it."""
        marks = {file.name for file in self.folder.iterdir()}
        open_steps = [name for name in marks if name.replace("begun", "made") not in marks]
        return {int(name.rpartition("-")[2]) for name in open_steps}


def attacked(settings: Any, run_dir: str, num_kills: int, seed: int) -> dict[str, Any]:
    """Follow a feed to its end while loaders are killed."""
    config = config_of(settings)
    marks = tempfile.mkdtemp(dir=run_dir)
    loader = pipeline.LoaderStages(pack=partial(SlowPack, marks, 0.3))

    with local_ray.running(2, OBJECT_STORE_BYTES), opened(config, run_dir, loader=loader) as feed:
        killer = Killer(marks, num_kills, seed)
        killer.start()
        taken = list(follow(feed, config))
        killer.has_to_end.set()
        feed.finish()

    return {
        "seen": [seen_of(report, digest) for report, digest in taken],
        "rows": [report.rows.num_read for report, _ in taken],
        "rejected": [[reject.row_id for reject in report.rows.rejects] for report, _ in taken],
        "totals": feed.cursor().ledger_totals,
        "killed": killer.killed,
        "begun": [int(file.name.split("-")[1]) for file in Path(marks).glob("begun-*")],
    }


def scraped(settings: Any, run_dir: str) -> dict[str, Any]:
    """Follow a feed slowly; read from the metrics page, after each step, how many steps are ready.

    Returns:
        The queue depth of each step, and each value that the page showed when it was new.
    """
    config, port = config_of(settings), free_port()
    depths: list[float] = []
    shown: list[float] = []

    def page_shows(depth: float) -> bool:
        page = _get(f"http://127.0.0.1:{port}/metrics")
        gauge = "ray_miles_data_prefetch_queue_depth{"
        values = [line.rpartition(" ")[2] for line in page.splitlines() if line.startswith(gauge)]
        return str(depth) in [str(float(value)) for value in values]

    ray.init(
        address="local",
        num_cpus=2,
        object_store_memory=OBJECT_STORE_BYTES,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="error",
        _metrics_export_port=port,
        _system_config={"metrics_report_interval_ms": 300},
    )
    with opened(config, run_dir) as feed:
        for report, _ in follow(feed, config, is_slow=True):
            depth = float(report.timing.queue_depth)
            if not depths or depth != depths[-1]:
                wait_until(partial(page_shows, depth), lambda depth=depth: f"no {depth} is shown")
                shown.append(depth)
            depths.append(depth)
    return {"depths": depths, "shown": shown}


def _get(url: str) -> str:
    """Return a page; nothing while nobody answers."""
    with contextlib.suppress(OSError):
        return str(urllib.request.urlopen(url, timeout=60).read().decode())
    return ""


def watched(config: str, secrets: str) -> dict[str, Any]:
    """Train for a few steps with a Ray of the run's own, TensorBoard and an offline W&B.

    Args:
        config: the path of a pickled `TrainConfig`.
        secrets: the path of a JSON file with the variables of the environment, and those of
            `--train-env-vars`: this process's own command line is looked at, too.

    Returns:
        where the run's processes listened meanwhile, their command lines, what was printed, and the
        number of steps.
    """
    of_environment, given = json.loads(Path(secrets).read_text())
    os.environ.update(of_environment)
    plain = pickle.loads(Path(config).read_bytes())
    hidden = {name: Secret(text) for name, text in given.items()}
    settings = replace(
        plain,
        cluster=replace(plain.cluster, train_env_vars=hidden),
        logging=replace(plain.logging, use_tensorboard=True, use_wandb=True, wandb_mode="offline"),
    )
    addresses: set[tuple[str, int]] = set()
    command_lines: set[str] = set()
    is_over = threading.Event()

    def look() -> None:
        while not is_over.wait(0.2):
            for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
                with contextlib.suppress(psutil.Error):
                    command_lines.add(" ".join(process.cmdline()))
                    connections = process.net_connections("tcp")
                    addresses.update(
                        tuple(connection.laddr)
                        for connection in connections
                        if connection.status == psutil.CONN_LISTEN
                    )

    screen = io.StringIO()
    thread = threading.Thread(target=look)
    thread.start()
    try:
        summary = train(settings, Console(file=screen))
    finally:
        is_over.set()
        thread.join()
    return {
        "addresses": sorted(addresses),
        "command_lines": sorted(command_lines),
        "printed": screen.getvalue(),
        "num_steps": summary.num_steps,
    }


SCENARIOS = {scenario.__name__: scenario for scenario in (stream, attacked, scraped, watched)}


def run(name: str, arguments: Mapping[str, Any], limit: float = 480) -> Any:
    """Run a scenario in a process of its own; return what it returns.

    Args:
        limit: in seconds.
    """
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder, "answer.json")
        # Not `-m`: Ray's workers could not import classes of a module that is called __main__.
        words = [sys.executable, "-c", "from tests.support.scenarios import main; main()"]
        done = subprocess.run(
            [*words, name, json.dumps(arguments), str(answer)],
            capture_output=True,
            text=True,
            timeout=limit,
            cwd=PROJECT,
            env=environment(),
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(answer.read_text())


def main() -> None:
    """Run a scenario that the command line names, and write what it returns."""
    name, arguments, answer = sys.argv[1:]
    Path(answer).write_text(json.dumps(SCENARIOS[name](**json.loads(arguments))))
