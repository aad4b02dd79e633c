"""Calls that fail for a moment are made again, after growing pauses; what does not pass by itself fails at once.

    read ── connection reset ── 0.5 s ── 503 Slow Down ── 1.2 s ── bytes
    read ── no such file

Whether an error may pass is told from its HTTP status where it has one, then from its kind. Only calls to a
filesystem are tried again, one by one and below every decoder: a corrupt file is read once.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import tenacity

from miles.common.redact import redact
from miles.errors import MilesError, SourceError

MAX_TRIES = 7
FIRST_PAUSE_SECONDS = 0.5
"""Doubled after each try; up to as much is added at random, so that many readers do not come back together."""
MAX_PAUSE_SECONDS = 15.0
MAX_SECONDS = 180.0
"""No try begins later than this after the first."""

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
    )
    + (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
    + (
        (errno.EREMCHG,) if hasattr(errno, "EREMCHG") else ()
    )  # s3fs: the bucket is in another region
)
_STATUS = frozenset((408, 425, 429))
"""HTTP statuses below 500 that ask for another try."""
_NAMES = re.compile(
    "Timeout|Connect|Disconnect|PayloadError|IncompleteRead|ProtocolError|ReadError|WriteError|ResponseParser"
    "|Throttl|SlowDown|RequestLimit|TooManyRequests|ServerError|InternalError|ServiceUnavailable"
)
"""Of exceptions that are no OSError (botocore, aiohttp, httpx, google), and of S3's error codes."""

T = TypeVar("T")


class ShortRead(OSError):
    """Fewer bytes came than were asked for."""


def call(
    function: Callable[[], T], url: str, doing: str = "read", max_tries: int | None = None
) -> T:
    """Calls a function, and again while its error may pass.

    Args:
        function: may be called several times.
        url: what it reads or writes, for the error.
        doing: "read" or "written".
        max_tries: None: `MAX_TRIES`.

    Raises:
        SourceError: the last try failed too (reading); it names the URL and the number of tries.
        MilesError: likewise (writing).
        Exception: of any other kind, as it was raised, after one call.
    """
    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception(is_transient),
        wait=tenacity.wait_exponential(FIRST_PAUSE_SECONDS, MAX_PAUSE_SECONDS)
        + tenacity.wait_random(0, FIRST_PAUSE_SECONDS),
        stop=tenacity.stop_after_attempt(max_tries or MAX_TRIES)
        | tenacity.stop_after_delay(MAX_SECONDS),
    )
    try:
        return retrying(function)
    except tenacity.RetryError as failed:
        attempt = failed.last_attempt
        error = attempt.exception()
        kind = SourceError if doing == "read" else MilesError
        raise kind(
            f"{redact(url)}: cannot be {doing}, tried {attempt.attempt_number} times: {type(error).__name__}: "
            f"{redact(str(error))}"
        ) from error


def is_transient(error: BaseException) -> bool:
    """Whether the same call may succeed a little later."""
    if isinstance(error, FileNotFoundError) and error.__cause__ is not None:
        return is_transient(
            error.__cause__
        )  # fsspec's HTTP filesystem says so of whatever a HEAD request answered
    if isinstance(error, (*_LASTING, ValueError)) or not isinstance(error, Exception):
        return False
    status = next(_statuses(error), None)
    if status is not None and status >= 400:
        return status in _STATUS or status >= 500 or _NAMES.search(_code(error)) is not None
    if isinstance(error, OSError):  # also TimeoutError, which asyncio's and fsspec's are
        return error.errno not in _LASTING_NUMBERS
    return any(_NAMES.search(kind.__name__) for kind in type(error).__mro__)


def _statuses(error: BaseException) -> Iterator[int]:
    """HTTP statuses that an error holds: aiohttp's, requests' and httpx's, google's, botocore's."""
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
    """S3's own name for an error: "SlowDown"."""
    return str(_part(getattr(error, "response", None), "Error", "Code"))


def _part(value: Any, *keys: str) -> Any:
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value
