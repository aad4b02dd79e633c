"""`config.json` of the run folder: the settings of a run, as they were resolved at its last start."""

from __future__ import annotations

import dataclasses
import json

from miles.train.config import TrainConfig


def describe(config: TrainConfig) -> str:
    """Return the resolved configuration as JSON."""
    return json.dumps(dataclasses.asdict(config), indent=1, default=str)
