"""The words of --prompt-data: names and paths, and two files one behind the other."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from miles.data.file_formats import FORMATS
from miles.data.notebook.recipe import require_source
from miles.data.source_names import is_path, name_of, named_paths, splits_for
from miles.errors import ConfigError
from tests.support.fault_table import NOTHING, observed
from tests.support.row_folders import fill, taken


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("rows/chat.v2.jsonl", "chat"),
        ("s3://bucket/chat/", "chat"),
        ("rows[v2].jsonl", "rows[v2]"),
        (".", "data"),
        ("data/*.jsonl", "data"),
        ("data/chat-*.jsonl", "chat"),
        ("data/**/*.parquet", "data"),
        ("s3://bucket/*.jsonl", "bucket"),
        ("s3://*/x*", "x"),
        ("s3://*", "data"),
        ("*.jsonl", "data"),
        ("?.jsonl", "data"),
    ],
)
def test_a_source_is_named_by_its_path(path: str, name: str) -> None:
    assert name_of(path) == name
    assert named_paths("--prompt-data", [path]) == [(name, path)]


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_file_is_no_name(suffix: str) -> None:
    assert is_path(f"a{suffix}")
    assert is_path(f"A{suffix.upper()}")


@pytest.mark.parametrize("flag", ["--prompt-data", "--eval-prompt-data"])
@pytest.mark.parametrize("words", ["a.jsonl b.jsonl", "a.jsonl b.jsonl c.jsonl", "d/x d/y", "~ b"])
def test_two_files_are_no_name_and_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flag: str, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    if "jsonl" in words:
        fill(tmp_path, words)
    with pytest.raises(ConfigError) as caught:
        named_paths(flag, words.split())
    message = str(caught.value)
    first, second, *_more = words.split()
    assert message.startswith(f"{flag} {shlex.join([first, second])}")
    assert "where the name of a source belongs" in message
    if flag == "--prompt-data" and words == "a.jsonl b.jsonl":
        observed("two files behind `--prompt-data`", message, flag, NOTHING)
    # Both lines to type are taken.
    pairs = message.split(f"name each: {flag} ")[1].split(". For files")[0].removesuffix(" …")
    assert [path for _, path in named_paths(flag, shlex.split(pairs))] == [first, second]
    if "jsonl" in words:
        (pattern,) = shlex.split(message.split(f"in quotes: {flag} ")[1])
        assert named_paths(flag, [pattern])
        assert taken(tmp_path / pattern, tmp_path) == words.split()
    else:
        assert message.endswith("put them into a folder of their own, and give that")


@pytest.mark.parametrize("words", ["x/a.jsonl y/b.jsonl", "x/a.jsonl x/c.parquet", "y/b.jsonl y/b"])
def test_no_pattern_is_proposed_that_takes_other_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str
) -> None:
    """Neither one that misses the second file, nor one that takes a third."""
    monkeypatch.chdir(tmp_path)
    fill(tmp_path, f"{words} x/more.jsonl")
    for line in (words, "x/a.jsonl x/more.jsonl x/a.jsonl"):
        fill(tmp_path, "x/third.jsonl")
        with pytest.raises(ConfigError) as caught:
            named_paths("--prompt-data", line.split())
        assert "*" not in str(caught.value)
        assert "name each: --prompt-data" in str(caught.value)


def test_a_name_that_is_a_path_here_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("chat", "code"):
        (tmp_path / name).mkdir()
    with pytest.raises(ConfigError) as caught:
        named_paths("--prompt-data", ["chat", "code"])
    assert "name each: --prompt-data chat chat code code." in str(caught.value)
    assert "If chat is the name for code, type the line in a folder that" in str(caught.value)
    # The path says by itself that the name is meant.
    pairs = [("chat", "x/chat.jsonl"), ("code", "code/rows.jsonl"), ("more", "chat")]
    words = [word for pair in pairs for word in pair]
    assert named_paths("--prompt-data", words) == pairs


def test_prepare_takes_no_path_for_a_name() -> None:
    def line(name: str, path: str) -> str:
        return f"prepare({name!r}, source={path!r})"

    for source in ("b.jsonl", ["b.jsonl", "c.jsonl"]):
        with pytest.raises(ConfigError) as caught:
            require_source("x/a.jsonl", source, line)
        assert "prepare('b', source='b.jsonl')" in str(caught.value)
        assert "a further file of the same rows" in str(caught.value)
    for name in ("chat", "v2.5", "*"):
        require_source(name, "b.jsonl", line)


def test_splits_are_one_for_all_or_one_each() -> None:
    assert splits_for((), 2) == [None, None]
    assert splits_for(("train",), 2) == ["train", "train"]
    assert splits_for(("train", "all"), 2) == ["train", "all"]
    with pytest.raises(ConfigError, match="--split gives 3 words for 2 sources: give one"):
        splits_for(("a", "b", "c"), 2)
