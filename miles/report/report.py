"""A run's folder -> report.html, a page that needs no network, and loss.png."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from itertools import chain, repeat
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader

from miles.common import run_folder, storage
from miles.common.debugging import one_paragraph, unchained
from miles.common.local_paths import absolute
from miles.data.stream import account
from miles.data.stream.bottleneck import Bottleneck
from miles.errors import MilesError
from miles.report import run_data
from miles.report.charts import loss_chart, run_chart, to_png
from miles.report.first_batch import longest_sample
from miles.report.run_data import Metrics, Notify
from miles.train.driver.metrics import timing_of

MAX_REJECTS = 50


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
    parts = _Parts()
    metrics = run_data.read_metrics(folder, parts.leave_out)

    page_path = storage.join(folder, run_folder.REPORT)
    storage.write_text(page_path, _page(folder, metrics, list(map(absolute, prepared)), parts))

    written = [page_path]
    chart = parts.made("loss.png", lambda: to_png(loss_chart(metrics)), b"")
    if chart:
        written.append(storage.join(folder, run_folder.LOSS_CHART))
        storage.write_bytes(written[-1], chart)
    for sentence in parts.left_out:
        notify(sentence)
    return tuple(written)


class _Parts:
    """Makes the parts of a page; keeps why some are missing."""

    def __init__(self) -> None:
        self.left_out: list[str] = []
        """a sentence on each part that is not, or not wholly, on the page"""

    def leave_out(self, sentence: str) -> None:
        """Note that something is missing."""
        self.left_out.append(sentence)

    def made(self, name: str, make: Callable[[], Any], without: Any) -> Any:
        """Return a part of the page, or what stands for it where it cannot be made.

        Args:
            name: of the part, for the sentence.
            make: the part.
            without: stands in its place.
        """
        try:
            return make()
        except MilesError as error:
            self.leave_out(f"{name}: {error}")
        # Files of another version have other types; drawing has libraries of its own. A report
        # shows what there is.
        except Exception as error:
            text = one_paragraph(str(error))
            self.leave_out(f"{name} cannot be shown ({type(error).__name__}: {text})")
        return without


def verdict(metrics: Sequence[Metrics]) -> str:
    """Return a sentence on how long the trainers waited for data, and the remedy."""
    # The first step waits for the stream to start.
    later = metrics[1:] or metrics
    return f"After the first step {Bottleneck.over(map(timing_of, later))}"


def _page(folder: str, metrics: Sequence[Metrics], prepared: Sequence[str], parts: _Parts) -> str:
    """Return report.html."""

    def ledger() -> dict[str, dict[str, Any]]:
        if prepared:
            return run_data.read_prepared_ledgers(prepared)
        return run_data.read_ledger(folder)

    def first_batch() -> tuple[str, str]:
        batch = run_data.read_first_batch(folder)
        return longest_sample(batch) if batch is not None else ("", "")

    def rejects() -> list[dict[str, Any]]:
        return run_data.read_rejects(prepared or (folder,), parts.leave_out)[:MAX_REJECTS]

    def chart() -> str:
        return base64.b64encode(to_png(run_chart(metrics))).decode()

    note = parts.leave_out
    accounts = parts.made("The ledger", ledger, {})
    sample, origin = parts.made("The first batch", first_batch, ("", ""))
    shown: dict[str, Any] = {
        "epoch": parts.made("The epoch", lambda: float(metrics[-1]["sft/epoch"]), 0.0),
        "numbers": parts.made("The numbers on top", lambda: _numbers(metrics), []),
        "chart": parts.made("The charts", chart, ""),
        "verdict": parts.made("The bottleneck", lambda: verdict(metrics), ""),
        "ledger": accounts,
        "not_used": parts.made("What is not used", lambda: _not_used(accounts), []),
        "rejects": parts.made("The dropped rows", rejects, []),
        "training": parts.made("What is trained", lambda: run_data.read_training(folder), ""),
        "starts": parts.made("The starts", lambda: run_data.read_starts(folder, note), []),
        "skipped": parts.made(
            "The skipped steps", lambda: run_data.read_skipped_steps(folder, note), []
        ),
        "answers": parts.made("The answers", lambda: run_data.read_answers(folder, note), []),
    }

    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True)
    return environment.get_template("report.html.jinja").render(
        name=folder.rstrip("/").rsplit("/", 1)[-1],
        num_steps=len(metrics),
        sample=sample,
        origin=origin,
        left_out=parts.left_out,
        **shown,
    )


def _not_used(ledger: Mapping[str, Mapping[str, Any]]) -> list[account.Line]:
    """Return what to do about the dropped rows, and what of the rows is not used."""
    counts = account.total(entry["counts"] for entry in ledger.values())
    labels = chain(("what to do",), repeat(""))
    remedies = zip(labels, account.remedies(counts), strict=False)
    return [*remedies, *account.lines(ledger)]


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
