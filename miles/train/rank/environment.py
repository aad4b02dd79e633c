"""The environment variables of a rank, set before torch is imported.

Those of `--train-env-vars` come first. A GPU's rank also gets what Miles gives to its job, each
unless it is set already:

    CUDA_DEVICE_MAX_CONNECTIONS=1                  kernels start in the order of their calls, which
                                                   Megatron's overlap of communication relies on
    PYTORCH_ALLOC_CONF=expandable_segments:True    less fragmentation: micro-batches differ in size
    NCCL_NVLS_ENABLE=1 or 0                        NVLink SHARP, where the GPUs have NVLink
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Mapping

from miles.train.types import RankEnvironment

_ALLOCATOR_NAMES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""torch reads the second one, its older name, first: to set one is to decide about both."""
_NVLINK_SECONDS = 30.0


def variables_to_set(
    environment: RankEnvironment, current: Mapping[str, str], *, has_nvlink: bool | None
) -> dict[str, str]:
    """Return the variables that a rank's process has to set.

    Args:
        current: those that it has.
        has_nvlink: the machine's GPUs have NVLink; None: unknown, so that NCCL decides.
    """
    if not environment.has_gpu:
        return dict(environment.given)

    of_driver = environment.of_driver
    variables = {name: text for name, text in of_driver.items() if name not in current}
    variables.update(environment.given)
    known = {*current, *variables}

    if "CUDA_DEVICE_MAX_CONNECTIONS" not in known:
        variables["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    if not any(name in known for name in _ALLOCATOR_NAMES):
        variables["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    if "NCCL_NVLS_ENABLE" not in known and has_nvlink is not None:
        variables["NCCL_NVLS_ENABLE"] = str(int(has_nvlink))
    return variables


def shows_nvlink(topology: str) -> bool:
    """Return whether a table of `nvidia-smi topo -m` has GPUs that NVLink connects.

    A cell is `NV` with the number of links, such as NV18; the legend has `NV#`.
    """
    return re.search(r"\bNV\d+\b", topology) is not None


def find_nvlink() -> bool | None:
    """Return whether this machine's GPUs have NVLink; None where `nvidia-smi` does not tell."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    try:
        done = subprocess.run(  # noqa: S603 - no word of it comes from a user
            [program, "topo", "-m"],
            capture_output=True,
            text=True,
            timeout=_NVLINK_SECONDS,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return shows_nvlink(done.stdout)
