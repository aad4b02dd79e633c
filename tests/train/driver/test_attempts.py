"""What is noted of a run's starts."""

from __future__ import annotations

import json
from pathlib import Path

from miles.common import run_folder
from miles.train.driver.attempts import Starts
from miles.train.parallel_layout import Layout


def test_every_start_has_its_reason(tmp_path: Path) -> None:
    url = str(tmp_path)
    first = Starts(url)
    assert first.begin(0, "s3://key:secret@bucket/release", Layout(2)) == "new run"
    first.end("ClusterError: a trainer died", 7)
    first.restarts()
    assert (
        first.begin(4, "there/iter_0000004", Layout(2))
        == "restarted after ClusterError: a trainer died"
    )
    assert Starts(url).begin(4, "there", Layout(4, tensor=2)) == (
        "the same command again; start 2 has no end: it was killed"
    )
    third = Starts(url)
    third.end("SIGTERM", 9)
    assert Starts(url).begin(9, "there", Layout(1)) == "the same command again, after SIGTERM"
    entries = [
        json.loads(line) for line in (tmp_path / run_folder.ATTEMPTS).read_text().splitlines()
    ]
    assert [entry.get("start") for entry in entries] == [1, None, 2, 3, None, 4]
    assert entries[1] == {
        "end": 1,
        "time": entries[1]["time"],
        "how": "ClusterError: a trainer died",
        "next_step": 7,
        "restarts": True,
    }
    assert (entries[3]["tensor"], entries[3]["data"]) == (2, 2)
    assert "secret" not in (tmp_path / run_folder.ATTEMPTS).read_text()


def test_a_run_that_begins_in_another_folder(tmp_path: Path) -> None:
    assert (
        Starts(str(tmp_path)).begin(40, "there", Layout(1))
        == "continues a checkpoint of another folder"
    )
