"""Evaluation during a run: the loss on rows that are not trained on, and a few greedy answers.

    eval/loss = sum over trained tokens of the evaluation rows / their number, overall and by source

Answers go to `eval_samples.jsonl` in the run folder, one a line, beside the answer in the row:

    {"step": 100, "source": "chat", "file": "…", "row": 7, "prompt": "…", "answer": "…",
     "expected": "…", "ended": true}
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence

from miles.common import json_lines, run_folder, storage
from miles.common.counts import counted
from miles.common.patient_file import PatientFile, Report
from miles.data.stream import account
from miles.data.stream.eval_rows import eval_config
from miles.data.stream.eval_set import EvalPrompt, EvalSet
from miles.data.stream.survey import EvalSurvey
from miles.train.config import TrainConfig
from miles.train.driver.group import TrainerGroup
from miles.train.driver.metrics import Metrics, eval_metrics
from miles.train.driver.run_log import RunLog


class Evaluator:
    """Evaluates the model of a run on an evaluation set.

    Args:
        config: of the run.
        rows: to evaluate on.
        report: is told what cannot be written.
    """

    def __init__(self, config: TrainConfig, rows: EvalSet, report: Report = print) -> None:
        self._config = config
        self._rows = rows
        self._prompts: Sequence[EvalPrompt] = rows.prompts(config.evaluation.num_samples)
        path = storage.join(config.run_dir, run_folder.EVAL_SAMPLES)
        self._file = PatientFile.read(path, report)

    @classmethod
    def open(
        cls, config: TrainConfig, run_log: RunLog, eval_survey: EvalSurvey | None
    ) -> Evaluator | None:
        """Encode the rows to evaluate on; return None if the run has none.

        Args:
            eval_survey: of sources for evaluation, whose rows are counted already.

        Raises:
            MilesError: rows that cannot be used, or none that can.
        """
        if not config.evaluation.sources and not config.data.held_out_fraction:
            return None
        manifest = eval_survey.manifest if eval_survey is not None else None
        rows = EvalSet.open(eval_config(config.data, config.evaluation.sources), manifest)
        run_log.report(
            f"evaluation: {counted(rows.num_samples, 'sample')}, {rows.num_trained_tokens:,} trained "
            f"tokens, of {', '.join(rows.source_names)}"
        )
        for line in account.as_text(rows.account, "evaluation, "):
            run_log.report(line)
        return cls(config, rows, run_log.report)

    def run(self, group: TrainerGroup, num_done: int) -> Metrics:
        """Evaluate the model, and write answers.

        Args:
            num_done: steps that the model is trained.

        Returns:
            the keys `eval/…` of metrics.jsonl.
        """
        started = time.perf_counter()
        sums = group.evaluate(self._rows.references, len(self._rows.source_names))
        if self._prompts:
            self._write_answers(group, num_done)
        return eval_metrics(self._rows.source_names, sums, time.perf_counter() - started)

    def _write_answers(self, group: TrainerGroup, num_done: int) -> None:
        stop_ids = self._rows.terminator_ids
        prompts = [prompt.prompt_ids for prompt in self._prompts]
        limit = self._config.evaluation.max_response_tokens
        answers = group.generate(prompts, stop_ids, limit)

        # A resumed run comes by these steps again.
        self._file.keep(json_lines.is_before(num_done))
        for prompt, answer in zip(self._prompts, answers, strict=True):
            line = {
                "step": num_done,
                "source": prompt.source,
                "file": prompt.file,
                "row": prompt.row,
                "prompt": self._rows.decode(prompt.prompt_ids),
                "answer": self._rows.decode(answer),
                "expected": self._rows.decode(prompt.answer_ids),
                "ended": answer[-1] in stop_ids,
            }
            self._file.add(json.dumps(line, ensure_ascii=False))
        self._file.flush()

    def close(self) -> None:
        """Report what the file of the answers lacks."""
        self._file.close()
