"""A path -> the model that it leads to: a run's newest weights, a Hugging Face checkpoint, or an adapter.

    RUN      its export, where it has one of its newest checkpoint (--save-hf)
             else that checkpoint, converted into a temporary folder; of a LoRA run, merged
    HF       the folder itself
    ADAPTER  in PEFT's format: merged with its base into a temporary folder

A folder of a run also brings the settings of its encoding: template, template variables, policies.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from rich.console import Console

from miles.architecture.families import model_types, read_shape
from miles.common import checkpoint_folder, own_files, run_folder, storage
from miles.common.checkpoint_choice import ways_on
from miles.common.checkpoint_folder import PEFT_CONFIG, SavedCheckpoint
from miles.common.checkpoint_tracker import TRACKER
from miles.common.local_paths import absolute_or_hub_name
from miles.common.near_names import meant_path
from miles.common.untrusted_files import read_json
from miles.data.config import EncodeConfig
from miles.errors import CheckpointError, ConfigError, MilesError, SourceError
from miles.train.driver.finished import LAST_STEP
from miles.train.export_target import STEP, target_of

_HF_CONFIG = "config.json"


@dataclass(frozen=True)
class Choice:
    """The user's choice of a checkpoint and a template, beside the path."""

    iteration: int | None = None
    """the run's checkpoint; None: the newest"""
    hf_checkpoint: str | None = None
    """model folder of a run that has moved, or the base of an adapter"""
    chat_template: str | None = None
    """text of a template in place of the run's, or the folder's"""
    template_kwargs: Mapping[str, Any] | None = None
    """variables in place of the run's"""
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Opened:
    """A Hugging Face folder on this machine, and the encoding that goes with it."""

    folder: str
    """with safetensors, config.json and tokenizer"""
    title: str
    """what is talked to, for a person: "run X, step 100"."""
    encode: EncodeConfig
    run: str | None = None
    """folder of the run's records; None: it is no run"""
    fingerprint: str | None = None
    """of the encoder that the run trained with, where it is known and nothing replaces it"""


@contextlib.contextmanager
def opened(path: str, choice: Choice, console: Console | None = None) -> Iterator[Opened]:
    """Find out what a path leads to, and yield it as a Hugging Face folder.

    Args:
        path: folder (fsspec URL).
        console: shows a bar where weights are converted.

    Raises:
        MilesError: there is nothing to talk to; the error says what is missing.
    """
    if not storage.is_folder(path):
        there = "a file, not a folder" if storage.exists(path) else "no such folder"
        raise SourceError(
            f"{path}: {there}; expected the folder of a run (miles train --save), of a Hugging "
            f"Face checkpoint, or of an adapter{meant_path(path)}"
        )
    if storage.exists(storage.join(path, PEFT_CONFIG)):
        _require_no_step(path, choice)
        base = choice.hf_checkpoint or _base_of(path)
        with _merged(path, base, None, console) as folder:
            yield Opened(folder, f"{path}, merged with {base}", _own_encoding(folder, choice))
        return

    settings = _run_settings(path)
    if settings is not None or storage.exists(storage.join(path, TRACKER)):
        with _opened_run(path, settings or {}, choice, console) as found:
            yield found
        return

    if not storage.exists(storage.join(path, _HF_CONFIG)):
        raise CheckpointError(
            f"{path}: neither a run ({TRACKER}, {run_folder.CONFIG}) nor a Hugging Face checkpoint "
            f"(config.json, safetensors) nor an adapter ({PEFT_CONFIG}). {ways_on(path)}"
        )
    _require_no_step(path, choice)
    with _local_weights(path) as folder:
        yield Opened(folder, path, _own_encoding(folder, choice))


# A run


def _run_settings(path: str) -> dict[str, Any] | None:
    """Return the settings of a run; None where a folder's config.json is a model's, or missing."""
    url = storage.join(path, run_folder.CONFIG)
    if not storage.exists(url):
        return None
    # A model's config.json comes from anybody: it is read with care where it is looked at.
    content = _object_in(url)
    is_run = "hf_checkpoint" in content and isinstance(content.get("data"), Mapping)
    return content if is_run else None


@contextlib.contextmanager
def _opened_run(
    path: str, settings: Mapping[str, Any], choice: Choice, console: Console | None
) -> Iterator[Opened]:
    checkpoint = _checkpoint_of(path, settings, choice)
    hf_checkpoint = choice.hf_checkpoint or settings.get("hf_checkpoint")
    if hf_checkpoint is None:
        raise ConfigError(
            f"{path}: its {run_folder.CONFIG} is not there (it lies in --output-dir, where the run "
            "had one): give that folder, or --hf-checkpoint, the folder of the model"
        )
    title = f"{path}, step {checkpoint.iteration:,}"
    export = _export_of(path, settings, checkpoint)

    with contextlib.ExitStack() as stack:
        if export is not None:
            folder = stack.enter_context(_local_weights(export))
            title += f" (its export {export})"
        elif checkpoint.has_adapter:
            base_weights = None if choice.hf_checkpoint else settings.get("ref_load")
            merged = _merged(checkpoint.url, hf_checkpoint, base_weights, console)
            folder = stack.enter_context(merged)
            title += " (its adapter, merged)"
        else:
            folder = stack.enter_context(_converted(checkpoint.url, hf_checkpoint, console))

        encode = _encoding_of_run(settings, folder, choice)
        is_own = choice.chat_template is None and choice.template_kwargs is None
        cursor = (checkpoint.extra or {}).get("cursor") or {}
        fingerprint = cursor.get("encoder_fingerprint") if is_own and settings else None
        yield Opened(folder, title, encode, path, fingerprint)


def _checkpoint_of(path: str, settings: Mapping[str, Any], choice: Choice) -> SavedCheckpoint:
    """Return the checkpoint of a run that is talked to.

    Raises:
        CheckpointError: there is none.
    """
    save = path if storage.exists(storage.join(path, TRACKER)) else settings.get("save", path)
    if choice.iteration is not None:
        from miles.convert import torch_dist  # torch: it takes seconds

        url = torch_dist.newest(save, choice.iteration)
        return SavedCheckpoint(url, choice.iteration, checkpoint_folder.read_extra(url))
    found = checkpoint_folder.find(save, weights_only=True)
    if found is None:
        raise CheckpointError(
            f"{save}: no checkpoint yet: {TRACKER} is written with the first one. {ways_on(save)}"
        )
    if found.is_converted:
        raise CheckpointError(
            f"{save}: holds converted weights, which no run has trained: give the Hugging Face "
            "folder that they were made of"
        )
    return found


def _export_of(path: str, settings: Mapping[str, Any], checkpoint: SavedCheckpoint) -> str | None:
    """Return the folder of the export of a checkpoint; None where that is not certain.

    One without the step in its name is written after the last step alone. It is of this checkpoint
    if the last start of the run ended with its last step, and the export is not older.
    """
    save_hf = settings.get("save_hf")
    if not save_hf or checkpoint.has_adapter:
        return None
    export = target_of(str(save_hf), checkpoint.iteration)
    config = storage.join(export, _HF_CONFIG)
    if not storage.exists(config):
        return None
    if STEP not in save_hf and not _ended_at(path, checkpoint.iteration):
        return None

    mark = storage.join(checkpoint.url, "metadata.json")
    written, saved = (storage.info(url).get("mtime") for url in (config, mark))
    if not isinstance(written, float) or not isinstance(saved, float):  # a store tells no time
        return export if STEP in save_hf else None
    return export if written >= saved - 1.0 else None


def _ended_at(path: str, iteration: int) -> bool:
    """Return whether the last start of a run ended with its last step, and that is this one."""
    records = own_files.read_records(storage.join(path, run_folder.ATTEMPTS))
    end = records.objects[-1] if records.objects else {}
    return end.get("how") == LAST_STEP and end.get("next_step") == iteration


def _encoding_of_run(settings: Mapping[str, Any], folder: str, choice: Choice) -> EncodeConfig:
    """Return the encoding of a run, whose tokenizer may have moved since."""
    known = {field.name for field in fields(EncodeConfig)}
    given = settings.get("data", {}).get("encode", {})
    try:
        config = EncodeConfig(
            **{"tokenizer": folder, **{k: v for k, v in given.items() if k in known}}
        )
    except (TypeError, AttributeError, ConfigError) as error:
        raise SourceError(
            f"{run_folder.CONFIG} of the run: no settings that this version can read ({error})"
        ) from error
    config = replace(config, trust_remote_code=choice.trust_remote_code)
    if not storage.exists(storage.join(absolute_or_hub_name(config.tokenizer), "tokenizer.json")):
        config = replace(config, tokenizer=folder)
    return _with_choice(config, choice)


# Folders


def _own_encoding(folder: str, choice: Choice) -> EncodeConfig:
    """Return the encoding of a folder that says nothing of it beside its template."""
    config = EncodeConfig(folder, trust_remote_code=choice.trust_remote_code)
    return _with_choice(config, choice)


def _with_choice(config: EncodeConfig, choice: Choice) -> EncodeConfig:
    if choice.chat_template is not None:
        config = replace(config, chat_template=choice.chat_template)
    if choice.template_kwargs is not None:
        config = replace(config, template_kwargs=choice.template_kwargs)
    return config


def _object_in(url: str) -> dict[str, Any]:
    """Return the JSON object in a file that may come from anybody.

    Raises:
        CheckpointError: it is not ordinary, too large, or holds something else.
    """
    content = read_json(url, CheckpointError)
    if not isinstance(content, dict):
        raise CheckpointError(f"{url}: a JSON object was expected; found {type(content).__name__}")
    return content


def _require_no_step(path: str, choice: Choice) -> None:
    if choice.iteration is not None:
        raise ConfigError(
            f"--ckpt-step {choice.iteration}: {path} is no run, and has no steps: leave it out"
        )


def _base_of(adapter: str) -> str:
    """Return the base that an adapter in PEFT's format names.

    Raises:
        ConfigError: it names none that is there.
    """
    url = storage.join(adapter, PEFT_CONFIG)
    base = _object_in(url).get("base_model_name_or_path")
    if isinstance(base, str) and base:
        with contextlib.suppress(MilesError):
            if storage.is_folder(absolute_or_hub_name(base)):
                return absolute_or_hub_name(base)
    raise ConfigError(
        f"{url}: names no folder of its base that is there: give --hf-checkpoint, the folder of "
        "the model below the adapter"
    )


@contextlib.contextmanager
def _converted(checkpoint: str, hf_checkpoint: str, console: Console | None) -> Iterator[str]:
    """Yield a checkpoint as a Hugging Face folder, which is removed with the context."""
    from miles.convert.megatron_to_hf import megatron_to_hf  # torch: it takes seconds

    with storage.temporary_folder("miles-chat-") as folder:
        target = str(folder / "model")
        yield megatron_to_hf(checkpoint, hf_checkpoint, target, console=console)


@contextlib.contextmanager
def _merged(
    adapter: str,
    hf_checkpoint: str,
    ref_load: str | None,
    console: Console | None,
) -> Iterator[str]:
    """Yield an adapter merged with its base, as a Hugging Face folder for the context's time."""
    from miles.convert.merge_adapter import Targets, merge_adapter  # torch: it takes seconds

    with storage.temporary_folder("miles-chat-") as folder:
        target = str(folder / "model")
        merge_adapter(
            adapter,
            hf_checkpoint,
            Targets(target, None),
            ref_load=ref_load,
            console=console,
        )
        yield target


@contextlib.contextmanager
def _local_weights(url: str) -> Iterator[str]:
    """Yield a Hugging Face folder as a local one, once its headers are known to be sound."""
    from miles.convert.safetensors_files import Weights  # torch: it takes seconds

    kind = _object_in(storage.join(url, _HF_CONFIG)).get("model_type")
    if kind in model_types():
        read_shape(url)  # its errors name the entry of config.json
    with storage.local_folder(url, "Hugging Face checkpoint") as folder:
        Weights(str(folder), url)
        yield str(folder)
