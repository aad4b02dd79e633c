"""Paths are URLs: the same code on the local disk and against a real S3 API server."""

from __future__ import annotations

from pathlib import Path

import pytest

from miles.common import storage
from miles.common.patterns import expand
from miles.data.config import DataConfig, EncodeConfig, OrderConfig, PackConfig, SourceConfig
from miles.data.files.manifest import build_manifest
from miles.data.stream import stages
from miles.demo import rows
from miles.demo.model import build_model
from miles.demo.tokenizer import build_tokenizer
from miles.errors import SourceError
from tests.support.fault_table import NOTHING, observed


def test_rows_tokenizer_and_checkpoint_on_object_storage(bucket: str, tmp_path: Path) -> None:
    from miles.convert.hf_to_megatron import hf_to_megatron
    from miles.convert.megatron_to_hf import megatron_to_hf

    build_tokenizer(rows.texts(), tmp_path / "tokenizer")
    build_model(tmp_path / "tokenizer", tmp_path / "hf")
    storage.upload_folder(tmp_path / "hf", f"{bucket}/hf", last="config.json")
    rows.copy_rows(tmp_path / "rows")
    storage.upload_folder(tmp_path / "rows", f"{bucket}/rows", last="code.jsonl")

    def first(source: str, tokenizer: str) -> str:
        config = DataConfig(
            (SourceConfig("rows", (source,)),),
            OrderConfig(batch_size=16, shuffle=True),
            EncodeConfig(tokenizer, max_sample_tokens=512),
            PackConfig(1, 512),
        )
        return next(stages.local_steps(build_manifest(config.sources), config)).fingerprint

    here = first(str(tmp_path / "rows"), str(tmp_path / "hf"))
    assert (
        first(f"{bucket}/rows", f"{bucket}/hf")
        == first(f"{bucket}/rows/*.jsonl", f"{bucket}/hf")
        == here
    )
    hf_to_megatron(f"{bucket}/hf", f"{bucket}/megatron")
    assert storage.read_text(f"{bucket}/megatron/latest_checkpointed_iteration.txt") == "release"
    megatron_to_hf(f"{bucket}/megatron", f"{bucket}/hf", f"{bucket}/back")
    assert (
        storage.read_bytes(f"{bucket}/back/model.safetensors")
        == (tmp_path / "hf/model.safetensors").read_bytes()
    )


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"nowhere.*no such file"):
        expand(str(tmp_path / "nowhere"), (".parquet",))
    with pytest.raises(SourceError, match="cannot be opened"):
        storage.filesystem("nonsense://x")


def test_text_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    storage.write_text(str(tmp_path / "deep/file.txt"), "one")
    storage.write_text(str(tmp_path / "deep/file.txt"), "two")
    assert storage.read_text(f"file://{tmp_path}/deep/file.txt") == "two"
    assert [file.name for file in (tmp_path / "deep").iterdir()] == ["file.txt"]


def test_a_name_goes_before_a_pattern(tmp_path: Path) -> None:
    for name in ("run[1]/data[v2].jsonl", "run[1]/datav.jsonl", "run[1]/x*", "run1/datav.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")

    def files_of(path: str) -> list[str]:
        files = expand(str(tmp_path / path), (".jsonl",))
        return [str(Path(file).relative_to(tmp_path)) for file in files]

    assert files_of("run[1]/data[v2].jsonl") == ["run[1]/data[v2].jsonl"]
    observed("file with the name of a pattern, `rows[v2].jsonl`", "", "", NOTHING)
    assert files_of("run[1]/data[v].jsonl") == ["run[1]/datav.jsonl"]
    assert files_of("run[1]") == ["run[1]/data[v2].jsonl", "run[1]/datav.jsonl"]
    assert files_of("run[1]/*.jsonl") == ["run[1]/data[v2].jsonl", "run[1]/datav.jsonl"]
    assert files_of("run[1]/x*") == ["run[1]/x*"]
    assert files_of("run[12]/d*v.jsonl") == ["run1/datav.jsonl"]
    assert files_of("**/datav.jsonl") == ["run1/datav.jsonl", "run[1]/datav.jsonl"]
    with pytest.raises(SourceError, match=r"run\[1\]/y\*: no such file"):
        files_of("run[1]/y*")


def test_a_remote_name_with_brackets_is_removed_alone(bucket: str) -> None:
    for name in ("run[1]/a", "run[1]/b/c", "run1/a"):
        storage.write_text(f"{bucket}/{name}", "x")
    storage.remove(f"{bucket}/run[1]/a")
    assert not storage.exists(f"{bucket}/run[1]/a")
    assert storage.exists(f"{bucket}/run1/a")
    storage.remove(f"{bucket}/run[1]")
    assert not storage.exists(f"{bucket}/run[1]")
    assert expand(f"{bucket}/run[1]/*", (".jsonl",)) == [f"{bucket}/run1/a"]


def test_a_name_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a\udcff.jsonl").write_text("{}")
    with pytest.raises(SourceError, match=r"a\\udcff.jsonl': its name is not UTF-8"):
        expand(str(tmp_path), (".jsonl",))
