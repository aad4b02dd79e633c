"""The parts of a run's page: each is made of some files of the run's folder, as HTML.

    metrics.jsonl                 summary, numbers, bottleneck, facts
    ledger.json                   ledger
    rejects.jsonl                 rejects
    starts.jsonl                  starts, facts
    skipped_steps.jsonl           skipped
    eval_samples.jsonl            answers
    first_batch.json              sample
    config.json                   summary, settings

A part that cannot be made is left out, and `left-out` says why. `parts.html.jinja` has a macro for
each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader

from miles.common import run_folder
from miles.common.debugging import one_paragraph
from miles.data.stream import account
from miles.errors import MilesError
from miles.report import facts, run_data
from miles.report.columns import Columns
from miles.report.first_batch import shown_samples
from miles.report.run_settings import setting_lines
from miles.report.stalls import bottleneck_of, find_stalls

PAGE_FOLDER = Path(__file__).parent / "page"
MAX_REJECTS = 50
OPEN_REJECTS = 10
"""Rejects that are shown without a click."""
MAX_STALL_ROWS = 8


@dataclass
class RunView:
    """A run's folder, looked at once: its files are read when a part asks for them."""

    folder: str
    columns: Columns
    prepared: Sequence[str] = ()
    """folders of `miles prepare` whose ledgers and dropped rows stand in place of the run's own"""

    def __post_init__(self) -> None:
        self.left_out: list[str] = []
        """a sentence on each part that is not, or not wholly, on the page"""

    def leave_out(self, sentence: str) -> None:
        """Note that something is missing."""
        if sentence not in self.left_out:
            self.left_out.append(sentence)

    def made(self, name: str, make: Callable[[], Any], without: Any) -> Any:
        """Return something for the page, or what stands for it where it cannot be made.

        Args:
            name: of it, for the sentence.
            make: returns it.
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

    @cached_property
    def entries(self) -> list[dict[str, Any]]:
        """The entries of starts.jsonl."""
        return run_data.read_attempts(self.folder, self.leave_out)

    @property
    def starts(self) -> list[dict[str, Any]]:
        """The starts among them."""
        return [entry for entry in self.entries if "start" in entry]


@dataclass(frozen=True)
class Part:
    """A part of the page."""

    name: str
    """of its macro in parts.html.jinja, with hyphens"""
    label: str
    """for the sentence that it cannot be shown"""
    files: tuple[str, ...]
    """of the run's folder that it is made of"""
    values: Callable[[RunView], Mapping[str, Any]]
    """the arguments of its macro"""


def verdict(columns: Columns) -> str:
    """Return a sentence on how long the trainers waited for data, and the remedy."""
    # The first step waits for the stream to start.
    first = min(1, columns.num_steps - 1)
    return f"After the first step {bottleneck_of(columns, first, columns.num_steps - 1)}"


def render(view: RunView, part: Part) -> str:
    """Return the HTML of a part; "" where there is nothing to show."""

    def html() -> str:
        return _call(part.name, part.values(view))

    return view.made(part.label, html, "")


def render_left_out(view: RunView) -> str:
    """Return what the page lacks, as HTML: to be called when all other parts are made."""
    return _call("left-out", {"sentences": view.left_out})


def _call(name: str, values: Mapping[str, Any]) -> str:
    macro = getattr(environment().get_template("parts.html.jinja").module, name.replace("-", "_"))
    return macro(**values)


@cache
def environment() -> Environment:
    """Return the templates of the page. What they are given is text, not HTML."""
    return Environment(loader=FileSystemLoader(PAGE_FOLDER), autoescape=True)


def _summary(view: RunView) -> dict[str, Any]:
    columns = view.columns
    has_epoch = columns.num_steps > 0 and "sft/epoch" in columns
    seconds = columns.seconds[-1] if "perf/step_seconds" in columns else 0
    return {
        "num_steps": columns.num_steps,
        "epoch": float(columns["sft/epoch"][-1]) if has_epoch else 0.0,
        "seconds": facts.shown_seconds(float(seconds)) if seconds else "",
        "training": view.made("What is trained", lambda: run_data.read_training(view.folder), ""),
    }


def _numbers(view: RunView) -> dict[str, Any]:
    """Return the numbers on top of the page with their labels; speeds without the first step."""
    columns = view.columns
    if not columns.num_steps:
        return {"tiles": []}
    loss = columns["sft/loss"]
    tiles = [
        ("loss, first step", _format_loss(loss[0])),
        ("loss, last step", _format_loss(loss[-1])),
    ]

    evaluated = columns.of_lines("eval/loss")
    if evaluated:
        tiles.append(("loss, evaluation", _format_loss(evaluated[-1])))
    if "sft/tokens_seen" in columns:
        tiles.append(("trained tokens", _format_tokens(columns["sft/tokens_seen"][-1])))

    later = slice(min(1, columns.num_steps - 1), None)
    seconds = columns["perf/step_seconds"][later]
    total = float(np.nansum(seconds))
    if total and "data/num_tokens" in columns:
        num_tokens = float(np.nansum(columns["data/num_tokens"][later]))
        tiles.append(("tokens per second", f"{num_tokens / total:,.0f}"))
    if total and "perf/mfu" in columns:
        weighted = float(np.nansum(columns["perf/mfu"][later] * seconds))
        tiles.append(("MFU", f"{weighted / total:.1%}"))

    num_skipped = np.nan_to_num(columns["sft/skipped_steps"][-1])
    if num_skipped:
        tiles.append(("skipped steps", f"{int(num_skipped):,}"))
    return {"tiles": tiles}


def _format_tokens(num_tokens: float) -> str:
    """Return a number of tokens that fits a tile: "209,768", "1.80 billion"."""
    if num_tokens >= 1e9:
        return f"{num_tokens / 1e9:,.2f} billion"
    return f"{int(num_tokens):,}"


def _format_loss(loss: float) -> str:
    return f"{loss:.3f}" if np.isfinite(loss) else "not finite"


def _bottleneck(view: RunView) -> dict[str, Any]:
    columns = view.columns
    needed = ("data/prefetch_queue_depth", "data/wait_seconds", "perf/step_seconds")
    if not columns.num_steps or not all(key in columns for key in needed):
        return {"verdict": "", "stalls": [], "num_stalls": 0}

    stalls = find_stalls(columns)
    longest = sorted(stalls, key=lambda stall: -stall.wait_seconds)[:MAX_STALL_ROWS]
    rows = []
    for stall in longest:
        rows.append(
            {
                "first": int(columns["step"][stall.first]),
                "last": int(columns["step"][stall.last]),
                "waited": facts.shown_seconds(stall.wait_seconds),
                "cause": stall.cause,
            }
        )
    return {"verdict": verdict(columns), "stalls": rows, "num_stalls": len(stalls)}


def _ledger(view: RunView) -> dict[str, Any]:
    # A run of prepared rows has dropped none; what `miles prepare` dropped is the account.
    ledger = run_data.read_ledger(view.folder)
    if view.prepared:
        ledger = run_data.read_prepared_ledgers(view.prepared)
    not_used = view.made("What is not used", lambda: _not_used(ledger), [])
    return {"ledger": ledger, "not_used": not_used}


def _not_used(ledger: Mapping[str, Mapping[str, Any]]) -> list[account.Line]:
    """Return what to do about the dropped rows, and what of the rows is not used."""
    counts = account.total(entry["counts"] for entry in ledger.values())
    labels = chain(("what to do",), repeat(""))
    remedies = zip(labels, account.remedies(counts), strict=False)
    return [*remedies, *account.lines(ledger)]


def _rejects(view: RunView) -> dict[str, Any]:
    rejects = run_data.read_rejects(view.prepared or (view.folder,), view.leave_out)
    return {
        "rejects": rejects[:OPEN_REJECTS],
        "others": rejects[OPEN_REJECTS:MAX_REJECTS],
        "num_more": max(len(rejects) - MAX_REJECTS, 0),
    }


def _starts(view: RunView) -> dict[str, Any]:
    return {"starts": run_data.starts_and_ends(view.entries)}


def _skipped(view: RunView) -> dict[str, Any]:
    return {"steps": run_data.read_skipped_steps(view.folder, view.leave_out)}


def _answers(view: RunView) -> dict[str, Any]:
    prompts = run_data.read_answers(view.folder, view.leave_out)
    return {"step": prompts[0]["step"] if prompts else 0, "prompts": prompts}


def _sample(view: RunView) -> dict[str, Any]:
    batch = run_data.read_first_batch(view.folder)
    return {"samples": shown_samples(batch) if batch is not None else []}


def _settings(view: RunView) -> dict[str, Any]:
    lines = setting_lines(run_data.read_settings(view.folder))
    changed = [line for line in lines if line.is_changed]
    return {"changed": changed, "others": [line for line in lines if not line.is_changed]}


def _facts(view: RunView) -> dict[str, Any]:
    groups = [
        ("Model", view.made("The model", lambda: facts.model_facts(view.starts), [])),
        ("Hardware", view.made("The hardware", lambda: facts.hardware_facts(view.starts), [])),
        ("Versions", view.made("The versions", lambda: facts.version_facts(view.starts), [])),
        (
            "Durations",
            view.made(
                "The durations", lambda: facts.duration_facts(view.entries, view.columns), []
            ),
        ),
    ]
    return {"groups": [group for group in groups if group[1]]}


PARTS = (
    Part("summary", "The summary", (run_folder.METRICS, run_folder.CONFIG), _summary),
    Part("numbers", "The numbers on top", (run_folder.METRICS,), _numbers),
    Part("bottleneck", "The bottleneck", (run_folder.METRICS,), _bottleneck),
    Part("answers", "The answers", (run_folder.EVAL_SAMPLES,), _answers),
    Part("ledger", "The ledger", (run_folder.LEDGER,), _ledger),
    Part("rejects", "The dropped rows", (run_folder.REJECTS,), _rejects),
    Part("skipped", "The skipped steps", (run_folder.SKIPPED_STEPS,), _skipped),
    Part("starts", "The starts", (run_folder.ATTEMPTS,), _starts),
    Part("sample", "The first batch", (run_folder.FIRST_BATCH,), _sample),
    Part("settings", "The settings", (run_folder.CONFIG,), _settings),
    Part("facts", "The facts", (run_folder.METRICS, run_folder.ATTEMPTS), _facts),
)
"""In the order of the page."""
LEFT_OUT = "left-out"
ON_TOP = ("summary", "numbers", LEFT_OUT)
"""Parts that stand above the curves."""
