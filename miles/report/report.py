"""A run's folder -> report.html, a page that needs no network, and loss.png."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader

from miles.common import run_folder, storage
from miles.common.debugging import unchained
from miles.data.stream.bottleneck import Bottleneck
from miles.report import run_data
from miles.report.charts import loss_chart, run_chart, to_png
from miles.report.first_batch import longest_sample
from miles.report.run_data import Metrics
from miles.train.driver.metrics import timing_of

MAX_REJECTS = 50


@unchained
def write_report(folder: str, prepared: Sequence[str] = ()) -> tuple[str, str]:
    """Write report.html and loss.png into a run's folder.

    Args:
        folder: folder of a run (fsspec URL).
        prepared: folders that `miles prepare` wrote. Their ledgers and dropped rows are shown in
            place of the run's own.

    Returns:
        the paths of both files.

    Raises:
        SourceError: the folder has no metrics.
    """
    metrics = run_data.read_metrics(folder)

    page_path = storage.join(folder, run_folder.REPORT)
    storage.write_text(page_path, _page(folder, metrics, prepared))

    chart_path = storage.join(folder, run_folder.LOSS_CHART)
    fs, path = storage.filesystem(chart_path)
    fs.pipe_file(path, to_png(loss_chart(metrics)))
    return page_path, chart_path


def verdict(metrics: Sequence[Metrics]) -> str:
    """Return a sentence on how long the trainers waited for data, and the remedy."""
    # The first step waits for the stream to start.
    later = metrics[1:] or metrics
    return f"After the first step {Bottleneck.over(map(timing_of, later))}"


def _page(folder: str, metrics: Sequence[Metrics], prepared: Sequence[str]) -> str:
    """Return report.html."""
    ledger = run_data.read_prepared_ledgers(prepared) if prepared else run_data.read_ledger(folder)

    sample = ""
    origin = ""
    batch = run_data.read_first_batch(folder)
    if batch is not None:
        sample, origin = longest_sample(batch)

    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True)
    return environment.get_template("report.html.jinja").render(
        name=folder.rstrip("/").rsplit("/", 1)[-1],
        num_steps=len(metrics),
        epoch=metrics[-1]["sft/epoch"],
        numbers=_numbers(metrics),
        chart=base64.b64encode(to_png(run_chart(metrics))).decode(),
        verdict=verdict(metrics),
        ledger=ledger,
        rejects=run_data.read_rejects(prepared or (folder,))[:MAX_REJECTS],
        starts=run_data.read_starts(folder),
        skipped=run_data.read_skipped_steps(folder),
        answers=run_data.read_answers(folder),
        sample=sample,
        origin=origin,
    )


def _numbers(metrics: Sequence[Metrics]) -> list[tuple[str, str]]:
    """Return the numbers on top of the page with their labels; speeds without the first step."""
    first = metrics[0]
    last = metrics[-1]
    numbers = [
        ("loss, first step", _format_loss(first["sft/loss"])),
        ("loss, last step", _format_loss(last["sft/loss"])),
    ]

    evaluated = [line["eval/loss"] for line in metrics if "eval/loss" in line]
    if evaluated:
        numbers.append(("loss, evaluation", _format_loss(evaluated[-1])))

    later = metrics[1:] or metrics
    seconds = sum(line["perf/step_seconds"] for line in later)
    num_tokens = sum(line["data/num_tokens"] for line in later)
    numbers.append(("trained tokens", f"{last['sft/tokens_seen']:,}"))
    numbers.append(("tokens per second", f"{num_tokens / seconds:,.0f}"))

    if "perf/mfu" in last:
        weighted = sum(line["perf/mfu"] * line["perf/step_seconds"] for line in later)
        numbers.append(("MFU", f"{weighted / seconds:.1%}"))
    if last["sft/skipped_steps"]:
        numbers.append(("skipped steps", f"{last['sft/skipped_steps']:,}"))
    return numbers


def _format_loss(loss: float | None) -> str:
    return "not finite" if loss is None else f"{loss:.3f}"
