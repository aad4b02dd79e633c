"""Footers and scans become row groups; ids, locations and fingerprints."""

from __future__ import annotations

import gzip
import json
import os
import re
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from fsspec.implementations.memory import MemoryFileSystem

from miles.data.config import RowFormat, SourceConfig
from miles.data.files.file import describe_file
from miles.data.files.manifest import Manifest, build_manifest
from miles.data.files.read import read_rows
from miles.data.files.row_shapes import FIRST_ROWS
from miles.data.rows.normalize import normalize
from miles.errors import SourceError

NUMBERS = RowFormat("text", {"text": "i"})
"""Of rows that are only counted."""


def write_parquet(path: Path, num_rows: int, group_rows: int = 1_000) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"i": list(range(num_rows))}), path, row_group_size=group_rows)
    return path


def write_lines(path: Path, num_rows: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"i": i}) + "\n" for i in range(num_rows)))
    return path


@pytest.fixture
def mixture(tmp_path: Path) -> list[SourceConfig]:
    """Sources of 7 and 8 rows: groups of 3 2 | 2, then none, 3, 5."""
    write_parquet(tmp_path / "a/1.parquet", 5, group_rows=3)
    write_parquet(tmp_path / "a/2.parquet", 2)
    write_lines(tmp_path / "b/empty.jsonl", 0)
    write_lines(tmp_path / "b/lines.jsonl", 3)
    (tmp_path / "b/rows.json").write_text(json.dumps([{"i": i} for i in range(5)]))
    return [
        SourceConfig("a", (str(tmp_path / "a"),), NUMBERS),
        SourceConfig(
            "b",
            (str(tmp_path / "b/*.json*"),),
            RowFormat("messages", {"messages": "m"}, {"Bot": "assistant"}),
        ),
    ]


def test_row_ids_follow_sources_files_rows(mixture: list[SourceConfig], tmp_path: Path) -> None:
    manifest = build_manifest(mixture)
    assert manifest.num_rows == 15
    assert manifest.source_names == ("a", "b")
    assert manifest.group_starts.tolist() == [0, 3, 5, 7, 10, 15]
    assert manifest.group_starts.dtype == np.int64
    located = [manifest.group_location(group) for group in range(5)]
    assert [(s, Path(f.path).name, i) for s, f, i in located] == [
        (0, "1.parquet", 0),
        (0, "1.parquet", 1),
        (0, "2.parquet", 0),
        (1, "lines.jsonl", 0),
        (1, "rows.json", 0),
    ]
    sources = manifest.source_of(np.array([14, 0, 6, 7]))
    assert sources.tolist() == [1, 0, 0, 1]
    assert sources.dtype == np.int32
    assert manifest.locate(4) == ("a", str(tmp_path / "a/1.parquet"), 4)
    assert manifest.locate(6) == ("a", str(tmp_path / "a/2.parquet"), 1)
    assert manifest.locate(7) == ("b", str(tmp_path / "b/lines.jsonl"), 0)
    assert manifest.locate(14) == ("b", str(tmp_path / "b/rows.json"), 4)


def test_json_round_trip(mixture: list[SourceConfig]) -> None:
    manifest = build_manifest(mixture)
    again = Manifest.from_json(manifest.to_json())
    assert again == manifest
    assert again.fingerprint == manifest.fingerprint
    before = json.loads(manifest.to_json())
    for source in before["sources"]:
        del source["unused_columns"]
    old = Manifest.from_json(json.dumps(before))
    assert old.fingerprint == manifest.fingerprint
    assert old.sources[0].files == manifest.sources[0].files
    odd_shape = manifest.to_json().replace('"shape": "text"', '"shape": "round"')
    for text in ("[]", "{", '{"version": 1}', '{"version": 2}', '{"version": 99}', odd_shape):
        with pytest.raises(SourceError, match=r"m\.json: "):
            Manifest.from_json(text, "m.json")


def test_columns_that_nothing_is_made_of_are_named(tmp_path: Path) -> None:
    """As the first rows have them; one that is null in all of them says nothing."""
    row = {"id": 7, "question": "2+2?", "answer": "4", "text": None, "context": None, "tools": []}
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row | {"score": 1}))
    pq.write_table(pa.Table.from_pylist([row | {"text": "?", "x": 1}]), tmp_path / "b.parquet")
    sources = [
        SourceConfig("a", (str(tmp_path / "a.jsonl"),)),
        SourceConfig("b", (str(tmp_path / "b.parquet"),)),
        SourceConfig("text", (str(tmp_path / "b.parquet"),), RowFormat("text")),
        SourceConfig("named", (str(tmp_path / "b.parquet"),), RowFormat("text", {"text": "x"})),
    ]
    manifest = build_manifest(sources)
    assert [source.unused_columns for source in manifest.sources] == [
        ("id", "score"),
        ("id", "text", "x"),
        ("id", "question", "answer", "tools", "x"),
        ("id", "question", "answer", "text", "tools"),
    ]
    assert Manifest.from_json(manifest.to_json()) == manifest


def test_metadata_is_used_where_it_holds_tools(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    for number, metadata in enumerate(({"x": "1"}, {"tools": "[]"}, '{"tools": []}', "x", None)):
        rows = [{"messages": turns, "metadata": metadata}]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"{number}.parquet")
        (tmp_path / f"{number}.jsonl").write_text(json.dumps(rows[0]))

        expected = ("metadata",) if number in (0, 3) else ()
        for path in (f"{tmp_path}/{number}.parquet", f"{tmp_path}/{number}.jsonl"):
            (source,) = build_manifest([SourceConfig("s", (path,))]).sources
            assert source.unused_columns == expected, path


def test_names_of_columns_in_any_case_and_nested_ones_are_used(tmp_path: Path) -> None:
    row = {"ID": 1, "Question": "?", "extra": {"answer": "!"}, "Blob": b"\xff"}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
    format = RowFormat("prompt_completion", {"prompt": "Question", "completion": "extra.answer"})
    (source,) = build_manifest([SourceConfig("s", (f"{tmp_path}/a.parquet",), format)]).sources
    assert source.unused_columns == ("ID", "Blob")


def test_fingerprint_ignores_the_folder(tmp_path: Path) -> None:
    first = write_lines(tmp_path / "x/rows.jsonl", 3)
    moved = write_lines(tmp_path / "y/rows.jsonl", 3)
    renamed = write_lines(tmp_path / "y/other.jsonl", 3)
    for path in (first, moved, renamed):
        os.utime(path, (1_000, 1_000))

    def fingerprint(path: Path, name: str = "s") -> str:
        return build_manifest([SourceConfig(name, (str(path),), NUMBERS)]).fingerprint

    assert fingerprint(first) == fingerprint(moved)
    assert fingerprint(first) != fingerprint(renamed)
    assert fingerprint(first) != fingerprint(first, name="t")
    before = fingerprint(first)
    os.utime(first, (2_000, 2_000))
    assert fingerprint(first) != before
    write_lines(first, 4)
    os.utime(first, (1_000, 1_000))
    assert fingerprint(first) != before


def test_a_relative_path_gives_the_manifest_of_the_absolute_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So runs that an older version began with one go on, and know their rejects."""
    write_lines(tmp_path / "a/rows.jsonl", 3)
    monkeypatch.chdir(tmp_path / "a")
    whole = build_manifest([SourceConfig("a", (f"{tmp_path}/a/rows.jsonl",), NUMBERS)])
    for path in ("rows.jsonl", "./rows.jsonl", "file://rows.jsonl", "r*.jsonl", "."):
        assert build_manifest([SourceConfig("a", (path,), NUMBERS)]) == whole, path


def test_fingerprint_covers_how_rows_are_read(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", 3)
    formats = (
        NUMBERS,
        RowFormat("text"),
        RowFormat("messages"),
        RowFormat("messages", {"messages": "i"}),
        RowFormat("messages", {"messages": "i"}, {"a": "user"}),
        RowFormat("messages", {}, {"a": "user"}),
    )
    found = [
        build_manifest([SourceConfig("s", (str(path),), format)]).fingerprint for format in formats
    ]
    assert len(set(found)) == len(formats)


CHAT = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]


@pytest.mark.parametrize(
    "name", ["rows.jsonl", "rows.json", "rows.jsonl.gz", "rows.jsonl.zst", "rows.parquet"]
)
def test_first_rows_decide_the_shape(tmp_path: Path, name: str) -> None:
    rows = [
        {"messages": None, "prompt": "a", "completion": "b", "extra": i} for i in range(FIRST_ROWS)
    ]
    rows += [
        {"messages": CHAT, "prompt": None, "completion": None, "extra": i}
        for i in range(2 * FIRST_ROWS)
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path = tmp_path / "data" / name
    path.parent.mkdir()
    if name == "rows.parquet":
        pq.write_table(pa.Table.from_pylist(rows).slice(0, 0), path.parent / "a.parquet")
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        pack = {".gz": gzip.compress, ".zst": zstandard.compress}.get(path.suffix, bytes)
        (path.parent / f"a{name[4:]}").write_bytes(pack(b""))
        path.write_bytes(pack(json.dumps(rows).encode() if name == "rows.json" else lines))
    manifest = build_manifest([SourceConfig("s", (str(path.parent),))])
    (source,) = manifest.sources
    assert source.format == RowFormat("prompt_completion")
    assert source.columns == {"prompt": "prompt", "completion": "completion"}
    assert Manifest.from_json(manifest.to_json()) == manifest
    (payload,) = read_rows(manifest, np.array([3]))
    assert normalize(payload, source.format).messages[0] == {"role": "user", "content": "a"}


def test_unreadable_first_rows_do_not_count(tmp_path: Path) -> None:
    lines = [b"{", b'{"text": "\xff"}', b"[1]", b'{"text": "a"}', b"[" * 100_000]
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join(lines))
    broken = pa.array([b"\xff", b"a"], pa.binary()).cast(pa.string(), safe=False)
    dates = pa.array([0, 2**62], pa.timestamp("us"))  # not looked at, so that it does no harm
    pq.write_table(pa.table({"text": broken, "date": dates}), tmp_path / "rows.parquet")
    for name in ("rows.jsonl", "rows.parquet"):
        (source,) = build_manifest([SourceConfig("s", (str(tmp_path / name),))]).sources
        assert (source.format.shape, source.columns) == ("text", {"text": "text"})


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
def test_unknown_shapes_are_an_error(tmp_path: Path, name: str) -> None:
    (write_lines if name == "rows.jsonl" else write_parquet)(tmp_path / name, 3)
    with pytest.raises(SourceError, match=r"source 'quiet': .* rows have i; expected") as caught:
        build_manifest([SourceConfig("quiet", (str(tmp_path / name),))])
    assert "--row-shape" in str(caught.value)


def test_large_row_groups_are_read_little(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [os.urandom(8_000).hex() for _ in range(1_000)]
    pq.write_table(
        pa.table({"text": texts, "image": texts}),
        tmp_path / "x.parquet",
        use_dictionary=False,
        write_batch_size=16,
    )
    content = (tmp_path / "x.parquet").read_bytes()
    num_bytes = 0

    def counting(fs: MemoryFileSystem, path: str, start: int, end: int) -> bytes:
        nonlocal num_bytes
        num_bytes += end - start
        return content[start:end]

    fs = fsspec.filesystem("memory")
    fs.pipe_file("/large/x.parquet", content)
    monkeypatch.setattr(MemoryFileSystem, "cat_file", counting)
    try:
        (source,) = build_manifest([SourceConfig("s", ("memory://large/x.parquet",))]).sources
    finally:
        monkeypatch.undo()
        fs.rm("/large", recursive=True)
    assert source.columns == {"text": "text"}
    assert 0 < num_bytes < len(content) / 4


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_formats_in_memory(suffix: str) -> None:
    text = b'{"i": 0}\n\n{"i": 1}\n'
    packed = {"": text, ".gz": gzip.compress(text), ".zst": zstandard.compress(text)}[suffix]
    fs = fsspec.filesystem("memory")
    fs.pipe_file(f"/manifest/rows.jsonl{suffix}", packed)
    try:
        (source,) = build_manifest(
            [SourceConfig("m", (f"memory://manifest/*.jsonl{suffix}",), NUMBERS)]
        ).sources
        (file,) = source.files
        assert (file.num_rows, file.format, file.size_bytes) == (2, "jsonl", len(packed))
        assert file.compression == {"": None, ".gz": "gzip", ".zst": "zstd"}[suffix]
        (group,) = file.row_groups
        assert (group.offset_bytes, group.length_bytes) == (0, 18)
    finally:
        fs.rm("/manifest", recursive=True)


def test_parquet_in_memory(tmp_path: Path) -> None:
    fs = fsspec.filesystem("memory")
    fs.pipe_file("/footers/x.parquet", write_parquet(tmp_path / "x.parquet", 2_500).read_bytes())
    try:
        assert [g.num_rows for g in describe_file("memory://footers/x.parquet").row_groups] == [
            1_000,
            1_000,
            500,
        ]
    finally:
        fs.rm("/footers", recursive=True)


def test_many_files_keep_their_order(tmp_path: Path) -> None:
    for i in range(60):
        write_lines(tmp_path / f"{i:02}.jsonl", i % 7 + 1)
    manifest = build_manifest([SourceConfig("s", (str(tmp_path),), NUMBERS)])
    assert [file.num_rows for file in manifest.sources[0].files] == [i % 7 + 1 for i in range(60)]


@pytest.mark.parametrize(
    "content", [b"", b"PAR1", b"PAR1" + b"x" * 100 + b"PAR1", b"no parquet at all" * 10]
)
def test_corrupt_footer(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.parquet"
    path.write_bytes(content)
    with pytest.raises(SourceError, match=r"bad\.parquet: "):
        build_manifest([SourceConfig("s", (str(path),))])


def test_missing_and_empty(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"gone\.parquet"):
        build_manifest([SourceConfig("s", (str(tmp_path / "gone.parquet"),))])
    with pytest.raises(SourceError, match=r"gone\.jsonl: no such file"):
        describe_file(str(tmp_path / "gone.jsonl"))
    (tmp_path / "none.jsonl").write_text("\n  \n")
    with pytest.raises(SourceError, match=r"source 'quiet' has no row: .*none\.jsonl"):
        build_manifest([SourceConfig("quiet", (str(tmp_path / "none.jsonl"),))])


class Forbidden(MemoryFileSystem):
    """A store whose files are there and may not be read."""

    protocol = "forbidden"

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.removeprefix("forbidden://"))

    def cat_file(self, path, start=None, end=None, **kwargs):  # type: ignore[no-untyped-def]
        raise PermissionError(path)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
def test_permission_denied(name: str) -> None:
    fsspec.register_implementation("forbidden", Forbidden, clobber=True)
    fsspec.filesystem("memory").pipe_file(f"/{name}", b"{}\n" * 100)
    try:
        with pytest.raises(SourceError, match=f"{name}: permission denied"):
            build_manifest([SourceConfig("s", (f"forbidden:///{name}",))])
    finally:
        fsspec.filesystem("memory").rm(f"/{name}")


class Opaque(pa.ExtensionType):
    """An extension type that pyarrow does not know unless it is registered."""

    def __init__(self) -> None:
        super().__init__(pa.int64(), "miles.test.opaque")

    def __arrow_ext_serialize__(self) -> bytes:
        return b""

    @classmethod
    def __arrow_ext_deserialize__(cls, storage_type: pa.DataType, serialized: bytes) -> Opaque:
        return cls()


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("registered", [False, True])
def test_extension_types_are_refused(tmp_path: Path, nested: bool, registered: bool) -> None:
    column = pa.ExtensionArray.from_storage(Opaque(), pa.array([1, 2]))
    if nested:
        column = pa.StructArray.from_arrays([column], names=["inner"])
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"plain": [1, 2], "opaque": column}), path)
    if registered:
        pa.register_extension_type(Opaque())
    try:
        with pytest.raises(SourceError, match="column 'opaque' is of an Arrow extension type"):
            describe_file(str(path))
    finally:
        if registered:
            pa.unregister_extension_type("miles.test.opaque")


def write_rows(folder: Path, files: dict[str, dict[str, Any]]) -> str:
    """Write a row into each file of a folder; return the folder's path."""
    folder.mkdir()
    for name, row in files.items():
        if name.endswith(".parquet"):
            pq.write_table(pa.Table.from_pylist([row]), folder / name)
        else:
            (folder / name).write_text(json.dumps(row) + "\n")
    return str(folder)


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_later_file_of_another_shape_is_named(tmp_path: Path, suffix: str) -> None:
    chat = {"messages": CHAT}
    pair = {"Question": "a", "Answer": "b"}
    names = [f"{number}.{suffix}" for number in range(9)]
    files: dict[str, dict[str, Any]] = dict.fromkeys(names, chat)
    path = write_rows(tmp_path / "mixed", {**files, names[8]: pair})
    with pytest.raises(SourceError) as caught:
        build_manifest([SourceConfig("s", (path,))])
    message = str(caught.value)
    assert names[0] in message
    assert f"{names[8]} are prompt_completion (Question, Answer)" in message
    assert "--row-shape messages" in message
    build_manifest([SourceConfig("s", (path,), RowFormat("messages"))])  # drops the others


def test_a_first_file_without_rows_of_a_shape_is_named(tmp_path: Path) -> None:
    files: dict[str, dict[str, Any]] = {
        "a.jsonl": {"splits": {"train": 3}},
        "b.jsonl": {"messages": CHAT},
    }
    with pytest.raises(SourceError) as caught:
        build_manifest([SourceConfig("s", (write_rows(tmp_path / "rows", files),))])
    message = str(caught.value)
    assert "a.jsonl: which columns hold its rows is not clear" in message
    assert "b.jsonl, has rows of the shape messages" in message


def test_files_may_call_their_columns_differently(tmp_path: Path) -> None:
    files: dict[str, dict[str, Any]] = {
        "a.jsonl": {"messages": CHAT},
        "b.jsonl": {"conversations": CHAT, "text": "a"},
        "c.jsonl": {"error": "none"},  # of no shape: its rows are dropped
    }
    path = write_rows(tmp_path / "rows", files)
    (source,) = build_manifest([SourceConfig("s", (path,))]).sources
    assert source.format == RowFormat("messages")


def test_nested_columns_of_parquet_are_found(tmp_path: Path) -> None:
    row = {"id": 1, "Extra": {"question": "a", "answer": "b"}, "log": CHAT}
    for name, flag in (("log", "--input-key log"), ("Extra", '"prompt": "Extra.question"')):
        kept = {key: row[key] for key in ("id", name)}
        path = write_rows(tmp_path / name, {"a.parquet": kept})
        with pytest.raises(SourceError, match=flag):
            build_manifest([SourceConfig("s", (path,))])


def test_turns_beside_a_text_in_parquet_are_seen(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "both", {"a.parquet": {"text": "a", "steps": CHAT}})
    with pytest.raises(SourceError, match="--input-key steps; to train column text alone"):
        build_manifest([SourceConfig("s", (path,))])


def test_a_tree_of_messages_in_parquet_is_no_text(tmp_path: Path) -> None:
    row = {"message_id": "1", "parent_id": None, "text": "Hi", "role": "prompter", "lang": "en"}
    path = write_rows(tmp_path / "tree", {"a.parquet": row})
    with pytest.raises(SourceError, match=r"Each row is one message .*'prompter'"):
        build_manifest([SourceConfig("s", (path,))])


def test_columns_of_unknown_names_are_looked_at_for_the_error(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "pairs", {"a.parquet": {"french": "a", "english": "b", "n": 1}})
    flag = """'{"prompt": "french", "completion": "english"}'"""
    with pytest.raises(SourceError, match=re.escape(flag)):
        build_manifest([SourceConfig("s", (path,))])
