"""`miles prepare`: rows -> OpenAI messages in Parquet, with manifest and ledger."""

from __future__ import annotations

import argparse
import shlex
from dataclasses import replace
from typing import TYPE_CHECKING

from miles.cli.console import Subparsers, open_console, path_word, tokenizer_word
from miles.common import run_folder
from miles.common.counts import counted
from miles.common.ctrl_c import on_ctrl_c
from miles.common.flags import build, settings_of
from miles.common.help_lines import explain, shell_lines
from miles.common.local_paths import absolute
from miles.common.patience import until_answered
from miles.common.progress import lines_in_pipes
from miles.common.ray_address_form import FLAG
from miles.common.redact import redact
from miles.data.config import DataConfig, EncodeConfig, RowFormat, SourceConfig, StreamConfig
from miles.data.source_names import splits_for
from miles.train.config import ClusterConfig
from miles.train.launch.parser import add_settings, given_values

if TYPE_CHECKING:
    from miles.data.notebook.card import Summary

_CPUS = "CPUs that read and encode, together; a small data set is read without loaders"
_CLUSTER = (
    "cluster of Ray whose loaders read and encode a large set: HOST:PORT of its head node, or auto; "
    "local starts one here"
)
_LIMITS = tuple(
    setting for setting in settings_of(DataConfig) if setting.field == "max_bad_fraction"
)
_LOADER = tuple(
    replace(setting, flag=replace(setting.flag, help=_CPUS, default="all"))
    for setting in settings_of(StreamConfig)
    if setting.field == "loader_cpus"
)
_ADDRESS = tuple(
    replace(setting, flag=replace(setting.flag, help=_CLUSTER))
    for setting in settings_of(ClusterConfig)
    if setting.flag.name == FLAG
)
_SETTINGS = (
    *settings_of(RowFormat),
    *settings_of(SourceConfig),
    *settings_of(EncodeConfig),
    *_LIMITS,
    *_LOADER,
    *_ADDRESS,
)
"""Declared as those of `miles train`, so that the numbers on the card are those of the run."""

NAME = "prepare"


def add_parser(commands: Subparsers) -> None:
    """Add the command and its flags."""
    parser = commands.add_parser(
        NAME, help="rows -> OpenAI messages in Parquet, with manifest and ledger"
    )
    explain(
        parser,
        "Read rows of any known layout, and write them as OpenAI messages into a folder of Parquet "
        "files that a run reads fast, with a manifest and the rows that were dropped. Optional: "
        "miles train reads the same rows as they are.",
        "prepare chat --source chat.jsonl --tokenizer Qwen/Qwen3-4B --output data/chat",
        "prepare chat --source 's3://rows/*.parquet' --tokenizer models/qwen3 --output s3://rows/out",
        "prepare openhermes --tokenizer models/qwen3 --output data/openhermes",
    )
    parser.add_argument(
        "dataset",
        metavar="NAME",
        help="the name that the source gets, or openhermes, whose files are known",
    )
    parser.add_argument(
        "--source",
        type=absolute,
        nargs="+",
        metavar="FILES",
        help="files, patterns, folders or URLs of rows, local or remote (default, for openhermes "
        "alone: those of the hub)",
    )
    parser.add_argument(
        "--tokenizer",
        type=tokenizer_word,
        required=True,
        metavar="DIR",
        help="folder, local or remote, or name on the hub (required)",
    )

    parser.add_argument(
        "--output",
        type=path_word,
        required=True,
        metavar="DIR",
        help="the folder to write (required)",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace other prepared rows in --output"
    )
    parser.add_argument(
        "--revision",
        metavar="NAME",
        help="branch, tag or commit of the hub's data set (default: the newest)",
    )

    add_settings(parser, _SETTINGS)
    parser.set_defaults(run=run)


def run(flags: argparse.Namespace) -> None:
    """Write the rows as messages and print the card."""
    from miles.common.prose import Prose
    from miles.common.ray_address_form import require_address
    from miles.common.screen import Screen
    from miles.data.notebook.recipe import require_source

    require_source(flags.dataset, flags.source, _line)

    looking = until_answered("looking at the tokenizer and the rows")
    with looking, on_ctrl_c("stopped; nothing was written"):
        from miles.data.notebook.every_row import OBJECT_STORE_BYTES, RAY_ROWS
        from miles.data.notebook.prepare import prepare_rows  # pyarrow and others: seconds

        values = given_values(flags, _SETTINGS)
        require_address(values.get(FLAG))
        prepared = prepare_rows(
            flags.dataset,
            flags.source,
            build(RowFormat, values),
            build(EncodeConfig, values, {"tokenizer": flags.tokenizer}),
            revision=flags.revision,
            split=splits_for(values.get("--split", ()), 1)[0],
            max_bad_fraction=values.get("--max-bad-fraction", DataConfig.max_bad_fraction),
        )
    names = ", ".join(prepared.sources)
    Screen(stderr=True, highlight=False, markup=False).print(
        Prose(
            f"miles: reading {counted(prepared.num_rows, 'row')} of {names}, and writing to "
            f"{redact(flags.output)}"
        ),
        soft_wrap=True,
    )
    with lines_in_pipes():
        if prepared.num_rows >= RAY_ROWS and values.get(FLAG):
            from miles.common import local_ray  # Ray: it takes seconds

            # Whoever wants a Ray later takes the one that this process has.
            local_ray.connect(values.get("--loader-cpus"), OBJECT_STORE_BYTES, values[FLAG])
        prepared.write(
            flags.output,
            overwrite=flags.overwrite,
            loader_cpus=values.get("--loader-cpus"),
        )
    console = open_console()
    console.print(prepared.to_text(console.width), soft_wrap=True)
    console.print()
    for line in _account(flags, prepared.summary()):
        console.print(Prose(f"  {line}"), soft_wrap=True)

    commands = _next_commands(flags)
    of_model = " (with the folder of your model, where the tokenizer's has no weights)"
    console.print(Prose(f"\n  to go on{of_model if len(commands) > 1 else ''}:"), soft_wrap=True)
    for command in commands:
        for line in shell_lines(command, console.width - 2):
            console.print(f"  {line}", soft_wrap=True)


def _account(flags: argparse.Namespace, summary: Summary) -> list[str]:
    """Return where the rows are, and how many were dropped."""
    from miles.common import storage  # fsspec: every command imports this module

    num_written = len(summary.lengths)
    are = "is" if summary.num_rows == 1 else "are"
    rows = counted(summary.num_rows, "row")
    lines = [f"{num_written:,} of {rows} {are} in {redact(flags.output)}"]
    num_dropped = summary.num_rows - num_written
    if num_dropped:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in summary.reasons.items())
        rejects = redact(storage.join(flags.output, run_folder.REJECTS))
        lines += [f"{num_dropped:,} dropped: {reasons}", f"each of them is in {rejects}"]
    return lines


def _next_commands(flags: argparse.Namespace) -> list[str]:
    """Return the lines to type next."""
    from miles.common import storage

    model = flags.tokenizer
    commands = []
    is_folder = model.startswith("/")
    if is_folder and not storage.exists(storage.join(model, "config.json")):
        tiny = f"runs/{flags.dataset}-tiny"
        commands.append(["miles", "tiny-model", "--tokenizer", model, "--save", tiny])
        model = tiny
    train = ["miles", "train", "--hf-checkpoint", model]
    train += ["--prompt-data", flags.dataset, flags.output]
    commands.append([*train, "--save", f"runs/{flags.dataset}", "--dry-run"])
    return [redact(shlex.join(words)) for words in commands]


def _line(name: str, path: str) -> str:
    """Return the command that reads a path under a name."""
    return f"miles prepare {name} --source {shlex.quote(path)} …"
