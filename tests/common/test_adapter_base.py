"""Where the frozen weights of a LoRA run are when it goes on, and what is no whole model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from miles.architecture.adapter import ADAPTER as KEY
from miles.common.adapter_base import find_base
from miles.common.checkpoint_files import INDEX
from miles.common.checkpoint_folder import (
    EXTRA,
    SavedCheckpoint,
    find,
    find_start,
    remove_old,
    weights_in,
)
from miles.common.checkpoint_tracker import TRACKER, folder_name
from miles.errors import CheckpointError
from tests.support.checkpoints import write_checkpoint
from tests.support.fault_table import NOTHING, observed

STEP = folder_name(7)


def torch_dist(folder: Path, name: str, extra: dict[str, Any] | None = None) -> Path:
    """Make a folder whose tracker names a checkpoint; return that of the checkpoint."""
    write_checkpoint(folder, name, json.dumps(extra) if extra else "")
    (folder / TRACKER).write_text(name.removeprefix("iter_"))
    return folder / name


def lora_run(folder: Path, base: Path) -> SavedCheckpoint:
    """Make the folder of a LoRA run that began from some weights; return its checkpoint."""
    torch_dist(folder, STEP, {"cursor": {}, "adapter": {"rank": 8}, "base": {"url": str(base)}})
    with (folder / STEP / INDEX).open("a") as index:
        index.write(f"{KEY}.q_proj.lora_A")
    found = find(str(folder))
    assert found is not None
    assert found.has_adapter
    return found


def hugging_face(folder: Path) -> Path:
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).touch()
    return folder


def test_the_base_is_found_as_at_the_start(tmp_path: Path) -> None:
    hf = hugging_face(tmp_path / "hf")
    other = hugging_face(tmp_path / "other")
    release = torch_dist(tmp_path / "megatron", "release")

    def base(began_from: Path, load: Path | None = None, ref_load: Path | None = None) -> Path:
        name = f"run-{len(list(tmp_path.iterdir()))}"
        run = lora_run(tmp_path / name, began_from)
        words = [str(word) if word else None for word in (load, ref_load)]
        found = find_base(run, words[0], words[1], str(hf))
        assert found.is_hugging_face == (Path(found.url) in (hf, other))
        return Path(found.url)

    assert base(hf) == hf
    assert base(hf, ref_load=other) == other, "the ranks tell whether it is the same"
    assert base(release, ref_load=release.parent) == release
    assert base(release) == hf, "no flag names the other folder any more"
    assert base(release, load=release.parent) == release
    own = torch_dist(tmp_path / f"run-{len(list(tmp_path.iterdir())) + 1}", "release")
    assert base(own) == own, "the tracker names it no more"


def test_a_base_that_is_gone_is_named(tmp_path: Path) -> None:
    run = lora_run(tmp_path / "run", tmp_path / "megatron/release")
    with pytest.raises(CheckpointError, match=rf"began from with --ref-load {tmp_path}/megatron$"):
        find_base(run, None, None, str(tmp_path))


@pytest.mark.parametrize("broken", [False, True], ids=["whole", "miles.json is cut off"])
def test_an_adapter_is_no_model_to_begin_from(tmp_path: Path, broken: bool) -> None:
    hf = hugging_face(tmp_path / "hf")
    run = lora_run(tmp_path / "run", hf)
    if broken:
        Path(run.url, EXTRA).write_text("{")
    with pytest.raises(CheckpointError, match="no whole model") as raised:
        find_start(str(tmp_path / "new"), None, str(tmp_path / "run"), str(hf))
    line = f"miles convert merge-adapter --adapter {tmp_path}/run --hf-checkpoint {hf} "
    assert line in str(raised.value)
    observed("adapter of a LoRA run as `--ref-load`", str(raised.value), line, NOTHING)


def test_an_adapter_of_peft_is_no_model(tmp_path: Path) -> None:
    """Its safetensors beside a config.json are no weights."""
    for name in ("config.json", "adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).touch()
    with pytest.raises(CheckpointError, match="give it as --lora-adapter-path"):
        weights_in(str(tmp_path), "hf")


def test_the_base_beside_the_checkpoints_stays(tmp_path: Path) -> None:
    for number in (1, 7, 8):
        torch_dist(tmp_path, folder_name(number))
    base = str(tmp_path / folder_name(1))
    assert remove_old(str(tmp_path), 1, None, base).removed == (str(tmp_path / STEP),)
    assert remove_old(str(tmp_path), 1, None).removed == (base,)
