"""A string that is not known, for a chat template to run on: what makes a string of it, and what asks about it.

    content.lstrip("\\n") + "<|im_end|>"   a Symbol of two parts: how to make the first of a row's strings, and a text
    "</think>" in content                 the answer for the row at hand, and a guard: how to ask any row
    content | list                        Untraceable

A symbol has no other way to be looked at. So a template does the same for all rows that give the same answers
to its guards, and what it makes of their strings is made by the same parts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

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

Guard = Callable[[Strings], bool]

MAX_LITERAL_CHARACTERS = 4 << 20
MAX_PARTS = 1 << 18
"""More than this of a template's own text, or more parts, and its output is taken for one without bounds."""
MAX_CHARACTERS = 1 << 27
"""More than this of a row's text, too."""

_MAX_SPLIT_PARTS = 64
_MAX_DEPTH = 64


class Untraceable(Exception):
    """A template does something with a string that a symbol cannot follow, or fails."""


class Unbounded(Untraceable):
    """A template goes on and on, or makes more and more: transformers had better not run it."""


class Log:
    """The strings of the row at hand, and what was asked about them."""

    def __init__(self, strings: Strings) -> None:
        self.strings = strings
        self.answers: list[tuple[Guard, bool]] = []

    def ask(self, guard: Guard) -> bool:
        answer = guard(self.strings)
        self.answers.append((guard, answer))
        return answer


def refuse(what: str, error: type[Untraceable] = Untraceable) -> Callable[..., NoReturn]:
    """A function that does nothing but refuse."""

    def refused(*_: Any, **__: Any) -> NoReturn:
        raise error(what)

    return refused


class Symbol:
    """A string that is not known: parts that make it, joined."""

    __slots__ = ("_log", "_parts")

    def __init__(self, log: Log, parts: tuple[Part, ...]) -> None:
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

        made(
            self._log.strings
        )  # as the template does; arguments that do not fit fail here, for any row
        return Symbol(
            self._log, (Made(made, frozenset[int]().union(*(part.sources for part in of)), depth),)
        )

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
            rest = Symbol(self._log, tuple(parts[end:] if end else parts[:1]))._stripped(
                strip, characters
            )
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
        return self._derive(replaced, old, new, count)

    def removeprefix(self, prefix: Any) -> Symbol:
        return self._derive(str.removeprefix, prefix)

    def removesuffix(self, suffix: Any) -> Symbol:
        return self._derive(str.removesuffix, suffix)

    def split(self, sep: Any = None, maxsplit: Any = -1) -> list[Symbol]:
        return self._split(str.split, sep, maxsplit)

    def rsplit(self, sep: Any = None, maxsplit: Any = -1) -> list[Symbol]:
        return self._split(str.rsplit, sep, maxsplit)

    def _split(
        self, split: Callable[..., list[str]], separator: Any, maxsplit: Any
    ) -> list[Symbol]:
        """As many symbols as this row has parts: whether there is one more is asked part by part, so that rows of one
        shape are asked the same."""
        if type(separator) not in (str, type(None)) or type(maxsplit) is not int:
            raise Untraceable("a split at what is not known")
        text = _maker(self._parts)

        def has(number: int) -> bool:
            return self._log.ask(
                lambda strings: len(split(text(strings), separator, maxsplit)) > number
            )

        def part(number: int) -> Symbol:
            return self._derive(lambda whole: split(whole, separator, maxsplit)[number])

        parts: list[Symbol] = []
        while has(len(parts)):
            parts.append(part(len(parts)))
            if len(parts) > _MAX_SPLIT_PARTS:
                raise Untraceable(f"more than {_MAX_SPLIT_PARTS} parts of a string")
        return parts

    def __getitem__(self, key: Any) -> Symbol:
        if isinstance(key, slice) and all(
            type(edge) in (int, type(None)) for edge in (key.start, key.stop, key.step)
        ):
            return self._derive(lambda whole: whole[key])
        if type(key) is int:
            if not self._is_longer_than(key if key >= 0 else -key - 1):
                raise IndexError(key)
            return self._derive(lambda whole: whole[key])
        if type(key) is str:
            raise TypeError(
                "string indices must be integers"
            )  # Jinja then looks for an attribute, as with any string
        raise Untraceable(f"a string indexed with {type(key).__name__}")

    def __add__(self, other: Any) -> Symbol:
        return Symbol(self._log, bounded(self._parts + parts_of(other)))

    def __radd__(self, other: Any) -> Symbol:
        return Symbol(self._log, bounded(parts_of(other) + self._parts))

    # what asks about it

    def _ask(self, question: Callable[[str, str], bool], other: Any) -> bool:
        text, other_text = _maker(self._parts), _maker(parts_of(other))
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

    __hash__ = refuse("a string as a key")  # type: ignore[assignment]
    __str__ = __repr__ = __format__ = refuse("a string handed on as it is")
    __iter__ = __reversed__ = refuse("the characters of a string")
    __len__ = refuse("the length of a string")
    __int__ = __float__ = __complex__ = __index__ = refuse("a string as a number")
    __lt__ = __le__ = __gt__ = __ge__ = refuse("the order of strings")
    __mul__ = __rmul__ = __mod__ = __rmod__ = refuse("a string repeated or formatted")


class Length:
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

    __hash__ = refuse("the length of a string")  # type: ignore[assignment]
    __str__ = __repr__ = __format__ = __int__ = __float__ = __index__ = __hash__  # type: ignore[assignment]
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __mod__ = __floordiv__ = (
        __truediv__
    ) = __hash__


def _maker(parts: tuple[Part, ...]) -> Make:
    if len(parts) == 1 and type(parts[0]) is Made:
        return parts[0].make
    return lambda strings: "".join(
        part if isinstance(part, str) else part[0](strings) for part in parts
    )


class Safe:
    """`string | safe`: Jinja's Markup, to be put out and no more (what is added to one is escaped)."""

    __slots__ = ("of",)

    def __init__(self, of: Symbol) -> None:
        self.of = of

    __html__ = __hash__ = refuse("text that is marked as safe")  # type: ignore[assignment]
    __str__ = __repr__ = __format__ = __iter__ = __len__ = __bool__ = __contains__ = __getitem__ = (
        __html__
    )
    __int__ = __float__ = __index__ = __html__
    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __html__  # type: ignore[assignment]
    __add__ = __radd__ = __mul__ = __rmul__ = __mod__ = __rmod__ = __getattr__ = __html__


def parts_of(value: Any) -> tuple[Part, ...]:
    if type(value) is Symbol:
        return value._parts
    if type(value) is str:
        return (value,)
    raise Untraceable(f"a string and {type(value).__name__}")


def bounded(parts: tuple[Part, ...]) -> tuple[Part, ...]:
    num_characters = sum(len(part) for part in parts if type(part) is str)
    if num_characters > MAX_LITERAL_CHARACTERS or len(parts) > MAX_PARTS:
        raise Unbounded(
            f"more than {num_characters - 1} characters of its own, or {len(parts) - 1} parts"
        )
    return parts


def replaced(text: str, old: str, new: str, count: int = -1) -> str:
    if len(text) + (text.count(old) * len(new) if len(new) > len(old) else 0) > MAX_CHARACTERS:
        raise Unbounded(f"more than {MAX_CHARACTERS} characters")
    return text.replace(old, new, count)


def joined_parts(parts: tuple[Part, ...]) -> tuple[Part, ...]:
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
