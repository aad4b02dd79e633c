"""`import miles` and what tab completion shows of it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import miles
import miles.data
import miles.report
import miles.train
from miles.data.notebook import prepare as prepare_module

HEAVY = {"torch", "ray", "megatron", "transformers", "pyarrow", "numpy", "matplotlib", "rich"}


def modules_after(code: str) -> set[str]:
    """Return the packages that a fresh Python has imported after some code."""
    show = (
        "import json, sys; print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{show}"], capture_output=True, text=True, check=True
    )
    return set(json.loads(done.stdout))


def test_import_miles_loads_nothing_heavy() -> None:
    bare = modules_after("pass")
    assert modules_after("import miles") - bare == {"miles"}
    rooms = modules_after("import miles; miles.data; miles.train; miles.report; dir(miles)")
    assert not rooms & HEAVY


def test_the_settings_of_a_run_load_neither_torch_nor_ray() -> None:
    loaded = modules_after("import miles; miles.train.run, miles.train.TrainConfig")
    assert not loaded & {"torch", "ray", "megatron", "transformers"}


def test_completion_shows_public_names_first() -> None:
    assert dir(miles) == ["data", "report", "train"]
    assert dir(miles.data) == ["encode", "prepare"]
    assert dir(miles.train) == ["TrainConfig", "run"]
    assert dir(miles.report) == ["write_report"]


def test_a_notebook_completes_public_names_first() -> None:
    from IPython.core.completer import IPCompleter, provisionalcompleter

    names = {"miles": miles}
    completer = IPCompleter(namespace=names, global_namespace=names)
    for line, expected in (
        ("miles.", ["data", "report", "train"]),
        ("miles.data.", ["encode", "prepare"]),
        ("miles.train.r", ["run"]),
        ("miles.train.run(rollout_sh", ["rollout_shuffle="]),
    ):
        with provisionalcompleter():
            found = [entry.text for entry in completer.completions(line, len(line))]
        assert [text.rpartition(".")[2] for text in found][: len(expected)] == expected


def test_names_are_what_they_name() -> None:
    assert miles.data.prepare is prepare_module.prepare
    with pytest.raises(AttributeError, match="module 'miles' has no attribute 'rain'"):
        miles.rain  # noqa: B018
    for room in (miles.data, miles.report, miles.train):
        with pytest.raises(AttributeError, match=r"has no attribute 'rain'"):
            room.rain  # noqa: B018
