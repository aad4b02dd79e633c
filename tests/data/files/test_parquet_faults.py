"""Parquet files that are damaged, encrypted or empty: an error of one paragraph, or no rows."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow.parquet import encryption

from miles.data.config import RowFormat, SourceConfig
from miles.data.files.manifest import Manifest, build_manifest
from miles.data.files.read import read_rows
from miles.errors import SourceError
from tests.support.row_cases import CASES, refusal


def manifest_of(path: Path, shape: str = "text") -> Manifest:
    return build_manifest([SourceConfig("s", (str(path),), RowFormat(shape))])


def test_a_corrupt_page_names_its_row_group() -> None:
    manifest = manifest_of(CASES / "corrupt/corrupt.parquet", "prompt_completion")
    assert len(read_rows(manifest, np.arange(300))) == 300
    with pytest.raises(SourceError, match=r"row group 3 \(rows 300 to 399 of the file") as caught:
        read_rows(manifest, np.array([310]))
    assert "corrupt.parquet: " in str(caught.value)
    assert "damaged" in str(caught.value)
    assert "\n" not in str(caught.value)


class _Keys(encryption.KmsClient):  # type: ignore[misc]
    """Wraps keys in nothing."""

    def __init__(self, _config: Any) -> None:
        super().__init__()

    def wrap_key(self, key: bytes, _master: str) -> bytes:
        return base64.b64encode(key)

    def unwrap_key(self, wrapped: bytes, _master: str) -> bytes:
        return base64.b64decode(wrapped)


@pytest.mark.parametrize("is_footer_plain", [False, True])
def test_an_encrypted_file_is_named_as_such(tmp_path: Path, is_footer_plain: bool) -> None:
    """Before a row is read: pyarrow aborts the process that asks about an encrypted column."""
    factory = encryption.CryptoFactory(_Keys)
    settings = encryption.EncryptionConfiguration(
        footer_key="f", column_keys={"c": ["text"]}, plaintext_footer=is_footer_plain
    )
    properties = factory.file_encryption_properties(encryption.KmsConnectionConfig(), settings)
    table = pa.table({"text": ["a", "b"]})
    path = tmp_path / "x.parquet"
    with pq.ParquetWriter(path, table.schema, encryption_properties=properties) as writer:
        writer.write_table(table)
    assert "x.parquet: an encrypted Parquet file" in refusal(path)


def test_a_file_without_rows_is_no_error_beside_others(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "a.parquet")
    pq.write_table(pa.table({}), tmp_path / "b.parquet")
    assert "has no row" in refusal(tmp_path)
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "c.parquet")
    assert manifest_of(tmp_path).num_rows == 1


def test_an_image_is_named_where_no_other_column_is_read(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [b"\xff"]}), tmp_path / "x.parquet")
    assert read_rows(manifest_of(tmp_path / "x.parquet"), np.arange(1)) == [b'{"image":true}']


def test_rows_without_columns_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"photo": [b"\xff", b"\xfe"]}), path)
    assert "photo (is of type binary)" in refusal(path)
    assert read_rows(manifest_of(path), np.arange(2)) == [b"{}", b"{}"]
    with pa.ipc.new_file(tmp_path / "x.arrow", pa.schema([("photo", pa.binary())])) as writer:
        writer.write_table(pa.table({"photo": [b"\xff", b"\xfe"]}))
    assert read_rows(manifest_of(tmp_path / "x.arrow"), np.arange(2)) == [b"{}", b"{}"]
