"""How the failures of rank processes are told apart: mistakes, losses, and what follows from them."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from miles.errors import LostError, MilesError, RunError, SourceError
from miles.train.config import ClusterConfig
from miles.train.driver import group
from miles.train.driver.group import TrainerGroup
from miles.train.rank.actor import TrainerActor
from miles.train.types import ExportPart
from tests.support.fault_table import SINCE, observed
from tests.support.processes import wait_until

GLOO = "[third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:5"


class FaultyActor(TrainerActor):
    """Rank 1 fails as a file says. Rank 0 waits for it, or is the first to notice its death."""

    def load_modules(self) -> None:
        """Import nothing: these ranks train nothing."""

    def write_export(self, folder: str) -> ExportPart:
        fault = (Path(folder) / "fault").read_text()
        if self.rank == 0:
            wait_until((Path(folder) / "let-go").exists)
            if fault == "death":
                raise RuntimeError(GLOO)
            return ExportPart(0)

        if fault == "index":
            assert [][1]
        elif fault == "memory":
            torch.empty(1 << 50)
        elif fault == "file":
            Path("/data/run/config.json").read_text()
        elif fault == "ours":
            raise SourceError("rows.parquet: no such file")
        elif fault == "death":
            (Path(folder) / "let-go").touch()
            time.sleep(2)  # the one that missed it is heard first
            os.kill(os.getpid(), signal.SIGKILL)
        return ExportPart(0)


@pytest.fixture(scope="module")
def ranks() -> Iterator[TrainerGroup]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(group, "TrainerActor", FaultyActor)
        ranks = TrainerGroup(ClusterConfig(gpus_per_node=2), on_gpu=False)
    yield ranks
    ranks.shut_down()


def failure(ranks: TrainerGroup, folder: Path, fault: str) -> MilesError:
    (folder / "fault").write_text(fault)
    with pytest.raises(MilesError) as raised:
        ranks.write_export(str(folder))
    (folder / "let-go").touch()
    return raised.value


@pytest.mark.parametrize(
    ("fault", "reason", "row"),
    [
        ("index", "IndexError: list index out of range, at ", None),
        ("memory", "RuntimeError: ", "no memory left in a trainer"),
        ("file", "FileNotFoundError: ", "file that one node lacks"),
    ],
)
def test_a_mistake_in_one_rank_waits_for_no_other(
    ranks: TrainerGroup,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fault: str,
    reason: str,
    row: str | None,
) -> None:
    monkeypatch.setattr(group, "ROOT_CAUSE_SECONDS", 3600)
    error = failure(ranks, tmp_path, fault)
    assert type(error) is RunError
    assert str(error).startswith(f"trainer 1 failed during 'write_export': {reason}")
    assert "in write_export" in error.remote_stack
    if row is not None:
        observed(row, str(error), "trainer 1 failed", SINCE)


def test_an_error_of_ours_in_a_rank_stays_itself(ranks: TrainerGroup, tmp_path: Path) -> None:
    error = failure(ranks, tmp_path, "ours")
    assert type(error) is SourceError
    assert str(error) == "rows.parquet: no such file"


def test_a_death_is_the_cause_though_a_peer_is_heard_first(
    ranks: TrainerGroup, tmp_path: Path
) -> None:
    error = failure(ranks, tmp_path, "death")
    assert type(error) is LostError
    assert str(error).startswith("trainer 1 died during 'write_export': ActorDiedError: ")
