"""What the errors of other processes mean: a loss, a mistake, or an error of ours."""

from __future__ import annotations

import errno
import traceback
from pathlib import Path

import pytest

from miles.common import remote_errors
from miles.errors import (
    ClusterError,
    ConfigError,
    LostError,
    MilesError,
    RunError,
    SourceError,
)

ray_errors = remote_errors.ray_errors


class DistBackendError(RuntimeError):
    """As torch names its error of NCCL."""


class OutOfMemoryError(RuntimeError):
    """As torch names its error."""


class NoCredentialsError(Exception):
    """As botocore names its error."""


def task_error(error: Exception) -> ray_errors.RayTaskError:
    """Return what Ray makes of an error that an actor's method raised."""
    try:
        raise error
    except Exception as raised:
        stack = "".join(traceback.format_exception(raised))
    return ray_errors.RayTaskError("f", stack, error, "ray::T.f", 17, "127.0.0.1")


def in_a_task(error: Exception) -> ray_errors.RayTaskError:
    """Return what `ray.get` raises where an actor's method raised an error."""
    return task_error(error).as_instanceof_cause()


def meaning(error: BaseException) -> MilesError:
    return remote_errors.judge(error).as_error("trainer 1 failed during 'train_step'")


GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] "
NCCL = "NCCL error in: ProcessGroupNCCL.cpp:2093, "


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(GLOO + "Connection closed by peer [127.0.0.1]:52043"),
        RuntimeError(GLOO + "Read error [10.0.0.7]:4417: Connection reset by peer"),
        RuntimeError("Timed out waiting 1800000ms for recv operation to complete"),
        RuntimeError("Application timeout caused pair closure"),
        DistBackendError(NCCL + "remote process exited or there was a network error"),
        DistBackendError(
            "[Rank 1] Watchdog caught collective operation timeout: ran for 600004 ms"
        ),
        ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"),
        TimeoutError("no answer"),
        OSError(errno.ESTALE, "Stale file handle"),
    ],
)
def test_what_may_follow_from_a_lost_peer_is_a_loss(error: Exception) -> None:
    failure = remote_errors.judge(in_a_task(error))
    assert isinstance(failure.as_error("trainer 1"), LostError)
    assert failure.may_follow


@pytest.mark.parametrize(
    "text",
    [
        "CUDA error: uncorrectable ECC error encountered",
        "CUDA error: unspecified launch failure",
        "CUDA error: an illegal memory access was encountered",
        "CUDA driver error: unknown error",
        "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`",
        "CUDA error: all CUDA-capable devices are busy or unavailable",
    ],
)
def test_a_broken_gpu_is_a_loss_and_its_own_cause(text: str) -> None:
    failure = remote_errors.judge(in_a_task(RuntimeError(text)))
    assert isinstance(failure.as_error("trainer 1"), LostError)
    assert not failure.may_follow


@pytest.mark.parametrize(
    "error",
    [
        ray_errors.ActorDiedError(),
        ray_errors.ActorUnavailableError("no answer", None),
        ray_errors.WorkerCrashedError(),
        ray_errors.LocalRayletDiedError(),
        ray_errors.NodeDiedError("a node died"),
        ray_errors.OutOfMemoryError("Task was killed due to the node running low on memory."),
        ray_errors.OwnerDiedError("ab", None, ""),
        ray_errors.ObjectLostError("ab", None, ""),
        ray_errors.ObjectReconstructionFailedError("ab"),
        ray_errors.RaySystemError("the raylet is gone"),
        ray_errors.RpcError("unavailable"),
        ray_errors.GetTimeoutError("no answer"),
        ray_errors.ActorUnschedulableError("its node is gone"),
    ],
)
def test_what_ray_says_is_gone_is_a_loss(error: ray_errors.RayError) -> None:
    for raised in (error, in_a_task(error)):
        failure = remote_errors.judge(raised)
        assert failure.has_died
        assert not failure.may_follow
        text = str(failure.as_error("trainer 1 died"))
        assert isinstance(failure.as_error("trainer 1 died"), LostError)
        assert text.startswith(f"trainer 1 died: {type(error).__name__}: ")
        assert "\n" not in text


@pytest.mark.parametrize(
    ("error", "reason", "advice"),
    [
        (IndexError("list index out of range"), "IndexError: list index", "in the same way"),
        (AssertionError(), "AssertionError, at ", "in the same way"),
        (ValueError("two\nlines"), "ValueError: two lines, at ", "in the same way"),
        (OutOfMemoryError("CUDA out of memory. Tried"), "CUDA out of", "--max-tokens-per-gpu"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9"), "can't", "--recompute"),
        (MemoryError(), "MemoryError", "--max-tokens-per-gpu"),
        (DistBackendError(NCCL + "Cuda failure 2 'out of memory'"), "NCCL", "--max-tokens-per-gpu"),
        (RuntimeError("CUDA error: device-side assert triggered"), "assert", "in the same way"),
        (RuntimeError("CUDA error: invalid device ordinal"), "ordinal", "in the same way"),
        (DistBackendError(NCCL + "ncclInvalidUsage: Duplicate GPU"), "NCCL", "in the same way"),
        (RuntimeError(f"{GLOO}op.preamble.length <= op.nbytes"), "gloo", "in the same way"),
        (FileNotFoundError(errno.ENOENT, "No such file", "/x/c.json"), "/x/c.json", "Every node"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), "Permission", "Every node"),
        (ModuleNotFoundError("No module named 'liger'"), "liger", "Every node"),
        (NoCredentialsError("Unable to locate credentials"), "NoCredentials", "Every node"),
    ],
)
def test_what_would_come_again_ends_the_run(error: Exception, reason: str, advice: str) -> None:
    raised = meaning(in_a_task(error))
    text = str(raised)
    assert type(raised) is RunError
    assert text.startswith("trainer 1 failed during 'train_step': ")
    assert reason in text
    assert advice in text
    assert "test_remote_errors.py:" in text, "the place that raised it"
    assert "\n" not in text
    assert type(error).__name__ in raised.remote_stack


def test_a_place_in_a_library_is_named_with_ours_that_led_there() -> None:
    frames = [
        '  File "/srv/miles/tests/support/stand_ins.py", line 7, in call',
        '  File "/srv/miles/miles/train/rank/trainer.py", line 140, in train_step',
        '  File "/srv/.venv/lib/python3.11/site-packages/torch/nn/functional.py", line 9, in embed',
        "IndexError: index out of range in self",
    ]
    stack = "\n".join(frames)
    error = ray_errors.RayTaskError("f", stack, IndexError("index out of range in self"))
    place = "at torch/nn/functional.py:9, from miles/train/rank/trainer.py:140."
    assert place in str(meaning(error))

    in_a_test = ray_errors.RayTaskError("f", "\n".join(frames[::-1][1:]), IndexError("9"))
    assert "at /srv/miles/tests/support/stand_ins.py:7, from miles/train/" in str(
        meaning(in_a_test)
    )


def test_an_unknown_error_of_a_collective_may_follow_from_a_death() -> None:
    stack = '  File "/x/torch/distributed/c10d.py", line 7, in all_reduce\nRuntimeError: odd'
    error = ray_errors.RayTaskError("f", stack, RuntimeError("odd"))
    assert remote_errors.judge(error).may_follow
    assert type(meaning(error)) is RunError
    assert not remote_errors.judge(in_a_task(RuntimeError("odd"))).may_follow


def test_the_end_of_a_process_beside_a_rank_is_a_loss() -> None:
    stack = '  File "/usr/lib/multiprocessing/connection.py", line 7, in _recv\nEOFError'
    of_pipe = ray_errors.RayTaskError("f", stack, EOFError(), "ray::T.f", 17, "127.0.0.1")
    assert type(meaning(of_pipe)) is LostError
    assert type(meaning(in_a_task(EOFError("ran out of input")))) is RunError


def test_an_error_of_ours_stays_itself(tmp_path: Path) -> None:
    error = SourceError(f"{tmp_path}: no such file")
    for raised in (error, in_a_task(error), task_error(error), in_a_task(in_a_task(error))):
        assert meaning(raised) is error


def test_an_actor_that_cannot_be_made_ends_the_run() -> None:
    """Of its error, Ray keeps the text."""
    of_python = ray_errors.ActorDiedError(task_error(ValueError("a bad start")))
    assert type(meaning(of_python)) is RunError
    assert "ValueError: a bad start" in str(meaning(of_python))
    assert "Traceback" not in str(meaning(of_python))

    of_ours = meaning(ray_errors.ActorDiedError(task_error(ConfigError("a bad flag"))))
    assert type(of_ours) is ConfigError
    assert str(of_ours) == "a bad flag"


def test_an_exception_that_cannot_travel_is_known_by_its_text() -> None:
    class Odd(Exception):
        def __init__(self) -> None:
            super().__init__("odd")
            self.function = lambda: None

    raised = meaning(in_a_task(Odd()))
    assert type(raised) is RunError
    assert "Odd: odd" in str(raised)


def test_a_death_is_told_shortly() -> None:
    text = (
        "The actor died unexpectedly before finishing this task.\n\tclass_name: TrainerActor\n"
        "\tactor_id: c165\n\tpid: 16153\n\tnamespace: 76d6\n\tip: 10.0.0.7\n"
        "The actor is dead because its worker process has died. Worker exit detail: Worker "
        "unexpectedly exits with a connection error code 2. End of file. Some common causes "
        "include: (1) the process was killed by the OOM killer due to high memory usage"
    )
    error = ray_errors.RayActorError("c165", text)
    assert str(meaning(error)).endswith(
        "RayActorError: TrainerActor (pid 16153, 10.0.0.7) The actor is dead because its worker "
        "process has died. Worker exit detail: Worker unexpectedly exits with a connection error "
        "code 2. End of file."
    )


def test_a_full_store_says_what_the_cluster_lacks() -> None:
    raised = meaning(ray_errors.ObjectStoreFullError("7 bytes"))
    assert type(raised) is ClusterError
    assert "--prefetch-steps" in str(raised)
