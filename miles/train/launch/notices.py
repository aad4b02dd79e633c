"""Sentences on flags of a launch line that are taken, but do not mean here what they say.

--sequence-parallel --tensor-model-parallel-size 1   it is left out: there is nothing to spread
--moe-permute-fusion                                 tokens are sorted without a fused kernel
--loss-mask-type qwen                                the mask is that of the chat template
--wandb-project x                                    without --use-wandb, nothing is sent there
--lr 1e-5 … --lr 2e-5                                the last one counts

They are printed once, at the start of a run and of a dry run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from miles.common.flags import Values, flag_of, settings_of
from miles.train.launch.fixed_flags import REPLACED
from miles.train.launch.known_flags import secret_flags
from miles.train.logging_config import LoggingConfig

LOOKING = "looking at the settings, the places and the rows"
"""The words for all of it, where that takes longer than a moment."""


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
    notices += [f"{flag} has no effect: {reason}" for flag, reason in _idle(values)]
    return tuple(notices)


def _idle(values: Values) -> Iterator[tuple[str, str]]:
    """Yield each given flag that does nothing beside the others, and why."""
    if values.get("--lr-decay-style") == "constant" and values.get("--min-lr"):
        yield "--min-lr", "with --lr-decay-style constant the rate stays at --lr"

    if not values.get("--rollout-shuffle"):
        for flag in ("--rollout-seed", "--shuffle-window"):
            if flag in values:
                yield flag, "rows come in the order of their files without --rollout-shuffle"

    if not values.get("--use-wandb"):
        for setting in settings_of(LoggingConfig):
            flag = setting.flag.name
            if flag.startswith("--wandb-") and flag in values:
                yield flag, "nothing is sent to Weights & Biases without --use-wandb"

    if "--eval-max-response-len" in values and not values.get("--eval-samples"):
        yield "--eval-max-response-len", "no answer is generated without --eval-samples"
    if values.get("--on-save-error") == "continue" and not values.get("--save-interval"):
        yield (
            "--on-save-error continue",
            "without --save-interval the only checkpoint is that of the last step, which must be "
            "written",
        )

    if _is_off(values, "overlap-grad-reduce") and "--ddp-bucket-size" in values:
        yield "--ddp-bucket-size", "nothing is overlapped with --no-overlap-grad-reduce"
    if _is_off(values, "rope-fusion") and values.get("--norm-fusion"):
        yield "--norm-fusion", "norms are computed in the kernel of --rope-fusion, which is off"


def _is_off(values: Values, switch: str) -> bool:
    """Return whether a switch is turned off, by itself or by its opposite."""
    return values.get(f"--{switch}") is False or bool(values.get(f"--no-{switch}"))


def repetitions_of(words: Sequence[str]) -> tuple[str, ...]:
    """Return a sentence for each flag that a line gives several times with different values.

    Launch scripts append a flag to replace one, so this is no error. No value is quoted: it may be
    a secret.
    """
    given: dict[str, list[list[str]]] = {}
    secrets = secret_flags()
    of_flag: list[str] | None = None
    is_secret = False
    for word in words:
        if word.startswith("--") and not is_secret:
            flag, _, value = word.partition("=")
            of_flag = [value] if value else []
            given.setdefault(flag, []).append(of_flag)
            is_secret = word in secrets
        elif of_flag is not None:
            of_flag.append(word)
            is_secret = False

    notices = []
    for flag, all_values in given.items():
        if any(values != all_values[0] for values in all_values):
            notices.append(f"{flag} is given {len(all_values)} times; the last value counts")
    return tuple(notices)


def is_sequence_parallel_alone(values: Values) -> bool:
    """Return whether a line asks for sequence parallelism without tensor parallelism."""
    is_asked = bool(values.get("--sequence-parallel"))
    return is_asked and values.get("--tensor-model-parallel-size", 1) == 1
