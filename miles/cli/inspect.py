"""`miles inspect`: what a path is, its facts, and rows with their trained tokens marked.

Of a run, ids and masks are those that it kept, so its own settings are in them; they are printed as the
flags that show the same in `miles prepare` and `miles certify`.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from miles.cli.console import Subparsers, open_console, path_word, tokenizer_word
from miles.cli.convert import positive
from miles.common.flags import words_of
from miles.common.help_lines import explain
from miles.data.config import EncodeConfig
from miles.errors import ConfigError, SourceError

if TYPE_CHECKING:
    from rich.console import Console

WHERE = ("longest", "least_trained", "dropped", "random")
"""As of `Prepared.preview`."""


def add_parser(commands: Subparsers) -> None:
    """Add the command and its flags."""
    parser = commands.add_parser(
        "inspect", help="what a run, rows, a checkpoint or an export is; rows with their mask"
    )
    explain(
        parser,
        "Tell what a path is, and the facts about it: a run, rows (raw or prepared), a manifest, a "
        "Megatron checkpoint, a Hugging Face folder, an adapter. Of a run, and of rows with "
        "--tokenizer, samples are shown with the tokens that are trained marked.",
        "inspect runs/chat",
        "inspect runs/chat --where longest --samples 1",
        "inspect chat.jsonl --tokenizer models/qwen3 --rows 3,17",
        "inspect models/qwen3 --json",
    )
    parser.add_argument(
        "folder", type=path_word, metavar="PATH", help="a folder or a file, local or remote"
    )
    parser.add_argument(
        "--tokenizer",
        type=tokenizer_word,
        metavar="DIR",
        help="folder or hub name, to show rows with their mask (default: none is shown)",
    )
    parser.add_argument(
        "--samples",
        type=positive,
        default=3,
        metavar="N",
        help="samples to show (default: %(default)s)",
    )
    parser.add_argument(
        "--rows",
        type=row_numbers,
        metavar="N,N",
        help="show these rows, by their place in the data (default: the first usable ones)",
    )
    parser.add_argument(
        "--where",
        choices=WHERE,
        help="choose by the length, by the share of trained tokens, what is dropped, or by chance",
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of --where random (default: %(default)s)"
    )
    parser.add_argument(
        "--json", action="store_true", help="print the facts as JSON, and no samples"
    )
    parser.add_argument(
        "--color",
        choices=("always", "never", "auto"),
        default="auto",
        help="colour the trained tokens; without colour they stand in brackets (default: "
        "%(default)s, on a terminal)",
    )
    parser.set_defaults(run=run)


def run(flags: argparse.Namespace) -> None:
    """Print what a path is, its facts, and samples of it.

    Raises:
        ConfigError: --rows and --where are given together.
        MilesError: what is there cannot be read.
    """
    from rich.text import Text

    from miles.common.facts import Facts
    from miles.common.patience import until_answered
    from miles.common.prose import Prose
    from miles.report import subject as subjects

    if flags.rows and flags.where:
        raise ConfigError("--rows and --where both say which rows to show; give one")
    subject = subjects.subject_of(flags.folder)
    is_rows = subject.kind in (subjects.ROWS, subjects.PREPARED)
    if flags.json:
        if subject.kind == subjects.ROWS:
            subject = replace(subject, facts=_facts_of_rows(subject.url))
        print(subjects.to_json(subject))
        return

    flags.folder = subject.url  # of a manifest, the folder of its rows
    console = open_console(flags.color)
    console.print(Prose(Text(f"{subject.url}: {subject.kind}", "bold")), soft_wrap=True)
    facts = subject.facts
    is_shown = subject.kind == subjects.RUN or (is_rows and flags.tokenizer is not None)
    if is_rows and not is_shown:
        with until_answered("looking at the rows"):
            # What miles prepare has counted is said first, and once.
            facts = facts | {
                label: value
                for label, value in _facts_of_rows(flags.folder).items()
                if label not in facts
            }
        facts[""] = "--tokenizer DIR shows rows with their mask"
    if facts:
        console.print(
            Facts([(label, _shown(value)) for label, value in facts.items()]), soft_wrap=True
        )
    if facts and is_shown:
        console.print()
    if is_shown:
        show = _show_run if subject.kind == subjects.RUN else _show_rows
        show(flags, console)


def _shown(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def _facts_of_rows(path: str) -> dict[str, object]:
    """Return the facts of rows that nobody prepared, without a tokenizer."""
    from miles.common.first_contact import first_contact
    from miles.data.config import SourceConfig
    from miles.data.files.manifest import build_manifest

    with first_contact():
        manifest = build_manifest((SourceConfig("rows", (path,)),))
    source = manifest.sources[0]
    columns = ", ".join(f"{field} in {column}" for field, column in source.columns.items())
    return {
        "rows": manifest.num_rows,
        "files": len(source.files),
        "row shape": source.format.shape,
        "columns": columns,
    }


def _show_rows(flags: argparse.Namespace, console: Console) -> None:
    """Print the card of rows, and some of them with their mask."""
    from miles.common.patience import until_answered

    with until_answered("looking at the rows"):
        from miles.data.config import DataConfig, RowFormat
        from miles.data.notebook.prepare import prepare_rows

        prepared = prepare_rows(
            "rows",
            (flags.folder,),
            RowFormat(),
            EncodeConfig(flags.tokenizer),
            revision=None,
            split=None,
            max_bad_fraction=DataConfig.max_bad_fraction,
        )
        preview = prepared.preview(
            flags.samples, rows=flags.rows, where=flags.where, seed=flags.seed
        )
        card = prepared.to_text(console.width)
    console.print(card, soft_wrap=True)
    console.print()
    console.print(preview, soft_wrap=True)


def _show_run(flags: argparse.Namespace, console: Console) -> None:
    """Print samples of the first step, and the settings that they were encoded with."""
    from rich.text import Text

    from miles.common import run_folder, storage
    from miles.common.prose import Prose
    from miles.report.first_batch import inspect_run

    if not storage.exists(storage.join(flags.folder, run_folder.FIRST_BATCH)):
        console.print("  no samples: the first step is not trained yet")
        return
    inspect_run(
        flags.folder, console, flags.samples, rows=flags.rows, where=flags.where, seed=flags.seed
    )
    for line in account_of(flags.folder):
        console.print(Prose(Text(line, "dim")), soft_wrap=True)
    if (words := encoding_of(flags.folder)) is not None:
        settings = shlex.join(words) or "the defaults"
        console.print(Prose(Text(f"encoded with {settings}", "dim")), soft_wrap=True)


def row_numbers(text: str) -> list[int]:
    """Return the numbers of `3,17`, for argparse's `type`.

    Raises:
        argparse.ArgumentTypeError: the text is something else.
    """
    words = text.split(",")
    if not all(word.strip().isdigit() for word in words):
        raise argparse.ArgumentTypeError("row numbers from 0 were expected, such as 3,17")
    return [int(word) for word in words]


def account_of(folder: str) -> list[str]:
    """Return what a finished run dropped and did not use, in short.

    Nothing where its ledger is missing, as while it runs, or broken.
    """
    from miles.data.stream import account
    from miles.report.run_data import read_ledger

    try:
        return account.sentences(read_ledger(folder))
    except (LookupError, TypeError, AttributeError, SourceError):
        return []


def encoding_of(folder: str) -> list[str] | None:
    """Return the encoding settings of a run as flags.

    None where its config.json is missing, broken, or of an older run, without them.
    """
    from miles.common import own_files, run_folder, storage

    try:
        encode = own_files.read_object(storage.join(folder, run_folder.CONFIG))["data"]["encode"]
    except (LookupError, TypeError, SourceError):
        return None
    return words_of(EncodeConfig, encode) if isinstance(encode, Mapping) else None
