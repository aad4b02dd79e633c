"""Runs a chat template once for a *shape* of conversation, with its strings unknown: what it does becomes a program.

    Qwen3's template, shape (user, assistant)
      guards   messages[0].content.startswith("<tool_response>")  no     what the template asked of the strings,
               "</think>" in messages[1].content                  no     and the answers that lead to this program
      parts    "<|im_start|>user\\n"  messages[0].content  "<|im_end|>\\n<|im_start|>assistant\\n<think>…</think>\\n\\n"
               messages[1].content.lstrip("\\n")  "<|im_end|>\\n"

Each string of the conversation reaches the template as a `Symbol`. An operation that makes a string of it (`lstrip`,
`+`, `tojson`) gives a symbol that remembers how; one that asks about it (`in`, `startswith`, `==`, its truth) is
answered for the row at hand and noted as a guard; anything else raises `Untraceable`. A template can look at a
string in no other way, so for every row of the same shape with the same answers it does the same and writes the
same parts: a program is what the template gives, for all of them. And a literal part comes from the template
alone: whatever a user typed is in no literal.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from operator import itemgetter
from typing import Any, NamedTuple, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.nativetypes import NativeCodeGenerator
from jinja2.sandbox import ImmutableSandboxedEnvironment
from markupsafe import Markup, soft_str

Strings = Sequence[str]
"""The unknown strings of a row, in the order in which `shape_of` meets them."""

Make = Callable[[Strings], str]


class Made(NamedTuple):
    """A part of the output that is made of a row's strings."""

    make: Make
    sources: frozenset[int]
    """which strings, by number"""
    depth: int = 0
    """how many operations, one upon the other"""


Part = str | Made
"""A part of the output: text of the template's own, or made of a row's strings."""

MAX_STEPS = 1 << 20
"""Calls, turns of loops, and what is made by the way; a template that takes more is taken for one that does not end."""
MAX_LITERAL_CHARACTERS = 4 << 20
MAX_PARTS = 1 << 18
"""More than this of a template's own text, or more parts, and its output is taken for one without bounds."""
MAX_CHARACTERS = 1 << 27
"""More than this of a row's text, too."""

_MAX_KEPT = 1 << 18
"""Questions, parts and strings of all the programs that are kept."""
_MAX_SPLIT_PARTS = 64
_MAX_DEPTH = 64
_MAX_WIDTH = 1024
_STAND_INS = ("\ufdd0", "\ufdd1")


class Untraceable(Exception):
    """A template does something with a string that a symbol cannot follow, or fails."""


class Unbounded(Untraceable):
    """A template goes on and on, or makes more and more: transformers had better not run it."""


@dataclass
class Program:
    """What a template writes for every row of one shape whose strings gave the same answers."""

    parts: tuple[Part, ...]
    """literals joined: no two are neighbours"""
    owners: tuple[frozenset[int], ...]
    """for each part the messages, by number, of whose strings it is made; none for a literal; -1: the tools"""
    note: Any = None
    """what the owner of the tracer found out about it"""

    def run(self, strings: Strings) -> list[str]:
        """The output for a row, part by part.

        Raises:
            Unbounded: it is longer than any text.
        """
        pieces: list[str] = [part if type(part) is str else part[0](strings) for part in self.parts]  # type: ignore[operator]
        if sum(map(len, pieces)) > MAX_CHARACTERS:
            raise Unbounded(f"more than {MAX_CHARACTERS} characters")
        return pieces


@dataclass
class _Question:
    """A guard, and what follows each answer as far as it is known."""

    ask: Callable[[Strings], bool]
    yes: _Question | Program | None = None
    no: _Question | Program | None = None


class Tracer:
    """The programs of one chat template, each made when a row first needs it.

    Args:
        template: Jinja, as transformers runs it.
        variables: what the template is given beside messages and tools.
        reserved: characters that no key of a row may hold. Keys are known when a template is traced, so they end up
            in literals; without these characters they cannot be taken for what the template writes itself.

    Raises:
        Untraceable: the template does not compile.
    """

    def __init__(self, template: str, variables: Mapping[str, Any], reserved: str = "") -> None:
        self._environment = _Environment()
        try:
            self._template = self._environment.from_string(template)
        except Untraceable:
            raise
        except Exception as error:  # of Jinja's compiler, or of Python's for what Jinja made
            raise Untraceable(f"{type(error).__name__}: {error}") from error
        self._variables = dict(variables)
        self._reserved = frozenset(reserved)
        self._programs: dict[Any, _Question | Program] = {}
        self._num_kept = 0

    def program(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None
    ) -> tuple[Program, list[str]]:
        """The program for a row, made if there is none yet, and the row's strings.

        Args:
            messages, tools: plain JSON types.

        Raises:
            Untraceable: for this row the template does what cannot be followed, or fails.
            Unbounded: it does not end, or what it makes has no bounds.
        """
        try:
            shape, strings = shape_of(messages, tools)
            node = self._programs.get(shape)
        except (TypeError, RecursionError) as error:  # not hashable; nested too deeply
            raise Untraceable("data that is not JSON, or nested too deeply") from error
        while type(node) is _Question:
            node = node.yes if node.ask(strings) else node.no
        if node is not None:
            return node, strings  # type: ignore[return-value]
        program, answers = self._trace(messages, tools, strings)
        self._num_kept += len(answers) + len(program.parts) + len(strings)
        if self._num_kept > _MAX_KEPT:
            self._programs.clear()
            self._num_kept = len(answers) + len(program.parts) + len(strings)
        self._keep(shape, program, answers)
        return program, strings

    def _trace(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None, strings: list[str]
    ) -> tuple[Program, list[tuple[Callable[[Strings], bool], bool]]]:
        log = _Log(strings, self._reserved)
        self._environment.num_steps = 0
        try:
            output = self._template.render(
                messages=[_with_reasoning_names(log.unknown_message(message, n)) for n, message in enumerate(messages)],
                tools=None if tools is None else [log.unknown(tool, -1) for tool in tools],
                documents=None,
                add_generation_prompt=False,
                **self._variables,
            )
        except Untraceable:
            raise
        except Exception as error:  # a template can fail in any way that Jinja and Python know
            raise Untraceable(f"{type(error).__name__}: {error}") from error
        parts = _joined(_parts_of(output))
        owners = [
            frozenset(log.owners[number] for number in part.sources) if isinstance(part, Made) else frozenset[int]()
            for part in parts
        ]
        return Program(parts, tuple(owners)), log.answers

    def _keep(self, shape: Any, program: Program, answers: Sequence[tuple[Callable[[Strings], bool], bool]]) -> None:
        """Hangs the program into the tree of its shape. The same answers led to the same questions so far."""
        followed: list[tuple[_Question, bool]] = []
        node = self._programs.get(shape)
        for guard, answer in answers:
            if node is None:
                node = _Question(guard)
                self._hang(shape, followed, node)
            if not isinstance(node, _Question):
                raise Untraceable("another way each time")
            followed.append((node, answer))
            node = node.yes if answer else node.no
        if node is not None:
            raise Untraceable("another way each time")
        self._hang(shape, followed, program)

    def _hang(self, shape: Any, followed: Sequence[tuple[_Question, bool]], node: _Question | Program) -> None:
        if not followed:
            self._programs[shape] = node
        elif followed[-1][1]:
            followed[-1][0].yes = node
        else:
            followed[-1][0].no = node


def shape_of(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None
) -> tuple[tuple[Any, ...], list[str]]:
    """What of a row is known when its template is traced, and the strings that are not: all but roles and keys."""
    strings: list[str] = []
    shape: list[Any] = []
    for message in messages:
        if tuple(message) == ("role", "content") and type(message["content"]) is str:
            shape.append(message["role"])
            strings.append(message["content"])
        else:
            shape.append(
                tuple((key, item if key == "role" else _shape(item, strings)) for key, item in message.items())
            )
    if tools is not None:
        shape.append([_shape(tool, strings) for tool in tools])
        shape[-1] = ("tools", *shape[-1])
    return tuple(shape), strings


def _shape(value: Any, strings: list[str]) -> Any:
    if type(value) is str:
        strings.append(value)
        return str
    if isinstance(value, Mapping):
        return (dict, *[(key, _shape(item, strings)) for key, item in value.items()])
    if type(value) in (list, tuple):
        return (type(value), *[_shape(item, strings) for item in value])
    # With the type: 1 == True == 1.0; and -0.0 == 0.0, NaN is not even itself.
    return (type(value), repr(value) if type(value) is float else value)


class _Log:
    """Hands out symbols for a row's strings, and notes what is asked of them."""

    def __init__(self, strings: Strings, reserved: frozenset[str]) -> None:
        self.strings, self._reserved = strings, reserved
        self.answers: list[tuple[Callable[[Strings], bool], bool]] = []
        self.owners: list[int] = []
        """of each string the message that it is of, by number; -1: the tools"""

    def ask(self, guard: Callable[[Strings], bool]) -> bool:
        answer = guard(self.strings)
        self.answers.append((guard, answer))
        return answer

    def unknown_message(self, message: Mapping[str, Any], number: int) -> dict[str, Any]:
        """Without keys that are null, as transformers gives messages to a template."""
        role = message.get("role")
        if type(role) is not str or not role.isidentifier() or not self._reserved.isdisjoint(role):
            raise Untraceable("a role that is not a plain word")
        self._require_plain(message)
        known = {key: item if key == "role" else self.unknown(item, number) for key, item in message.items()}
        return {key: item for key, item in known.items() if item is not None}

    def unknown(self, value: Any, owner: int) -> Any:
        """The same data with symbols for strings, in the order of `shape_of`."""
        if type(value) is str:
            number = len(self.owners)
            self.owners.append(owner)
            return Symbol(self, (Made(itemgetter(number), frozenset([number])),))
        if isinstance(value, Mapping):
            self._require_plain(value)
            return {key: self.unknown(item, owner) for key, item in value.items()}
        if type(value) in (list, tuple):
            return type(value)([self.unknown(item, owner) for item in value])
        if value is None or type(value) in (bool, int, float):
            return value
        raise Untraceable(f"{type(value).__name__}, which is not JSON")

    def _require_plain(self, keys: Iterable[Any]) -> None:
        for key in keys:
            if type(key) is not str or not self._reserved.isdisjoint(key):
                raise Untraceable("a key that could be a marker of its own")


def _with_reasoning_names(message: dict[str, Any]) -> dict[str, Any]:
    """Reasoning under each name that templates read, as transformers gives it to them."""
    names = ("reasoning_content", "thinking", "reasoning")
    reasoning = next((message[name] for name in names if name in message), None)
    if reasoning is None:
        return message
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _refuse(what: str) -> Callable[..., NoReturn]:
    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise Untraceable(what)

    return refuse


class Symbol:
    """A string that is not known: parts that make it, joined."""

    __slots__ = ("_log", "_parts")

    def __init__(self, log: _Log, parts: tuple[Part, ...]) -> None:
        self._log, self._parts = log, parts

    # what makes a string

    def _derive(self, make: Callable[..., str], *arguments: Any) -> Symbol:
        if not all(argument is None or type(argument) in (str, int) for argument in arguments):
            raise Untraceable("an operation on two strings that are not known")
        text = _maker(self._parts)
        of = [part for part in self._parts if type(part) is Made]
        depth = 1 + max((part.depth for part in of), default=0)
        if depth > _MAX_DEPTH:  # each runs within the next
            raise Untraceable(f"more than {_MAX_DEPTH} operations on one string")

        def made(strings: Strings) -> str:
            whole = text(strings)
            if len(whole) > MAX_CHARACTERS:
                raise Unbounded(f"more than {MAX_CHARACTERS} characters")
            return make(whole, *arguments)

        made(self._log.strings)  # as the template does; arguments that do not fit fail here, for any row
        return Symbol(self._log, (Made(made, frozenset[int]().union(*(part.sources for part in of)), depth),))

    def strip(self, characters: Any = None) -> Symbol:
        return self.lstrip(characters).rstrip(characters)

    def lstrip(self, characters: Any = None) -> Symbol:
        return self._strip_end(str.lstrip, characters, 0)

    def rstrip(self, characters: Any = None) -> Symbol:
        return self._strip_end(str.rstrip, characters, -1)

    def _strip_end(self, strip: Callable[..., str], characters: Any, end: int) -> Symbol:
        """Part by part from one end, as long as nothing is left of a part: what is literal stays so."""
        parts = list(self._parts)
        while parts:
            rest = Symbol(self._log, tuple(parts[end:] if end else parts[:1]))._stripped(strip, characters)
            if rest:
                parts[end] = rest if isinstance(rest, str) else rest._parts[0]
                break
            del parts[end]
        return Symbol(self._log, tuple(parts))

    def _stripped(self, strip: Callable[..., str], characters: Any) -> str | Symbol:
        """Of one part."""
        (part,) = self._parts
        return strip(part, characters) if isinstance(part, str) else self._derive(strip, characters)

    def lower(self) -> Symbol:
        return self._derive(str.lower)

    def upper(self) -> Symbol:
        return self._derive(str.upper)

    def title(self) -> Symbol:
        return self._derive(str.title)

    def capitalize(self) -> Symbol:
        return self._derive(str.capitalize)

    def replace(self, old: Any, new: Any, count: Any = -1) -> Symbol:
        return self._derive(_replaced, old, new, count)

    def removeprefix(self, prefix: Any) -> Symbol:
        return self._derive(str.removeprefix, prefix)

    def removesuffix(self, suffix: Any) -> Symbol:
        return self._derive(str.removesuffix, suffix)

    def split(self, sep: Any = None, maxsplit: Any = -1) -> list[Symbol]:
        return self._split(str.split, sep, maxsplit)

    def rsplit(self, sep: Any = None, maxsplit: Any = -1) -> list[Symbol]:
        return self._split(str.rsplit, sep, maxsplit)

    def _split(self, split: Callable[..., list[str]], separator: Any, maxsplit: Any) -> list[Symbol]:
        """As many symbols as this row has parts: whether there is one more is asked part by part, so that rows of one
        shape are asked the same."""
        if type(separator) not in (str, type(None)) or type(maxsplit) is not int:
            raise Untraceable("a split at what is not known")
        text = _maker(self._parts)

        def has(number: int) -> bool:
            return self._log.ask(lambda strings: len(split(text(strings), separator, maxsplit)) > number)

        def part(number: int) -> Symbol:
            return self._derive(lambda whole: split(whole, separator, maxsplit)[number])

        parts: list[Symbol] = []
        while has(len(parts)):
            parts.append(part(len(parts)))
            if len(parts) > _MAX_SPLIT_PARTS:
                raise Untraceable(f"more than {_MAX_SPLIT_PARTS} parts of a string")
        return parts

    def __getitem__(self, key: Any) -> Symbol:
        if isinstance(key, slice) and all(type(edge) in (int, type(None)) for edge in (key.start, key.stop, key.step)):
            return self._derive(lambda whole: whole[key])
        if type(key) is int:
            if not self._is_longer_than(key if key >= 0 else -key - 1):
                raise IndexError(key)
            return self._derive(lambda whole: whole[key])
        if type(key) is str:
            raise TypeError("string indices must be integers")  # Jinja then looks for an attribute, as with any string
        raise Untraceable(f"a string indexed with {type(key).__name__}")

    def __add__(self, other: Any) -> Symbol:
        return Symbol(self._log, _bounded(self._parts + _parts_of(other)))

    def __radd__(self, other: Any) -> Symbol:
        return Symbol(self._log, _bounded(_parts_of(other) + self._parts))

    # what asks about it

    def _ask(self, question: Callable[[str, str], bool], other: Any) -> bool:
        text, other_text = _maker(self._parts), _maker(_parts_of(other))
        if type(other) is str:
            return self._log.ask(lambda strings: question(text(strings), other))
        return self._log.ask(lambda strings: question(text(strings), other_text(strings)))

    def startswith(self, prefix: Any) -> bool:
        return self._ask(str.startswith, prefix)

    def endswith(self, suffix: Any) -> bool:
        return self._ask(str.endswith, suffix)

    def __contains__(self, other: Any) -> bool:
        return self._ask(str.__contains__, other)

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, (str, Symbol)) and self._ask(str.__eq__, other)

    def __ne__(self, other: Any) -> bool:
        return not self == other

    def __bool__(self) -> bool:
        text = _maker(self._parts)
        return self._log.ask(lambda strings: text(strings) != "")

    def _is_longer_than(self, length: int) -> bool:
        text = _maker(self._parts)
        return self._log.ask(lambda strings: len(text(strings)) > length)

    # everything else

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or not hasattr(str, name):  # neither has a string it
            raise AttributeError(name)
        raise Untraceable(f"str.{name}")

    __hash__ = _refuse("a string as a key")  # type: ignore[assignment]
    __str__ = __repr__ = __format__ = _refuse("a string handed on as it is")
    __iter__ = __reversed__ = _refuse("the characters of a string")
    __len__ = _refuse("the length of a string")
    __int__ = __float__ = __complex__ = __index__ = _refuse("a string as a number")
    __lt__ = __le__ = __gt__ = __ge__ = _refuse("the order of strings")
    __mul__ = __rmul__ = __mod__ = __rmod__ = _refuse("a string repeated or formatted")


class _Length:
    """`string | length`: to be compared with a number."""

    __slots__ = ("_of",)

    def __init__(self, of: Symbol) -> None:
        self._of = of

    def __gt__(self, other: Any) -> bool:
        if type(other) is not int:
            raise Untraceable("the length of a string, compared with what is no number")
        return self._of._is_longer_than(other)

    def __ge__(self, other: Any) -> bool:
        return self > other - 1

    def __le__(self, other: Any) -> bool:
        return not self > other

    def __lt__(self, other: Any) -> bool:
        return not self >= other

    def __eq__(self, other: Any) -> bool:
        return self >= other and self <= other

    def __ne__(self, other: Any) -> bool:
        return not self == other

    def __bool__(self) -> bool:
        return self > 0

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or not hasattr(int, name):
            raise AttributeError(name)
        raise Untraceable(f"int.{name} of a string's length")

    __hash__ = _refuse("the length of a string")  # type: ignore[assignment]
    __str__ = __repr__ = __format__ = __int__ = __float__ = __index__ = __hash__  # type: ignore[assignment]
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __mod__ = __floordiv__ = __truediv__ = __hash__


def _maker(parts: tuple[Part, ...]) -> Make:
    if len(parts) == 1 and type(parts[0]) is Made:
        return parts[0].make
    return lambda strings: "".join(part if type(part) is str else part[0](strings) for part in parts)  # type: ignore[operator]


class _Safe:
    """`string | safe`: Jinja's Markup, to be put out and no more (what is added to one is escaped)."""

    __slots__ = ("of",)

    def __init__(self, of: Symbol) -> None:
        self.of = of

    __html__ = __hash__ = _refuse("text that is marked as safe")  # type: ignore[assignment]
    __str__ = __repr__ = __format__ = __iter__ = __len__ = __bool__ = __contains__ = __getitem__ = __html__
    __int__ = __float__ = __index__ = __html__
    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __html__  # type: ignore[assignment]
    __add__ = __radd__ = __mul__ = __rmul__ = __mod__ = __rmod__ = __getattr__ = __html__


def _parts_of(value: Any) -> tuple[Part, ...]:
    if type(value) is Symbol:
        return value._parts
    if type(value) is str:
        return (value,)
    raise Untraceable(f"a string and {type(value).__name__}")


def _bounded(parts: tuple[Part, ...]) -> tuple[Part, ...]:
    num_characters = sum(len(part) for part in parts if type(part) is str)
    if num_characters > MAX_LITERAL_CHARACTERS or len(parts) > MAX_PARTS:
        raise Unbounded(f"more than {num_characters - 1} characters of its own, or {len(parts) - 1} parts")
    return parts


def _replaced(text: str, old: str, new: str, count: int = -1) -> str:
    if len(text) + (text.count(old) * len(new) if len(new) > len(old) else 0) > MAX_CHARACTERS:
        raise Unbounded(f"more than {MAX_CHARACTERS} characters")
    return text.replace(old, new, count)


def _joined(parts: tuple[Part, ...]) -> tuple[Part, ...]:
    joined: list[Part] = []
    literal: list[str] = []
    for part in parts:
        if type(part) is str:
            literal.append(part)
            continue
        if text := "".join(literal):
            joined.append(text)
        literal.clear()
        joined.append(part)
    if text := "".join(literal):
        joined.append(text)
    return tuple(joined)


# Jinja's side: transformers' environment for chat templates, in which a symbol goes wherever a string does.


class _CodeGenerator(NativeCodeGenerator):
    """Compiles outputs to what `_Environment` makes of them; and loops, so that their turns are counted."""

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
    if type(value) is _Safe:
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
        elif not isinstance(item, (str, int, float, range, jinja2.Undefined, Symbol)) and item is not None:
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
            raise Unbounded(f"more than {num_characters - 1} characters of its own, or {len(parts) - 1} parts")
    if log is None:
        return "".join(parts)  # type: ignore[arg-type]
    return Symbol(log, tuple(parts))


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> Any:
    """transformers' filter, for data with symbols at any depth."""
    if any(type(option) is Symbol for option in (ensure_ascii, indent, separators, sort_keys)):
        raise Untraceable("a layout of JSON that is not known")
    _require_data(value)
    if sum(_width(option) for option in (indent, *(separators or ()))) > _MAX_WIDTH:
        raise Unbounded(f"an indent of more than {_MAX_WIDTH} characters")
    layout = {"ensure_ascii": ensure_ascii, "indent": indent, "separators": separators, "sort_keys": sort_keys}
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
    opening, closing = (json.dumps(character, ensure_ascii=ensure_ascii)[1:-1] for character in _STAND_INS)
    pieces = re.split(f'"{re.escape(opening)}([0-9]+){re.escape(closing)}"', text)
    return _concat(
        symbols[int(piece)]._derive(lambda whole: json.dumps(whole, **layout)) if number % 2 else piece
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
    return text.replace(old, new, count) if type(text) is Symbol else _replaced(text, old, new, count)


def _by_method(name: str) -> Callable[..., Any]:
    """A filter that is a method of strings."""

    def apply(value: Any, *arguments: Any) -> Any:
        if isinstance(value, (Markup, _Safe)):
            raise Untraceable("text that is marked as safe")
        return getattr(_text(value), name)(*arguments)

    return apply


def _for_symbols(answer: Callable[[Symbol], Any], otherwise: Callable[[Any], Any]) -> Callable[[Any], Any]:
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


_FILTERS: Mapping[str, Callable[..., Any]] = jinja2.filters.FILTERS
_TESTS: Mapping[str, Callable[..., Any]] = jinja2.tests.TESTS  # type: ignore[assignment]


class _Environment(ImmutableSandboxedEnvironment):
    """transformers' environment for chat templates, but for symbols and a limit on what a template may do."""

    code_generator_class = _CodeGenerator
    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
        self.num_steps = 0
        # Jinja's own filters and tests either hand a value on, or use it in a way that a symbol refuses, but for these.
        self.filters |= {"tojson": _tojson, "join": _join, "replace": _replace, "trim": _by_method("strip")}
        self.filters |= {name: _by_method(name) for name in ("lower", "upper", "capitalize")}
        self.filters["string"] = _for_symbols(lambda symbol: symbol, soft_str)
        self.filters["length"] = self.filters["count"] = _for_symbols(_Length, lambda value: len(value))
        self.filters["safe"] = _for_symbols(_Safe, Markup)
        self.filters |= {name: _refuse(f"the filter {name}") for name in ("pprint", "random")}
        self.filters = {name: self._counted(function) for name, function in self.filters.items()}
        for name in ("iterable", "sequence"):
            self.tests[name] = _not_of((_Safe,), _for_symbols(lambda _: True, _TESTS[name]))
        for name in ("number", "integer"):
            self.tests[name] = _not_of((_Length,), _TESTS[name])
        self.tests |= {"string": _not_of((_Safe,), _is_string), "sameas": _not_of((Symbol, _Safe, _Length), _is_same)}
        self.globals |= {"raise_exception": _raise_exception, "dict": _Dict()}
        self.globals |= {"strftime_now": _refuse("today's date"), "lipsum": _refuse("random text")}

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
        if type(argument) in (Symbol, _Safe):
            raise Untraceable("a string as a key")
        return super().getitem(obj, argument)

    def call(self, context: Any, called: Any, /, *arguments: Any, **more: Any) -> Any:  # type: ignore[override]
        name, of = getattr(called, "__name__", ""), getattr(called, "__self__", None)
        if name in ("format", "format_map"):  # which the sandbox wraps
            self._require_narrow(getattr(getattr(called, "__wrapped__", called), "__self__", None), "{", arguments)
        elif type(of) is str and name in ("replace", "join"):
            made = _replaced(of, *arguments) if name == "replace" else _join_strings(of, *arguments)
            self._spend(_size(made))
            return made
        else:
            self._require_small(of, [*arguments, *more.values()])
        return super().call(context, called, *arguments, **more)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "%":
            self._require_narrow(left, "%", right if type(right) is tuple else (right,))
        elif operator == "+":
            self._spend(_size(left) + _size(right))
        elif isinstance(left, int) and isinstance(right, int):
            self._spend(left.bit_length() * (max(right, 0) if operator == "**" else 1) + right.bit_length())
        elif operator == "*":
            times = left if isinstance(left, int) else right
            self._spend((_size(left) + _size(right)) * times if isinstance(times, int) else 0)
        return super().call_binop(context, operator, left, right)

    def _counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A filter whose uses count, and that gets nothing of which it would make too much."""
        num_own = int(hasattr(function, "jinja_pass_arg"))  # a first argument that Jinja gives

        @wraps(function)
        def counted(*arguments: Any, **more: Any) -> Any:
            value, *others = arguments[num_own:]
            if function is _FILTERS["format"]:
                self._require_narrow(value, "%", others)
            elif function in (_FILTERS["batch"], _FILTERS["slice"]):
                self._require_small(" ", [*others, *more.values()])
            elif function is not _replace:
                self._require_small(value, [*others, *more.values()])
            return function(*arguments, **more)

        return counted

    def _require_small(self, value: Any, arguments: Iterable[Any]) -> None:
        """What is made of a string may be as long as the string times a width, or times another string."""
        if not isinstance(value, str):
            return self._spend(_size(value))
        self._spend(max(len(value), 1) * max(map(_width, arguments), default=1))

    def _require_narrow(self, layout: Any, opening: str, arguments: Iterable[Any]) -> None:
        """The same for what fills the places of a layout."""
        if not isinstance(layout, str):
            return
        places = _PLACES[opening].findall(layout.replace("{{", ""))
        if any("*" in place if opening == "%" else "{" in place for place in places):
            raise Unbounded("a width that is not known")
        self._spend(sum(int(digits[:9]) for place in places for digits in re.findall("[0-9]+", place)))
        self._spend(len(layout) + len(places) * max(map(_size, arguments), default=0))

    def _spend(self, size: int) -> None:
        self.num_steps += 1 + max(size, 0) // 64
        if size > MAX_LITERAL_CHARACTERS or self.num_steps > MAX_STEPS:
            raise Unbounded(f"more than {MAX_STEPS} steps, or a value of more than {MAX_LITERAL_CHARACTERS} characters")


_PLACES = {"%": re.compile(r"%(?:\([^)]*\))?([^%a-zA-Z]*)"), "{": re.compile(r"\{[^{}:]*:?([^{}]*\{?)")}
"""Where a layout takes values, and what it says of their width."""


def _size(value: Any) -> int:
    return len(value) if isinstance(value, (str, list, tuple, dict, range)) else 0


def _width(value: Any) -> int:
    return abs(value) if isinstance(value, int) else _size(value)


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
        tree = _Environment().parse(template)
    except jinja2.TemplateError as error:
        raise Untraceable(f"{type(error).__name__}: {error}") from error
    texts = {node.data for node in tree.find_all(nodes.TemplateData)}
    return texts | {node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)}
