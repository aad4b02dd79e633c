"""The demo's tokenizer and model, built once for these tests."""

from pathlib import Path

import pytest

from miles.demo import rows
from miles.demo.model import build_model
from miles.demo.tokenizer import build_tokenizer


@pytest.fixture(scope="package")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer(rows.texts(), folder)
    return folder


@pytest.fixture(scope="package")
def model_folder(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    build_model(tokenizer_folder, folder)
    return folder
