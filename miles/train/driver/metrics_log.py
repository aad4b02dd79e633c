"""The metrics of a run: the lines of metrics.jsonl, and the same numbers for the sinks.

No failure to write them ends a run. Lines that cannot be written now are kept; a checkpoint takes
along those that its moment lacks (`unwritten`), so that no later attempt misses them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Protocol, Self

from miles.common import json_lines, run_folder, storage
from miles.common.patient_file import PatientFile, Report
from miles.train.driver.metrics import Metrics


class Sink(Protocol):
    """A place that shows metrics as curves. None of its methods raises, or waits."""

    def write(self, numbers: Mapping[str, float]) -> None:
        """Add the finite numbers of a step, `step` among them."""

    def notices(self) -> list[str]:
        """Return what the user is to know since the last call."""

    def close(self, *, failed: bool, is_hasty: bool) -> None:
        """End the run there, within a bounded time.

        Args:
            failed: an error ended the run.
            is_hasty: the user waits for the end.
        """


class MetricsLog:
    """Appends to metrics.jsonl, and sends the same to the sinks.

    As a context manager, it tells the sinks whether an error ended the run.

    Args:
        run_dir: the run folder (fsspec URL). If it is remote, the lines are kept in memory, and
            `flush` writes the file.
        num_lines: lines to continue after; a killed run wrote more than its checkpoint has, and
            those steps come again.
        sinks: of `open_sinks`.
        unwritten: the last of these lines, which the file may lack.
        first_step: lines of it and of later steps come again, so they are dropped, too: where a
            broken line is gone, `num_lines` would keep one of them. None: the number alone counts.
        report: is told what cannot be written.
    """

    def __init__(
        self,
        run_dir: str,
        num_lines: int,
        sinks: Sequence[Sink] = (),
        *,
        unwritten: Sequence[str] = (),
        first_step: int | None = None,
        report: Report = print,
    ) -> None:
        self._sinks = sinks
        self._report = report
        path = storage.join(run_dir, run_folder.METRICS)
        self._file = PatientFile.read(path, report, stays_open=True)
        num_found = num_lines - len(unwritten)
        found = self._file.lines[:num_found]
        if first_step is not None:
            found = list(filter(json_lines.is_before(first_step), found))
        self._file.replace([*found, *unwritten])

    @property
    def num_lines(self) -> int:
        """Return the number of lines so far."""
        return len(self._file.lines)

    @property
    def unwritten(self) -> list[str]:
        """Return the last lines, those that the file does not have yet."""
        return self._file.unwritten

    def write(self, metrics: Metrics) -> None:
        """Add the line of a step. A number that is not finite is null, and no sink gets it."""
        finite: Metrics = {}
        for key, value in metrics.items():
            if not isinstance(value, float) or math.isfinite(value):
                finite[key] = value
        self._file.add(json.dumps({key: finite.get(key) for key in metrics}))

        numbers = {key: value for key, value in finite.items() if not isinstance(value, str)}
        for sink in self._sinks:
            sink.write(numbers)
        self._report_notices()

    def flush(self) -> None:
        """Write the file if it is remote; a local one has each line at once."""
        self._file.flush()

    def close(self, *, failed: bool = False, is_hasty: bool = False) -> None:
        """Close the file and the sinks; report what they lack."""
        self._file.close()
        for sink in self._sinks:
            sink.close(failed=failed, is_hasty=is_hasty)
        self._report_notices()

    def _report_notices(self) -> None:
        for sink in self._sinks:
            for notice in sink.notices():
                self._report(notice)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        is_hasty = isinstance(error, KeyboardInterrupt)
        self.close(failed=error is not None, is_hasty=is_hasty)
