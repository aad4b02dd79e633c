"""Which rows are evaluated, and when they cannot be: settings and errors, without Ray."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain

from miles.common.counts import counted
from miles.data.config import DEFAULT_WINDOW_ROWS, DataConfig, OrderConfig, SourceConfig
from miles.data.files.manifest import Manifest
from miles.data.stream.account import advice
from miles.data.stream.reject_limits import FATAL_ADVICE, RejectLimits, describe_rejects
from miles.data.types import Reject
from miles.errors import ConfigError, DataError

STEP_ROWS = 1_024
"""Rows that are packed together, at least.

A step has as many micro-batches on every rank, and what its samples do not fill stays empty.
Samples of 550 tokens over 8 ranks of 8,192 tokens fill 97 % where 1,024 rows are packed together,
and 60 % where 128 are.
"""
RANK_ROWS = 128
"""Rows that are packed together for each data rank, at least."""
WINDOW_ROWS = 8_192
"""Rows that one loader's task reads.

Few enough that a set of some ten thousand rows keeps several loaders busy, and many against a row
group, because a row group that lies across two windows is read twice.
"""


def eval_config(data: DataConfig, sources: tuple[SourceConfig, ...]) -> DataConfig:
    """Return the configuration of the evaluation stream: as for training, in file order, once.

    Args:
        data: of the training stream.
        sources: of the evaluation alone (`--eval-prompt-data`), with all their rows. Without any,
            the held-out rows of the training sources are used.

    Raises:
        ConfigError: there are neither sources nor held-out rows.
    """
    step_rows = max(STEP_ROWS, RANK_ROWS * data.pack.dp_size)
    if sources:
        order = OrderConfig(batch_size=step_rows, window_rows=WINDOW_ROWS, num_epoch=1)
        sources = tuple(replace(source, is_evaluation=True) for source in sources)
        return replace(
            data, sources=sources, order=order, held_out_fraction=0.0, held_out="leave_out"
        )

    if data.held_out_fraction <= 0:
        raise ConfigError(
            "nothing to evaluate on: give --eval-prompt-data PATH, or an --eval-fraction above 0"
        )
    # As many rows of the input as leave `step_rows` held-out ones to pack, but no more than a
    # loader holds for training.
    input_rows = min(int(step_rows / data.held_out_fraction), max(step_rows, DEFAULT_WINDOW_ROWS))
    order = OrderConfig(batch_size=input_rows, window_rows=WINDOW_ROWS, num_epoch=1)
    return replace(data, order=order, held_out="only")


def require_usable(
    rejects: Sequence[Reject], num_rows: int, config: DataConfig, manifest: Manifest
) -> None:
    """Judge the rejects as the ledger does in training.

    The share is judged only for sources of their own. Held-out rows are like the other rows of
    their files, which the training stream judges, and so few that one reject might be too large a
    share.

    Raises:
        DataError: too many rows were rejected, or one for a fatal reason.
    """
    limits = RejectLimits.of(config)
    if fatal := limits.fatal(rejects):
        raise DataError(
            f"of the rows to evaluate {describe_rejects(fatal, manifest)}. {FATAL_ADVICE[fatal[0].reason]}"
        )
    num_bad = limits.num_bad(rejects)
    if config.held_out != "only" and limits.is_share_exceeded(num_bad, num_rows):
        rows = f"{counted(num_rows, 'row')} to evaluate"
        raise limits.share_error(
            num_bad,
            rows,
            reasons=describe_rejects(rejects, manifest),
            advice=_advice(rejects),
        )


def nothing_to_evaluate(
    rejects: Sequence[Reject], num_rows: int, config: DataConfig, manifest: Manifest
) -> DataError:
    """Return the error of a set in which nothing is trained."""
    dropped = f": {describe_rejects(rejects, manifest)}" if rejects else ""
    if config.held_out == "only":
        return DataError(
            f"nothing to evaluate: --eval-fraction {config.held_out_fraction} holds out {num_rows} "
            f"of {manifest.num_rows} rows, and none of these can be used{dropped}."
            f"{_advice(rejects)} Raise it, or give --eval-prompt-data"
        )
    paths = ", ".join(chain.from_iterable(source.paths for source in config.sources))
    return DataError(
        f"nothing to evaluate: none of the {num_rows} rows of --eval-prompt-data {paths} can be "
        f"used{dropped}.{_advice(rejects)}"
    )


def _advice(rejects: Sequence[Reject]) -> str:
    return advice(Counter(reject.reason for reject in rejects))
