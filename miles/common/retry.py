"""Calls that fail for a moment are made again, after growing pauses. Lasting errors fail at once.

    read ── connection reset ── 0.5 s ── 503 Slow Down ── 1.2 s ── bytes
    read ── no such file

An error is judged by its HTTP status where it has one, then by its kind. Only calls to a
filesystem are tried again, one by one and below every decoder: a corrupt file is read once.
"""

from __future__ import annotations

import contextlib
import errno
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import tenacity

from miles.common.file_errors import cause_of, in_own_words, is_unreachable
from miles.common.first_contact import MAX_UNREACHABLE_SECONDS, announced, is_first_contact
from miles.common.redact import redact
from miles.errors import MilesError, SourceError, WriteError

MAX_TRIES = 7
FIRST_PAUSE_SECONDS = 0.5
"""Doubled after each try. Up to as much is added at random: many readers do not return together."""
MAX_PAUSE_SECONDS = 15.0
MAX_SECONDS = 180.0
"""No try begins later than this, counted from the first."""

_LASTING = (
    FileNotFoundError,
    FileExistsError,
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
    MilesError,
)
_LASTING_NUMBERS = frozenset(
    (
        errno.EINVAL,
        errno.ENOSYS,
        errno.ENOTSUP,
        errno.ENAMETOOLONG,
        errno.ELOOP,
        errno.EMSGSIZE,
        errno.ENOTEMPTY,
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EROFS,
        *((errno.EREMCHG,) if hasattr(errno, "EREMCHG") else ()),  # s3fs: bucket of another region
    )
)
_STATUS = frozenset((408, 425, 429))
"""HTTP statuses below 500 that ask for another try."""
_NAMES = re.compile(
    "Timeout|Connect|Disconnect|PayloadError|IncompleteRead|ProtocolError|ReadError|WriteError"
    "|ResponseParser|Throttl|SlowDown|RequestLimit|TooManyRequests|ServerError|InternalError"
    "|ServiceUnavailable"
)
"""Names of errors that may pass and are no OSError (botocore, aiohttp, httpx, google, S3)."""

T = TypeVar("T")


class ShortRead(OSError):
    """A read that returned fewer bytes than it was asked for."""


def call(
    function: Callable[[], T], url: str, doing: str = "read", max_tries: int | None = None
) -> T:
    """Call a function, and again while its error may pass.

    Args:
        function: may be called several times.
        url: of the file that it reads or writes, for the error.
        doing: "read", "written" or "removed".
        max_tries: None: `MAX_TRIES`.

    Raises:
        SourceError: the last try of a read failed too; it names the URL and the number of tries.
        WriteError: the same for a call that does not read.
        Exception: a lasting error, or that of the only try, as it was raised.
    """
    pause = tenacity.wait_exponential(FIRST_PAUSE_SECONDS, MAX_PAUSE_SECONDS)
    jitter = tenacity.wait_random(0, FIRST_PAUSE_SECONDS)
    is_last_try = tenacity.stop_after_attempt(max_tries or MAX_TRIES)
    is_too_late = tenacity.stop_after_delay(MAX_SECONDS)
    stop = tenacity.stop_any(is_last_try, is_too_late)
    if is_first_contact():
        stop = tenacity.stop_any(is_last_try, is_too_late, _NobodyIsThere())
    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception(is_transient),
        wait=pause + jitter,
        stop=stop,
    )

    is_announced = is_first_contact() and "://" in url
    try:
        with announced(url) if is_announced else contextlib.nullcontext():
            return retrying(function)
    except tenacity.RetryError as failed:
        attempt = failed.last_attempt
        error = attempt.exception()
        assert error is not None, "its tries have failed"
        if attempt.attempt_number == 1:
            raise error from error.__cause__
        kind = SourceError if doing == "read" else WriteError
        cause = cause_of(error, url)
        remedy = f". {cause.remedy}" if cause and cause.remedy else ""
        raise kind(
            f"{redact(url)}: cannot be {doing}, tried {attempt.attempt_number} times: "
            f"{in_own_words(error)}{remedy}"
        ) from error


class _NobodyIsThere(tenacity.stop.stop_base):
    """Stops where a server has not been reached for as long as a first call waits."""

    def __call__(self, retry_state: tenacity.RetryCallState) -> bool:
        outcome = retry_state.outcome
        error = outcome.exception() if outcome is not None else None
        waited_seconds = retry_state.seconds_since_start or 0.0
        is_long = waited_seconds > MAX_UNREACHABLE_SECONDS
        return error is not None and is_unreachable(error) and is_long


def is_transient(error: BaseException) -> bool:
    """Return whether the same call may succeed a little later."""
    if isinstance(error, FileNotFoundError) and error.__cause__ is not None:
        # fsspec's HTTP filesystem raises it for any answer to a HEAD request.
        return is_transient(error.__cause__)
    if isinstance(error, (*_LASTING, ValueError)) or not isinstance(error, Exception):
        return False
    status = next(_statuses(error), None)
    if status is not None and status >= 400:
        return status in _STATUS or status >= 500 or _NAMES.search(_code(error)) is not None
    if isinstance(error, OSError):  # also TimeoutError, which asyncio's and fsspec's are
        return error.errno not in _LASTING_NUMBERS
    return any(_NAMES.search(kind.__name__) for kind in type(error).__mro__)


def _statuses(error: BaseException) -> Iterator[int]:
    """Yield the HTTP statuses in an error of aiohttp, requests, httpx, google or botocore."""
    response = getattr(error, "response", None)
    values: list[Any] = [getattr(error, name, None) for name in ("status", "status_code", "code")]
    values += [
        getattr(response, "status_code", None),
        _part(response, "ResponseMetadata", "HTTPStatusCode"),
    ]
    for value in values:
        if isinstance(value, (int, str)) and str(value).isdecimal():
            yield int(value)


def _code(error: BaseException) -> str:
    """Return S3's own name for an error, such as "SlowDown"."""
    return str(_part(getattr(error, "response", None), "Error", "Code"))


def _part(value: Any, *keys: str) -> Any:
    """Return a value inside nested mappings; None where there is none."""
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value
