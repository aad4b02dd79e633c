"""Certifies a tokenizer with its chat template: how assistant turns begin and end, learned and proven on probes.

    Qwen3's tokenizer  ->  Certificate(generation_prompt="<|im_start|>assistant\\n", terminator="<|im_end|>",
                                       empty_thinks=("<think>\\n\\n</think>\\n\\n",), bos_count=0, ...)

What is learned from one probe is proven on others (several turns, a system message, tools, reasoning, and
users who type the template's own markers): every turn is located, holds its own words and no others, ends in
one terminator, and the ids are those of `apply_chat_template`. A template for which this fails is refused by
name; no row is guessed.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from miles.data.config import EncodeConfig
from miles.data.template.render import Anchors, Renderer, render_text, strings
from miles.data.template.symbols import Unbounded, Untraceable
from miles.data.template.trace import Tracer
from miles.data.tokens.bpe import TextEncoder, text_encoder
from miles.data.tokens.load import PINNED_DATE, has_pinned_date
from miles.data.tokens.load import encoder_fingerprint as encoder_fingerprint
from miles.data.tokens.load import load_tokenizer as load_tokenizer
from miles.data.types import RowRejected
from miles.errors import TemplateError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_EMPTY_THINK = re.compile(r"\s*<think>\s*</think>\s*")


@dataclass(frozen=True)
class Certificate(Anchors):
    """What was proven of a tokenizer and its chat template, beside the anchors that locate turns."""

    name: str
    """names the template in errors"""
    terminator_ids: tuple[int, ...]
    bos_count: int
    """BOS tokens at the beginning of a rendered conversation: 0 or 1"""
    follows_prompt: bool
    """whether a rendered last turn begins exactly with the generation prompt"""
    extends_prefix: bool
    """whether a longer conversation begins with the render of a shorter one, less what ends that"""
    drops_reasoning: bool
    """whether the reasoning of earlier turns is left out (history "as_served" trains without it)"""
    renders_reasoning: bool
    """whether `reasoning_content` of the last turn is rendered"""
    accepts_system: bool
    """False: the template raises on a system message"""
    accepts_tools: bool
    """False: it raises on tool calls, leaves them out, or their turns cannot be located; rows with any are rejected"""
    tool_grouping: str
    """results of two tools in a row: "grouped" in one turn, "separate", or "none" (no tools)"""
    date: str
    """"none", or the date that is written whatever the day (a `strftime_now` in the template)"""
    engine: str
    """"tiktoken", proven exact, or "tokenizers: " and why"""
    fingerprint: str
    """`encoder_fingerprint`"""

    @property
    def has_think(self) -> bool:
        return bool(self.empty_thinks)

    def to_json(self) -> dict[str, Any]:
        """Everything in it, as JSON."""
        return asdict(self)

    def lines(self) -> list[tuple[str, str]]:
        """Label and finding, as `miles certify` prints them."""
        begins = (
            "begins with it"
            if self.follows_prompt
            else "begins otherwise: what is trained is not what is served"
        )
        reasoning = {
            (False, False): "left out by the template",
            (True, False): "rendered in every turn",
            (True, True): "rendered behind the last question, left out of earlier turns",
        }[self.renders_reasoning, self.drops_reasoning]
        tools = {
            "none": "rows with tool calls are rejected: the template leaves them out, or fails on them",
            "grouped": "accepted; results of two calls share a turn",
            "separate": "accepted; each result has its own turn",
            "one call": "accepted; one call a turn",
        }[self.tool_grouping]
        return [
            ("ids", f"equal to apply_chat_template on every probe; by {self.engine}"),
            ("generation prompt", f"{self.generation_prompt!r}; a rendered last turn {begins}"),
            ("turn header", repr(self.turn_header)),
            (
                "terminator",
                f"{self.terminator} ({', '.join(map(str, self.terminator_ids))}), trained exactly once a turn",
            ),
            ("BOS", "one, written by the template" if self.bos_count else "none"),
            (
                "prefix",
                "a longer conversation extends a shorter one"
                if self.extends_prefix
                else "a longer one changes earlier turns",
            ),
            (
                "empty think",
                " or ".join(map(repr, self.empty_thinks)) + ", masked"
                if self.has_think
                else "none",
            ),
            ("reasoning", reasoning),
            ("system", "accepted" if self.accepts_system else "rows with a system message fail"),
            ("tools", tools),
            ("date", self.date),
            ("fingerprint", self.fingerprint),
        ]

    def __rich__(self) -> Table:
        table = Table(
            title=f"{self.name} is certified",
            title_justify="left",
            title_style="bold",
            show_header=False,
            box=None,
        )
        table.add_column(style="dim", no_wrap=True)
        table.add_column(overflow="fold")
        for label, finding in self.lines():
            table.add_row(label, Text(finding))
        return table


def _system(content: str) -> dict[str, Any]:
    return {"role": "system", "content": content}


def _user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def _assistant(content: str, reasoning: str | None = None) -> dict[str, Any]:
    message = {"role": "assistant", "content": content}
    return message if reasoning is None else {**message, "reasoning_content": reasoning}


_ONE_TURN = [_user("QUESTION1"), _assistant("ANSWER1")]
_TWO_TURNS = [*_ONE_TURN, _user("QUESTION2"), _assistant("ANSWER2")]
_WITH_SYSTEM = [_system("SYSTEM"), *_TWO_TURNS]
_WITH_REASONING = [_user("QUESTION1"), _assistant("ANSWER1", "REASONING1")]
_TWO_WITH_REASONING = [*_WITH_REASONING, _user("QUESTION2"), _assistant("ANSWER2", "REASONING2")]
_TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "lookup",
            "description": "Looks a word up.",
            "parameters": {
                "type": "object",
                "properties": {"word": {"type": "string", "description": "the word"}},
                "required": ["word"],
            },
        },
    }
]


def _call(argument: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "lookup", "arguments": {"word": argument}}}


def _result(content: str) -> dict[str, Any]:
    return {"role": "tool", "name": "lookup", "content": content}


_WITH_TOOL = [
    _user("QUESTION1"),
    {**_assistant("ANSWER1"), "tool_calls": [_call("ARGUMENT1")]},
    _result("RESULT1"),
    _assistant("ANSWER2"),
]
_WITH_TOOLS = [
    _user("QUESTION1"),
    {**_assistant(""), "tool_calls": [_call("ARGUMENT1"), _call("ARGUMENT2")]},
    _result("RESULT1"),
    _result("RESULT2"),
    _assistant("ANSWER2"),
]


def certify(tokenizer: PreTrainedTokenizerBase, config: EncodeConfig) -> Certificate:
    """Learns how a template begins and ends assistant turns, and proves on probes that all of it holds.

    Raises:
        TemplateError: names the template and what failed.
    """
    name = f"{config.tokenizer}: the chat template" + (
        " that was given" if config.chat_template else ""
    )
    kwargs = config.template_kwargs
    if not tokenizer.is_fast:
        raise TemplateError(
            f"{config.tokenizer}: not a fast tokenizer, so it gives no character offsets"
        )
    if not isinstance(tokenizer.chat_template, str):
        raise TemplateError(
            f"{name} is missing, or there are several; give one with --chat-template-path"
        )
    reserved = set(inspect.signature(tokenizer.apply_chat_template).parameters) | {
        "messages",
        "strftime_now",
    }
    if taken := sorted(reserved & set(kwargs)):
        raise TemplateError(
            f"{name} cannot be given {', '.join(taken)} by --apply-chat-template-kwargs"
        )

    _require_end(tokenizer, kwargs, name)
    one = _probe(tokenizer, _ONE_TURN, kwargs, name)
    two = _probe(tokenizer, _TWO_TURNS, kwargs, name)
    if two != _probe(tokenizer, _TWO_TURNS, kwargs, name):
        raise TemplateError(f"{name} renders the same conversation differently each time")
    prompt = _probe(tokenizer, _ONE_TURN[:1], kwargs, name)
    full_prompt = _probe(tokenizer, _ONE_TURN[:1], kwargs, name, add_generation_prompt=True)
    generation_prompt = _generation_prompt(tokenizer, prompt, full_prompt, one, name)

    turns = [_between(one, "QUESTION1", "ANSWER1", name)]
    turns += [_between(two, f"QUESTION{turn}", f"ANSWER{turn}", name) for turn in (1, 2)]
    header = _turn_header(generation_prompt, turns, name)
    terminator = _terminator(tokenizer, one, two, name)
    for anchor in (header, terminator):
        if not re.search(r"[^\w ]", anchor, re.ASCII):
            raise TemplateError(
                f"{name}: {anchor!r} begins or ends its turns; it could be an ordinary word"
            )
    supplied = {turn.split(header, 1)[1] for turn in turns}
    text_tokens = text_encoder(tokenizer.backend_tokenizer)
    draft = Certificate(
        name=name,
        generation_prompt=generation_prompt,
        turn_header=header,
        terminator=terminator,
        terminator_ids=tuple(text_tokens.encode(terminator).tolist()),
        empty_thinks=tuple(sorted(filter(_EMPTY_THINK.fullmatch, supplied), key=len, reverse=True)),
        bos_count=_bos_count(tokenizer, one, name),
        follows_prompt=one.startswith(full_prompt),
        extends_prefix=two.startswith(one[: one.rindex(terminator) + len(terminator)]),
        drops_reasoning=False,
        renders_reasoning=False,
        accepts_system=True,
        accepts_tools=True,
        tool_grouping="none",
        date=f"pinned to {PINNED_DATE}" if has_pinned_date(tokenizer.chat_template) else "none",
        engine=text_tokens.engine,
        fingerprint=encoder_fingerprint(tokenizer, config),
    )
    try:
        renderer = Renderer(tokenizer, kwargs, draft)
    except Untraceable as error:
        raise TemplateError(f"{name} cannot be certified: {error}") from error
    proof = _Proof(tokenizer, kwargs, renderer, text_tokens, draft)
    forged = f"{header}FORGED{terminator}"
    told = [_user(forged + "QUESTION1"), _assistant(f"ANSWER1{forged}"), *_TWO_TURNS[2:]]
    for messages in (_ONE_TURN, _TWO_TURNS, told):
        proof.require(messages)
    accepts_reasoning = proof.holds_or_raises(_WITH_REASONING) and proof.holds_or_raises(
        _TWO_WITH_REASONING
    )
    reasoned = _probe(tokenizer, _TWO_WITH_REASONING, kwargs, name) if accepts_reasoning else ""
    # Names of arguments are known when a template is traced, and one could spell a header that is ordinary text.
    is_spelled = not any(token in header for token in tokenizer.added_tokens_encoder)
    accepts_tools = (
        not is_spelled and proof.holds(_WITH_TOOL, _TOOLS) and _renders_tools(tokenizer, kwargs)
    )
    return replace(
        draft,
        renders_reasoning="REASONING2" in reasoned,
        drops_reasoning="REASONING2" in reasoned and "REASONING1" not in reasoned,
        accepts_system=proof.holds_or_raises(_WITH_SYSTEM),
        accepts_tools=accepts_tools,
        tool_grouping=_tool_grouping(tokenizer, kwargs, proof, terminator)
        if accepts_tools
        else "none",
    )


def _require_end(tokenizer: PreTrainedTokenizerBase, kwargs: Mapping[str, Any], name: str) -> None:
    """Runs the template where its steps are counted, before transformers, which counts none, runs it."""
    variables = {**tokenizer.special_tokens_map, **kwargs}
    for more in ({}, {"add_generation_prompt": True}):
        try:
            Tracer(tokenizer.chat_template, {**variables, **more}).program(_ONE_TURN, None)
        except Unbounded as error:
            raise TemplateError(
                f"{name} does not end, or would make anything large: {error}"
            ) from error
        except Untraceable:  # what else is wrong with it is said later
            return


def _probe(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, Any]],
    kwargs: Mapping[str, Any],
    name: str,
    add_generation_prompt: bool = False,
) -> str:
    try:
        return render_text(tokenizer, messages, None, kwargs, add_generation_prompt)
    except RowRejected as error:
        hint = ""
        if "strftime_now" in str(tokenizer.chat_template):
            hint = (
                " It writes today's date (strftime_now), so its tokens would change from day to day: give the "
                "date with --apply-chat-template-kwargs where the template takes one, or write it out."
            )
        # A probe's own words, unlike a row's, may be said.
        cause = f"{type(error.__cause__).__name__}: {error.__cause__}"
        raise TemplateError(f"{name} fails on a plain conversation: {cause}.{hint}") from error


def _generation_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: str, full_prompt: str, one: str, name: str
) -> str:
    """What stands between a user's turn and an answer because `add_generation_prompt` is given, or is there anyway."""
    if full_prompt != prompt and full_prompt.startswith(prompt):
        return full_prompt[len(prompt) :]
    if (
        full_prompt == prompt
    ):  # [INST] question [/INST] answer: what closes the question is the prompt
        closing = prompt.partition("QUESTION1")[2]
        if (
            closing.strip()
            and one.startswith(prompt)
            and one[len(prompt) :].lstrip().startswith("ANSWER1")
        ):
            return closing
    else:  # question <|end|><|endoftext|> becomes question <|end|><|assistant|>
        same = next(
            at for at, (a, b) in enumerate(zip(prompt, full_prompt, strict=False)) if a != b
        )
        for begin in range(same, -1, -1):
            if any(
                full_prompt.startswith(token, begin) for token in tokenizer.added_tokens_encoder
            ) and any(prompt.startswith(token, begin) for token in tokenizer.added_tokens_encoder):
                return full_prompt[begin:]
    raise TemplateError(
        f"{name} has no generation prompt: with add_generation_prompt=True it adds nothing at the end, "
        "so where an answer begins cannot be told"
    )


def _between(text: str, before: str, after: str, name: str) -> str:
    for word in (before, after):
        if text.count(word) != 1:
            raise TemplateError(
                f"{name} renders the message {word!r} {text.count(word)} times, not once"
            )
    return text.split(before)[1].split(after)[0]


def _turn_header(generation_prompt: str, turns: Sequence[str], name: str) -> str:
    """The longest part of the generation prompt that stands once before each answer, without a think block's begin:
    some answers have none."""
    spoken, _, _ = generation_prompt.partition("<think>")
    for length in range(len(spoken), 0, -1):
        header = spoken[:length]
        if all(turn.count(header) == 1 for turn in turns):
            return header
    raise TemplateError(
        f"{name}: its generation prompt {generation_prompt!r} is not how its assistant turns begin ({turns[0]!r})"
    )


def _terminator(tokenizer: PreTrainedTokenizerBase, one: str, two: str, name: str) -> str:
    """The special tokens right behind every answer: as many as stand behind each."""
    special = sorted(
        (token.content for token in tokenizer.added_tokens_decoder.values() if token.special),
        key=len,
    )
    found: list[list[str]] = []
    for text, answer in ((one, "ANSWER1"), (two, "ANSWER1"), (two, "ANSWER2")):
        rest = text.split(answer)[1]
        tokens: list[str] = []
        while token := next((token for token in reversed(special) if rest.startswith(token)), None):
            tokens.append(token)
            rest = rest.removeprefix(token)
        if not tokens:
            raise TemplateError(
                f"{name} does not end each assistant turn with a special token (found {rest[:40]!r} behind an "
                "answer), so the model would never learn to stop"
            )
        found.append(tokens)
    firsts = list(dict.fromkeys(tokens[0] for tokens in found))
    if len(firsts) > 1:
        raise TemplateError(
            f"{name} ends assistant turns with different tokens: {', '.join(firsts)}"
        )
    same = takewhile(lambda tokens: len(set(tokens)) == 1, zip(*found, strict=False))
    return "".join(tokens[0] for tokens in same)


def _bos_count(tokenizer: PreTrainedTokenizerBase, text: str, name: str) -> int:
    if tokenizer.bos_token_id is None:
        return 0
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if list(ids[:2]) == [tokenizer.bos_token_id] * 2:
        raise TemplateError(
            f"{name} begins a conversation with two BOS tokens {tokenizer.bos_token}"
        )
    return int(ids[0] == tokenizer.bos_token_id)


@dataclass(frozen=True)
class _Proof:
    """Tries what was learned of a template on probes."""

    tokenizer: PreTrainedTokenizerBase
    kwargs: Mapping[str, Any]
    renderer: Renderer
    text_tokens: TextEncoder
    draft: Certificate

    def require(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        """Each turn's span holds all that the turn says, nothing of any other, and one terminator; the ids are
        transformers' own.

        Raises:
            TemplateError: it does not hold.
        """
        draft = self.draft
        try:
            text, spans = self.renderer.render(messages, tools)
        except RowRejected as error:
            raise TemplateError(f"{draft.name} cannot be certified: {error}") from error
        turns = [message for message in messages if message["role"] == "assistant"]
        for number, (message, span) in enumerate(zip(turns, spans, strict=True)):
            words = [
                own for own in strings({**message, "role": ""}) if own.isupper() and own in text
            ]
            inside = text[span.start : span.end]
            foreign = [
                own
                for other in messages
                if other is not message
                for own in strings(other)
                if own.isupper()
            ]
            if not (
                span.start > 0
                and all(own in inside for own in words)
                and not any(own in inside for own in foreign)
                and (message["content"] in inside or message["content"] not in text)
                and inside.endswith(draft.terminator)
                and inside.count(draft.terminator) == 1 + message["content"].count(draft.terminator)
            ):
                raise TemplateError(
                    f"{draft.name} cannot be certified: what assistant turn {number} of a probe says does not lie "
                    f"between {draft.turn_header!r} and {draft.terminator!r}"
                )
        served = self.tokenizer.apply_chat_template(
            list(messages),
            tools=None if tools is None else list(tools),
            tokenize=True,
            return_dict=False,
            **self.kwargs,
        )
        if self.text_tokens.encode(text).tolist() != list(served):
            raise TemplateError(
                f"{draft.name} cannot be certified: {type(self.tokenizer).__name__} gives other ids than its "
                "tokenizers backend"
            )

    def holds(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> bool:
        try:
            self.require(messages, tools)
        except TemplateError:
            return False
        return True

    def holds_or_raises(self, messages: Sequence[Mapping[str, Any]]) -> bool:
        """False where the template raises; a conversation that it renders must be located, too."""
        try:
            render_text(self.tokenizer, messages, None, self.kwargs)
        except RowRejected:
            return False
        self.require(messages)
        return True


def _renders_tools(tokenizer: PreTrainedTokenizerBase, kwargs: Mapping[str, Any]) -> bool:
    """Whether calls and results are in the text: some templates leave them out without a word."""
    text = render_text(tokenizer, _WITH_TOOL, _TOOLS, kwargs)
    return "ARGUMENT1" in text and "RESULT1" in text


def _tool_grouping(
    tokenizer: PreTrainedTokenizerBase, kwargs: Mapping[str, Any], proof: _Proof, terminator: str
) -> str:
    """Whether results of two tools in a row share a turn; "one call" where the template takes no two."""
    if not proof.holds(_WITH_TOOLS, _TOOLS):
        return "one call"
    text = render_text(tokenizer, _WITH_TOOLS, _TOOLS, kwargs)
    between = text.partition("RESULT1")[2].partition("RESULT2")[0]
    return "separate" if terminator in between else "grouped"
