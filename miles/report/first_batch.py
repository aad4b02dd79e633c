"""Show the samples of the first step, with the trained tokens marked."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from miles.common import run_folder, storage
from miles.common.debugging import unchained
from miles.data.config import EncodeConfig
from miles.data.notebook import preview
from miles.data.tokens.load import load_tokenizer
from miles.errors import SourceError
from miles.report.run_data import FirstBatch, read_first_batch

_SHOWN_OF = 20
"""The page shows the longest of this many samples."""


@unchained
def inspect_run(folder: str, console: Console, num_samples: int) -> None:
    """Print the samples of a run's first step, coloured by their mask.

    Raises:
        SourceError: the run kept no first batch.
    """
    batch = read_first_batch(folder)
    if batch is None:
        path = storage.join(folder, run_folder.FIRST_BATCH)
        raise SourceError(f"{path}: no such file; expected the folder of a run")

    tokenizer = load_tokenizer(EncodeConfig(batch.tokenizer, chat_template=""))
    shown = batch.samples[:num_samples]
    for sample in shown:
        title = (
            f"{sample['source']} · {sample['file']} row {sample['row']} · "
            f"{len(sample['input_ids'])} tokens, {sum(sample['loss_mask'])} trained"
        )
        console.rule(Text(title), align="left")
        console.print(preview.to_text((sample["input_ids"], sample["loss_mask"]), tokenizer))
    console.print(Text(f"{len(shown)} of the first step's {len(batch.samples)} samples", "dim"))


def longest_sample(batch: FirstBatch) -> tuple[str, str]:
    """Return the longest of the first samples as HTML, and where its row is."""
    tokenizer = load_tokenizer(EncodeConfig(batch.tokenizer, chat_template=""))
    sample = max(batch.samples[:_SHOWN_OF], key=lambda sample: len(sample["input_ids"]))
    page = preview.to_html((sample["input_ids"], sample["loss_mask"]), tokenizer)
    return page, f"Row {sample['row']} of {sample['file']}."
