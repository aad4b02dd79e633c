"""What a template may not do, and that it ends."""

import time

import pytest

from miles.data.config import EncodeConfig
from miles.data.template import symbols, trace
from miles.data.template.certify import certify
from miles.data.template.render import Renderer
from miles.data.template.sandbox import literals
from miles.data.template.symbols import Unbounded, Untraceable
from miles.data.template.trace import Tracer
from miles.data.types import RowRejected
from tests.support.templates import of_contents, renderer_of, row, served, traced, tracer_of

ENDLESS = [
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% for a in range(99999) %}{% for b in range(99999) if false %}{% endfor %}{% endfor %}",
    "{% for a in range(99999) %}{% set b = range(99999) | list %}{% endfor %}",
    "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}",
    "{% for a in range(99999) %}" + "{{ $C }}" * 10 + "{% endfor %}",
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
    "{% set ns = namespace(x='xx') %}{% for a in range(99) %}{% set ns.x = ns.x + ns.x %}"
    "{% endfor %}",
    "{% set ns = namespace(x='xx') %}{% for a in range(99) %}{% set ns.x = ns.x ~ ns.x %}"
    "{% endfor %}",
    "{% set ns = namespace(x='xx') %}{% for a in range(99) %}"
    "{% set ns.x = [ns.x, ns.x] | join %}{% endfor %}",
    "{% set ns = namespace(x='xx') %}{% for a in range(99) %}"
    "{% set ns.x = ns.x.join([ns.x, ns.x]) %}{% endfor %}",
    "{% set ns = namespace(x='xx') %}{% for a in range(99) %}"
    "{% set ns.x = ns.x.replace('x', 'xx') %}{% endfor %}",
    "{% set ns = namespace(x='xx') %}{% for a in range(99) %}"
    "{% set ns.x = ns.x | replace('x', 'xx') %}{% endfor %}",
    "{% set ns = namespace(x=[0]) %}{% for a in range(99) %}{% set ns.x = ns.x + ns.x %}"
    "{% endfor %}",
    "{% set ns = namespace(x=[0]) %}{% for a in range(99) %}{% set ns.x = [ns.x, ns.x] %}"
    "{% endfor %}{{ ns.x }}",
    "{% set ns = namespace(x=[0]) %}{% for a in range(99) %}{% set ns.x = [ns.x, ns.x] %}"
    "{% endfor %}{{ ns.x | tojson }}",
    "{% set ns = namespace(x=9) %}{% for a in range(99) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "{% set ns = namespace(x=$C) %}{% for a in range(99) %}{% set ns.x = ns.x + ns.x %}"
    "{% endfor %}",
    "{% set ns = namespace(x=$C) %}{% for a in range(50) %}"
    "{% set ns.x = ns.x.replace('x', 'xx') %}{% endfor %}",
]


@pytest.mark.parametrize("template", ENDLESS)
def test_an_endless_template_never_reaches_transformers(
    template: str, chatml_tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "miles.data.template.render._served_text", lambda *_: pytest.fail("transformers ran it")
    )
    renderer = renderer_of(chatml_tokenizer, of_contents(template))
    begin = time.process_time()
    with pytest.raises(RowRejected, match="template_error: the chat template does not end"):
        renderer.render(row("x", "y"), None)
    assert time.process_time() - begin < 20


BEHIND = [
    "{% set x = $C | list %}",
    "{% set x = $C < 'b' %}",
    "{{ $C | list | length }}",
    "{% set x = {} %}{% if $C in x %}{% endif %}",
]
"""What no symbol can follow: a trace ends there, so it says nothing of what comes behind."""


@pytest.mark.parametrize("before", BEHIND)
@pytest.mark.parametrize("endless", [ENDLESS[0], ENDLESS[7], ENDLESS[-1]])
def test_what_cannot_be_traced_is_rehearsed_before_transformers(
    before: str, endless: str, chatml_tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "miles.data.template.render._served_text", lambda *_: pytest.fail("transformers ran it")
    )
    renderer = renderer_of(chatml_tokenizer, of_contents(before + endless))
    with pytest.raises(RowRejected, match="template_error: the chat template does not end"):
        renderer.render(row("x", "y"), None)


@pytest.mark.parametrize("chance", ["[1, 2] | random", "lipsum()", "range(9) | pprint"])
def test_what_may_differ_the_next_time_never_reaches_transformers(
    chance: str, chatml_tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "miles.data.template.render._served_text", lambda *_: pytest.fail("transformers ran it")
    )
    renderer = renderer_of(chatml_tokenizer, "{{ " + chance + " }}" + ENDLESS[0])
    with pytest.raises(RowRejected, match="unlocatable_turn: the chat template cannot be followed"):
        renderer.render(row("x", "y"), None)


ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ ''['__class__'] }}",
    "{{ '' | attr('__class__') }}",
    "{{ 'x'.format.__globals__ }}",
    "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "{{ ('{0.__class__}' | attr('format'))(1) }}",
    "{{ [''] | map('format', 1) | list }}",
    "{{ self.__init__.__globals__ }}",
    "{{ self._TemplateReference__context }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ lipsum.__globals__['os'].popen('id').read() }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ range.__self__ }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update({'content': 'z'}) }}",
    "{% include '/etc/passwd' %}",
    "{% import '/etc/passwd' as x %}",
    "{% extends '/etc/passwd' %}",
]


@pytest.mark.parametrize("escape", ESCAPES)
def test_no_template_leaves_the_sandbox(escape: str, chatml_tokenizer) -> None:
    """It fails, or what it reached for is undefined: no text of ours, and no effect on the row."""
    messages = row("x", "y")
    renderer = renderer_of(chatml_tokenizer, escape + of_contents("<|im_start|>a\n{{ $D }}"))
    with pytest.raises(RowRejected) as caught:
        renderer.render(messages, None)
    assert messages == row("x", "y")
    for sign in ("uid=", "root:", "module", "<class"):
        assert sign not in str(caught.value)


def test_thousands_of_turns_are_not_endless(chatml_tokenizer) -> None:
    chatml_tokenizer.chat_template = (
        "{% for m in messages[::-1] %}{% if loop.index0 > messages | length %}x{% endif %}"
        "{% endfor %}" + chatml_tokenizer.chat_template
    )
    messages = row(*[f"turn {number}" for number in range(10_000)])

    certificate = certify(chatml_tokenizer, EncodeConfig(tokenizer="t"))
    text, spans = Renderer(chatml_tokenizer, {}, certificate).render(messages, None)
    assert text == chatml_tokenizer.apply_chat_template(messages, tokenize=False)
    assert len(spans) == 5_000


def test_endless_recursion_is_refused(chatml_tokenizer) -> None:
    renderer = renderer_of(chatml_tokenizer, "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}")
    with pytest.raises(RowRejected, match="template_error: RecursionError"):
        renderer.render(row("x"), None)


def test_too_much_text_is_refused_by_row(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(trace, "MAX_CHARACTERS", 1000)
    monkeypatch.setattr(symbols, "MAX_CHARACTERS", 1000)
    tracer = tracer_of(of_contents("{{ $C.replace('a', 'aaaaaaaaaa') }}{{ $C }}"))
    for content in ("a", "a" * 200, "b" * 600, "a"):
        if len(content) == 1:
            assert traced(tracer, row(content)) == "a" * 11
        else:
            with pytest.raises(Unbounded):
                traced(tracer, row(content))


def test_operations_on_operations_have_a_limit(
    chatml_tokenizer,
) -> None:
    template = (
        "{% set ns = namespace(x='') %}{% for m in messages %}"
        "{% set ns.x = (ns.x + m.content) | upper %}{% endfor %}{{ ns.x }}"
    )
    tracer = tracer_of(template)
    messages = row(*["q"] * 50)
    assert traced(tracer, messages) == served(chatml_tokenizer, template, messages)
    with pytest.raises(Untraceable, match="operations on one string"):
        tracer.program(row(*["q"] * 500), None)


def test_a_template_must_compile() -> None:
    for template in (
        "{% if %}",
        "{{ x | no_such_filter }}",
        "{% include 'x' %}{% nothing %}",
        "{{ " + "(" * 500 + "}}",
    ):
        with pytest.raises(Untraceable):
            Tracer(template, {})


def test_literals_are_data_and_constants() -> None:
    assert literals("a{{ 'b' ~ x }}{% if true %}c{% endif %}") == {"a", "b", "c"}
