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


Part = str | Made
"""A part of the output: text of the template's own, or made of a row's strings."""

MAX_LITERAL_CHARACTERS = 4 << 20
MAX_PARTS = 1 << 18
"""More than this of a template's own text, or more parts, and a template is taken for one that does not end."""

_MAX_PROGRAMS = 2048
_MAX_SPLIT_PARTS = 64
_STAND_INS = ("\ufdd0", "\ufdd1")


class Untraceable(Exception):
    """A template does something with a string that a symbol cannot follow, or fails."""


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
        """The output for a row, part by part."""
        return [part if type(part) is str else part[0](strings) for part in self.parts]  # type: ignore[operator]


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
        try:
            self._template = _ENVIRONMENT.from_string(template)
        except jinja2.TemplateError as error:
            raise Untraceable(f"{type(error).__name__}: {error}") from error
        self._variables = dict(variables)
        self._reserved = frozenset(reserved)
        self._programs: dict[Any, _Question | Program] = {}
        self._num_programs = 0

    def program(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None
    ) -> tuple[Program, list[str], bool]:
        """The program for a row, the row's strings, and whether the program was made just now.

        Args:
            messages, tools: plain JSON types.

        Raises:
            Untraceable: for this row the template does what cannot be followed, or fails.
        """
        shape, strings = shape_of(messages, tools)
        try:
            node = self._programs.get(shape)
        except TypeError as error:  # not hashable
            raise Untraceable("data that is not JSON") from error
        while type(node) is _Question:
            node = node.yes if node.ask(strings) else node.no
        if node is not None:
            return node, strings, False  # type: ignore[return-value]
        program, answers = self._trace(messages, tools, strings)
        if self._num_programs >= _MAX_PROGRAMS:
            self._programs.clear()
            self._num_programs = 0
        self._num_programs += 1
        self._keep(shape, program, answers)
        return program, strings, True

    def _trace(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None, strings: list[str]
    ) -> tuple[Program, list[tuple[Callable[[Strings], bool], bool]]]:
        log = _Log(strings, self._reserved)
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
            assert isinstance(node, _Question), "one question more than the last time"
            followed.append((node, answer))
            node = node.yes if answer else node.no
        assert node is None, "no program was there"
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
    if isinstance(value, (list, tuple)):
        return (list, *[_shape(item, strings) for item in value])
    return (type(value), value)  # with the type: 1 == True == 1.0


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
        if type(role) is not str or not role.isidentifier():
            raise Untraceable("a role that is not a plain word")
        known = {key: item if key == "role" else self.unknown(item, number) for key, item in message.items()}
        return {key: item for key, item in known.items() if item is not None}

    def unknown(self, value: Any, owner: int) -> Any:
        """The same data with symbols for strings, in the order of `shape_of`."""
        if type(value) is str:
            number = len(self.owners)
            self.owners.append(owner)
            return Symbol(self, (Made(itemgetter(number), frozenset([number])),))
        if isinstance(value, Mapping):
            for key in value:
                if type(key) is not str or not self._reserved.isdisjoint(key):
                    raise Untraceable("a key that could be a marker of its own")
            return {key: self.unknown(item, owner) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.unknown(item, owner) for item in value]
        if value is None or type(value) in (bool, int, float):
            return value
        raise Untraceable(f"{type(value).__name__}, which is not JSON")


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
        sources = frozenset[int]().union(*(part.sources for part in self._parts if type(part) is Made))
        return Symbol(self._log, (Made(lambda strings: make(text(strings), *arguments), sources),))

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
        return self._derive(str.replace, old, new, count)

    def removeprefix(self, prefix: Any) -> Symbol:
        return self._derive(str.removeprefix, prefix)

    def removesuffix(self, suffix: Any) -> Symbol:
        return self._derive(str.removesuffix, suffix)

    def split(self, separator: Any = None, maxsplit: Any = -1) -> list[Symbol]:
        return self._split(str.split, separator, maxsplit)

    def rsplit(self, separator: Any = None, maxsplit: Any = -1) -> list[Symbol]:
        return self._split(str.rsplit, separator, maxsplit)

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
        return Symbol(self._log, self._parts + _parts_of(other))

    def __radd__(self, other: Any) -> Symbol:
        return Symbol(self._log, _parts_of(other) + self._parts)

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
    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __html__  # type: ignore[assignment]
    __add__ = __radd__ = __mul__ = __rmul__ = __mod__ = __rmod__ = __getattr__ = __html__


def _parts_of(value: Any) -> tuple[Part, ...]:
    if type(value) is Symbol:
        return value._parts
    if type(value) is str:
        return (value,)
    raise Untraceable(f"a string and {type(value).__name__}")


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
    """Compiles an output without `str(…)` around it, and `a ~ b` to what an output of both gives."""

    def visit_Concat(self, node: nodes.Concat, frame: Any) -> None:
        self.write("environment.concat((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")


class _Generation(Extension):
    """`{% generation %}`, by which transformers' templates mark answers: here it gives what is inside."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_inside"), [], [], body).set_lineno(line)

    def _inside(self, caller: Callable[[], Any]) -> Any:
        return caller()


def _concat(values: Iterable[Any]) -> Any:
    """What Jinja puts out: text, or a symbol where there is one among the values."""
    parts: list[Part] = []
    log = None
    num_characters = 0
    for value in values:  # the template runs as this goes on
        symbol = value.of if type(value) is _Safe else value
        if type(symbol) is Symbol:
            log = symbol._log
            parts += symbol._parts
        else:
            parts.append(str(value))
            num_characters += len(parts[-1])  # type: ignore[arg-type]
        if num_characters > MAX_LITERAL_CHARACTERS or len(parts) > MAX_PARTS:
            raise Untraceable(f"the template goes on beyond {num_characters} characters of its own, {len(parts)} parts")
    if log is None:
        return "".join(parts)  # type: ignore[arg-type]
    return Symbol(log, tuple(parts))


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> Any:
    """transformers' filter, for data with symbols at any depth."""
    layout = {"ensure_ascii": ensure_ascii, "indent": indent, "separators": separators, "sort_keys": sort_keys}
    symbols: list[Symbol] = []

    def stand_in(item: Any) -> Any:
        if type(item) is Symbol:
            symbols.append(item)
            return f"{_STAND_INS[0]}{len(symbols) - 1}{_STAND_INS[1]}"
        if isinstance(item, Mapping):
            return {key: stand_in(inner) for key, inner in item.items()}
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
    return (value if type(value) is Symbol else str(value)).replace(old, new, -1 if count is None else count)


def _by_method(name: str) -> Callable[..., Any]:
    """A filter that is a method of strings."""

    def apply(value: Any, *arguments: Any) -> Any:
        if isinstance(value, Markup):
            raise Untraceable("text that is marked as safe")
        return getattr(value if type(value) is Symbol else str(value), name)(*arguments)

    return apply


def _for_symbols(answer: Callable[[Symbol], Any], otherwise: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda value: answer(value) if type(value) is Symbol else otherwise(value)


def _is_string(value: Any) -> bool:
    if type(value) is _Safe:
        raise Untraceable("text that is marked as safe")
    return isinstance(value, (str, Symbol))


def _is_same(value: Any, other: Any) -> bool:
    if type(value) is Symbol or type(other) is Symbol:
        raise Untraceable("whether two strings are one object")
    return value is other


def _raise_exception(message: Any) -> NoReturn:
    raise Untraceable("the template raises an exception")


def _environment() -> jinja2.Environment:
    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    env.code_generator_class = _CodeGenerator
    env.concat = _concat  # type: ignore[assignment]
    # Jinja's own filters and tests either hand a value on, or use it in a way that a symbol refuses, but for these.
    env.filters |= {"tojson": _tojson, "join": _join, "replace": _replace, "trim": _by_method("strip")}
    env.filters |= {name: _by_method(name) for name in ("lower", "upper", "capitalize")}
    env.filters["string"] = _for_symbols(lambda symbol: symbol, soft_str)
    env.filters["length"] = env.filters["count"] = _for_symbols(_Length, lambda value: len(value))
    env.filters["safe"] = _for_symbols(_Safe, Markup)
    for name in ("iterable", "sequence"):
        env.tests[name] = _for_symbols(lambda _: True, env.tests[name])
    env.tests |= {"string": _is_string, "sameas": _is_same}
    for name in ("pprint", "random"):
        del env.filters[name]
    env.globals |= {"raise_exception": _raise_exception, "strftime_now": _refuse("today's date")}
    return env


_ENVIRONMENT = _environment()


def literals(template: str) -> set[str]:
    """Every text that a template can write by itself: what is outside of tags, and its string constants.

    Raises:
        Untraceable: the template does not compile.
    """
    try:
        tree = _ENVIRONMENT.parse(template)
    except jinja2.TemplateError as error:
        raise Untraceable(f"{type(error).__name__}: {error}") from error
    texts = {node.data for node in tree.find_all(nodes.TemplateData)}
    return texts | {node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)}
