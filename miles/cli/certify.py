"""`miles certify`: a tokenizer with its chat template -> its certificate."""

from __future__ import annotations

import argparse
import json

from miles.cli.console import Subparsers, open_console, tokenizer_word
from miles.common.flags import build, settings_of
from miles.common.help_lines import explain
from miles.common.local_paths import absolute
from miles.common.patience import until_answered
from miles.data.config import EncodeConfig
from miles.train.launch.parser import add_settings, given_values

_SETTINGS = settings_of(EncodeConfig)
"""Declared as those of `miles train`, so that the certificate is that of the run."""


def add_parser(commands: Subparsers) -> None:
    """Add the command and its flags."""
    parser = commands.add_parser(
        "certify", help="prove a tokenizer with its chat template, and print the certificate"
    )
    explain(
        parser,
        "Prove that the tokens of each turn are found for a tokenizer with its chat template, and "
        "print what is trained: the certificate. It needs no rows and no GPU. miles train does the "
        "same before it starts.",
        "certify Qwen/Qwen3-4B-Base",
        "certify models/qwen3 --loss-mask-turns last",
        "certify models/qwen3 --json certificate.json",
    )
    parser.add_argument(
        "tokenizer",
        type=tokenizer_word,
        metavar="TOKENIZER",
        help="folder (fsspec URL) or hub name",
    )
    add_settings(parser, _SETTINGS)
    parser.add_argument(
        "--json", metavar="FILE", help="also write the certificate as JSON; -: print only that"
    )
    parser.set_defaults(run=run)


def run(flags: argparse.Namespace) -> None:
    """Print the certificate, or fail with the reason why there is none."""
    with until_answered("looking at the tokenizer and its chat template"):
        from miles.common import storage
        from miles.common.first_contact import first_contact
        from miles.data.template.certify import certify
        from miles.data.tokens.load import load_tokenizer

        values = given_values(flags, _SETTINGS)
        config = build(EncodeConfig, values, {"tokenizer": flags.tokenizer})
        with first_contact():
            certificate = certify(load_tokenizer(config), config)
    text = json.dumps(certificate.to_json(), indent=1, ensure_ascii=False)
    if flags.json == "-":
        print(text)
        return

    open_console().print(certificate, soft_wrap=True)
    if flags.json:
        storage.write_text(absolute(flags.json), text + "\n")
