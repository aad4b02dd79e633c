"""Where metrics go: metrics.jsonl in the run's folder always; TensorBoard and Weights & Biases where asked."""

from __future__ import annotations

import json
import math
from typing import Any

from miles import storage
from miles.errors import ConfigError


class MetricsLog:
    """Appends to metrics.jsonl, and to TensorBoard where asked.

    Args:
        url: the run's folder. Remote: the file is kept in memory and written whole at each checkpoint.
        num_lines: of an existing file that are kept; what a killed run wrote beyond its checkpoint comes again.
    """

    def __init__(self, url: str, num_lines: int, *, tensorboard: bool = False) -> None:
        self._path = storage.join(url, "metrics.jsonl")
        old = storage.read_text(self._path).splitlines() if num_lines and storage.exists(self._path) else []
        self._lines = old[:num_lines]
        self._local = storage.is_local(url)
        storage.write_text(self._path, "".join(line + "\n" for line in self._lines))
        self._stream = open(storage.filesystem(self._path)[1], "a", buffering=1) if self._local else None  # noqa: SIM115
        self._board: Any = None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise ConfigError("--use-tensorboard needs its package: pip install miles[tensorboard]") from error
            self._board = SummaryWriter(storage.filesystem(storage.join(url, "tensorboard"))[1])

    @property
    def num_lines(self) -> int:
        return len(self._lines)

    def write(self, metrics: dict[str, float | int | str]) -> None:
        line = json.dumps({key: _finite(value) for key, value in metrics.items()})
        self._lines.append(line)
        if self._stream:
            self._stream.write(line + "\n")
        if self._board:
            for key, value in metrics.items():
                if isinstance(value, (int, float)) and key != "step":
                    self._board.add_scalar(key, value, metrics["step"])

    def flush(self) -> None:
        if not self._stream:
            storage.write_text(self._path, "".join(line + "\n" for line in self._lines))

    def close(self) -> None:
        self.flush()
        if self._stream:
            self._stream.close()
        if self._board:
            self._board.close()


def _finite(value: float | int | str) -> float | int | str | None:
    return None if isinstance(value, float) and not math.isfinite(value) else value
