"""Why Ray did not start: one paragraph, with what to do."""

from __future__ import annotations

import errno

import pytest

from miles.common.ray_failures import explained


def caused_by(error: Exception) -> Exception:
    """Return Ray's error for one that it met."""
    outer = ConnectionError("Failed to connect to Ray cluster at 10.0.0.7:6379")
    outer.__cause__ = error
    return outer


@pytest.mark.parametrize(
    ("error", "reason", "remedy"),
    [
        (
            RuntimeError("Version mismatch: The cluster was started with:\n    Ray: 2.9.0"),
            "Ray: 2.9.0",
            "install the same ones",
        ),
        (OSError("AF_UNIX path length cannot exceed 107 bytes: /x"), "107 bytes", "RAY_TMPDIR"),
        (OSError(errno.ENOSPC, "No space left on device", "/tmp/ray"), "No space", "RAY_TMPDIR"),
        (PermissionError(errno.EACCES, "Permission denied", "/tmp/ray"), "denied", "RAY_TMPDIR"),
        (OSError(errno.EROFS, "Read-only file system"), "Read-only", "RAY_TMPDIR"),
        (ValueError("The requested object store memory size is greater"), "greater", "--shm-size"),
        (ValueError("the amount of memory on this node available"), "on this node", "--shm-size"),
        (RuntimeError("can't start new thread"), "new thread", "ulimit -u"),
        (
            BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"),
            "Resource",
            "ulimit -u",
        ),
        (OSError(errno.EMFILE, "Too many open files"), "Too many", "ulimit -n"),
        (Exception("The current node timed out during startup."), "timed out", "same command"),
        (
            RuntimeError("This node has an IP address of x; Ray expects this IP"),
            "IP",
            "own machine",
        ),
    ],
)
def test_a_cause_has_its_remedy(error: Exception, reason: str, remedy: str) -> None:
    for raised in (error, caused_by(error)):
        text = str(explained(raised, "Ray could not be started"))
        assert text.startswith(f"Ray could not be started: {type(error).__name__}: ")
        assert reason in text
        assert remedy in text
        assert "\n" not in text


def test_what_nobody_knows_says_where_to_look() -> None:
    text = str(explained(KeyError("odd"), "Ray could not be started"))
    assert text.startswith("Ray could not be started: KeyError: 'odd'. MILES_DEBUG=1 shows where")
