"""`miles completion`: a script that teaches a shell the commands, flags and allowed values.

miles completion --install    puts it where the user's shell looks for it
miles completion bash         prints it: source <(miles completion bash)
"""

from __future__ import annotations

import argparse
import os
import shlex
from typing import Any

from miles.cli.completion_file import SHELLS, install, shell_of
from miles.cli.console import Subparsers, open_console
from miles.common.flags import FILES, FOLDERS
from miles.common.help_lines import explain
from miles.errors import ConfigError

_FOLDERS = (*FOLDERS, "RUN", "TOKENIZER", "A", "B")
_FILES = (*FILES, "FILES")

# shtab 1.13 offers files for a word such as --ev behind a flag whose values are files, and so no
# flag behind --prompt-data a b.
_FLAGS_ONLY_BEHIND_WORDS = """ &&
        ( -z "$current_action_compgen" || "$current_action_is_positional" = true ) ]]; then"""


def add_parser(commands: Subparsers) -> None:
    """Add the command and its flags."""
    parser = commands.add_parser(
        "completion", help="have the Tab key complete commands, flags, values and paths"
    )
    explain(
        parser,
        "Teach a shell the commands, flags, values and paths of miles, for the Tab key: write the "
        "script where the shell looks for it, or print it.",
        "completion --install",
        "completion --install zsh",
        "completion fish",
    )
    parser.add_argument(
        "shell",
        choices=SHELLS,
        nargs="?",
        help="the shell (default, with --install alone: that in the variable SHELL)",
    )
    parser.add_argument(
        "--install",
        action="store_true",
        help="write the script into your own folder of the shell, in place of printing it",
    )
    parser.set_defaults(run=run)


def run(flags: argparse.Namespace) -> None:
    """Print the script, or put it into its place.

    Raises:
        ConfigError: no shell is named, or known from the environment.
        WriteError: the file cannot be written.
    """
    from miles.cli.commands import build_parser

    if not flags.install:
        if flags.shell is None:
            raise ConfigError(
                "name a shell, to have its script printed (miles completion bash), or give "
                "--install, to have it written where your shell looks for it"
            )
        print(completion_script(build_parser(), flags.shell))
        return

    shell = flags.shell or shell_of(os.environ)
    installed = install(completion_script(build_parser(), shell), shell, os.environ)
    done = "wrote" if installed.is_new else "up to date:"
    lines = [f"{done} {installed.path}"]
    if installed.remedy:
        lines.append(installed.remedy)
    lines.append(f"each {shell} that is started from now on completes miles")
    lines.append(f"to undo it: rm {shlex.quote(str(installed.path))}")

    console = open_console()
    for line in lines:
        console.print(f"  {line}", soft_wrap=True)


def completion_script(parser: argparse.ArgumentParser, shell: str) -> str:
    """Return the script that completes a parser's command lines.

    Args:
        shell: one of `SHELLS`.
    """
    import shtab

    _mark_values(parser, shtab.FILE, shtab.DIRECTORY)
    script: str = shtab.complete(parser, shell)
    return script.replace(_FLAGS_ONLY_BEHIND_WORDS, " ]]; then")


def _mark_values(parser: argparse.ArgumentParser, file: Any, folder: Any) -> None:
    """Have allowed values, files and folders completed as such; a metavar says which are paths."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                _mark_values(command, file, folder)
        elif allowed := getattr(action, "allowed", ()):
            action.choices = allowed
        elif action.metavar in _FILES:
            action.complete = file  # type: ignore[attr-defined]
        elif action.metavar in _FOLDERS:
            action.complete = folder  # type: ignore[attr-defined]
