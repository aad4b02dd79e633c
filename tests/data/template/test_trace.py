import itertools
import json
import math
import time
from typing import Any

import pytest

from miles.data.config import EncodeConfig
from miles.data.template import symbols, trace
from miles.data.template.anchors import Anchors
from miles.data.template.certify import certify
from miles.data.template.render import Renderer
from miles.data.template.sandbox import literals
from miles.data.template.symbols import Unbounded, Untraceable
from miles.data.template.trace import Tracer
from miles.data.types import RowRejected

WORDS = (
    "",
    "x",
    "a b",
    "A,b,,C",
    " \n pad\n",
    "</think>\n\nq",
    "one</think>two</think>three",
    "Straße <b> & 'q' \"z\"",
)
WORDS += (
    "{}",
    "%s",
    "\\",
    "\ufdd00\ufdd1",
    "#" * 300,
    "\ud800",
    "\0",
    "e\u0301é\u2028法👩‍👩‍👧",
    "real",
    "count",
    "0",
)
"""What contents are made of: each a row, or each two of them."""


def tracer_of(template: str, **variables: Any) -> Tracer:
    return Tracer(template, variables, reserved="<|>")


def row(*contents: Any) -> list[dict[str, Any]]:
    return [
        {"role": "user" if n % 2 == 0 else "assistant", "content": c}
        for n, c in enumerate(contents)
    ]


def text_of(tracer: Tracer, messages: list[dict[str, Any]], tools: Any = None) -> str:
    program, strings = tracer.program(messages, tools)
    return "".join(program.run(strings))


def served(tokenizer: Any, template: str, messages: list[dict[str, Any]], tools: Any = None) -> str:
    return tokenizer.apply_chat_template(
        messages, tools=tools, chat_template=template, tokenize=False
    )


def literals_of(tracer: Tracer, messages: list[dict[str, Any]], tools: Any = None) -> str:
    return "".join(
        part for part in tracer.program(messages, tools)[0].parts if isinstance(part, str)
    )


C, D = "messages[0].content", "messages[1].content"

FOLLOWED = [
    f"{{{{ {C} }}}}",
    f"{{{{ {C} | trim }}}}|{{{{ {C} | trim('x#') }}}}|{{{{ {C}.strip() }}}}|{{{{ {C}.lstrip('\\n ') }}}}",
    f"{{{{ ('\\n' ~ {C} ~ ' \\n') | trim }}}}|{{{{ (' ' + {C} + {D} + ' ').rstrip() }}}}",
    f"{{{{ {C} | upper }}}}{{{{ {C} | lower }}}}{{{{ {C} | capitalize }}}}{{{{ {C}.title() }}}}",
    f"{{{{ {C}.replace('a', 'bb') }}}}{{{{ {C} | replace('#', '') }}}}{{{{ {C} | replace('#', '', 2) }}}}",
    f"{{{{ {C}.removeprefix('x').removesuffix('#') }}}}",
    f"{{{{ {C}[1:] }}}}|{{{{ {C}[:-2] }}}}|{{{{ {C}[::-1] }}}}|{{{{ {C}[-3:1:-2] }}}}|{{{{ {C}[5:2] }}}}",
    f"{{{{ {C}[0] }}}}|{{{{ {C}[-1] }}}}|{{{{ {C}[2] is defined }}}}|{{{{ {C}['strip'] is defined }}}}",
    f"{{{{ {C}.split('</think>')[-1].lstrip('\\n') }}}}|{{{{ {C}.split('</think>')[0].split('<think>')[-1] }}}}",
    f"{{% for p in {C}.split(',') %}}[{{{{ loop.index }}}}/{{{{ loop.length }}}} {{{{ p }}}}]{{% endfor %}}",
    f"{{{{ {C}.split() | length }}}}|{{{{ {C}.split(none, 1) | join('+') }}}}|{{{{ {C}.rsplit(',', 1)[-1] }}}}",
    f"{{{{ {C}.split(sep=',', maxsplit=1) | last }}}}|{{{{ ', '.join({C}.split(',')) }}}}",
    f"{{{{ 'yes' if 'a' in {C} else 'no' }}}}{{{{ 'yes' if {D} in {C} else 'no' }}}}",
    f"{{{{ {C} in ['x', 'a b'] }}}}{{{{ {C} not in ('real',) }}}}{{{{ {C} is in ['x'] }}}}",
    f"{{{{ {C} == {D} }}}}{{{{ {C} != 'x' }}}}{{{{ 'x' == {C} }}}}{{{{ {C} == 1 }}}}{{{{ {C} is eq('x') }}}}",
    f"{{{{ [{C}, {D}] == ['x', 'x'] }}}}{{{{ {{'a': {C}}} == {{'a': 'x'}} }}}}{{{{ messages[0] in messages[1:] }}}}",
    f"{{{{ {C} or 'empty' }}}}{{{{ {C} and {D} }}}}{{{{ not {C} }}}}{{{{ {C} | default('e', true) }}}}",
    f"{{{{ {C} is string }}}}{{{{ {C} is sequence }}}}{{{{ {C} is iterable }}}}{{{{ {C} is mapping }}}}",
    f"{{{{ {C} is number }}}}{{{{ {C} is none }}}}{{{{ {C} is defined }}}}{{{{ {C} is callable }}}}"
    f"{{{{ {C} is true }}}}",
    f"{{{{ {C} is escaped }}}}{{{{ ({C} | safe) is escaped }}}}{{{{ {C} | safe }}}}{{{{ {C} | safe ~ 'x' }}}}",
    f"{{{{ ({C} | length) > 3 }}}}{{{{ 3 < {C} | length }}}}{{{{ {C} | length == 0 }}}}{{{{ {C} | count in [1, 3] }}}}",
    f"{{% if {C} | length %}}long{{% endif %}}{{{{ ({C} | length) is string }}}}{{{{ ({C} | length) is mapping }}}}",
    f"{{{{ {C}.startswith('a') }}}}{{{{ {C}.endswith({D}) }}}}",
    f"{{{{ {C} | tojson }}}}{{{{ {C} | tojson(ensure_ascii=true) }}}}{{{{ {C} | tojson | tojson }}}}",
    f"{{{{ [{C}, {{'k': {D}, 'a': [1, none, true, 1.5]}}] | tojson(indent=2, sort_keys=true) }}}}",
    f"{{{{ {{'b': {C}, 'a': {D}}} | tojson(separators=(',', ':'), sort_keys=true) }}}}{{{{ messages | tojson }}}}",
    f"{{{{ ('<' ~ {C} ~ '>') | tojson }}}}{{{{ [{C}, 'lit', {C}] | join('\\n') }}}}{{{{ [1, {C}] | join }}}}",
    "{{ messages | map(attribute='content') | join('; ') }}"
    "{{ messages | map(attribute='content') | map('upper') | join }}",
    "{{ messages | selectattr('content') | list | length }}"
    "{{ messages | selectattr('role', 'eq', 'user') | list | length }}",
    "{{ messages | rejectattr('content', 'in', ['x', '0']) | map(attribute='content') | list | join('/') }}",
    "{{ (messages | map(attribute='content') | select('equalto', 'x') | list) | length }}"
    "{{ messages | last | length }}",
    "{% for g in messages | groupby('role') %}{{ g.grouper }}:{{ g.list | length }}{% endfor %}"
    "{{ [messages[0].content] | max }}",
    "{% for k, v in messages[0].items() %}{{ k }}={{ v }}{% endfor %}"
    "{{ messages[0].get('content', '') }}{{ messages[0].x }}",
    "{% for k, v in messages[0] | dictsort %}{{ k }}={{ v }}{% endfor %}{{ messages[0] | items | list | length }}",
    "{% macro m(x, y='d') %}[{{ x }}{{ y }}{{ caller() if caller }}]{% endmacro %}{{ m(messages[0].content) }}"
    "{% call m(messages[1].content, y=messages[0].content) %}in{{ messages[0].content }}{% endcall %}",
    "{% set x %}a{{ messages[0].content }}b{% endset %}{{ x | upper }}"
    "{% filter lower %}Q{{ messages[0].content }}{% endfilter %}",
    "{% set x | replace('a', 'b') %}a{{ messages[0].content }}{% endset %}{{ x }}{{ x == 'bx' }}",
    "{% set ns = namespace(t='', n=0) %}{% for m in messages %}{% set ns.t = ns.t + m.content %}"
    "{% set ns.n = ns.n + 1 %}"
    "{% endfor %}{{ ns.t | trim }}{{ ns.n }}",
    "{% for m in messages recursive %}{{ m.content }}{% if m.parts %}({{ loop(m.parts) }}){% endif %}{% endfor %}",
    "{% for m in messages if m.content != 'x' %}{{ loop.index }}{{ m.content }}{% else %}none{% endfor %}",
    "{% for m in messages %}{% if m.content == 'x' %}{% continue %}{% elif m.content == '0' %}"
    "{% break %}{% endif %}-{% endfor %}",
    "{% for m in messages %}{{ loop.changed(m.content) }}{{ loop.cycle('a', m.content) }}"
    "{{ loop.previtem is defined }}{% endfor %}",
    "{% generation %}{{ messages[0].content }}{% endgeneration %}{% block b %}{{ messages[0].content }}"
    "{% endblock %}{{ self.b() }}",
    "  {%- if messages[0].content -%}  a  {%- endif %}\n   {{ messages[0].content -}}   \n b  "
    "{# c #}\n{% if true %}\nx\n{% endif %}\n",
    "{% set c = cycler('a', messages[0].content) %}{{ c.next() }}{{ c.next() }}"
    "{% set j = joiner(messages[0].content) %}{{ j() }}{{ j() }}",
    "{{ dict(a=messages[0].content).a }}{{ dict.fromkeys(['a'], messages[0].content)['a'] }}{{ range(3) | list }}",
    "{{ 'a' * 3 }}{{ 2 ** 10 }}{{ 7 % 3 }}"
    "{{ [1] * 2 + [3] }}{{ 10000000 + 1 }}"
    "{{ 10000000 | tojson }}{{ 1e7 * 9000000 }}{{ 123456789 | string }}{{ 'a b' | title }}",
    f"{{% if dict.keys is defined and {C} == 'x' %}}x{{% endif %}}",
    f"{{% if 'random' is filter and {C} == 'x' %}}x{{% endif %}}",
    "{{ none }}{{ true }}{{ 1.0 }}{{ undefined_name }}{{ [none, 'q'] }}{{ {'a': 1.5} }}{{ -0.0 }}",
    "{{ messages[0].content.foo is defined }}{{ messages[0].content._log is defined }}"
    "{{ messages[0].content['_parts'] }}",
    "{{ messages[0] | attr('content') is defined }}{{ messages[0].content | string is string }}",
]
"""Of each template every row's text is what transformers renders."""


@pytest.mark.parametrize("template", FOLLOWED)
def test_every_row_is_rendered_as_by_transformers(template: str, chatml_tokenizer) -> None:
    tracer = tracer_of(template, **chatml_tokenizer.special_tokens_map)
    for first, second in itertools.product(WORDS, repeat=2):
        messages = row(first, second)
        assert text_of(tracer, messages) == served(chatml_tokenizer, template, messages), (
            first,
            second,
        )


HALF_FOLLOWED = [
    f"{{% autoescape true %}}{{{{ {C} }}}}{{% endautoescape %}}",
    f"{{% if ({C} | length).real %}}long{{% endif %}}",
    f"{{% if ({C} | length) is number and {C} == 'x' %}}x{{% endif %}}",
    f"{{% if ({C} | length) is integer and {C} == 'x' %}}x{{% endif %}}",
    f"{{% if ({C} | length) is sameas 1 and {C} == 'x' %}}x{{% endif %}}",
    f"{{% if ({C} | safe) is sequence and {C} == 'x' %}}x{{% endif %}}",
    f"{{% if ({C} | safe | int) == 0 and {C} == 'x' %}}x{{% endif %}}{{{{ {C} | safe | int }}}}",
    f"{{{{ (5)[{C}] }}}}",
    f"{{{{ messages[{C} | safe] is defined }}}}",
    f"{{% set s %}}{{% for m in messages %}}{{{{ loop }}}}{{% endfor %}}{{% endset %}}"
    f"{{% if '1/2' in s and {C} == 'x' %}}x{{% endif %}}",
    f"{{{{ {{'\ufdd00\ufdd1': {C}}} | tojson }}}}{{{{ ['\ufdd00\ufdd1', {C}] | tojson }}}}",
    f"{{{{ {C} | tojson(indent={D}) }}}}{{{{ {C} | tojson(ensure_ascii={D}) }}}}",
    f"{{% if {C} == 'x' %}}{{% set ns = namespace(_a=1) %}}{{% endif %}}",
    f"{{% if lipsum(n=1) | length > 400 %}}{{{{ 'a' in {C} }}}}{{% endif %}}",
    f"{{% if '7' in (messages[0].items ~ '') and {C} == 'x' %}}x{{% endif %}}",
    f"{{{{ {C}[::0] }}}}",
    f"{{{{ {C}.replace(1, 2) }}}}",
    f"{{{{ {C}.lstrip(3) }}}}",
    f"{{{{ {C}.split('') }}}}",
    f"{{{{ {C}.strip({D}) }}}}",
    f"{{{{ {C}.replace({D}, 'x') }}}}",
    f"{{{{ {C} | list }}}}",
    f"{{{{ {C} | int }}}}",
    f"{{{{ {C} | e }}}}",
    f"{{{{ {C} | title }}}}",
    f"{{{{ {C} | indent }}}}",
    f"{{{{ {C} | reverse }}}}",
    f"{{{{ {C} | truncate(3) }}}}",
    f"{{{{ {C} * 2 }}}}",
    f"{{{{ '%s' % {C} }}}}",
    f"{{{{ '{{}}'.format({C}) }}}}",
    f"{{{{ {C} < {D} }}}}",
    f"{{{{ [{C}, {D}] | sort }}}}",
    f"{{{{ [{C}, {D}] | unique | list }}}}",
    f"{{{{ {C} in 'abc' }}}}",
    f"{{{{ {{'x': 1}}[{C}] }}}}",
    f"{{{{ [{C}] }}}}",
    f"{{{{ ({C} | length) + 1 }}}}",
    f"{{{{ {C} | length }}}}",
    f"{{{{ {C} is lower }}}}",
    f"{{{{ {C} is sameas {D} }}}}",
    f"{{{{ {C}.splitlines() }}}}{{{{ {C}.partition('a') }}}}{{{{ {C}.count('a') }}}}{{{{ {C}.isdigit() }}}}",
    f"{{{{ ({C} | safe) + 'x' }}}}",
    f"{{{{ ('x' | safe) + {C} }}}}",
    f"{{% for c in {C} %}}{{{{ c }}}}{{% endfor %}}",
    f"{{{{ sum }}}}{{{{ [''] | sum(start={C}) }}}}",
]
"""Templates that do what cannot be followed: rows are refused, and never rendered otherwise than by transformers."""


@pytest.mark.parametrize("template", HALF_FOLLOWED)
def test_what_cannot_be_followed_is_refused_and_never_guessed(
    template: str, chatml_tokenizer
) -> None:
    try:
        renderer = renderer_of(chatml_tokenizer, template)
    except Untraceable:
        return
    num_refused = 0
    for first, second in itertools.product(WORDS, repeat=2):
        messages = row(first, second)
        try:
            text = text_of(renderer._tracer, messages)
        except Untraceable:
            num_refused += 1
        else:
            try:
                expected = served(chatml_tokenizer, template, messages)
            except Exception:  # any that a template can fail with
                num_refused += 1
            else:
                assert text == expected, (first, second)
        with pytest.raises(RowRejected):  # for no text holds the anchors
            renderer.render(messages, None)
    assert num_refused > 0


def renderer_of(tokenizer: Any, template: str) -> Renderer:
    tokenizer.chat_template = template
    return Renderer(tokenizer, {}, Anchors("<|im_start|>a\n", "<|im_start|>a\n", "<|im_end|>", ()))


def test_the_same_answers_take_the_same_program() -> None:
    tracer = tracer_of(
        f"{{% if 'a' in {C} %}}{{{{ {C} | upper }}}}{{% elif {D} %}}{{{{ {D} }}}}{{% endif %}}."
    )
    rows = [row("xa", ""), row("ya", "b"), row("x", ""), row("", "b"), row("", "c")]
    programs = [tracer.program(messages, None)[0] for messages in rows]
    assert [programs.index(program) for program in programs] == [0, 0, 2, 3, 3]
    assert [text_of(tracer, messages) for messages in rows] == ["XA.", "YA.", ".", "b.", "c."]


def test_whether_a_row_is_accepted_does_not_depend_on_the_rows_before(chatml_tokenizer) -> None:
    template = (
        f"{{% for part in {C}.split(',') %}}{{{{ part | trim }}}};{{% endfor %}}"
        f"{{% if '#' in {D} %}}{{{{ {D} | list | join }}}}{{% elif '%' in {D} %}}{{{{ 1 / 0 }}}}{{% endif %}}"
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
            return text_of(tracer, messages)
        except Untraceable as error:
            return str(error)

    alone = [verdict(tracer_of(template), messages) for messages in rows]
    for order in itertools.permutations(range(len(rows))):
        tracer = tracer_of(template)
        assert [verdict(tracer, rows[number]) for number in order] == [
            alone[number] for number in order
        ]


def test_a_program_that_transformers_fails_on_is_refused_for_each_of_its_rows(
    chatml_tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    renderer = Renderer(
        chatml_tokenizer, {}, certify(chatml_tokenizer, EncodeConfig(tokenizer="t"))
    )

    def fails(*_: Any) -> str:
        raise RowRejected("template_error", "KeyError")

    monkeypatch.setattr("miles.data.template.render.render_text", fails)
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
def test_values_that_are_equal_but_not_the_same_have_programs_of_their_own(
    values: Any, chatml_tokenizer
) -> None:
    template = "{% for m in messages %}{{ m.extra }},{{ m.deep }};{% endfor %}".replace(
        "m.deep", "m.deep[0]"
    )
    tracer = tracer_of(template)
    for value in (*values, *values):
        messages = [{"role": "user", "content": "q", "extra": value, "deep": [value]}]
        try:
            text = text_of(tracer, messages)
        except Untraceable:  # a list that holds a string, written out
            continue
        assert text == served(chatml_tokenizer, template, messages)


def test_reasoning_goes_by_the_names_that_transformers_gives_it(chatml_tokenizer) -> None:
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
            assert text_of(tracer, messages) == served(chatml_tokenizer, template, messages)


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
            assert text_of(tracer, messages, tools) == served(
                chatml_tokenizer, template, messages, tools
            )


def test_owners_are_the_messages_whose_strings_a_part_is_made_of() -> None:
    tracer = tracer_of(
        f"a{{{{ {C} }}}}b{{{{ {D} | upper }}}}{{{{ ({C} ~ {D}) | lower }}}}{{{{ tools[0].x }}}}"
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
def test_nothing_that_a_row_says_is_a_literal(where: str) -> None:
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
        Untraceable, match=r"a key that could be a marker|a role that is not a plain word"
    ):
        tracer.program([message], tools)


def test_a_role_may_hold_no_character_of_a_marker() -> None:
    tracer = Tracer("{{ messages[0].role }}", {}, reserved="助手")
    with pytest.raises(Untraceable, match="role"):
        tracer.program([{"role": "助手", "content": "q"}], None)


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% for a in range(99999) %}{% for b in range(99999) if false %}{% endfor %}{% endfor %}",
        "{% for a in range(99999) %}{% set b = range(99999) | list %}{% endfor %}",
        "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}",
        "{% for a in range(99999) %}{{ messages[0].content }}"
        + "{{ messages[0].content }}" * 9
        + "{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{% set x %}{% for a in range(99999) %}" + "x" * 99 + "{% endfor %}{% endset %}",
        "{{ 'x' * 10 ** 9 }}",
        "{{ 10 ** 9 * 'x' }}",
        "{{ ([0] * 10 ** 9) | length }}",
        "{% set n = 1000000000 %}{{ 'x'.ljust(n) }}",
        "{{ 'x' | center(1000000000) }}",
        "{{ 'x\ny' | indent(1000000000) }}",
        "{{ ''.ljust(1000000000) }}",
        "{{ '%1000000000d' % 1 }}",
        "{{ '%(a)1000000000d' % {'a': 1} }}",
        "{{ '%*d' % (1000000000, 1) }}",
        "{{ '%1000000000d' | format(1) }}",
        "{{ '{:1000000000}'.format(1) }}",
        "{{ '{:{}}'.format(1, 1000000000) }}",
        "{{ '{:{w}}'.format_map({'w': 1000000000}) }}",
        "{{ '\t'.expandtabs(1000000000) }}",
        "{{ [0] | batch(1000000000, 0) | list }}",
        "{{ [0] | slice(1000000000) | list }}",
        "{{ [0] | tojson(indent=1000000000) }}",
        "{{ 10 ** (10 ** 10) }}",
        "{% set ns = namespace(x='xx') %}{% for a in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
        "{% set ns = namespace(x='xx') %}{% for a in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "{% set ns = namespace(x='xx') %}{% for a in range(99) %}{% set ns.x = [ns.x, ns.x] | join %}{% endfor %}",
        "{% set ns = namespace(x='xx') %}{% for a in range(99) %}{% set ns.x = ns.x.join([ns.x, ns.x]) %}{% endfor %}",
        "{% set ns = namespace(x='xx') %}{% for a in range(99) %}{% set ns.x = ns.x.replace('x', 'xx') %}{% endfor %}",
        "{% set ns = namespace(x='xx') %}{% for a in range(99) %}{% set ns.x = ns.x | replace('x', 'xx') %}"
        "{% endfor %}",
        "{% set ns = namespace(x=[0]) %}{% for a in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
        "{% set ns = namespace(x=[0]) %}{% for a in range(99) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
        "{% set ns = namespace(x=[0]) %}{% for a in range(99) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}"
        "{{ ns.x | tojson }}",
        "{% set ns = namespace(x=9) %}{% for a in range(99) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
        f"{{% set ns = namespace(x={C}) %}}{{% for a in range(99) %}}{{% set ns.x = ns.x + ns.x %}}{{% endfor %}}",
        f"{{% set ns = namespace(x={C}) %}}{{% for a in range(50) %}}"
        f"{{% set ns.x = ns.x.replace('x', 'xx') %}}{{% endfor %}}",
    ],
)
def test_what_does_not_end_ends_soon_and_never_reaches_transformers(
    template: str, chatml_tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "miles.data.template.render.render_text", lambda *_: pytest.fail("transformers ran it")
    )
    renderer = renderer_of(chatml_tokenizer, template)
    begin = time.process_time()
    with pytest.raises(RowRejected, match="template_error: the chat template does not end"):
        renderer.render(row("x", "y"), None)
    assert time.process_time() - begin < 20


def test_a_conversation_of_thousands_of_turns_is_no_endless_template(chatml_tokenizer) -> None:
    chatml_tokenizer.chat_template = (
        "{% for m in messages[::-1] %}{% if loop.index0 > messages | length %}x{% endif %}{% endfor %}"
        + chatml_tokenizer.chat_template
    )
    messages = [
        {"role": role, "content": f"{role} {number}"}
        for number in range(5_000)
        for role in ("user", "assistant")
    ]
    text, spans = Renderer(
        chatml_tokenizer, {}, certify(chatml_tokenizer, EncodeConfig(tokenizer="t"))
    ).render(messages, None)
    assert text == chatml_tokenizer.apply_chat_template(messages, tokenize=False)
    assert len(spans) == 5_000


def test_a_template_that_calls_itself_for_ever_is_refused(chatml_tokenizer) -> None:
    renderer = renderer_of(chatml_tokenizer, "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}")
    with pytest.raises(RowRejected, match="template_error: RecursionError"):
        renderer.render(row("x"), None)


def test_what_only_some_rows_make_too_much_of_is_refused_for_those(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(trace, "MAX_CHARACTERS", 1000)
    monkeypatch.setattr(symbols, "MAX_CHARACTERS", 1000)
    tracer = tracer_of(f"{{{{ {C}.replace('a', 'aaaaaaaaaa') }}}}{{{{ {C} }}}}")
    for content in ("a", "a" * 200, "b" * 600, "a"):
        if len(content) == 1:
            assert text_of(tracer, row(content)) == "a" * 11
        else:
            with pytest.raises(Unbounded):
                text_of(tracer, row(content))


def test_long_conversations(chatml_tokenizer) -> None:
    template = chatml_tokenizer.chat_template
    tracer = tracer_of(template)
    for content in ("q", "</think>", "x" * 2000):
        messages = row(*[content] * 1000)
        assert text_of(tracer, messages) == served(chatml_tokenizer, template, messages)


def test_operations_upon_operations_are_refused_before_python_refuses_them(
    chatml_tokenizer,
) -> None:
    template = (
        "{% set ns = namespace(x='') %}{% for m in messages %}{% set ns.x = (ns.x + m.content) | upper %}{% endfor %}"
        "{{ ns.x }}"
    )
    tracer = tracer_of(template)
    messages = row(*["q"] * 50)
    assert text_of(tracer, messages) == served(chatml_tokenizer, template, messages)
    with pytest.raises(Untraceable, match="operations on one string"):
        tracer.program(row(*["q"] * 500), None)


def test_data_that_is_not_json_or_too_deep_is_refused() -> None:
    tracer = tracer_of("{{ messages | tojson }}")
    deep: Any = "x"
    for _ in range(5000):
        deep = [deep]
    for value in (deep, {1, 2}, b"x", object(), {1: 2}):
        with pytest.raises(Untraceable):
            tracer.program([{"role": "user", "content": value}], None)


def test_programs_are_let_go_of_and_made_anew(
    chatml_tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trace, "_MAX_KEPT", 40)
    template = "{% for m in messages %}{{ '' if 'a' in m.content else m.content }}.{% endfor %}"
    tracer = tracer_of(template)
    for contents in itertools.product(("a", "b"), repeat=5):
        for length in range(1, 6):
            messages = row(*contents[:length])
            assert text_of(tracer, messages) == served(chatml_tokenizer, template, messages)
    assert len(tracer._programs) < 5


def test_a_template_that_does_not_compile_is_untraceable() -> None:
    for template in (
        "{% if %}",
        "{{ x | no_such_filter }}",
        "{% include 'x' %}{% nothing %}",
        "{{ " + "(" * 500 + "}}",
    ):
        with pytest.raises(Untraceable):
            Tracer(template, {})
    assert literals("a{{ 'b' ~ x }}{% if true %}c{% endif %}") == {"a", "b", "c"}


def test_the_template_is_given_what_transformers_gives_it(chatml_tokenizer) -> None:
    template = (
        "{{ eos_token }}{{ bos_token is defined }}{{ documents }}{{ tools }}{{ add_generation_prompt }}{{ flag }}"
        "{{ strftime_now is defined }}{{ raise_exception is defined }}"
    )
    tracer = tracer_of(
        template, **chatml_tokenizer.special_tokens_map, flag=json.loads("[1, null]")
    )
    text = chatml_tokenizer.apply_chat_template(
        row("q"), chat_template=template, tokenize=False, flag=[1, None]
    )
    assert text_of(tracer, row("q")) == text
