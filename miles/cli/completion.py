"""`miles completion`: a script that teaches a shell the commands, flags and allowed values.

bash:  source <(miles completion bash)
zsh:   miles completion zsh > "${fpath[1]}/_miles"
fish:  miles completion fish > ~/.config/fish/completions/miles.fish
"""

from __future__ import annotations

import argparse
from typing import Any

from miles.cli.console import Subparsers

SHELLS = ("bash", "zsh", "fish")

_FOLDERS = ("DIR", "RUN")
_FILES = ("FILE", "FILES", "PATH", "YAML")


def add_parser(commands: Subparsers) -> None:
    """Add the command and its flags."""
    parser = commands.add_parser(
        "completion", help="the completion script of a shell: source <(miles completion bash)"
    )
    parser.add_argument("shell", choices=SHELLS, help="the shell")
    parser.set_defaults(run=run)


def run(flags: argparse.Namespace) -> None:
    """Print the script."""
    from miles.cli import build_parser

    print(completion_script(build_parser(), flags.shell))


def completion_script(parser: argparse.ArgumentParser, shell: str) -> str:
    """Return the script that completes a parser's command lines.

    Args:
        shell: one of `SHELLS`.
    """
    import shtab

    _mark_paths(parser, shtab.FILE, shtab.DIRECTORY)
    script: str = shtab.complete(parser, shell)
    return script


def _mark_paths(parser: argparse.ArgumentParser, file: Any, folder: Any) -> None:
    """Have values that are files or folders completed as such; their metavar says which are."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                _mark_paths(command, file, folder)
        elif action.metavar in _FILES:
            action.complete = file  # type: ignore[attr-defined]
        elif action.metavar in _FOLDERS:
            action.complete = folder  # type: ignore[attr-defined]
