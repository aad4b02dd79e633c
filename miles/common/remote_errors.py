"""The errors of other processes: which of them mean a loss, and which would come again.

    a process, a node, an object is gone; nobody answers       LostError: the run starts again
    a collective failed, a GPU broke, the network failed       LostError
    an error of ours (`miles.errors`)                          the same error
    anything else: an index, a wrong file, no memory left      RunError: it would come again

A collective fails on a rank whose peer is gone. So a failure may follow from that of another
process, which is the cause (`RemoteFailure.may_follow`).

torch is not imported here. Its errors are known by the names of their classes and by their texts.
"""

from __future__ import annotations

import errno
import re
import traceback
from dataclasses import dataclass, replace
from typing import Any

from ray import exceptions as ray_errors

from miles import errors
from miles.common import retry
from miles.common.debugging import one_paragraph
from miles.errors import ClusterError, LostError, MilesError, RunError

_AGAIN = "Another start would fail in the same way"
_MEMORY_ADVICE = (
    "Give the ranks less at a time: a smaller --max-tokens-per-gpu, --recompute-granularity full, "
    "or more ranks"
)
_FILE_ADVICE = "Every node needs the same files, packages and credentials as the driver"

_OUT_OF_MEMORY = re.compile(
    r"out of memory|can't allocate memory|CUBLAS_STATUS_ALLOC_FAILED|^(Array)?MemoryError\b", re.I
)
_LASTING = re.compile(
    r"device-side assert|ncclInvalid(Usage|Argument)|invalid usage|op\.preamble", re.I
)
"""Errors of a GPU or of a collective that come from a mistake: a wrong index, ranks out of step."""
_COLLECTIVE = re.compile(
    r"^Dist\w*Error\b|\bgloo\b|\bNCCL|\bnccl|TCPStore|connectFullMesh|socket timeout"
    r"|connection (closed|reset|refused)|broken pipe|pair closure"
    r"|timed out (after|waiting)|collective operation timeout|wait timeout",
    re.I,
)
_BROKEN_GPU = re.compile(
    r"(CUDA|CUBLAS|CUDNN|NVML|GPU).*(\bECC\b|launch failure|launch timed out|illegal memory access"
    r"|illegal instruction|misaligned address|hardware stack|unknown error|device.*lost"
    r"|off the bus|busy or unavailable|not (yet )?initialized|EXECUTION_FAILED|nvlink)",
    re.I | re.S,
)
_OF_A_NODE = re.compile("^(ModuleNotFound|Import)Error$|Credential")
"""Names of errors of what a node lacks."""
_PASSING_NUMBERS = frozenset(
    (
        errno.EIO,
        errno.ESTALE,
        errno.ETIMEDOUT,
        errno.EHOSTUNREACH,
        errno.ENETUNREACH,
        errno.ENETDOWN,
        errno.EADDRINUSE,
    )
)

_RAY_LASTING = {
    "ObjectStoreFullError": "Let the stream hold less (--prefetch-steps, --shuffle-window), or "
    "start the cluster with a larger --object-store-memory",
    "OutOfDiskError": "Make room on the disk of Ray's temporary folder (/tmp/ray)",
    "RuntimeEnvSetupError": "Correct the job's runtime environment",
    "AuthenticationError": "Give every node the token of the cluster",
    "PendingCallsLimitExceeded": _AGAIN,
}
"""Errors of Ray that say what the cluster lacks, and what to do. All others of its own mean a loss.

Older versions of Ray do not have all of them.
"""

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_FRAME = re.compile(r'^\s*File "([^"<]+)", line (\d+), in ', re.M)
_BESIDE_THE_PACKAGE = ("tests/", "benchmarks/", "pipelines/")
"""Folders of a checkout, which may be called miles, too."""
_CARETS = re.compile(r"^[\s^~]*$")
_RAY_DETAIL = re.compile(
    r".*?class_name: (?P<name>\S+).*?pid: (?P<pid>\d+).*?ip: (?P<ip>\S+)\s+(?P<text>.*)", re.S
)
_RAY_GUESSES = re.compile(r"\s*Some common causes include:.*", re.S)


@dataclass(frozen=True)
class RemoteFailure:
    """The meaning of an error of another process."""

    reason: str
    """the error on one line, with its place in the code where that helps"""
    own: MilesError | None = None
    """the error of ours that it is or holds"""
    kind: type[MilesError] = RunError
    """of the error to raise, where it is none of ours"""
    has_died: bool = False
    """a process, node or object is gone"""
    may_follow: bool = False
    """it may follow from the failure of another process"""
    advice: str = ""
    """what to do about an error that would come again"""
    stack: str = ""
    source: BaseException | None = None
    """the error that came"""

    def as_error(self, subject: str) -> MilesError:
        """Return the error to raise.

        Args:
            subject: begins the message, "trainer 1 failed during 'setup'", unless the error is one
            of ours.
        """
        if self.own is not None:
            return self.own
        error = self.kind(f"{subject}: {self.reason}{self.advice and '. '}{self.advice}")
        if isinstance(error, RunError):
            error.remote_stack = self.stack
        return error


def judge(error: BaseException) -> RemoteFailure:
    """Return what an error means.

    Args:
        error: that Ray raised for another process; or of this process, for those elsewhere.
    """
    own = _own_error(error)
    if own is not None:
        failure = RemoteFailure(str(own), own=own)
    elif isinstance(error, ray_errors.RayTaskError):
        failure = _judge_task(error)
    elif isinstance(error, ray_errors.RayError):
        failure = _judge_ray(error)
    else:
        failure = _judge_python(error, "".join(traceback.format_exception(error)))
    return replace(failure, source=error)


def _own_error(error: BaseException) -> MilesError | None:
    """Return the error of ours inside what Ray made of it; None if there is none.

    Ray's error for a task is of the task's class, too, so the class's module counts.
    """
    seen: BaseException | None = error
    while seen is not None:
        cause = getattr(seen, "cause", None)
        for candidate in (cause, seen):
            if (
                isinstance(candidate, MilesError)
                and type(candidate).__module__ == MilesError.__module__
            ):
                return candidate
        seen = cause if isinstance(cause, BaseException) else seen.__cause__
    return None


def _judge_task(error: ray_errors.RayTaskError) -> RemoteFailure:
    """Judge the exception that a task or an actor's method raised."""
    cause: Any = error.cause
    stack = _stack_of(error)
    if isinstance(cause, ray_errors.RayError):
        # Ray puts a plain `RayError` in the place of an exception that cannot travel.
        is_stand_in = type(cause) in (ray_errors.RayError, ray_errors.UserCodeException)
        return _judge_text(_last_line(stack), stack) if is_stand_in else _judge_ray(cause)
    return _judge_python(cause, stack)


def _judge_ray(error: ray_errors.RayError) -> RemoteFailure:
    """Judge an error of Ray's own."""
    name = type(error).__name__
    is_in_init = getattr(error, "actor_init_failed", False)
    if is_in_init or isinstance(error, ray_errors.UnserializableException):
        stack = _stack_of(error)
        return _judge_text(_last_line(stack), stack)

    text = _COLOUR.sub("", str(error))
    if name in _RAY_LASTING:
        advice = _RAY_LASTING[name]
        return RemoteFailure(f"{name}: {one_paragraph(text)}", kind=ClusterError, advice=advice)

    died = _RAY_DETAIL.match(text)
    if died:
        detail = _RAY_GUESSES.sub("", died["text"])
        text = f"{died['name']} (pid {died['pid']}, {died['ip']}) {detail}"
    return RemoteFailure(f"{name}: {one_paragraph(text)}", kind=LostError, has_died=True)


def _judge_python(error: BaseException, stack: str) -> RemoteFailure:
    """Judge an exception of Python."""
    text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    if isinstance(error, OSError) and not _is_passing(error):
        return RemoteFailure(_with_place(text, stack), advice=_FILE_ADVICE, stack=stack)
    is_pipe_cut = isinstance(error, EOFError) and "/multiprocessing/" in stack
    if is_pipe_cut or _is_passing(error):
        return RemoteFailure(_with_place(text, stack), kind=LostError, may_follow=True)
    return _judge_text(text, stack)


def _judge_text(text: str, stack: str) -> RemoteFailure:
    """Judge an exception by its class's name and its message."""
    class_path, colon, message = text.partition(": ")
    module, _, name = class_path.rpartition(".")
    if module == MilesError.__module__:
        own = getattr(errors, name)(message)
        return RemoteFailure(str(own), own=own)
    if " " not in class_path:
        text = f"{name}{colon}{message}"

    reason = _with_place(text, stack)
    if _OUT_OF_MEMORY.search(text):
        return RemoteFailure(reason, advice=_MEMORY_ADVICE, stack=stack)
    if not _LASTING.search(text):
        if _BROKEN_GPU.search(text):
            return RemoteFailure(reason, kind=LostError)
        if _COLLECTIVE.search(text):
            return RemoteFailure(reason, kind=LostError, may_follow=True)

    advice = _FILE_ADVICE if _OF_A_NODE.search(name) else _AGAIN
    is_collective = "torch/distributed/" in stack
    return RemoteFailure(reason, may_follow=is_collective, advice=advice, stack=stack)


def _is_passing(error: BaseException) -> bool:
    """Return whether an exception tells of a network or disk that failed for a moment."""
    if isinstance(error, OSError):
        is_network = isinstance(error, (ConnectionError, TimeoutError))
        return is_network or error.errno in _PASSING_NUMBERS
    return retry.is_transient(error)


def _with_place(text: str, stack: str) -> str:
    """Return an error's text with the place that raised it, and ours that called that.

    IndexError: index out of range, at torch/nn/functional.py:2551, from miles/train/model/gpt.py:4
    """
    frames = [(_short(path), number) for path, number in _FRAME.findall(stack)]
    if not frames:
        return one_paragraph(text)
    path, number = frames[-1]
    place = f"{path}:{number}"
    of_ours = [frame for frame in frames if frame[0].startswith("miles/")]
    if of_ours and of_ours[-1] != frames[-1]:
        place += f", from {of_ours[-1][0]}:{of_ours[-1][1]}"
    return f"{one_paragraph(text).rstrip('.')}, at {place}"


def _short(path: str) -> str:
    """Return a file's path from its package on."""
    for root in ("site-packages/", "dist-packages/"):
        if root in path:
            return path.rpartition(root)[2]
    _, is_ours, rest = path.rpartition("/miles/")
    if is_ours and not rest.startswith(_BESIDE_THE_PACKAGE):
        return f"miles/{rest}"
    return path


def _stack_of(error: ray_errors.RayError) -> str:
    """Return the traceback that Ray keeps as the text of an error."""
    lines = _COLOUR.sub("", str(error)).splitlines()
    return "\n".join(line for line in lines if not _CARETS.match(line))


def _last_line(stack: str) -> str:
    """Return the line of a printed traceback that has the exception."""
    return stack.splitlines()[-1].strip() if stack else ""
