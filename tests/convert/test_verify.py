"""Two checkpoints compared, of either format: the tensors that differ, by name, and how."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from miles.convert.hf_to_megatron import hf_to_megatron
from miles.convert.verify import Comparison, verify
from miles.errors import CheckpointError
from tests.support.models import make_hf

KEYS = "model.layers.2.self_attn.k_proj.weight"
UP = "model.layers.3.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make two models in both formats: in `other` one key and one up projection differ."""
    folder = tmp_path_factory.mktemp("verify")
    make_hf(folder / "one-hf", "qwen3", tied=True)
    shutil.copytree(folder / "one-hf", folder / "other-hf")
    tensors = load_file(folder / "other-hf/model.safetensors")
    tensors[KEYS][5, 7] += 0.5
    tensors[UP][0, 0] *= -1
    save_file(tensors, folder / "other-hf/model.safetensors", {"format": "pt"})
    for name in ("one", "other"):
        hf_to_megatron(str(folder / f"{name}-hf"), str(folder / f"{name}-megatron"))
    return folder


def texts(comparison: Comparison) -> dict[str, str]:
    return {difference.tensor: difference.text for difference in comparison.differences}


def test_rows_of_padding_do_not_count(made: Path, tmp_path: Path) -> None:
    padded = str(tmp_path / "padded")
    hf_to_megatron(str(made / "one-hf"), padded, make_vocab_size_divisible_by=1000)
    plain = str(made / "one-megatron")
    for pair in ((plain, padded), (padded, plain), (padded, padded)):
        assert not verify(*pair).differences
    assert len(texts(verify(padded, str(made / "other-megatron")))) == 2


@pytest.mark.parametrize("a", ["hf", "megatron"])
@pytest.mark.parametrize("b", ["hf", "megatron"])
def test_of_either_format(made: Path, a: str, b: str) -> None:
    same = verify(str(made / f"one-{a}"), str(made / f"one-{b}"))
    assert not same.differences
    if {a, b} == {"megatron"}:
        assert same.num_tensors == 10
        names = [
            "decoder.layers.mlp.linear_fc1.weight at [3, 0, 0]",
            "decoder.layers.self_attention.linear_qkv.weight at [2, 0, 0]",
        ]
    else:
        assert same.num_tensors == len(load_file(made / "one-hf/model.safetensors"))
        names = [KEYS, UP]
    assert same.num_bytes == sum(
        tensor.nbytes for tensor in load_file(made / "one-hf/model.safetensors").values()
    )
    differing = texts(verify(str(made / f"one-{a}"), str(made / f"other-{b}")))
    assert sorted(differing) == sorted(names)
    assert any(
        "1 of " in text and "values differ, by 0.5 at most" in text for text in differing.values()
    )


def edited(made: Path, target: Path, change: Any) -> str:
    shutil.copytree(made / "one-hf", target)
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return str(target)


def test_how_they_differ(made: Path, tmp_path: Path) -> None:
    one, megatron = str(made / "one-hf"), str(made / "one-megatron")
    cases: list[tuple[Any, str, str]] = [
        (lambda t: t.pop(KEYS), KEYS, "only in "),
        (lambda t: t.update(odd=torch.ones(1)), "odd", "only in "),
        (lambda t: t.update({KEYS: t[KEYS].t().contiguous()}), KEYS, "shape (32, 64) and (64, 32)"),
        (
            lambda t: t.update({KEYS: t[KEYS].double()}),
            KEYS,
            "dtype torch.float32 and torch.float64, with equal values",
        ),
        (
            lambda t: t.update({KEYS: t[KEYS].bfloat16()}),
            KEYS,
            "dtype torch.float32 and torch.bfloat16",
        ),
        (lambda t: t[UP].zero_(), UP, "8,192 of 8,192 values differ, by "),
        (
            lambda t: t[UP].view(-1)[:1].fill_(float("nan")),
            UP,
            "1 of 8,192 values differ, by nan at most",
        ),
    ]
    for number, (change, name, text) in enumerate(cases):
        other = edited(made, tmp_path / str(number), change)
        for first in (one, megatron):
            found = texts(verify(first, other))
            assert list(found) == [name], (number, first)
            assert found[name].startswith(text), (number, first)
    nans = edited(made, tmp_path / "nan", lambda t: t[UP].fill_(float("nan")))
    assert not verify(nans, nans).differences  # bit by bit: a NaN is the same as itself
    zeros = edited(made, tmp_path / "zero", lambda t: t[UP].zero_())
    minus = edited(made, tmp_path / "minus", lambda t: t[UP].zero_().neg_())
    assert list(texts(verify(zeros, minus))) == [UP]  # and 0.0 is not -0.0


def test_what_cannot_be_compared(made: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        CheckpointError, match=r"empty: neither a Megatron checkpoint .* nor one of Hugging Face"
    ):
        verify(str(tmp_path / "empty"), str(made / "one-hf"))
    make_hf(tmp_path / "untied", "qwen3", tied=False)
    with pytest.raises(
        CheckpointError,
        match="of different models: untie_embeddings_and_output_weights is False in",
    ):
        verify(str(tmp_path / "untied"), str(made / "one-megatron"))


def test_the_command_exits_with_one(made: Path) -> None:
    def run(*words: str) -> subprocess.CompletedProcess[str]:
        line = [
            sys.executable,
            "-m",
            "miles.cli",
            "convert",
            "verify",
            *(str(made / word) for word in words),
        ]
        return subprocess.run(line, capture_output=True, text=True)

    same = run("one-hf", "one-megatron")
    assert same.returncode == 0
    assert "46 tensors, 641,792 bytes: the same in both, bit by bit" in same.stdout
    other = run("one-megatron", "other-hf")
    assert other.returncode == 1
    assert f"{KEYS}: 1 of 2,048 values differ, by 0.5 at most" in other.stdout
    assert f"{UP}: 1 of 8,192 values differ" in other.stdout
    assert "miles: error: 2 of 46 tensors differ" in other.stderr
