"""A secret is shown nowhere, and its process's command line forgets it."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import subprocess
import sys

import pytest

from miles.common.secret import Secret, _value_places


@dataclasses.dataclass(frozen=True)
class Account:
    """A record with a secret in it."""

    name: str
    key: Secret


def test_a_secret_shows_itself_nowhere() -> None:
    account = Account("me", Secret("hunter2"))
    texts = [
        repr(account),
        f"{account.key} {account.key!r} {account.key!s} %s" % account.key,
        json.dumps(dataclasses.asdict(account), default=str),
        repr(copy.deepcopy(account)),
    ]
    for text in texts:
        assert "hunter2" not in text
        assert "(hidden)" in text
    assert dataclasses.asdict(account)["key"].reveal() == "hunter2"
    assert account == Account("me", Secret("hunter2")) != Account("me", Secret("hunter3"))
    assert not Secret("")


def test_a_secret_does_not_travel() -> None:
    with pytest.raises(TypeError, match="a secret is not pickled"):
        pickle.dumps(Account("me", Secret("hunter2")))


SHOW = """
import sys
from miles.common.secret import hide_in_command_line
hide_in_command_line(["--key", "--json"])
print(open("/proc/self/cmdline").read().split("\\0")[3:-1])
print(sys.argv[1:])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_the_command_line_forgets_a_secret() -> None:
    words = ["--key", "hunter2", "--json={}", "--keys", "hunter3", "--json", "", "--key"]
    out = subprocess.run(
        [sys.executable, "-c", SHOW, *words], check=True, capture_output=True, text=True
    ).stdout
    shown = ["--key", "xxxxxxx", "--json=xx", "--keys", "hunter3", "--json", "", "--key"]
    assert out.splitlines() == [str(shown), str(words)], "only what ps shows is another"


def test_values_are_found_by_their_flags() -> None:
    line = b"python\0--key\0--key\0--key=a=b\0"
    assert _value_places(line, ["--key"]) == [(13, 5), (25, 3)]
