"""Answers that say nothing: dropped by reason, or trained as they are."""

from pathlib import Path
from typing import Any

import pytest

from miles.data.config import EncodeConfig
from miles.data.encoding.empty_answer import require_answers
from miles.data.encoding.encoder import Encoder, encode
from miles.data.types import Conversation, Encoded, RowRejected
from miles.errors import ConfigError
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
        *(
            "<|im_end|>",
            " <think> </think> <|im_end|>\n",
            "<|endoftext|>",
            "<|endoftext|><|im_end|>",
        ),
        *(
            "\u200b",
            "\ufeff",
            "\u2060",
            "\u200c",
            "\u200d",
            "\u3164",
            "\u00ad",
            "\x00\x07",
            "\u115f",
        ),
        "<think>\u200b</think>\u3164",
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


@pytest.mark.parametrize(
    "text", ["\u3164가", "\u200b\u2764", "\u0623\u200d", "\u0600", "<|im_end|>ok", "答"]
)
def test_silent_characters_beside_others_do_not_matter(
    chatml_tokenizer_folder: Path, text: str
) -> None:
    assert isinstance(outcome(chatml_tokenizer_folder, QUESTION, answer(text)), Encoded)


def test_further_keys_of_an_empty_answer_are_named(chatml_tokenizer_folder: Path) -> None:
    message = answer("", tool_call={"name": "f"}, audio=None, **{"k" * 50: 1})
    assert outcome(chatml_tokenizer_folder, QUESTION, message) == (
        f"empty_answer: assistant turn 0 says nothing; it has further keys: tool_call, {'k' * 40}…"
    )


TEXT_ONLY = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.content is string %}{{ m.content.split('</think>')[-1] }}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_what_the_template_leaves_out_is_not_trained_as_an_empty_answer(chatml_tokenizer) -> None:
    chatml_tokenizer.chat_template = TEXT_ONLY
    parts = [{"type": "text", "text": "4"}]
    for turns, detail in (
        ([QUESTION, answer(parts)], "message 1, whose content is a list of parts"),
        ([{**QUESTION, "content": parts}, answer("4")], "message 0, whose"),
        ([QUESTION, answer("<think>hm</think>"), QUESTION, answer("4")], "assistant turn 0"),
    ):
        with pytest.raises(RowRejected, match=f"template_error: .* writes nothing of {detail}"):
            encode(turns, chatml_tokenizer)

    thoughts = [QUESTION, answer("<think>hm</think>")]
    encoded = encode(thoughts, chatml_tokenizer, empty_answer="train")
    assert trained_text(chatml_tokenizer, encoded) == ["<|im_end|>"]
    with pytest.raises(RowRejected, match="template_error"):
        encode([QUESTION, answer(parts)], chatml_tokenizer, empty_answer="train")


@pytest.mark.parametrize("key", ["weight", "train", "train_detail"])
def test_a_flag_in_a_message_is_refused_beside_no_flags(chatml_tokenizer, key: str) -> None:
    turns = [QUESTION, answer("4", **{key: 0})]
    with pytest.raises(ConfigError, match=f"message 1 has the key '{key}'.* argument flags"):
        encode(turns, chatml_tokenizer)
    with pytest.raises(RowRejected, match="nothing_to_train"):
        encode(turns, chatml_tokenizer, flags=[None, False])
    encode([QUESTION, answer("4", **{key: None})], chatml_tokenizer)


def test_messages_of_another_form_are_refused(chatml_tokenizer) -> None:
    with pytest.raises(RowRejected, match="bad_message: message 1: its content is a number"):
        encode([QUESTION, answer(4)], chatml_tokenizer)
    for arguments in ([1], "[1]", "{'a': 1}", 4):
        call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
        with pytest.raises(RowRejected, match="bad_tool_call: message 1: tool call 0"):
            encode([QUESTION, answer("", tool_calls=[call])], chatml_tokenizer)
    for arguments in ({"a": 1}, '{"a": 1}', ""):
        call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
        encode([QUESTION, answer("", tool_calls=[call])], chatml_tokenizer)


@pytest.mark.parametrize("key", ["a\nb", "<|im_end|>"])
def test_a_key_that_could_be_a_marker_is_named_as_the_cause(chatml_tokenizer, key: str) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {key: 1}}}
    with pytest.raises(RowRejected, match=r"unlocatable_turn: a key of the row holds .* rename it"):
        encode([QUESTION, answer("", tool_calls=[call])], chatml_tokenizer)


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
