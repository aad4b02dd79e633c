"""A chat template rendered without transformers, against transformers."""

from typing import Any

import pytest
from jinja2.exceptions import SecurityError
from transformers.utils.chat_template_utils import _compile_jinja_template

from miles.data.tokens.served_chat import compiled, served_text
from tests.support.chatml import CHATML

MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": "<b> & 'é' \u2028", "name": None, "_of": 1},
    {"role": "user", "content": [{"type": "text", "text": "a"}, {"n": 1.5, "no": None}]},
    {"role": "assistant", "content": " x\n", "thinking": "T", "reasoning": "R"},
    {"role": "assistant", "content": "", "reasoning_content": None, "tool_calls": [{"id": True}]},
]
TOOLS = [{"type": "function", "function": {"name": "f", "z": 1, "a": "ü"}}]

SNIPPETS = (
    "{{ messages }}|{{ tools }}|{{ documents }}|{{ add_generation_prompt }}|{{ nothing }}",
    "{{ messages | tojson }}{{ tools | tojson(indent=2, sort_keys=true) }}",
    "{{ tools | tojson(ensure_ascii=true, separators=(',', ':')) }}",
    "{% for m in messages %}{{ m.content }}{% if loop.index > 1 %}{% break %}{% endif %}\n  \n{% endfor %}",
    "  {% if true %}\n  a\n  {%- endif %}\n{# no #}\n",
    "{% generation %}{{ messages[2].reasoning_content }}{% endgeneration %}{{ messages[2].thinking }}",
    "{{ dict([('a', 1)], b=2) }}{{ dict.fromkeys([1, 2]) }}{{ dict.fromkeys([1], 0) }}",
    "{% set n = namespace([('a', 1)], self=2) %}{% set n.a = n.a + 1 %}{{ n.a }}{{ n.self }}",
    "{% set n = namespace(_a=1) %}",
    "{% set n = namespace() %}{% set n._a = 1 %}",
    "{% set n = namespace() %}{{ n.__init__ }}",
    "{{ messages.append(1) }}",
    "{{ dict.__class__.__mro__ }}",
    "{{ ''.__class__ }}|{{ '%s' | format('a') }}|{{ 'a' | urlize }}",
    "{{ raise_exception('on purpose') }}",
    "{{ strftime_now('%Y') }}",
    "{{ messages[9].content }}",
    "{{ nothing.at.all }}",
    "{{ bos_token }}{{ extra.deep[0] }}",
    "{{ messages[0]._of }}{{ messages[0].name is defined }}",
    "{% autoescape true %}{{ '<' }}{% endautoescape %}{{ '<' | e }}",
    "{{ 1 / 0 }}",
    "{% if %}",
    CHATML,
)


def outcome(render: Any) -> tuple[str, str]:
    """Return the text, or the kind of exception and its words, where those are Jinja's."""
    try:
        return "text", render()
    except SecurityError as error:
        return "SecurityError", str(error) if "unsafe" in str(error) else ""
    except Exception as error:
        return type(error).__name__, str(error)


@pytest.mark.parametrize("prompts", [False, True])
@pytest.mark.parametrize("template", SNIPPETS)
def test_it_renders_as_transformers(chatml_tokenizer, template: str, prompts: bool) -> None:
    variables = {"bos_token": "<s>", "extra": {"deep": ["é"]}}
    rows: list[tuple[list[dict[str, Any]], Any]] = [
        (MESSAGES, TOOLS),
        (MESSAGES[:2], None),
        (MESSAGES[2:], []),
    ]
    for messages, tools in rows:
        served = outcome(
            lambda messages=messages, tools=tools: chatml_tokenizer.apply_chat_template(
                messages,
                tools=tools,
                chat_template=template,
                tokenize=False,
                add_generation_prompt=prompts,
                **variables,
            )
        )
        given = {**chatml_tokenizer.special_tokens_map, **variables}
        ours = outcome(
            lambda messages=messages, tools=tools, given=given: served_text(
                template, messages, tools, given, add_generation_prompt=prompts
            )
        )
        assert ours == served


def test_no_conversation_is_no_text(chatml_tokenizer) -> None:
    with pytest.raises(ValueError, match="empty conversation"):
        chatml_tokenizer.apply_chat_template([], tokenize=False)
    with pytest.raises(ValueError, match="empty conversation"):
        served_text(CHATML, [], None, {})


def test_the_environment_is_that_of_transformers() -> None:
    ours, theirs = compiled("x").environment, _compile_jinja_template("x").environment
    assert type(ours) is type(theirs)
    for names in ("filters", "tests", "globals", "policies"):
        assert getattr(ours, names).keys() == getattr(theirs, names).keys()
    for option in ("trim_blocks", "lstrip_blocks", "keep_trailing_newline", "autoescape"):
        assert getattr(ours, option) == getattr(theirs, option)
    assert ours.undefined is theirs.undefined
    assert len(ours.extensions) == len(theirs.extensions)
