"""Steps that were not taken, since their loss or gradient was NaN or infinite: named, counted, and limited.

`skipped_steps.jsonl` in the run's folder has one line a step:

    {"step": 41, "reason": "the loss is not finite", "rows": [{"source": "chat", "file": "…", "row": 17}]}
"""

from __future__ import annotations

import json
from collections.abc import Callable

from miles.common import json_lines, run_folder, storage
from miles.errors import DivergedError
from miles.train.types import SkipReason, StepResult

_SHOWN_ROWS = 3

Locate = Callable[[int], tuple[str, str, int]]
"""Row id -> source, file (fsspec URL), number in the file."""


class SkippedSteps:
    """Counts the steps of a run that were skipped.

    Args:
        run_dir: the run's folder (fsspec URL).
        max_in_a_row: more than so many, one after the other, end the run.
        first_step: where this start begins; lines of later steps, of a run that was broken off, are dropped.
        total: skipped before it.
        locate: where a row is.
    """

    def __init__(
        self, run_dir: str, max_in_a_row: int, first_step: int, total: int, locate: Locate
    ) -> None:
        self.total = total
        self._path = storage.join(run_dir, run_folder.SKIPPED_STEPS)
        self._max, self._locate = max_in_a_row, locate
        self._in_a_row = 0
        self._lines = json_lines.keep_before(self._path, first_step)

    def count(self, step: int, result: StepResult) -> str:
        """Enters a step.

        Returns:
            a sentence for the terminal, where the step was skipped; else nothing.

        Raises:
            DivergedError: too many in a row.
        """
        skip = result.skip
        if skip is None:
            self._in_a_row = 0
            return ""
        self.total += 1
        if skip.reason is SkipReason.NOTHING_TO_TRAIN:  # no sign of anything about the model
            return f"step {step} skipped: {skip.reason}"
        self._in_a_row += 1
        places = [self._locate(row) for row in skip.row_ids]
        rows = [{"source": source, "file": file, "row": row} for source, file, row in places]
        self._lines.append(json.dumps({"step": step, "reason": skip.reason.value, "rows": rows}))
        json_lines.write(self._path, self._lines)
        named = ", ".join(f"row {row} of {file}" for _, file, row in places[:_SHOWN_ROWS])
        more = (
            f" and {len(places) - _SHOWN_ROWS} more (see {self._path})"
            if len(places) > _SHOWN_ROWS
            else ""
        )
        said = f"step {step} skipped: {skip.reason}; {named}{more}"
        if self._in_a_row > self._max:
            raise DivergedError(
                f"{self._in_a_row} steps in a row were skipped, more than --max-skipped-steps {self._max}; the last: "
                f"{said}. Look at the rows (miles inspect shows how they are encoded), lower --lr, or go on from an "
                "earlier checkpoint"
            )
        return said
