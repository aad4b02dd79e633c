"""The flags that `miles chat` and `miles generate` have in common: the model, and its answers."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from miles.chat.settings import Sampling
from miles.cli.console import path_word
from miles.common.flags import build, settings_of
from miles.data.config import EncodeConfig
from miles.train.launch.parser import add_settings, given_values

if TYPE_CHECKING:
    from miles.chat.source import Choice

_KWARGS = "--apply-chat-template-kwargs"
_FIELDS = ("chat_template", "template_kwargs", "trust_remote_code")
_SETTINGS = tuple(setting for setting in settings_of(EncodeConfig) if setting.field in _FIELDS)
"""Declared as those of `miles train`; what is not given is the run's own."""
_SAMPLING = settings_of(Sampling)
_DTYPES = ("auto", "float32", "bfloat16", "float16")


def add_answer_flags(parser: argparse.ArgumentParser) -> None:
    """Add the model, what is chosen of it, and how its answers are drawn."""
    parser.add_argument(
        "model",
        type=path_word,
        metavar="RUN|EXPORT",
        help="folder of a run, of a Hugging Face checkpoint, or of an adapter in PEFT's format",
    )
    parser.add_argument(
        "--ckpt-step", type=int, metavar="STEP", help="checkpoint of the run (default: the newest)"
    )
    parser.add_argument(
        "--hf-checkpoint",
        type=path_word,
        metavar="DIR",
        help="model folder of a run that has moved, or the base of an adapter (default: the one "
        "that the run, or the adapter, names)",
    )

    add_settings(parser, _SAMPLING)
    parser.add_argument(
        "--dtype",
        choices=_DTYPES,
        default="auto",
        help="to compute in (default: auto: float32 on the CPU; on a GPU, that of the weights)",
    )
    add_settings(parser, _SETTINGS)


def choice_of(flags: argparse.Namespace) -> Choice:
    """Return what the user chose of the model."""
    from miles.chat.source import Choice

    values = given_values(flags, _SETTINGS)
    config = build(EncodeConfig, values, {"tokenizer": "model"})
    return Choice(
        iteration=flags.ckpt_step,
        hf_checkpoint=flags.hf_checkpoint,
        chat_template=config.chat_template,
        template_kwargs=config.template_kwargs if _KWARGS in values else None,
        trust_remote_code=config.trust_remote_code,
    )


def sampling_of(flags: argparse.Namespace) -> Sampling:
    """Return how answers are drawn.

    Raises:
        ConfigError: a value that is not possible, or has no effect.
    """
    return build(Sampling, given_values(flags, _SAMPLING))
