"""Chat templates: load, certify, render once and find each assistant turn in the result.

A turn's place comes from markers put into the *full* conversation, never from rendering prefixes and never
from searching what somebody typed. For ChatML, with ⟨ ⟩ for the markers of a message:

    <|im_start|>user\n⟨hi⟩<|im_end|>\n<|im_start|>assistant\nhello⟩<|im_end|>\n
                         ^ only the template's own text from here ...  ^ ... and from here

The trained span is what follows the first generation prompt after the previous message's end, up to and
including the first terminator after the turn's own end. The render with the markers taken out must equal the
plain render; where no placing of markers achieves that, the row is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import xxhash

from miles import storage
from miles.data.config import EncodeConfig
from miles.data.types import RowRejected
from miles.errors import SourceError, TemplateError

_DIGIT, _OPEN, _CLOSE = 0xFDD0, "\ufde0", "\ufde1"  # noncharacters: no text holds them
_MARKER = re.compile("([\ufde0\ufde1])([\ufdd0-\ufddf]{4})")
_RESERVED = re.compile("[\ufdd0-\ufdef]")
_EMPTY_THINK = re.compile(r"<think>\s*</think>\s*")

Message = Mapping[str, Any]
Span = tuple[int, int]


@dataclass(frozen=True)
class Certificate:
    """What was found out about a tokenizer and its template before anything is encoded."""

    generation_prompt: str
    """what serving puts before an answer, such as "<|im_start|>assistant\\n" (an empty think block not counted)"""
    terminator: str
    """the special token that ends an assistant turn"""
    terminator_id: int
    num_bos: int
    """beginning-of-sequence tokens in a rendered conversation: 0 or 1"""
    empty_think: str
    """what the template puts before a last answer without reasoning; empty: nothing"""
    prompt_supplies_think: bool
    """whether the generation prompt itself ends with the empty think block"""


def load_tokenizer(config: EncodeConfig) -> Any:
    """The tokenizer of a folder (fsspec URL) or a hub name, with the configured template. Cached in the process.

    Raises:
        TemplateError: nothing there, not a tokenizer, or one without a fast backend.
    """
    return _load(config.tokenizer, config.chat_template)


@lru_cache(maxsize=4)
def _load(name: str, chat_template: str | None) -> Any:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        if "://" in name or storage.exists(name):
            with storage.local_folder(name, "tokenizer folder") as folder:
                names = {entry.name for entry in folder.iterdir()}
                if not names & {"tokenizer.json", "tokenizer.model", "vocab.json"}:
                    raise TemplateError(
                        f"{name}: no tokenizer in this folder; expected tokenizer.json, found "
                        f"{', '.join(sorted(names)[:8]) or 'nothing'}"
                    )
                tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
        elif name.startswith((".", "/")) or name.count("/") != 1:
            raise TemplateError(f"{name}: no such folder; expected one with tokenizer.json")
        else:
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except SourceError as error:
        raise TemplateError(f"{error}; expected a folder with tokenizer.json") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise TemplateError(f"{name}: no tokenizer can be loaded from there ({reason})") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise TemplateError(
            f"{name}: {type(tokenizer).__name__} gives no character offsets; a fast tokenizer is needed"
        )
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    return tokenizer


def encoder_fingerprint(tokenizer: Any, config: EncodeConfig) -> str:
    """Hex: vocabulary, merges, template and every setting that decides ids or masks; not where they lie."""
    settings = {
        key: value for key, value in asdict(config).items() if key not in ("tokenizer", "chat_template")
    }
    content = [tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template, settings]
    return xxhash.xxh64_hexdigest(json.dumps(content, sort_keys=True))


def render(
    tokenizer: Any, messages: Sequence[Message], tools: Sequence[Any] | None, kwargs: Mapping[str, Any]
) -> str:
    """The conversation as the serving template gives it.

    Raises:
        RowRejected: the template raised.
    """
    try:
        text: str = tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            tools=list(tools) if tools else None,
            tokenize=False,
            **kwargs,
        )
    except Exception as error:  # a template is a program; whatever it raises is about this row
        raise RowRejected("template_error", type(error).__name__) from error
    return text


def render_with_spans(
    tokenizer: Any,
    messages: Sequence[Message],
    tools: Sequence[Any] | None,
    kwargs: Mapping[str, Any],
    prompt: str,
    terminator: str,
) -> tuple[str, dict[int, Span]]:
    """Renders a conversation and finds its assistant turns.

    Args:
        prompt: the certificate's generation prompt.
        terminator: the certificate's terminator.

    Returns:
        the text, and for each assistant message (by index) the characters from after the generation prompt to
        after the terminator.

    Raises:
        RowRejected: the template raised, or a turn cannot be located exactly.
    """
    plain = render(tokenizer, messages, tools, kwargs)
    if _RESERVED.search(plain):
        raise RowRejected("unlocatable_turn", "the text holds Unicode noncharacters")
    failure = ""
    for mark_starts, mark_assistant in ((True, True), (False, True), (True, False)):
        marked_messages = [_mark(i, m, mark_starts, mark_assistant) for i, m in enumerate(messages)]
        try:
            marked = render(tokenizer, marked_messages, tools, kwargs)
        except RowRejected:
            continue
        text, marks = _take_out_markers(marked)
        if text != plain or marks is None:
            continue
        spans: dict[int, Span] = {}
        try:
            for index, message in enumerate(messages):
                if message["role"] == "assistant":
                    spans[index] = _span(index, messages, bool(tools), plain, marks, prompt, terminator)
        except LookupError as error:
            failure = str(error)
            continue
        return plain, spans
    raise RowRejected("unlocatable_turn", failure or "the template changes what it is given")


def _mark(index: int, message: Message, mark_start: bool, mark_assistant: bool) -> Message:
    content = message.get("content")
    is_assistant = message["role"] == "assistant"
    if not isinstance(content, str) or not content.strip() or (is_assistant and not mark_assistant):
        return message
    number = "".join(chr(_DIGIT + (index >> shift & 15)) for shift in (12, 8, 4, 0))
    start, end = len(content) - len(content.lstrip()), len(content.rstrip())
    opening = _OPEN + number if mark_start and not is_assistant else ""
    return {
        **message,
        "content": content[:start] + opening + content[start:end] + _CLOSE + number + content[end:],
    }


def _take_out_markers(marked: str) -> tuple[str, dict[tuple[str, int], int] | None]:
    """The text without markers, and where each was in it; None where one was rendered twice."""
    pieces, marks, last, length = [], {}, 0, 0
    for match in _MARKER.finditer(marked):
        pieces.append(marked[last : match.start()])
        length += match.start() - last
        last = match.end()
        number = 0
        for digit in match[2]:
            number = number << 4 | (ord(digit) - _DIGIT)
        if (match[1], number) in marks:
            return marked, None
        marks[match[1], number] = length
    return "".join(pieces) + marked[last:], marks


def _span(
    index: int,
    messages: Sequence[Message],
    has_tools: bool,
    text: str,
    marks: Mapping[tuple[str, int], int],
    prompt: str,
    terminator: str,
) -> Span:
    """Characters of turn `index`. Raises LookupError where they cannot be told for sure."""
    before = index - 1
    while before >= 0 and (_CLOSE, before) not in marks:
        if (messages[before].get("content") or "").strip() or messages[before].get("tool_calls"):
            raise LookupError(f"turn {index}: the end of the message before it is not known")
        before -= 1
    if before >= 0 and messages[before].get("tool_calls"):
        raise LookupError(f"turn {index} follows a tool call without a result")
    if has_tools and all(message["role"] == "system" for message in messages[: before + 1]):
        raise LookupError(f"turn {index}: an assistant turn comes first, right after the tools")
    after_previous = marks[_CLOSE, before] if before >= 0 else 0
    start = text.find(prompt, after_previous)
    if start < 0:
        raise LookupError(f"turn {index}: no generation prompt before it")
    start += len(prompt)

    own = marks.get((_CLOSE, index))
    if own is not None and not messages[index].get("tool_calls"):
        end = text.find(terminator, own)
    else:
        following = len(text) if index == len(messages) - 1 else marks.get((_OPEN, index + 1))
        if following is None:
            raise LookupError(f"turn {index}: its end cannot be told from what follows")
        end = text.rfind(terminator, start, following)
    if end < 0 or (own is not None and own < start):
        raise LookupError(f"turn {index}: no terminator after it")
    return start, end + len(terminator)


def certify(tokenizer: Any, config: EncodeConfig) -> Certificate:
    """Learns the template's generation prompt and terminator, and proves the masks on probe conversations.

    Raises:
        TemplateError: names the tokenizer and what could not be certified.
    """
    return _certify(tokenizer, config.tokenizer, config.template_kwargs)


def _certify(tokenizer: Any, name: str, kwargs: Mapping[str, Any]) -> Certificate:
    def refuse(reason: str) -> TemplateError:
        return TemplateError(f"{name}: its chat template cannot be certified: {reason}")

    template = tokenizer.chat_template
    if not template:
        raise TemplateError(f"{name}: the tokenizer has no chat template; give one with --chat-template-path")
    if "strftime_now" in str(template):
        raise refuse(
            "it prints today's date, so that tokens would change from day to day; remove strftime_now"
        )
    ask, answer = {"role": "user", "content": "Pqxa"}, {"role": "assistant", "content": "Zkwv"}
    try:
        user_only = render(tokenizer, [ask], None, kwargs)
        prompted = render(tokenizer, [ask], None, {**kwargs, "add_generation_prompt": True})
        single = render(tokenizer, [ask, answer], None, kwargs)
    except RowRejected as error:
        raise refuse(f"it raises {error.detail} on a plain question and answer") from error
    if not prompted.startswith(user_only) or prompted == user_only:
        raise refuse("add_generation_prompt adds nothing after the conversation")
    prompt = prompted[len(user_only) :]
    supplied = _EMPTY_THINK.search(prompt)
    if supplied:
        prompt = prompt[: supplied.start()]
    if single.count(answer["content"]) != 1 or prompt not in single:
        raise refuse(f"an answer does not follow the generation prompt {prompt!r}")
    between = single[single.rindex(prompt) + len(prompt) : single.index(answer["content"])]
    if between and not _EMPTY_THINK.fullmatch(between):
        raise refuse(f"it puts {between!r} between the generation prompt and an answer")
    tail = tokenizer.backend_tokenizer.encode(
        single[single.index(answer["content"]) + len(answer["content"]) :], add_special_tokens=False
    ).ids
    special = tokenizer.added_tokens_decoder
    if not tail or tail[0] not in special:
        raise refuse("no special token ends an assistant turn, so that a model could not learn to stop")
    terminator = str(special[tail[0]].content)
    ids = tokenizer.backend_tokenizer.encode(single, add_special_tokens=False).ids
    num_bos = ids.count(tokenizer.bos_token_id) if tokenizer.bos_token_id not in (None, tail[0]) else 0
    if num_bos > 1:
        raise refuse(f"a conversation begins with {num_bos} BOS tokens")

    system = {"role": "system", "content": "Lrtb"}
    for probe in ([ask, answer], [ask, answer, ask, answer], [system, ask, answer, ask, answer]):
        try:
            text, spans = render_with_spans(tokenizer, probe, None, kwargs, prompt, terminator)
        except RowRejected as error:
            raise refuse(f"{error.detail} (probe of {len(probe)} messages)") from error
        for start, end in spans.values():
            trained = text[start:end]
            if _EMPTY_THINK.sub("", trained, count=1) != answer["content"] + terminator:
                raise refuse(f"a turn is rendered as {trained!r}, not as the answer and {terminator!r}")
    return Certificate(prompt, terminator, tail[0], num_bos, between, supplied is not None)
