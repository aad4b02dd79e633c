"""Names of roles: known ones, in any case, the user's own, and one that nobody knows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from miles.data.rows.roles import MAX_QUOTED, ROLES, find_role
from miles.data.stream.reject_limits import describe_rejects
from miles.data.types import Reject, RowRejected
from tests.support.raw_rows import ANSWER, ASK, normalized, rejected
from tests.support.row_cases import take


def test_names_in_any_case() -> None:
    assert all(name == name.casefold() for name in ROLES)
    for name, role in ROLES.items():
        for written in (name, name.upper(), name.title()):
            assert find_role(written, {}) == role
    for unknown in ("npc", "", "user ", None, 3, ["user"]):
        assert find_role(unknown, {}) is None


def test_own_names_win() -> None:
    own = {"bot": "user", "Human": "assistant", "NPC": "tool"}
    assert [find_role(name, own) for name in ("bot", "Bot", "BOT", "Human", "npc")] == [
        *("user", "user", "user", "assistant", "tool")
    ]
    assert find_role("human", own) == "user"  # an exact name of the table
    assert find_role("HUMAN", own) == "assistant"


def test_a_role_can_stand_for_tool_calls() -> None:
    turns = [ASK, {"from": "action", "value": '{"name": "f"}'}, ANSWER]
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    conversation = normalized({"conversations": turns}, roles={"action": "tool_call"})
    assert conversation.messages[1] == {"role": "assistant", "content": "", "tool_calls": [call]}


@pytest.mark.parametrize(
    ("turn", "detail"),
    [
        (
            {"from": "npc", "value": ""},
            'turn 1: its role "npc" is not known; --role-names \'{"npc": "ROLE"}\' would say what '
            "it is",
        ),
        ({"role": "a\n\ud800é", "content": ""}, 'turn 1: its role "a\\n?é" is not known'),
        (
            {"from": 41 * "x", "value": ""},
            f'turn 1: its role "{MAX_QUOTED * "x"}…" is not known; --role-names JSON would',
        ),
        ({"from": 3, "value": ""}, "turn 1: its role is a number, not a name"),
        ({"value": ""}, "turn 1 has no role: none of the keys role, from and speaker"),
    ],
)
def test_an_unknown_role_is_quoted(turn: dict[str, str], detail: str) -> None:
    reason, found = rejected({"conversations": [ASK, turn, ANSWER]})
    assert reason == "unknown_role"
    assert found.startswith(detail)
    assert "\n" not in found
    assert found.encode()


def test_cases_of_roles() -> None:
    assert take("role-names/bot.jsonl").turns() == [("user", "Chess?"), ("assistant", "Yes.")]
    roles = [role for role, _ in take("role-names/ipython.jsonl").turns()]
    assert roles == ["user", "assistant", "tool", "assistant"]
    assert take("role-names/nemo.jsonl").turns(1) == [
        ("system", "Be kind."),
        ("user", "Name tree 1."),
        ("assistant", "Larch."),
    ]
    greeting = [("user", "Hi"), ("assistant", "Hello")]
    assert take("unknown-roles/prompter.jsonl").turns() == greeting
    assert take("unknown-roles/llama_style.jsonl").turns() == greeting


def test_the_error_of_a_source_says_the_role_and_the_flag(tmp_path: Path) -> None:
    row = {"messages": [{"role": "npc", "content": "Hi"}, {"role": "user", "content": "Who?"}]}
    (tmp_path / "rows.jsonl").write_text(3 * (json.dumps(row) + "\n"))
    taken = take(tmp_path / "rows.jsonl")
    rejects = [
        Reject(number, 0, outcome.reason, outcome.detail)
        for number, outcome in enumerate(taken.outcomes)
        if isinstance(outcome, RowRejected)
    ]
    text = describe_rejects(rejects, taken.manifest)
    assert text.startswith("3 unknown_role (first: row 0")
    assert """turn 0: its role "npc" is not known; --role-names '{"npc": "ROLE"}'""" in text
