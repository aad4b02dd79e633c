"""Which folders `prepare` may write into."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from miles.common import lease, storage
from miles.data import prepare
from miles.data.config import SourceConfig
from miles.data.files.manifest import Manifest, build_manifest
from miles.data.notebook.output_folder import require_replaceable
from miles.errors import ConfigError, LeaseError
from tests.support.fault_table import NOTHING, observed

ENCODER = "ab" * 16
ROW = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'


def manifest(folder: Path, num_rows: int) -> Manifest:
    folder.mkdir(exist_ok=True)
    (folder / f"{num_rows}.jsonl").write_text(ROW * num_rows)
    return build_manifest((SourceConfig("chat", (str(folder / f"{num_rows}.jsonl"),)),))


def complete(folder: Path, of: Manifest) -> str:
    """Write the names that a prepare of a manifest leaves."""
    folder.mkdir()
    for name in ("part-00000.parquet", "rejects.jsonl"):
        (folder / name).touch()
    (folder / "summary.json").write_text(json.dumps({"encoder_fingerprint": ENCODER}))
    (folder / "manifest.json").write_text(of.to_json())
    return str(folder)


def test_same_rows_and_settings_are_written_again(tmp_path: Path) -> None:
    mine, other = manifest(tmp_path / "rows", 3), manifest(tmp_path / "rows", 4)
    out = complete(tmp_path / "out", mine)
    require_replaceable(out, mine, ENCODER, overwrite=False)
    for rows, encoder in ((other, ENCODER), (mine, "cd" * 16)):
        refusal = r"holds prepared rows of other files .*--overwrite"
        with pytest.raises(ConfigError, match=refusal) as raised:
            require_replaceable(out, rows, encoder, overwrite=False)
        observed("`prepare` onto other prepared rows", str(raised.value), "holds", NOTHING)
        require_replaceable(out, rows, encoder, overwrite=True)

    for name in ("manifest.json", "summary.json"):
        (tmp_path / "out" / name).write_text("{")
        with pytest.raises(ConfigError, match="holds prepared rows of other"):
            require_replaceable(out, mine, ENCODER, overwrite=False)


@pytest.mark.parametrize(
    ("names", "text"),
    [
        ([], None),
        ([".lease.json", ".part"], None),
        (["rejects.jsonl"], None),
        (["rejects.jsonl", "part-00000.parquet"], None),  # a prepare that was killed
        (["part-00000.parquet"], r"holds part-00000\.parquet, which no prepare wrote"),
        (["notes.md", "rejects.jsonl"], r"holds notes\.md.*--overwrite to write beside"),
        (["deep/x.parquet"], "holds deep.*--overwrite"),
    ],
)
def test_folder_without_a_manifest(tmp_path: Path, names: list[str], text: str | None) -> None:
    rows = manifest(tmp_path / "rows", 3)
    for name in names:
        storage.write_text(str(tmp_path / "out" / name), "")
    if text is not None:
        with pytest.raises(ConfigError, match=text):
            require_replaceable(str(tmp_path / "out"), rows, ENCODER, overwrite=False)
    require_replaceable(str(tmp_path / "out"), rows, ENCODER, overwrite=True)


def test_rows_of_others_are_never_mixed_in(tmp_path: Path) -> None:
    rows = manifest(tmp_path / "rows", 3)
    for number in range(5):
        storage.write_text(str(tmp_path / f"out/part-{number:05d}-3f2a.snappy.parquet"), "")
    for overwrite in (False, True):
        with pytest.raises(
            ConfigError, match="and 2 more, which no prepare wrote, and which would"
        ):
            require_replaceable(str(tmp_path / "out"), rows, ENCODER, overwrite=overwrite)


def test_second_prepare_is_refused(tmp_path: Path, chatml_tokenizer_folder: Path) -> None:
    source, out = tmp_path / "rows.jsonl", str(tmp_path / "out")
    source.write_text(ROW)
    data = prepare("chat", source=str(source), tokenizer=str(chatml_tokenizer_folder))
    data.is_in_python = False  # as in a command
    with (
        lease.hold(out, "--output", "miles prepare", print),
        pytest.raises(LeaseError, match="miles prepare on host") as raised,
    ):
        data.write(out, overwrite=True)
    observed("second `prepare` onto one `--output`", str(raised.value), "another run", NOTHING)
