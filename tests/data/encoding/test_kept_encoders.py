"""An encoder of an earlier start is used again, and only where everything is as it was."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from miles.common import cache_files, storage
from miles.data.config import EncodeConfig
from miles.data.encoding import carried_state, kept_encoders, state_cache
from miles.data.encoding.encoder import Encoder
from miles.data.encoding.kept_encoders import encoder_of, known, state_of
from miles.data.tokens import bpe, load
from miles.data.tokens.bpe_proof import Inexact
from miles.data.tokens.carried_tokenizer import CarriedTokenizer
from miles.data.types import Conversation
from miles.errors import TemplateError
from tests.support.chatml import CHATML

ROW = Conversation(
    ({"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}), None, (None, None)
)


@pytest.fixture
def config(
    chatml_tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> EncodeConfig:
    """A tokenizer of the test's own, and an empty cache."""
    monkeypatch.setenv("MILES_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(kept_encoders, "_kept", {})
    folder = shutil.copytree(chatml_tokenizer_folder, tmp_path / "tokenizer")
    return EncodeConfig(str(folder))


def next_start(config: EncodeConfig) -> Encoder:
    """Return the encoder that a new process would have."""
    kept_encoders._kept.clear()
    return encoder_of(config)


def is_of_cache(encoder: Encoder) -> bool:
    return isinstance(encoder.tokenizer, CarriedTokenizer)


def cache_file(tmp_path: Path) -> Path:
    (file,) = (tmp_path / "cache" / f"encoders-{os.geteuid()}").iterdir()
    return file


def test_the_next_start_certifies_nothing(
    config: EncodeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert known(config) is None
    first = encoder_of(config)
    assert encoder_of(config) is first
    assert known(config) is first
    state = state_of(config)

    monkeypatch.setattr(Encoder, "from_config", lambda config: pytest.fail("certified again"))
    second = next_start(config)
    assert is_of_cache(second)
    assert state_of(config) == state, "loaders get what the earlier start packed"
    assert second.certificate == first.certificate
    assert second.encode(ROW).input_ids.tolist() == first.encode(ROW).input_ids.tolist()
    kept_encoders._kept.clear()
    assert is_of_cache(known(config) or first)


def test_what_is_otherwise_is_certified_anew(
    config: EncodeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder_of(config)
    assert is_of_cache(next_start(config))
    for changed in (
        replace(config, turns="last"),
        replace(config, chat_template=CHATML + " "),
        replace(config, template_kwargs={"enable_thinking": False}),
    ):
        assert not is_of_cache(next_start(changed))
        assert is_of_cache(next_start(changed))

    versions = {**carried_state.versions(), "transformers": "4.0"}
    with monkeypatch.context() as patch:
        patch.setattr(carried_state, "versions", lambda: versions)
        assert not is_of_cache(next_start(config))
    assert is_of_cache(next_start(config))


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "chat_template.jinja", "generation_config.json"]
)
def test_other_files_are_another_tokenizer(config: EncodeConfig, name: str) -> None:
    encoder_of(config)
    file = Path(config.tokenizer, name)
    before = file.stat() if file.exists() else None
    text = file.read_text() if before else "{}"
    file.write_text(text.replace("<tool_call>", "<toolcalls>") + " ")
    if before:  # not even its time tells that it is another one
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert not is_of_cache(next_start(config))


def test_a_tokenizer_that_changes_while_it_is_loaded_is_not_kept(
    config: EncodeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from_folder = load._from_folder

    def slowly(folder: str, *given: Any) -> Any:
        tokenizer = from_folder(folder, *given)
        Path(folder, "chat_template.jinja").write_text(CHATML + " ")
        return tokenizer

    monkeypatch.setattr(load, "_from_folder", slowly)
    encoder_of(config)
    assert not (tmp_path / "cache").exists()


def test_a_tokenizer_that_changed_since_it_was_loaded_is_not_kept(
    config: EncodeConfig, tmp_path: Path
) -> None:
    """This process keeps the tokenizer by the file's size and time, which can be the same."""
    load.load_tokenizer(config)
    file = Path(config.tokenizer, "chat_template.jinja")
    before = file.stat()
    file.write_text(file.read_text().replace("assistant", "ASSISTANT"))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    encoder_of(config)
    assert not (tmp_path / "cache").exists()


def test_a_tampered_state_is_made_anew(config: EncodeConfig, tmp_path: Path) -> None:
    first = encoder_of(config)
    file = cache_file(tmp_path)
    content = file.read_bytes()
    key = file.stem
    states = (
        b"no arrays",
        content[:-9],
        # Right by its hash, and of other settings: a file that was given another's name.
        carried_state.pack(Encoder.from_config(replace(config, turns="last"))),
    )
    for state in states:
        assert state is not None
        cache_files.write(state_cache.KIND, key, state, 8)
        again = next_start(config)
        assert not is_of_cache(again)
        assert again.certificate == first.certificate
        assert is_of_cache(next_start(config)), "it was written anew"


class Runs:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("name", ["header", "definition", "token_ids"])
def test_nothing_in_the_cache_can_run(config: EncodeConfig, tmp_path: Path, name: str) -> None:
    encoder_of(config)
    state = state_of(config)
    assert state is not None
    arrays = dict(np.load(io.BytesIO(state)))
    arrays[name] = np.array([Runs(tmp_path / "ran")], object)
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    cache_files.write(state_cache.KIND, cache_file(tmp_path).stem, buffer.getvalue(), 8)

    encoder = next_start(config)
    with contextlib.suppress(ValueError):
        encoder.tokenizer.get_vocab()
    assert not (tmp_path / "ran").exists()


def test_without_a_cache_all_is_as_before(
    config: EncodeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MILES_CACHE", "")
    encoder_of(config)
    assert not is_of_cache(next_start(config))
    assert state_of(config) is not None, "loaders get it nevertheless"
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer"]


def test_code_of_a_tokenizer_is_not_cached(config: EncodeConfig, tmp_path: Path) -> None:
    trusting = replace(config, trust_remote_code=True)
    encoder_of(trusting)
    assert not is_of_cache(next_start(trusting))
    assert state_of(trusting) is None
    assert not (tmp_path / "cache").exists()


def test_a_remote_tokenizer_is_known_by_its_content(config: EncodeConfig) -> None:
    remote = replace(config, tokenizer="memory://kept/tokenizer")
    for file in Path(config.tokenizer).iterdir():
        storage.write_bytes(f"{remote.tokenizer}/{file.name}", file.read_bytes())
    encoder_of(remote)
    assert is_of_cache(next_start(remote))
    storage.write_text(f"{remote.tokenizer}/chat_template.jinja", CHATML + " ")
    assert not is_of_cache(next_start(remote))


def test_a_name_of_the_hub_means_its_cached_files(
    config: EncodeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub))
    monkeypatch.setattr("huggingface_hub.file_download.HF_HUB_CACHE", str(hub), raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    named = replace(config, tokenizer="ada/small")
    assert state_cache.key_of(named) is None

    def show(commit: str) -> Path:
        """Have the hub's cache say that the name means this commit."""
        repository = hub / "models--ada--small"
        (repository / "refs").mkdir(parents=True, exist_ok=True)
        for name in ("config.json", "adapter_config.json", "processor_config.json"):
            absent = repository / ".no_exist" / commit / name  # as the hub has said
            absent.parent.mkdir(parents=True, exist_ok=True)
            absent.touch()
        (repository / "refs/main").write_text(commit)
        return repository / "snapshots" / commit

    shutil.copytree(config.tokenizer, show("a" * 40))
    first = state_cache.key_of(named)
    assert not is_of_cache(next_start(named))
    assert is_of_cache(next_start(named))
    newer = shutil.copytree(config.tokenizer, show("b" * 40))
    (newer / "chat_template.jinja").write_text(CHATML + " ")
    second = state_cache.key_of(named)
    assert second not in (first, None)
    assert not is_of_cache(next_start(named))
    assert cache_file(tmp_path).stem == first, "this process still has the older tokenizer"


def test_a_tokenizer_that_is_gone_is_refused(config: EncodeConfig) -> None:
    encoder_of(config)
    shutil.rmtree(config.tokenizer)
    with pytest.raises(TemplateError, match="no such folder"):
        next_start(config)


def test_few_rows_begin_with_tiktoken(
    config: EncodeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is certified for them gives the faster engine the state that it would have anyway."""
    first = kept_encoders.first_engine(config)
    assert first == replace(config, tokenizer_engine="tiktoken")
    assert known(config) is None
    assert known(first) is not None

    whole = carried_state.pack(Encoder.from_config(config))
    monkeypatch.setattr(Encoder, "from_config", lambda config: pytest.fail("certified again"))
    assert state_of(config) == whole
    assert is_of_cache(next_start(config)), "it is kept in the cache, too"
    assert kept_encoders.first_engine(config) == config, "the next start has the faster one"
    assert encoder_of(config).encode(ROW).input_ids.tolist()


def test_a_later_start_makes_the_faster_engine_of_the_first(
    config: EncodeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept_encoders.first_engine(config)
    monkeypatch.setattr(Encoder, "from_config", lambda config: pytest.fail("certified again"))
    assert next_start(config).certificate.engine.startswith(("fastokens", "tiktoken, not"))
    assert is_of_cache(next_start(config))

    Path(config.tokenizer, "chat_template.jinja").write_text(CHATML + " ")
    with pytest.raises(pytest.fail.Exception):  # other files: nothing of the first serves them
        next_start(config)


def test_the_settings_stay_where_tiktoken_is_not_proven(
    config: EncodeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise Inexact("it has another expression")

    monkeypatch.setattr(bpe, "prove", refuse)
    monkeypatch.setattr(bpe, "_encoders", {})
    assert kept_encoders.first_engine(config) == config
    assert encoder_of(config).certificate.engine == "tokenizers: it has another expression"
    by_name = replace(config, tokenizer_engine="tokenizers")
    assert kept_encoders.first_engine(by_name) == by_name
