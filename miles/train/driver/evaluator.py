"""Evaluation during a run: the loss on rows that are not trained on, and a few greedy answers.

    eval/loss = sum over trained tokens of the evaluation rows / their number, overall and for each source

Answers go to `eval_samples.jsonl` in the run's folder, one a line, beside what the row itself says there:

    {"step": 100, "source": "chat", "file": "…", "row": 7, "prompt": "…", "answer": "…", "expected": "…", "ended": true}
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any, Protocol

from miles.common import json_lines, run_folder, storage
from miles.data.stream.eval_set import EvalPrompt, EvalSet, eval_config
from miles.train.config import TrainConfig
from miles.train.driver.metrics import Metrics, eval_metrics
from miles.train.driver.run_log import Journal


class Ranks(Protocol):
    """What calls a method of every trainer."""

    def call(self, method: str, *arguments: Any) -> list[Any]: ...


class Evaluator:
    """An evaluation set and when it is gone through.

    Args:
        config: of the run.
        rows: to evaluate on.
    """

    def __init__(self, config: TrainConfig, rows: EvalSet) -> None:
        self._config, self._rows = config, rows
        self._prompts: Sequence[EvalPrompt] = rows.prompts(config.evaluation.num_samples)

    @classmethod
    def open(cls, config: TrainConfig, journal: Journal) -> Evaluator | None:
        """Encodes the rows; None where nothing is to be evaluated.

        Raises:
            MilesError: rows that cannot be used, or none.
        """
        if not config.evaluation.sources and not config.data.held_out_fraction:
            return None
        rows = EvalSet.open(eval_config(config.data, config.evaluation.sources))
        journal.say(
            f"evaluation: {rows.num_samples:,} samples, {rows.num_trained_tokens:,} trained tokens, of "
            f"{', '.join(rows.source_names)}"
        )
        return cls(config, rows)

    def is_due(self, done: int, *, is_last: bool, is_saved: bool) -> bool:
        """Whether to evaluate after so many steps: at intervals, at the end, and where checkpoints are compared."""
        interval = self._config.evaluation.interval
        at_interval = interval is not None and done % interval == 0
        return at_interval or is_last or (is_saved and self._config.keep_best is not None)

    def run(self, ranks: Ranks, done: int) -> Metrics:
        """Evaluates, and writes answers.

        Args:
            done: steps that were trained.

        Returns:
            `eval/…` of metrics.jsonl.
        """
        started = time.perf_counter()
        num_sources = len(self._rows.source_names)
        losses, tokens = ranks.call("evaluate", self._rows.references, num_sources)[-1]
        if self._prompts:
            self._write_answers(ranks, done)
        return eval_metrics(self._rows.source_names, losses, tokens, time.perf_counter() - started)

    def _write_answers(self, ranks: Ranks, done: int) -> None:
        stop_ids = self._rows.terminator_ids
        prompts = [prompt.prompt_ids for prompt in self._prompts]
        limit = self._config.evaluation.max_response_tokens
        answers = ranks.call("generate", prompts, stop_ids, limit)[-1]
        path = storage.join(self._config.run_dir, run_folder.EVAL_SAMPLES)
        lines = json_lines.keep_before(path, done)
        for prompt, answer in zip(self._prompts, answers, strict=True):
            said = {
                "step": done,
                "source": prompt.source,
                "file": prompt.file,
                "row": prompt.row,
                "prompt": self._rows.decode(prompt.prompt_ids),
                "answer": self._rows.decode(answer),
                "expected": self._rows.decode(prompt.answer_ids),
                "ended": answer[-1] in stop_ids,
            }
            lines.append(json.dumps(said, ensure_ascii=False))
        json_lines.write(path, lines)
