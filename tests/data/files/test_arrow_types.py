"""Types of Arrow: what each becomes in JSON, and what of a file is not read."""

from __future__ import annotations

import json
import re
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from miles.data.config import RowFormat, SourceConfig
from miles.data.files.arrow_types import has_views
from miles.data.files.manifest import Manifest, build_manifest
from miles.data.files.read import read_rows
from miles.data.files.row_json import table_to_json
from miles.data.types import UNREADABLE_ROW
from miles.errors import SourceError
from tests.support.row_cases import refusal, take

HELLO = [("user", "Hi"), ("assistant", "Hello")]
LARCH = [("user", "Name a tree, number 0."), ("assistant", "Tree 0 is a larch.")]
IMAGE = {"bytes": b"\x89PNG\xff", "path": "a.png"}


@pytest.mark.parametrize(
    ("case", "turns"),
    [
        ("arrow-types/dictionary.parquet", [("user", "a?"), ("assistant", "A")]),
        ("arrow-types/views.parquet", [("user", "a?"), ("assistant", "A")]),
        ("arrow-types/image.parquet", LARCH),
        ("arrow-types/json_ext.parquet", LARCH),
        ("arrow-types/map.parquet", LARCH),
        ("arrow-types/uuid.parquet", LARCH),
        ("arrow-types/wildchat.parquet", [("user", "hi"), ("assistant", "hello")]),
        ("arrow-types-2/dict_in_struct.parquet", HELLO),
        ("arrow-types-2/large_list.parquet", HELLO),
        ("arrow-types-2/large_list_view.parquet", HELLO),
        ("arrow-types-2/list_view.parquet", HELLO),
        ("arrow-types-2/polars_new.parquet", HELLO),
        ("arrow-types-2/string_view.parquet", HELLO),
    ],
)
def test_rows_of_any_type_are_read(case: str, turns: list[tuple[str, str]]) -> None:
    taken = take(case)
    assert len(taken.conversations) == 3
    assert taken.turns() == turns


def test_json_and_uuid_columns_are_text() -> None:
    (tool,) = take("arrow-types/json_ext.parquet").conversations[0].tools or ()
    assert tool["function"]["name"] == "get_slot"
    manifest = take("arrow-types/uuid.parquet").manifest
    (row,) = read_rows(manifest, np.arange(1))
    assert json.loads(row)["id"] == "3b557e94-2d77-44ed-aa09-4f219ccf4eb3"


def test_binary_text_is_text() -> None:
    taken = take("shapes-2/binary_text.parquet")
    assert [row.text for row in taken.conversations] == ["plain words", "more words"]


def test_files_of_uneven_columns_are_read() -> None:
    taken = take("uneven-shards")
    assert taken.reasons == [None, None, "no_messages"]
    assert taken.turns(1) == HELLO


# --- padding --------------------------------------------------------------------------------------


def test_padding_goes_and_elements_stay() -> None:
    taken = take("nulls/padded.parquet")
    (first,) = taken.conversations[0].tools or ()
    assert first["function"]["parameters"]["properties"] == {"day": {"type": "string"}}
    (second,) = taken.conversations[1].tools or ()
    assert second["function"] == {
        "name": "g",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    }
    (call,) = take("list-arguments/list_args.parquet").conversations[0].messages[1]["tool_calls"]
    assert call["function"]["arguments"] == {"entities": ["Ulm", "Bonn"]}


@pytest.mark.parametrize("begin", [0, 1, 2])
def test_only_null_fields_of_structs_are_padding(begin: int) -> None:
    """Also in a slice, whose arrays begin somewhere in their buffers."""
    inner = pa.struct([("x", pa.list_(pa.int64())), ("y", pa.string())])
    kind = pa.list_(pa.struct([("s", inner), ("t", pa.string()), ("n", pa.float64())]))
    values = [
        [{"s": {"x": [1, None], "y": None}, "t": '{"a": null}', "n": float("nan")}, None],
        None,
        [{"s": None, "t": None, "n": None}, {"s": {"x": None, "y": "z"}, "t": "", "n": 0.5}],
    ]
    table = pa.table({"a": pa.array(values, kind), "b": pa.array([None, "v", None])})
    rows = [json.loads(row) for row in table_to_json(table.slice(begin))]
    assert (
        rows
        == [
            {"a": [{"s": {"x": [1, None]}, "t": '{"a": null}', "n": None}, None], "b": None},
            {"a": None, "b": "v"},
            {"a": [{}, {"s": {"y": "z"}, "t": "", "n": 0.5}], "b": None},
        ][begin:]
    )


# --- types ----------------------------------------------------------------------------------------


def _of(kind: pa.DataType, values: list[Any]) -> pa.Array:
    return pa.array(values, kind)


WORDS = pa.array(["v", None]).dictionary_encode()
KINDS: dict[str, tuple[pa.Array, list[Any]]] = {
    "views of text": (_of(pa.string_view(), ["v" * 20, None]), ["v" * 20, None]),
    "views in a list": (_of(pa.list_(pa.string_view()), [["v", None], None]), [["v", None], None]),
    "views in a map": (
        _of(pa.map_(pa.string_view(), pa.string_view()), [[("k", "v")], None]),
        [{"k": "v"}, None],
    ),
    "list views of structs": (
        _of(pa.list_view(pa.struct([("x", pa.int8()), ("y", pa.int8())])), [[{"x": 1}], None]),
        [[{"x": 1}], None],
    ),
    "large list views": (_of(pa.large_list_view(pa.int8()), [[1], []]), [[1], []]),
    "words of a dictionary": (WORDS, ["v", None]),
    "maps": (
        _of(pa.map_(pa.string(), pa.int64()), [[("k", 1), ("null", None)], []]),
        [{"k": 1, "null": None}, {}],
    ),
    "maps in lists of structs": (
        _of(
            pa.list_(pa.struct([("m", pa.map_(pa.string(), pa.string())), ("n", pa.int8())])),
            [[{"m": [("k", "v")]}], [{"n": 1}]],
        ),
        [[{"m": {"k": "v"}}], [{"n": 1}]],
    ),
    "JSON": (pa.ExtensionArray.from_storage(pa.json_(), pa.array(["[1]", None])), ["[1]", None]),
    "JSON in structs": (
        pa.StructArray.from_arrays(
            [pa.ExtensionArray.from_storage(pa.json_(), pa.array(["[1]", None]))], ["j"]
        ),
        [{"j": "[1]"}, {}],
    ),
    "UUIDs": (
        pa.ExtensionArray.from_storage(
            pa.uuid(), pa.array([uuid.UUID(int=1).bytes, None], pa.binary(16))
        ),
        [str(uuid.UUID(int=1)), None],
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_values_as_a_json_file_has_them(tmp_path: Path, kind: str) -> None:
    array, values = KINDS[kind]
    pq.write_table(pa.table({"i": [0, 1], "a": array}), tmp_path / "x.parquet")
    manifest = manifest_of(tmp_path / "x.parquet")
    assert manifest.sources[0].files[0].unread_columns == ()
    for wanted in ([0, 1], [1, 0], [1, 1], [0]):
        rows = [json.loads(row) for row in read_rows(manifest, np.array(wanted))]
        assert rows == [{"i": number, "a": values[number]} for number in wanted]


def test_every_kind_of_view_is_seen() -> None:
    views = {kind for kind, (array, _) in KINDS.items() if has_views(pa.field("a", array.type))}
    assert views == {"views of text", "views in a list", "views in a map"}


def test_a_repeated_key_rejects_its_row_alone() -> None:
    maps = _of(pa.map_(pa.string(), pa.int64()), [[("k", 1)], [("k", 1), ("k", 2)], [("j", 3)]])
    assert table_to_json(pa.table({"a": maps})) == [
        b'{"a":{"k":1}}',
        UNREADABLE_ROW,
        b'{"a":{"j":3}}',
    ]


# --- columns that are not read --------------------------------------------------------------------


def manifest_of(path: Path, format: RowFormat | None = None) -> Manifest:
    return build_manifest([SourceConfig("s", (str(path),), format or RowFormat("text"))])


UNREAD: dict[str, pa.Array] = {
    "bytes": pa.array([b"\x89PNG\xff"]),
    "bytes in a struct": pa.array([IMAGE]),
    "bytes in lists of structs": pa.array([[IMAGE]]),
    "bytes of a dictionary": pa.array([b"\xff"]).dictionary_encode(),
    "bytes of a fixed size": pa.array([b"ab"], pa.binary(2)),
    "a map of numbers": pa.array([[(1, 2)]], pa.map_(pa.int8(), pa.int8())),
    "two fields of one name": pa.StructArray.from_arrays(
        [pa.array(["a"]), pa.array(["b"])], ["x", "x"]
    ),
    "tensors": pa.ExtensionArray.from_storage(
        pa.fixed_shape_tensor(pa.int8(), [2]), pa.array([[1, 2]], pa.list_(pa.int8(), 2))
    ),
}


@pytest.mark.parametrize("kind", UNREAD)
def test_columns_without_a_place_in_json_are_not_read(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"i": [0], "i.odd": UNREAD[kind], "text": ["a"]}), path)
    manifest = manifest_of(path, RowFormat())
    (file,) = manifest.sources[0].files
    assert file.unread_columns == ("i.odd",)
    assert [json.loads(row) for row in read_rows(manifest, np.arange(1))] == [{"i": 0, "text": "a"}]
    assert Manifest.from_json(manifest.to_json()) == manifest


def test_what_holds_the_rows_must_be_readable(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    number_map = pa.array([[(1, "a")]], pa.map_(pa.int8(), pa.string()))
    pq.write_table(pa.table({"text": number_map, "image": pa.array([b"\xff"])}), path)
    with pytest.raises(SourceError, match=r"clear\. .* Of .*x\.parquet not read, .*") as caught:
        manifest_of(path, RowFormat())
    assert re.search(r"text \(is of type map<int8, .*, a map whose keys are not", str(caught.value))
    with pytest.raises(SourceError, match=r"x\.parquet: column 'text' is of type map<int8"):
        manifest_of(path, RowFormat("text", {"text": "text"}))


def test_bytes_of_a_field_are_text_where_they_can(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    turns = [[{"role": b"user", "content": b"Hi"}, {"role": b"assistant", "content": b"H\xc3\xa9"}]]
    broken = [[{"role": b"user", "content": b"\xff"}]]
    pq.write_table(pa.table({"messages": turns + broken, "image": [b"\xff", b"\xff"]}), path)
    taken = take(path)
    assert taken.turns() == [("user", "Hi"), ("assistant", "Hé")]
    assert taken.reasons == [None, "malformed_json"]
    assert taken.manifest.sources[0].files[0].unread_columns == ("image",)


def test_images_under_a_usual_name_hide_no_rows(tmp_path: Path) -> None:
    """`input` is a field of Alpaca's, and holds pictures here, beside messages."""
    path = tmp_path / "x.parquet"
    messages = [[{"role": role, "content": content} for role, content in HELLO]]
    pq.write_table(pa.table({"messages": messages, "input": [b"\xff"]}), path)
    assert take(path).turns() == HELLO


def test_a_pointer_called_parquet_is_refused() -> None:
    assert "not a Parquet file" in refusal("not-what-it-says/lfs.parquet")
