"""Rows that are no files: their order, their content, one name for the same content, and errors."""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest

import miles.data
from miles.common import storage
from miles.data.config import SourceConfig
from miles.data.files.manifest import build_manifest
from miles.data.files.read import read_rows
from miles.data.notebook.given_rows import file_of, paths_in
from miles.errors import ConfigError, MilesError, SourceError

Row = dict[str, Any]


def rows_of(num_rows: int = 2_345) -> list[Row]:
    """Return rows that are all different, of more than one row group."""
    rows = []
    for number in range(num_rows):
        answer = {"role": "assistant", "content": f"{number + 2} é"}
        turns = [{"role": "user", "content": f"{number}+2?"}, answer]
        rows.append({"messages": turns, "score": number / 8, "note": None if number % 3 else "x"})
    return rows


ROWS = rows_of()


def _category_frame(rows: list[Row]) -> pd.DataFrame:
    """Return a frame in another order of index, with a column of categories."""
    frame = pd.DataFrame(rows, index=range(len(rows), 0, -1))
    return frame.assign(note=frame["note"].astype("category"))


def _with_indices(rows: list[Row]) -> datasets.Dataset:
    """Return rows that lie in another order, and are put in theirs by indices."""
    return datasets.Dataset.from_list(rows[::-1]).select(range(len(rows) - 1, -1, -1))


TABLES: dict[str, Callable[[list[Row]], Any]] = {
    "pandas": pd.DataFrame,
    "pandas with an index and categories": _category_frame,
    "polars": pl.DataFrame,
    "polars, lazy": pl.LazyFrame,
    "arrow table": pa.Table.from_pylist,
    "arrow batch": pa.RecordBatch.from_pylist,
    "arrow reader": lambda rows: pa.Table.from_pylist(rows).to_reader(max_chunksize=7),
    "datasets": datasets.Dataset.from_list,
    "datasets with indices": _with_indices,
    "datasets, iterable": lambda rows: datasets.Dataset.from_list(rows).to_iterable_dataset(3),
}
DICTS: dict[str, Callable[[list[Row]], Any]] = {
    "list": list,
    "tuple": tuple,
    "iterator": iter,
    "generator": lambda rows: (dict(row) for row in rows),
    "datasets, generated": lambda rows: datasets.IterableDataset.from_generator(lambda: iter(rows)),
}


def rows_read(path: str) -> list[Row]:
    """Return the rows of a file as a run reads them."""
    manifest = build_manifest([SourceConfig("rows", (path,))])
    return [json.loads(row) for row in read_rows(manifest, np.arange(manifest.num_rows))]


@pytest.mark.parametrize("kind", [*TABLES, *DICTS])
def test_rows_keep_order_and_content(kind: str) -> None:
    path = file_of((TABLES | DICTS)[kind](ROWS))
    assert rows_read(path) == ROWS


@pytest.mark.parametrize("kinds", [TABLES, DICTS], ids=["tables", "dicts"])
def test_the_same_rows_give_the_same_file(kinds: dict[str, Callable[[list[Row]], Any]]) -> None:
    paths = {file_of(make(ROWS)) for make in kinds.values()}
    assert len(paths) == 1


@pytest.mark.parametrize("kind", ["list", "pandas"])
def test_another_value_or_order_gives_another_file(kind: str) -> None:
    make = (TABLES | DICTS)[kind]
    changed = rows_of()
    changed[-1]["score"] += 1
    swapped = [*ROWS[:-2], ROWS[-1], ROWS[-2]]
    assert len({file_of(make(rows)) for rows in (ROWS, changed, swapped)}) == 3


def test_fingerprint_is_that_of_the_content(
    chatml_tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fingerprint(rows: Any) -> str:
        prepared = miles.data.prepare("rows", source=rows, tokenizer=str(chatml_tokenizer_folder))
        return prepared.manifest.fingerprint

    here = fingerprint(ROWS[:20])
    monkeypatch.setenv("MILES_CACHE", str(tmp_path / "another"))
    assert fingerprint(iter(ROWS[:20])) == here
    assert fingerprint(ROWS[:21]) != here
    assert fingerprint(pd.DataFrame(ROWS[:20])) == fingerprint(pl.DataFrame(ROWS[:20]))


def test_ids_and_masks_are_those_of_a_file(chatml_tokenizer_folder: Path, tmp_path: Path) -> None:
    rows = ROWS[:50]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def samples(source: Any) -> list[tuple[list[int], list[int]]]:
        data = miles.data.prepare("rows", source=source, tokenizer=str(chatml_tokenizer_folder))
        data.write(str(tmp_path / "out"), overwrite=True)
        outcomes = data._outcomes(np.arange(data.num_rows))
        results = [outcome.result for _, _, outcome in outcomes]
        return [(result.input_ids.tolist(), result.loss_mask.tolist()) for result in results]  # type: ignore[union-attr]

    expected = samples(file)
    assert len(expected) == 50
    for source in ([file], rows, iter(rows), pd.DataFrame(rows), datasets.Dataset.from_list(rows)):
        assert samples(source) == expected, type(source)


def test_paths_are_paths() -> None:
    assert paths_in(None) == ()
    assert paths_in("a/*.jsonl") == ("a/*.jsonl",)
    assert paths_in(Path("a")) == ("a",)
    assert paths_in(["s3://b/a.jsonl", Path("b.jsonl")]) == ("s3://b/a.jsonl", "b.jsonl")
    assert paths_in([{"a": 1}]) is None
    with pytest.raises(ConfigError, match=r"source\[1\] is \{'a': 1\} \(dict\) among paths"):
        paths_in([Path("a"), {"a": 1}])


class Opaque:
    """A value of a type that nobody knows."""


VALUES = {
    "row 1 (from 0), a: a value of type numpy.int64": np.int64(3),
    "row 1 (from 0), a: a value of type numpy.ndarray": np.zeros(2),
    "row 1 (from 0), a[1].b: a value of type datetime.datetime": [0, {"b": datetime.datetime.max}],
    "row 1 (from 0), a: a value of type bytes": b"x",
    "row 1 (from 0), a: a value of type set": {1},
    f"row 1 (from 0), a: a value of type {__name__}.Opaque": Opaque(),
    "row 1 (from 0), a: nan": float("nan"),
    "row 1 (from 0), a.b: -inf": {"b": -float("inf")},
    "row 1 (from 0), a: a key of type tuple": {(1, 2): 3},
}


@pytest.mark.parametrize("message", VALUES)
def test_values_that_json_lacks_are_named(message: str) -> None:
    with pytest.raises(SourceError) as caught:
        file_of([{"a": 1}, {"a": VALUES[message]}])
    assert message in str(caught.value)


def test_a_value_that_contains_itself_is_refused() -> None:
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(SourceError, match="contains itself"):
        file_of([{"a": loop}])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([], "has no row"),
        (iter(()), "make it anew"),
        (pd.DataFrame(), "has no row"),
        (pl.DataFrame({"a": []}), "has no row"),
        ([1], r"row 0 \(from 0\) must be a dict"),
        ([[{"role": "user"}]], r'one as \{"messages": \[...\]\}'),
        (iter(["a.jsonl"]), "as a list of texts"),
        ({"a": [1]}, "source= must be a path or URL, a list of them"),
        (5, "source= must be a path"),
        (b"a", "source= must be a path"),
    ],
)
def test_what_gives_no_rows_is_refused(source: Any, message: str) -> None:
    with pytest.raises(MilesError, match=message):
        file_of(source)


def test_an_error_of_an_iterator_is_its_own() -> None:
    def rows() -> Any:
        yield ROWS[0]
        raise LookupError("of the user's code")

    with pytest.raises(LookupError, match="of the user's code"):
        file_of(rows())
    folder = Path(os.environ["MILES_CACHE"], f"rows-{os.geteuid()}")
    assert not list(folder.glob(".*"))


def test_columns_of_mixed_values_become_lines() -> None:
    frame = pd.DataFrame({"text": ["a", "b"], "mixed": [[1], "x"], "score": [0.5, None]})
    path = file_of(frame)
    assert [json.loads(line) for line in Path(path).read_text().splitlines()] == [
        {"text": "a", "mixed": [1], "score": 0.5},
        {"text": "b", "mixed": "x", "score": None},
    ]


def test_half_a_character_is_written_as_an_escape() -> None:
    path = file_of([{"text": "\ud83d"}])
    assert Path(path).read_bytes() == b'{"text": "\\ud83d"}\n'


def test_splits_of_a_dict_are_chosen() -> None:
    splits = datasets.DatasetDict(
        train=datasets.Dataset.from_list(ROWS[:3]), test=datasets.Dataset.from_list(ROWS[3:5])
    )
    for split, rows in [
        (None, ROWS[:3]),
        ("test", ROWS[3:5]),
        ("test+train", [*ROWS[3:5], *ROWS[:3]]),
        ("all", ROWS[:5]),
    ]:
        assert rows_read(file_of(splits, split)) == rows
    with pytest.raises(ConfigError, match="no split 'val': its splits are train, test"):
        file_of(splits, "val")
    with pytest.raises(ConfigError, match="have no splits"):
        file_of(ROWS, "train")


def test_an_iterator_does_not_sit_in_memory() -> None:
    alive = 0
    most = 0

    class Counted(dict[str, Any]):
        def __init__(self, number: int) -> None:
            nonlocal alive, most
            super().__init__(text=str(number))
            alive += 1
            most = max(most, alive)

        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

    file_of(Counted(number) for number in range(5_000))
    assert most < 10


def test_files_that_nobody_asked_for_are_removed() -> None:
    old, young = file_of(ROWS[:7]), file_of(ROWS[:8])
    os.utime(old, (time.time() - 40 * 86_400, os.stat(old).st_mtime))
    again = file_of(ROWS[:9])
    assert not os.path.exists(old)
    assert os.path.exists(young)
    assert os.path.exists(again)


def test_without_a_cache_the_file_goes_with_the_process(tmp_path: Path) -> None:
    program = (
        "from miles.data.notebook.given_rows import file_of; print(file_of([{'a': 1}]), end='')"
    )
    environment = {**os.environ, "MILES_CACHE": "", "TMPDIR": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert run.stdout.startswith(str(tmp_path))
    assert not os.path.exists(run.stdout)


def test_a_store_as_cache_holds_the_file(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MILES_CACHE", f"{bucket}/cache")
    path = file_of(ROWS[:10])
    assert path.startswith(f"{bucket}/cache/rows/")
    assert rows_read(path) == ROWS[:10]

    stamp = storage.stamp_of(storage.info(path))
    assert file_of(iter(ROWS[:10])) == path
    assert storage.stamp_of(storage.info(path)) == stamp


def test_a_web_server_that_serves_ranges_is_read(
    bucket: str, chatml_tokenizer_folder: Path
) -> None:
    lines = "".join(json.dumps(row) + "\n" for row in ROWS[:10])
    storage.write_text(f"{bucket}/rows.jsonl", lines)
    storage.filesystem(bucket)[0].chmod("bucket/rows.jsonl", "public-read")
    url = f"{os.environ['AWS_ENDPOINT_URL']}/bucket/rows.jsonl"
    assert url.startswith("http://127.0.0.1")

    prepared = miles.data.prepare("rows", source=url, tokenizer=str(chatml_tokenizer_folder))
    assert prepared.summary().num_rows == 10


def test_no_library_is_imported_to_look_at_rows() -> None:
    program = (
        "import sys\n"
        "from miles.data.notebook.given_rows import file_of\n"
        "file_of([{'a': 1}])\n"
        "optional = {'pandas', 'polars', 'datasets', 'ray', 'torch'}\n"
        "print(sorted(optional & set(sys.modules)), end='')"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (run.stdout, run.returncode) == ("[]", 0), run.stderr


def test_categories_of_polars_are_texts() -> None:
    frame = pl.DataFrame({"prompt": ["a", "b"], "completion": ["c", "d"]})
    categories = frame.with_columns(pl.col("prompt").cast(pl.Categorical))
    assert file_of(categories) == file_of(frame)


def test_columns_that_a_format_hides_are_left_out() -> None:
    rows = datasets.Dataset.from_list([{"prompt": "a", "completion": "b", "z": 1}])
    chosen = rows.with_format("torch", columns=["prompt", "completion"])
    assert file_of(chosen) == file_of(rows.remove_columns("z"))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([{1: "a", "1": "b"}], "columns 1 and '1' have one name in JSON; rename one"),
        (pd.DataFrame([["a", "b"]], columns=["x", "x"]), "column 'x' is there 2 times; rename"),
        (pd.DataFrame([["a", "b"]], columns=[1, "1"]), "column '1' is there 2 times; rename"),
        (pl.LazyFrame({"x": [1]}).select("y"), "the query of the LazyFrame fails, ColumnNotFound"),
        (iter([Path("a.jsonl")]), "paths are given as a list"),
        (pa.table({"x": [1]}).to_batches(), "tables are given as one"),
        ({"prompt": ["a"]}, "Rows in columns are pandas"),
        (b"abc", "must be a path or URL"),
        (datasets.DatasetDict({}), "the DatasetDict has no split"),
    ],
)
def test_rows_that_would_be_lost_or_mistaken_are_refused(source: Any, message: str) -> None:
    with pytest.raises(MilesError, match=message) as caught:
        file_of(source)
    assert "\n" not in str(caught.value)


def test_what_a_mixed_column_of_pandas_lacks_is_null() -> None:
    mixed = pd.Series([1, "x"], dtype=object)
    frame = pd.DataFrame({"n": mixed, "t": [pd.NaT, pd.NaT], "s": pd.array(["a", None], "string")})
    lines = Path(file_of(frame)).read_text().splitlines()
    assert [json.loads(line)["t"] for line in lines] == [None, None]
    assert [json.loads(line)["s"] for line in lines] == ["a", None]


def test_a_source_is_named_by_what_it_holds(tmp_path: Path, chatml_tokenizer_folder: Path) -> None:
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    (tmp_path / "chat.jsonl").write_text(json.dumps(row))
    given = {"chat": tmp_path / "chat.jsonl", "rows": [row]}
    for name, source in given.items():
        ds = miles.data.prepare(source=source, tokenizer=chatml_tokenizer_folder)
        assert ds.sources == (name,)
    with pytest.raises(ConfigError, match=r'revision="main": is one of openhermes on the hub'):
        miles.data.prepare("x", source=[row], tokenizer="x", revision="main")
