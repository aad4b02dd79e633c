"""What a run leaves in its folder, and what two runs over the same data have in common."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

NUM_STEPS = 18
SAVE_INTERVAL = 4


def lines(save: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """Return a run's records so far, without half a line that is being written."""
    if not (save / name).exists():
        return []
    complete = (save / name).read_text().rpartition("\n")[0]
    return [json.loads(line) for line in complete.splitlines()]


def tracked(save: Path) -> int:
    """Return how many steps the newest complete checkpoint holds."""
    tracker = save / "latest_checkpointed_iteration.txt"
    return int(tracker.read_text()) if tracker.exists() else 0


def numbers(save: Path) -> list[tuple[Any, ...]]:
    """Return what must be the same, step by step, in every run over the same data."""
    keys = ("step", "data/step_fingerprint", "sft/loss", "sft/grad_norm", "sft/tokens_seen")
    return [tuple(line[key] for key in keys) for line in lines(save)]


def fingerprints(save: Path) -> list[tuple[int, str]]:
    """Return the number and the fingerprint of each step."""
    return [(line["step"], line["data/step_fingerprint"]) for line in lines(save)]


def weights(export: Path) -> bytes:
    """Return the only file of weights of an export."""
    (file,) = export.glob("*.safetensors")
    return file.read_bytes()


def require_same(save: Path, unbroken: Path) -> None:
    """Assert that a run has every step once, and ends as another one, bit by bit.

    Compared are the numbers of each step, and at the end weights, ledger and totals.
    """
    assert numbers(save) == numbers(unbroken)
    assert [line["step"] for line in lines(save)] == list(range(NUM_STEPS))
    assert weights(save / "export") == weights(unbroken / "export")
    ledger, expected = (json.loads((run / "ledger.json").read_text()) for run in (save, unbroken))
    assert ledger == expected
