"""An encoder as bytes: certified in one process, rebuilt in others without certifying.

    driver    Encoder  ->  bytes: certificate, facts and definition of the tokenizer, the proof
    loader    bytes    ->  Encoder, in half a second, without transformers and torch

The bytes are a zip of numpy arrays (npz), read with `allow_pickle=False`: data alone, in which
nothing can run. A chat template in it is rendered in the sandboxes, as always.

An encoder is packed only where everything of it can be rebuilt from data, which is proven when it
is packed: on every probe, and on a template that uses what transformers adds to Jinja, the same
text and ids come from transformers and from the rebuilt tokenizer. A tokenizer with code of its own
is not packed, nor one that its library writes and reads as another one.
"""

from __future__ import annotations

import hashlib
import io
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cache, partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from miles import __version__
from miles.data.config import EncodeConfig
from miles.data.encoding.encoder import Encoder
from miles.data.encoding.plain_text import read_serving_ends
from miles.data.template.certificate import Certificate
from miles.data.template.probes import (
    ONE_CALL,
    ONE_TURN,
    ONE_WITH_REASONING,
    QUESTION,
    TOOLS,
    TWO_CALLS,
    TWO_TURNS,
    TWO_WITH_REASONING,
    WITH_SYSTEM,
    Message,
    forged_turns,
)
from miles.data.template.render import render_text
from miles.data.tokens.bpe import encoder_from_proof, text_encoder
from miles.data.tokens.carried_tokenizer import CarriedTokenizer, LazyBackend, TokenizerFacts
from miles.data.tokens.load import load_tokenizer, note_pinned_date
from miles.data.tokens.packed_proof import PackedProof
from miles.data.tokens.served_chat import served_text
from miles.data.tokens.text_encoder import TextEncoder
from miles.data.types import RowRejected

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CERTIFYING_ROOMS = ("tokens", "template", "encoding")
"""Rooms of `miles.data` whose code decides what is in a state."""
_LIBRARIES = ("transformers", "tokenizers", "tiktoken", "fastokens", "jinja2", "numpy")

_OWN_METHODS = ("apply_chat_template", "get_chat_template", "special_tokens_map")
"""Methods of transformers: a tokenizer that has others is not followed here."""

_FEATURES = """\
{%- set seen = namespace(last='') %}
{%- for message in messages %}
    {%- if loop.index0 == 3 %}{% break %}{% endif %}
    {% generation %}{{ message | tojson }}{% endgeneration %}
    {{- dict(a=1, b=[2]) | tojson(indent=1) }} {{ dict.fromkeys('xy', 0) }}
    {%- set seen.last = message.content ~ bos_token ~ add_generation_prompt ~ documents %}
{%- endfor %}
{{ seen.last | trim }} {{ tools | tojson(sort_keys=true) }} {{ undefined_name }}
  {% if messages | length > 5 %}{{ raise_exception('too many') }}{% endif %}
"""
"""A template with all that transformers adds to Jinja and to messages."""
_FEATURE_MESSAGES: list[dict[str, Any]] = [
    {"role": "user", "content": "<a href='é'> & \u2028", "name": None, "n": 1.5, "is": [True, {}]},
    {"role": "assistant", "content": " b\n", "reasoning": "Hm."},
    {"role": "assistant", "content": "", "thinking": "So.", "tool_calls": []},
    {"role": "user", "content": "not reached"},
]


def pack(encoder: Encoder) -> bytes | None:
    """Return an encoder as bytes; None where it cannot be rebuilt from data alone.

    Args:
        encoder: made by `Encoder.from_config`.
    """
    tokenizer = encoder.tokenizer
    engine = text_encoder(tokenizer.backend_tokenizer, encoder.config.tokenizer_engine)
    if encoder.config.trust_remote_code or not _has_own_methods(tokenizer):
        return None
    if engine.backend is tokenizer.backend_tokenizer:  # it is another one when saved and loaded
        return None

    facts = TokenizerFacts.of(tokenizer, read_serving_ends(encoder.config.tokenizer))
    definition = engine.backend.to_str().encode()
    header = {
        "versions": versions(),
        "config": asdict(encoder.config),
        "certificate": encoder.certificate.to_json(),
        "facts": asdict(facts),
        "engine": engine.engine,
        "kind": engine.kind,
        "has_normalizer": engine.backend.normalizer is not None,
    }
    arrays: dict[str, Any] = {"definition": np.frombuffer(definition, np.uint8)}
    if engine.proof is not None:
        header |= {"pattern": engine.proof.pattern, "added": dict(engine.proof.added)}
        for name in ("token_bytes", "token_lengths", "token_ids"):
            arrays[name] = getattr(engine.proof, name)

    carried = CarriedTokenizer(facts, engine.backend, engine, lambda: tokenizer)
    if not _serves_alike(tokenizer, carried, encoder):
        return None
    buffer = io.BytesIO()
    np.savez(buffer, header=np.frombuffer(json.dumps(header).encode(), np.uint8), **arrays)
    return buffer.getvalue()


def with_engine(state: bytes, engine: TextEncoder, config: EncodeConfig) -> bytes:
    """Return a state with another engine, as `pack` returns it for an encoder with that engine.

    Args:
        engine: of the same tokenizer.
        config: the settings that gave the engine; the others are those of the state.
    """
    arrays = dict(np.load(io.BytesIO(state), allow_pickle=False))
    header = json.loads(arrays["header"].tobytes())
    header["certificate"]["engine"] = engine.engine
    header |= {"config": asdict(config), "engine": engine.engine, "kind": engine.kind}
    arrays["header"] = np.frombuffer(json.dumps(header).encode(), np.uint8)
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def unpack(state: bytes | memoryview, config: EncodeConfig) -> Encoder | None:
    """Return the encoder of a state; None where it is of other settings, or of other versions.

    Args:
        state: as `pack` returns it; whoever gives it answers for it.
        config: the settings of the encoder.
    """
    content = np.load(io.BytesIO(state), allow_pickle=False)
    header = json.loads(content["header"].tobytes())
    if header["versions"] != versions() or header["config"] != _as_json(asdict(config)):
        return None

    backend: Any = LazyBackend(content["definition"].tobytes())
    if "pattern" in header:
        proof = PackedProof(
            header["pattern"],
            header["added"],
            content["token_bytes"],
            content["token_lengths"],
            content["token_ids"],
        )
        engine = encoder_from_proof(
            backend,
            proof.unpack(),
            proof,
            has_normalizer=header["has_normalizer"],
            kind=header["kind"],
            engine=header["engine"],
        )
    else:
        engine = TextEncoder(backend, header["engine"])

    facts = TokenizerFacts(**header["facts"])
    certificate = _certificate_of(header["certificate"])
    if certificate.date != "none":
        note_pinned_date(facts.chat_template)
    tokenizer = CarriedTokenizer(facts, backend, engine, partial(load_tokenizer, config))
    return Encoder(tokenizer, config, certificate)


@cache
def versions() -> Mapping[str, str]:
    """Return the versions of all that a state depends on, the code of this package among them."""
    found = {
        "miles": __version__,
        "code": _code_hash(),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
    }
    for library in _LIBRARIES:
        try:
            found[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            found[library] = "none"
    return found


def _code_hash() -> str:
    """Return the hash of the code that certifies and encodes."""
    data = Path(__file__).parents[1]  # miles/data
    files = [data / "config.py", data / "types.py"]
    for room in _CERTIFYING_ROOMS:
        files += sorted((data / room).glob("*.py"))
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()


def _as_json(value: Any) -> Any:
    """Return a value as it is when it has been JSON."""
    return json.loads(json.dumps(value))


def _certificate_of(fields: Mapping[str, Any]) -> Certificate:
    tuples = {name: tuple(value) for name, value in fields.items() if isinstance(value, list)}
    return Certificate(**{**fields, **tuples})


# The proof that a tokenizer can be rebuilt


def _has_own_methods(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether a tokenizer renders as every tokenizer of transformers does."""
    from transformers import PreTrainedTokenizerBase

    cls = type(tokenizer)
    return all(
        getattr(cls, name) is getattr(PreTrainedTokenizerBase, name) for name in _OWN_METHODS
    )


def _serves_alike(
    tokenizer: PreTrainedTokenizerBase, carried: CarriedTokenizer, encoder: Encoder
) -> bool:
    """Return whether transformers and the rebuilt tokenizer give the same texts and ids."""
    forged = forged_turns(encoder.certificate.turn_header, encoder.certificate.terminator)
    plain = (ONE_TURN, TWO_TURNS, forged, WITH_SYSTEM, ONE_WITH_REASONING, TWO_WITH_REASONING)
    probes: list[tuple[Sequence[Message], Any, bool]] = [(QUESTION, None, True)]
    probes += [(messages, None, False) for messages in (QUESTION, *plain)]
    probes += [(messages, TOOLS, False) for messages in (ONE_CALL, TWO_CALLS)]
    kwargs = encoder.config.template_kwargs
    for messages, tools, prompts in probes:
        served = _outcome(tokenizer, messages, tools, kwargs, prompts)
        if served != _outcome(carried, messages, tools, kwargs, prompts):
            return False

    variables = {"bos_token": "B"}
    served = tokenizer.apply_chat_template(
        _FEATURE_MESSAGES, tools=TOOLS, chat_template=_FEATURES, tokenize=False, **variables
    )
    return bool(served == served_text(_FEATURES, _FEATURE_MESSAGES, TOOLS, variables))


def _outcome(
    tokenizer: PreTrainedTokenizerBase | CarriedTokenizer,
    messages: Sequence[Message],
    tools: Any,
    kwargs: Mapping[str, Any],
    prompts: bool,
) -> tuple[str, list[int]]:
    """Return the text and the ids of a probe, or the reason why it is not rendered."""
    try:
        text = render_text(tokenizer, messages, tools, kwargs, add_generation_prompt=prompts)
    except RowRejected as rejected:
        return f"{rejected.reason}: {rejected.detail}", []
    return text, list(tokenizer(text, add_special_tokens=False)["input_ids"])
