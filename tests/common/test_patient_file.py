"""Files that cannot be written for a while: on real disks, and on a store."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from miles.common import patient_file, storage
from miles.common.patient_file import PatientFile
from miles.errors import WriteError
from tests.support.disks import small_disk
from tests.support.object_storage import s3_bucket

LINES = [f"{number:04d} " + "x" * 1500 for number in range(40)]


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every line is a new try."""
    monkeypatch.setattr(patient_file, "RETRY_SECONDS", 0.0)


def content(path: Path) -> list[str]:
    return path.read_text().splitlines()


def fill(disk: Path, *, but_bytes: int) -> Callable[[], None]:
    """Leave so much room; return what gives the rest back."""
    ballast = disk / "ballast"
    ballast.write_bytes(bytes(shutil.disk_usage(disk).free - but_bytes))
    return ballast.unlink


def make_read_only(disk: Path) -> Callable[[], None]:
    def remount(mode: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{mode}", str(disk)], check=True)

    remount("ro")
    return lambda: remount("rw")


@pytest.mark.parametrize("is_full", [True, False], ids=["full", "read-only"])
def test_lines_wait_for_a_disk(tmp_path: Path, is_full: bool) -> None:
    said: list[str] = []
    with small_disk(tmp_path / "disk", "size=256k") as disk:
        path = disk / "run/metrics.jsonl"
        # A disk with an open file cannot be made read-only.
        file = PatientFile(str(path), report=said.append, stays_open=is_full)
        for line in LINES[:10]:
            file.add(line)
        assert content(path) == LINES[:10]

        # A page is left: some lines go there, and a part of another one.
        mend = fill(disk, but_bytes=4096) if is_full else make_read_only(disk)
        for line in LINES[10:30]:
            file.add(line)
        assert file.unwritten
        assert content(path)[:10] == LINES[:10]
        file.flush()
        assert len(said) == 1
        cause = "no space left on the disk" if is_full else "the disk is read-only"
        assert said[0].startswith(f"{path} cannot be written ({cause}); the run goes on")

        mend()
        file.add(LINES[30])
        assert content(path) == LINES[:31], "in order, none twice, no half one"
        assert len(said) == 2
        assert f"{path} is written again" in said[1]
        file.add(*LINES[31:])
        file.close()
        assert (content(path), len(said)) == (LINES, 2)


def test_what_was_never_written_is_said_at_the_end(tmp_path: Path) -> None:
    said: list[str] = []
    with small_disk(tmp_path / "disk", "size=256k") as disk:
        file = PatientFile(str(disk / "metrics.jsonl"), report=said.append)
        file.add(LINES[0])
        make_read_only(disk)
        file.add(*LINES[1:4])
        file.replace(LINES[:6])
        file.close()
        assert file.unwritten == LINES[1:6], "the first line is there"
        assert "lacks its last 5 lines" in said[-1]
        assert len(said) == 2
        with pytest.raises(WriteError, match="cannot be written"):
            file.require_written()


def test_a_file_that_somebody_removed_is_written_anew(tmp_path: Path) -> None:
    path = tmp_path / "run/metrics.jsonl"
    file = PatientFile(str(path), report=pytest.fail)
    file.add("a")
    file.close()
    shutil.rmtree(tmp_path / "run")
    file.add("b")
    assert content(path) == ["a", "b"]


def test_half_a_line_and_what_is_not_kept_go(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("a\nb\nc")
    file = PatientFile.read(str(path), is_kept=lambda line: line != "a")
    assert content(path) == file.lines == ["b"]
    file.add("d")
    assert content(path) == ["b", "d"]


def test_lines_wait_for_a_bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    with s3_bucket(monkeypatch) as bucket:
        fs, path = storage.filesystem(f"{bucket}/run/metrics.jsonl")
        file = PatientFile(f"{bucket}/run/metrics.jsonl", report=said.append)
        file.add("a")
        assert not fs.exists(path), "the network is not used for each line"
        fs.rmdir("bucket")
        file.flush()
        file.add("b")
        file.flush()
        assert len(said) == 1
        assert "cannot be written (" in said[0]
        assert file.unwritten == ["a", "b"]

        fs.mkdir("bucket")
        file.flush()
        assert storage.read_text(f"{bucket}/run/metrics.jsonl") == "a\nb\n"
        assert len(said) == 2
        file.close()
        assert len(said) == 2
