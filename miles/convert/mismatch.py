"""The errors of a checkpoint whose tensors are not those that its config.json asks for."""

from __future__ import annotations

from collections.abc import Sequence

from miles.errors import CheckpointError


def missing_tensor(where: str, name: str) -> CheckpointError:
    """Return the error of a tensor that a checkpoint does not hold.

    Args:
        where: the checkpoint, or its file.
    """
    return CheckpointError(f"{where}: tensor {name} is missing; config.json asks for it")


def wrong_shape(
    where: str, name: str, shape: tuple[int, ...], expected: tuple[int, ...]
) -> CheckpointError:
    """Return the error of a tensor that has another shape than the model's."""
    return CheckpointError(
        f"{where}: tensor {name} has shape {shape}; config.json asks for {expected}"
    )


def unexpected_tensors(where: str, names: Sequence[str]) -> CheckpointError:
    """Return the error of tensors that the model does not have; there is at least one."""
    others = f", nor for {len(names) - 1} others" if names[1:] else ""
    return CheckpointError(f"{where}: config.json does not ask for tensor {names[0]}{others}")
