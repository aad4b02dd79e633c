"""Rows come back in the order asked, as JSON, from every format; a changed file is refused."""

from __future__ import annotations

import datetime
import decimal
import gzip
import json
import os
import tracemalloc
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from miles.data.config import RowFormat, SourceConfig
from miles.data.files import json_scan, read
from miles.data.files.manifest import Manifest, build_manifest
from miles.data.files.read import read_rows, stream_rows
from miles.data.types import UNREADABLE_ROW
from miles.errors import SourceError
from tests.support.row_files import KINDS, NUM_ROWS, content_of


def manifest_of(*paths: Path | str) -> Manifest:
    text = RowFormat(
        "text"
    )  # nothing is read of the rows here, so that their shape is not to be looked for
    return build_manifest(
        [SourceConfig(f"s{i}", (str(path),), text) for i, path in enumerate(paths)]
    )


@pytest.fixture
def small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_scan, "GROUP_ROWS", 10)
    monkeypatch.setattr(json_scan, "BUFFER_BYTES", 37)


@pytest.mark.usefixtures("small_groups")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("remote", [False, True])
def test_any_rows_in_the_order_asked(tmp_path: Path, kind: str, remote: bool) -> None:
    name, content = content_of(kind, tmp_path)
    folder = "memory://reading" if remote else str(tmp_path / "data")
    fs, path = fsspec.core.url_to_fs(folder)
    fs.makedirs(path, exist_ok=True)
    fs.pipe_file(f"{path}/{name}", content)
    try:
        manifest = manifest_of(f"{folder}/{name}")
        assert len(manifest.group_starts) == 7
        random = np.random.default_rng(0)
        for wanted in (
            np.arange(NUM_ROWS),
            random.permutation(NUM_ROWS),
            np.array([56, 12, 12, 3]),
            np.array([], int),
        ):
            assert [json.loads(row)["i"] for row in read_rows(manifest, wanted)] == wanted.tolist()
    finally:
        fs.rm(path, recursive=True)


@pytest.mark.usefixtures("small_groups")
def test_rows_of_several_files(tmp_path: Path) -> None:
    paths = []
    for kind in KINDS:
        name, content = content_of(kind, tmp_path)
        paths.append(tmp_path / kind / name)
        paths[-1].parent.mkdir()
        paths[-1].write_bytes(content)
    manifest = manifest_of(*paths)
    wanted = np.random.default_rng(1).permutation(manifest.num_rows)[:100]
    rows = [json.loads(row) for row in read_rows(manifest, wanted)]
    assert [row["i"] for row in rows] == (wanted % NUM_ROWS).tolist()
    assert all(row["text"] == "é中😀" * (row["i"] % 5) for row in rows)


def test_needed_groups_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, content = content_of("parquet", tmp_path)
    (tmp_path / name).write_bytes(content)
    manifest = manifest_of(tmp_path / name)
    groups: list[int] = []
    original = read.table_rows

    def watching(file, group, wanted, format):  # type: ignore[no-untyped-def]
        groups.append(group)
        return original(file, group, wanted, format)

    monkeypatch.setattr(read, "table_rows", watching)
    read_rows(manifest, np.array([31, 2, 30, 5]))
    assert groups == [0, 3]


def test_a_compressed_file_is_never_held_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_scan, "BUFFER_BYTES", 64 << 10)
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(
        gzip.compress(b'{"a": "%s"}\n' % (b"x" * 400) * 20_000, compresslevel=1)
    )  # 8 MB of text
    manifest = manifest_of(path)
    tracemalloc.start()
    try:
        assert len(read_rows(manifest, np.array([19_999, 3]))) == 2
        assert tracemalloc.get_traced_memory()[1] < 3 << 20
    finally:
        tracemalloc.stop()


def test_json_lines_are_handed_through(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    lines = [b'{"a":   1}', b"{broken", b"\xff\xfe", b'"text"', b'{"a": "\\ud800"}']
    path.write_bytes(b"\n".join(lines))
    assert read_rows(manifest_of(path), np.arange(5)) == lines


def test_what_json_cannot_say(tmp_path: Path) -> None:
    table = pa.table(
        {
            "nan": pa.array([float("nan"), 1.5]),
            "nested": pa.array(
                [[{"x": float("inf")}], None], pa.list_(pa.struct([("x", pa.float64())]))
            ),
            "when": pa.array([datetime.datetime(2024, 1, 2, 3, 4, 5), None]),
            "nanoseconds": pa.array([1, 2], pa.timestamp("ns")),
            "day": pa.array([datetime.date(2024, 1, 2), None]),
            "money": pa.array([decimal.Decimal("1.50"), None]),
        }
    )
    path = tmp_path / "x.parquet"
    pq.write_table(table, path)
    first, second = (json.loads(row) for row in read_rows(manifest_of(path), np.arange(2)))
    assert first == {
        "nan": None,
        "nested": [{"x": None}],
        "when": "2024-01-02T03:04:05",
        "nanoseconds": "1970-01-01T00:00:00",
        "day": "2024-01-02",
        "money": "1.50",
    }
    assert second["nan"] == 1.5
    assert second["nested"] is None


def test_an_unreadable_row_spoils_no_other(tmp_path: Path) -> None:
    broken = pa.array([b"good", b"\xff\xfe", b"too"]).view(pa.string())
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"a": broken}), path)
    first, second, third = read_rows(manifest_of(path), np.arange(3))
    assert (json.loads(first), second, json.loads(third)) == (
        {"a": "good"},
        UNREADABLE_ROW,
        {"a": "too"},
    )


@pytest.mark.parametrize("kind", ["parquet", "lines", "lines.gz"])
def test_a_changed_or_missing_file_is_refused(tmp_path: Path, kind: str) -> None:
    name, content = content_of(kind, tmp_path)
    path = tmp_path / name
    path.write_bytes(content)
    manifest = manifest_of(path)
    os.utime(path, (1_000, 1_000))
    with pytest.raises(SourceError, match=f"{name}: changed since"):
        read_rows(manifest, np.array([0]))
    path.unlink()
    with pytest.raises(SourceError, match=f"{name}: no such file"):
        read_rows(manifest, np.array([0]))


FAULTS = {
    "an empty Parquet file": ("x.parquet", lambda content: b"", "Parquet"),
    "a Parquet footer that is cut": ("x.parquet", lambda content: content[:-8], "Parquet|parquet"),
    "a Parquet footer that is damaged": (
        "x.parquet",
        lambda content: content[:-60] + b"\xff" * 52 + content[-8:],
        "cannot be read",
    ),
    "a Parquet file without its first half": (
        "x.parquet",
        lambda content: content[len(content) // 2 :],
        "cannot be read",
    ),
    "JSON lines called Parquet": (
        "x.parquet",
        lambda content: b'{"text": "a"}\n',
        "Parquet|parquet",
    ),
    "gzip that is cut": ("x.jsonl.gz", lambda content: content[:-20], "EOFError"),
    "gzip that is damaged": (
        "x.jsonl.gz",
        lambda content: content[:40] + b"\0\xff" * 10 + content[60:],
        "damaged or cut off .*Copy",
    ),
    "plain text called gzip": (
        "x.jsonl.gz",
        lambda content: b'{"text": "a"}\n',
        "not a gzip file, as its name says, but JSON text. Name it x.jsonl$",
    ),
    "zstd that is cut": ("x.jsonl.zst", lambda content: content[:-20], "ends within a zstd frame"),
    "plain text called zstd": (
        "x.jsonl.zst",
        lambda content: b'{"text": "a"}\n',
        "not a zstd file, as its name says, but JSON text. Name it x.jsonl$",
    ),
    "a broken element of an array": (
        "x.json",
        lambda content: b'[{"text": "a"},\n {"text" "b"}]',
        r"at byte 25 \(line 2\): ",
    ),
    "an array that is cut": ("x.json", lambda content: content[:-3], "broken JSON at byte"),
    "no row": ("x.jsonl", lambda content: b"\n \n", "has no row"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("remote", [False, True])
def test_errors_name_the_broken_file(tmp_path: Path, fault: str, remote: bool) -> None:
    name, broken, message = FAULTS[fault]
    kind = {
        "x.parquet": "parquet",
        "x.jsonl.gz": "lines.gz",
        "x.jsonl.zst": "lines.zst",
        "x.json": "array",
    }
    content = content_of(kind.get(name, "lines"), tmp_path)[1]
    folder = "memory://faults" if remote else str(tmp_path / "data")
    fs, path = fsspec.core.url_to_fs(folder)
    fs.makedirs(path, exist_ok=True)
    try:
        fs.pipe_file(f"{path}/{name}", broken(content))
        with pytest.raises(SourceError, match=message) as caught:
            manifest_of(f"{folder}/{name}")
        assert ("memory:///faults/" if remote else f"{folder}/") + name in str(caught.value)
    finally:
        fs.rm(path, recursive=True)


@pytest.mark.parametrize("kind", KINDS)
def test_late_damage_names_the_file(tmp_path: Path, kind: str) -> None:
    """A file that goes bad when its rows were counted, and looks as it did."""
    name, content = content_of(kind, tmp_path)
    path = tmp_path / name
    path.write_bytes(content)
    manifest, before = manifest_of(path), path.stat()
    path.write_bytes(content[:4] + b"\n" * 100 + content[104:])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(SourceError, match=name) as caught:
        read_rows(manifest, np.arange(NUM_ROWS))
    assert "\n" not in str(caught.value)
    assert "JSONDecodeError" not in str(caught.value)


def test_a_file_whose_permission_was_taken(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "a"}')
    manifest = manifest_of(path)
    path.chmod(0)
    try:
        path.read_bytes()
    except PermissionError:
        with pytest.raises(SourceError, match="permission denied"):
            read_rows(manifest, np.arange(1))
    else:
        pytest.skip("this user may read whatever it likes")


def column(kind: str) -> pa.Table:
    """A table with a column of a kind."""
    if kind == "python objects":
        field = pa.field(
            "a", pa.binary(), metadata={"ARROW:extension:name": "ray.data.arrow_pickled_object"}
        )
        return pa.table([pa.array([b"\x80\x04N."])], schema=pa.schema([field]))
    if kind == "python objects in a list":
        field = pa.field(
            "item", pa.binary(), metadata={"ARROW:extension:name": "ray.data.arrow_pickled_object"}
        )
        return pa.table({"a": pa.array([[b"\x80\x04N."]], pa.list_(field))})
    if kind == "two of one name":
        return pa.table([pa.array(["a"]), pa.array(["b"])], ["a", "a"])
    array = {
        "words of a dictionary": pa.array(["a"]).dictionary_encode(),
        "large": pa.array(["a"], pa.large_string()),
        "fixed size": pa.array([[1.0, 2.0]], pa.list_(pa.float32(), 2)),
        "half precision": pa.array([np.float16(1.5)], pa.float16()),
        "time of day": pa.array([datetime.time(1, 2)]),
        "duration": pa.array([datetime.timedelta(seconds=1)]),
        "nothing but null": pa.array([None], pa.null()),
    }[kind]
    return pa.table({"a": array})


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("python objects", "'a' is of an Arrow extension type"),
        ("python objects in a list", "'a' is of an Arrow extension type"),
        ("two of one name", "two columns are called 'a'"),
    ],
)
def test_columns_that_spoil_a_file_are_named(tmp_path: Path, kind: str, said: str) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(column(kind), path)
    with pytest.raises(SourceError, match=said) as caught:
        manifest_of(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("words of a dictionary", "a"),
        ("large", "a"),
        ("fixed size", [1.0, 2.0]),
        ("half precision", 1.5),
        ("time of day", "01:02:00"),
        ("duration", "0:00:01"),
        ("nothing but null", None),
    ],
)
def test_a_column_that_can(tmp_path: Path, kind: str, value: object) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(column(kind), path)
    assert [json.loads(row) for row in read_rows(manifest_of(path), np.arange(1))] == [{"a": value}]


def test_a_schema_nested_beyond_what_arrow_reads(tmp_path: Path) -> None:
    value: object = "x"
    for _ in range(60):
        value = [value]
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"a": pa.array([value])}), path)
    with pytest.raises(SourceError, match=r"x\.parquet: cannot be read, .* too deeply nested"):
        manifest_of(path)


def test_the_real_sample(assets: Path) -> None:
    path = assets / "data/openhermes_sample.parquet"
    manifest = manifest_of(path)
    wanted = np.array([16_417, 0, 5_000])
    rows = [json.loads(row) for row in read_rows(manifest, wanted)]
    assert rows == [pq.read_table(path).slice(int(i), 1).to_pylist()[0] for i in wanted]


def test_a_change_while_reading_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "".join(json.dumps({"text": f"old {number:05d}"}) + "\n" for number in range(5_000))
    )
    manifest = build_manifest([SourceConfig("s", (str(path),), RowFormat("text"))])
    batches = stream_rows(manifest, np.arange(5_000))
    next(batches)
    path.write_text(path.read_text().replace("old", "new"))
    with pytest.raises(SourceError, match=r"rows\.jsonl: changed since its rows were counted"):
        list(batches)
