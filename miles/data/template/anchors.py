"""Learns the anchors of a chat template: how its assistant turns begin and end.

    <|im_start|>assistant\\n<think>\\n\\n</think>\\n\\nANSWER1<|im_end|>\\n   a rendered probe
    <|im_start|>assistant\\n                                               turn header
                            <think>\\n\\n</think>\\n\\n                       empty think block
                                                       <|im_end|>        terminator

The generation prompt is what `add_generation_prompt=True` adds; the header is the part of it that
every turn begins with. Everything is read off texts; `certify.py` proves it on further probes.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import takewhile

from miles.errors import TemplateError

_EMPTY_THINK = re.compile(r"\s*<think>\s*</think>\s*")
_MAX_QUOTED_CHARACTERS = 40


@dataclass(frozen=True)
class Anchors:
    """The texts that begin and end an assistant turn of one chat template."""

    generation_prompt: str
    """what serving appends to the conversation before the model answers"""
    turn_header: str
    """the part of the generation prompt that every assistant turn begins with, earlier ones too"""
    terminator: str
    """the special token that ends every assistant turn; or several in a row"""
    empty_thinks: tuple[str, ...]
    """the empty think blocks that the template puts between header and answer, the longest first"""


@dataclass(frozen=True)
class RenderedProbes:
    """The rendered probes from which anchors are learned."""

    question: str
    prompted: str
    """the question, rendered with `add_generation_prompt=True`"""
    one_turn: str
    two_turns: str


def learn_anchors(
    texts: RenderedProbes,
    added_tokens: Collection[str],
    special_tokens: Collection[str],
    name: str,
) -> Anchors:
    """Read the anchors off the rendered probes.

    Args:
        added_tokens: the tokenizer's added tokens, special or not.
        special_tokens: the special ones of them.
        name: names the template in errors.

    Raises:
        TemplateError: the turns do not all begin, or do not all end, in the same way.
    """
    prompt = _generation_prompt(texts, added_tokens, name)
    beginnings = [
        _between(texts.one_turn, "QUESTION1", "ANSWER1", name),
        _between(texts.two_turns, "QUESTION1", "ANSWER1", name),
        _between(texts.two_turns, "QUESTION2", "ANSWER2", name),
    ]
    header = _turn_header(prompt, beginnings, name)
    terminator = _terminator(texts, special_tokens, name)
    for anchor in (header, terminator):
        if not re.search(r"[^\w ]", anchor, re.ASCII):
            raise TemplateError(
                f"{name}: {anchor!r} begins or ends its turns; it could be an ordinary word"
            )

    after_header = {beginning.split(header, 1)[1] for beginning in beginnings}
    empty_thinks = filter(_EMPTY_THINK.fullmatch, after_header)
    return Anchors(
        generation_prompt=prompt,
        turn_header=header,
        terminator=terminator,
        empty_thinks=tuple(sorted(empty_thinks, key=len, reverse=True)),
    )


def _generation_prompt(texts: RenderedProbes, added_tokens: Collection[str], name: str) -> str:
    """Return the text that serving puts between a question and the answer.

    Three kinds of templates are known:

        adds to the end         <user> QUESTION            ->  <user> QUESTION <assistant>
        adds nothing            [INST] QUESTION [/INST]    (what closes the question is the prompt)
        replaces the end        <user> QUESTION <end><eos> ->  <user> QUESTION <end><assistant>
    """
    question = texts.question
    prompted = texts.prompted
    prompt = None
    if prompted == question:
        prompt = _closing_of_question(texts)
    elif prompted.startswith(question):
        prompt = prompted[len(question) :]
    else:
        prompt = _replaced_end(question, prompted, added_tokens)

    if prompt is None:
        raise TemplateError(
            f"{name} has no generation prompt: with add_generation_prompt=True it adds nothing at "
            "the end, so there is no telling where an answer begins"
        )
    return prompt


def _closing_of_question(texts: RenderedProbes) -> str | None:
    """Return the text that closes the question, if the answer comes right after it."""
    closing = texts.question.partition("QUESTION1")[2]
    after = texts.one_turn.removeprefix(texts.question).lstrip()
    is_followed = texts.one_turn.startswith(texts.question) and after.startswith("ANSWER1")
    return closing if closing.strip() and is_followed else None


def _replaced_end(question: str, prompted: str, added_tokens: Collection[str]) -> str | None:
    """Return the end of `prompted` that replaces the end of `question`.

    It begins at the last place where each of the two texts has an added token, before they differ.
    """
    pairs = enumerate(zip(question, prompted, strict=False))
    num_same = next((at for at, (own, changed) in pairs if own != changed), None)
    if num_same is None:  # the end is left out, and nothing put in its place
        return None

    def begins_token(text: str, at: int) -> bool:
        return any(text.startswith(token, at) for token in added_tokens)

    for begin in range(num_same, -1, -1):
        if begins_token(prompted, begin) and begins_token(question, begin):
            return prompted[begin:]
    return None


def _between(text: str, before: str, after: str, name: str) -> str:
    """Return the text between two words of a probe, each of which must be there once."""
    for word in (before, after):
        if text.count(word) != 1:
            raise TemplateError(
                f"{name} renders the message {word!r} {text.count(word)} times, not once"
            )
    return text.split(before)[1].split(after)[0]


def _turn_header(generation_prompt: str, beginnings: Sequence[str], name: str) -> str:
    """Return the longest start of the generation prompt that is once before each answer.

    The beginning of a think block is no part of it: some answers have none.
    """
    without_think, _, _ = generation_prompt.partition("<think>")
    for length in range(len(without_think), 0, -1):
        header = without_think[:length]
        if all(beginning.count(header) == 1 for beginning in beginnings):
            return header
    raise TemplateError(
        f"{name}: its generation prompt {generation_prompt!r} is not how its assistant turns begin "
        f"({beginnings[0]!r})"
    )


def _terminator(texts: RenderedProbes, special_tokens: Collection[str], name: str) -> str:
    """Return the special tokens that come right after every answer."""
    ends = [
        _special_tokens_after(texts.one_turn, "ANSWER1", special_tokens, name),
        _special_tokens_after(texts.two_turns, "ANSWER1", special_tokens, name),
        _special_tokens_after(texts.two_turns, "ANSWER2", special_tokens, name),
    ]
    firsts = list(dict.fromkeys(tokens[0] for tokens in ends))
    if len(firsts) > 1:
        raise TemplateError(
            f"{name} ends assistant turns with different tokens: {', '.join(firsts)}"
        )

    same = takewhile(lambda tokens: len(set(tokens)) == 1, zip(*ends, strict=False))
    return "".join(tokens[0] for tokens in same)


def _special_tokens_after(
    text: str, answer: str, special_tokens: Collection[str], name: str
) -> list[str]:
    """Return the unbroken run of special tokens that follows an answer; it has at least one."""
    longest_first = sorted(special_tokens, key=len, reverse=True)
    rest = text.split(answer)[1]
    tokens: list[str] = []
    while token := next((token for token in longest_first if rest.startswith(token)), None):
        tokens.append(token)
        rest = rest.removeprefix(token)

    if not tokens:
        raise TemplateError(
            f"{name} does not end each assistant turn with a special token (found "
            f"{rest[:_MAX_QUOTED_CHARACTERS]!r} after an answer), so the model would never learn "
            "to stop"
        )
    return tokens
