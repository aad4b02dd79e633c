"""A LoRA run and what it begins from, compared before anything is started.

    --lora-rank over the checkpoints of a run that trains all weights   refused
    no --lora-rank over the checkpoints of a LoRA run                   refused
    another rank, alpha, projections than those of the checkpoint       refused
    another rank, alpha, projections than those of --lora-adapter-path  refused

Each refusal gives the line that goes on.
"""

from __future__ import annotations

from miles.architecture.adapter import AdapterShape
from miles.architecture.config import ModelShape
from miles.common import adapter_base, storage
from miles.common.checkpoint_choice import merging
from miles.common.checkpoint_files import MARK
from miles.common.checkpoint_folder import PEFT_CONFIG
from miles.common.checkpoint_tracker import TRACKER
from miles.common.redact import redact
from miles.convert.saved_adapter import adapter_in
from miles.errors import CheckpointError, ConfigError
from miles.train.config import TrainConfig
from miles.train.types import StartPoint


def require_same_training(config: TrainConfig, shape: ModelShape, start: StartPoint) -> None:
    """Refuse to go on from a checkpoint whose run trains other tensors than this one.

    Raises:
        CheckpointError: says which line goes on, and how to begin anew from its weights.
    """
    if not start.is_resume:
        return
    folder = start.url.rstrip("/").rsplit("/", 1)[0]
    flag = "--save" if storage.is_within(start.url, config.save) else "--load"
    stored = adapter_in(start.checkpoint.extra or {}, start.url)
    wanted = config.lora.adapter(shape)

    if stored is None and wanted is not None:
        raise CheckpointError(
            f"{flag} {folder}: holds the checkpoints of a run that trains all weights, and "
            f"--lora-rank {wanted.rank} trains an adapter. To go on with it, leave out --lora-rank; to "
            f"train one beside its weights, give --ref-load {folder} and another --save"
        )
    if stored is not None and wanted is None:
        raise CheckpointError(
            f"{flag} {folder}: holds the checkpoints of a LoRA run, and without --lora-rank all "
            f"weights are trained. To go on with it, give {line_of(stored)}. "
            f"{merging(folder, config.hf_checkpoint, _base_elsewhere(config, start))}"
        )
    if stored is not None and wanted is not None and stored != wanted:
        raise CheckpointError(
            f"{flag} {folder}: cannot be resumed with another adapter: "
            f"{_differences('the checkpoint', stored, wanted)}. To go on, give {line_of(stored)}; "
            "for another one, begin anew with another --save"
        )


def require_own_adapter(config: TrainConfig, shape: ModelShape) -> None:
    """Refuse a `--lora-adapter-path` whose adapter is another than that of the line.

    Raises:
        MilesError: an adapter that cannot be read, or another one; says which flags are its.
    """
    path = config.lora.adapter_path
    wanted = config.lora.adapter(shape)
    if path is None or wanted is None:
        return
    if not storage.exists(storage.join(path, PEFT_CONFIG)):
        _require_peft(path, config.hf_checkpoint)
    # torch is imported only where there are tensors to look at.
    from miles.convert.peft_adapter import read_adapter

    found = read_adapter(path, shape).shape
    if found != wanted:
        raise ConfigError(
            f"--lora-adapter-path {redact(path)}: another adapter than that of this line: "
            f"{_differences('the folder', found, wanted)}. To train it further, give {line_of(found)}"
        )


def _require_peft(path: str, hf_checkpoint: str) -> None:
    """Refuse a folder that is not there, or that holds a LoRA run's checkpoints.

    Raises:
        CheckpointError: says what to do.
    """
    if not storage.exists(path):
        raise CheckpointError(
            f"--lora-adapter-path {redact(path)}: no such folder: give one with an adapter in PEFT's "
            "format"
        )
    if any(storage.exists(storage.join(path, name)) for name in (TRACKER, MARK)):
        raise CheckpointError(
            f"--lora-adapter-path {redact(path)}: holds Megatron checkpoints, and an adapter in "
            "PEFT's format was expected. Make one of a LoRA run's: miles convert megatron-to-hf "
            f"--load {redact(path)} --hf-checkpoint {redact(hf_checkpoint)} --save ADAPTER; then give "
            "--lora-adapter-path ADAPTER"
        )


def line_of(adapter: AdapterShape) -> str:
    """Return the flags that give an adapter."""
    words = [f"--lora-rank {adapter.rank} --lora-alpha {_number(adapter.alpha)}"]
    if adapter.targets:
        words.append(f"--target-modules {' '.join(adapter.targets)}")
    if adapter.is_rank_stabilized:
        words.append("--use-rslora")
    return " ".join(words)


def _base_elsewhere(config: TrainConfig, start: StartPoint) -> str | None:
    """Return the folder of the frozen weights, unless they are those of --hf-checkpoint."""
    url = adapter_base.base_url(start.checkpoint)
    if url is None or storage.is_same(url, config.hf_checkpoint):
        return None
    return adapter_base.folder_of(url)


def _differences(place: str, stored: AdapterShape, wanted: AdapterShape) -> str:
    """Return what differs between two adapters, by flag."""
    pairs = {
        "--lora-rank": (stored.rank, wanted.rank),
        "--lora-alpha": (_number(stored.alpha), _number(wanted.alpha)),
        "--target-modules": (" ".join(stored.targets), " ".join(wanted.targets)),
        "--use-rslora": (_given(stored.is_rank_stabilized), _given(wanted.is_rank_stabilized)),
    }
    texts = []
    for flag, (old, new) in pairs.items():
        if old != new:
            texts.append(f"{flag}: {place} has {old}, this run {new}")
    return "; ".join(texts)


def _number(value: float) -> str:
    """Return a number as it is given on a line: 16, not 16.0."""
    return str(int(value) if float(value).is_integer() else value)


def _given(is_on: bool) -> str:
    return "it" if is_on else "none"
