"""Starting Ray on this machine, or joining a cluster that is running.

A Ray that is started here belongs to this process alone and listens on 127.0.0.1 alone. Ray 2.60
binds a node's ports to every address of the machine, unless it takes the node to be no part of a
cluster, as it does on Windows and macOS. RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER overrides that, but Ray
reads it once, when it is imported. So its answer is set here, for as long as Ray starts.

Whatever fails becomes a `ClusterError` (`ray_failures`); what was started until then is ended.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import psutil
import ray
from ray._common.utils import get_default_ray_temp_dir
from ray._private import ray_constants
from ray._private import worker as ray_worker

from miles.common import ray_address
from miles.common.ray_address_form import RayAddress, find_address
from miles.common.ray_failures import explained, is_slow_start
from miles.common.small_ray import small_ray
from miles.common.writable import existing_part
from miles.errors import ClusterError, MilesError

_VARIABLE = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
_SHORT_FOLDER = Path("/tmp/ray")  # noqa: S108 - Ray's own, made with a folder for each session
_MAX_SOCKET_BYTES = 107
_SOCKET = "/session_2026-11-26_14-33-39_726012_4194304/sockets/plasma_store"
"""The longest that Ray adds to the path of its folder."""
_MAX_STARTS = 3
"""Ray 2.60 gives its processes 30 s to come up, and has no setting for it."""
_SIGTERM_STATUS = 143


def start(num_cpus: int | None, object_store_bytes: int) -> None:
    """Start a Ray of this process's own; never join one that is running. `ray.shutdown()` ends it.

    Args:
        num_cpus: that tasks and actors may reserve; None: all of the machine.
        object_store_bytes: of shared memory.

    Raises:
        ClusterError: it does not start; why, and what to do.
    """
    folder = _folder()
    _require_memory(object_store_bytes, folder)
    _lend_token()
    for tries_left in reversed(range(_MAX_STARTS)):
        try:
            _start_once(num_cpus, object_store_bytes, folder)
            break
        except ClusterError as error:
            if not tries_left or not is_slow_start(error):
                raise
            print(
                "Ray did not come up within its 30 s, as on a busy machine: starting it once more",
                file=sys.stderr,
            )
    _silence_raylets()


def _start_once(num_cpus: int | None, object_store_bytes: int, folder: Path) -> None:
    explaining = _explaining("Ray could not be started", "starting")
    with explaining, _bound_to_loopback(), _deaf_to_hang_ups(), small_ray():
        ray.init(
            address="local",
            num_cpus=num_cpus,
            object_store_memory=object_store_bytes,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="error",
            _temp_dir=str(folder),
        )


@contextlib.contextmanager
def running(num_cpus: int | None, object_store_bytes: int) -> Iterator[None]:
    """Start a Ray as `start` does, which ends with the context."""
    start(num_cpus, object_store_bytes)
    try:
        yield
    finally:
        ray.shutdown()


def connect(num_cpus: int | None, object_store_bytes: int, address: str | None = None) -> bool:
    """Use the Ray that this process has, join the one that is named, or start one.

    Args:
        num_cpus: of one that is started, as in `start`.
        object_store_bytes: of one that is started, as in `start`.
        address: of the Ray to join; None: that in RAY_ADDRESS, where a submitted job finds its
            cluster.

    Returns:
        whether this call connected the process, so that the caller has to end it by
        `ray.shutdown()`.

    Raises:
        ConfigError: the address is none.
        ClusterError: no Ray answers there, or it cannot be joined, or none can be started.
    """
    if ray.is_initialized():
        return False
    found = find_address(address)
    if found is None:
        start(num_cpus, object_store_bytes)
    else:
        _join(found)
    return True


def _join(address: RayAddress) -> None:
    """Join a cluster, once it has answered."""
    ray_address.use_token(address)
    ray_address.require_answer(address)
    try:
        with _explaining(f"{address}: the cluster could not be joined", "being joined"):
            ray.init(address=address.text, log_to_driver=False, logging_level="error")
    except ClusterError as error:
        cause = error.__cause__
        if cause is not None and type(cause).__name__ == "AuthenticationError":
            raise ray_address.refused(address, cause) from cause
        raise
    _silence_raylets()


@contextlib.contextmanager
def _explaining(doing: str, state: str) -> Iterator[None]:
    """Make an error of ours of any that Ray raises, and end what it has started.

    Ray hears SIGTERM while it starts, and exits with the signal's number. Ctrl-C is said by whoever
    ends the command.

    Args:
        doing: begins the message of an error.
        state: of Ray, for a signal: "starting".
    """
    before = set(psutil.Process().children())
    try:
        with _losing_no_ctrl_c():
            yield
    except BaseException as error:
        _end(set(psutil.Process().children()) - before)
        if isinstance(error, Exception) and not isinstance(error, MilesError):
            raise explained(error, doing) from error

        text = f"ended while Ray was {state}; nothing was begun"
        if isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt(f"Ctrl-C: {text}") from None
        if isinstance(error, SystemExit):
            print(f"SIGTERM: {text}", file=sys.stderr)
            raise SystemExit(_SIGTERM_STATUS) from None
        raise


def _end(started: set[psutil.Process]) -> None:
    """End the processes of a Ray that did not come up."""
    ray.shutdown()
    for process in started:
        with contextlib.suppress(psutil.Error):
            if any("/ray/" in word for word in process.cmdline()):
                process.kill()


def _folder() -> Path:
    """Return the folder for Ray's files: its usual one, or one whose sockets have room in a path.

    Raises:
        ClusterError: neither can be used.
    """
    usual = Path(get_default_ray_temp_dir())
    if len(os.fsencode(f"{usual}{_SOCKET}")) <= _MAX_SOCKET_BYTES:
        return usual
    with contextlib.suppress(OSError):
        _SHORT_FOLDER.mkdir(parents=True, exist_ok=True)
    if not os.access(_SHORT_FOLDER, os.W_OK):
        raise ClusterError(
            f"{usual} is too long a path for Ray's sockets (at most "
            f"{_MAX_SOCKET_BYTES - len(_SOCKET)} bytes), and {_SHORT_FOLDER} cannot be written. Set "
            "RAY_TMPDIR to a short path"
        )
    print(
        f"Ray's files are in {_SHORT_FOLDER}: {usual} is too long a path for its sockets",
        file=sys.stderr,
    )
    return _SHORT_FOLDER


def _require_memory(num_bytes: int, folder: Path) -> None:
    """Refuse a machine without room for the object store: Ray would die of it, or wait.

    Ray puts the store into /dev/shm, or into its folder where that is too small.
    """
    free: dict[str, int] = {}
    for place in ("/dev/shm", str(existing_part(folder))):  # noqa: S108
        with contextlib.suppress(OSError):
            free[place] = shutil.disk_usage(place).free
    if free and max(free.values()) < num_bytes:
        found = ", ".join(f"{place} has {size / 1e6:,.0f} MB free" for place, size in free.items())
        raise ClusterError(
            f"Ray's object store takes {num_bytes / 1e6:,.0f} MB: {found}. Make room, or give the "
            "container a larger /dev/shm (docker run --shm-size=2g)"
        )


def _lend_token() -> None:
    """Give Ray a token for this process alone where it could not keep one in the user's home.

    Ray 2.60 asks for a token in every Ray that it starts, and writes ~/.ray/auth_token.
    """
    variables = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
    if any(name in os.environ for name in variables):
        return
    try:
        folder = Path.home() / ".ray"
        if (folder / "auth_token").exists():
            return
        folder.mkdir(parents=True, exist_ok=True)
        is_writable = os.access(folder, os.W_OK)
    except (OSError, RuntimeError):  # RuntimeError: the user has no home
        is_writable = False
    if not is_writable:
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def _silence_raylets() -> None:
    """Keep the messages of Ray's own processes from this process's output: they are in its logs.

    Ray 2.60 prints them also with `log_to_driver=False`, into the midst of what we print. What they
    tell of a part of the run reaches the driver as an error.
    """
    if hasattr(ray_worker, "print_to_stdstream"):
        ray_worker.print_to_stdstream = _print_nothing


def _print_nothing(*_: object, **__: object) -> None:
    """Stand in for Ray's function that prints."""


@contextlib.contextmanager
def _losing_no_ctrl_c() -> Iterator[None]:
    """End the context by KeyboardInterrupt, too, where Ray has swallowed the one of a Ctrl-C."""
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    has_come = threading.Event()

    def note(number: int, frame: FrameType | None) -> None:
        has_come.set()
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if has_come.is_set():
        raise KeyboardInterrupt


@contextlib.contextmanager
def _deaf_to_hang_ups() -> Iterator[None]:
    """Have the processes that are started in the context ignore SIGHUP.

    A terminal that closes sends it to all of them, and the driver has yet to save. Ray 2.60 has
    them ignore Ctrl-C (SIGINT) in the same way.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, before)


@contextlib.contextmanager
def _bound_to_loopback() -> Iterator[None]:
    """Have a Ray that is started in the context bind to 127.0.0.1."""
    variable = os.environ.get(_VARIABLE)
    constant = ray_constants.ENABLE_RAY_CLUSTER
    os.environ[_VARIABLE] = "0"
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = constant
        if variable is None:
            del os.environ[_VARIABLE]
        else:
            os.environ[_VARIABLE] = variable
