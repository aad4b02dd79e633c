"""The names that a launch line may have: flags that are taken, or refused by name.

A word with a slip may hold a key: `--wandb-key:KEY` is one word. So no message quotes more of a
word than a flag's name.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from miles.common.near_names import FLAG_LIKENESS, closest
from miles.errors import ConfigError
from miles.train.launch.parser import launch_settings
from miles.train.launch.refusals import REFUSALS

_NAME = re.compile(r"--[A-Za-z0-9_-]*")


def require_known(flag: str, known: Collection[str], where: str = "") -> None:
    """Check that a flag is one of those that exist here.

    Args:
        flag: as it is written, `--name`.
        known: the flags of a parser.
        where: stands before the message.

    Raises:
        ConfigError: names the flag, why it is refused, and what to do.
    """
    if flag in known:
        return
    shown = shown_name(flag)
    if shown != flag and shown in launch_settings():
        raise ConfigError(
            f"{where}{shown} is joined to other text, which is not shown; divide them: a line has "
            "`--flag value` or `--flag=value`, a file `flag: value`"
        )

    name = shown.removeprefix("--").replace("-", "_")
    for refusal in REFUSALS:
        if refusal.covers(name):
            raise ConfigError(f"{where}{shown} {refusal.reason}; {refusal.remedy}")

    near = closest(shown, known, FLAG_LIKENESS)
    hint = f"did you mean {near}?" if near else "see miles train --help or docs/flags.md"
    raise ConfigError(f"{where}there is no flag {shown}; {hint}")


def shown_name(word: str) -> str:
    """Return what a message may quote of a word that begins with `--`: a flag's name.

    Of a word that begins like a secret's flag, it is that flag: the rest may be the secret.
    """
    match = _NAME.match(word)
    name = match[0] if match else ""
    for secret in secret_flags():
        if name.replace("_", "-").lower().startswith(secret):
            return secret
    return name


def written_flags(words: Sequence[str]) -> list[str]:
    """Return the flags of a line, without their values.

    A word behind the flag of a secret is its value, even where it begins with `--`.
    """
    secrets = secret_flags()
    flags = []
    is_secret = False
    for word in words:
        if word.startswith("--") and not is_secret:
            flags.append(word.split("=")[0])
        is_secret = word in secrets
    return flags


def secret_flags() -> list[str]:
    """Return the flags whose values nothing may show."""
    settings = launch_settings().values()
    return [setting.flag.name for setting in settings if setting.is_secret]
