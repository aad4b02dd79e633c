"""Show the samples of the first step, with the trained tokens marked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup
from rich.console import Console
from rich.text import Text

from miles.common import run_folder, storage
from miles.common.counts import counted
from miles.common.debugging import unchained
from miles.common.near_names import meant_path
from miles.common.prose import Prose
from miles.common.screen import WIDE_COLUMNS, has_colours, printable
from miles.data.config import EncodeConfig
from miles.data.notebook import preview
from miles.data.tokens.load import load_tokenizer
from miles.errors import BrokenFileError, SourceError, TemplateError
from miles.report.run_data import FirstBatch, read_first_batch, read_rejects

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_NO_FIRST_BATCH = (
    "Nothing but miles inspect and miles report reads it, and the run goes on without it. The first "
    "step of a new run writes another"
)
_SHOWN_OF = 20
"""The page shows the longest of this many samples, and"""
_SHOWN_OTHERS = 3
"""this many others."""
_SHOWN_TOKENS = 4_000
"""The limit of each sample."""


@unchained
def inspect_run(
    folder: str,
    console: Console,
    num_samples: int,
    *,
    rows: Sequence[int] | None = None,
    where: str | None = None,
    seed: int = 0,
) -> None:
    """Print the samples of a run's first step, the trained tokens marked.

    Args:
        rows: those of these rows.
        where: "longest", "least_trained" or "random"; "dropped": the first rows that the run
            dropped, with the reason.
        seed: of the random ones.

    Raises:
        SourceError: the run kept no first batch, or a broken one.
        TemplateError: its tokenizer is gone.
    """
    try:
        batch = read_first_batch(folder)
    except BrokenFileError as error:
        raise BrokenFileError(f"{error}. {_NO_FIRST_BATCH}") from error
    if batch is None:
        path = storage.join(folder, run_folder.FIRST_BATCH)
        raise SourceError(f"{path}: no such file; expected the folder of a run{meant_path(folder)}")

    if where == "dropped":
        _print_dropped(folder, console, num_samples)
        return
    shown = _chosen(batch, rows, where, seed)[: None if rows else num_samples]
    tokenizer = _tokenizer_of(batch)
    is_coloured = has_colours(console)
    columns = console.width if console.width < WIDE_COLUMNS else None
    console.print(Prose(Text(preview.legend(has_colours=is_coloured), "dim")), soft_wrap=True)
    for sample in shown:
        title = (
            f"{sample['source']} · {sample['file']} row {sample['row']} · "
            f"{len(sample['input_ids'])} tokens, {sum(sample['loss_mask'])} trained"
        )
        console.print(Prose(Text(f"\n{title}", "bold")), soft_wrap=True)  # never cut
        tokens = (sample["input_ids"], sample["loss_mask"])
        console.print(
            preview.to_text(tokens, tokenizer, columns=columns, has_colours=is_coloured),
            soft_wrap=True,
        )
    console.print(
        Text(f"\n{len(shown)} of the first step's {counted(len(batch.samples), 'sample')}", "dim")
    )


@dataclass(frozen=True)
class ShownSample:
    """A sample of the first step, for the page."""

    title: str
    tokens: Markup
    """HTML: trained tokens in a span of class `t`, the others in one of class `c`"""


def _chosen(
    batch: FirstBatch, rows: Sequence[int] | None, where: str | None, seed: int
) -> list[Mapping[str, Any]]:
    """Return the samples of a first batch in the order in which they are asked for."""
    samples = list(batch.samples)
    if rows:
        return [sample for sample in samples if sample["row"] in rows]
    if where == "longest":
        samples.sort(key=lambda sample: -len(sample["input_ids"]))
    elif where == "least_trained":
        samples.sort(key=lambda sample: sum(sample["loss_mask"]) / max(len(sample["loss_mask"]), 1))
    elif where == "random":
        order = np.random.default_rng(seed).permutation(len(samples))
        return [samples[place] for place in order]
    return samples


def _print_dropped(folder: str, console: Console, num_rows: int) -> None:
    """Print the first rows that a run dropped, with the reason."""
    rejects = read_rejects([folder], lambda sentence: None)
    for reject in rejects[:num_rows]:
        text = f"row {reject['row']} of {reject['file']}: {reject['reason']}"
        detail = f" ({reject['detail']})" if reject.get("detail") else ""
        console.print(Prose(f"  {text}{detail}"), soft_wrap=True)
    was = "was" if len(rejects) == 1 else "were"
    console.print(Text(f"{counted(len(rejects), 'row')} {was} dropped", "dim"))


def shown_samples(batch: FirstBatch) -> list[ShownSample]:
    """Return some of the first samples as HTML, the longest one first.

    Raises:
        TemplateError: its tokenizer is gone.
    """
    longest = _longest(batch)
    others = [sample for sample in batch.samples[:_SHOWN_OF] if sample is not longest]
    tokenizer = _tokenizer_of(batch)
    return [_shown_sample(sample, tokenizer) for sample in (longest, *others[:_SHOWN_OTHERS])]


def _shown_sample(sample: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> ShownSample:
    ids = sample["input_ids"]
    mask = sample["loss_mask"]
    title = (
        f"{sample['source']}: row {sample['row']} of {sample['file']}, {sum(mask):,} of "
        f"{len(ids):,} tokens trained"
    )
    if len(ids) > _SHOWN_TOKENS:
        title += f" (the first {_SHOWN_TOKENS:,} are shown)"

    pieces = preview.pieces(ids[:_SHOWN_TOKENS], mask[:_SHOWN_TOKENS], tokenizer)
    spans = []
    for is_trained, run in groupby(pieces, lambda piece: piece.is_trained):
        tokens = Markup().join(_token(piece) for piece in run)
        spans.append(
            Markup('<span class="{}">{}</span>').format("t" if is_trained else "c", tokens)
        )
    return ShownSample(title, Markup().join(spans))


def _token(piece: preview.Piece) -> Markup:
    text = printable(piece.text).replace("\n", "↵\n")
    return Markup('<i title="{}">{}</i>').format(" ".join(map(str, piece.token_ids)), text)


def _longest(batch: FirstBatch) -> Mapping[str, Any]:
    return max(batch.samples[:_SHOWN_OF], key=lambda sample: len(sample["input_ids"]))


def _tokenizer_of(batch: FirstBatch) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a first batch.

    Raises:
        TemplateError: says what can be told without it.
    """
    try:
        return load_tokenizer(EncodeConfig(batch.tokenizer, chat_template=""))
    except TemplateError as error:
        sample = _longest(batch)
        raise TemplateError(
            f"the first batch has {counted(len(batch.samples), 'sample')}, the longest of "
            f"{len(sample['input_ids'])} tokens, {sum(sample['loss_mask'])} of them trained (row "
            f"{sample['row']} of {sample['file']}); its ids cannot be shown as text without the "
            f"run's tokenizer: {error}"
        ) from error
