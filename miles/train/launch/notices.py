"""Sentences on flags of a launch line that are taken, but do not mean here what they say.

--sequence-parallel --tensor-model-parallel-size 1   it is left out: there is nothing to spread
--moe-permute-fusion                                 tokens are sorted without a fused kernel
--loss-mask-type qwen                                the mask is that of the chat template

They are printed once, at the start of a run and of a dry run.
"""

from __future__ import annotations

from miles.common.flags import Values, flag_of
from miles.train.launch.fixed_flags import REPLACED


def notices_of(values: Values) -> tuple[str, ...]:
    """Return a sentence for each flag of a launch line that has another effect than it says."""
    notices = []
    if is_sequence_parallel_alone(values):
        notices.append(
            "--sequence-parallel is left out: it spreads tokens over the ranks of "
            "--tensor-model-parallel-size, which is 1"
        )
    mask_type = values.get("--loss-mask-type", "auto")
    if mask_type != "auto":
        notices.append(
            f"--loss-mask-type {mask_type} has no effect: the mask is that of the chat template as "
            f"it is served. Miles's {mask_type} mask differs: docs/masks.md"
        )
    for replaced in REPLACED:
        if values.get(flag_of(replaced.name)):
            notices.append(f"{flag_of(replaced.name)} has no effect: {replaced.notice}")
    return tuple(notices)


def is_sequence_parallel_alone(values: Values) -> bool:
    """Return whether a line asks for sequence parallelism without tensor parallelism."""
    is_asked = bool(values.get("--sequence-parallel"))
    return is_asked and values.get("--tensor-model-parallel-size", 1) == 1
