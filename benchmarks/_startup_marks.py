"""Marks of a run's start: when each of some functions began and ended, in every process of it.

`install` is called by a `sitecustomize.py` in each Python process, before anything else is
imported. A function is wrapped when its module has been imported, so that nothing is imported
because of it. Functions that this version of miles does not have are passed over.

Each call becomes a line of `MILES_STARTUP_MARKS/PID`:

{"name": "certification", "role": "driver", "begin": 1795.2, "end": 1797.0, "cpu_seconds": 1.7}
"""

from __future__ import annotations

import functools
import importlib.abc
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

MARKED = {
    "miles.train.estimate.preflight": {"_look_at_all": "preflight"},
    "miles.data.stream.stages": {"encoder_of": "certification"},
    "miles.common.local_ray": {"_start_once": "Ray"},
    "miles.train.rank.rank_process": {"start_rank": "meeting"},
    "miles.train.rank.checkpoint_load": {"load_start": "checkpoint"},
    "miles.train.rank.trainer": {
        "Trainer.__init__": "model",
        "Trainer.train_step": "first step",
    },
    "miles.train.rank.actor": {
        "TrainerActor.load_modules": "imports of the trainers",
        "TrainerActor.setup": "trainer",
    },
    "miles.data.stream.step_iterator": {"StepIterator.__next__": "first block"},
}
"""Functions by module, and the stage that each of them is."""


def install() -> None:
    """Have the functions of `MARKED` leave marks in this process."""
    sys.meta_path.insert(0, _Finder())


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the modules of `MARKED` as the other finders do, and marks what they define."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in MARKED:
            return None
        for finder in sys.meta_path:
            if finder is self:
                continue
            spec = finder.find_spec(name, path, target)
            if spec is not None and spec.loader is not None:
                _mark_after(spec.loader, MARKED[name])
                return spec
        return None


def _mark_after(loader: Any, functions: dict[str, str]) -> None:
    """Wrap functions of the module that a loader loads, once it has."""
    execute = loader.exec_module

    def exec_module(module: ModuleType) -> None:
        execute(module)
        for path, stage in functions.items():
            *owners, last = path.split(".")
            owner: Any = module
            for name in owners:
                owner = getattr(owner, name, None)
            function = getattr(owner, last, None)
            if function is not None:
                setattr(owner, last, _marked(function, stage))

    loader.exec_module = exec_module


def _marked(function: Callable[..., Any], stage: str) -> Callable[..., Any]:
    """Return a function that does the same, and writes when."""

    @functools.wraps(function)
    def marked(*args: Any, **kwargs: Any) -> Any:
        begin = time.time()
        before = time.process_time()
        try:
            return function(*args, **kwargs)
        finally:
            _write(stage, begin, time.process_time() - before)

    return marked


def _write(stage: str, begin: float, cpu_seconds: float) -> None:
    mark = {"name": stage, "begin": begin, "end": time.time(), "cpu_seconds": cpu_seconds}
    path = Path(os.environ["MILES_STARTUP_MARKS"]) / str(os.getpid())
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(mark) + "\n")
