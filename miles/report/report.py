"""A run's folder -> what a person looks at: report.html, loss.png, and the first batch in the terminal."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader
from rich.console import Console

from miles.common import json_lines, run_folder, storage
from miles.data.config import EncodeConfig
from miles.data.notebook import preview
from miles.data.stream.bottleneck import Stall
from miles.data.tokens.load import load_tokenizer
from miles.errors import SourceError
from miles.train.driver.metrics import timing_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_REJECTS = 50
MAX_SKIPPED = 20
MAX_STARTS = 20
_SKIPPED_ROWS = 3
_EVALUATED: dict[str, Any] = {"linestyle": "--", "marker": "o", "markersize": 4}
MAX_ANSWERS = 4

Metrics = Mapping[str, Any]


def read_metrics(folder: str) -> list[Metrics]:
    """The lines of metrics.jsonl.

    Raises:
        SourceError: there is none, or it is empty.
    """
    path = storage.join(folder, run_folder.METRICS)
    if not storage.exists(path):
        raise SourceError(
            f"{path}: no such file; expected the folder of a run (--output-dir, or --save)"
        )
    lines: list[Metrics] = [*json_lines.read(path)]
    if not lines:
        raise SourceError(f"{path}: no step was trained yet")
    return lines


def write_report(folder: str, prepared: Sequence[str] = ()) -> tuple[str, str]:
    """Writes report.html, which needs no network, and loss.png.

    Args:
        folder: of a run (fsspec URL).
        prepared: folders that `miles prepare` wrote, whose ledgers are shown in place of the run's own.

    Returns:
        both paths.
    """
    metrics = read_metrics(folder)
    rejects, ledger = _ledgers(folder, prepared)
    fed, origin = "", ""
    first = _first_batch(folder)
    if first is not None:
        tokenizer = load_tokenizer(EncodeConfig(first["tokenizer"], chat_template=""))
        segments = [segment for batch in first["micro_batches"] for segment in batch]
        longest = max(segments[:20], key=lambda segment: len(segment["input_ids"]))
        fed = preview.to_html((longest["input_ids"], longest["loss_mask"]), tokenizer)
        origin = f"Row {longest['row']} of {longest['file']}."
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True)
    page = environment.get_template("report.html.jinja").render(
        name=folder.rstrip("/").rsplit("/", 1)[-1],
        steps=len(metrics),
        epoch=metrics[-1]["sft/epoch"],
        numbers=_numbers(metrics),
        chart=base64.b64encode(_png(chart(metrics))).decode(),
        verdict=verdict(metrics),
        ledger=ledger,
        rejects=rejects[:MAX_REJECTS],
        fed=fed,
        origin=origin,
        answers=_answers(folder),
        skipped=_skipped(folder),
        starts=_starts(folder),
    )
    html_path = storage.join(folder, run_folder.REPORT)
    png_path = storage.join(folder, run_folder.LOSS_CHART)
    storage.write_text(html_path, page)
    fs, path = storage.filesystem(png_path)
    fs.pipe_file(path, _png(chart(metrics, only_loss=True)))
    return html_path, png_path


def inspect_run(folder: str, console: Console, num_samples: int) -> None:
    """Prints what the model was fed first, coloured by its mask.

    Raises:
        SourceError: the run kept no first batch.
    """
    first = _first_batch(folder)
    if first is None:
        raise SourceError(
            f"{storage.join(folder, run_folder.FIRST_BATCH)}: no such file; expected the folder of a run"
        )
    tokenizer = load_tokenizer(EncodeConfig(first["tokenizer"], chat_template=""))
    segments = [segment for batch in first["micro_batches"] for segment in batch]
    for segment in segments[:num_samples]:
        trained = sum(segment["loss_mask"])
        console.rule(
            f"{segment['source']} · {segment['file']} row {segment['row']} · {len(segment['input_ids'])} tokens, "
            f"{trained} trained",
            align="left",
        )
        console.print(preview.to_text((segment["input_ids"], segment["loss_mask"]), tokenizer))
    console.print(
        f"[dim]{min(num_samples, len(segments))} of the first step's {len(segments)} samples[/dim]"
    )


def verdict(metrics: Sequence[Metrics]) -> str:
    """Whether the loader kept the trainers waiting, and what to look at."""
    return f"After the first step {Stall.over(map(timing_of, metrics[1:] or metrics))}"


def _numbers(metrics: Sequence[Metrics]) -> list[tuple[str, str]]:
    first, last, later = metrics[0], metrics[-1], metrics[1:] or metrics
    seconds = sum(line["perf/step_seconds"] for line in later)
    tokens = sum(line["data/num_tokens"] for line in later) / seconds
    numbers = [
        ("loss, first step", _shown(first["sft/loss"])),
        ("loss, last step", _shown(last["sft/loss"])),
        ("trained tokens", f"{last['sft/tokens_seen']:,}"),
        ("tokens per second", f"{tokens:,.0f}"),
    ]
    evaluated = [line["eval/loss"] for line in metrics if "eval/loss" in line]
    if evaluated:
        numbers.insert(2, ("loss, evaluation", _shown(evaluated[-1])))
    if "perf/mfu" in last:
        mean = sum(line["perf/mfu"] * line["perf/step_seconds"] for line in later) / seconds
        numbers.append(("MFU", f"{mean:.1%}"))
    if last["sft/skipped_steps"]:
        numbers.append(("skipped steps", f"{last['sft/skipped_steps']:,}"))
    return numbers


def _shown(loss: float | None) -> str:
    return "not finite" if loss is None else f"{loss:.3f}"


def _ledgers(
    folder: str, prepared: Sequence[str]
) -> tuple[list[dict[str, Any]], dict[str, dict[str, Any]]]:
    """Every dropped row, and of each source what `Ledger.summary` says."""
    rejects: list[dict[str, Any]] = []
    sources: dict[str, dict[str, Any]] = {}
    for place in prepared or (folder,):
        rejects += json_lines.read(storage.join(place, run_folder.REJECTS))
    for place in prepared:
        summary = json.loads(storage.read_text(storage.join(place, run_folder.SUMMARY)))
        sources.update(summary["ledger"])
    ledger = storage.join(folder, run_folder.LEDGER)
    if not prepared and storage.exists(ledger):
        sources = json.loads(storage.read_text(ledger))
    return rejects, sources


def _answers(folder: str) -> list[dict[str, Any]]:
    """What the last evaluation was answered (`--eval-samples`)."""
    answers = json_lines.read(storage.join(folder, run_folder.EVAL_SAMPLES))
    return [answer for answer in answers if answer["step"] == answers[-1]["step"]][:MAX_ANSWERS]


def _skipped(folder: str) -> list[dict[str, str]]:
    """The last steps that took no optimizer step since something was not finite, each with a few of its rows."""
    shown = []
    entries = json_lines.read(storage.join(folder, run_folder.SKIPPED_STEPS))
    for entry in entries[-MAX_SKIPPED:]:
        rows = [f"row {row['row']} of {row['file']}" for row in entry["rows"][:_SKIPPED_ROWS]]
        if more := len(entry["rows"]) - len(rows):
            rows.append(f"and {more} more")
        shown.append(
            {"step": str(entry["step"]), "reason": entry["reason"], "rows": "\n".join(rows)}
        )
    return shown


def _starts(folder: str) -> list[dict[str, str]]:
    """The last starts of a run that had more than one, with how each ended."""
    entries = json_lines.read(storage.join(folder, run_folder.ATTEMPTS))
    if not entries:
        return []
    ends = {entry["end"]: entry["how"] for entry in entries if "end" in entry}
    begun = [entry for entry in entries if "start" in entry]
    newest = begun[-1]["start"]
    shown = [
        {
            "time": entry["time"],
            "step": f"{entry['first_step']:,}",
            "ranks": str(entry["world_size"]),
            "reason": entry["reason"],
            "end": ends.get(entry["start"], "" if entry["start"] == newest else "killed"),
        }
        for entry in begun[-MAX_STARTS:]
    ]
    return shown if len(begun) > 1 else []


def _first_batch(folder: str) -> dict[str, Any] | None:
    path = storage.join(folder, run_folder.FIRST_BATCH)
    if not storage.exists(path):
        return None
    content: dict[str, Any] = json.loads(storage.read_text(path))
    return content


def chart(metrics: Sequence[Metrics], *, only_loss: bool = False) -> Figure:
    """Curves over the steps: loss, and unless `only_loss` loss by source, queue depth and tokens per second."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    steps = [line["step"] for line in metrics]
    layout = ConstrainedLayoutEngine(
        h_pad=0.1
    )  # inches; a title keeps its distance from the panel above
    figure = Figure(figsize=(8, 4.2) if only_loss else (10, 6.4), layout=layout)
    axes = [figure.subplots()] if only_loss else list(figure.subplots(2, 2).flat)
    axes[0].plot(*_points(metrics, "sft/loss"), color="#2463eb", label="sft/loss")
    axes[0].set(title="sft/loss", ylim=(0, None))
    if any("eval/loss" in line for line in metrics):
        axes[0].plot(
            *_points(metrics, "eval/loss"), **_EVALUATED, color="#ea580c", label="eval/loss"
        )
        axes[0].set(title="sft/loss and eval/loss")
        axes[0].legend(frameon=False)
    if not only_loss:
        by_source: dict[
            str, Any
        ] = {}  # one entry of the legend each: with two, it covers the curves
        for kind, style in (("sft/loss/", {}), ("eval/loss/", _EVALUATED)):
            for key in sorted({key for line in metrics for key in line if key.startswith(kind)}):
                name = key.removeprefix(kind)
                color = by_source[name].get_color() if name in by_source else None
                (curve,) = axes[1].plot(*_points(metrics, key), **style, color=color, label=key)
                by_source.setdefault(name, curve)
        is_evaluated = any(key.startswith("eval/loss/") for line in metrics for key in line)
        axes[1].set(
            title="loss by source" + (" (dashed: eval/loss)" if is_evaluated else ""),
            ylim=(0, None),
        )
        axes[1].legend(
            by_source.values(), by_source, fontsize="small", framealpha=0.7, edgecolor="none"
        )
        axes[2].step(
            steps,
            [line["data/prefetch_queue_depth"] for line in metrics],
            where="mid",
            color="#16a34a",
        )
        axes[2].set(title="data/prefetch_queue_depth", ylim=(0, None))
        axes[3].plot(steps, [line["perf/tokens_per_second"] for line in metrics], color="#9333ea")
        axes[3].set(title="perf/tokens_per_second", ylim=(0, None))
    for axis in axes:
        axis.set_xlabel("step")
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    return figure


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _points(metrics: Sequence[Metrics], key: str) -> tuple[list[int], list[float]]:
    """Steps that have the key, and its values; a gap where one was not finite."""
    lines = [line for line in metrics if key in line]
    return [line["step"] for line in lines], [
        math.nan if line[key] is None else line[key] for line in lines
    ]
