"""Which errors may pass, and how long is waited for it."""

from __future__ import annotations

import errno
import time

import aiohttp
import botocore.exceptions
import pyarrow as pa
import pytest
import requests

from miles.common import retry
from miles.errors import SourceError


def client_error(code: str, status: int) -> botocore.exceptions.ClientError:
    response = {
        "Error": {"Code": code, "Message": ""},
        "ResponseMetadata": {"HTTPStatusCode": status},
    }
    return botocore.exceptions.ClientError(response, "GetObject")


def http_error(status: int) -> requests.HTTPError:
    response = requests.Response()
    response.status_code = status
    return requests.HTTPError(response=response)


class ReadTimeout(Exception):
    """As httpx's, which is no OSError."""


def because(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


TRANSIENT = [
    ConnectionResetError(),
    BrokenPipeError(),
    TimeoutError(),
    OSError("without a number"),
    OSError(errno.EIO, ""),
    OSError(errno.EBUSY, "Please reduce your request rate"),
    OSError(errno.ESTALE, ""),
    retry.ShortRead("2 of 4 bytes"),
    aiohttp.ClientPayloadError(),
    aiohttp.ServerDisconnectedError(),
    botocore.exceptions.ReadTimeoutError(endpoint_url=""),
    botocore.exceptions.EndpointConnectionError(endpoint_url=""),
    client_error("InternalError", 500),
    client_error("SlowDown", 503),
    client_error("RequestTimeout", 400),
    http_error(429),
    http_error(502),
    ReadTimeout(),
    requests.exceptions.ChunkedEncodingError(),
    because(FileNotFoundError("HEAD"), http_error(503)),
]
LASTING = [
    FileNotFoundError(),
    PermissionError(),
    IsADirectoryError(),
    NotADirectoryError(),
    OSError(errno.EINVAL, "pre-conditions"),
    OSError(errno.ENOSPC, ""),
    SourceError("named already"),
    pa.ArrowInvalid("no Parquet"),
    ValueError(),
    KeyError(),
    client_error("AccessDenied", 403),
    client_error("NoSuchKey", 404),
    botocore.exceptions.NoCredentialsError(),
    http_error(401),
    because(FileNotFoundError("HEAD"), http_error(404)),
    KeyboardInterrupt(),
]


@pytest.mark.parametrize("error", TRANSIENT, ids=repr)
def test_what_may_pass(error: Exception) -> None:
    assert retry.is_transient(error)


@pytest.mark.parametrize("error", LASTING, ids=repr)
def test_what_will_not(error: BaseException) -> None:
    assert not retry.is_transient(error)


def test_pauses_grow_and_end(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)

    def fail() -> None:
        raise ConnectionResetError("again")

    with pytest.raises(
        SourceError,
        match="s3://bucket/x: cannot be read, tried 7 times: ConnectionResetError: again",
    ):
        retry.call(fail, "s3://bucket/x")
    assert len(pauses) == 6
    for pause, shortest in zip(pauses, (0.5, 1, 2, 4, 8, 15), strict=True):
        assert shortest <= pause <= shortest + 0.5
    assert len({pause % 0.5 for pause in pauses}) > 1, "all readers would come back at once"
