"""What a start runs on, in starts.jsonl."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import replace
from importlib import metadata
from pathlib import Path

from miles.common import run_folder
from miles.train.driver.attempts import AttemptLog
from miles.train.driver.surroundings import surroundings
from miles.train.parallel_layout import Layout
from miles.train.precision import Precision
from tests.support.shapes import HAND_COUNTED


def test_a_start_says_what_it_runs_on(tmp_path: Path) -> None:
    facts = surroundings(HAND_COUNTED, "NVIDIA H200")
    AttemptLog(str(tmp_path)).begin(0, "there", Layout(1), Precision.BF16, facts)
    entry = json.loads((tmp_path / run_folder.ATTEMPTS).read_text())

    assert entry["hardware"]["gpu"] == "NVIDIA H200"
    assert entry["hardware"]["cpus"] == os.cpu_count()
    assert entry["hardware"]["memory_bytes"] > 1 << 28
    assert entry["model"]["layers"] == HAND_COUNTED.num_layers
    assert entry["model"]["parameters"] > HAND_COUNTED.vocab_size * HAND_COUNTED.hidden_size
    assert entry["versions"]["python"] == platform.python_version()
    assert entry["versions"]["ray"] == metadata.version("ray")


def test_no_name_of_a_machine_is_kept() -> None:
    text = json.dumps(surroundings(HAND_COUNTED, None))
    assert platform.node() not in text
    assert '"gpu": null' in text


def test_experts_are_counted() -> None:
    assert "experts" not in surroundings(HAND_COUNTED, None)["model"]
    experts = replace(HAND_COUNTED, num_experts=4, moe_router_topk=2, moe_ffn_hidden_size=8)
    model = surroundings(experts, None)["model"]
    assert (model["experts"], model["experts_per_token"]) == (4, 2)
    assert model["active_parameters"] < model["parameters"]
