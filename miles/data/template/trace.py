"""Runs a chat template once for a *shape* of conversation, with its strings unknown: what it does becomes a program.

    Qwen3's template, shape (user, assistant)
      guards   messages[0].content.startswith("<tool_response>")  no     what the template asked of the strings,
               "</think>" in messages[1].content                  no     and the answers that lead to this program
      parts    "<|im_start|>user\\n"  messages[0].content  "<|im_end|>\\n<|im_start|>assistant\\n<think>…</think>\\n\\n"
               messages[1].content.lstrip("\\n")  "<|im_end|>\\n"

Each string of the conversation reaches the template as a `Symbol` (`symbols.py`), in a sandbox (`sandbox.py`). A
template can look at a symbol only by questions that are noted, so for every row of the same shape with the same
answers it does the same and writes the same parts: a program is what the template gives, for all of them. And a
literal part comes from the template alone: whatever a user typed is in no literal.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

from miles.data.template.sandbox import Environment
from miles.data.template.symbols import (
    MAX_CHARACTERS,
    Guard,
    Log,
    Made,
    Part,
    Strings,
    Symbol,
    Unbounded,
    Untraceable,
    joined_parts,
    parts_of,
)

_MAX_KEPT = 1 << 18
"""Questions, parts and strings of all the programs that are kept."""


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

    ask: Guard
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
        self._environment = Environment()
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
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        strings: list[str],
    ) -> tuple[Program, list[tuple[Guard, bool]]]:
        log = Log(strings)
        unknowns = _Unknowns(log, self._reserved)
        self._environment.num_steps = 0
        try:
            output = self._template.render(
                messages=[
                    _with_reasoning_names(unknowns.unknown_message(message, n))
                    for n, message in enumerate(messages)
                ],
                tools=None if tools is None else [unknowns.unknown(tool, -1) for tool in tools],
                documents=None,
                **{"add_generation_prompt": False, **self._variables},
            )
        except Untraceable:
            raise
        except Exception as error:  # a template can fail in any way that Jinja and Python know
            raise Untraceable(f"{type(error).__name__}: {error}") from error
        parts = joined_parts(parts_of(output))
        owners = [
            frozenset(unknowns.owners[number] for number in part.sources)
            if isinstance(part, Made)
            else frozenset[int]()
            for part in parts
        ]
        return Program(parts, tuple(owners)), log.answers

    def _keep(self, shape: Any, program: Program, answers: Sequence[tuple[Guard, bool]]) -> None:
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

    def _hang(
        self, shape: Any, followed: Sequence[tuple[_Question, bool]], node: _Question | Program
    ) -> None:
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
                tuple(
                    (key, item if key == "role" else _shape(item, strings))
                    for key, item in message.items()
                )
            )
    if tools is not None:
        shape.append(("tools", *[_shape(tool, strings) for tool in tools]))
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


class _Unknowns:
    """Hands out symbols for a row's strings."""

    def __init__(self, log: Log, reserved: frozenset[str]) -> None:
        self._log, self._reserved = log, reserved
        self.owners: list[int] = []
        """of each string the message that it is of, by number; -1: the tools"""

    def unknown_message(self, message: Mapping[str, Any], number: int) -> dict[str, Any]:
        """Without keys that are null, as transformers gives messages to a template."""
        role = message.get("role")
        if type(role) is not str or not role.isidentifier() or not self._reserved.isdisjoint(role):
            raise Untraceable("a role that is not a plain word")
        self._require_plain(message)
        known = {
            key: item if key == "role" else self.unknown(item, number)
            for key, item in message.items()
        }
        return {key: item for key, item in known.items() if item is not None}

    def unknown(self, value: Any, owner: int) -> Any:
        """The same data with symbols for strings, in the order of `shape_of`."""
        if type(value) is str:
            number = len(self.owners)
            self.owners.append(owner)
            return Symbol(self._log, (Made(itemgetter(number), frozenset([number])),))
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
