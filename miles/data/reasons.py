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


REASONS: Mapping[str, Reason] = {
    "malformed_json": Reason(
        "is not JSON, or not UTF-8", "write the row again, as one JSON object in UTF-8"
    ),
    "not_an_object": Reason(
        "is JSON, but no object", "each row must be an object that names its columns"
    ),
    "no_messages": Reason(
        "lacks its conversation or text, or has an empty one",
        "name the columns with --input-key or --column-names",
    ),
    "bad_message": Reason(
        "has a message that is no object, or whose content is not text",
        "content must be text, or a list of parts that are text",
    ),
    "unknown_role": Reason(
        "has a turn whose role is not known",
        """say what the role means with --role-names '{"NAME": "assistant"}'""",
    ),
    "bad_tool_call": Reason(
        "calls a tool with arguments that are no JSON object",
        "write the arguments as a JSON object, or as the text of one",
    ),
    "has_image": Reason(
        "has a turn that speaks of an image, which a text model does not see",
        "leave such rows out, or write in words what the image shows",
    ),
    "fractional_weight": Reason(
        "gives a turn a weight that is neither 0 nor 1", "round the weights to 0 or 1"
    ),
    "partial_turn": Reason(
        "trains only some characters of a turn (`train_detail`)",
        "train whole turns: split the turn, or flag it as a whole",
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
        "made the chat template fail",
        "the detail has the template's own words; --chat-template-path takes another template",
    ),
    "unlocatable_turn": Reason(
        "has an answer whose tokens cannot be told exactly",
        "miles certify says what is proven of the template; --chat-template-path takes another",
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
