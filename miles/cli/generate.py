"""`miles generate`: the answers of a trained model to the rows of a file."""

from __future__ import annotations

import argparse

from miles.cli.answering import add_answer_flags, choice_of, sampling_of
from miles.cli.console import Subparsers, open_console, path_word
from miles.cli.convert import positive
from miles.common.counts import counted
from miles.common.ctrl_c import on_ctrl_c
from miles.common.flags import build, settings_of
from miles.common.help_lines import explain
from miles.common.patience import until_answered
from miles.common.redact import redact
from miles.data.config import RowFormat
from miles.train.launch.parser import add_settings, given_values

NAME = "generate"
_SETTINGS = settings_of(RowFormat)
_LEAVES = "stopped; the complete lines of --output stay, and the same command goes on behind them"
_EXAMPLES = (
    "generate run --prompts questions.jsonl --output answers.jsonl",
    "generate run --prompts rows/test.parquet --keep --output answers.jsonl --batch-size 32",
    "generate Qwen3-4B-OpenHermes --prompts questions.jsonl --output drawn.jsonl --temperature 0.7",
)


def add_parser(commands: Subparsers) -> None:
    """Add the command and its flags."""
    parser = commands.add_parser(
        NAME,
        help="the answers of a run or an export to the rows of a file, as JSON lines",
    )
    explain(
        parser,
        "Answer the rows of a file with a trained model, greedily if nothing else is "
        "said. Greedy answers are the same for every batch size. The same command goes on behind "
        "the rows that are answered already.",
        *_EXAMPLES,
    )
    add_answer_flags(parser)
    parser.add_argument(
        "--prompts",
        type=path_word,
        required=True,
        metavar="FILE",
        help="rows of any shape that miles train reads, or with a prompt alone; fsspec URL, "
        "pattern or folder (required)",
    )
    parser.add_argument(
        "--output",
        type=path_word,
        required=True,
        metavar="FILE",
        help="JSON lines to write; fsspec URL (required)",
    )
    parser.add_argument(
        "--keep",
        action="store_true",
        help="put the last answer of a row, which is not shown to the model, beside the new one, "
        "as reference",
    )
    parser.add_argument(
        "--batch-size",
        type=positive,
        default=8,
        metavar="ROWS",
        help="rows that are answered together (default: 8)",
    )
    add_settings(parser, _SETTINGS)
    parser.set_defaults(run=run)


def run(flags: argparse.Namespace) -> None:
    """Write the answers, and print how many there are.

    Raises:
        MilesError: a model, prompts or an output that cannot be used.
    """
    choice = choice_of(flags)
    with until_answered("loading the model and the rows"), on_ctrl_c(_LEAVES):
        sampling = sampling_of(flags)

        from miles.chat.generate import Target, generate
        from miles.chat.generate import settings_of as settings_of_answers
        from miles.chat.model import load
        from miles.chat.prompt_rows import PromptRows
        from miles.chat.source import opened
        from miles.common.first_contact import first_contact
        from miles.common.patience import answered
        from miles.common.prose import Prose
        from miles.common.screen import Screen
        from miles.common.writable import require_writable

        require_writable(flags.output.rpartition("/")[0] or "/", "--output")
        screen = Screen(stderr=True, highlight=False, markup=False, emoji=False)
        with first_contact():
            rows = PromptRows.open(flags.prompts, build(RowFormat, given_values(flags, _SETTINGS)))
        with opened(flags.model, choice, screen) as found:
            model = load(found, flags.dtype)
            answered()
            for line in (found.title, model.device, *model.notes):
                screen.print(Prose(line), soft_wrap=True, style="dim")

            settings = settings_of_answers(found.title, rows, model, sampling, keep=flags.keep)
            target = Target(flags.output, settings)
            counts = generate(
                rows,
                model,
                sampling,
                target,
                batch_size=flags.batch_size,
                keep=flags.keep,
                tell=lambda text: screen.print(Prose(text), soft_wrap=True, style="dim"),
            )

    console = open_console()
    console.print(
        Prose(
            f"{redact(flags.output)}: {counted(counts.num_rows - counts.num_rejected, 'answer')} "
            f"to {counted(counts.num_rows, 'row')}"
        ),
        soft_wrap=True,
    )
    if counts.num_cut:
        console.print(
            Prose(
                f"  {counts.num_cut:,} came to a limit (--max-new-tokens, or the model's own): "
                "finish is length"
            ),
            soft_wrap=True,
        )
    if counts.num_rejected:
        console.print(
            Prose(f"  {counted(counts.num_rejected, 'row')} cannot be asked; reason says why"),
            soft_wrap=True,
        )
