"""`miles prepare`: rows -> OpenAI messages in Parquet, with manifest and ledger."""

from __future__ import annotations

import argparse
from typing import Any

from miles.cli.console import Subparsers, open_console
from miles.errors import ConfigError
from miles.train.launch.values import json_object


def add_parser(commands: Subparsers) -> None:
    """Add the command and its flags."""
    parser = commands.add_parser(
        "prepare", help="rows -> OpenAI messages in Parquet, with manifest and ledger"
    )
    parser.add_argument("dataset", help="openhermes, or the name that the source gets")
    parser.add_argument(
        "--source", nargs="+", metavar="FILES", help="fsspec URLs, globs or folders"
    )
    parser.add_argument("--tokenizer", required=True, metavar="DIR")
    parser.add_argument("--output", required=True, metavar="DIR")
    parser.add_argument("--max-sample-tokens", type=int, default=8192)
    parser.add_argument("--revision", help="of the hub's data set")
    parser.add_argument("--max-bad-fraction", type=float, default=0.01)
    parser.add_argument(
        "--input-key", metavar="COLUMN", help="column of the conversation (default: found)"
    )
    parser.add_argument("--tool-key", metavar="COLUMN", help="column of the tools (default: tools)")
    parser.add_argument(
        "--row-shape",
        default="auto",
        help="messages, alpaca, prompt_completion or text (default: auto, found from the first rows)",
    )
    parser.add_argument(
        "--column-names",
        metavar="JSON",
        help='field of the row shape -> column, such as {"prompt": "question"}',
    )
    parser.add_argument(
        "--role-names", metavar="JSON", help="role in the rows -> system, user, assistant or tool"
    )
    parser.set_defaults(run=run)


def run(flags: argparse.Namespace) -> None:
    """Write the rows as messages and print the card."""
    from miles.data.notebook.dataset import prepare

    prepared = prepare(
        flags.dataset,
        source=flags.source,
        tokenizer=flags.tokenizer,
        max_sample_tokens=flags.max_sample_tokens,
        revision=flags.revision,
        messages_key=flags.input_key,
        tools_key=flags.tool_key,
        row_shape=flags.row_shape,
        column_names=_json_object("--column-names", flags.column_names),
        role_names=_json_object("--role-names", flags.role_names),
        max_bad_fraction=flags.max_bad_fraction,
    )
    prepared.write(flags.output)
    open_console().print(str(prepared))


def _json_object(flag: str, text: str | None) -> dict[str, Any]:
    try:
        return json_object(text or "{}")
    except argparse.ArgumentTypeError as error:
        raise ConfigError(f"{flag}: {error}") from error
