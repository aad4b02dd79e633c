"""The certificate: what is proven of a tokenizer with its chat template, and how it is printed."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from miles.common.facts import Facts
from miles.data.template.anchors import Anchors

# The texts that `miles certify` prints.
_REASONING_TEXTS = {
    (False, False): "left out by the template",
    (True, False): "rendered in every turn",
    (True, True): "rendered behind the last question, left out of earlier turns",
}
_TOOLS_TEXTS = {
    "none": "rows with tool calls are rejected: the template leaves them out, or fails on them",
    "grouped": "accepted; results of two calls share a turn",
    "separate": "accepted; each result has its own turn",
    "one call": "accepted; one call a turn",
}


@dataclass(frozen=True)
class Certificate(Anchors):
    """The proven properties of a tokenizer and its chat template, beside the anchors."""

    name: str
    """names the template in errors"""
    terminator_ids: tuple[int, ...]
    bos_count: int
    """BOS tokens at the beginning of a rendered conversation: 0 or 1"""
    follows_prompt: bool
    """whether a rendered last turn begins exactly with the generation prompt"""
    extends_prefix: bool
    """whether a longer conversation begins with the text of a shorter one, up to its terminator"""
    drops_reasoning: bool
    """whether the reasoning of earlier turns is left out (history "as_served" trains without it)"""
    renders_reasoning: bool
    """whether `reasoning_content` of the last turn is rendered"""
    accepts_system: bool
    """False: the template raises on a system message"""
    accepts_tools: bool
    """False: the template raises on tool calls, leaves them out, or their turns cannot be located;
    rows with tool calls are rejected"""
    tool_grouping: str
    """the results of two tools in a row: "grouped" in one turn, or "separate"; "one call" where the
    template takes no two calls, "none" where it takes no tools"""
    composes: bool
    """whether text is brought into NFC; but for that, the ids decode to the text on every probe"""
    date: str
    """"none", or the date that is written on every day (a `strftime_now` in the template)"""
    engine: str
    """"fastokens" or "tiktoken", proven exact, or "tokenizers"; and why not the faster one"""
    fingerprint: str
    """`encoder_fingerprint`"""

    @property
    def has_think(self) -> bool:
        return bool(self.empty_thinks)

    def to_json(self) -> dict[str, Any]:
        """Return every field, as JSON types."""
        return asdict(self)

    def lines(self) -> list[tuple[str, str]]:
        """Return (label, text) pairs, as `miles certify` prints them."""
        begins = "begins otherwise: what is trained is not what is served"
        if self.follows_prompt:
            begins = "begins with it"
        prefix = "a longer one changes earlier turns"
        if self.extends_prefix:
            prefix = "a longer conversation extends a shorter one"
        empty_think = "none"
        if self.has_think:
            empty_think = " or ".join(map(repr, self.empty_thinks)) + ", masked"
        terminator_ids = ", ".join(map(str, self.terminator_ids))

        return [
            ("text", f"the ids decode to it on every probe{' (in NFC)' if self.composes else ''}"),
            ("ids", f"equal to apply_chat_template on every probe; by {self.engine}"),
            ("generation prompt", f"{self.generation_prompt!r}; a rendered last turn {begins}"),
            ("turn header", repr(self.turn_header)),
            ("terminator", f"{self.terminator} ({terminator_ids}), trained exactly once a turn"),
            ("BOS", "one, written by the template" if self.bos_count else "none"),
            ("prefix", prefix),
            ("empty think", empty_think),
            ("reasoning", _REASONING_TEXTS[self.renders_reasoning, self.drops_reasoning]),
            ("system", "accepted" if self.accepts_system else "rows with a system message fail"),
            ("tools", _TOOLS_TEXTS[self.tool_grouping]),
            ("date", self.date),
            ("fingerprint", self.fingerprint),
        ]

    def __rich__(self) -> Facts:
        return Facts(self.lines(), f"{self.name} is certified")
