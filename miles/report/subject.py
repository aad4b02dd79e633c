"""A path -> its kind, and the facts about it: for `miles inspect`.

    RUN          steps, losses, tokens, model, the settings that differ from the defaults
    CHECKPOINT   of Megatron: step, tokens, files
    HF, EXPORT   model, parameters, number format, files
    ADAPTER      of PEFT: rank, targets, base
    ROWS         of `miles prepare`, or its manifest: rows, tokens, what was dropped

Headers and JSON files are read; no weights are, and neither torch nor Ray is imported.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shlex
import typing
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from miles.common import checkpoint_folder, own_files, run_folder, storage
from miles.common.checkpoint_folder import PEFT_CONFIG
from miles.common.checkpoint_tracker import TRACKER
from miles.common.counts import counted
from miles.common.flags import words_of
from miles.errors import MilesError

Facts = dict[str, Any]

RUN = "a run"
CHECKPOINT = "a Megatron checkpoint"
MODEL = "a Hugging Face folder"
ADAPTER = "an adapter in PEFT's format"
PREPARED = "rows that miles prepare wrote"
ROWS = "rows"
_OF_A_RUN = (run_folder.ATTEMPTS, run_folder.METRICS, run_folder.FIRST_BATCH)
_WEIGHTS = ".safetensors"


@dataclass(frozen=True)
class Subject:
    """A path that was looked at: its kind, and the facts about it."""

    kind: str
    """one of the names above"""
    url: str
    """the folder; of a manifest, that of the manifest; of rows, the path as it was given"""
    facts: Facts
    """label -> a text or a number; empty for rows that no manifest counts"""


def subject_of(url: str) -> Subject:
    """Return what a path is, and the facts about it. What is none of the kinds is rows.

    Raises:
        MilesError: a file that tells the kind cannot be read.
    """
    folder, _, name = url.rpartition("/")
    if name in (run_folder.MANIFEST, PEFT_CONFIG):
        url = folder
    names = storage.names(url)

    if any(name in names for name in _OF_A_RUN):
        return Subject(RUN, url, _of_run(url))
    if PEFT_CONFIG in names:
        return Subject(ADAPTER, url, _of_adapter(url))
    if run_folder.CONFIG in names and any(name.endswith(_WEIGHTS) for name in names):
        return Subject(MODEL, url, _of_model(url))
    if TRACKER in names or ".metadata" in names:
        return Subject(CHECKPOINT, url, _of_checkpoint(url, names))
    if run_folder.MANIFEST in names:
        return Subject(PREPARED, url, _of_prepared(url))
    return Subject(ROWS, url, {})


def _of_run(url: str) -> Facts:
    facts: Facts = {}
    try:
        settings = own_files.read_object(storage.join(url, run_folder.CONFIG))
    except MilesError:
        settings = {}
    if model := settings.get("hf_checkpoint"):
        facts["model"] = model

    lines = own_files.read_records(storage.join(url, run_folder.METRICS)).objects
    lines = tuple(line for line in lines if "sft/loss" in line)
    if lines:
        first, last = lines[0], lines[-1]
        facts["steps"] = int(last["step"]) + 1
        facts["loss"] = _from_to(first["sft/loss"], last["sft/loss"])
        evaluations = [line["eval/loss"] for line in lines if "eval/loss" in line]
        if evaluations:
            facts["evaluation"] = _from_to(evaluations[0], evaluations[-1])
        for key, label in (("sft/tokens_seen", "trained tokens"), ("sft/epoch", "epochs")):
            if key in last:
                facts[label] = last[key]

    try:
        save = settings.get("save")
        place = save if save and isinstance(save, str) else url
        checkpoint = checkpoint_folder.find(place, weights_only=True)
        facts["checkpoint"] = checkpoint.url if checkpoint else "none yet"
    except MilesError as error:
        facts["checkpoint"] = str(error)
    if words := _changed(settings):
        facts["settings"] = shlex.join(words)
    return facts


def _from_to(*losses: Any) -> str:
    """Return the first and the last loss of a run: "2.3026 -> 0.6931"."""
    words = [f"{x:.4f}" if isinstance(x, int | float) else "not finite" for x in losses]
    return " -> ".join(words)


def _changed(settings: Mapping[str, Any]) -> list[str]:
    """Return the settings of a run that differ from the defaults, as flags."""
    from miles.train.config import TrainConfig

    def words(record: type, content: Mapping[str, Any]) -> list[str]:
        # Rows are listed with their own facts.
        found = words_of(record, {key: content[key] for key in content if key != "sources"})
        hints = typing.get_type_hints(record)
        for field in dataclasses.fields(record):
            inner = content.get(field.name)
            kind = hints[field.name]
            if (
                isinstance(inner, Mapping)
                and isinstance(kind, type)
                and dataclasses.is_dataclass(kind)
            ):
                found += words(kind, inner)
        return found

    try:
        return words(TrainConfig, settings)
    except (TypeError, ValueError, AttributeError):  # of another version
        return []


def _of_checkpoint(url: str, names: list[str]) -> Facts:
    if TRACKER in names:
        found = checkpoint_folder.find(url, weights_only=True)
        folders = [name for name in names if name.startswith("iter_") or name == "release"]
        facts: Facts = {"checkpoints": ", ".join(folders)}
        if found is None:
            return facts
        facts["newest"] = found.url
        url = found.url
        extra = found.extra or {}
        facts["step"] = found.iteration
    else:
        facts = {}
        extra = checkpoint_folder.read_extra(url) or {}

    if seen := (extra.get("cursor") or {}).get("tokens_seen"):
        facts["trained tokens"] = seen
    if adapter := extra.get("adapter"):
        facts["adapter"] = f"LoRA of rank {adapter.get('rank')}"
    facts["files"] = _files(url, ".distcp")
    return facts


def _of_model(url: str) -> Facts:
    from miles.architecture.families import read_shape
    from miles.architecture.sizes import total_parameters

    facts: Facts = {}
    try:
        shape = read_shape(url)
        facts["model"] = (
            f"{shape.model_type}, {counted(shape.num_layers, 'layer')} of {shape.hidden_size}, vocabulary of "
            f"{shape.vocab_size:,}"
        )
        facts["parameters"] = total_parameters(shape)
    except MilesError as error:
        facts["model"] = f"not one that miles trains: {error}"
    return facts | _tensors(url)


def _of_adapter(url: str) -> Facts:
    content = own_files.read_object(storage.join(url, PEFT_CONFIG))
    targets = content.get("target_modules")
    facts: Facts = {
        "rank": content.get("r"),
        "alpha": content.get("lora_alpha"),
        "targets": ", ".join(targets) if isinstance(targets, list) else targets,
        "base": content.get("base_model_name_or_path"),
    }
    return facts | _tensors(url, "adapter_model.safetensors")


def _tensors(url: str, single: str = "model.safetensors") -> Facts:
    """Return the numbers of the tensors of a folder, by the headers of its files."""
    from miles.convert.safetensors_headers import Headers

    tensors = Headers(url, single=single).tensors.values()
    types: Counter[str] = Counter()
    for tensor in tensors:
        types[tensor.type.torch_name] += math.prod(tensor.shape)
    names = ", ".join(f"{name} ({count:,} numbers)" for name, count in types.most_common())
    return {"tensors": len(tensors), "number format": names, "files": _files(url, _WEIGHTS)}


def _of_prepared(url: str) -> Facts:
    manifest = own_files.read_object(storage.join(url, run_folder.MANIFEST))
    facts: Facts = {"sources": ", ".join(_source_names(manifest))}
    try:
        summary = own_files.read_object(storage.join(url, run_folder.SUMMARY))
    except MilesError:
        summary = {}
    for key in ("rows", "written", "tokens", "trained_tokens"):
        if key in summary:
            facts[key.replace("_", " ")] = summary[key]

    for name, entry in (summary.get("ledger") or {}).items():
        counts = entry.get("counts", {})
        dropped = {
            key: n for key, n in counts.items() if key not in ("read", "trained", "held_out") and n
        }
        if dropped:
            facts[f"dropped of {name}"] = ", ".join(f"{n:,} {key}" for key, n in dropped.items())
    facts["files"] = _files(url, ".parquet")
    return facts


def _source_names(manifest: Mapping[str, Any]) -> list[str]:
    sources = manifest.get("sources") or []
    return [str(source.get("name")) for source in sources if isinstance(source, Mapping)]


def _files(url: str, suffix: str) -> str:
    """Return the number and the size of a folder's files of a kind: "2 files, 1.2 GB"."""
    fs, path = storage.filesystem(url)
    sizes = [entry["size"] for entry in fs.ls(path, detail=True) if entry["name"].endswith(suffix)]
    size = f"{sum(sizes) / 1e9:,.2f} GB" if sum(sizes) >= 1e8 else f"{sum(sizes) / 1e6:,.1f} MB"
    return f"{counted(len(sizes), 'file')} of {suffix}, {size}"


def to_json(subject: Subject) -> str:
    """Return a subject as JSON, without its samples."""
    content = {"kind": subject.kind, "path": subject.url, **subject.facts}
    return json.dumps(content, indent=1, ensure_ascii=False, default=str)
