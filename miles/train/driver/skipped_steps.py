"""Skipped steps: counted, limited, and named by their rows where a number was not finite.

`skipped_steps.jsonl` in the run folder has one line for each step whose loss or gradient was NaN or
infinite:

    {"step": 41, "reason": "the loss is not finite",
     "rows": [{"source": "chat", "file": "…", "row": 17}]}
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

from miles.common import json_lines, run_folder, storage
from miles.common.patient_file import PatientFile, Report
from miles.errors import DivergedError
from miles.train.types import SkipReason, StepResult, named

_SHOWN_ROWS = 3

Place = tuple[str, str, int]
"""Source, file (fsspec URL) and number in the file of a row."""

Locate = Callable[[int], Place]
"""Row id -> place of the row."""


class SkippedSteps:
    """Counts the skipped steps of a run.

    Args:
        run_dir: the run folder (fsspec URL).
        max_in_a_row: more consecutive steps than this whose numbers are not finite end the run.
        first_step: of this attempt; lines of it and later steps, from an earlier attempt, are
            dropped.
        num_before: steps skipped before it.
        locate: returns the place of a row.
        report: is told what cannot be written.
    """

    def __init__(
        self,
        run_dir: str,
        max_in_a_row: int,
        first_step: int,
        num_before: int,
        locate: Locate,
        report: Report = print,
    ) -> None:
        self.num_skipped = num_before
        self._path = storage.join(run_dir, run_folder.SKIPPED_STEPS)
        self._max_in_a_row = max_in_a_row
        self._locate = locate
        self._num_in_a_row = 0
        self._file = PatientFile.read(self._path, report, json_lines.is_before(first_step))

    def record(self, step: int, result: StepResult) -> str | None:
        """Count a step if it was skipped.

        Returns:
            a sentence that says so; None if the step was trained.

        Raises:
            DivergedError: too many consecutive steps were skipped, or weights are not finite.
        """
        if result.skip is None:
            self._num_in_a_row = 0
            return None

        self.num_skipped += 1
        reason = result.skip.reason
        if reason in (SkipReason.NOTHING_TO_TRAIN, SkipReason.LOSS_SCALE_TOO_HIGH):
            # It says nothing about the model.
            return f"step {step} skipped: {reason}"

        if result.skip.weights:
            raise DivergedError(
                f"step {step}: {reason}, because weights themselves are NaN or infinite: "
                f"{named(result.skip.weights)}. No row is to blame, and no later step mends them: "
                "lower --lr, and go on from an earlier checkpoint"
            )
        self._num_in_a_row += 1
        places = [self._locate(row) for row in result.skip.row_ids]
        self._write_line(step, reason, places)
        sentence = f"step {step} skipped: {reason}; {self._name_rows(places)}"
        if self._num_in_a_row > self._max_in_a_row:
            raise DivergedError(
                f"{self._num_in_a_row} steps in a row were skipped, more than --max-skipped-steps "
                f"{self._max_in_a_row}; the last: {sentence}. Look at the rows (miles inspect "
                "shows how they are encoded), lower --lr, or resume from an earlier checkpoint"
            )
        return sentence

    def flush(self) -> None:
        """Write the file if it is remote; a local one has each line at once."""
        self._file.flush()

    def close(self) -> None:
        """Write the file, and report what it lacks."""
        self._file.close()

    def _write_line(self, step: int, reason: SkipReason, places: Sequence[Place]) -> None:
        rows = [{"source": source, "file": file, "row": row} for source, file, row in places]
        self._file.add(json.dumps({"step": step, "reason": reason, "rows": rows}))

    def _name_rows(self, places: Sequence[Place]) -> str:
        names = [f"row {row} of {file}" for _, file, row in places[:_SHOWN_ROWS]]
        text = ", ".join(names)
        if len(places) > _SHOWN_ROWS:
            text += f" and {len(places) - _SHOWN_ROWS} more (see {self._path})"
        return text
