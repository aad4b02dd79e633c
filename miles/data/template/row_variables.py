"""Follows the variables that a row brings for the chat template (`chat_template_kwargs`).

    variables                    generation prompt
    {"enable_thinking": true}    <|im_start|>assistant\\n
    {"enable_thinking": false}   <|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n

Variables can change how a turn begins, and with that what is trained. So the template is certified
under them as it is under the run's own, with the same result as if they were the run's.

That is done once for all rows whose variables take the same way through the template: the probes
are traced on symbols, as rows are (`trace.py`), and the programs tell one way from another. Only
the texts of the anchors are read anew for each value.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from miles.data.config import EncodeConfig
from miles.data.rejecting import or_rejected
from miles.data.template.anchors import Anchors, RenderedProbes, learn_anchors
from miles.data.template.certificate import Certificate
from miles.data.template.certify import certify
from miles.data.template.probes import ONE_TURN, QUESTION, TWO_TURNS, Message
from miles.data.template.render import Renderer, RowVariables, render_text
from miles.data.template.sandbox import Environment
from miles.data.template.symbols import Untraceable
from miles.data.template.trace import Program, Tracer
from miles.data.tokens.carried_tokenizer import own_arguments
from miles.data.types import RowRejected
from miles.errors import TemplateError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MAX_KEPT = 1 << 12
"""Values of variables, and ways through the template, that are remembered."""

_SPECIAL_TOKENS = tuple(
    f"{kind}_token" for kind in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
)


@dataclass(frozen=True)
class RowTemplate:
    """The chat template under the variables of a row."""

    renderer: Renderer
    of_row: RowVariables
    certificate: Certificate


class RowTemplates:
    """The chat template of an encoder, under the variables of any row.

    Args:
        tokenizer, config: of the encoder.
        run: the template under the run's own variables alone.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, config: EncodeConfig, run: RowTemplate
    ) -> None:
        self._tokenizer = tokenizer
        self._config = config
        self._run = run
        self._reserved = _reserved_names(tokenizer)
        variables = {**tokenizer.special_tokens_map, **config.template_kwargs}
        template = str(tokenizer.chat_template)
        self._tracer = Tracer(template, variables)
        self._prompting = Tracer(template, {**variables, "add_generation_prompt": True})

        self._by_value: dict[str, RowTemplate | RowRejected] = {}
        self._by_way: dict[tuple[int, ...], tuple[list[Program], Certificate | RowRejected]] = {}
        self._renderers: dict[tuple[str, str], Renderer] = {}

    def of(self, template_kwargs: Mapping[str, Any]) -> RowTemplate:
        """Return the template under the variables of a row.

        Raises:
            RowRejected: "bad_message": a name that is not the row's to give; "template_error" or
                "unlocatable_turn": it cannot be certified under these variables.
        """
        for name in template_kwargs:
            if name in self._reserved:
                raise RowRejected(
                    "bad_message", f"template variable {name}, which a row may not give"
                )

        variables = {name: value for name, value in template_kwargs.items() if self._is_read(name)}
        if not variables:
            return self._run

        key = json.dumps(variables)
        if key not in self._by_value:
            _make_room(self._by_value)
            self._by_value[key] = or_rejected(self._template_under, variables)
        found = self._by_value[key]
        if isinstance(found, RowRejected):
            raise RowRejected(found.reason, found.detail)
        return found

    def unread(self, template_kwargs: Mapping[str, Any]) -> list[str]:
        """Return the names of a row's variables that the template does not read."""
        return [name for name in template_kwargs if not self._is_read(name)]

    def _is_read(self, name: str) -> bool:
        return name in self._run.renderer.variable_names

    def _template_under(self, variables: dict[str, Any]) -> RowTemplate:
        """Certify the template under variables that it reads."""
        names = ", ".join(sorted(variables))
        programs: list[Program] = []
        texts = RenderedProbes(
            question=self._probe(self._tracer, QUESTION, variables, programs),
            prompted=self._probe(self._prompting, QUESTION, variables, programs),
            one_turn=self._probe(self._tracer, ONE_TURN, variables, programs),
            two_turns=self._probe(self._tracer, TWO_TURNS, variables, programs),
        )
        added = self._tokenizer.added_tokens_decoder.values()
        special = [token.content for token in added if token.special]
        try:
            ids = self._tokenizer.added_tokens_encoder
            anchors = learn_anchors(texts, ids, special, self._run.certificate.name)
        except TemplateError as error:
            raise _not_certified(names) from error

        proven = self._proven(programs, variables)
        header = _literal_header(anchors.turn_header, programs[-1])
        if header is None or anchors.terminator != proven.terminator:
            raise _not_certified(names)
        renderer = self._renderer_of(replace(anchors, turn_header=header))
        certificate = replace(proven, **vars(anchors))
        return RowTemplate(renderer, RowVariables(variables, certificate), certificate)

    def _probe(
        self,
        tracer: Tracer,
        probe: list[Message],
        variables: Mapping[str, Any],
        programs: list[Program],
    ) -> str:
        """Return the text of a probe, and append the program that computes it to `programs`."""
        try:
            program, strings = tracer.program(probe, None, variables)
            programs.append(program)
            return "".join(program.run(strings))
        except Untraceable as error:
            # Raises "template_error" where the template itself fails.
            kwargs = {**self._config.template_kwargs, **variables}
            render_text(self._tokenizer, probe, None, kwargs, tracer is self._prompting)
            raise _not_certified(", ".join(sorted(variables))) from error

    def _proven(self, programs: list[Program], variables: Mapping[str, Any]) -> Certificate:
        """Return the certificate of the way that the probes took, proven on the first such row."""
        way = tuple(map(id, programs))
        if way not in self._by_way:
            _make_room(self._by_way)
            # The programs are kept beside it, so that no other gets one of their ids.
            self._by_way[way] = (programs, self._certificate_under(variables))
        _, certificate = self._by_way[way]
        if isinstance(certificate, RowRejected):
            raise certificate
        return certificate

    def _certificate_under(self, variables: Mapping[str, Any]) -> Certificate | RowRejected:
        kwargs = {**self._config.template_kwargs, **variables}
        config = replace(self._config, template_kwargs=kwargs)
        try:
            return certify(self._tokenizer, config, self._run.certificate.fingerprint)
        except TemplateError:
            return _not_certified(", ".join(sorted(variables)))

    def _renderer_of(self, anchors: Anchors) -> Renderer:
        """Return the renderer for a turn header and a terminator."""
        key = (anchors.turn_header, anchors.terminator)
        if key == (self._run.certificate.turn_header, self._run.certificate.terminator):
            return self._run.renderer
        if key not in self._renderers:
            _make_room(self._renderers)
            kwargs = self._config.template_kwargs
            self._renderers[key] = Renderer(self._tokenizer, kwargs, anchors)
        return self._renderers[key]


def _reserved_names(tokenizer: PreTrainedTokenizerBase) -> frozenset[str]:
    """Return the names that no row may give: arguments, special tokens, what templates call."""
    return frozenset(
        (
            *("self", "messages", "strftime_now", "additional_special_tokens"),
            *(*own_arguments(tokenizer), *_SPECIAL_TOKENS, *tokenizer.special_tokens_map),
            *Environment().globals,
        )
    )


def _not_certified(names: str) -> RowRejected:
    return RowRejected(
        "unlocatable_turn",
        f"the chat template cannot be certified under the row's template variables ({names})",
    )


def _literal_header(header: str, two_turns: Program) -> str | None:
    """Return the longest start of a header that is the template's own text, once in each turn.

    The rest is text of a variable. None: there is no such start.
    """
    literals = [part for part in two_turns.parts if isinstance(part, str)]
    for length in range(len(header), 0, -1):
        if sum(part.count(header[:length]) for part in literals) == 2:
            return header[:length]
    return None


def _make_room(kept: dict[Any, Any]) -> None:
    """Start afresh where too much is kept."""
    if len(kept) >= _MAX_KEPT:
        kept.clear()
