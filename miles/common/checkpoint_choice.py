"""The checkpoints of a folder that a run could go on from, and the line that makes it do so.

SAVE/iter_0000020/     complete
SAVE/iter_0000040/     complete
SAVE/iter_0000060/     lacks a file
no tracker         ->  "There are complete checkpoints of steps 20, 40 in SAVE. To go on from step
                       40: echo 40 > SAVE/latest_checkpointed_…"
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from miles.common import storage
from miles.common.checkpoint_files import complete_iterations, is_complete, iteration_of
from miles.common.checkpoint_tracker import RELEASE, TRACKER, folder_name
from miles.common.redact import redact

_COPIES = {"s3": "aws s3 cp -", "gs": "gcloud storage cp -"}
"""By a URL's scheme: the command that writes its input to a store."""
_NUM_SHOWN = 6


def ways_on(url: str) -> str:
    """Return what is there to go on from in a folder, and the line that does it, as sentences."""
    own = iteration_of(url)
    if own is not None and is_complete(url):
        parent = url.rstrip("/").rpartition("/")[0]
        return (
            f"It is a checkpoint itself: give {redact(parent)}, and to go on from this one: "
            f"{tracker_line(parent, own)}"
        )
    iterations = complete_iterations(url)
    if not iterations:
        return _none_in(url)
    return (
        f"{_those_in(url, iterations)}. To go on from step {iterations[-1]}: "
        f"{tracker_line(url, iterations[-1])}"
    )


def ways_to_read(url: str, *, by_step: bool) -> str:
    """Return which checkpoints of a folder can be converted, and how to name one, as sentences.

    The tracker stays as it is: the run of the folder may still write it.

    Args:
        by_step: `--ckpt-step` was given, and names none.
    """
    if by_step and is_complete(url):
        return "It is a checkpoint itself: leave --ckpt-step out"
    iterations = complete_iterations(url)
    if not iterations and by_step and is_complete(storage.join(url, RELEASE)):
        return f"{redact(url)} holds a converted checkpoint, without steps: leave --ckpt-step out"
    if not iterations:
        return _none_in(url)
    newest = storage.join(redact(url), folder_name(iterations[-1]))
    way = f"give --ckpt-step {iterations[-1]}" if by_step else f"give {newest}"
    other = ", or another of them" if len(iterations) > 1 else ""
    return f"{_those_in(url, iterations)}: {way}{other}"


def _none_in(url: str) -> str:
    return f"There is no complete checkpoint in {redact(url)}"


def _those_in(url: str, iterations: Sequence[int]) -> str:
    """Return which steps have a complete checkpoint, as a sentence without its stop."""
    shown = ", ".join(map(str, iterations[-_NUM_SHOWN:]))
    steps = f"steps …, {shown}" if len(iterations) > _NUM_SHOWN else f"steps {shown}"
    if len(iterations) == 1:
        steps = f"step {shown}"
    number = "is a complete checkpoint" if len(iterations) == 1 else "are complete checkpoints"
    return f"There {number} of {steps} in {redact(url)}"


def merging(adapter: str, hf_checkpoint: str, base: str | None = None) -> str:
    """Return how to begin from a model with its adapter merged into it, as a sentence.

    Args:
        adapter: a LoRA run's folder, or one in PEFT's format.
        hf_checkpoint: the model below.
        base: its weights, if they lie elsewhere.
    """
    weights = f" --ref-load {redact(base)}" if base else ""
    return (
        "To begin from the model with it, merge it: miles convert merge-adapter --adapter "
        f"{redact(adapter)} --hf-checkpoint {redact(hf_checkpoint)}{weights} --save-megatron "
        "MERGED; then give --ref-load MERGED, and another --save"
    )


def tracker_line(url: str, iteration: int) -> str:
    """Return the line for a shell that makes an iteration the newest checkpoint of a folder."""
    tracker = storage.join(url, TRACKER)
    if storage.is_local(url):
        return f"echo {iteration} > {shlex.quote(storage.filesystem(tracker)[1])}"
    copy = _COPIES.get(url.partition("://")[0])
    if copy is None:
        return f"write {iteration} into {redact(tracker)}"
    return f"echo {iteration} | {copy} {shlex.quote(redact(tracker))}"
