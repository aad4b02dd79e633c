"""The sandbox in which a chat template runs on symbols: transformers' environment, with limits.

A template is somebody else's program. It sees and may do this:

    sees              plain data and `Symbol`s, in Jinja's immutable sandbox
    counted           turns of loops, calls, and the sizes of what it makes: more than `MAX_STEPS`
                      ends as `Unbounded`, always at the same place
    forbidden         filters and methods that format or pad strings: no chat template needs them,
                      and they could make any size (`Unbounded`)
    refused           today's date, random choices, symbols as keys, escaping (`Untraceable`): the
                      result would not be the same for each row, or not be known

Invariant: where a run ends without an exception, transformers renders the same text for the row.
(`render.py` compares the first row of each program with it.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import loopcontrols
from jinja2.nativetypes import NativeCodeGenerator
from jinja2.sandbox import ImmutableSandboxedEnvironment
from markupsafe import Markup, soft_str

from miles.data.template import symbol_filters
from miles.data.template.symbol_filters import (
    by_method,
    concat,
    for_symbols,
    join_strings,
    refusing_test,
    size_of,
)
from miles.data.template.symbols import (
    MAX_LITERAL_CHARACTERS,
    Length,
    Safe,
    Symbol,
    Unbounded,
    Untraceable,
    refuse,
)
from miles.data.tokens.served_chat import Generation, TemplateDict

MAX_STEPS = 1 << 20
"""Calls, turns of loops, and 64 characters or values that are made, each count as a step. A
template that takes more is taken for one that does not end."""

_CHARACTERS_PER_STEP = 64

_FORBIDDEN_FILTERS = (
    *("format", "center", "indent", "batch", "slice", "wordwrap", "truncate", "filesizeformat"),
    *("xmlattr", "urlize", "urlencode", "striptags"),
)
_FORBIDDEN_METHODS = ("format", "format_map", "center", "ljust", "rjust", "zfill", "expandtabs")

_TESTS: Mapping[str, Callable[..., Any]] = jinja2.tests.TESTS  # type: ignore[assignment]


# How a template is compiled


class _CodeGenerator(NativeCodeGenerator):
    """Compiles a template so that symbols pass through it, and its loops are counted.

    Outputs get no `str(…)` around them (Jinja's native code generator), `a ~ b` becomes
    `environment.concat`, and a loop calls `environment.turn` at each turn.
    """

    def visit_Concat(self, node: nodes.Concat, frame: Any) -> None:
        self.write("environment.concat((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")

    def visit_For(self, node: nodes.For, frame: Any) -> None:
        turn = nodes.EnvironmentAttribute("turn()")
        node.body.insert(0, nodes.ExprStmt(turn))
        if node.test is not None:
            node.test = nodes.And(turn, node.test)
        super().visit_For(node, frame)

    def visit_EvalContextModifier(self, node: nodes.EvalContextModifier, frame: Any) -> None:
        raise Untraceable("escaping switched on")

    visit_ScopedEvalContextModifier = visit_EvalContextModifier


def literals(template: str) -> set[str]:
    """Return every text that a template can write by itself: its data and its string constants.

    Raises:
        Untraceable: the template does not compile.
    """
    try:
        tree = Environment().parse(template)
    except jinja2.TemplateError as error:
        raise Untraceable(f"{type(error).__name__}: {error}") from error
    data = {node.data for node in tree.find_all(nodes.TemplateData)}
    constants = {node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)}
    return data | constants


# How it runs


class Environment(ImmutableSandboxedEnvironment):
    """transformers' environment for chat templates, with symbols, and a limit on steps.

    `num_steps` is set to 0 before each run.
    """

    code_generator_class = _CodeGenerator
    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
        )
        self.num_steps = 0
        self._install_filters()
        self._install_tests()
        self.globals |= {
            "raise_exception": _raise_exception,
            "dict": TemplateDict(),
            "strftime_now": refuse("today's date"),
            "lipsum": refuse("random text"),
        }

    def _install_filters(self) -> None:
        self.filters |= {
            "tojson": symbol_filters.to_json,
            "join": symbol_filters.join,
            "replace": symbol_filters.replace,
            "trim": by_method("strip"),
            "lower": by_method("lower"),
            "upper": by_method("upper"),
            "capitalize": by_method("capitalize"),
            "string": for_symbols(lambda symbol: symbol, soft_str),
            "safe": for_symbols(Safe, Markup),
        }
        self.filters = {name: self._counted(function) for name, function in self.filters.items()}

        # Not counted: a length costs nothing, and templates ask at each message how many there are.
        length = for_symbols(Length, lambda value: len(value))
        self.filters |= {"length": length, "count": length}

        for name in _FORBIDDEN_FILTERS:
            self.filters[name] = refuse(f"the filter {name}", Unbounded)
        for name in ("pprint", "random"):
            self.filters[name] = refuse(f"the filter {name}")

    def _install_tests(self) -> None:
        for name in ("iterable", "sequence"):
            self.tests[name] = refusing_test((Safe,), for_symbols(lambda _: True, _TESTS[name]))
        for name in ("number", "integer"):
            self.tests[name] = refusing_test((Length,), _TESTS[name])
        self.tests["string"] = refusing_test((Safe,), _is_string)
        self.tests["sameas"] = refusing_test((Symbol, Safe, Length), _is_same)

    # Jinja calls these while a template runs.

    def concat(self, values: Iterable[Any]) -> Any:  # type: ignore[override]
        """Return the text of an output, a macro or a block: a string, or a symbol."""
        text = concat(values)
        self._spend(len(text._parts if type(text) is Symbol else text))
        return text

    def turn(self) -> bool:
        """Count a turn of a loop."""
        self._spend(0)
        return True

    def getitem(self, obj: Any, argument: Any) -> Any:
        if type(argument) in (Symbol, Safe):
            raise Untraceable("a string as a key")
        return super().getitem(obj, argument)

    def call(  # type: ignore[override]
        self, context: Any, called: Any, /, *arguments: Any, **more: Any
    ) -> Any:
        name = getattr(called, "__name__", "")
        owner = getattr(called, "__self__", None)
        if name in _FORBIDDEN_METHODS:
            raise Unbounded(f"str.{name}")
        if type(owner) is str and name == "join":
            joined = join_strings(owner, *arguments)
            self._spend(size_of(joined))
            return joined
        self._spend_on(owner, [*arguments, *more.values()])
        return super().call(context, called, *arguments, **more)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Count the size of a result before it is made."""
        if operator == "+":
            self._spend(size_of(left) + size_of(right))
        elif isinstance(left, int) and isinstance(right, int):
            times = max(right, 0) if operator == "**" else 1
            self._spend(left.bit_length() * times + right.bit_length())
        elif operator == "*":
            times = left if isinstance(left, int) else right
            size = size_of(left) + size_of(right)
            self._spend(size * times if isinstance(times, int) else 0)
        elif isinstance(left, str):
            raise Unbounded("a string as a layout")
        return super().call_binop(context, operator, left, right)

    # Counting

    def _counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a filter whose uses count."""
        num_own = int(hasattr(function, "jinja_pass_arg"))  # a first argument that Jinja adds

        @wraps(function)
        def counted(*arguments: Any, **more: Any) -> Any:
            value, *others = arguments[num_own:]
            if function is not symbol_filters.replace:  # it checks the size by itself
                self._spend_on(value, [*others, *more.values()])
            return function(*arguments, **more)

        return counted

    def _spend_on(self, value: Any, arguments: Iterable[Any]) -> None:
        """Count a call on a value: its result may be as long as a string times another."""
        size = size_of(value)
        if isinstance(value, str):
            size = max(size, 1) * max(map(size_of, arguments), default=1)
        self._spend(size)

    def _spend(self, size: int) -> None:
        """Count one step, and the size of what it makes."""
        self.num_steps += 1 + max(size, 0) // _CHARACTERS_PER_STEP
        if size > MAX_LITERAL_CHARACTERS or self.num_steps > MAX_STEPS:
            raise Unbounded(
                f"more than {MAX_STEPS} steps, or a value of more than "
                f"{MAX_LITERAL_CHARACTERS} characters"
            )


def _is_string(value: Any) -> bool:
    return isinstance(value, (str, Symbol))


def _is_same(value: Any, other: Any) -> bool:
    return value is other


def _raise_exception(message: Any) -> NoReturn:
    raise Untraceable("the template raises an exception")
