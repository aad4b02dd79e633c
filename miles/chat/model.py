"""A model to talk with: the weights in transformers, and the encoder of its prompts.

In: what `source.opened` found. Out: a `ChatModel`. Weights come from safetensors alone, and code of
a folder's own runs only where the user says so.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from miles.chat.decoder import Decoder
from miles.chat.settings import Sampling
from miles.chat.source import Opened
from miles.common.file_errors import in_own_words
from miles.data.encoding.kept_encoders import encoder_of
from miles.data.encoding.prompt import PromptEncoder
from miles.errors import CheckpointError, MilesError, TemplateError
from miles.report.run_data import read_first_batch

_MANY_TOKENS = 1 << 20
"""The limit of a model whose config.json has none."""


@dataclass(frozen=True)
class ChatModel:
    """A model, and what makes its prompts and ends its answers."""

    decoder: Decoder
    prompts: PromptEncoder
    device: str
    """what it computes on, and in which format, for a person"""
    notes: tuple[str, ...] = ()
    """what a person should know of its prompts"""

    def answer(self, prompt_ids: Sequence[int], sampling: Sampling, row: int = 0) -> Answer:
        """Begin an answer to a prompt."""
        return Answer(self, prompt_ids, sampling, row)


class Answer:
    """An answer that is being written: iterate over it for its text, piece by piece.

    Args:
        row: the number of the prompt, for its draws.
    """

    def __init__(
        self, model: ChatModel, prompt_ids: Sequence[int], sampling: Sampling, row: int
    ) -> None:
        self.token_ids: list[int] = []
        """so far, with the terminator"""
        self.finish = "interrupted"
        """"stop": the terminator was written; "length": a limit was reached"""
        self._model = model
        self._steps = model.decoder.steps([prompt_ids], sampling, [row])
        self._shown = ""

    def __iter__(self) -> Iterator[str]:
        decoder = self._model.decoder
        # Of a terminator of several tokens, the first ones are not shown before the others come.
        num_held = decoder.num_terminator_tokens - 1
        for step in self._steps:
            self.token_ids.append(step[0])
            if decoder.ends(self.token_ids):
                self.finish = "stop"
                break
            end = max(len(self.token_ids) - num_held, 0)
            yield from self._new_text(self._model.prompts.decode(self.token_ids[:end]))
        else:
            self.finish = "length"
        yield from self._new_text(self.text, is_last=True)

    @property
    def text(self) -> str:
        """The text so far, without the terminator."""
        ids = self.token_ids
        if self.finish == "stop":
            ids = ids[: -self._model.decoder.num_terminator_tokens]
        return self._model.prompts.decode(ids)

    def _new_text(self, text: str, *, is_last: bool = False) -> Iterator[str]:
        """Yield what a text has more than was shown; half a character waits for its rest."""
        if not is_last:
            text = text.rstrip("\ufffd")
        if len(text) > len(self._shown):
            piece = text[len(self._shown) :]
            self._shown = text
            yield piece


def load(found: Opened, dtype: str = "auto") -> ChatModel:
    """Load the weights, and certify the encoder.

    Args:
        dtype: "float32", "bfloat16", "float16"; "auto": float32 on the CPU, on a GPU that of the
            weights.

    Raises:
        MilesError: the folder cannot be used.
    """
    encoder = encoder_of(found.encode)
    certificate = encoder.certificate
    notes = []
    if found.fingerprint not in (None, encoder.fingerprint):
        notes.append(
            "the tokenizer or the chat template is not the one that the run trained with: its "
            "prompts may differ from those of the training"
        )
    after_empty_think = certificate.has_think and _trains_behind_empty_think(found)
    if after_empty_think:
        notes.append("answers begin behind an empty think block, as the run was trained")

    model, device = _load_weights(found, dtype)
    text_config = model.config.get_text_config()
    max_tokens = int(getattr(text_config, "max_position_embeddings", None) or _MANY_TOKENS)
    prompts = PromptEncoder(encoder, after_empty_think=after_empty_think)
    decoder = Decoder(model, prompts.terminator_ids, max_tokens)
    return ChatModel(decoder, prompts, device, tuple(notes))


def _trains_behind_empty_think(found: Opened) -> bool:
    """Return whether a run trained answers that stand behind an empty think block.

    Its first batch tells: there is such a block that is masked, and no answer begins with a think.
    """
    if found.run is None or found.encode.empty_think != "mask":
        return False
    try:
        batch = read_first_batch(found.run)
    except MilesError:
        return False
    if batch is None:
        return False
    encoder = encoder_of(found.encode)
    (*_, think) = encoder.certificate.empty_thinks
    opening = think.lstrip().partition(">")[0] + ">"

    num_empty = 0
    for sample in batch.samples:
        for begin, end in _trained_stretches(sample["loss_mask"]):
            answer = encoder.tokenizer.decode(sample["input_ids"][begin:end][:8])
            if answer.lstrip().startswith(opening):
                return False
            before = encoder.tokenizer.decode(sample["input_ids"][max(begin - 24, 0) : begin])
            num_empty += before.endswith(encoder.certificate.empty_thinks)
    return num_empty > 0


def _trained_stretches(loss_mask: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield where each run of trained tokens begins and ends."""
    begin = None
    for place, is_trained in enumerate([*loss_mask, 0]):
        if is_trained and begin is None:
            begin = place
        elif not is_trained and begin is not None:
            yield begin, place
            begin = None


def _load_weights(found: Opened, dtype: str) -> tuple[Any, str]:
    """Return the model, and what it computes on in words.

    Raises:
        CheckpointError: transformers cannot load it, or tensors are missing.
        TemplateError: it brings code of its own, and that was not allowed.
    """
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    has_gpu = torch.cuda.is_available()
    chosen = ("auto" if has_gpu else "float32") if dtype == "auto" else dtype
    trusts = found.encode.trust_remote_code
    try:
        with contextlib.redirect_stdout(None):
            model, info = transformers.AutoModelForCausalLM.from_pretrained(
                found.folder,
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=trusts,
                output_loading_info=True,
                dtype=chosen if chosen == "auto" else getattr(torch, chosen),
            )
    except Exception as error:  # transformers raises whatever its parsers raise
        if "trust_remote_code" in str(error):
            raise TemplateError(
                f"{found.folder}: the model brings code of its own, which was not run. Read the "
                "code, and give --trust-remote-code if it may run here"
            ) from error
        raise CheckpointError(
            f"{found.folder}: transformers cannot load the model: {in_own_words(error)}"
        ) from error

    if missing := sorted(info["missing_keys"]):
        raise CheckpointError(
            f"{found.folder}: {len(missing)} tensors of the model are not in its safetensors files "
            f"({', '.join(missing[:3])}); a complete checkpoint was expected"
        )
    model.eval()
    if has_gpu:
        model.to("cuda")
    name = str(model.dtype).removeprefix("torch.")
    where = torch.cuda.get_device_name() if has_gpu else "the CPU"
    return model, f"{name} on {where}"
