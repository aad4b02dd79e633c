"""What a path leads to: a run's checkpoint or export, a LoRA run, an adapter, a folder."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from miles.chat.model import load
from miles.chat.source import Choice, opened
from miles.convert.megatron_to_hf import megatron_to_hf
from miles.convert.merge_adapter import Targets, merge_adapter
from miles.errors import CheckpointError, ConfigError, SourceError
from tests.support.models import edit_config, edit_tensors
from tests.support.trained import make_run, write_settings

NEWEST = Choice()


def weights(folder: str | Path) -> bytes:
    return (Path(folder) / "model.safetensors").read_bytes()


def test_a_run_is_converted_for_the_time_of_the_talk(small_run: Path, small_model: Path) -> None:
    with opened(str(small_run), NEWEST) as found:
        assert found.title == f"{small_run}, step 7"
        assert weights(found.folder) == weights(small_model)
        assert found.encode.tokenizer == str(small_model)
        folder = Path(found.folder)
    assert not folder.exists()


def test_a_lora_run_is_merged(small_lora_run: Path, small_model: Path, tmp_path: Path) -> None:
    targets = Targets(str(tmp_path / "merged"), None)
    merge_adapter(str(small_lora_run), str(small_model), targets)
    with opened(str(small_lora_run), NEWEST) as found:
        assert found.title == f"{small_lora_run}, step 7 (its adapter, merged)"
        assert weights(found.folder) == weights(tmp_path / "merged") != weights(small_model)


def test_an_adapter_is_merged_with_the_base_that_it_names(
    small_lora_run: Path, small_model: Path, tmp_path: Path
) -> None:
    adapter = tmp_path / "adapter"
    megatron_to_hf(str(small_lora_run), str(small_model), str(adapter))
    with opened(str(small_lora_run), NEWEST) as run, opened(str(adapter), NEWEST) as found:
        assert found.title == f"{adapter}, merged with {small_model}"
        assert weights(found.folder) == weights(run.folder)

    config = json.loads((adapter / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "gone")
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="give --hf-checkpoint"), opened(str(adapter), NEWEST):
        pass
    with opened(str(adapter), Choice(hf_checkpoint=str(small_model))) as found:
        assert Path(found.folder).is_dir()


@pytest.fixture
def run_with_export(small_model: Path, tmp_path: Path) -> Path:
    """A finished run with an export in `hf`, which is newer than its checkpoint."""
    run = make_run(small_model, tmp_path / "run", save_hf=str(tmp_path / "hf"))
    end = {"end": 1, "how": "the last step", "next_step": 7}
    (run / "starts.jsonl").write_text(json.dumps(end) + "\n")
    shutil.copytree(small_model, tmp_path / "hf")
    os.utime(tmp_path / "hf" / "config.json")
    return run


def folder_of(run: Path) -> str:
    with opened(str(run), NEWEST) as found:
        return found.folder


def test_the_export_of_the_last_checkpoint_is_used(run_with_export: Path, tmp_path: Path) -> None:
    assert folder_of(run_with_export) == str(tmp_path / "hf")


def test_an_export_of_another_checkpoint_is_not_used(run_with_export: Path, tmp_path: Path) -> None:
    starts = run_with_export / "starts.jsonl"
    finished = starts.read_text()
    starts.write_text(finished.replace("7", "5"))
    assert folder_of(run_with_export) != str(tmp_path / "hf")

    starts.write_text(finished)
    os.utime(tmp_path / "hf" / "config.json", (0, 0))
    assert folder_of(run_with_export) != str(tmp_path / "hf")


def test_an_export_with_the_step_in_its_name_is_used(
    run_with_export: Path, small_model: Path, tmp_path: Path
) -> None:
    (run_with_export / "starts.jsonl").unlink()
    write_settings(small_model, run_with_export, save_hf=f"{tmp_path}/hf-{{rollout_id}}")
    assert folder_of(run_with_export) != str(tmp_path / "hf-7")
    (tmp_path / "hf").rename(tmp_path / "hf-7")
    assert folder_of(run_with_export) == str(tmp_path / "hf-7")


def test_a_run_brings_its_template_and_variables(small_model: Path, tmp_path: Path) -> None:
    template = (small_model / "chat_template.jinja").read_text() + "{# the run's #}"
    encode = {"chat_template": template, "template_kwargs": {"enable_thinking": False}}
    run = make_run(small_model, tmp_path / "run", encode=encode)
    with opened(str(run), NEWEST) as found:
        assert found.encode.chat_template == template
        prompts = load(found).prompts
        text = prompts.decode(prompts.ids([{"role": "user", "content": "2+2?"}]).tolist())
        assert text.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    with opened(str(run), Choice(template_kwargs={"enable_thinking": True})) as found:
        assert found.encode.template_kwargs == {"enable_thinking": True}
        assert found.encode.chat_template == template


@pytest.mark.parametrize("is_reasoned", [False, True])
def test_answers_begin_where_the_first_batch_began_them(
    is_reasoned: bool, small_model: Path, tmp_path: Path
) -> None:
    from miles.data.config import EncodeConfig
    from miles.data.encoding.encoder import Encoder
    from miles.data.types import Conversation

    run = make_run(small_model, tmp_path / "run")
    answer = "<think>\nTwice two.\n</think>\n\n4" if is_reasoned else "4"
    messages = ({"role": "user", "content": "2+2?"}, {"role": "assistant", "content": answer})
    encoder = Encoder.from_config(EncodeConfig(str(small_model), tokenizer_engine="tokenizers"))
    encoded = encoder.encode(Conversation(messages, None, (None, None)))
    sample = {"source": "x", "file": "x.jsonl", "row": 0}
    sample |= {"input_ids": encoded.input_ids.tolist(), "loss_mask": encoded.loss_mask.tolist()}
    batch = {"tokenizer": str(small_model), "micro_batches": [[sample]]}
    (run / "first_batch.json").write_text(json.dumps(batch))

    with opened(str(run), NEWEST) as found:
        model = load(found)
    prompt = model.prompts.ids(messages[:1]).tolist()
    begin = encoded.loss_mask.tolist().index(1)
    assert prompt == encoded.input_ids[:begin].tolist()
    assert bool(model.notes) != is_reasoned


def test_another_tokenizer_than_the_runs_is_told(small_run: Path) -> None:
    extra = small_run / "iter_0000007" / "miles.json"
    extra.write_text(json.dumps({"cursor": {"encoder_fingerprint": "another"}}))
    try:
        with opened(str(small_run), NEWEST) as found:
            assert "is not the one that the run trained with" in load(found).notes[0]
        with opened(str(small_run), Choice(template_kwargs={"x": 1})) as found:
            assert not load(found).notes
    finally:
        extra.unlink()


def test_what_is_not_there_is_named(small_run: Path, small_model: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    moved = shutil.copytree(small_run, tmp_path / "moved")
    (moved / "config.json").unlink()
    for path, choice, kind, text in (
        (tmp_path / "none", NEWEST, SourceError, "no such folder; expected the folder of a run"),
        (empty, NEWEST, CheckpointError, "neither a run"),
        (moved, NEWEST, ConfigError, "or --hf-checkpoint, the folder of the model"),
        (small_run, Choice(iteration=5), CheckpointError, "give --ckpt-step 7"),
        (small_model, Choice(iteration=5), ConfigError, "is no run, and has no steps"),
    ):
        with pytest.raises(kind, match=text), opened(str(path), choice):
            pass
    with opened(str(moved), Choice(hf_checkpoint=str(small_model))) as found:
        assert weights(found.folder) == weights(small_model)


def test_weights_come_whole_and_from_safetensors_alone(small_model: Path, tmp_path: Path) -> None:
    cut = shutil.copytree(small_model, tmp_path / "cut")
    edit_tensors(cut, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    with (
        pytest.raises(CheckpointError, match="1 tensors of the model are not in its safetensors"),
        opened(str(cut), NEWEST) as found,
    ):
        load(found)

    pickled = shutil.copytree(small_model, tmp_path / "pickled")
    import torch

    torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="safetensors"), opened(str(pickled), NEWEST):
        pass


def test_code_of_a_folder_is_not_run(small_model: Path, tmp_path: Path) -> None:
    brings = shutil.copytree(small_model, tmp_path / "brings")
    (brings / "own.py").write_text("import pathlib; pathlib.Path('ran').touch()")
    edit_config(
        brings, model_type="own", auto_map={"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}
    )
    with opened(str(brings), NEWEST) as found:
        plain = found
    with pytest.raises(Exception, match="--trust-remote-code") as caught:
        load(plain)
    assert caught.type.__name__ in ("TemplateError", "CheckpointError")
