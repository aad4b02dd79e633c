"""Show the samples of the first step, with the trained tokens marked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from miles.common import run_folder, storage
from miles.common.debugging import unchained
from miles.common.screen import WIDE_COLUMNS, has_colours
from miles.data.config import EncodeConfig
from miles.data.notebook import preview
from miles.data.tokens.load import load_tokenizer
from miles.errors import BrokenFileError, SourceError, TemplateError
from miles.report.run_data import FirstBatch, read_first_batch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_NO_FIRST_BATCH = (
    "Nothing but miles inspect and miles report reads it, and the run goes on without it. The first "
    "step of a new run writes another"
)
_SHOWN_OF = 20
"""The page shows the longest of this many samples."""


@unchained
def inspect_run(folder: str, console: Console, num_samples: int) -> None:
    """Print the samples of a run's first step, the trained tokens marked.

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
        raise SourceError(f"{path}: no such file; expected the folder of a run")

    shown = batch.samples[:num_samples]
    tokenizer = _tokenizer_of(batch)
    is_coloured = has_colours(console)
    columns = console.width if console.width < WIDE_COLUMNS else None
    console.print(Text(preview.legend(has_colours=is_coloured), "dim"), soft_wrap=True)
    for sample in shown:
        title = (
            f"{sample['source']} · {sample['file']} row {sample['row']} · "
            f"{len(sample['input_ids'])} tokens, {sum(sample['loss_mask'])} trained"
        )
        console.print(Text(f"\n{title}", "bold"), soft_wrap=True)  # never cut
        tokens = (sample["input_ids"], sample["loss_mask"])
        console.print(
            preview.to_text(tokens, tokenizer, columns=columns, has_colours=is_coloured),
            soft_wrap=True,
        )
    console.print(Text(f"\n{len(shown)} of the first step's {len(batch.samples)} samples", "dim"))


def longest_sample(batch: FirstBatch) -> tuple[str, str]:
    """Return the longest of the first samples as HTML, and where its row is.

    Raises:
        TemplateError: its tokenizer is gone.
    """
    sample = _longest(batch)
    page = preview.to_html((sample["input_ids"], sample["loss_mask"]), _tokenizer_of(batch))
    return page, f"Row {sample['row']} of {sample['file']}."


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
            f"the first batch has {len(batch.samples)} samples, the longest of "
            f"{len(sample['input_ids'])} tokens, {sum(sample['loss_mask'])} of them trained (row "
            f"{sample['row']} of {sample['file']}); its ids cannot be shown as text without the "
            f"run's tokenizer: {error}"
        ) from error
