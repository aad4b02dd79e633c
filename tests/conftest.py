"""Fixtures that several rooms share: a small tokenizer, a bucket, real assets where they are."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.chatml import save_chatml_tokenizer
from tests.support.object_storage import s3_bucket

PROJECT = Path(__file__).parent.parent


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the cache out of the user's home, here and in the processes that Ray starts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MILES_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of an empty bucket on an S3 server on loopback."""
    with s3_bucket(monkeypatch) as url:
        yield url


@pytest.fixture(scope="session")
def assets() -> Path:
    """The folder of real tokenizers and rows (`MILES_ASSETS`)."""
    path = Path(os.environ.get("MILES_ASSETS", PROJECT.parent / "shared" / "assets"))
    if not path.is_dir():
        pytest.skip(f"real assets are not at {path}; name their folder in MILES_ASSETS")
    return path


@pytest.fixture(scope="session")
def chatml_tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small byte-level BPE tokenizer with ChatML and Qwen3's special tokens."""
    folder = tmp_path_factory.mktemp("chatml") / "tokenizer"
    save_chatml_tokenizer(folder)
    return folder


@pytest.fixture
def chatml_tokenizer(chatml_tokenizer_folder: Path) -> Any:
    """The small tokenizer, loaded anew for each test, which may change it."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(chatml_tokenizer_folder)
