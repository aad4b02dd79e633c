"""docs/flags.md, made from the parser: `python -m miles.train.launch.flags_table > docs/flags.md`."""

from __future__ import annotations

import argparse

from miles.train.launch.launch_line import REFUSALS, flag_of
from miles.train.launch.parser import build_parser

_HEAD = """\
# Flags of `miles train`

Made from the code (`python -m miles.train.launch.flags_table`); a test compares. Names are Miles's, so that a launch
script for reinforcement learning needs only its SFT lines changed. Each flag can stand in a YAML file as well
(`--config run.yaml`, names with `_` or `-`; a switch is `true`, a list a list); what is on the line has the last word.
"""

_REFUSED = """\
## Refused by name

These are never ignored: the error says why, and what to do. `*` stands for any ending. Any other name that is not above
is refused, too, with the flag that is spelt most like it.

| flags | why | what to do |
|---|---|---|
"""

_COLUMNS = "| flag | default | meaning |\n|---|---|---|"


def table() -> str:
    """The page, in Markdown."""
    parser = build_parser()
    parts = [_HEAD]
    for group in parser._action_groups:
        actions = [action for action in group._group_actions if action.dest != "help"]
        if actions:
            title = "Settings from a file" if group.title == "options" else str(group.title)
            rows = [
                f"| {_name(action)} | {_default(action)} | {_meaning(action)} |"
                for action in actions
            ]
            parts.append(
                f"## {title[0].upper()}{title[1:]}\n\n" + "\n".join([_COLUMNS, *rows]) + "\n"
            )
    lines = []
    for refusal in REFUSALS:
        names = ", ".join(f"`{flag_of(name)}`" for name in refusal.names.split())
        lines.append(f"| {names} | it {refusal.reason} | {refusal.remedy} |")
    return "\n".join(parts) + "\n" + _REFUSED + "\n".join(lines) + "\n"


def _name(action: argparse.Action) -> str:
    value = (
        ""
        if action.nargs == 0
        else f" {action.metavar} …"
        if action.nargs == "+"
        else f" {action.metavar}"
    )
    return f"`{action.option_strings[0]}{value}`"


def _default(action: argparse.Action) -> str:
    if action.default in (None, False, "", [], {}):
        return ""
    return f"`{action.default}`"


def _meaning(action: argparse.Action) -> str:
    text = (
        (action.help or "")
        .replace(" (default: %(default)s)", "")
        .replace("(default: %(default)s)", "")
    )
    return (text % {"default": action.default} if "%(" in text else text).replace("|", "\\|")


if __name__ == "__main__":
    print(table(), end="")
