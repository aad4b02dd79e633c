"""`miles certify`: what is proven of a tokenizer and its chat template."""

from __future__ import annotations

import argparse
import json

from miles.cli.console import Subparsers, open_console
from miles.errors import ConfigError
from miles.train.launch.values import chat_template, json_object


def add_parser(commands: Subparsers) -> None:
    """Add the command and its flags."""
    parser = commands.add_parser(
        "certify", help="what is proven of a tokenizer and its chat template"
    )
    parser.add_argument("tokenizer", metavar="TOKENIZER", help="folder (fsspec URL) or hub name")
    parser.add_argument(
        "--chat-template-path", metavar="FILE", help="a Jinja file in place of the tokenizer's own"
    )
    parser.add_argument("--apply-chat-template-kwargs", metavar="JSON", default="{}")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run code that the tokenizer brings"
    )
    parser.add_argument(
        "--json",
        metavar="FILE",
        help="also write the certificate as JSON; -: print only that",
    )
    parser.set_defaults(run=run)


def run(flags: argparse.Namespace) -> None:
    """Print the certificate, or fail with the reason why there is none."""
    from miles.common import storage
    from miles.data.config import EncodeConfig
    from miles.data.template.certify import certify
    from miles.data.tokens.load import load_tokenizer

    try:
        template_kwargs = json_object(flags.apply_chat_template_kwargs)
    except argparse.ArgumentTypeError as error:
        raise ConfigError(f"--apply-chat-template-kwargs: {error}") from error
    config = EncodeConfig(
        tokenizer=flags.tokenizer,
        chat_template=chat_template(flags.chat_template_path),
        template_kwargs=template_kwargs,
        trust_remote_code=flags.trust_remote_code,
    )
    certificate = certify(load_tokenizer(config), config)
    text = json.dumps(certificate.to_json(), indent=1, ensure_ascii=False)
    if flags.json == "-":
        print(text)
        return

    open_console().print(certificate)
    if flags.json:
        storage.write_text(flags.json, text + "\n")
