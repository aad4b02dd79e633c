"""Traces a chat template: runs it once on symbols, and keeps a program of it.

    Qwen3's template, a conversation of the shape (user, assistant)

    guards   messages[0].content.startswith("<tool_response>")   False
             "</think>" in messages[1].content                   False
    parts    "<|im_start|>user\\n"
             messages[0].content
             "<|im_end|>\\n<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n"
             messages[1].content.lstrip("\\n")
             "<|im_end|>\\n"

The shape of a row is everything in it but its strings: roles, keys, numbers, how lists are nested;
of its messages, its tools and the variables that it brings.
Each string reaches the template as a `Symbol` (`symbols.py`), in a sandbox (`sandbox.py`).

The programs of a shape hang in a tree. Its inner nodes are guards, its leaves programs:

    "</think>" in messages[1].content ── False ── program 1
                                      └─ True  ── messages[1].content.startswith("\\n") ── …

A row of a known shape walks from the root to a leaf by its own answers. Where the tree ends, the
template is traced on this row, and the tree grows by the guards that it asked.

Invariants:

- For every row that reaches a program, the template writes the text that the program computes.
- The tree depends on no row before: a row gets the same text, or is refused, in any order of rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import compress
from operator import itemgetter, not_
from typing import Any, NamedTuple

from jinja2 import meta

from miles.data.template.read_keys import WatchedMessage
from miles.data.template.sandbox import Environment
from miles.data.template.symbols import (
    MAX_CHARACTERS,
    Derived,
    Guard,
    GuardLog,
    Part,
    Strings,
    Symbol,
    Unbounded,
    Untraceable,
    join_literals,
    parts_of,
)
from miles.data.tokens.served_chat import REASONING_NAMES, with_reasoning_names

Message = Mapping[str, Any]
Tool = Mapping[str, Any]
Shape = tuple[Any, ...]
"""The result of `shape_of`: of a conversation of texts, the roles."""

TOOLS_OWNER = -1
"""The owner of a part that is made of the tools' strings."""
_VARIABLES_OWNER = -2
"""The owner of the strings in a row's variables. They may stand in any turn, as the run's own may,
so parts that are made of them alone have no owner."""

_NO_VARIABLES: Mapping[str, Any] = {}

_MAX_KEPT = 1 << 18
"""Guards, parts and strings of all the programs that are kept."""


class MarkerKey(Untraceable):
    """A key of a row could be taken for a marker of the template's."""


class MessageKey(NamedTuple):
    """A key of one message of a conversation."""

    message: int
    """which message, by number"""
    key: str


@dataclass
class Program:
    """The output of a template for all rows of one shape whose strings give the same answers."""

    parts: tuple[Part, ...]
    """no two literals are neighbours"""
    owners: tuple[frozenset[int], ...]
    """for each part the messages (by number, or `TOOLS_OWNER`) whose strings it is made of"""
    unread: tuple[MessageKey, ...] = ()
    """the keys of the messages at which the template did not look"""
    note: Any = None
    """for the owner of the tracer: `render.py` keeps the turns here"""

    def run(self, strings: Strings) -> list[str]:
        """Return the text of a row, part by part.

        Raises:
            Unbounded: it is longer than any text.
        """
        pieces = [part if isinstance(part, str) else part.compute(strings) for part in self.parts]
        if sum(map(len, pieces)) > MAX_CHARACTERS:
            raise Unbounded(f"more than {MAX_CHARACTERS} characters")
        return pieces


@dataclass
class _Branch:
    """An inner node of the tree: a guard, and the node for each answer, as far as there is one."""

    guard: Guard
    if_true: _Branch | Program | None = None
    if_false: _Branch | Program | None = None


class Tracer:
    """The programs of one chat template, each traced when a row first needs it.

    Args:
        template: Jinja, as transformers runs it.
        variables: what the template is given beside messages and tools.
        reserved: characters that no role and no key of a row may hold. Both are known when a
            template is traced, so they end up in literals. Without the characters of an anchor
            they cannot be taken for one.

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
        self.names = frozenset(meta.find_undeclared_variables(self._environment.parse(template)))
        """the variables that the template reads"""
        self._reserved = frozenset(reserved)
        self._programs: dict[Any, _Branch | Program] = {}
        self._num_kept = 0

    def program(
        self,
        messages: Sequence[Message],
        tools: Sequence[Tool] | None,
        variables: Mapping[str, Any] = _NO_VARIABLES,
    ) -> tuple[Program, list[str]]:
        """Return the program for a row, traced if there is none yet, and the row's strings.

        Args:
            messages, tools: plain JSON types.
            variables: the row's own, of plain JSON types; they win over those of the tracer.

        Raises:
            Untraceable: for this row the template does what cannot be followed, or fails.
            Unbounded: it does not end, or what it makes has no bounds.
        """
        try:
            shape, strings = shape_of(messages, tools, variables)
            node = self._programs.get(shape)
        except (TypeError, RecursionError) as error:  # not hashable; nested too deeply
            raise Untraceable("data that is not JSON, or nested too deeply") from error

        while type(node) is _Branch:
            node = node.if_true if node.guard(strings) else node.if_false
        if node is not None:
            return node, strings  # type: ignore[return-value]

        program, answers = self._trace(messages, tools, variables, strings)
        num_new = len(answers) + len(program.parts) + len(strings)
        self._num_kept += num_new
        if self._num_kept > _MAX_KEPT:  # start afresh
            self._programs.clear()
            self._num_kept = num_new
        self._keep(shape, program, answers)
        return program, strings

    def walk(self, shape: Shape, rows: Sequence[Strings]) -> list[tuple[Program | None, list[int]]]:
        """Divide rows of one shape by the programs that they take; None where there is none yet.

        Args:
            shape: as `shape_of` returns it.
            rows: the strings of each row.

        Raises:
            Untraceable: a string is too long for a guard.
        """
        taken: list[tuple[Program | None, list[int]]] = []
        nodes = [(self._programs.get(shape), list(range(len(rows))))]
        while nodes:
            node, numbers = nodes.pop()
            if not isinstance(node, _Branch):
                taken.append((node, numbers))
                continue

            asked = rows if len(numbers) == len(rows) else [rows[number] for number in numbers]
            answers = list(map(node.guard, asked))
            if all(answers):
                nodes.append((node.if_true, numbers))
            elif not any(answers):
                nodes.append((node.if_false, numbers))
            else:
                nodes.append((node.if_true, list(compress(numbers, answers))))
                nodes.append((node.if_false, list(compress(numbers, map(not_, answers)))))
        return taken

    def _trace(
        self,
        messages: Sequence[Message],
        tools: Sequence[Tool] | None,
        variables: Mapping[str, Any],
        strings: list[str],
    ) -> tuple[Program, list[tuple[Guard, bool]]]:
        """Run the template on symbols. Return its program, and each guard with the row's answer."""
        log = GuardLog(strings)
        symbolic = _SymbolicRow(log, self._reserved)
        self._environment.num_steps = 0

        try:
            symbolic_messages = [
                WatchedMessage(with_reasoning_names(symbolic.message(message, number)))
                for number, message in enumerate(messages)
            ]
            symbolic_tools = None
            if tools is not None:
                symbolic_tools = [symbolic.data(tool, TOOLS_OWNER) for tool in tools]
            symbolic_variables = symbolic.data(variables, _VARIABLES_OWNER)
            output = self._template.render(
                messages=symbolic_messages,
                tools=symbolic_tools,
                documents=None,
                **{"add_generation_prompt": False, **self._variables, **symbolic_variables},
            )
        except Untraceable:
            raise
        except Exception as error:  # a template can fail in any way that Jinja and Python know
            raise Untraceable(f"{type(error).__name__}: {error}") from error

        parts = join_literals(parts_of(output))
        owners = tuple(symbolic.owners_of(part) for part in parts)
        return Program(parts, owners, _unread_keys(messages, symbolic_messages)), log.answers

    def _keep(self, shape: Any, program: Program, answers: Sequence[tuple[Guard, bool]]) -> None:
        """Hang a program into the tree of its shape, below the guards that led to it.

        The guards that the tree already has were asked again in this trace, in the same order.
        """
        path: list[tuple[_Branch, bool]] = []
        node = self._programs.get(shape)
        for guard, answer in answers:
            if node is None:
                node = _Branch(guard)
                self._attach(shape, path, node)
            if not isinstance(node, _Branch):
                raise Untraceable("another way each time")
            path.append((node, answer))
            node = node.if_true if answer else node.if_false

        if node is not None:
            raise Untraceable("another way each time")
        self._attach(shape, path, program)

    def _attach(
        self, shape: Any, path: Sequence[tuple[_Branch, bool]], node: _Branch | Program
    ) -> None:
        if not path:
            self._programs[shape] = node
            return
        branch, answer = path[-1]
        if answer:
            branch.if_true = node
        else:
            branch.if_false = node


# The shape of a row


def shape_of(
    messages: Sequence[Message],
    tools: Sequence[Tool] | None,
    variables: Mapping[str, Any] = _NO_VARIABLES,
) -> tuple[tuple[Any, ...], list[str]]:
    """Return the shape of a row, hashable, and its strings in order: all but roles and keys.

    [{"role": "user", "content": "2+2?"}]  ->  ("user",), ["2+2?"]
    """
    strings: list[str] = []
    shape: list[Any] = []
    for message in messages:
        if tuple(message) == ("role", "content") and type(message["content"]) is str:
            shape.append(message["role"])
            strings.append(message["content"])
            continue

        items = [
            (key, item if key == "role" else _data_shape(item, strings))
            for key, item in message.items()
        ]
        shape.append(tuple(items))

    if tools is not None:
        shape.append(("tools", *[_data_shape(tool, strings) for tool in tools]))
    if variables:
        shape.append(("variables", _data_shape(variables, strings)))
    return tuple(shape), strings


def _data_shape(value: Any, strings: list[str]) -> Any:
    """Return the shape of plain JSON data; append its strings to `strings`."""
    if type(value) is str:
        strings.append(value)
        return str
    if isinstance(value, Mapping):
        return (dict, *[(key, _data_shape(item, strings)) for key, item in value.items()])
    if type(value) in (list, tuple):
        return (type(value), *[_data_shape(item, strings) for item in value])
    # With the type, because 1 == True == 1.0; by `repr`, because -0.0 == 0.0 and NaN != NaN.
    return (type(value), repr(value) if type(value) is float else value)


class _SymbolicRow:
    """Builds the row that a template is given: the same data, with a symbol for each string.

    Symbols are numbered in the order of `shape_of`.
    """

    def __init__(self, log: GuardLog, reserved: frozenset[str]) -> None:
        self._log = log
        self._reserved = reserved
        self._owners: list[int] = []
        """for each string the message that holds it, by number, or one of the other owners"""

    def message(self, message: Message, number: int) -> dict[str, Any]:
        """Return a message with symbols, and without keys that are null, as in transformers."""
        role = message.get("role")
        if type(role) is not str or not role.isidentifier() or not self._reserved.isdisjoint(role):
            raise Untraceable("a role that is not a plain word")
        self._require_plain(message)

        symbolic = {}
        for key, item in message.items():
            value = item if key == "role" else self.data(item, number)
            if value is not None:
                symbolic[key] = value
        return symbolic

    def data(self, value: Any, owner: int) -> Any:
        """Return plain JSON data with symbols for its strings."""
        if type(value) is str:
            number = len(self._owners)
            self._owners.append(owner)
            return Symbol(self._log, (Derived(itemgetter(number), frozenset([number])),))
        if isinstance(value, Mapping):
            self._require_plain(value)
            return {key: self.data(item, owner) for key, item in value.items()}
        if type(value) in (list, tuple):
            return type(value)([self.data(item, owner) for item in value])
        if value is None or type(value) in (bool, int, float):
            return value
        raise Untraceable(f"{type(value).__name__}, which is not JSON")

    def owners_of(self, part: Part) -> frozenset[int]:
        """Return the messages of whose strings a part is made; none for a literal."""
        sources = part.sources if isinstance(part, Derived) else ()
        return frozenset(self._owners[number] for number in sources) - {_VARIABLES_OWNER}

    def _require_plain(self, keys: Iterable[Any]) -> None:
        for key in keys:
            if type(key) is not str or not self._reserved.isdisjoint(key):
                raise MarkerKey(
                    "a key of the row holds characters of the chat template's markers, such as a "
                    "line break; rename it"
                )


def _unread_keys(
    messages: Sequence[Message], watched: Sequence[WatchedMessage]
) -> tuple[MessageKey, ...]:
    """Return the keys of a row's messages at which its template did not look.

    Args:
        watched: what the template was given for each message.
    """
    unread = []
    for number, (message, seen) in enumerate(zip(messages, watched, strict=True)):
        for key, value in message.items():
            names = REASONING_NAMES if key in REASONING_NAMES else (key,)
            if value is not None and not seen.has_read(*names):
                unread.append(MessageKey(number, key))
    return tuple(unread)
