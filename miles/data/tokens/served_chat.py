"""Renders a chat template as transformers serves it, without transformers.

    template, messages, variables  ->  the text of `apply_chat_template(..., tokenize=False)`

A loader compares the first row of each program with this text: importing transformers, which brings
torch, would cost it seconds and hundreds of megabytes. The settings are transformers' own: Jinja's
immutable sandbox, its `trim_blocks` and `lstrip_blocks`, its extensions, filters and globals, and
what it does to messages first. Where the state of an encoder is packed
(`encoding/carried_state.py`), both texts are proven equal on every probe; a tokenizer on which they
differ is loaded by transformers in each loader.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

_KEPT_TEMPLATES = 8
REASONING_NAMES = ("reasoning_content", "thinking", "reasoning")
"""Keys of a message under which its reasoning may stand; templates read the first two."""


def served_text(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
    variables: Mapping[str, Any],
    *,
    add_generation_prompt: bool = False,
) -> str:
    """Return a conversation as transformers renders it.

    Args:
        messages, tools: plain JSON types.
        variables: what the template is given beside them, special tokens among them.

    Raises:
        Exception: whatever the template, Jinja or Python raise, as from transformers.
    """
    if not messages:
        raise ValueError("an empty conversation; expected at least one message")
    return compiled(template).render(
        messages=[_served_message(message) for message in messages],
        tools=None if tools is None else list(tools),
        documents=None,
        add_generation_prompt=add_generation_prompt,
        **variables,
    )


def _served_message(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message without its keys of no value, and with the usual names of its reasoning."""
    return with_reasoning_names({key: value for key, value in message.items() if value is not None})


def with_reasoning_names(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message with its reasoning under each name that templates read, as transformers."""
    reasoning = next((message[name] for name in REASONING_NAMES if name in message), None)
    if reasoning is None:
        return message
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}


@lru_cache(maxsize=_KEPT_TEMPLATES)
def compiled(template: str) -> jinja2.Template:
    """Compile a template in the environment that transformers gives to chat templates."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
        "dict": TemplateDict(),
        "namespace": _Namespace,
    }
    return environment.from_string(template)


class Generation(Extension):
    """`{% generation %}`, with which some templates mark answers: it puts out what is inside."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_inside"), [], [], body).set_lineno(line)

    def _inside(self, caller: Callable[[], Any]) -> Any:
        return caller()


class TemplateDict:
    """The `dict` that transformers gives to templates: a call and `fromkeys`, nothing else."""

    def __call__(self, *pairs: Any, **more: Any) -> dict[Any, Any]:
        return dict(*pairs, **more)

    def fromkeys(self, keys: Any, value: Any = None) -> dict[Any, Any]:
        return dict.fromkeys(keys, value)


class _Namespace(Namespace):
    """Jinja's namespace, whose names may not begin with an underscore."""

    # `self` may be the name of an attribute, so it is no parameter of that name.
    def __init__(*arguments: Any, **more: Any) -> None:
        self, *pairs = arguments
        attributes = dict(*pairs, **more)
        for name in attributes:
            _require_public(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _require_public(name)
        super().__setitem__(name, value)


def _require_public(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace may not have the attribute {name!r}")


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """Return a value as JSON; unlike Jinja's own filter, without HTML escapes."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: Any) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(layout: str) -> str:
    return datetime.now().strftime(layout)
