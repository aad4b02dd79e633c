"""Answers to the rows of a file, as JSON lines in their order.

    rows 0 … 255  ->  prompts, the shortest first, in batches  ->  answers  ->  256 lines

    {"row": 7, "messages": […], "answer": "4", "prompt_tokens": 31, "answer_tokens": 2,
     "finish": "stop"}

Beside FILE stands FILE.settings.json, which says of what the answers are. A second start with the
same settings goes on behind the complete lines. The batch size is none of them: it changes no
answer.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from miles.chat.model import ChatModel
from miles.chat.prompt_rows import Prompt, PromptRows
from miles.chat.settings import Sampling
from miles.common import own_files, storage
from miles.common.counts import counted
from miles.common.patient_file import PatientFile
from miles.common.redact import redact
from miles.data.rejecting import or_rejected
from miles.data.types import RowRejected
from miles.errors import ConfigError, SourceError

_CHUNK_BATCHES = 16
"""Batches whose rows are sorted by length, and written, together."""
_TOLD_SECONDS = 10.0


@dataclass
class Counts:
    """The rows of a file, by what became of them."""

    num_rows: int
    num_rejected: int = 0
    num_cut: int = 0
    """answers that came to the limit"""

    def add(self, line: Mapping[str, Any]) -> None:
        """Count the line of a row."""
        self.num_rejected += line.get("finish") == "rejected"
        self.num_cut += line.get("finish") == "length"


@dataclass(frozen=True)
class Target:
    """The file to write, and what it says of its answers."""

    url: str
    settings: Mapping[str, Any]
    """what decides the answers, as JSON types"""

    @property
    def settings_url(self) -> str:
        return f"{self.url}.settings.json"

    def open(self) -> PatientFile:
        """Return the file with its complete lines; one that was cut off is removed.

        Raises:
            ConfigError: the file holds other answers.
            MilesError: it cannot be read, or not be written.
        """
        if not storage.exists(self.url):
            storage.write_text(self.settings_url, json.dumps(self.settings, indent=1) + "\n")
            return PatientFile(self.url, report=_say_nothing)

        shown = redact(self.url)
        try:
            before = own_files.read_object(self.settings_url)
        except SourceError as error:
            raise ConfigError(
                f"--output {shown}: is there, and {redact(self.settings_url)}, which says of what "
                "it is, cannot be read: give another file, or remove this one"
            ) from error

        now = json.loads(json.dumps(self.settings))
        others = sorted(key for key in {*before, *now} if before.get(key) != now.get(key))
        if others:
            raise ConfigError(
                f"--output {shown}: holds answers under another {', '.join(others)}: give another "
                "file, or remove this one"
            )
        return PatientFile.read(self.url, _say_nothing)


def _say_nothing(text: str) -> None:
    """Leave it to `require_written` to say that the file cannot be written."""


def settings_of(
    title: str, rows: PromptRows, model: ChatModel, sampling: Sampling, *, keep: bool
) -> dict[str, Any]:
    """Return what decides the lines.

    Args:
        title: names the model.
        keep: as for `generate`.
    """
    return {
        "model": title,
        "prompts": rows.manifest.fingerprint,
        "encoder": model.prompts.certificate.fingerprint,
        "computed_in": model.device,
        "keep": keep,
        **asdict(sampling),
    }


def generate(
    rows: PromptRows,
    model: ChatModel,
    sampling: Sampling,
    target: Target,
    *,
    batch_size: int,
    keep: bool,
    tell: Callable[[str], None],
) -> Counts:
    """Answer every row that is not answered yet.

    Args:
        keep: put the row's own last answer beside each answer, as "reference".
        tell: is told how far it is.

    Raises:
        MilesError: a file that cannot be read or written, or other answers in it.
    """
    file = target.open()
    counts = Counts(rows.num_rows)
    num_earlier = len(file.lines)
    for number, earlier in enumerate(file.lines, 1):
        try:
            counts.add(json.loads(earlier))
        except (ValueError, AttributeError) as error:
            raise SourceError(
                f"{redact(target.url)}, line {number}: no line of answers: give another file, or "
                "remove this one"
            ) from error
    if num_earlier:
        tell(f"answered already: {num_earlier:,} of {counted(rows.num_rows, 'row')}")
    num_tokens = 0
    begun = told = time.monotonic()

    for begin in range(num_earlier, rows.num_rows, batch_size * _CHUNK_BATCHES):
        end = min(begin + batch_size * _CHUNK_BATCHES, rows.num_rows)
        for line in _answer_chunk(rows, (begin, end), model, sampling, batch_size):
            reference = line.pop("reference")
            if keep and reference is not None:
                line["reference"] = reference
            counts.add(line)
            num_tokens += line.get("answer_tokens", 0)
            file.lines.append(_as_text(line))
        file.require_written()

        now = time.monotonic()
        if now - told > _TOLD_SECONDS:
            told = now
            tell(
                f"{end:,} of {counted(rows.num_rows, 'row')}, {num_tokens / (now - begun):,.0f} tokens "
                "a second"
            )
    return counts


def _as_text(line: Mapping[str, Any]) -> str:
    """Return a line as JSON, in ASCII where it holds what UTF-8 cannot write."""
    try:
        text = json.dumps(line, ensure_ascii=False)
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        return json.dumps(line)
    return text


def _answer_chunk(
    rows: PromptRows,
    chunk: tuple[int, int],
    model: ChatModel,
    sampling: Sampling,
    batch_size: int,
) -> list[dict[str, Any]]:
    """Return the lines of some rows, in their order."""
    lines: dict[int, dict[str, Any]] = {}
    prompts: dict[int, list[int]] = {}
    for row, prompt in enumerate(rows.read(*chunk), chunk[0]):
        ids = prompt if isinstance(prompt, RowRejected) else _ids_of(prompt, model)
        if isinstance(ids, RowRejected):
            lines[row] = {"row": row, "finish": "rejected", "reason": str(ids), "reference": None}
            continue
        assert isinstance(prompt, Prompt)
        prompts[row] = ids
        lines[row] = _line_of(row, prompt)

    by_length = sorted(prompts, key=lambda row: (len(prompts[row]), row))
    for first in range(0, len(by_length), batch_size):
        batch = by_length[first : first + batch_size]
        answers = answer_batch([prompts[row] for row in batch], model, sampling, batch)
        for row, answer in zip(batch, answers, strict=True):
            has_ended = model.decoder.ends(answer)
            text_ids = answer[: -model.decoder.num_terminator_tokens] if has_ended else answer
            lines[row] |= {
                "answer": model.prompts.decode(text_ids),
                "prompt_tokens": len(prompts[row]),
                "answer_tokens": len(answer),
                "finish": "stop" if has_ended else "length",
            }
    return [lines[row] for row in sorted(lines)]


def answer_batch(
    prompts: Sequence[Sequence[int]], model: ChatModel, sampling: Sampling, rows: Sequence[int]
) -> list[list[int]]:
    """Return the token ids of the answers to prompts, terminators included.

    Args:
        rows: the number of each prompt, with which the seed decides its draws.
    """
    answers: list[list[int]] = [[] for _ in prompts]
    for step in model.decoder.steps(prompts, sampling, rows):
        for number, token in step.items():
            answers[number].append(token)
    return answers


def _line_of(row: int, prompt: Prompt) -> dict[str, Any]:
    line: dict[str, Any] = {"row": row, "messages": list(prompt.messages)}
    if prompt.tools is not None:
        line["tools"] = list(prompt.tools)
    line["reference"] = prompt.reference
    return line


def _ids_of(prompt: Prompt, model: ChatModel) -> list[int] | RowRejected:
    """Return the ids of a prompt, or why there are none."""
    ids = or_rejected(model.prompts.ids, prompt.messages, prompt.tools, prompt.template_kwargs)
    if isinstance(ids, RowRejected):
        return ids
    if len(ids) >= model.decoder.max_tokens:
        limit = model.decoder.max_tokens
        return RowRejected(
            "too_long", f"{len(ids)} tokens; the model takes {limit} with the answer"
        )
    return ids.tolist()
