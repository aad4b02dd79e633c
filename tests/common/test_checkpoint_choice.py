"""What is said of the checkpoints in a folder, and the line that goes on from one."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from miles.common.checkpoint_choice import tracker_line, ways_on
from miles.common.checkpoint_files import complete_iterations
from miles.common.checkpoint_folder import find
from miles.common.checkpoint_tracker import TRACKER, folder_name
from miles.convert.torch_dist import newest
from miles.errors import CheckpointError
from tests.support.checkpoints import write_checkpoint


def with_checkpoints(folder: Path, *iterations: int) -> str:
    """Make a folder with complete checkpoints, one that is not, and no tracker."""
    for iteration in iterations:
        write_checkpoint(folder, iteration)
    (folder / folder_name(999)).mkdir(parents=True)
    (folder / "iter_notes").mkdir()
    return str(folder)


def test_the_line_goes_on_from_the_newest(tmp_path: Path) -> None:
    """It is given to a shell, and does it."""
    url = with_checkpoints(tmp_path / "a run's [folder]", 20, 40)
    assert complete_iterations(url) == [20, 40]
    text = ways_on(url)
    assert text.startswith(
        f"There are complete checkpoints of steps 20, 40 in {url}. To go on from"
    )
    assert "from step 40: echo 40 > '" in text
    subprocess.run(text.partition("from step 40: ")[2], shell=True, check=True)  # noqa: S602
    found = find(url)
    assert found is not None
    assert found.iteration == 40


def test_many_few_and_none(tmp_path: Path) -> None:
    assert ways_on(with_checkpoints(tmp_path / "none")).startswith(
        "There is no complete checkpoint"
    )
    assert "is a complete checkpoint of step 7 in" in ways_on(with_checkpoints(tmp_path / "one", 7))
    many = ways_on(with_checkpoints(tmp_path / "many", *range(10, 100, 10)))
    assert "checkpoints of steps …, 40, 50, 60, 70, 80, 90 in" in many


def test_a_checkpoint_itself_is_told(tmp_path: Path) -> None:
    url = with_checkpoints(tmp_path / "run", 40)
    text = ways_on(f"{url}/{folder_name(40)}/")
    assert text.startswith(
        f"It is a checkpoint itself: give {url}, and to go on from this one: echo"
    )


def test_lines_for_stores(bucket: str) -> None:
    write_checkpoint(f"{bucket}/run", 40)
    assert ways_on(f"{bucket}/run").endswith(f"echo 40 | aws s3 cp - {bucket}/run/{TRACKER}")
    assert tracker_line("memory://run", 3) == f"write 3 into memory://run/{TRACKER}"


@pytest.mark.parametrize("content", ["", "\n", "999", "4 0", "²"])
def test_a_tracker_that_names_nothing(tmp_path: Path, content: str) -> None:
    url = with_checkpoints(tmp_path, 20)
    (tmp_path / TRACKER).write_text(content)
    for look in (find, newest):
        with pytest.raises(CheckpointError, match=rf"{TRACKER}|iter_0000999") as raised:
            look(url)
    with pytest.raises(CheckpointError, match=r"To go on from step 20: echo 20 > ") as raised:
        find(url)
    assert TRACKER in str(raised.value)
