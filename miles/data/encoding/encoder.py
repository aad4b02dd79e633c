"""Encodes conversations: the way of a row from messages to token ids and a loss mask.

    conversation  ->  text and spans  ->  ids, tokens at the spans' edges  ->  ids and loss mask
                  render (template)   encode (tokens)                      mask (`loss_mask.py`)

The ids are always those of `tokenizer.apply_chat_template(messages, tools=tools, tokenize=True,
return_dict=False, **template_kwargs)`. A conversation is rendered and encoded once, as a whole.

Two rare kinds of rows leave this way. Plain text has no template and no turns. A row that spells
control tokens under `special_text="escape"` is encoded by `escape.py`.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from miles.common.checked import checked
from miles.common.debugging import unchained
from miles.data.config import EncodeConfig
from miles.data.encoding.empty_answer import (
    require_answers,
    require_written,
    silent_tokens,
)
from miles.data.encoding.escape import Escaper, any_of
from miles.data.encoding.given_messages import require_given_messages
from miles.data.encoding.loss_mask import (
    decide_loss_mask,
    mark_points,
    select_turns,
)
from miles.data.encoding.plain_text import TextFrame, text_frame
from miles.data.encoding.samples import outcomes_of
from miles.data.encoding.step_encoder import RenderedRow, StepEncoder
from miles.data.template.certificate import Certificate
from miles.data.template.certify import certify
from miles.data.template.render import Renderer, RowVariables, Span, strings_of
from miles.data.template.row_variables import RowTemplate, RowTemplates
from miles.data.tokens.bpe import text_encoder_of
from miles.data.tokens.carried_tokenizer import CarriedTokenizer
from miles.data.tokens.load import load_tokenizer
from miles.data.tokens.text_encoder import TextEncoder, Tokens
from miles.data.types import (
    Conversation,
    Encoded,
    EncodedRows,
    Int32,
    RowRejected,
    UInt8,
)
from miles.errors import ConfigError, MilesError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_UNDERSTOOD_KEYS = ("role", "content", "tool_calls")
"""Keys of a message that `rows/normalize.py` understands, and leaves in it."""
_VARIABLES = "chat_template_kwargs"
"""Stands before the name of a row's template variable where it is counted."""
_FEW_KEYS = frozenset((1, 2))
"""Numbers of keys of messages that have a role and a content only."""
_SAY_NOTHING: tuple[Any, ...] = ("", [], {})
"""Values of a key that is as good as absent."""


@dataclass(frozen=True)
class Encoder:
    """A tokenizer, its certificate and the settings. `encode` is a pure function."""

    tokenizer: PreTrainedTokenizerBase | CarriedTokenizer
    config: EncodeConfig
    certificate: Certificate

    @classmethod
    def from_config(cls, config: EncodeConfig) -> Encoder:
        """Load and certify the tokenizer that `config` names.

        Raises:
            TemplateError: the tokenizer cannot be loaded, or its template cannot be certified.
        """
        tokenizer = load_tokenizer(config)
        return cls(tokenizer, config, certify(tokenizer, config))

    @property
    def fingerprint(self) -> str:
        """Equal for two encoders that encode every conversation alike."""
        return self.certificate.fingerprint

    # A row's way

    def encode(self, conversation: Conversation) -> Encoded:
        """Encode one conversation, or plain text.

        Raises:
            RowRejected: empty_answer, special_text, template_error, unlocatable_turn,
                nothing_to_train, too_long; bad_message for text that is not Unicode, or a template
                variable that is not the row's to give; malformed_json for data nested too deeply.
        """
        rendered = self._render(conversation)
        if isinstance(rendered, Encoded):
            return rendered
        points = self._points(rendered.spans, rendered.certificate)
        return self._mask(rendered, self._text_encoder.encode_at(rendered.text, points))

    def encode_rows(self, conversations: Sequence[Conversation]) -> EncodedRows:
        """Encode many conversations, into samples end to end: a step's rows at once."""
        return self._step_encoder.encode_rows(conversations)

    def encode_all(self, conversations: Sequence[Conversation]) -> list[Encoded | RowRejected]:
        """Encode many conversations; what `encode` would raise is in its row's place."""
        return outcomes_of(self.encode_rows(conversations))

    def unused_keys(self, conversation: Conversation) -> tuple[str, ...]:
        """Return the keys of a row's messages that have a value, and of which nothing is made.

        The chat template does not look at them, and nothing else here understands them. So with
        the row's template variables: "chat_template_kwargs.NAME". It is quick where every message
        has a role and a content only.
        """
        messages = conversation.messages
        variables = conversation.template_kwargs
        if not variables and _FEW_KEYS.issuperset(map(len, messages)):  # most rows
            return ()

        template = self._run_template
        unused: list[str] = []
        if variables:
            try:
                template = self._row_templates.of(variables)
            except RowRejected:
                return ()
            unread_names = self._row_templates.unread(variables)
            unused += [
                f"{_VARIABLES}.{name}"
                for name in unread_names
                if variables[name] is not None and variables[name] not in _SAY_NOTHING
            ]

        unread = template.renderer.unread_keys(
            messages, conversation.tools, template.of_row.variables
        )
        unused += [
            key
            for number, key in unread
            if key not in _UNDERSTOOD_KEYS and messages[number][key] not in _SAY_NOTHING
        ]
        return tuple(dict.fromkeys(unused))

    def _render(self, conversation: Conversation) -> RenderedRow | Encoded:
        """Render a conversation; encode at once a row of one of the two rare kinds."""
        if conversation.text is not None:
            return self._encode_text(conversation.text)

        selected = select_turns(conversation, self.config.turns)
        if True not in selected:
            raise RowRejected("nothing_to_train", "no assistant turn is trained")
        template = self._run_template
        if conversation.template_kwargs:
            template = self._row_templates.of(conversation.template_kwargs)
        certificate = template.certificate

        if self.config.empty_answer == "drop":
            require_answers(conversation.messages, selected, self._silent_in_answers)
        if not certificate.accepts_tools and _calls_tools(conversation):
            raise RowRejected(
                "unlocatable_turn",
                "tool calls, for which this chat template could not be certified",
            )

        if self.config.special_text != "allow" and self._must_escape(conversation):
            return self._encode_escaped(conversation, selected)
        text, spans = template.renderer.render(
            conversation.messages, conversation.tools, template.of_row
        )
        if self.config.empty_answer == "drop":
            require_written(text, spans, conversation.messages, selected, certificate.terminator)
        self._require_short(text)
        return RenderedRow(text, spans, selected, certificate)

    def _points(self, spans: Sequence[Span], certificate: Certificate) -> list[int]:
        return mark_points(spans, certificate.terminator, self.config.empty_think)

    def _mask(self, row: RenderedRow, tokens: Tokens) -> Encoded:
        loss_mask, num_straddling = decide_loss_mask(
            tokens, row.selected, row.certificate.terminator_ids
        )
        return self._limit_length(tokens.ids, loss_mask, num_straddling)

    # The length limit

    def _limit_length(self, ids: Int32, loss_mask: UInt8, num_straddling: int = 0) -> Encoded:
        """Apply `max_sample_tokens` to an encoded row: cut it, or reject it.

        Raises:
            RowRejected: "too_long"; "nothing_to_train" where the cut leaves no trained token.
        """
        limit = self.config.max_sample_tokens
        if len(ids) <= limit:
            return Encoded(ids, loss_mask, num_straddling, is_truncated=False)
        if self.config.too_long != "truncate_end":
            raise RowRejected("too_long", f"{len(ids)} tokens, at most {limit}")

        ids = ids[:limit].copy()
        loss_mask = loss_mask[:limit].copy()
        if not loss_mask[1:].any():  # the first token is no label
            raise RowRejected("nothing_to_train", f"no trained token within the first {limit}")
        return Encoded(ids, loss_mask, num_straddling, is_truncated=True)

    def _require_short(self, text: str) -> None:
        """Reject a text that is certainly too long before it costs minutes to encode."""
        limit = self.config.max_sample_tokens
        if self.config.too_long != "truncate_end" and self._text_encoder.is_surely_longer(
            text, limit
        ):
            raise RowRejected("too_long", f"{len(text)} characters, at most {limit} tokens")

    # Rows that are plain text

    def _encode_text(self, text: str) -> Encoded:
        """Encode plain text, with the special tokens around it that it lacks (`plain_text.py`)."""
        self._require_short(text)
        if self.config.special_text == "reject" and (special := self._special_text.search(text)):
            raise RowRejected("special_text", special.group())

        if self.config.special_text == "escape" and self._escaper.is_needed_for([text]):
            ids = self._escaper.encode_at(self._escaper.mark(text), ()).ids
        else:
            ids = self._text_encoder.encode(text)

        ids, loss_mask = self._text_frame.around(text, ids)
        if len(ids) < 2:  # no position has a label
            raise RowRejected(
                "nothing_to_train", f"{len(ids)} tokens, and the first has none before it"
            )
        return self._limit_length(ids, loss_mask)

    # Rows that spell control tokens

    def _must_escape(self, conversation: Conversation) -> bool:
        """Return whether the row must be escaped.

        Raises:
            RowRejected: "special_text": it spells a special token, and such rows are rejected.
        """
        row_strings = list(
            strings_of([conversation.messages, conversation.tools, conversation.template_kwargs])
        )
        if self.config.special_text == "reject":
            for text in row_strings:
                if match := self._special_text.search(text):
                    raise RowRejected("special_text", match.group())
            return False
        return self._escaper.is_needed_for(row_strings)

    def _spells_special(self, row_strings: Sequence[str]) -> bool:
        """Return whether a row with these strings is escaped, or rejected."""
        if self.config.special_text == "escape":
            return self._escaper.is_needed_for(row_strings)
        return any(map(self._special_text.search, row_strings))

    def _encode_escaped(self, conversation: Conversation, selected: Sequence[bool]) -> Encoded:
        messages = list(conversation.messages)
        tools = conversation.tools and list(conversation.tools)
        template = self._row_templates.of(self._escaper.mark(conversation.template_kwargs))
        text, spans = template.renderer.render(
            self._escaper.mark(messages), self._escaper.mark(tools), template.of_row
        )
        if self.config.empty_answer == "drop":
            terminator = template.certificate.terminator
            require_written(text, spans, messages, selected, terminator)
        self._require_short(text)
        tokens = self._escaper.encode_at(text, self._points(spans, template.certificate))
        self._require_transformers_ids(tokens.ids, messages, tools, conversation.template_kwargs)
        return self._mask(RenderedRow(text, spans, selected, template.certificate), tokens)

    def _require_transformers_ids(
        self,
        ids: Int32,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        template_kwargs: Mapping[str, Any],
    ) -> None:
        """Compare an escaped row with transformers. Such rows are rare, so each one is compared.

        Raises:
            RowRejected: "special_text": transformers gives other ids, or none.
        """
        try:
            served = self.tokenizer.apply_chat_template(
                messages,
                tools=tools,
                tokenize=True,
                return_dict=False,
                sanitize_control_tokens=True,
                **{**self.config.template_kwargs, **template_kwargs},
            )
        except ValueError as error:  # transformers: ordinary text comes to that token, too
            raise RowRejected(
                "special_text", "a control token that cannot be written as ordinary text"
            ) from error

        if ids.tolist() != list(served):
            raise RowRejected(
                "special_text", "control tokens that transformers escapes in another way"
            )

    # Parts that are made when the first row needs them

    @cached_property
    def _text_encoder(self) -> TextEncoder:
        return text_encoder_of(self.tokenizer, self.config.tokenizer_engine)

    @cached_property
    def _run_template(self) -> RowTemplate:
        """The template for a row that brings no variables."""
        renderer = Renderer(self.tokenizer, self.config.template_kwargs, self.certificate)
        return RowTemplate(renderer, RowVariables({}, self.certificate), self.certificate)

    @cached_property
    def _step_encoder(self) -> StepEncoder:
        return StepEncoder(
            config=self.config,
            certificate=self.certificate,
            renderer=self._run_template.renderer,
            text_encoder=self._text_encoder,
            silent_tokens=self._silent_in_answers,
            spells_special=self._spells_special,
            render=self._render,
            encode=self.encode,
            limit_length=self._limit_length,
        )

    @cached_property
    def _row_templates(self) -> RowTemplates:
        return RowTemplates(self.tokenizer, self.config, self._run_template)

    @cached_property
    def _text_frame(self) -> TextFrame:
        url = self.config.tokenizer
        return text_frame(self.tokenizer, self._text_encoder, url, self.certificate.terminator)

    @cached_property
    def _escaper(self) -> Escaper:
        return Escaper(self.tokenizer, self._text_encoder)

    @cached_property
    def _silent_in_answers(self) -> tuple[str, ...]:
        """The tokens that say nothing in an answer."""
        if self.config.empty_answer != "drop" or self.config.special_text == "escape":
            return ()  # escaped, an end token in an answer is ordinary text
        url, certificate = self.config.tokenizer, self.certificate
        ids = certificate.terminator_ids
        return silent_tokens(self.tokenizer, url, ids, certificate.terminator)

    @cached_property
    def _special_text(self) -> re.Pattern[str]:
        added = self.tokenizer.added_tokens_decoder.values()
        return any_of([token.content for token in added if token.special])


def _calls_tools(conversation: Conversation) -> bool:
    return any(
        message.get("tool_calls") or message.get("role") == "tool"
        for message in conversation.messages
    )


@checked
@partial(unchained, kinds=(MilesError, RowRejected))
def encode(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    turns: str = EncodeConfig.turns,
    flags: Sequence[bool | None] | None = None,
    empty_think: str = EncodeConfig.empty_think,
    empty_answer: str = EncodeConfig.empty_answer,
    history: str = EncodeConfig.history,
    special_text: str = EncodeConfig.special_text,
    too_long: str = EncodeConfig.too_long,
    max_sample_tokens: int = EncodeConfig.max_sample_tokens,
    template_kwargs: Mapping[str, Any] | None = None,
) -> Encoded:
    """Encode one conversation with a tokenizer at hand.

        >>> question = {"role": "user", "content": "2+2?"}
        >>> encoded = encode([question, {"role": "assistant", "content": "4"}], tokenizer)
        >>> tokenizer.decode(encoded.input_ids[encoded.loss_mask == 1])
        '4<|im_end|>'

    The settings are the fields of `EncodeConfig` of the same names, with its defaults.

    Args:
        messages: OpenAI messages (plain JSON types).
        tokenizer: a fast tokenizer with a chat template; certified at the first call.
        tools: JSON schemas of functions.
        turns: the assistant turns that are trained: "all", "last", or "flags" for those with a true
            flag.
        flags: one for each message: True to train it, False to exclude it, None to leave it to
            `turns`.
        empty_think: "mask" or "train" an empty think block that the template puts before an answer.
        empty_answer: an answer that would be trained and says nothing, with no text, reasoning or
            tool call: "drop" rejects the conversation, "train" trains the model to end at once.
        history: earlier turns as the template renders them ("as_served").
        special_text: content that spells a control token: "allow" it to become that token, "escape"
            it to ordinary text (as `apply_chat_template(..., sanitize_control_tokens=True)`), or
            "reject" the conversation.
        too_long: a conversation of more than `max_sample_tokens`: "drop" or "error" reject it,
            "truncate_end" cuts it.
        template_kwargs: further variables for the template.

    Raises:
        TemplateError: the template cannot be certified.
        RowRejected: the conversation cannot be used; it gives the reason.
        ConfigError: a setting has no such value, `flags` has not one entry for each message, or a
            message has a flag of its own (`weight`) beside no `flags`.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ConfigError(
            "encode: tokenizer must be a fast tokenizer, as AutoTokenizer.from_pretrained returns "
            f"it, not {type(tokenizer).__name__}"
        )
    settings = {
        "template_kwargs": dict(template_kwargs or {}),
        "turns": turns,
        "empty_think": empty_think,
        "empty_answer": empty_answer,
        "history": history,
        "special_text": special_text,
        "too_long": too_long,
        "max_sample_tokens": max_sample_tokens,
    }
    encoder = _cached_encoder(tokenizer, settings)

    message_flags = tuple(flags) if flags is not None else (None,) * len(messages)
    if len(message_flags) != len(messages):
        raise ConfigError(
            f"flags has {len(message_flags)} entries for {len(messages)} messages; "
            "give one for each"
        )
    require_given_messages(messages, has_flags=flags is not None)
    conversation = Conversation(
        tuple(messages), None if tools is None else tuple(tools), message_flags
    )
    return encoder.encode(conversation)


_encoders: weakref.WeakKeyDictionary[PreTrainedTokenizerBase, dict[str, Encoder]] = (
    weakref.WeakKeyDictionary()
)
_last: weakref.WeakKeyDictionary[PreTrainedTokenizerBase, tuple[Any, Encoder]] = (
    weakref.WeakKeyDictionary()
)
"""For each tokenizer its state and the settings at the last call, and the encoder for them."""


def _cached_encoder(tokenizer: PreTrainedTokenizerBase, settings: Mapping[str, Any]) -> Encoder:
    """Return the encoder for a tokenizer as it is now.

    The keys hold what users set on a tokenizer (template, special and added tokens), so that a
    change takes effect. Most calls are as the last one: then the template is the same object.

    Args:
        tokenizer: of transformers.
        settings: fields of `EncodeConfig`.

    Raises:
        ConfigError: a setting has no such value.
        TemplateError: the template cannot be certified.
    """
    template = tokenizer.chat_template
    state = (template, tokenizer.special_tokens_map, len(tokenizer))
    call = (*state, tokenizer.name_or_path, settings)
    # A template that is no text, and variables, may be changed where they lie.
    is_fixed = isinstance(template, str) and not settings["template_kwargs"]
    if is_fixed and (last := _last.get(tokenizer)) and last[0] == call:
        return last[1]

    name = str(tokenizer.name_or_path) or type(tokenizer).__name__
    config = EncodeConfig(tokenizer=name, **settings)
    key = repr((config, *state))
    encoders = _encoders.setdefault(tokenizer, {})
    if key not in encoders:
        encoders[key] = Encoder(tokenizer, config, certify(tokenizer, config))
    if is_fixed:
        _last[tokenizer] = (call, encoders[key])
    return encoders[key]
