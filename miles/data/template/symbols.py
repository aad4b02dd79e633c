"""Symbols: strings whose content is unknown, on which a chat template runs.

A template gets a `Symbol` in place of each string of a conversation. It can do three things to it:

    content.lstrip("\\n") + "<|im_end|>"   derive: a Symbol of two parts. The first knows how it is
                                          computed from a row's strings, the second is a text.
    "</think>" in content                 ask: the answer for the row at hand. It is noted with a
                                          guard, a function that asks any row the same.
    content | list                        anything else is refused: `Untraceable`.

Invariants:

- Nothing else can look at a symbol. So a template does the same for all rows whose strings give the
  same answers to its guards, and the same parts compute what it writes for them.
- A literal part is text of the template's own. What a row says is in no literal.

Attributes begin with an underscore because Jinja's sandbox lets no template read such names.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

Strings = Sequence[str]
"""The unknown strings of a row, in the order of `trace.shape_of`."""

Compute = Callable[[Strings], str]


class Derived(NamedTuple):
    """A part of the output that is computed from a row's strings."""

    compute: Compute
    sources: frozenset[int]
    """which strings, by number"""
    depth: int = 0
    """the operations that call one another in `compute`"""


Part = str | Derived
"""A part of the output: a literal text of the template's own, or derived from a row's strings."""

Guard = Callable[[Strings], bool]
"""A question about a row's strings."""

MAX_LITERAL_CHARACTERS = 4 << 20
MAX_PARTS = 1 << 18
"""An output with more literal text, or more parts, is taken for one without bounds."""
MAX_CHARACTERS = 1 << 27
"""So is one with more text of the row's."""

_MAX_SPLIT_PARTS = 64
_MAX_DEPTH = 64


class Untraceable(Exception):
    """A template does something with a string that a symbol cannot follow, or it fails."""


class Unbounded(Untraceable):
    """A template does not end, or makes more and more: transformers must not run it."""


class GuardLog:
    """The strings of the row that is traced, and the guards that the template asked."""

    def __init__(self, strings: Strings) -> None:
        self.strings = strings
        self.answers: list[tuple[Guard, bool]] = []

    def ask(self, guard: Guard) -> bool:
        """Return the answer for the row that is traced, and note both."""
        answer = guard(self.strings)
        self.answers.append((guard, answer))
        return answer


def refuse(what: str, error: type[Untraceable] = Untraceable) -> Callable[..., NoReturn]:
    """Return a function (or method) that raises, whatever it is called with."""

    def refused(*_: Any, **__: Any) -> NoReturn:
        raise error(what)

    return refused


class Symbol:
    """An unknown string: its parts, joined."""

    __slots__ = ("_log", "_parts")

    def __init__(self, log: GuardLog, parts: tuple[Part, ...]) -> None:
        self._log = log
        self._parts = parts

    # Derive: operations that give strings

    def _derive(self, operation: Callable[..., str], *arguments: Any) -> Symbol:
        """Return the symbol of `operation(string, *arguments)`."""
        if not all(argument is None or type(argument) in (str, int) for argument in arguments):
            raise Untraceable("an operation on two strings that are not known")

        derived = [part for part in self._parts if type(part) is Derived]
        depth = 1 + max((part.depth for part in derived), default=0)
        if depth > _MAX_DEPTH:  # each calls the next
            raise Untraceable(f"more than {_MAX_DEPTH} operations on one string")
        sources = frozenset[int]().union(*(part.sources for part in derived))

        string_of = compute_of(self._parts)

        def compute(strings: Strings) -> str:
            string = string_of(strings)
            if len(string) > MAX_CHARACTERS:
                raise Unbounded(f"more than {MAX_CHARACTERS} characters")
            return operation(string, *arguments)

        # Arguments that do not fit fail now, as they do in the template, and for any row.
        compute(self._log.strings)
        return Symbol(self._log, (Derived(compute, sources, depth),))

    def strip(self, characters: Any = None) -> Symbol:
        return self.lstrip(characters).rstrip(characters)

    def lstrip(self, characters: Any = None) -> Symbol:
        return self._strip_end(str.lstrip, characters, 0)

    def rstrip(self, characters: Any = None) -> Symbol:
        return self._strip_end(str.rstrip, characters, -1)

    def _strip_end(self, strip: Callable[..., str], characters: Any, end: int) -> Symbol:
        """Strip part after part from one end (0 or -1), as long as nothing is left of a part.

        So literal parts stay literal.
        """
        parts = list(self._parts)
        while parts:
            rest = self._strip_part(strip, parts[end], characters)
            if rest is not None:
                parts[end] = rest
                break
            del parts[end]
        return Symbol(self._log, tuple(parts))

    def _strip_part(self, strip: Callable[..., str], part: Part, characters: Any) -> Part | None:
        """Return a part, stripped; None if nothing is left of it, which a guard is asked."""
        if isinstance(part, str):
            return strip(part, characters) or None
        stripped = Symbol(self._log, (part,))._derive(strip, characters)
        return stripped._parts[0] if stripped else None

    def lower(self) -> Symbol:
        return self._derive(str.lower)

    def upper(self) -> Symbol:
        return self._derive(str.upper)

    def title(self) -> Symbol:
        return self._derive(str.title)

    def capitalize(self) -> Symbol:
        return self._derive(str.capitalize)

    def replace(self, old: Any, new: Any, count: Any = -1) -> Symbol:
        return self._derive(replace_within_bounds, old, new, count)

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
        """Return as many symbols as the string of the row at hand has pieces.

        A guard asks piece by piece whether there is a further one, so that rows of one shape are
        asked the same.
        """
        if type(separator) not in (str, type(None)) or type(maxsplit) is not int:
            raise Untraceable("a split at what is not known")
        string_of = compute_of(self._parts)

        def has_piece(number: int) -> bool:
            return self._log.ask(
                lambda strings: len(split(string_of(strings), separator, maxsplit)) > number
            )

        def piece(number: int) -> Symbol:
            return self._derive(lambda string: split(string, separator, maxsplit)[number])

        pieces: list[Symbol] = []
        while has_piece(len(pieces)):
            pieces.append(piece(len(pieces)))
            if len(pieces) > _MAX_SPLIT_PARTS:
                raise Untraceable(f"more than {_MAX_SPLIT_PARTS} parts of a string")
        return pieces

    def __getitem__(self, key: Any) -> Symbol:
        if isinstance(key, slice):
            if not all(type(edge) in (int, type(None)) for edge in (key.start, key.stop, key.step)):
                raise Untraceable("a string indexed with slice")
            return self._derive(lambda string: string[key])

        if type(key) is int:
            if not self._is_longer_than(key if key >= 0 else -key - 1):
                raise IndexError(key)
            return self._derive(lambda string: string[key])

        if type(key) is str:  # after a TypeError, Jinja looks for an attribute of that name
            raise TypeError("string indices must be integers")
        raise Untraceable(f"a string indexed with {type(key).__name__}")

    def __add__(self, other: Any) -> Symbol:
        return Symbol(self._log, require_bounded(self._parts + parts_of(other)))

    def __radd__(self, other: Any) -> Symbol:
        return Symbol(self._log, require_bounded(parts_of(other) + self._parts))

    # Ask: operations that give answers

    def _ask(self, question: Callable[[str, str], bool], other: Any) -> bool:
        string_of = compute_of(self._parts)
        other_of = compute_of(parts_of(other))
        if type(other) is str:
            return self._log.ask(lambda strings: question(string_of(strings), other))
        return self._log.ask(lambda strings: question(string_of(strings), other_of(strings)))

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
        string_of = compute_of(self._parts)
        return self._log.ask(lambda strings: string_of(strings) != "")

    def _is_longer_than(self, length: int) -> bool:
        string_of = compute_of(self._parts)
        return self._log.ask(lambda strings: len(string_of(strings)) > length)

    # Refuse: everything else

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or not hasattr(str, name):  # a plain string has it neither
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
    """`string | length`. It can be compared with a number, which asks a guard, and nothing else."""

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
    __str__ = __repr__ = __format__ = __hash__  # type: ignore[assignment]
    __int__ = __float__ = __index__ = __hash__
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __hash__
    __mod__ = __floordiv__ = __truediv__ = __hash__


class Safe:
    """`string | safe`. It can be put out, and nothing else: Jinja escapes what is added to one."""

    __slots__ = ("of",)

    def __init__(self, of: Symbol) -> None:
        self.of = of

    __html__ = __hash__ = refuse("text that is marked as safe")  # type: ignore[assignment]
    __str__ = __repr__ = __format__ = __iter__ = __len__ = __html__
    __bool__ = __contains__ = __getitem__ = __getattr__ = __html__
    __int__ = __float__ = __index__ = __html__
    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __html__  # type: ignore[assignment]
    __add__ = __radd__ = __mul__ = __rmul__ = __mod__ = __rmod__ = __html__


# Parts


def parts_of(value: Any) -> tuple[Part, ...]:
    """Return the parts of a symbol, or a plain string as a literal."""
    if type(value) is Symbol:
        return value._parts
    if type(value) is str:
        return (value,)
    raise Untraceable(f"a string and {type(value).__name__}")


def compute_of(parts: tuple[Part, ...]) -> Compute:
    """Return the function that computes the text of some parts, joined."""
    if len(parts) == 1 and type(parts[0]) is Derived:
        return parts[0].compute
    return lambda strings: "".join(
        part if isinstance(part, str) else part.compute(strings) for part in parts
    )


def require_bounded(parts: tuple[Part, ...]) -> tuple[Part, ...]:
    """Return the parts, or raise `Unbounded` where there is too much of them."""
    num_characters = sum(len(part) for part in parts if type(part) is str)
    if num_characters > MAX_LITERAL_CHARACTERS or len(parts) > MAX_PARTS:
        raise Unbounded(
            f"more than {num_characters - 1} characters of its own, or {len(parts) - 1} parts"
        )
    return parts


def replace_within_bounds(text: str, old: str, new: str, count: int = -1) -> str:
    """Return `text.replace(old, new, count)`, or raise `Unbounded` before it grows too long."""
    added = text.count(old) * len(new) if len(new) > len(old) else 0
    if len(text) + added > MAX_CHARACTERS:
        raise Unbounded(f"more than {MAX_CHARACTERS} characters")
    return text.replace(old, new, count)


def join_literals(parts: tuple[Part, ...]) -> tuple[Part, ...]:
    """Return the parts with neighbouring literals joined, and without empty ones."""
    joined: list[Part] = []
    literals: list[str] = []

    def end_literal() -> None:
        if text := "".join(literals):
            joined.append(text)
        literals.clear()

    for part in parts:
        if type(part) is str:
            literals.append(part)
        else:
            end_literal()
            joined.append(part)
    end_literal()
    return tuple(joined)
