"""Errors of disks and stores: each has its file, its cause and its remedy in one line."""

from __future__ import annotations

import errno
import socket

import botocore.exceptions
import pytest

from miles.common import storage
from miles.errors import MissingFileError, SourceError, WriteError


def client_error(code: str) -> botocore.exceptions.ClientError:
    return botocore.exceptions.ClientError({"Error": {"Code": code, "Message": ""}}, "PutObject")


def because(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


WRITES = [
    (OSError(errno.ENOSPC, ""), "no space left on the disk. Make room there"),
    (OSError(errno.EROFS, ""), "the disk is read-only. Make it writable"),
    (PermissionError(errno.EACCES, ""), "permission denied. Check the URL and the credentials: A"),
    (OSError(errno.EBUSY, ""), "it is in use, as a mount point is. Name a folder inside of it"),
    (OSError(errno.EXDEV, ""), "it lies on another disk than its parent"),
    (OSError(errno.ENAMETOOLONG, ""), "its name is too long"),
    (OSError(errno.EDQUOT, ""), "the quota on the disk is used up"),
    (IsADirectoryError(errno.EISDIR, ""), "a folder, where a file was expected"),
    (ValueError("embedded null byte"), "its name holds a NUL byte"),
    (botocore.exceptions.NoCredentialsError(), "no credentials were found. Set AWS_ACCESS_KEY_ID"),
    (
        because(PermissionError("x"), client_error("InvalidAccessKeyId")),
        "are wrong or have expired",
    ),
    (because(PermissionError("x"), client_error("AccessDenied")), "permission denied. Check the"),
    (because(FileNotFoundError(), client_error("NoSuchBucket")), "no such bucket. Create it"),
    (because(OSError("x"), socket.gaierror(-2, "")), "the server cannot be reached. Check the"),
    (botocore.exceptions.EndpointConnectionError(endpoint_url="u"), "(and AWS_ENDPOINT_URL, where"),
    (RuntimeError("some\n text"), "RuntimeError: some text"),
]


@pytest.mark.parametrize(("error", "text"), WRITES, ids=lambda value: repr(value)[:40])
def test_what_cannot_be_written_is_said(error: Exception, text: str) -> None:
    with pytest.raises(WriteError) as caught, storage.writing("s3://bucket/run"):
        raise error
    message = str(caught.value)
    assert message.startswith("s3://bucket/run: cannot be written")
    assert text in message
    assert "\n" not in message


def test_a_local_file_needs_no_credentials() -> None:
    with (
        pytest.raises(WriteError, match=r"permission denied\. Give this user the right to it"),
        storage.writing("/a"),
    ):
        raise PermissionError(errno.EACCES, "")


def test_what_is_missing_can_be_caught_as_such() -> None:
    with pytest.raises(FileNotFoundError), storage.reading("/a/b"):
        raise FileNotFoundError
    with (
        pytest.raises(MissingFileError, match="/a/b: no such file: a part of its path is a file"),
        storage.reading("/a/b"),
    ):
        raise NotADirectoryError(errno.ENOTDIR, "")


def test_the_hub_has_remedies_of_its_own() -> None:
    with (
        pytest.raises(SourceError, match="HF_HUB_OFFLINE=true"),
        storage.reading("hf://datasets/a/b"),
    ):
        raise because(OSError("x"), ConnectionRefusedError())


def test_an_error_of_ours_passes() -> None:
    with pytest.raises(SourceError, match=r"^as it was$"), storage.writing("/a"):
        raise SourceError("as it was")
    with pytest.raises(WriteError, match=r"^as it was$"), storage.reading("/a"):
        raise WriteError("as it was")


def test_what_cannot_be_removed_has_no_other_place() -> None:
    for number, text in (
        (errno.EACCES, "/a: cannot be removed: permission denied. Give this user the right to it"),
        (errno.EROFS, "/a: cannot be removed: the disk is read-only. Make it writable"),
        (errno.EBUSY, "/a: cannot be removed: it is in use, as a mount point is"),
    ):
        with pytest.raises(WriteError) as raised, storage.writing("/a", "removed"):
            raise OSError(number, "")
        assert str(raised.value) == text
