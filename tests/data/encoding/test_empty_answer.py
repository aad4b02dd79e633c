"""Answers that say nothing: dropped by reason, or trained as they are."""

from pathlib import Path
from typing import Any

import pytest

from miles.data.config import EncodeConfig
from miles.data.encoding.encoder import Encoder, encode
from miles.data.encoding.loss_mask import require_answers
from miles.data.types import Conversation, Encoded, RowRejected
from tests.support.conversations import trained_text
from tests.support.row_cases import require_served, take

QUESTION = {"role": "user", "content": "Say nothing."}
CALL = {"type": "function", "function": {"name": "f", "arguments": {}}}


def answer(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def outcome(folder: Path, *turns: dict[str, Any], flags: Any = None, **settings: Any) -> Any:
    encoder = Encoder.from_config(EncodeConfig(str(folder), **settings))
    conversation = Conversation(turns, None, flags or (None,) * len(turns))
    (result,) = encoder.encode_all([conversation])
    return f"{result.reason}: {result.detail}" if isinstance(result, RowRejected) else result


@pytest.mark.parametrize(
    "content",
    [
        *("", " \n\t\u00a0", "<think>\n\n</think>\n\n", "<think></think>", "\n</think>\n"),
        *("<|im_end|>", " <think> </think> <|im_end|>\n"),
    ],
)
def test_an_answer_that_says_nothing_is_dropped(
    chatml_tokenizer_folder: Path, content: str
) -> None:
    turns = (QUESTION, answer("One."), QUESTION, answer(content, reasoning_content=" \n"))
    assert outcome(chatml_tokenizer_folder, *turns) == (
        "empty_answer: assistant turn 1 says nothing"
    )


@pytest.mark.parametrize(
    "message",
    [
        *(answer("0"), answer("<think>\nhm\n</think>\n\n"), answer("<think>"), answer("<b></b>")),
        *(answer("", tool_calls=[CALL]), answer("", reasoning_content="hm")),
    ],
)
def test_an_answer_that_says_something_is_trained(
    chatml_tokenizer_folder: Path, message: dict[str, Any]
) -> None:
    assert isinstance(outcome(chatml_tokenizer_folder, QUESTION, message), Encoded)


def test_a_terminator_that_is_ordinary_text_says_something(chatml_tokenizer) -> None:
    encoded = encode([QUESTION, answer("<|im_end|>")], chatml_tokenizer, special_text="escape")
    assert trained_text(chatml_tokenizer, encoded) == ["<|im_end|><|im_end|>"]


def test_turns_that_are_not_trained_are_not_judged(chatml_tokenizer_folder: Path) -> None:
    turns = (QUESTION, answer(""), QUESTION, answer("Two."))
    assert isinstance(outcome(chatml_tokenizer_folder, *turns, turns="last"), Encoded)
    flags = (None, False, None, None)
    assert isinstance(outcome(chatml_tokenizer_folder, *turns, flags=flags), Encoded)
    flags = (None, True, None, None)
    assert outcome(chatml_tokenizer_folder, *turns, flags=flags, turns="flags").startswith(
        "empty_answer: assistant turn 0"
    )


def test_an_empty_answer_is_trained_where_that_is_asked_for(chatml_tokenizer) -> None:
    with pytest.raises(RowRejected, match="empty_answer"):
        encode([QUESTION, answer("")], chatml_tokenizer)
    encoded = encode([QUESTION, answer("")], chatml_tokenizer, empty_answer="train")
    assert trained_text(chatml_tokenizer, encoded) == ["<|im_end|>"]


def test_parts_of_content_are_judged_by_their_text() -> None:
    for parts in ([], [{"type": "text", "text": " "}]):
        with pytest.raises(RowRejected, match="empty_answer"):
            require_answers([QUESTION, answer(parts)], [True], ("</s>",))
    require_answers([answer([{"type": "text", "text": "4"}])], [True], ("</s>",))
    require_answers([answer([{"type": "image"}])], [True], ("</s>",))


def test_the_blank_row_of_a_file(chatml_tokenizer_folder: Path) -> None:
    encoder = Encoder.from_config(EncodeConfig(str(chatml_tokenizer_folder)))
    conversations = take("empty-answers/alpaca.jsonl").conversations
    outcomes = encoder.encode_all(conversations)
    assert [getattr(row, "reason", None) for row in outcomes] == [
        *(None, None, "empty_answer", None, None)
    ]
    for number in (0, 1, 3, 4):
        question = {"role": "user", "content": f"Say {number}."}
        require_served(encoder, conversations[number], [question, answer(str(number))])


def test_the_setting_changes_no_fingerprint(chatml_tokenizer_folder: Path) -> None:
    drops, trains = (
        Encoder.from_config(EncodeConfig(str(chatml_tokenizer_folder), empty_answer=policy))
        for policy in ("drop", "train")
    )
    assert drops.fingerprint == trains.fingerprint
