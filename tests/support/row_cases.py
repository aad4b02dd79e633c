"""Files of rows as people have them (`tests/data/cases`), and what miles makes of each.

take("shapes/lima.jsonl")          the conversations and rejects of a file, a folder or files
refusal("containers/utf16.jsonl")  the error where a source cannot be used
require_served(taken, 0, …)        the ids of a row are those of apply_chat_template
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from miles.data.config import RowFormat, SourceConfig
from miles.data.encoding.encoder import Encoder
from miles.data.files.manifest import Manifest, build_manifest
from miles.data.files.read import read_raw_rows, read_rows
from miles.data.rejecting import or_rejected
from miles.data.rows.normalize import normalize
from miles.data.stream.row_outcomes import hash_share, normalize_rows
from miles.data.types import Conversation, Encoded, RowRejected
from miles.errors import SourceError

CASES = Path(__file__).parents[1] / "data" / "cases"


@dataclass(frozen=True)
class Taken:
    """What a source's rows came to."""

    manifest: Manifest
    outcomes: list[Conversation | RowRejected]
    """[rows], in the order of the manifest"""

    @property
    def conversations(self) -> list[Conversation]:
        """Every row's conversation; fails where a row was rejected."""
        for outcome in self.outcomes:
            if isinstance(outcome, RowRejected):
                raise outcome
        return [outcome for outcome in self.outcomes if isinstance(outcome, Conversation)]

    @property
    def reasons(self) -> list[str | None]:
        """[rows]: why each was rejected; None: it was not."""
        return [getattr(outcome, "reason", None) for outcome in self.outcomes]

    @property
    def shape(self) -> str:
        """The row shape that was found."""
        return self.manifest.sources[0].format.shape

    def turns(self, row: int = 0) -> list[tuple[str, str]]:
        """Return the role and content of each message of a row."""
        outcome = self.outcomes[row]
        if isinstance(outcome, RowRejected):
            raise outcome
        return [(message["role"], message["content"]) for message in outcome.messages]


def take(path: str | Path, format: RowFormat | None = None, **source: Any) -> Taken:
    """Read every row of a source as a run does, up to its conversation, and from its JSON.

    Args:
        path: within `CASES`, or absolute.
        format: what the user named of the rows.
        source: further fields of `SourceConfig`.
    """
    config = SourceConfig("case", (str(CASES / path),), format or RowFormat(), **source)
    manifest = build_manifest([config])
    row_ids = np.arange(manifest.num_rows)
    payloads = read_rows(manifest, row_ids)
    shape = manifest.sources[0].format
    outcomes = [or_rejected(normalize, payload, shape) for payload in payloads]

    (rows,) = read_raw_rows(manifest, row_ids, [manifest.num_rows])
    in_a_run = normalize_rows(rows, np.zeros(len(rows), np.int32), [shape])
    assert list(map(facts_of, in_a_run)) == list(map(facts_of, outcomes))
    return Taken(manifest, outcomes)


def facts_of(outcome: Conversation | RowRejected) -> tuple[Any, ...]:
    """Return all that a row came to, with the order of its keys."""
    if isinstance(outcome, RowRejected):
        return outcome.reason, outcome.detail
    return json.dumps(vars(outcome)), hash_share(outcome), outcome


def refusal(path: str | Path, format: RowFormat | None = None, **source: Any) -> str:
    """Return the error with which a source is refused when its files are counted."""
    config = SourceConfig("case", (str(CASES / path),), format or RowFormat(), **source)
    with pytest.raises(SourceError) as caught:
        build_manifest([config])
    message = str(caught.value)
    assert "\n" not in message, "an error is one paragraph"
    assert "Traceback" not in message
    return message


def require_served(
    encoder: Encoder,
    conversation: Conversation,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
) -> Encoded:
    """Require that a row becomes the ids of `apply_chat_template` on the conversation it means.

    Args:
        encoder: of some tokenizer.
        conversation: that the row became.
        messages, tools, template_kwargs: what the row means, written by hand.
    """
    encoded = encoder.encode(conversation)
    served = encoder.tokenizer.apply_chat_template(
        list(messages),
        tools=None if tools is None else list(tools),
        tokenize=True,
        return_dict=False,
        **(template_kwargs or {}),
    )
    assert encoded.input_ids.tolist() == list(served)
    return encoded
