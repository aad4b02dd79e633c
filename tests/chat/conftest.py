"""A small model, and the folders of two runs of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.trained import make_lora_run, make_model, make_run


@pytest.fixture(scope="session")
def small_model(chatml_tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder with a tiny Qwen3 and a tokenizer."""
    return make_model(chatml_tokenizer_folder, tmp_path_factory.mktemp("small") / "hf")


@pytest.fixture(scope="session")
def small_run(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of seven steps, whose weights are those of the model."""
    return make_run(small_model, tmp_path_factory.mktemp("small") / "run")


@pytest.fixture(scope="session")
def small_lora_run(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a LoRA run of seven steps."""
    return make_lora_run(small_model, tmp_path_factory.mktemp("small") / "lora")
