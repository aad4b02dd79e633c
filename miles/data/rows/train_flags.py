"""The word of a turn on its own training: trained, not trained, or nothing.

{"weight": 1, "train": true}     ->  True
{"weight": "0", "train": true}   ->  False: of several, one that is 0 or false decides
{"weight": null}                 ->  None
{"weight": 0.5}                  ->  the row is dropped as fractional_weight
{"train_detail": [{…, "train": false}]}  ->  dropped as partial_turn
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from miles.data.rows.json_text import read_json
from miles.data.rows.reject import reject, type_of

TRAIN_FLAGS = ("weight", "train", "training", "loss", "step_loss_mask")
"""Keys of a turn that say whether it is trained."""
TRAIN_DETAIL = "train_detail"
"""Key of a turn with stretches of its text, each flagged as trained or not."""

_FLAG_TEXTS = {"false": 0, "true": 1}


def train_flag(turn: Mapping[str, Any], where: str) -> bool | None:
    """Return whether an assistant's turn says that it is trained; None if it says nothing.

    Args:
        where: the turn's place in the row, for the detail of a reject.
    """
    weights = {}
    for key in TRAIN_FLAGS:
        value = turn.get(key)
        if value is not None:
            weights[key] = _weight(value, f"{where}: {key}")
    if 0 in weights.values():
        return False

    for key, weight in weights.items():
        if weight != 1:
            reject("fractional_weight", f"{where}: {key} is neither 0 nor 1")
    if turn.get(TRAIN_DETAIL) is not None and not _is_trained_whole(turn[TRAIN_DETAIL]):
        reject("partial_turn", f"{where}: {TRAIN_DETAIL} leaves out characters of the turn")
    return True if weights else None


def _weight(value: Any, what: str) -> float:
    """Return a flag as a number: of a number, true or false, or the text of one of them."""
    if isinstance(value, (int, float)):
        return value
    if type(value) is not str:
        reject("bad_message", f"{what} is {type_of(value)}, not a number")

    text = value.strip().casefold()
    if text in _FLAG_TEXTS:
        return _FLAG_TEXTS[text]
    try:
        return float(text)
    except ValueError:
        reject("bad_message", f"{what} is text that is neither a number nor true or false")


def _is_trained_whole(detail: Any) -> bool:
    """Return whether every stretch that a `train_detail` lists is trained."""
    if type(detail) is str:
        try:
            detail = read_json(detail)
        except ValueError:
            return False
    if detail is None:
        return True
    return type(detail) is list and all(
        type(stretch) is dict and stretch.get("train") in (True, "true") for stretch in detail
    )
