"""Paths as they are typed -> absolute ones."""

from __future__ import annotations

from pathlib import Path

import pytest
from fsspec.implementations.local import LocalFileSystem

from miles.common import storage
from miles.common.local_paths import absolute, absolute_or_hub_name
from miles.errors import ConfigError


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("rows.jsonl", "{here}/rows.jsonl"),
        ("./rows.jsonl", "{here}/rows.jsonl"),
        (".//./run/", "{here}/run"),
        (".", "{here}"),
        ("../run", "{here}/../run"),
        ("~/run", "/home/me/run"),
        ("/x/run//", "/x/run"),
        ("/", "/"),
        ("", ""),
        ("file:///x/run", "/x/run"),
        ("file://x/run", "{here}/x/run"),
        ("a::b", "{here}/a::b"),
        ("data:x", "{here}/data:x"),
        ("run:1/[v2] #50%?*", "{here}/run:1/[v2] #50%?*"),
        ("-x", "{here}/-x"),
        ("s3://b/x/", "s3://b/x/"),
        ("memory://x", "memory://x"),
        ("zip://a.jsonl::s3://b/x.zip", "zip://a.jsonl::s3://b/x.zip"),
        ("simplecache::s3://b/x", "simplecache::s3://b/x"),
    ],
)
def test_a_local_path_becomes_absolute(
    typed: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    path = absolute(typed)
    assert path == expected.format(here=tmp_path)
    assert absolute(path) == path
    if path.startswith("/"):
        assert storage.filesystem(path) == (LocalFileSystem(), path), "no part of a URL in it"


def test_a_folder_goes_before_a_name_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert absolute_or_hub_name("Qwen/Qwen3-4B") == "Qwen/Qwen3-4B"
    assert absolute_or_hub_name("./Qwen/Qwen3-4B") == f"{tmp_path}/Qwen/Qwen3-4B"
    (tmp_path / "Qwen/Qwen3-4B").mkdir(parents=True)
    assert absolute_or_hub_name("Qwen/Qwen3-4B") == f"{tmp_path}/Qwen/Qwen3-4B"


def test_a_url_with_one_slash_is_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="two slashes behind the colon: s3://bucket/run"):
        absolute("s3:/bucket/run")
    (tmp_path / "s3:/bucket/run").mkdir(parents=True)
    assert absolute("s3:/bucket/run") == f"{tmp_path}/s3:/bucket/run"


@pytest.mark.parametrize("typed", ["${RUNS}/a", "$HOME/a", "$RUN", "s3://${BUCKET}/a", "a/${b}/c"])
def test_a_variable_that_no_shell_replaced_is_no_name(typed: str) -> None:
    with pytest.raises(ConfigError, match="only a shell replaces variables; write its value"):
        absolute(typed)


def test_a_dollar_in_a_name_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for typed in ("a/$b", "a$b", "$5", "{x}"):
        assert absolute(typed) == f"{tmp_path}/{typed}"
    (tmp_path / "$Recycle").mkdir()
    assert absolute("$Recycle") == f"{tmp_path}/$Recycle"
