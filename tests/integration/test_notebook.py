"""Training from a notebook: the example from top to bottom, an interrupt, Ray as it was found."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
import ray
from nbclient import NotebookClient

import miles
from miles.errors import ConfigError
from tests.support.commands import Workspace
from tests.support.processes import LIMIT_SECONDS, PROJECT, environment, wait_until
from tests.support.runs import lines

EXAMPLE = PROJECT / "examples/openhermes.ipynb"


class _Client(NotebookClient):
    """A client that notes all that was on the screen, also what was replaced there."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seen: list[str] = []

    def process_message(self, msg: Any, *args: Any) -> Any:
        data = msg["content"].get("data", {})
        self.seen.append(str(data.get("text/html", "")))
        return super().process_message(msg, *args)


class Kernel:
    """The kernel of a notebook that has run from top to bottom, for more cells.

    Args:
        folder: that it works in.
    """

    def __init__(self, client: _Client, folder: Path) -> None:
        self._client = client
        self.folder = folder
        self.seen = client.seen
        self.cells = client.nb.cells
        for index, cell in enumerate(self.cells):
            client.execute_cell(cell, index)

    def outputs(self, source: str) -> dict[str, str]:
        """Return what the cell with a text has shown last, by its kind."""
        (cell,) = [cell for cell in self.cells if source in cell.source]
        return shown(cell)

    def run(self, source: str) -> dict[str, str]:
        """Run one more cell."""
        cell = nbformat.v4.new_code_cell(source)
        self._client.nb.cells.append(cell)
        self._client.execute_cell(cell, len(self._client.nb.cells) - 1)
        return shown(cell)


def shown(cell: Any) -> dict[str, str]:
    """Return what a cell has shown: kind -> content; all that was printed as `printed`."""
    found = {"printed": ""}
    for output in cell.outputs:
        if output.output_type == "stream":
            found["printed"] += output.text
        else:
            found.update(output.data)
    return found


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kernel]:
    folder = tmp_path_factory.mktemp("notebook")
    notebook = nbformat.read(EXAMPLE, as_version=4)
    client = _Client(notebook, timeout=LIMIT_SECONDS, resources={"metadata": {"path": str(folder)}})
    with pytest.MonkeyPatch.context() as patch:
        for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR"):
            patch.setenv(name, str(folder / name))  # not in the user's home
        patch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
        with client.setup_kernel(env=environment()):
            yield Kernel(client, folder)


@pytest.mark.slow
def test_the_example_runs_from_top_to_bottom(kernel: Kernel) -> None:
    card = kernel.outputs("miles.data.prepare(")
    assert "652" in card["text/html"]
    assert "<html" not in kernel.outputs("ds.preview(2)")["text/html"]

    run = kernel.outputs("run = miles.train.run(")
    metrics = lines(kernel.folder / "runs/notebook/run")
    assert f"{len(metrics)} steps, finished, loss" in run["text/plain"]
    assert "\n" not in run["text/plain"]
    assert "<svg" in run["text/html"]
    assert metrics[-1]["sft/loss"] < 0.9 * metrics[0]["sft/loss"]
    assert (kernel.folder / "runs/notebook/run/report.html").exists()
    assert kernel.outputs("miles chat {run.folder}")["printed"].strip()
    assert "rror" not in kernel.outputs("miles chat {run.folder}")["printed"]


@pytest.mark.slow
def test_training_shows_a_bar_that_moves(kernel: Kernel) -> None:
    (cell,) = [cell for cell in kernel.cells if "run = miles.train.run(" in cell.source]
    moving = [text for text in kernel.seen if "tok/s" in text]
    assert len(set(moving)) > 1, kernel.seen
    assert "steps" in moving[-1]
    assert not [out for out in cell.outputs if "tok/s" in str(out.get("data"))], "it is gone"
    printed = shown(cell)["printed"]
    assert not re.search(r"--[a-z]", printed), "a notebook speaks of keywords"
    assert "ipywidgets" not in printed, "Ray's own"


@pytest.mark.slow
def test_an_interrupted_kernel_stops_and_goes_on(kernel: Kernel) -> None:
    """In one process: a run that is stopped, and the same call again."""
    pid = int(kernel.run("import os; print(os.getpid())")["printed"])
    save = kernel.folder / "runs/stopped"
    call = f"""
import ray
was_connected = ray.is_initialized()
stopped = miles.train.run(
    hf_checkpoint=model, prompt_data=ds, save={str(save)!r}, rollout_batch_size=8,
    max_tokens_per_gpu=2048, num_rollout=NUM_STEPS,
)
assert ray.is_initialized() == was_connected
stopped"""

    def interrupt() -> None:
        wait_until(lambda: lines(save))
        os.killpg(os.getpgid(pid), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    first = kernel.run(call.replace("NUM_STEPS", "400"))
    thread.join()
    num_done = len(lines(save))
    assert f"{num_done} step" in first["text/plain"]
    assert "stopped by Ctrl-C" in first["text/plain"]
    assert "the same call goes on" in first["printed"]

    second = kernel.run(call.replace("NUM_STEPS", str(num_done + 2)))
    assert f"{num_done + 2} steps, finished" in second["text/plain"]
    assert [line["step"] for line in lines(save)] == list(range(num_done + 2))


def test_a_run_in_this_process_leaves_its_ray(workspace: Workspace, tmp_path: Path) -> None:
    keywords: dict[str, Any] = {
        "hf_checkpoint": workspace.folder / "hf",
        "prompt_data": workspace.sources,
        "save": tmp_path / "run",
        "max_bad_fraction": 0.05,
        "rollout_batch_size": 8,
        "max_tokens_per_gpu": 1024,
        "num_rollout": 2,
    }
    first = miles.train.run(**keywords)
    assert ray.is_initialized()
    assert len(first.losses) == first.num_steps == 2
    assert first.is_finished

    again = miles.train.run(**keywords)
    assert again == first, "it is finished: nothing is trained"

    assert miles.train.run(**keywords, dry_run=True) is None
    with pytest.raises(ConfigError, match="rollout_batch_size= must be positive") as error:
        miles.train.run(**{**keywords, "rollout_batch_size": 0})
    assert "--" not in str(error.value)
    assert error.value.__cause__ is None


def test_the_example_is_kept_without_outputs() -> None:
    notebook = json.loads(EXAMPLE.read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        assert not cell.get("outputs"), "clear all outputs before you commit"
        assert cell.get("execution_count") is None
