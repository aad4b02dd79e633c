"""Every flag of Miles and of its scripts is known by name.

`miles_flags.txt` has the flags of Miles's own parser, `megatron_flags.txt` those of Megatron-LM
that its model and launch scripts give, or may give.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from miles.errors import ConfigError
from miles.train.launch.arguments import parse
from miles.train.launch.parser import launch_settings

HERE = Path(__file__).parent


@pytest.mark.parametrize("file", ["miles_flags.txt", "megatron_flags.txt"])
def test_every_name_is_taken_or_refused_for_a_reason(base: list[str], file: str) -> None:
    names = (HERE / file).read_text().split()
    taken = launch_settings()  # each arrives, which another test shows
    refused = [name for name in names if name not in taken]
    assert len(refused) > 50
    assert len(names) - len(refused) > 50

    for name in refused:
        with pytest.raises(ConfigError) as error:
            parse([*base, name])
        reason, _, remedy = str(error.value).removeprefix(f"{name} ").partition("; ")
        assert str(error.value).startswith(f"{name} "), error.value
        assert len(reason.split()) > 2, error.value
        assert len(remedy.split()) > 1, error.value
        assert "there is no flag" not in reason, error.value


def test_a_name_that_miles_has_not_either_is_no_flag(base: list[str]) -> None:
    for name in ("--num-cups", "--rollout", "--kl", "--custom-everything-path"):
        with pytest.raises(ConfigError, match=f"there is no flag {name}; "):
            parse([*base, name])
