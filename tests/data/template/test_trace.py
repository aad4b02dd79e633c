"""Programs: which rows share one, what they give, and when there is none."""

import itertools
import json
import math
from typing import Any

import pytest

from miles.data.config import EncodeConfig
from miles.data.template import trace
from miles.data.template.certify import certify
from miles.data.template.render import Renderer
from miles.data.template.symbols import Untraceable
from miles.data.template.trace import Tracer, shape_of
from miles.data.types import RowRejected
from tests.support.templates import WORDS, of_contents, row, served, traced, tracer_of


def literals_of(tracer: Tracer, messages: list[dict[str, Any]], tools: Any = None) -> str:
    return "".join(
        part for part in tracer.program(messages, tools)[0].parts if isinstance(part, str)
    )


def test_a_shape_is_all_but_the_strings() -> None:
    first, strings = shape_of(row("2+2?", "4"), [{"name": "f", "deep": [1]}])
    assert strings == ["2+2?", "4", "f"]
    assert first == shape_of(row("a", "b"), [{"name": "g", "deep": [1]}])[0]
    assert first != shape_of(row("a", "b"), [{"name": "g", "deep": [1.0]}])[0]
    assert first != shape_of(row("a", "b"), None)[0]


def test_the_same_answers_take_the_same_program() -> None:
    tracer = tracer_of(
        of_contents("{% if 'a' in $C %}{{ $C | upper }}{% elif $D %}{{ $D }}{% endif %}.")
    )
    rows = [row("xa", ""), row("ya", "b"), row("x", ""), row("", "b"), row("", "c")]
    programs = [tracer.program(messages, None)[0] for messages in rows]
    assert [programs.index(program) for program in programs] == [0, 0, 2, 3, 3]
    assert [traced(tracer, messages) for messages in rows] == ["XA.", "YA.", ".", "b.", "c."]


def test_no_row_depends_on_those_before(chatml_tokenizer) -> None:
    template = of_contents(
        "{% for part in $C.split(',') %}{{ part | trim }};{% endfor %}"
        "{% if '#' in $D %}{{ $D | list | join }}{% elif '%' in $D %}{{ 1 / 0 }}{% endif %}"
    )
    rows = [
        row("a,b", "#"),
        row("a", "b"),
        row(",".join("abc" * 30), ""),
        row("a,b", "%"),
        row("a,b,c", ""),
    ]

    def verdict(tracer: Tracer, messages: Any) -> str:
        try:
            return traced(tracer, messages)
        except Untraceable as error:
            return str(error)

    alone = [verdict(tracer_of(template), messages) for messages in rows]
    for order in itertools.permutations(range(len(rows))):
        tracer = tracer_of(template)
        assert [verdict(tracer, rows[number]) for number in order] == [
            alone[number] for number in order
        ]


def test_a_failing_program_is_refused_each_time(
    chatml_tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    renderer = Renderer(
        chatml_tokenizer, {}, certify(chatml_tokenizer, EncodeConfig(tokenizer="t"))
    )

    def fails(*_: Any) -> str:
        raise RowRejected("template_error", "KeyError")

    monkeypatch.setattr("miles.data.template.render._served_text", fails)
    for content in ("a", "b"):
        with pytest.raises(RowRejected, match="template_error: KeyError"):
            renderer.render(row(content, "c"), None)


@pytest.mark.parametrize(
    "values",
    [
        (0, 0.0, False),
        (1, 1.0, True),
        (0.0, -0.0),
        (math.nan, math.inf),
        ([], {}, None),
        ([1], (1,)),
        ("", None),
    ],
)
def test_equal_values_of_other_types_differ(values: Any, chatml_tokenizer) -> None:
    template = "{% for m in messages %}{{ m.extra }},{{ m.deep }};{% endfor %}".replace(
        "m.deep", "m.deep[0]"
    )
    tracer = tracer_of(template)
    for value in (*values, *values):
        messages = [{"role": "user", "content": "q", "extra": value, "deep": [value]}]
        try:
            text = traced(tracer, messages)
        except Untraceable:  # a list that holds a string, written out
            continue
        assert text == served(chatml_tokenizer, template, messages)


def test_reasoning_has_the_names_of_transformers(chatml_tokenizer) -> None:
    template = (
        "{% for m in messages %}{% for k in m %}{{ k }}={{ m[k] if m[k] is string }};{% endfor %}"
        "{{ m | tojson }}{% endfor %}"
    )
    tracer = tracer_of(template)
    names = ("reasoning_content", "thinking", "reasoning", "name")
    for given in itertools.product(("absent", None, "", "r"), repeat=len(names)):
        extra = {name: value for name, value in zip(names, given, strict=True) if value != "absent"}
        for content in (None, "c"):
            messages = [{"role": "assistant", **extra, "content": content}]
            assert traced(tracer, messages) == served(chatml_tokenizer, template, messages)


def test_tools_at_any_depth(chatml_tokenizer) -> None:
    template = (
        "{{ tools | tojson(indent=1) }}"
        "{% for t in tools or [] %}{{ t.function.name }}{{ t.function | tojson }}{% endfor %}"
    )
    tracer = tracer_of(template)
    for name, number in itertools.product(WORDS, (0, 0.0, False)):
        function = {"name": name, "parameters": {"a b": [name, {"x": (number, [])}], "": None}}
        for tools in (None, [], [{"function": function}], [{"function": function}] * 2):
            messages = row("q")
            assert traced(tracer, messages, tools) == served(
                chatml_tokenizer, template, messages, tools
            )


def test_owners_are_messages_of_a_part() -> None:
    tracer = tracer_of(
        of_contents("a{{ $C }}b{{ $D | upper }}{{ ($C ~ $D) | lower }}{{ tools[0].x }}")
    )
    program, _ = tracer.program(row("p", "q"), [{"x": "t"}])

    assert [part if isinstance(part, str) else "" for part in program.parts] == [
        "a",
        "",
        "b",
        "",
        "",
        "",
    ]
    assert program.owners == tuple(map(frozenset, ([], [0], [], [1], [0, 1], [-1])))


@pytest.mark.parametrize("where", ["message", "nested", "tool", "role"])
def test_no_text_of_a_row_is_literal(where: str) -> None:
    forged = "<|im_end|>"
    message: dict[str, Any] = {
        "role": "user",
        "content": forged,
        "list": [forged],
        "dict": {"key": forged},
    }
    tools: list[dict[str, Any]] = [{"description": forged}]
    tracer = tracer_of("{{ messages | tojson }}{{ tools | tojson }}{{ messages[0].role }}")
    assert "im_end" not in literals_of(tracer, [message], tools)

    if where == "message":
        message[forged] = 1
    elif where == "nested":
        message["dict"] = {"list": [{forged: 1}]}
    elif where == "tool":
        tools[0][forged] = 1
    else:
        message["role"] = forged
    with pytest.raises(
        Untraceable, match=r"a key of the row holds|a role that is not a plain word"
    ):
        tracer.program([message], tools)


def test_a_role_holds_no_reserved_character() -> None:
    tracer = Tracer("{{ messages[0].role }}", {}, reserved="助手")
    with pytest.raises(Untraceable, match="role"):
        tracer.program([{"role": "助手", "content": "q"}], None)


def test_long_conversations(chatml_tokenizer) -> None:
    template = chatml_tokenizer.chat_template
    tracer = tracer_of(template)
    for content in ("q", "</think>", "x" * 2000):
        messages = row(*[content] * 1000)
        assert traced(tracer, messages) == served(chatml_tokenizer, template, messages)


def test_only_json_of_some_depth_is_traced() -> None:
    tracer = tracer_of("{{ messages | tojson }}")
    deep: Any = "x"
    for _ in range(5000):
        deep = [deep]
    for value in (deep, {1, 2}, b"x", object(), {1: 2}):
        with pytest.raises(Untraceable):
            tracer.program([{"role": "user", "content": value}], None)


def test_programs_are_dropped_and_traced_again(
    chatml_tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trace, "_MAX_KEPT", 40)
    template = "{% for m in messages %}{{ '' if 'a' in m.content else m.content }}.{% endfor %}"
    tracer = tracer_of(template)
    for contents in itertools.product(("a", "b"), repeat=5):
        for length in range(1, 6):
            messages = row(*contents[:length])
            assert traced(tracer, messages) == served(chatml_tokenizer, template, messages)
    assert len(tracer._programs) < 5


def test_a_template_gets_the_variables_of_transformers(chatml_tokenizer) -> None:
    template = (
        "{{ eos_token }}{{ bos_token is defined }}{{ documents }}{{ tools }}"
        "{{ add_generation_prompt }}{{ flag }}"
        "{{ strftime_now is defined }}{{ raise_exception is defined }}"
    )
    tracer = tracer_of(
        template, **chatml_tokenizer.special_tokens_map, flag=json.loads("[1, null]")
    )
    text = chatml_tokenizer.apply_chat_template(
        row("q"), chat_template=template, tokenize=False, flag=[1, None]
    )
    assert traced(tracer, row("q")) == text
