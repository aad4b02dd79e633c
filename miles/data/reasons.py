"""The reasons for which a row can be dropped: what each means, and what to do about it.

This is the one list of them. Messages, cards and docs/rows.md take their words from here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Reason:
    """A reason to drop a row, in words for the user."""

    meaning: str
    """what such a row is or has: the rest of "a row that …\""""
    remedy: str
    """a short sentence, without its full stop"""


LEFT_OUT_BY_TRANSFORM = "left_out_by_transform"
"""The reason that is the user's wish. Such rows are counted, and neither listed nor judged."""

REASONS: Mapping[str, Reason] = {
    "malformed_json": Reason(
        "cannot be read: not JSON, not UTF-8, or not of its table's columns",
        "mend or remove the row; the detail says where it breaks",
    ),
    "not_an_object": Reason(
        "is JSON, but no object", "each row must be an object that names its columns"
    ),
    LEFT_OUT_BY_TRANSFORM: Reason(
        "the function of `--transform` left out: it returned None",
        "nothing: such rows are counted, and are no bad rows",
    ),
    "transform_error": Reason(
        "made the function of `--transform` fail, or return what is no row",
        "the detail says the exception and its line; have the function return None for such rows",
    ),
    "no_messages": Reason(
        "lacks its conversation or text, or has an empty one",
        "fill the column, or name another one with --input-key or --column-names",
    ),
    "bad_message": Reason(
        "has a message, or a value in one, of a form that is not understood",
        "the detail says where; content must be text, or a list of parts that are text",
    ),
    "unknown_role": Reason(
        "has a turn whose role is not known",
        """say what the role means with --role-names '{"NAME": "assistant"}'""",
    ),
    "bad_tool_call": Reason(
        "has a tool call that is not understood, such as arguments that are no JSON object",
        "write the arguments as a JSON object, or as the text of one",
    ),
    "has_image": Reason(
        "has an image, sound or video in a turn, which is not trained on",
        "leave such rows out, or say in words what is to be seen and heard",
    ),
    "fractional_weight": Reason(
        "gives a turn a weight that is neither 0 nor 1", "round the weights to 0 or 1"
    ),
    "partial_turn": Reason(
        "trains only a part of a turn (`train_detail`, a call flagged otherwise than its text)",
        "flag the turn as a whole, or split it",
    ),
    "empty_answer": Reason(
        "has an answer that says nothing and would be trained",
        "--empty-answer train keeps them: the model then learns to end at once",
    ),
    "special_text": Reason(
        "spells a special token in its content, under `--special-text reject`",
        "--special-text escape keeps such rows, with the token as ordinary text",
    ),
    "template_error": Reason(
        "made the chat template fail, or has an answer of which it writes nothing",
        "the detail says what it raised; --chat-template-path takes another template",
    ),
    "unlocatable_turn": Reason(
        "has an answer whose tokens cannot be told exactly",
        "see the detail; miles certify says what is proven, --chat-template-path takes another template",
    ),
    "nothing_to_train": Reason(
        "has no answer that is trained",
        "see --loss-mask-turns, --role-names, and the flags that the rows give their turns",
    ),
    "too_long": Reason(
        "has more tokens than `--max-sample-tokens`",
        "raise --max-sample-tokens, or cut the end with --too-long truncate_end",
    ),
}
"""Name of the reason -> its words. The order is the one in which a row meets them."""
