"""The sandbox in which a chat template runs on symbols: transformers' environment, with limits on what it may do.

A template is somebody else's program. It sees plain data and `Symbol`s only, runs in Jinja's immutable sandbox, and its
turns of loops, calls and sizes are counted: one that goes on and on, or makes more and more, ends as
`Unbounded`, always at the same place. What no chat template needs and could make any size (formatting and padding
strings) it may not do at all.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.nativetypes import NativeCodeGenerator
from jinja2.sandbox import ImmutableSandboxedEnvironment
from markupsafe import Markup, soft_str

from miles.data.template.symbols import (
    MAX_LITERAL_CHARACTERS,
    MAX_PARTS,
    Length,
    Part,
    Safe,
    Symbol,
    Unbounded,
    Untraceable,
    refuse,
    replaced,
)

MAX_STEPS = 1 << 20
"""Calls, turns of loops, and what is made by the way; a template that takes more is taken for one that does not end."""

_MAX_WIDTH = 1024
_STAND_INS = ("\ufdd0", "\ufdd1")
_NEEDLESS_FILTERS = (
    *("format", "center", "indent", "batch", "slice", "wordwrap", "truncate", "filesizeformat"),
    *("xmlattr", "urlize", "urlencode", "striptags"),
)
_NEEDLESS_METHODS = ("format", "format_map", "center", "ljust", "rjust", "zfill", "expandtabs")


class _CodeGenerator(NativeCodeGenerator):
    """Compiles outputs without `str(…)` around them, `a ~ b` to what an output of both gives, and loops so that their
    turns are counted."""

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


class _Generation(Extension):
    """`{% generation %}`, by which transformers' templates mark answers: here it gives what is inside."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_inside"), [], [], body).set_lineno(line)

    def _inside(self, caller: Callable[[], Any]) -> Any:
        return caller()


def _text(value: Any) -> Any:
    """What Jinja puts out for a value: a string, or a symbol."""
    if type(value) is Safe:
        return value.of
    if type(value) is Symbol:
        return value
    _require_data(value)
    return str(value)


def _require_data(value: Any) -> None:
    """Of data alone the text is always the same. And a list that holds one list twice, that again one twice, and so
    on, is small until it is written out."""
    pending, num_values = [value], 0
    while pending:
        item = pending.pop()
        if isinstance(item, (list, tuple, dict)):
            num_values += len(item)
            if num_values > MAX_PARTS:
                raise Unbounded(f"data of more than {MAX_PARTS} values")
            pending += item.values() if isinstance(item, dict) else item
        elif (
            not isinstance(item, (str, int, float, range, jinja2.Undefined, Symbol))
            and item is not None
        ):
            raise Untraceable(f"the text of {type(item).__name__}")


def _concat(values: Iterable[Any]) -> Any:
    """What Jinja puts out: text, or a symbol where there is one among the values."""
    parts: list[Part] = []
    log = None
    num_characters = 0
    for value in values:  # the template runs as this goes on
        text = _text(value)
        if type(text) is Symbol:
            log = text._log
            parts += text._parts
            num_characters += sum(len(part) for part in text._parts if type(part) is str)
        else:
            parts.append(text)
            num_characters += len(text)
        if num_characters > MAX_LITERAL_CHARACTERS or len(parts) > MAX_PARTS:
            raise Unbounded(
                f"more than {num_characters - 1} characters of its own, or {len(parts) - 1} parts"
            )
    if log is None:
        return "".join(parts)  # type: ignore[arg-type]
    return Symbol(log, tuple(parts))


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> Any:
    """transformers' filter, for data with symbols at any depth."""
    if any(type(option) is Symbol for option in (ensure_ascii, indent, separators, sort_keys)):
        raise Untraceable("a layout of JSON that is not known")
    _require_data(value)
    if (isinstance(indent, int) and indent > _MAX_WIDTH) or max(
        map(_size, (indent, *(separators or ())))
    ) > _MAX_WIDTH:
        raise Unbounded(f"an indent of more than {_MAX_WIDTH} characters")
    layout = {
        "ensure_ascii": ensure_ascii,
        "indent": indent,
        "separators": separators,
        "sort_keys": sort_keys,
    }
    symbols: list[Symbol] = []

    def stand_in(item: Any) -> Any:
        if type(item) is Symbol:
            symbols.append(item)
            return f"{_STAND_INS[0]}{len(symbols) - 1}{_STAND_INS[1]}"
        if isinstance(item, str) and _STAND_INS[0] in item:
            raise Untraceable("a character that is none")
        if isinstance(item, Mapping):
            return {stand_in(key): stand_in(inner) for key, inner in item.items()}
        if isinstance(item, (list, tuple)):
            return [stand_in(inner) for inner in item]
        return item

    text = json.dumps(stand_in(value), **layout)
    opening, closing = (
        json.dumps(character, ensure_ascii=ensure_ascii)[1:-1] for character in _STAND_INS
    )
    pieces = re.split(f'"{re.escape(opening)}([0-9]+){re.escape(closing)}"', text)
    return _concat(
        symbols[int(piece)]._derive(lambda whole: json.dumps(whole, **layout))
        if number % 2
        else piece
        for number, piece in enumerate(pieces)
    )


def _join(value: Iterable[Any], d: Any = "", attribute: Any = None) -> Any:
    if attribute is not None:
        raise Untraceable("join by an attribute")
    pieces = [piece for item in value for piece in (d, item)]
    return _concat(pieces[1:])


def _replace(value: Any, old: Any, new: Any, count: Any = None) -> Any:
    count = -1 if count is None else count
    text = _text(value)
    return (
        text.replace(old, new, count) if type(text) is Symbol else replaced(text, old, new, count)
    )


def _by_method(name: str) -> Callable[..., Any]:
    """A filter that is a method of strings."""

    def apply(value: Any, *arguments: Any) -> Any:
        if isinstance(value, (Markup, Safe)):
            raise Untraceable("text that is marked as safe")
        return getattr(_text(value), name)(*arguments)

    return apply


def _for_symbols(
    answer: Callable[[Symbol], Any], otherwise: Callable[[Any], Any]
) -> Callable[[Any], Any]:
    return lambda value: answer(value) if type(value) is Symbol else otherwise(value)


def _not_of(refused: tuple[type, ...], test: Callable[..., bool]) -> Callable[..., bool]:
    """A test that would take a stand-in for what it is, not for what it stands for."""

    def ask(*values: Any) -> bool:
        if any(type(value) in refused for value in values):
            raise Untraceable("what kind of value it is that a string became")
        return test(*values)

    return ask


def _is_string(value: Any) -> bool:
    return isinstance(value, (str, Symbol))


def _is_same(value: Any, other: Any) -> bool:
    return value is other


def _raise_exception(message: Any) -> NoReturn:
    raise Untraceable("the template raises an exception")


class _Dict:
    """As transformers' `dict`: nothing of it but these."""

    def __call__(self, *pairs: Any, **more: Any) -> dict[Any, Any]:
        return dict(*pairs, **more)

    def fromkeys(self, keys: Any, value: Any = None) -> dict[Any, Any]:
        return dict.fromkeys(keys, value)


_TESTS: Mapping[str, Callable[..., Any]] = jinja2.tests.TESTS  # type: ignore[assignment]


class Environment(ImmutableSandboxedEnvironment):
    """transformers' environment for chat templates, but for symbols and a limit on what a template may do."""

    code_generator_class = _CodeGenerator
    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        self.num_steps = 0
        # Jinja's own filters and tests either hand a value on, or use it in a way that a symbol refuses, but for these.
        self.filters |= {
            "tojson": _tojson,
            "join": _join,
            "replace": _replace,
            "trim": _by_method("strip"),
        }
        self.filters |= {name: _by_method(name) for name in ("lower", "upper", "capitalize")}
        self.filters["string"] = _for_symbols(lambda symbol: symbol, soft_str)
        self.filters["safe"] = _for_symbols(Safe, Markup)
        self.filters = {name: self._counted(function) for name, function in self.filters.items()}
        # Not counted: it costs nothing, and templates ask at each message how many there are.
        self.filters["length"] = self.filters["count"] = _for_symbols(
            Length, lambda value: len(value)
        )
        self.filters |= {
            name: refuse(f"the filter {name}", Unbounded) for name in _NEEDLESS_FILTERS
        }
        self.filters |= {name: refuse(f"the filter {name}") for name in ("pprint", "random")}
        for name in ("iterable", "sequence"):
            self.tests[name] = _not_of((Safe,), _for_symbols(lambda _: True, _TESTS[name]))
        for name in ("number", "integer"):
            self.tests[name] = _not_of((Length,), _TESTS[name])
        self.tests |= {
            "string": _not_of((Safe,), _is_string),
            "sameas": _not_of((Symbol, Safe, Length), _is_same),
        }
        self.globals |= {"raise_exception": _raise_exception, "dict": _Dict()}
        self.globals |= {"strftime_now": refuse("today's date"), "lipsum": refuse("random text")}

    def concat(self, values: Iterable[Any]) -> Any:  # type: ignore[override]
        """Jinja's: the text of an output, a macro or a block."""
        whole = _concat(values)
        self._spend(len(whole._parts if type(whole) is Symbol else whole))
        return whole

    def turn(self) -> bool:
        """What a loop calls at each turn."""
        self._spend(0)
        return True

    def getitem(self, obj: Any, argument: Any) -> Any:
        if type(argument) in (Symbol, Safe):
            raise Untraceable("a string as a key")
        return super().getitem(obj, argument)

    def call(self, context: Any, called: Any, /, *arguments: Any, **more: Any) -> Any:  # type: ignore[override]
        name, of = getattr(called, "__name__", ""), getattr(called, "__self__", None)
        if name in _NEEDLESS_METHODS:
            raise Unbounded(f"str.{name}")
        if type(of) is str and name == "join":
            made = _join_strings(of, *arguments)
            self._spend(_size(made))
            return made
        self._spend_on(of, [*arguments, *more.values()])
        return super().call(context, called, *arguments, **more)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "+":
            self._spend(_size(left) + _size(right))
        elif isinstance(left, int) and isinstance(right, int):
            self._spend(
                left.bit_length() * (max(right, 0) if operator == "**" else 1) + right.bit_length()
            )
        elif operator == "*":
            times = left if isinstance(left, int) else right
            self._spend((_size(left) + _size(right)) * times if isinstance(times, int) else 0)
        elif isinstance(left, str):
            raise Unbounded("a string as a layout")
        return super().call_binop(context, operator, left, right)

    def _counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A filter whose uses count."""
        num_own = int(hasattr(function, "jinja_pass_arg"))  # a first argument that Jinja gives

        @wraps(function)
        def counted(*arguments: Any, **more: Any) -> Any:
            value, *others = arguments[num_own:]
            if function is not _replace:  # which looks by itself
                self._spend_on(value, [*others, *more.values()])
            return function(*arguments, **more)

        return counted

    def _spend_on(self, value: Any, arguments: Iterable[Any]) -> None:
        """What is made of a string may be as long as the string times another."""
        size = (
            max(len(value), 1) * max(map(_size, arguments), default=1)
            if isinstance(value, str)
            else _size(value)
        )
        self._spend(size)

    def _spend(self, size: int) -> None:
        self.num_steps += 1 + max(size, 0) // 64
        if size > MAX_LITERAL_CHARACTERS or self.num_steps > MAX_STEPS:
            raise Unbounded(
                f"more than {MAX_STEPS} steps, or a value of more than {MAX_LITERAL_CHARACTERS} characters"
            )


def _size(value: Any) -> int:
    return len(value) if isinstance(value, (str, list, tuple, dict, range)) else 0


def _join_strings(separator: str, strings: Iterable[Any]) -> Any:
    pieces = list(strings)
    if not all(type(piece) in (str, Symbol) for piece in pieces):
        raise Untraceable("what is no string, joined")
    return _join(pieces, separator)


def literals(template: str) -> set[str]:
    """Every text that a template can write by itself: what is outside of tags, and its string constants.

    Raises:
        Untraceable: the template does not compile.
    """
    try:
        tree = Environment().parse(template)
    except jinja2.TemplateError as error:
        raise Untraceable(f"{type(error).__name__}: {error}") from error
    texts = {node.data for node in tree.find_all(nodes.TemplateData)}
    return texts | {
        node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)
    }
