"""Rows that are encoded together come out as each does by itself."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miles.data.config import EncodeConfig
from miles.data.encoding import step_encoder
from miles.data.encoding.encoder import Encoder
from miles.data.encoding.samples import encoded_rows, merged, samples_of, taken
from miles.data.rejecting import or_rejected
from miles.data.types import Conversation, Encoded, EncodedRows, RowRejected

SETTINGS: dict[str, dict[str, Any]] = {
    "as they are": {},
    "last turns": {"turns": "last", "empty_think": "train"},
    "flagged turns": {"turns": "flags", "empty_answer": "train"},
    "cut": {"max_sample_tokens": 40, "too_long": "truncate_end"},
    "short": {"max_sample_tokens": 40},
    "rejected": {"special_text": "reject"},
    "escaped": {"special_text": "escape"},
}
# What each check looks for: silence, thoughts, control tokens, what NFC changes, what is no text.
pieces = st.sampled_from(
    [
        *("", " ", "\n", "\n\n", "\u200b", "\u115f", "0", "a", "the fox ", "x" * 60, "**b**", "{}"),
        *("<think>", "</think>", "<think>\n\n</think>\n\n", "<think>\n\n</think>\n\nx"),
        *("<|im_end|>", "<|im_start|>", "<|im_start|>assistant\n", "<|endoftext|>", "<|im_st"),
        *("<tool_response>", "\u00e9", "e\u0301", "\u0301", "\u6cd5", "\ud55c", "\u1112\u1161"),
        *("\U0001f469\u200d\U0001f469", "\u0915\u093e", "\ud800"),
    ]
)
contents = st.lists(pieces, max_size=3).map("".join)


@st.composite
def conversations_(draw: st.DrawFn) -> Conversation:
    """A conversation: most are plain, some have more than texts."""
    roles = draw(st.sampled_from([("user", "assistant")] * 4 + [("system", "user", "assistant")]))
    roles += draw(st.sampled_from([()] * 4 + [("user", "assistant"), ("user",)]))
    messages: list[dict[str, Any]] = [{"role": role, "content": draw(contents)} for role in roles]
    kind = draw(st.sampled_from([*["plain"] * 8, "tools", "keys", "variables", "flags", "text"]))
    if kind == "text":
        return Conversation((), None, (), text=draw(contents))
    if kind == "keys":
        messages[-1]["reasoning_content"] = draw(contents)
    flags: tuple[bool | None, ...] = (None,) * len(roles)
    if kind == "flags":
        flags = tuple(draw(st.sampled_from([None, True, False])) for _ in roles)
    tools = ({"type": "function", "function": {"name": "f"}},) if kind == "tools" else None
    variables = {"enable_thinking": False} if kind == "variables" else {}
    return Conversation(tuple(messages), tools, flags, template_kwargs=variables)


@pytest.fixture(scope="module", params=SETTINGS)
def encoder(request: pytest.FixtureRequest, chatml_tokenizer_folder: Path) -> Encoder:
    options = {"max_sample_tokens": 1 << 14, **SETTINGS[request.param]}
    return Encoder.from_config(EncodeConfig(tokenizer=str(chatml_tokenizer_folder), **options))


def plain(outcome: Encoded | RowRejected) -> tuple[Any, ...]:
    """Return an outcome as values that can be compared."""
    if isinstance(outcome, RowRejected):
        return outcome.reason, outcome.detail
    ids, loss_mask = outcome.input_ids, outcome.loss_mask
    assert (ids.dtype, loss_mask.dtype) == (np.int32, np.uint8)
    counts = (outcome.num_straddling_tokens, outcome.is_truncated)
    return ids.tolist(), loss_mask.tolist(), *counts


def require_same(encoder: Encoder, rows: Sequence[Conversation]) -> None:
    alone = [plain(or_rejected(encoder.encode, row)) for row in rows]
    assert [plain(outcome) for outcome in encoder.encode_all(rows)] == alone
    # By now each program is known, and rows of few are many.
    assert [plain(outcome) for outcome in encoder.encode_all([*rows] * 4)] == alone * 4


@settings(max_examples=30, deadline=None)
@given(rows=st.lists(conversations_(), max_size=12))
def test_rows_together_are_as_each_by_itself(encoder: Encoder, rows: list[Conversation]) -> None:
    require_same(encoder, rows)


def conversation(*texts: str) -> Conversation:
    roles = ("user", "assistant") * (len(texts) // 2)
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
    return Conversation(tuple(messages), None, (None,) * len(texts))


def test_long_rows_are_joined_in_parts(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_encoder, "_JOINED_CHARACTERS", 300)
    rows = [conversation("the fox", "jumps " * (number % 20)) for number in range(30)]
    require_same(encoder, [*rows, conversation("a", "b", "c", "d")])


def test_most_rows_are_never_looked_at_one_by_one(
    chatml_tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = EncodeConfig(tokenizer=str(chatml_tokenizer_folder), max_sample_tokens=1 << 14)
    encoder = Encoder.from_config(config)
    doubtful = conversation("a", "")
    rows = [conversation("2+2?", text) for text in ("4", "**4**", "\u00e9", "\u6cd5", "{}", "No")]
    encoder.encode_rows(rows)

    seen: list[Conversation] = []
    render = Encoder._render

    def noted(self: Encoder, row: Conversation) -> Any:
        seen.append(row)
        return render(self, row)

    # The parts were made with the first rows; make them anew.
    monkeypatch.setattr(Encoder, "_render", noted)
    del encoder.__dict__["_step_encoder"]
    encoded = encoder.encode_rows([*rows, doubtful, *rows])
    assert seen == [doubtful]
    assert encoded.kept_rows.tolist() == [*range(6), *range(7, 13)]
    assert {row: reject.reason for row, reject in encoded.rejected.items()} == {6: "empty_answer"}


def test_no_rows(encoder: Encoder) -> None:
    encoded = encoder.encode_rows([])
    assert encoder.encode_all([]) == []
    assert len(encoded.kept_rows) == len(encoded.samples.input_ids) == 0


def sample(*ids: int) -> Encoded:
    loss_mask = np.array(ids, np.uint8) % 2
    return Encoded(np.array(ids, np.int32), loss_mask, len(ids), is_truncated=len(ids) > 2)


def test_samples_are_put_in_the_order_of_their_rows() -> None:
    samples = [sample(1, 2), sample(3), sample(4, 5, 6), sample(7)]
    rejects = {1: RowRejected("too_long")}
    others = encoded_rows({0: samples[0], 4: samples[3], **rejects})
    parts = [(np.array([2, 3]), samples_of(samples[1:3]))]
    both = merged(parts, others)
    assert both.kept_rows.tolist() == [0, 2, 3, 4]
    assert both.rejected == rejects
    require_samples(both, samples)


@given(numbers=st.lists(st.integers(0, 3), max_size=6))
def test_any_samples_are_taken(numbers: list[int]) -> None:
    samples = [sample(1, 2), sample(3), sample(4, 5, 6), sample(7)]
    chosen = taken(samples_of(samples), np.array(numbers, np.int64))
    rows = EncodedRows(chosen, np.arange(len(numbers)), {})
    require_samples(rows, [samples[number] for number in numbers])


def require_samples(rows: EncodedRows, samples: Sequence[Encoded]) -> None:
    expected = vars(samples_of(samples))
    for name, values in vars(rows.samples).items():
        assert values.dtype == expected[name].dtype
        assert values.tolist() == expected[name].tolist()
