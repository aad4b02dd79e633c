"""`miles completion`: a script that teaches a shell the commands, flags and allowed values.

bash:  source <(miles completion bash)
zsh:   miles completion zsh > "${fpath[1]}/_miles"
fish:  miles completion fish > ~/.config/fish/completions/miles.fish
"""

from __future__ import annotations

import argparse
from typing import Any

from miles.cli.console import Subparsers
from miles.common.flags import FILES, FOLDERS

SHELLS = ("bash", "zsh", "fish")

_FOLDERS = (*FOLDERS, "RUN", "TOKENIZER", "A", "B")
_FILES = (*FILES, "FILES")

# shtab 1.13 offers files for a word such as --ev behind a flag whose values are files, and so no
# flag behind --prompt-data a b.
_FLAGS_ONLY_BEHIND_WORDS = """ &&
        ( -z "$current_action_compgen" || "$current_action_is_positional" = true ) ]]; then"""


def add_parser(commands: Subparsers) -> None:
    """Add the command and its flags."""
    parser = commands.add_parser(
        "completion", help="the completion script of a shell: source <(miles completion bash)"
    )
    parser.add_argument("shell", choices=SHELLS, help="the shell")
    parser.set_defaults(run=run)


def run(flags: argparse.Namespace) -> None:
    """Print the script."""
    from miles.cli.commands import build_parser

    print(completion_script(build_parser(), flags.shell))


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
