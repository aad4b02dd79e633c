"""A run's folder -> report.html, a page that needs no network, and loss.png."""

from __future__ import annotations

from collections.abc import Sequence

from miles.common import patience, run_folder, storage
from miles.common.debugging import unchained
from miles.common.local_paths import absolute
from miles.report import parts, run_data
from miles.report.charts import loss_chart, to_png
from miles.report.columns import Columns
from miles.report.html_page import write_page
from miles.report.parts import RunView
from miles.report.run_data import Metrics, Notify


@unchained
def write_report(
    folder: str, prepared: Sequence[str] = (), notify: Notify = lambda sentence: None
) -> tuple[str, ...]:
    """Write report.html and loss.png into a run's folder.

    A part that cannot be shown is left out, and the page says so: a file of the run is broken, its
    tokenizer has moved.

    Args:
        folder: folder of a run (fsspec URL).
        prepared: folders that `miles prepare` wrote. Their ledgers and dropped rows are shown in
            place of the run's own.
        notify: is told, in a sentence each, what is left out.

    Returns:
        the paths of the files that were written: the page, and the chart if it can be drawn.

    Raises:
        SourceError: the folder has no metrics that can be read.
        WriteError: a file cannot be written.
    """
    folder = absolute(folder)
    unread: list[str] = []
    metrics = run_data.read_metrics(folder, unread.append)
    view = RunView(folder, Columns(metrics), [absolute(path) for path in prepared])
    for sentence in unread:
        view.leave_out(sentence)

    patience.doing("drawing the curves")
    page_path = storage.join(folder, run_folder.REPORT)
    storage.write_text(page_path, write_page(view, metrics))

    written = [page_path]
    chart = view.made("loss.png", lambda: to_png(loss_chart(metrics)), b"")
    if chart:
        written.append(storage.join(folder, run_folder.LOSS_CHART))
        storage.write_bytes(written[-1], chart)
    for sentence in view.left_out:
        notify(sentence)
    return tuple(written)


def verdict(metrics: Sequence[Metrics]) -> str:
    """Return a sentence on how long the trainers waited for data, and the remedy."""
    return parts.verdict(Columns(metrics))
