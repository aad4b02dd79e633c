"""Symbols: one by one, and in templates whose text must be that of transformers for every row."""

import itertools
from operator import itemgetter
from typing import Any

import pytest

from miles.data.template.symbols import Derived, GuardLog, Symbol, Untraceable, join_literals
from miles.data.types import RowRejected
from tests.support.templates import (
    WORDS,
    of_contents,
    renderer_of,
    row,
    served,
    traced,
    tracer_of,
)


def symbol_of(content: str) -> tuple[Symbol, GuardLog]:
    log = GuardLog([content])
    return Symbol(log, (Derived(itemgetter(0), frozenset([0])),)), log


def test_a_derived_part_is_computed_for_any_row() -> None:
    symbol, log = symbol_of("a#b")
    (part,) = symbol.replace("#", "-").upper()._parts
    assert isinstance(part, Derived)
    assert [part.compute([text]) for text in ("a#b", "c", "##")] == ["A-B", "C", "--"]
    assert part.sources == {0}
    assert part.depth == 2
    assert log.answers == []


def test_added_text_stays_literal() -> None:
    symbol, _ = symbol_of("a")
    head, _, tail = ("<" + symbol + ">")._parts
    assert (head, tail) == ("<", ">")


def test_stripping_eats_literals_and_keeps_the_rest_literal() -> None:
    symbol, log = symbol_of(" a ")
    parts = ("\n" + symbol + " \n<end>\n").strip()._parts
    assert parts[-1] == " \n<end>"
    assert parts[0].compute([" b "]) == "b "
    assert [guard(["  "]) for guard, _ in log.answers] == [False]


def test_each_question_is_noted_with_its_answer() -> None:
    symbol, log = symbol_of("abc")
    assert "b" in symbol
    assert not symbol.startswith("b")
    assert symbol[2:] == "c"
    assert [answer for _, answer in log.answers] == [True, False, True]
    assert [guard(["b"]) for guard, _ in log.answers] == [True, True, False]


def test_a_split_asks_for_each_further_piece() -> None:
    symbol, log = symbol_of("a,b")
    assert len(symbol.split(",")) == 2
    assert [answer for _, answer in log.answers] == [True, True, False]


@pytest.mark.parametrize("look", [str, list, len, hash, int, lambda s: s < "a", lambda s: s * 2])
def test_any_other_look_is_refused(look: Any) -> None:
    with pytest.raises(Untraceable):
        look(symbol_of("1")[0])


def test_neighbouring_literals_are_joined() -> None:
    derived = Derived(itemgetter(0), frozenset([0]))
    assert join_literals(("a", "b", derived, "", derived, "c", "")) == ("ab", derived, derived, "c")


FOLLOWED = [
    "{{ $C }}",
    "{{ $C | trim }}|{{ $C | trim('x#') }}|{{ $C.strip() }}|{{ $C.lstrip('\\n ') }}",
    "{{ ('\\n' ~ $C ~ ' \\n') | trim }}|{{ (' ' + $C + $D + ' ').rstrip() }}",
    "{{ $C | upper }}{{ $C | lower }}{{ $C | capitalize }}{{ $C.title() }}",
    "{{ $C.replace('a', 'bb') }}{{ $C | replace('#', '') }}{{ $C | replace('#', '', 2) }}",
    "{{ $C.removeprefix('x').removesuffix('#') }}",
    "{{ $C[1:] }}|{{ $C[:-2] }}|{{ $C[::-1] }}|{{ $C[-3:1:-2] }}|{{ $C[5:2] }}",
    "{{ $C[0] }}|{{ $C[-1] }}|{{ $C[2] is defined }}|{{ $C['strip'] is defined }}",
    "{{ $C.split('</think>')[-1].lstrip('\\n') }}|"
    "{{ $C.split('</think>')[0].split('<think>')[-1] }}",
    "{% for p in $C.split(',') %}[{{ loop.index }}/{{ loop.length }} {{ p }}]{% endfor %}",
    "{{ $C.split() | length }}|{{ $C.split(none, 1) | join('+') }}|{{ $C.rsplit(',', 1)[-1] }}",
    "{{ $C.split(sep=',', maxsplit=1) | last }}|{{ ', '.join($C.split(',')) }}",
    "{{ 'yes' if 'a' in $C else 'no' }}{{ 'yes' if $D in $C else 'no' }}",
    "{{ $C in ['x', 'a b'] }}{{ $C not in ('real',) }}{{ $C is in ['x'] }}",
    "{{ $C == $D }}{{ $C != 'x' }}{{ 'x' == $C }}{{ $C == 1 }}{{ $C is eq('x') }}",
    "{{ [$C, $D] == ['x', 'x'] }}{{ {'a': $C} == {'a': 'x'} }}{{ messages[0] in messages[1:] }}",
    "{{ $C or 'empty' }}{{ $C and $D }}{{ not $C }}{{ $C | default('e', true) }}",
    "{{ $C is string }}{{ $C is sequence }}{{ $C is iterable }}{{ $C is mapping }}",
    "{{ $C is number }}{{ $C is none }}{{ $C is defined }}{{ $C is callable }}{{ $C is true }}",
    "{{ $C is escaped }}{{ ($C | safe) is escaped }}{{ $C | safe }}{{ $C | safe ~ 'x' }}",
    "{{ ($C | length) > 3 }}{{ 3 < $C | length }}{{ $C | length == 0 }}{{ $C | count in [1, 3] }}",
    "{% if $C | length %}long{% endif %}{{ ($C | length) is string }}"
    "{{ ($C | length) is mapping }}",
    "{{ $C.startswith('a') }}{{ $C.endswith($D) }}",
    "{{ $C | tojson }}{{ $C | tojson(ensure_ascii=true) }}{{ $C | tojson | tojson }}",
    "{{ [$C, {'k': $D, 'a': [1, none, true, 1.5]}] | tojson(indent=2, sort_keys=true) }}",
    "{{ {'b': $C, 'a': $D} | tojson(separators=(',', ':'), sort_keys=true) }}"
    "{{ messages | tojson }}",
    "{{ ('<' ~ $C ~ '>') | tojson }}{{ [$C, 'lit', $C] | join('\\n') }}{{ [1, $C] | join }}",
    "{{ messages | map(attribute='content') | join('; ') }}"
    "{{ messages | map(attribute='content') | map('upper') | join }}",
    "{{ messages | selectattr('content') | list | length }}"
    "{{ messages | selectattr('role', 'eq', 'user') | list | length }}",
    "{{ messages | rejectattr('content', 'in', ['x', '0']) | map(attribute='content') | "
    "list | join('/') }}",
    "{{ (messages | map(attribute='content') | select('equalto', 'x') | list) | length }}"
    "{{ messages | last | length }}",
    "{% for g in messages | groupby('role') %}{{ g.grouper }}:{{ g.list | length }}"
    "{% endfor %}{{ [$C] | max }}",
    "{% for k, v in messages[0].items() %}{{ k }}={{ v }}{% endfor %}"
    "{{ messages[0].get('content', '') }}{{ messages[0].x }}",
    "{% for k, v in messages[0] | dictsort %}{{ k }}={{ v }}{% endfor %}"
    "{{ messages[0] | items | list | length }}",
    "{% macro m(x, y='d') %}[{{ x }}{{ y }}{{ caller() if caller }}]{% endmacro %}"
    "{{ m($C) }}{% call m($D, y=$C) %}in{{ $C }}{% endcall %}",
    "{% set x %}a{{ $C }}b{% endset %}{{ x | upper }}{% filter lower %}Q{{ $C }}{% endfilter %}",
    "{% set x | replace('a', 'b') %}a{{ $C }}{% endset %}{{ x }}{{ x == 'bx' }}",
    "{% set ns = namespace(t='', n=0) %}{% for m in messages %}"
    "{% set ns.t = ns.t + m.content %}{% set ns.n = ns.n + 1 %}{% endfor %}"
    "{{ ns.t | trim }}{{ ns.n }}",
    "{% for m in messages recursive %}{{ m.content }}{% if m.parts %}({{ loop(m.parts) }}"
    "){% endif %}{% endfor %}",
    "{% for m in messages if m.content != 'x' %}{{ loop.index }}{{ m.content }}{% else %}"
    "none{% endfor %}",
    "{% for m in messages %}{% if m.content == 'x' %}{% continue %}"
    "{% elif m.content == '0' %}{% break %}{% endif %}-{% endfor %}",
    "{% for m in messages %}{{ loop.changed(m.content) }}{{ loop.cycle('a', m.content) }}"
    "{{ loop.previtem is defined }}{% endfor %}",
    "{% generation %}{{ $C }}{% endgeneration %}{% block b %}{{ $C }}{% endblock %}{{ self.b() }}",
    "  {%- if $C -%}  a  {%- endif %}\n   {{ $C -}}   \n b  {# c #}\n{% if true %}"
    "\nx\n{% endif %}\n",
    "{% set c = cycler('a', $C) %}{{ c.next() }}{{ c.next() }}{% set j = joiner($C) %}"
    "{{ j() }}{{ j() }}",
    "{{ dict(a=$C).a }}{{ dict.fromkeys(['a'], $C)['a'] }}{{ range(3) | list }}",
    "{{ 'a' * 3 }}{{ 2 ** 10 }}{{ 7 % 3 }}{{ [1] * 2 + [3] }}{{ 10000000 + 1 }}"
    "{{ 10000000 | tojson }}{{ 1e7 * 9000000 }}{{ 123456789 | string }}"
    "{{ 'a b' | title }}",
    "{% if dict.keys is defined and $C == 'x' %}x{% endif %}",
    "{% if 'random' is filter and $C == 'x' %}x{% endif %}",
    "{{ none }}{{ true }}{{ 1.0 }}{{ undefined_name }}{{ [none, 'q'] }}{{ {'a': 1.5} }}{{ -0.0 }}",
    "{{ $C.foo is defined }}{{ $C._log is defined }}{{ $C['_parts'] }}",
    "{{ messages[0] | attr('content') is defined }}{{ $C | string is string }}",
]
"""For each template, the text of every row is what transformers renders."""


@pytest.mark.parametrize("template", FOLLOWED)
def test_every_row_is_rendered_as_by_transformers(template: str, chatml_tokenizer) -> None:
    template = of_contents(template)
    tracer = tracer_of(template, **chatml_tokenizer.special_tokens_map)
    for first, second in itertools.product(WORDS, repeat=2):
        messages = row(first, second)
        assert traced(tracer, messages) == served(chatml_tokenizer, template, messages), (
            first,
            second,
        )


HALF_FOLLOWED = [
    "{% autoescape true %}{{ $C }}{% endautoescape %}",
    "{% if ($C | length).real %}long{% endif %}",
    "{% if ($C | length) is number and $C == 'x' %}x{% endif %}",
    "{% if ($C | length) is integer and $C == 'x' %}x{% endif %}",
    "{% if ($C | length) is sameas 1 and $C == 'x' %}x{% endif %}",
    "{% if ($C | safe) is sequence and $C == 'x' %}x{% endif %}",
    "{% if ($C | safe | int) == 0 and $C == 'x' %}x{% endif %}{{ $C | safe | int }}",
    "{{ (5)[$C] }}",
    "{{ messages[$C | safe] is defined }}",
    "{% set s %}{% for m in messages %}{{ loop }}{% endfor %}{% endset %}"
    "{% if '1/2' in s and $C == 'x' %}x{% endif %}",
    "{{ {'\ufdd00\ufdd1': $C} | tojson }}{{ ['\ufdd00\ufdd1', $C] | tojson }}",
    "{{ $C | tojson(indent=$D) }}{{ $C | tojson(ensure_ascii=$D) }}",
    "{% if $C == 'x' %}{% set ns = namespace(_a=1) %}{% endif %}",
    "{% if lipsum(n=1) | length > 400 %}{{ 'a' in $C }}{% endif %}",
    "{% if '7' in (messages[0].items ~ '') and $C == 'x' %}x{% endif %}",
    "{{ $C[::0] }}",
    "{{ $C.replace(1, 2) }}",
    "{{ $C.lstrip(3) }}",
    "{{ $C.split('') }}",
    "{{ $C.strip($D) }}",
    "{{ $C.replace($D, 'x') }}",
    "{{ $C | list }}",
    "{{ $C | int }}",
    "{{ $C | e }}",
    "{{ $C | title }}",
    "{{ $C | indent }}",
    "{{ $C | reverse }}",
    "{{ $C | truncate(3) }}",
    "{{ $C * 2 }}",
    "{{ '%s' % $C }}",
    "{{ '{}'.format($C) }}",
    "{{ $C < $D }}",
    "{{ [$C, $D] | sort }}",
    "{{ [$C, $D] | unique | list }}",
    "{{ $C in 'abc' }}",
    "{{ {'x': 1}[$C] }}",
    "{{ [$C] }}",
    "{{ ($C | length) + 1 }}",
    "{{ $C | length }}",
    "{{ $C is lower }}",
    "{{ $C is sameas $D }}",
    "{{ $C.splitlines() }}{{ $C.partition('a') }}{{ $C.count('a') }}{{ $C.isdigit() }}",
    "{{ ($C | safe) + 'x' }}",
    "{{ ('x' | safe) + $C }}",
    "{% for c in $C %}{{ c }}{% endfor %}",
    "{{ sum }}{{ [''] | sum(start=$C) }}",
]
"""Templates that cannot be followed for some rows: these are refused, never rendered otherwise."""


@pytest.mark.parametrize("template", HALF_FOLLOWED)
def test_a_row_is_followed_or_refused(template: str, chatml_tokenizer) -> None:
    template = of_contents(template)
    try:
        renderer = renderer_of(chatml_tokenizer, template)
    except Untraceable:
        return

    num_refused = 0
    for first, second in itertools.product(WORDS, repeat=2):
        messages = row(first, second)
        try:
            text = traced(renderer._tracer, messages)
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
