"""The parts that all recipes share: the words of a line, the flags of a script, and its start.

    words of a recipe, words of --extra-args -> configure -> the settings of the run
                                             -> launch    -> the run, or its dry run

Of two values for one flag, that of --extra-args counts.
"""

from __future__ import annotations

import argparse
import posixpath
import shlex
import sys
from collections.abc import Callable, Sequence

from miles.cli import train
from miles.cli.console import path_word
from miles.cli.outcome import exit_status_of
from miles.cli.parser import CommandParser, require_whole_names
from miles.common.secret import hide_in_command_line
from miles.errors import ConfigError
from miles.train.config import TrainConfig
from miles.train.launch.arguments import parse
from miles.train.launch.known_flags import secret_flags

_EXTRA = "--extra-args"

PACKED_STEPS = """
    --rollout-shuffle --rollout-batch-size 128 --global-batch-size 128 --max-tokens-per-gpu 9216
    --bf16 --recompute-granularity full --recompute-method uniform --recompute-num-layers 1
"""
"""Steps of 128 rows in micro-batches of 9,216 tokens. Without recomputation, the activations of one
take 34 GiB of each GPU for the model with 4 billion parameters (`--dry-run`)."""

FULL_FINE_TUNING = """
    --lr 1e-5 --min-lr 1e-6 --lr-decay-style cosine --lr-warmup-fraction 0.1
    --weight-decay 0.1 --adam-beta1 0.9
"""
"""The rate and the optimizer of Miles's own scripts for all weights of Qwen3."""


def words_of(text: str) -> list[str]:
    """Return the words of a text."""
    return text.split()


def in_folder(folder: str, name: str) -> str:
    """Return the path or URL of a file or folder in a folder."""
    return posixpath.join(folder, name)


def output_words(output_dir: str) -> list[str]:
    """Return the flags of all that a run writes: into one folder."""
    checkpoints = in_folder(output_dir, "checkpoints")
    export = in_folder(output_dir, "hf")
    return ["--output-dir", output_dir, "--save", checkpoints, "--save-hf", export]


def gpu_words(num_gpus_per_node: int, num_gpus: int | None = None) -> list[str]:
    """Return the flags of a run on all GPUs of its nodes.

    Args:
        num_gpus: that the layout needs, on as many nodes as have them; None: those of one node.
    """
    if num_gpus_per_node < 1:
        raise ConfigError(f"--num-gpus-per-node must be positive, not {num_gpus_per_node}")
    num_nodes = -(-(num_gpus or 1) // num_gpus_per_node)
    per_node = str(num_gpus_per_node)
    words = ["--num-gpus-per-node", per_node, "--actor-num-gpus-per-node", per_node]
    return [*words, "--actor-num-nodes", str(num_nodes)]


def configure(words: Sequence[str], extra_args: str = "") -> TrainConfig:
    """Return the settings of a recipe's run.

    Args:
        words: the line of the recipe, without `miles train`.
        extra_args: further flags of `miles train`, which win over those of the recipe.

    Raises:
        ConfigError: names the flag, what was found, what was expected and what to do.
    """
    return parse(_split(extra_args), recipe=words)


def launch(line: Callable[[], list[str]], flags: argparse.Namespace) -> int:
    """Train by a recipe, or print the estimate of its run.

    Args:
        line: returns the words of the recipe.
        flags: of the script, from `parse_flags`.

    Returns:
        the exit status of `miles train`.
    """
    if any(secret in flags.extra_args for secret in secret_flags()):
        hide_in_command_line([_EXTRA])

    def run() -> None:
        extra = _split(flags.extra_args)
        train.run([*extra, "--dry-run"] if flags.dry_run else extra, recipe=line())

    return exit_status_of(run)


def recipe_parser(text: str | None, num_gpus_per_node: int = 8) -> CommandParser:
    """Return a parser with the flags that most recipes have.

    Args:
        text: docstring of the module.
        num_gpus_per_node: the default.
    """
    parser = recipe_parser_without_places(text)
    for flag, meaning in (
        ("--model-dir", "folder with a folder for each model, by name"),
        ("--data-dir", "folder with the files of rows"),
        ("--output-dir", "folder of the run: checkpoints/, hf/ (the export), metrics and log"),
    ):
        parser.add_argument(flag, metavar="DIR", type=path_word, required=True, help=meaning)
    parser.add_argument(
        "--num-gpus-per-node",
        metavar="GPUS",
        type=int,
        default=num_gpus_per_node,
        help=f"GPUs of each node, all of which are trained on (default: {num_gpus_per_node})",
    )
    return parser


def recipe_parser_without_places(text: str | None) -> CommandParser:
    """Return a parser with the flags that every recipe has."""
    parser = CommandParser(
        description=(text or "").strip(), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        _EXTRA,
        metavar="WORDS",
        default="",
        help='further flags of miles train, as one word; they win: "--lr 2e-5 --num-epoch 1"',
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="count rows, estimate memory; train nothing"
    )
    require_whole_names(parser)
    return parser


def parse_flags(parser: argparse.ArgumentParser, words: Sequence[str] | None) -> argparse.Namespace:
    """Return the flags of a script.

    Args:
        words: None: those of this process.
    """
    joined: list[str] = []
    for word in sys.argv[1:] if words is None else words:
        # argparse takes a value such as "--bf16" for another flag, unless it stands behind a "=".
        if joined[-1:] == [_EXTRA]:
            joined[-1] += f"={word}"
        else:
            joined.append(word)
    flags = []
    status = exit_status_of(lambda: flags.append(parser.parse_args(joined)))
    if status:
        raise SystemExit(status)
    return flags[0]


def _split(extra_args: str) -> list[str]:
    """Return the words of `--extra-args`, as a shell would."""
    try:
        return shlex.split(extra_args)
    except ValueError as error:
        raise ConfigError(
            f"{_EXTRA}: cannot be divided into words ({error}); it is written as on the line of "
            "a shell"
        ) from error
