"""Runs a chat template on plain text in the sandbox, before transformers runs it without limits.

A template is traced on symbols (`trace.py`), which counts its steps. Where a trace ends early,
because the template takes a string in a way that a symbol cannot follow, nothing is known of what
it would have done next. So it is rehearsed: the same row, as plain text, with the same limits.

    ends, or fails by itself     transformers may run it: it will do the same
    goes on and on, or grows     `Unbounded`: transformers must not run it
    takes a random choice, …     `Untraceable`: it may do something else the next time

Jinja computes constant expressions when it compiles, also those that no row reaches. So they are
computed here first, one after another, and counted: `10 ** (10 ** 10)` would not end.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, wraps
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.visitor import NodeTransformer

from miles.data.template.sandbox import Environment
from miles.data.template.symbols import Unbounded, Untraceable
from miles.data.template.trace import Message, Tool
from miles.data.tokens.served_chat import with_reasoning_names

_KEPT_TEMPLATES = 4


class _Raised(Exception):
    """A template calls `raise_exception`."""


class _PlainEnvironment(Environment):
    """The sandbox of symbols, for plain text: a template that raises does not count as refused."""

    def __init__(self) -> None:
        super().__init__()
        self.globals["raise_exception"] = _raise
        self.filters = {name: self._noting(function) for name, function in self.filters.items()}
        self.unbounded: Unbounded | None = None
        """raised by a filter of a constant, which Jinja takes for "not constant" and goes on"""

    def _noting(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def noted(*arguments: Any, **more: Any) -> Any:
            try:
                return function(*arguments, **more)
            except Unbounded as error:
                self.unbounded = error
                raise

        return noted


class _Folder(NodeTransformer):
    """Computes the constant expressions of a template, the innermost first, as Jinja does."""

    def __init__(self, environment: _PlainEnvironment) -> None:
        self._environment = environment
        self._context = nodes.EvalContext(environment)

    def generic_visit(self, node: nodes.Node, *arguments: Any, **more: Any) -> nodes.Node:
        """Return the node, or its value where it is constant.

        Raises:
            Unbounded: the value would be large.
        """
        node = super().generic_visit(node, *arguments, **more)
        if not isinstance(node, nodes.Expr):
            return node

        try:
            value = self._value(node)
            return nodes.Const.from_untrusted(value, node.lineno, self._environment)
        except Unbounded:
            raise
        except Exception:  # it is not constant, or fails: then nothing is made of it
            return node
        finally:
            if self._environment.unbounded is not None:
                raise self._environment.unbounded

    def _value(self, node: nodes.Expr) -> Any:
        if not isinstance(node, nodes.BinExpr):
            return node.as_const(self._context)
        left = node.left.as_const(self._context)
        right = node.right.as_const(self._context)
        if node.operator in self._environment.intercepted_binops:
            return self._environment.call_binop(None, node.operator, left, right)
        return node.as_const(self._context)


def require_ends(
    template: str,
    messages: Sequence[Message],
    tools: Sequence[Tool] | None,
    variables: Mapping[str, Any],
) -> None:
    """Refuse a template that would not end on a row, or would make anything large.

    Args:
        messages, tools: plain JSON types.
        variables: what the template is given beside them.

    Raises:
        Unbounded: it does not end, or what it makes has no bounds.
        Untraceable: it does what would not be the same the next time, or cannot be counted.
    """
    plain_messages = []
    for message in messages:
        stated = {key: value for key, value in message.items() if value is not None}
        plain_messages.append(with_reasoning_names(stated))

    try:
        environment, compiled = _compiled(template)
        environment.num_steps = 0
        compiled.render(
            messages=plain_messages,
            tools=None if tools is None else list(tools),
            documents=None,
            **{"add_generation_prompt": False, **variables},
        )
    except Untraceable:
        raise
    except Exception:  # a failure of its own, which transformers will report
        return


@lru_cache(maxsize=_KEPT_TEMPLATES)
def _compiled(template: str) -> tuple[_PlainEnvironment, jinja2.Template]:
    """Compile a template, once its constants have been computed."""
    environment = _PlainEnvironment()
    _Folder(environment).visit(environment.parse(template))
    return environment, environment.from_string(template)


def _raise(message: Any) -> NoReturn:
    raise _Raised
