"""The Ray cluster of a run; it needs room for the trainers, and one folder for checkpoints."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import ray

from miles.common import local_ray, remote_errors, storage
from miles.common.counts import counted
from miles.common.ray_address_form import find_address
from miles.errors import CheckpointError, NoRoomError, WriteError
from miles.train.config import TrainConfig
from miles.train.driver.group import TrainerGroup
from miles.train.driver.run_log import RunLog
from miles.train.estimate.gpu_fit import has_gpu
from miles.train.precision import Precision
from miles.train.types import StartPoint


@contextlib.contextmanager
def ray_cluster(
    config: TrainConfig, show: Callable[[str], None] = lambda text: None
) -> Iterator[bool]:
    """Connect to the Ray that is running, or start a small one that ends with the run.

    Args:
        show: is told, in a line, what is waited for.

    Yields:
        True if the cluster has GPUs, so that each trainer gets one.

    Raises:
        NoRoomError: it cannot hold the trainers beside the loader.
        ClusterError: it cannot be started or joined, or failed outside of an attempt.
    """
    if not ray.is_initialized():
        show(_what_comes(config.cluster.ray_address))
    num_cpus = None if has_gpu() else config.data.stream.loader_cpus
    is_own = local_ray.connect(
        num_cpus, config.cluster.object_store_bytes, config.cluster.ray_address
    )
    try:
        resources = ray.cluster_resources()
        has_gpus = resources.get("GPU", 0) > 0
        _require_room(config, resources.get("CPU", 0), resources.get("GPU", 0))
        yield has_gpus
    except ray.exceptions.RayError as error:
        raise remote_errors.judge(error).as_error("Ray failed") from error
    finally:
        if is_own:
            ray.shutdown()


def _what_comes(ray_address: str | None) -> str:
    """Return what is done to have a Ray, as a line for the terminal."""
    address = find_address(ray_address)
    return "starting Ray" if address is None else f"joining Ray at {address.text}"


def settle_device(
    config: TrainConfig, run_log: RunLog, start: StartPoint, *, has_gpus: bool
) -> TrainConfig:
    """Return the settings for the trainers' device and the checkpoint; report what these chose.

    Without a flag, a run that resumes stays in the precision of its checkpoint.
    """
    trained_in = start.trained_in(config)
    settled = start.continued(config).for_device(has_gpus=has_gpus)
    precision = settled.precision
    assert precision is not None

    default = Precision.BF16 if has_gpus else Precision.FP32
    if config.precision is not None:
        if trained_in not in (None, precision):
            run_log.report(
                f"computing in {precision} from here on; the checkpoint was trained in "
                f"{trained_in} ({trained_in.flag} keeps that)"
            )
    elif precision is not default:
        run_log.report(
            f"computing in {precision}, as the checkpoint was trained ({default.flag}: in "
            f"{default})"
        )
    elif not has_gpus:
        run_log.report("no GPU: computing in float32 on the CPU (--bf16: in bfloat16)")
    elif start.is_resume and trained_in is None:
        run_log.report(
            "computing in bfloat16: the checkpoint does not say what it was trained in "
            "(--no-bf16: in float32)"
        )
    return settled


def _require_room(config: TrainConfig, num_cpus: float, num_gpus: float) -> None:
    """Refuse a cluster that cannot hold the trainers beside the loader.

    On a cluster without GPUs, the trainers reserve no CPU.
    """
    num_trainers = config.cluster.world_size
    loader_cpus = config.data.stream.loader_cpus
    if num_gpus and num_gpus < num_trainers:
        raise NoRoomError(f"{num_trainers} trainers need a GPU each; Ray has {num_gpus:g}")

    num_needed = loader_cpus + num_trainers if num_gpus else loader_cpus
    if num_cpus < num_needed:
        raise NoRoomError(
            f"Ray has {counted(num_cpus, 'CPU')}; the trainers and --loader-cpus {loader_cpus} need "
            f"{num_needed}"
        )


def require_shared_folder(save: str, group: TrainerGroup) -> None:
    """Refuse a local folder for checkpoints that a rank does not see: it would write into its own.

    Raises:
        CheckpointError: names the machines.
    """
    if not storage.is_local(save):
        return
    probe = storage.join(save, ".shared")
    storage.write_text(probe, "")
    try:
        nodes = group.nodes_without(probe)
    finally:
        with contextlib.suppress(WriteError):  # an empty file that stays harms nothing
            storage.remove(probe, max_tries=1)

    if nodes:
        raise CheckpointError(
            f"--save {save} is not the same folder on {', '.join(nodes)}: give one that all nodes "
            "share, or a URL such as s3://bucket/run"
        )
