"""What `prepare()` writes and reads back, over the tests' Ray."""

from __future__ import annotations

import gzip
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from miles.data.notebook import dataset, every_row
from miles.data.notebook.prepare import prepare
from miles.data.rows import message_parts
from miles.data.rows.message_parts import PartLimits
from miles.data.stream import prepare_tasks
from miles.demo import rows
from miles.errors import ConfigError, MilesError, SourceError
from tests.support.streams import demo_tokenizer


def test_prepared_rows_keep_their_tokens(tmp_path: Path) -> None:
    tokenizer = str(demo_tokenizer())
    ds = prepare(
        "chat", source=str(rows.paths()["chat"]), tokenizer=tokenizer, max_sample_tokens=256
    )
    ds.write(str(tmp_path / "out"))
    assert [(entry["row"], entry["reason"]) for entry in ds.ledger()] == [
        (151, "no_messages"),
        (333, "unknown_role"),
    ]

    again = prepare(
        "chat", source=str(tmp_path / "out"), tokenizer=tokenizer, max_sample_tokens=256
    )
    assert again.num_rows == ds.num_rows - 2

    kept = [
        [one.input_ids[one.loss_mask > 0] for one in rank]
        for data in (ds, again)
        for step in data.steps(batch_size=1000, max_tokens_per_gpu=100_000, shuffle=False)
        for rank in step.micro_batches
    ]
    np.testing.assert_array_equal(np.concatenate(kept[0]), np.concatenate(kept[1]))

    with pytest.raises(ConfigError, match="lies in the folder to write"):
        again.write(str(tmp_path / "out"))
    assert (tmp_path / "out/part-00000.parquet").exists()

    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert summary["rows"] == summary["written"] + 2
    assert "412 in 1 file" in ds.to_text()
    assert "412 in 1 file</td>" in ds._repr_html_()
    assert ds.to_ray().count() == 410


def test_loaders_write_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process, and by two loaders on Ray: windows of 100 rows, and one of all rows."""
    monkeypatch.setattr(message_parts, "LIMITS", PartLimits(group_rows=10, part_rows=100))
    lines = rows.paths()["chat"].read_bytes().splitlines(keepends=True)
    (tmp_path / "plain").mkdir()
    for begin in range(0, len(lines), 90):
        (tmp_path / f"plain/{begin:03}.jsonl").write_bytes(b"".join(lines[begin : begin + 90]))
    (tmp_path / "gzip").mkdir()
    (tmp_path / "gzip/all.jsonl.gz").write_bytes(gzip.compress(b"".join(lines)))

    for name, num_parts in (("plain", 5), ("gzip", 4)):
        source = tmp_path / name
        data = prepare("chat", source=str(source), tokenizer=str(demo_tokenizer()))
        written = []
        for loader_cpus, ray_rows in ((1, 0), (None, 10_000), (2, 0)):
            monkeypatch.setattr(every_row, "RAY_ROWS", ray_rows)
            folder = tmp_path / f"{name}-{loader_cpus}"
            data.write(str(folder), loader_cpus=loader_cpus)
            written.append({file.name: file.read_bytes() for file in folder.iterdir()})
        assert written[0] == written[1] == written[2]
        assert sum(file.startswith("part-") for file in written[0]) == num_parts
        assert len(written[0]) == num_parts + 3

    data = prepare("chat", source=str(tmp_path / "plain"), tokenizer=str(demo_tokenizer()))
    (tmp_path / "plain/360.jsonl").write_text("{}")
    with pytest.raises(SourceError, match=r"360\.jsonl: changed since its rows were counted"):
        data.write(str(tmp_path / "changed"), loader_cpus=2)
    assert not (tmp_path / "changed/manifest.json").exists()


def test_a_loader_dies_in_the_first_window(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others, which are ahead by all they may be, have taken the processors by then."""
    monkeypatch.setattr(message_parts, "LIMITS", PartLimits(group_rows=10, part_rows=20))
    monkeypatch.setattr(prepare_tasks, "_PATIENCE_SECONDS", 0.5)
    monkeypatch.setattr(every_row, "RAY_ROWS", 0)
    lines = rows.paths()["chat"].read_bytes().splitlines(keepends=True)
    for begin in range(0, len(lines), 100):
        (tmp_path / f"{begin:03}.jsonl").write_bytes(b"".join(lines[begin : begin + 100]))
    monkeypatch.setattr(dataset, "DEFAULT_WINDOW_ROWS", 100)
    data = prepare("chat", source=str(tmp_path), tokenizer=str(demo_tokenizer()))
    data.write(str(tmp_path / "whole"), loader_cpus=2)

    has_died = tmp_path / "died"

    def dying(shared: Any, ref: Any) -> Iterator[Any]:
        # In the loader's process, the function of this name is the module's own.
        for number, table in enumerate(prepare_tasks._tables_of_window(shared, ref)):
            if ref.first_step == 0 and number == 2 and not has_died.exists():
                time.sleep(1)  # so that the second window has gone as far as it may
                has_died.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            yield table

    monkeypatch.setattr(prepare_tasks, "_tables_of_window", dying)
    data.write(str(tmp_path / "dying"), loader_cpus=2)
    assert has_died.exists()
    for file in (tmp_path / "whole").iterdir():
        assert file.read_bytes() == (tmp_path / "dying" / file.name).read_bytes()


def test_missing_source_is_named(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="nowhere"):
        prepare("x", source=str(tmp_path / "nowhere.parquet"), tokenizer=str(demo_tokenizer()))
    with pytest.raises(MilesError, match="tokenizer"):
        prepare("x", source=str(rows.paths()["chat"]), tokenizer=str(tmp_path))
