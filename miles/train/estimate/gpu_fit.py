"""The memory of a run against that of GPUs: on which it fits, and what would lower its need.

    StageMemory of each pipeline stage -> the fullest, with a tenth to spare -> GpuFit

It is an estimate, so it forbids no run that may fit: a dry run ends with an error where no GPU of
the table holds the model, a run only says so.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from miles.errors import ConfigError
from miles.train.config import TrainConfig
from miles.train.estimate.memory import StageMemory

CARDS_GIB = (24, 40, 48, 80, 141, 192)
"""Memory of common GPUs."""
SPARE = 0.1
"""Share of a card that is left to CUDA, NCCL and fragmentation."""
LARGE_CARD_GIB = 80
"""If a run needs more than this, the text says what would lower its need."""
_GPU_DEVICES = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")
"""Files of a machine with GPUs: of Linux, of Linux within Windows, and of AMD's."""


@dataclass(frozen=True)
class GpuFit:
    """The memory that a run needs of each GPU, and the GPUs that have it."""

    need_gib: float
    """with a tenth to spare"""
    seen_gib: float | None
    """memory of this machine's GPU; None: it has none"""
    remedy: str
    """what would lower the need"""

    @classmethod
    def of(
        cls, config: TrainConfig, memory: Sequence[StageMemory], seen_gib: float | None
    ) -> GpuFit:
        """Return the fit of a run whose stages take this memory."""
        fullest = max(memory, key=lambda stage: stage.total)
        need_gib = fullest.total / 2**30 / (1 - SPARE)
        return cls(need_gib, seen_gib, _remedy(config, fullest))

    @property
    def fits_seen(self) -> bool:
        """Return whether this machine's GPU has the memory; True where it has none."""
        return self.seen_gib is None or self.seen_gib >= self.need_gib

    @property
    def smallest_gib(self) -> float | None:
        """Return the memory of the smallest common GPU that is large enough."""
        return next((card for card in CARDS_GIB if card >= self.need_gib), None)

    def verdict(self) -> Iterator[str]:
        """Yield the lines of the dry run: where it fits, and what would lower the need."""
        spare = f"(with {SPARE:.0%} to spare)"
        if self.smallest_gib is not None:
            yield f"fits on GPUs of {self.smallest_gib} GiB or more {spare}"
        else:
            yield f"fits on no GPU of {CARDS_GIB[-1]} GiB or less {spare}"
        if not self.fits_seen:
            yield f"not on the GPU of this machine, of {self.seen_gib:,.0f} GiB"
        if self.need_gib > LARGE_CARD_GIB or not self.fits_seen:
            yield self.remedy

    def notices(self) -> Iterator[str]:
        """Yield the sentence that a run begins with if its GPU is too small by this estimate."""
        if not self.fits_seen:
            yield (
                f"this machine's GPU has {self.seen_gib:,.0f} GiB; the run is estimated to need "
                f"{self.need_gib:,.0f} GiB of each GPU (docs/memory.md); {self.remedy}"
            )

    def require_some_gpu(self) -> None:
        """Refuse a run for which no common GPU is large enough, nor that of this machine.

        Raises:
            ConfigError: says what would lower the need.
        """
        fits_here = self.seen_gib is not None and self.fits_seen
        if self.smallest_gib is None and not fits_here:
            raise ConfigError(
                f"each GPU would need {self.need_gib:,.0f} GiB by the estimate (docs/memory.md), "
                f"more than the {CARDS_GIB[-1]} GiB of the largest known one; {self.remedy}"
            )


def has_gpu() -> bool:
    """Return whether torch has a GPU to compute on, on this machine."""
    # torch takes seconds to import: it is asked only where there is something to ask for.
    if not any(os.path.exists(path) for path in _GPU_DEVICES):
        return False
    import torch

    return torch.cuda.is_available()


def seen_gpu_gib() -> float | None:
    """Return the memory of this machine's smallest GPU in GiB; None where it has none."""
    if not has_gpu():
        return None
    import torch

    devices = range(torch.cuda.device_count())
    return min(torch.cuda.get_device_properties(gpu).total_memory for gpu in devices) / 2**30


def _remedy(config: TrainConfig, fullest: StageMemory) -> str:
    """Return what takes most of the memory, and what would lower it."""
    of_micro_batch = fullest.activations + fullest.loss
    if of_micro_batch > fullest.total - of_micro_batch:
        remedy = "--max-tokens-per-gpu lower"
        if config.recompute.granularity != "full":
            remedy += ", or --recompute-granularity full"
        return f"most of it are activations and the loss: {remedy} helps"

    remedy = "more GPUs, or tensor, pipeline or expert parallelism help"
    if not config.optimizer.cpu_offload:
        remedy += ", or --optimizer-cpu-offload"
    return f"most of it are weights and their state: {remedy}"
