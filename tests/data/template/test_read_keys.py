"""Which keys of a message a chat template reads, and which of a row's keys nobody uses."""

import itertools
from pathlib import Path
from typing import Any

import pytest

from miles.data.config import EncodeConfig
from miles.data.encoding.encoder import Encoder
from miles.data.types import Conversation
from tests.support.templates import tracer_of

MESSAGE = {"role": "user", "content": "q", "name": "Ann", "mood": "calm"}


def unread(template: str, *messages: dict[str, Any]) -> list[tuple[int, str]]:
    program, _ = tracer_of(template).program(messages or [MESSAGE], None)
    return list(program.unread)


def loop(body: str) -> str:
    return "{% for m in messages %}" + body + "{% endfor %}"


@pytest.mark.parametrize(
    "template",
    [
        *("{{ m.role ~ m.content ~ m.name }}", "{{ m['role'] ~ m['content'] ~ m['name'] }}"),
        "{{ m.get('role') ~ m.get('content') ~ m.get('name') }}",
        "{% if 'name' in m and m.role %}{{ m.content }}{% endif %}",
        "{% if m.name is defined and m.role %}{{ m.content }}{% endif %}",
    ],
)
def test_a_key_that_is_read_by_name(template: str) -> None:
    assert unread(loop(template)) == [(0, "mood")]


def test_a_key_that_a_filter_reads() -> None:
    template = "{{ messages | map(attribute='name') | first }}{{ messages[0].content }}"
    assert unread(template) == [(0, "role"), (0, "mood")]


@pytest.mark.parametrize(
    "template",
    [
        *("{{ m | tojson }}", "{% for key in m %}{{ key }}{% endfor %}", "{{ dict(m).role }}"),
        *("{{ m | items | list | length }}", "{{ dict(**m).role }}", "{{ m.copy().role }}"),
        *("{{ m.keys() | list | first }}", "{{ m.values() | first }}", "{{ m | list | first }}"),
        "{{ m | reverse | first }}",
    ],
)
def test_a_message_that_is_read_whole(template: str) -> None:
    assert unread(loop(template)) == []


def test_a_key_is_read_in_one_message_and_not_in_another() -> None:
    template = loop("{{ m.role ~ m.content ~ (m.name if m.role == 'tool' else '') }}")
    tool = {"role": "tool", "content": "4", "name": "add"}
    assert unread(template, {**tool, "role": "user"}, tool) == [(0, "name")]


def test_reasoning_is_read_under_any_of_its_names() -> None:
    names = ("reasoning_content", "thinking", "reasoning")
    for given, read in itertools.product(names, ("reasoning_content", "thinking")):
        template = loop("{{ m.role ~ m.content ~ m." + read + " }}")
        assert unread(template, {"role": "assistant", "content": "a", given: "r"}) == []


def conversation(*messages: dict[str, Any]) -> Conversation:
    return Conversation(messages, None, (None,) * len(messages))


def test_keys_of_a_row_that_nobody_uses(chatml_tokenizer_folder: Path) -> None:
    encoder = Encoder.from_config(EncodeConfig(tokenizer=str(chatml_tokenizer_folder)))
    answer = {"role": "assistant", "content": "4", "reasoning_content": "2+2"}
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}

    common = conversation({"role": "user", "content": "2+2?"}, {"role": "assistant", "content": ""})
    assert encoder.unused_keys(common) == ()
    row = conversation(MESSAGE, {**answer, "refusal": "no", "name": "Bob", "tool_calls": [call]})
    assert encoder.unused_keys(row) == ("name", "mood", "refusal")
    blank = conversation({**MESSAGE, "name": "", "mood": {}}, {**answer, "audio": [], "score": 0})
    assert encoder.unused_keys(blank) == ("score",)

    # Plain text has no messages; a row that is rejected when it is encoded has no program.
    assert encoder.unused_keys(Conversation((), None, (), "text")) == ()
    assert encoder.unused_keys(conversation({**MESSAGE, "<|im_end|>": "x"}, answer)) == ()
