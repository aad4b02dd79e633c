"""Decides which tokens of a sample are trained: the loss mask.

    <|im_start|>assistant\\n  <think>\\n\\n</think>\\n\\n  4  <|im_end|>  \\n
    0                        0 (empty_think="mask")    1  1           0

A token is trained if the model has to produce it in serving: everything of a trained assistant turn
after the generation prompt, up to and including the terminator. Not trained are the newline after
the terminator, whatever the generation prompt supplies, and an empty think block (unless
`empty_think="train"`).

A token that begins before the trained text and ends inside it (the header's newline, merged with a
newline at the answer's start) never occurs in serving. It is not trained, but counted: straddling.

Three steps, all pure functions:

    select_turns      which assistant turns are trained
    mark_points       the characters at which each turn's trained text, and its terminator, begin
    decide_loss_mask  the mask, from the tokens that lie at those characters
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from miles.data.template.render import Span
from miles.data.tokens.text_encoder import Tokens
from miles.data.types import Conversation, RowRejected, UInt8


def select_turns(conversation: Conversation, turns: str) -> list[bool]:
    """Return for each assistant message whether it is trained.

    Args:
        turns: `EncodeConfig.turns`: "all", "last", or "flags" for those with a true flag. A false
            flag excludes its turn under each of them.
    """
    is_trained_without_flag = turns != "flags"
    if turns == "all" and conversation.flags.count(None) == len(conversation.flags):  # most rows
        return [True] * [message.get("role") for message in conversation.messages].count(
            "assistant"
        )
    selected = [
        is_trained_without_flag if flag is None else flag
        for message, flag in zip(conversation.messages, conversation.flags, strict=True)
        if message.get("role") == "assistant"
    ]
    if turns == "last":
        selected[:-1] = [False] * (len(selected) - 1)
    return selected


def mark_points(spans: Sequence[Span], terminator: str, empty_think: str) -> list[int]:
    """Return two characters for each turn: where its trained text and its terminator begin.

    Args:
        spans: the assistant turns, in order.
        empty_think: `EncodeConfig.empty_think`: "mask" begins after an empty think block, "train"
            begins with it.
    """
    trains_empty_think = empty_think == "train"
    points = []
    for span in spans:
        points.append(span.start if trains_empty_think else span.answer)
        points.append(span.end - len(terminator))
    return points


def decide_loss_mask(
    tokens: Tokens, selected: Sequence[bool], terminator_ids: Sequence[int]
) -> tuple[UInt8, int]:
    """Return the loss mask of a sample, and its number of straddling tokens.

    Args:
        tokens: the ids, and the token at each point of `mark_points`.
        selected: whether each assistant turn is trained.

    Returns:
        uint8 [tokens], 1 where a token is trained; and the count.

    Raises:
        RowRejected: "unlocatable_turn": the terminator of a turn is not encoded as its own tokens.
    """
    ids, first, straddled = tokens
    terminator = list(terminator_ids)
    loss_mask = np.zeros(len(ids), dtype=np.uint8)
    num_straddling = 0

    for turn, is_trained in enumerate(selected):
        begin = first[2 * turn]
        last = first[2 * turn + 1]
        end = last + len(terminator)
        if straddled[2 * turn + 1] or ids[last:end].tolist() != terminator:
            raise RowRejected(
                "unlocatable_turn", f"assistant turn {turn} does not end in tokens of its own"
            )
        if is_trained:
            assert 0 < begin <= last, (begin, last)
            loss_mask[begin:end] = 1
            num_straddling += straddled[2 * turn]

    return loss_mask, num_straddling
