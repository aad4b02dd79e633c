"""The tiny Qwen3: its shape, its weights, the tokenizer beside it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3ForCausalLM

from miles.architecture.families import read_shape
from miles.demo.model import TinySizes, build_model, build_tiny_qwen3
from miles.errors import ConfigError, SourceError, TemplateError

TALK = [
    {"role": "user", "content": "Why is the sky blue?"},
    {"role": "assistant", "content": "Air scatters it."},
]


def loss_and_logits(folder: Path) -> tuple[float, torch.Tensor]:
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    assert isinstance(model, Qwen3ForCausalLM)
    ids = torch.tensor([tokenizer.apply_chat_template(TALK, tokenize=True, return_dict=False)])
    with torch.no_grad():
        output = model(ids, labels=ids)
    return output.loss.item(), output.logits


def test_fresh_model_knows_nothing(model_folder):
    loss, logits = loss_and_logits(model_folder)
    assert torch.isfinite(logits).all()
    assert logits.dtype == torch.float32
    assert logits.shape[-1] == 2048
    assert loss == pytest.approx(math.log(2048), rel=0.02)


def test_shape_is_understood_by_the_project(model_folder):
    shape = read_shape(str(model_folder))
    assert (shape.num_layers, shape.hidden_size, shape.ffn_hidden_size) == (4, 128, 384)
    assert (shape.num_attention_heads, shape.num_query_groups, shape.kv_channels) == (4, 2, 32)
    assert shape.vocab_size == 2048
    assert shape.rotary_base == 1_000_000
    assert shape.max_position_embeddings == 2048
    assert shape.tied_embeddings
    assert shape.qk_layernorm


def test_weights_are_float32_and_tied(model_folder):
    weights = load_file(model_folder / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    assert "lm_head.weight" not in weights
    assert "model.layers.3.self_attn.q_norm.weight" in weights
    assert weights["model.embed_tokens.weight"].shape == (2048, 128)


def test_stops_at_the_end_of_a_turn(model_folder):
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    generation = json.loads((model_folder / "generation_config.json").read_text())
    assert generation["eos_token_id"] == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert generation["pad_token_id"] == tokenizer.convert_tokens_to_ids("<|endoftext|>")


def test_the_seed_fixes_the_weights(tokenizer_folder, model_folder, tmp_path):
    torch.manual_seed(7)
    before = torch.get_rng_state()
    build_model(tokenizer_folder, tmp_path / "same")
    assert torch.equal(before, torch.get_rng_state())
    build_model(tokenizer_folder, tmp_path / "other", seed=1)
    first, same, other = (
        load_file(folder / "model.safetensors")
        for folder in (model_folder, tmp_path / "same", tmp_path / "other")
    )
    assert all(torch.equal(first[name], same[name]) for name in first)
    matrices = [name for name in first if first[name].ndim == 2]
    assert not any(torch.equal(first[name], other[name]) for name in matrices)


def test_vocabulary_is_padded_and_can_be_chosen(tokenizer_folder, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    build_model(tmp_path / "tokenizer", tmp_path / "padded", sizes=TinySizes(num_layers=1))
    assert read_shape(str(tmp_path / "padded")).vocab_size == 2112
    build_model(
        tokenizer_folder, tmp_path / "chosen", sizes=TinySizes(vocab_size=3000, num_layers=1)
    )
    assert read_shape(str(tmp_path / "chosen")).vocab_size == 3000
    with pytest.raises(ConfigError, match="2047 is smaller than the 2048 tokens"):
        build_model(tokenizer_folder, tmp_path / "refused", sizes=TinySizes(vocab_size=2047))


def test_can_be_written_beside_its_tokenizer(tokenizer_folder, tmp_path):
    build_model(tokenizer_folder, tmp_path, sizes=TinySizes(num_layers=1))
    build_model(tmp_path, tmp_path, sizes=TinySizes(num_layers=1))
    assert math.isfinite(loss_and_logits(tmp_path)[0])


def test_a_wrong_tokenizer_folder_is_named(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(TemplateError, match="empty"):
        build_tiny_qwen3(str(tmp_path / "empty"), str(tmp_path / "out"))
    (tmp_path / "corrupt").mkdir()
    (tmp_path / "corrupt" / "tokenizer.json").write_text("{}")
    (tmp_path / "corrupt" / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast"}'
    )
    with pytest.raises(TemplateError, match="corrupt"):
        build_tiny_qwen3(str(tmp_path / "corrupt"), str(tmp_path / "out"))
    with pytest.raises(SourceError, match="nowhere"):
        build_tiny_qwen3(str(tmp_path / "nowhere"), str(tmp_path / "out"))


def test_remote_folders(tokenizer_folder):
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.put(f"{tokenizer_folder}/", "/demo-model/tokenizer", recursive=True)
    build_tiny_qwen3("memory://demo-model/tokenizer", "memory://demo-model/out")
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= {
        name.rsplit("/", 1)[-1] for name in memory.ls("/demo-model/out", detail=False)
    }
    memory.rm("/demo-model", recursive=True)


def test_full_vocabulary_of_qwen3(assets, tmp_path):
    build_tiny_qwen3(str(assets / "qwen3-tokenizer"), str(tmp_path))
    shape = read_shape(str(tmp_path))
    assert shape.vocab_size == 151_680  # 151,669 tokens, rounded up to a multiple of 64
    loss, logits = loss_and_logits(tmp_path)
    assert torch.isfinite(logits).all()
    assert loss == pytest.approx(math.log(151_680), rel=0.02)
