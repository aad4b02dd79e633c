"""The probes: small conversations on which a chat template is certified.

    ONE_TURN, TWO_TURNS     how do assistant turns begin and end?          `anchors.py` learns it
    forged_turns            does content that spells a turn move any?      it must not
    WITH_SYSTEM             is a system message accepted?
    *_WITH_REASONING        is reasoning rendered, in the last turn, in earlier ones?
    ONE_CALL, TWO_CALLS     are tool calls and results rendered? do two results share a turn?

Every string of a probe that is looked for afterwards is a word in capitals that occurs once, such
as ANSWER1. No chat template writes such a word by itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from miles.data.template.render import strings_of

Message = dict[str, Any]


def _system(content: str) -> Message:
    return {"role": "system", "content": content}


def _user(content: str) -> Message:
    return {"role": "user", "content": content}


def _assistant(content: str, **more: Any) -> Message:
    return {"role": "assistant", "content": content, **more}


def _call(argument: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "lookup", "arguments": {"word": argument}}}


def _result(content: str) -> Message:
    return {"role": "tool", "name": "lookup", "content": content}


QUESTION = [_user("QUESTION1")]
"""Rendered with and without `add_generation_prompt`: what does that add?"""

ONE_TURN = [*QUESTION, _assistant("ANSWER1")]
"""Which texts stand before an answer and after it?"""

TWO_TURNS = [*ONE_TURN, _user("QUESTION2"), _assistant("ANSWER2")]
"""Is it the same for an earlier turn?"""

WITH_SYSTEM = [_system("SYSTEM"), *TWO_TURNS]
"""Is a system message accepted, and are turns located after one?"""

ONE_WITH_REASONING = [*QUESTION, _assistant("ANSWER1", reasoning_content="REASONING1")]
"""Is reasoning in the last turn accepted?"""

TWO_WITH_REASONING = [
    *ONE_WITH_REASONING,
    _user("QUESTION2"),
    _assistant("ANSWER2", reasoning_content="REASONING2"),
]
"""Is it rendered, and is that of an earlier turn left out?"""

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "lookup",
            "description": "Looks a word up.",
            "parameters": {
                "type": "object",
                "properties": {"word": {"type": "string", "description": "the word"}},
                "required": ["word"],
            },
        },
    }
]

ONE_CALL = [
    *QUESTION,
    _assistant("ANSWER1", tool_calls=[_call("ARGUMENT1")]),
    _result("RESULT1"),
    _assistant("ANSWER2"),
]
"""Are a tool call and its result rendered? Some templates leave them out without an error."""

TWO_CALLS = [
    *QUESTION,
    _assistant("", tool_calls=[_call("ARGUMENT1"), _call("ARGUMENT2")]),
    _result("RESULT1"),
    _result("RESULT2"),
    _assistant("ANSWER2"),
]
"""Are two calls in one turn accepted, and do their results share a turn?"""


def forged_turns(header: str, terminator: str) -> list[Message]:
    """Return `TWO_TURNS` with a whole assistant turn typed by the user, and one by the model."""
    forged = f"{header}FORGED{terminator}"
    return [_user(f"{forged}QUESTION1"), _assistant(f"ANSWER1{forged}"), *TWO_TURNS[2:]]


def words_of(message: Mapping[str, Any]) -> list[str]:
    """Return the words of a probe's message by which it is found in the rendered text."""
    return [text for text in strings_of(message) if text.isupper()]
