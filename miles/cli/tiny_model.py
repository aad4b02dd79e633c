"""`miles tiny-model`: a tiny Qwen3 with random weights, to try things."""

from __future__ import annotations

import argparse

from miles.cli.console import Subparsers, open_console, path_word
from miles.common.help_lines import explain

NAME = "tiny-model"


def add_parser(commands: Subparsers) -> None:
    """Add the command and its flags."""
    parser = commands.add_parser(
        NAME, help="a tiny Qwen3 with random weights for a tokenizer, to try things"
    )
    explain(
        parser,
        "Write a Hugging Face folder with a tiny Qwen3 of random weights that has the whole "
        "vocabulary of a tokenizer, to try a run of your own rows on a laptop.",
        "tiny-model --tokenizer models/qwen3 --save runs/tiny",
    )
    parser.add_argument(
        "--tokenizer",
        type=path_word,
        required=True,
        metavar="DIR",
        help="the folder of the tokenizer, which is copied (required)",
    )
    parser.add_argument(
        "--save",
        type=path_word,
        required=True,
        metavar="DIR",
        help="the folder to write (required)",
    )
    parser.set_defaults(run=run)


def run(flags: argparse.Namespace) -> None:
    """Write the model's folder."""
    from miles.demo.model import build_tiny_qwen3

    build_tiny_qwen3(flags.tokenizer, flags.save)
    open_console().print(f"  {flags.save}", soft_wrap=True)
