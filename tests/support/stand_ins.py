"""Stages of the stream that are slow, wait, die or take notes: given as `pipeline.LoaderStages`."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from miles.data.stream import pipeline, stages
from tests.support.processes import wait_until


def steps_of(table: pa.Table) -> Iterator[pa.Table]:
    """Yield each step of a block as a block of its own."""
    return (table.slice(number, 1) for number in range(table.num_rows))


class GatedRead(pipeline.Read):
    """Reads as ever, once a file is there."""

    def __init__(self, gate: str, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.opened_by = Path(gate)

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        wait_until(self.opened_by.exists)
        yield from super().__call__(table)


class NotedRead(pipeline.Read):
    """Leaves a file for each window that is read."""

    def __init__(self, folder: str, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.folder = Path(folder)

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        read_window = stages.read_window

        def noted(manifest: Any, plan: Any, ref: Any, start_row: int) -> Iterator[pa.Table]:
            (self.folder / str(ref.first_step)).touch()
            return read_window(manifest, plan, ref, start_row)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(stages, "read_window", noted)
            yield from super().__call__(table)


class SlowPack:
    """Packs slowly, and leaves a file for each step that it begins and for each that it makes."""

    def __init__(self, folder: str, seconds: float, config: Any) -> None:
        self.folder = Path(folder)
        self.seconds = seconds
        self.config = config

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        for encoded in steps_of(table):
            name = f"{encoded['step'][0].as_py()}-{os.getpid()}"
            (self.folder / f"begun-{name}").touch()
            time.sleep(self.seconds)
            packed = stages.pack_steps(encoded, self.config)
            (self.folder / f"made-{name}").touch()
            yield packed


class PackWithFault:
    """Packs, and looks at each step before it leaves."""

    def __init__(self, config: Any) -> None:
        self.config = config

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        for packed in steps_of(stages.pack_steps(table, self.config)):
            self.meet(packed["step"][0].as_py(), packed)
            yield packed

    def meet(self, step: int, packed: pa.Table) -> None:
        """Have the fault, if it is of this step."""
        raise NotImplementedError


class StuckPack(PackWithFault):
    """Packs up to a step, and never goes on from there."""

    def __init__(self, step: int, config: Any) -> None:
        super().__init__(config)
        self.step = step

    def meet(self, step: int, packed: pa.Table) -> None:
        if step == self.step:
            time.sleep(3600)


class RaisingPack(PackWithFault):
    """Packs up to a step, and has a mistake in it there."""

    def __init__(self, step: int, config: Any) -> None:
        super().__init__(config)
        self.step = step

    def meet(self, step: int, packed: pa.Table) -> None:
        if step == self.step:
            raise IndexError("list index out of range")


class PoisonedPack(PackWithFault):
    """Packs, and dies of one row each time, as a tokenizer's native code might."""

    def __init__(self, folder: str, row_id: int, config: Any) -> None:
        super().__init__(config)
        self.folder = Path(folder)
        self.row_id = row_id

    def meet(self, step: int, packed: pa.Table) -> None:
        if self.row_id in packed["segment_row_ids"][0].as_py():
            (self.folder / f"death-{os.getpid()}").touch()
            os.kill(os.getpid(), signal.SIGKILL)


class MortalPack(PackWithFault):
    """Packs, and dies when it comes to a step, the first two times. Notes what is imported."""

    def __init__(self, folder: str, step: int, config: Any) -> None:
        super().__init__(config)
        self.folder = Path(folder)
        self.step = step

    def meet(self, step: int, packed: pa.Table) -> None:
        large = [name for name in ("torch", "transformers") if name in sys.modules]
        (self.folder / f"imported-{os.getpid()}").write_text(" ".join(large))
        for number in range(2):
            mark = self.folder / f"killed-{number}"
            if step == self.step and not mark.exists():
                mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)
