"""A filesystem that fails now and then drops no row; one that fails for good is named."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from miles.common import retry, storage
from miles.data.config import RowFormat, SourceConfig
from miles.data.files import json_scan
from miles.data.files.manifest import Manifest, build_manifest
from miles.data.files.read import read_rows, stream_rows
from miles.errors import MilesError, SourceError
from tests.support.filesystems import ERRORS, Faulty, StatusError, memory
from tests.support.row_files import KINDS, NUM_ROWS, content_of

__all__ = ["memory"]


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "FIRST_PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(retry, "MAX_PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(json_scan, "GROUP_ROWS", 10)
    monkeypatch.setattr(json_scan, "BUFFER_BYTES", 101)


def manifest_of(url: str) -> Manifest:
    return build_manifest([SourceConfig("s", (url,), RowFormat("text"))])


def counts(manifest: Manifest) -> Any:
    return [
        (file.format, file.size_bytes, file.row_groups)
        for source in manifest.sources
        for file in source.files
    ]


def rows_of(manifest: Manifest) -> tuple[list[bytes], list[bytes]]:
    """All rows in a random order, and in file order."""
    wanted = np.random.default_rng(0).permutation(manifest.num_rows)
    return read_rows(manifest, wanted), list(
        chain.from_iterable(stream_rows(manifest, np.arange(manifest.num_rows)))
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fault", ERRORS)
def test_passing_faults_change_no_rows(
    memory: MemoryFileSystem, tmp_path: Path, kind: str, fault: str
) -> None:
    name, content = content_of(kind, tmp_path)
    memory.pipe_file(f"/faults/a/{name}", content)
    memory.pipe_file(f"/faults/b/{name}", content)
    healthy = manifest_of("memory://faults")
    expected = rows_of(healthy)
    assert len(expected[1]) == 2 * NUM_ROWS
    Faulty.fault = fault
    for url in ("faulty:///faults", f"faulty:///faults/*/{name}", "faulty:///faults/**/x.*"):
        manifest = manifest_of(url)
        assert counts(manifest) == counts(healthy)
        assert rows_of(manifest) == expected
    assert Faulty.num_faults > 30 or (fault == "short" and Faulty.num_faults > 5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fault", ["connection", "short", "busy"])
def test_lasting_faults_name_file_and_tries(
    memory: MemoryFileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, fault: str
) -> None:
    monkeypatch.setattr(retry, "MAX_TRIES", 4)
    name, content = content_of(kind, tmp_path)
    memory.pipe_file(f"/faults/{name}", content)
    Faulty.every = 10**9
    manifest = manifest_of(f"faulty:///faults/{name}")
    Faulty.every, Faulty.fault = 1, fault
    with pytest.raises(
        SourceError, match=rf"faulty:///faults/{name}: cannot be read, tried 4 times: "
    ) as caught:
        read_rows(manifest, np.arange(3))
    assert {"connection": "reset by peer", "short": "ShortRead: ", "busy": "HTTP 503"}[
        fault
    ] in str(caught.value)
    with pytest.raises(SourceError, match=rf"{name}: cannot be read, tried 4 times"):
        build_manifest([SourceConfig("s", (f"faulty:///faults/{name}",))])


@pytest.mark.parametrize(
    "error", [PermissionError, ValueError, IsADirectoryError, lambda: StatusError(403)]
)
def test_what_does_not_pass_is_asked_once(memory: MemoryFileSystem, error: Any) -> None:
    memory.pipe_file("/faults/x.jsonl", b'{"i": 0}\n')
    manifest = manifest_of("faulty:///faults/x.jsonl")
    Faulty.calls.clear()
    Faulty.every, Faulty.fault = 1, error
    with pytest.raises(SourceError, match=r"x\.jsonl"):
        read_rows(manifest, np.arange(1))
    assert sum(Faulty.calls.values()) == 1


def test_a_missing_file_is_asked_once(memory: MemoryFileSystem) -> None:
    Faulty.every = 10**9
    with pytest.raises(SourceError, match=r"gone\.jsonl: no such file"):
        manifest_of("faulty:///faults/gone.jsonl")
    assert Faulty.calls["info"] == 1
    memory.pipe_file("/faults/x.jsonl", b'{"i": 0}\n')
    manifest = manifest_of("faulty:///faults/x.jsonl")
    memory.rm_file("/faults/x.jsonl")
    Faulty.calls.clear()
    with pytest.raises(SourceError, match=r"x\.jsonl: no such file"):
        read_rows(manifest, np.arange(1))
    assert sum(Faulty.calls.values()) == 1


def test_a_corrupt_file_is_read_once(memory: MemoryFileSystem) -> None:
    memory.pipe_file("/faults/x.jsonl.gz", b"no gzip at all")
    Faulty.every = 10**9
    with pytest.raises(
        SourceError, match=r"x\.jsonl\.gz: not a gzip file, as its name says, .*Copy"
    ):
        manifest_of("faulty:///faults/x.jsonl.gz")
    assert Faulty.calls["read"] == 1


@pytest.mark.parametrize("fault", ERRORS)
def test_small_files_survive_passing_faults(
    memory: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    Faulty.every, Faulty.fault = 2, fault
    # Six, so that this thread alone meets five short reads: the copy's threads may read once each.
    for number in range(6):
        storage.write_text(f"faulty:///small/{number}.txt", f"text {number}")
        assert storage.read_text(f"faulty:///small/{number}.txt") == f"text {number}"
        assert storage.exists(f"faulty:///small/{number}.txt")
        assert not storage.exists(f"faulty:///small/{number}.not")
    with storage.local_folder("faulty:///small") as folder:
        texts = {path.name: path.read_text() for path in folder.iterdir()}
        assert texts == {f"{number}.txt": f"text {number}" for number in range(6)}
    assert Faulty.num_faults >= 5
    monkeypatch.setattr(retry, "MAX_TRIES", 2)
    Faulty.every, Faulty.fault = 1, "connection"
    with pytest.raises(
        MilesError, match=r"small/x\.txt: cannot be written, tried 2 times: ConnectionResetError"
    ):
        storage.write_text("faulty:///small/x.txt", "text")
    with pytest.raises(
        SourceError, match=r"small/1\.txt: cannot be read, tried 2 times: ConnectionResetError"
    ):
        storage.exists("faulty:///small/1.txt")
