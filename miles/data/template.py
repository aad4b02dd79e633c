"""Certifies a tokenizer with its chat template: how assistant turns begin and end, learned and proven on probes.

    Qwen3's tokenizer  ->  Certificate(generation_prompt="<|im_start|>assistant\\n", terminator="<|im_end|>",
                                       empty_think="<think>\\n\\n</think>\\n\\n", adds_bos=False, ...)

What is learned from one probe is proven on others (several turns, a system message, tools, reasoning, and
users who type the template's own markers): every turn is located, holds its own words and no others, and the
ids are those of `apply_chat_template`. A template for which this fails is refused by name; no row is guessed.
"""

from __future__ import annotations

import inspect
import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from miles.data.config import EncodeConfig
from miles.data.spans import Anchors, render, render_text, strings
from miles.data.tokenizer import encoder_fingerprint as encoder_fingerprint
from miles.data.tokenizer import load_tokenizer as load_tokenizer
from miles.data.types import RowRejected
from miles.errors import TemplateError

_COMMON_PIVOTS = "|｜▁_"
_TEMPLATE_SYNTAX = "<>[]/"  # templates look for <think> and the like in content: the last choice for a mark
_NUM_PIVOT_TRIALS = 3
_EMPTY_THINK = re.compile(r"\s*<think>\s*</think>\s*")


@dataclass(frozen=True)
class Certificate(Anchors):
    """What was proven of a tokenizer and its chat template, beside the anchors that locate turns."""

    name: str
    """names the template in errors"""
    terminator_id: int
    adds_bos: bool
    """whether a rendered conversation begins with the BOS token (never more than one)"""
    follows_prompt: bool
    """whether a rendered last turn begins exactly with the generation prompt"""
    accepts_system: bool
    """False: the template raises on a system message"""
    accepts_tools: bool
    """False: it raises on tool calls, or their turns cannot be located; rows that hold any are rejected"""
    fingerprint: str
    """`encoder_fingerprint`"""

    @property
    def has_think(self) -> bool:
        return bool(self.empty_think)


def _system(content: str) -> dict[str, Any]:
    return {"role": "system", "content": content}


def _user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def _assistant(content: str) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


_ONE_TURN = [_user("QUESTION1"), _assistant("ANSWER1")]
_TWO_TURNS = [*_ONE_TURN, _user("QUESTION2"), _assistant("ANSWER2")]
_WITH_SYSTEM = [_system("SYSTEM"), *_TWO_TURNS]
_WITH_REASONING = [_user("QUESTION1"), {**_assistant("ANSWER1"), "reasoning_content": "REASONING1"}]
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
_CALL = {"type": "function", "function": {"name": "lookup", "arguments": {"word": "ARGUMENT1"}}}
_WITH_TOOLS = [
    _user("QUESTION1"),
    {**_assistant("ANSWER1"), "tool_calls": [_CALL]},
    {"role": "tool", "name": "lookup", "content": "RESULT1"},
    _assistant("ANSWER2"),
]


def certify(tokenizer: PreTrainedTokenizerBase, config: EncodeConfig) -> Certificate:
    """Learns how a template begins and ends assistant turns, and proves on probes that all of it holds.

    Raises:
        TemplateError: names the template and what failed.
    """
    name = f"{config.tokenizer}: the chat template" + (" that was given" if config.chat_template else "")
    kwargs = config.template_kwargs
    if not tokenizer.is_fast:
        raise TemplateError(f"{config.tokenizer}: not a fast tokenizer, so it gives no character offsets")
    if not isinstance(tokenizer.chat_template, str):
        raise TemplateError(f"{name} is missing, or there are several; give one with --chat-template-path")
    reserved = set(inspect.signature(tokenizer.apply_chat_template).parameters) | {"messages", "strftime_now"}
    if taken := sorted(reserved & set(kwargs)):
        raise TemplateError(f"{name} cannot be given {', '.join(taken)} by --apply-chat-template-kwargs")

    one = _probe(tokenizer, _ONE_TURN, None, kwargs, name)
    two = _probe(tokenizer, _TWO_TURNS, None, kwargs, name)
    if two != _probe(tokenizer, _TWO_TURNS, None, kwargs, name):
        raise TemplateError(f"{name} renders the same conversation differently each time")
    prompt = _probe(tokenizer, _ONE_TURN[:1], None, kwargs, name)
    full_prompt = _probe(tokenizer, _ONE_TURN[:1], None, kwargs, name, add_generation_prompt=True)
    generation_prompt = full_prompt.removeprefix(prompt)
    if not full_prompt.startswith(prompt) or not generation_prompt:
        raise TemplateError(
            f"{name} has no generation prompt: with add_generation_prompt=True it adds nothing at the end, "
            "so where an answer begins cannot be told"
        )

    turns = [_between(one, "QUESTION1", "ANSWER1", name)]
    turns += [_between(two, f"QUESTION{turn}", f"ANSWER{turn}", name) for turn in (1, 2)]
    header = _turn_header(tokenizer, generation_prompt, turns, name)
    supplied = turns[0].split(header, 1)[1]
    terminator = _terminator(tokenizer, one, two, name)
    draft = Certificate(
        name=name,
        generation_prompt=generation_prompt,
        turn_header=header,
        terminator=terminator,
        terminator_id=int(tokenizer.convert_tokens_to_ids(terminator)),
        adds_bos=_adds_bos(tokenizer, one, name),
        empty_think=supplied if _EMPTY_THINK.fullmatch(supplied) else "",
        follows_prompt=one.startswith(full_prompt),
        accepts_system=True,
        accepts_tools=True,
        pivots=_pivots(header, terminator, name),
        fingerprint=encoder_fingerprint(tokenizer, config),
    )
    forged = f"{header}FORGED{terminator}"
    told = [_user(forged + "QUESTION1"), _assistant(f"ANSWER1{forged}"), *_TWO_TURNS[2:]]
    for messages in (_ONE_TURN, _TWO_TURNS, told):
        _prove(tokenizer, messages, None, kwargs, draft)
    _is_accepted(tokenizer, _WITH_REASONING, kwargs, draft)
    return replace(
        draft,
        accepts_system=_is_accepted(tokenizer, _WITH_SYSTEM, kwargs, draft),
        accepts_tools=_locates_tools(tokenizer, kwargs, draft),
    )


def _probe(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
    kwargs: Mapping[str, Any],
    name: str,
    add_generation_prompt: bool = False,
) -> str:
    try:
        return render_text(tokenizer, messages, tools, kwargs, add_generation_prompt)
    except RowRejected as error:
        hint = ""
        if "strftime_now" in str(tokenizer.chat_template):
            hint = (
                " It writes today's date (strftime_now), so its tokens would change from day to day: give the "
                "date with --apply-chat-template-kwargs where the template takes one, or write it out."
            )
        raise TemplateError(f"{name} fails on a plain conversation: {error.detail}.{hint}") from error


def _between(text: str, before: str, after: str, name: str) -> str:
    for word in (before, after):
        if text.count(word) != 1:
            raise TemplateError(f"{name} renders the message {word!r} {text.count(word)} times, not once")
    return text.split(before)[1].split(after)[0]


def _turn_header(tokenizer: PreTrainedTokenizerBase, generation_prompt: str, turns: Sequence[str], name: str) -> str:
    """The longest part of the generation prompt that stands once before each answer."""
    for length in range(len(generation_prompt), 0, -1):
        header = generation_prompt[:length]
        if all(turn.count(header) == 1 for turn in turns):
            break
    else:
        raise TemplateError(
            f"{name}: its generation prompt {generation_prompt!r} is not how its assistant turns begin ({turns[0]!r})"
        )
    if not any(header.startswith(token) for token in tokenizer.added_tokens_encoder):
        raise TemplateError(
            f"{name} begins assistant turns with {header!r}, which is no token of its own: it cannot be told "
            "from what a user writes"
        )
    return header


def _terminator(tokenizer: PreTrainedTokenizerBase, one: str, two: str, name: str) -> str:
    """The special token right behind every answer."""
    special = sorted((token.content for token in tokenizer.added_tokens_decoder.values() if token.special), key=len)
    found = []
    for text, answer in ((one, "ANSWER1"), (two, "ANSWER1"), (two, "ANSWER2")):
        rest = text.split(answer)[1]
        token = next((token for token in reversed(special) if rest.startswith(token)), None)
        if token is None:
            raise TemplateError(
                f"{name} does not end each assistant turn with a special token (found {rest[:40]!r} behind an "
                "answer), so the model would never learn to stop"
            )
        found.append(token)
    if len(set(found)) > 1:
        raise TemplateError(f"{name} ends assistant turns with different tokens: {', '.join(dict.fromkeys(found))}")
    return found[0]


def _adds_bos(tokenizer: PreTrainedTokenizerBase, text: str, name: str) -> bool:
    if tokenizer.bos_token_id is None:
        return False
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if list(ids[:2]) == [tokenizer.bos_token_id] * 2:
        raise TemplateError(f"{name} begins a conversation with two BOS tokens {tokenizer.bos_token}")
    return bool(ids[0] == tokenizer.bos_token_id)


def _pivots(header: str, terminator: str, name: str) -> tuple[str, ...]:
    """Sets of characters so that no anchor can be spelled without one of the set, before its last character."""
    choices = []
    for anchor in (header, terminator):
        punctuation = {
            character for character in anchor[:-1] if character in string.punctuation or not character.isascii()
        }
        if not punctuation:
            raise TemplateError(f"{name}: {anchor!r} begins or ends its turns; it could be an ordinary word")
        rank = _COMMON_PIVOTS + "".join(sorted(punctuation - set(_COMMON_PIVOTS + _TEMPLATE_SYNTAX)))
        choices.append(sorted(punctuation, key=(rank + _TEMPLATE_SYNTAX).index))
    trials = [
        "".join(dict.fromkeys(choice[min(trial, len(choice) - 1)] for choice in choices))
        for trial in range(_NUM_PIVOT_TRIALS)
    ]
    return tuple(dict.fromkeys(trials))


def _prove(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
    kwargs: Mapping[str, Any],
    draft: Certificate,
) -> None:
    """Each turn's span holds all that the turn says and nothing of any other; the ids are transformers' own."""
    try:
        text, spans = render(tokenizer, messages, tools, kwargs, draft)
    except RowRejected as error:
        raise TemplateError(f"{draft.name} cannot be certified: {error}") from error
    turns = [message for message in messages if message["role"] == "assistant"]
    for number, (message, span) in enumerate(zip(turns, spans, strict=True)):
        words = [own for own in strings({**message, "role": ""}) if own.isupper() and own in text]
        inside = text[span.start : span.end]
        foreign = [own for other in messages if other is not message for own in strings(other) if own.isupper()]
        if not (
            span.start > 0
            and all(own in inside for own in words)
            and not any(own in inside for own in foreign)
            and (message["content"] in inside or message["content"] not in text)
        ):
            raise TemplateError(
                f"{draft.name} cannot be certified: what assistant turn {number} of a probe says does not lie "
                f"between {draft.turn_header!r} and {draft.terminator!r}"
            )
    served = tokenizer.apply_chat_template(
        list(messages), tools=None if tools is None else list(tools), tokenize=True, return_dict=False, **kwargs
    )
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()  # a tokenizer.json can carry both; transformers clears them at each call as well
    backend.no_padding()
    if backend.encode(text, add_special_tokens=False).ids != list(served):
        raise TemplateError(
            f"{draft.name} cannot be certified: {type(tokenizer).__name__} gives other ids than its tokenizers backend"
        )


def _is_accepted(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, Any]],
    kwargs: Mapping[str, Any],
    draft: Certificate,
) -> bool:
    """False where the template raises; a conversation that it renders must be located, too."""
    try:
        render_text(tokenizer, messages, None, kwargs)
    except RowRejected:
        return False
    _prove(tokenizer, messages, None, kwargs, draft)
    return True


def _locates_tools(tokenizer: PreTrainedTokenizerBase, kwargs: Mapping[str, Any], draft: Certificate) -> bool:
    try:
        _prove(tokenizer, _WITH_TOOLS, _TOOLS, kwargs, draft)
    except TemplateError:
        return False
    return True
