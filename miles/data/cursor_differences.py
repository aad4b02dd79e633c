"""The differences between a checkpoint's cursor and that of a run, by the flags to type.

{"seed": 42, …}, {"seed": 9, …}  ->  "Give the old values … --rollout-seed: the checkpoint has
                                      42, this run 9"
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

FLAGS = {
    "seed": "--rollout-seed",
    "shuffle": "--rollout-shuffle",
    "window_rows": "--shuffle-window",
    "batch_size": "--rollout-batch-size",
    "drop_last": "--drop-last",
    "mixture": "--prompt-data-weights",
    "held_out_fraction": "--eval-fraction",
    "empty_answer": "--empty-answer",
}
"""Field of a cursor -> the flag that gives it."""

INPUTS = {
    "manifest_fingerprint": "--prompt-data or --split: other files than the checkpoint's, or files "
    "that were written since, or are read in another way (--row-shape, --column-names, "
    "--role-names, --transform or the code of its function). A run of an earlier version took every "
    "split of a folder, which is now --split all, and named the source of a pattern by "
    "its last part: --prompt-data '*' 'data/*.jsonl'",
    "encoder_fingerprint": "--hf-checkpoint or --chat-template-path: another tokenizer or chat "
    "template than the checkpoint's; or other rules for its tokens (--apply-chat-template-kwargs, "
    "--loss-mask-turns, --empty-think, --special-text, --too-long, --max-sample-tokens, and "
    "--max-tokens-per-gpu where that is not given)",
}
"""Field of a cursor that is a hash -> what has changed where it differs."""


def describe(saved: Mapping[str, Any], current: Mapping[str, Any]) -> str:
    """Return what to do about the fields that differ, and each of them; "" where none does.

    Args:
        saved: the fields of the checkpoint's cursor that must match.
        current: those of this run.
    """
    differing = [name for name in saved if saved[name] != current[name]]
    values = []
    for name in differing:
        if name not in INPUTS:
            found = f"the checkpoint has {_shown(saved[name])}, this run {_shown(current[name])}"
            values.append(f"{FLAGS.get(name, name)}: {found}")
    inputs = [INPUTS[name] for name in differing if name in INPUTS]
    if not differing:
        return ""

    remedy = "Give the old values" if values else "Bring the old ones back"
    if values and inputs:
        remedy += ", and bring the old files back"
    lines = "\n  ".join((*values, *inputs))
    return f"{remedy}, or start anew with another --save.\n  {lines}"


def _shown(value: object) -> str:
    """Return a value as one gives it: 42, "it on", "3 1"."""
    if isinstance(value, bool):
        return "it on" if value else "it off"
    if isinstance(value, tuple):
        return " ".join(map(str, value)) or "none"
    return str(value)
