"""The training stream before it runs: its files and rows are counted, its steps are planned.

    DataConfig -> certified tokenizer, manifest, plan -> CountedStream -> the feed, the survey

It is made once for a command, without Ray: what looks at the data before the start hands it on to
the feed, so that nothing is counted twice.
"""

from __future__ import annotations

from dataclasses import dataclass

from miles.data.config import DataConfig, EncodeConfig
from miles.data.encoding import kept_encoders
from miles.data.files.group_sizes import require_small_groups
from miles.data.files.manifest import Manifest, build_manifest
from miles.data.order.plan import Plan
from miles.data.stream import stages
from miles.data.types import Cursor


@dataclass(frozen=True)
class StreamInfo:
    """The facts of a stream that are known before it runs."""

    num_rows: int
    steps_per_epoch: int
    num_steps: int
    source_names: tuple[str, ...]
    manifest_fingerprint: str
    encoder_fingerprint: str


@dataclass(frozen=True)
class CountedStream:
    """The files and the steps of a stream."""

    manifest: Manifest
    plan: Plan
    encode: EncodeConfig
    """with the engine that suits the number of rows; the ids are the same"""
    has_many_rows: bool
    """to encode: each loader makes its fastest engine at once"""
    info: StreamInfo
    beginning: Cursor
    """the cursor before the first step"""

    @classmethod
    def count(cls, config: DataConfig) -> CountedStream:
        """Count the rows, certify the tokenizer and plan the steps.

        Raises:
            MilesError: a source or tokenizer that cannot be used.
        """
        first = kept_encoders.first_engine(config.encode)
        encoder = stages.encoder_of(first)
        manifest = build_manifest(config.sources)
        plan = stages.make_plan(manifest, config)
        source_window_rows = [plan.source_window_rows(source) for source in range(plan.num_sources)]
        require_small_groups(manifest, config.order.rounded_window_rows, source_window_rows)

        info = StreamInfo(
            manifest.num_rows,
            plan.steps_per_epoch,
            plan.num_steps,
            manifest.source_names,
            manifest.fingerprint,
            encoder.fingerprint,
        )
        num_rows = plan.num_steps * config.order.batch_size
        has_many_rows = kept_encoders.repay_fastokens(num_rows, config.stream.loader_cpus)
        encode = config.encode if has_many_rows else first
        return cls(manifest, plan, encode, has_many_rows, info, _cursor_at_beginning(config, info))

    def cursor_from(self, cursor: Cursor | None, where: str) -> Cursor:
        """Return the cursor to begin at: that of a checkpoint, or the beginning.

        Args:
            cursor: of the checkpoint to resume from; None: the run begins.
            where: names the checkpoint in errors.

        Raises:
            CheckpointError: the cursor is of other data, or of another order.
        """
        if cursor is None:
            return self.beginning
        cursor.require_same_data(self.beginning, where)
        return cursor

    def ends(self, max_steps: int | None) -> frozenset[int]:
        """Return the last step of each epoch, and of the run.

        Args:
            max_steps: that the run takes at most; None: all.
        """
        per_epoch = self.info.steps_per_epoch
        num_steps = min(self.info.num_steps, max_steps or self.info.num_steps)
        return frozenset((num_steps - 1, *range(per_epoch - 1, num_steps, per_epoch)))


def _cursor_at_beginning(config: DataConfig, info: StreamInfo) -> Cursor:
    """Return the cursor of a run with these settings before its first step."""
    order = config.order

    return Cursor(
        consumed_rows=0,
        seed=order.seed,
        shuffle=order.shuffle,
        window_rows=order.rounded_window_rows,
        batch_size=order.batch_size,
        drop_last=order.drop_last,
        mixture=order.integer_weights,
        manifest_fingerprint=info.manifest_fingerprint,
        encoder_fingerprint=info.encoder_fingerprint,
        held_out_fraction=config.held_out_fraction,
        empty_answer=config.encode.empty_answer,
    )
