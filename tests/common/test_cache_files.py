"""Files of the cache: private, checked, few; no cache is no error."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from miles.common import cache_files
from miles.common.cache_files import read, write

KEY = "a1"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of one kind, with one file in it."""
    monkeypatch.setenv("MILES_CACHE", str(tmp_path / "cache"))
    write("kind", KEY, b"content", 3)
    assert read("kind", KEY) == b"content"
    return tmp_path / "cache" / f"kind-{os.geteuid()}"


def file_in(folder: Path) -> Path:
    (file,) = folder.iterdir()
    return file


def test_what_was_written_is_private(folder: Path) -> None:
    assert folder.stat().st_mode & 0o777 == 0o700
    assert file_in(folder).stat().st_mode & 0o777 == 0o600
    assert read("kind", "b2") is None
    assert read("another", KEY) is None


def test_a_damaged_file_is_as_good_as_none(folder: Path) -> None:
    whole = file_in(folder).read_bytes()
    for place in range(len(whole)):
        file_in(folder).write_bytes(whole[:place])
        assert read("kind", KEY) is None
        changed = bytes([whole[place] ^ 1])
        file_in(folder).write_bytes(whole[:place] + changed + whole[place + 1 :])
        assert read("kind", KEY) is None
    file_in(folder).write_bytes(whole + b"x")
    assert read("kind", KEY) is None
    write("kind", KEY, b"anew", 3)
    assert read("kind", KEY) == b"anew"


def test_a_folder_in_place_of_a_file_makes_room(folder: Path) -> None:
    file_in(folder).unlink()
    (folder / f"{KEY}.state/inner").mkdir(parents=True)
    assert read("kind", KEY) is None
    write("kind", KEY, b"anew", 3)
    assert read("kind", KEY) == b"anew"


@pytest.mark.parametrize("mode", [0o620, 0o602])
def test_a_file_that_others_may_write_is_not_used(folder: Path, mode: int) -> None:
    file_in(folder).chmod(mode)
    assert read("kind", KEY) is None
    write("kind", KEY, b"anew", 3)
    assert read("kind", KEY) == b"anew"


def test_a_folder_that_others_may_write_is_not_used(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder.chmod(0o777)
    assert read("kind", KEY) is None
    write("kind", "b2", b"content", 3)
    assert len(list(folder.iterdir())) == 1, "nothing is put there, either"
    said = capsys.readouterr().err
    assert said.count(f"nothing is kept in {folder}") == 1, "once, not at each file"


def test_what_is_of_another_user_is_not_used(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.geteuid():
        pytest.skip("only root can give files away")
    os.chown(file_in(folder), 12345, -1)
    assert read("kind", KEY) is None
    write("kind", KEY, b"anew", 3)
    assert read("kind", KEY) == b"anew"
    os.chown(folder, 12345, -1)
    assert read("kind", KEY) is None
    write("kind", "b2", b"content", 3)
    assert len(list(folder.iterdir())) == 1


def test_links_and_pipes_are_not_followed(folder: Path, tmp_path: Path) -> None:
    file = file_in(folder)
    other = file.rename(tmp_path / "other")
    file.symlink_to(other)
    assert read("kind", KEY) is None
    write("kind", KEY, b"anew", 3)
    assert not file.is_symlink()
    assert read("kind", KEY) == b"anew"
    assert read_of(other) == b"content", "what the link led to is as it was"

    file.unlink()
    os.mkfifo(file)
    assert read("kind", KEY) is None
    file.unlink()

    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    write("kind", KEY, b"content", 3)
    assert read("kind", KEY) is None
    assert not list(folder.iterdir())


def read_of(file: Path) -> bytes:
    return file.read_bytes()[-len(b"content") :]


def test_the_oldest_make_room(folder: Path) -> None:
    for number, key in enumerate(("b2", "c3")):
        write("kind", key, b"content", 3)
        os.utime(folder / f"{key}.state", (number, number))
    (folder / ".d4.state.0123").write_bytes(b"half")
    os.utime(folder / ".d4.state.0123", (0, 0))
    (folder / ".e5.state.0123").write_bytes(b"half, of a process that lives")
    (folder / "notes.txt").touch()

    assert read("kind", "b2") == b"content"  # so it is used again
    write("kind", "f6", b"content", 3)
    left = {path.name for path in folder.iterdir()}
    assert left == {"a1.state", "b2.state", "f6.state", ".e5.state.0123", "notes.txt"}


def test_without_a_cache_nothing_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    for value in ("", " ", str(tmp_path / "file"), "/proc/none", "/dev/null", "s3://bucket/cache"):
        monkeypatch.setenv("MILES_CACHE", value)
        write("kind", KEY, b"content", 3)
        assert read("kind", KEY) is None
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert capsys.readouterr() == ("", "")


def test_the_folder_is_the_platforms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MILES_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("HOME", "/home/ada")
    assert cache_files.folder() == Path("/home/ada/.cache/miles")
    monkeypatch.setenv("XDG_CACHE_HOME", "/fast")
    assert cache_files.folder() == Path("/fast/miles")
    monkeypatch.setattr("sys.platform", "darwin")
    assert cache_files.folder() == Path("/home/ada/Library/Caches/miles")
    monkeypatch.setenv("HOME", "relative")
    assert cache_files.folder() is None
