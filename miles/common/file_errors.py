"""An error of a disk or a store -> an error of ours: the URL, the cause, the remedy.

    OSError 28, botocore.NoCredentialsError, httpx.ConnectError, UnicodeDecodeError, …
    s3://rows/a.jsonl: no credentials were found. Set AWS_ACCESS_KEY_ID and …

Libraries are told by the names of their exceptions: none of them is imported for it.
"""

from __future__ import annotations

import contextlib
import errno
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from miles.common.debugging import one_paragraph
from miles.common.redact import redact
from miles.errors import MilesError, MissingFileError, SourceError, WriteError


class Cause(NamedTuple):
    """The reason for which a file cannot be used, and what the user can do about it."""

    text: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.text}. {self.remedy}" if self.remedy else self.text

    @property
    def repair(self) -> str:
        """Return the remedy at the place itself, where no other can be named; "" without one."""
        here = self.remedy.partition(", or name another")[0]
        return "" if here.startswith("Name ") else here


@contextlib.contextmanager
def reading(url: str) -> Iterator[None]:
    """Turn any error of reading a file or folder into a SourceError that names it.

    Raises:
        MissingFileError: nothing is there.
        SourceError: any other error.
    """
    try:
        yield
    except MilesError:
        raise
    # Every filesystem and codec has its own exceptions (botocore, httpx, zlib, zstandard, Arrow).
    except Exception as error:
        is_missing = isinstance(error, FileNotFoundError | NotADirectoryError)
        kind = MissingFileError if is_missing else SourceError
        cause = cause_of(error, url)
        text = f": {cause}" if cause else f": cannot be read, {in_own_words(error)}"
        raise kind(redact(url) + text) from error


@contextlib.contextmanager
def writing(url: str, doing: str = "written") -> Iterator[None]:
    """Turn any error of writing a file or folder into a WriteError that names it.

    Args:
        doing: "written" or "removed".
    """
    try:
        yield
    except MilesError:
        raise
    except Exception as error:
        cause = cause_of(error, url)
        if cause and doing == "removed":  # it is where it is
            cause = Cause(cause.text, cause.repair)
        text = f": {cause}" if cause else f", {in_own_words(error)}"
        raise WriteError(f"{redact(url)}: cannot be {doing}{text}") from error


def in_own_words(error: BaseException) -> str:
    """Return an exception's kind and text, on one line and without secrets."""
    return f"{type(error).__name__}: {one_paragraph(str(error))}"


def cause_of(error: BaseException, url: str) -> Cause | None:
    """Return why a file or folder cannot be read or written; None: only its library can say.

    Args:
        error: that a filesystem raised; what caused it is looked at, too.
        url: of the file or folder.
    """
    scheme = _scheme_of(url)
    names = _names_of(error)
    for of_store in _OF_STORES:
        if names & of_store.names:
            return of_store.cause(scheme)

    if scheme and isinstance(error, PermissionError):
        return _DENIED.cause(scheme)
    if isinstance(error, FileNotFoundError):
        return Cause("no such file")
    if isinstance(error, PermissionError):
        return Cause("permission denied", "Give this user the right to it, or name another place")
    return _of_number(error) or _of_text(error)


def cause_in(text: str) -> Cause | None:
    """Return the cause in the text of an error of the operating system; None: there is none.

    Args:
        text: such as "Worker failure: [Errno 28] No space left on device: 'x'", of which the
            exception itself was lost.
    """
    found = _NUMBER_IN_TEXT.search(text)
    return cause_of(OSError(int(found[1]), ""), "") if found else None


def is_unreachable(error: BaseException) -> bool:
    """Return whether an error says that a server was never reached: no such host, nobody listens."""
    return bool(_names_of(error) & _UNREACHABLE.names)


def _of_number(error: BaseException) -> Cause | None:
    """Return the cause that an error of the operating system has by its number."""
    return _NUMBERS.get(error.errno or 0) if isinstance(error, OSError) else None


def _of_text(error: BaseException) -> Cause | None:
    """Return what is wrong with a file's text, or with its name."""
    if isinstance(error, UnicodeDecodeError):
        byte = error.object[error.start]
        return Cause(f"not UTF-8 text (byte 0x{byte:02x} at {error.start})", "Save it as UTF-8")
    if isinstance(error, UnicodeEncodeError):
        return Cause("its name is not Unicode", _RENAME)
    if isinstance(error, ValueError) and "null byte" in str(error):
        return Cause("its name holds a NUL byte", _RENAME)
    return None


@dataclass(frozen=True)
class _OfStore:
    """An error that a store reports."""

    names: frozenset[str]
    """of the exceptions, or of S3's codes"""
    text: str
    remedy: str
    """`{variables}` and `{endpoint}` are those of the URL's scheme"""

    def cause(self, scheme: str) -> Cause:
        """Return the cause, with the remedy for a scheme."""
        variables = _CREDENTIALS.get(scheme, "the variables of its library")
        endpoint = f" (and {_ENDPOINTS[scheme]}, where it is set)" if scheme in _ENDPOINTS else ""
        without = f". {_WITHOUT_HUB}" if scheme == "hf" else ""
        return Cause(
            self.text,
            self.remedy.format(variables=variables, endpoint=endpoint, without_hub=without),
        )


_CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
    "hf": "HF_TOKEN",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
    "az": "AZURE_STORAGE_CONNECTION_STRING",
    "abfs": "AZURE_STORAGE_CONNECTION_STRING",
}
"""Variables of the environment, by a URL's scheme."""
_ENDPOINTS = {"s3": "AWS_ENDPOINT_URL", "hf": "HF_ENDPOINT"}
_WITHOUT_HUB = "Without a network, give a local folder, or set HF_HUB_OFFLINE=true to use the cache"
_SET = "Set {variables}, in the environment of this command and of each node of a cluster"

_DENIED = _OfStore(
    frozenset(("AccessDenied", "AllAccessDisabled", "Forbidden")),
    "permission denied",
    "Check the URL and the credentials: {variables}",
)
_UNREACHABLE = _OfStore(
    frozenset(
        (
            "EndpointConnectionError",
            "ConnectTimeoutError",
            "ProxyConnectionError",
            "ConnectError",
            "ConnectTimeout",
            "ClientConnectorError",
            "ConnectionRefusedError",
            "gaierror",
        )
    ),
    "the server cannot be reached",
    "Check the network{endpoint}{without_hub}",
)
_OF_STORES = (
    _OfStore(
        frozenset(
            (
                "NoCredentialsError",
                "PartialCredentialsError",
                "CredentialRetrievalError",
                "ProfileNotFound",
                "TokenRetrievalError",
                "DefaultCredentialsError",
            )
        ),
        "no credentials were found",
        _SET,
    ),
    _OfStore(
        frozenset(
            (
                "InvalidAccessKeyId",
                "SignatureDoesNotMatch",
                "ExpiredToken",
                "InvalidToken",
                "UnauthorizedSSOTokenError",
            )
        ),
        "the credentials are wrong or have expired",
        _SET,
    ),
    _OfStore(
        frozenset(("NoSuchBucket",)), "no such bucket", "Create it, or correct the URL{endpoint}"
    ),
    _OfStore(
        frozenset(("ParamValidationError", "InvalidBucketName")),
        "no bucket or object can have such a name",
        "Correct the URL",
    ),
    _OfStore(
        frozenset(("GatedRepoError",)),
        "the hub asks to accept its terms",
        "Accept them on its page there, and set HF_TOKEN",
    ),
    _OfStore(
        frozenset(("RepositoryNotFoundError", "RevisionNotFoundError")),
        "no such file: the hub has nothing of that name",
        "Correct it; a private one needs HF_TOKEN",
    ),
    _OfStore(
        frozenset(("OfflineModeIsEnabled",)),
        "HF_HUB_OFFLINE is set, and this is not in the cache",
        "Give a local folder, or unset it",
    ),
    _UNREACHABLE,
    _DENIED,
)

_RENAME = "Give it another name"
_NUMBER_IN_TEXT = re.compile(r"\[Errno (\d+)\]")
_NUMBERS = {
    errno.ENOSPC: Cause("no space left on the disk", "Make room there, or name another disk"),
    errno.EDQUOT: Cause("the quota on the disk is used up", "Make room there, or ask for more"),
    errno.EROFS: Cause("the disk is read-only", "Make it writable, or name another place"),
    errno.EBUSY: Cause("it is in use, as a mount point is", "Name a folder inside of it"),
    errno.EXDEV: Cause("it lies on another disk than its parent", "Name a folder inside of it"),
    errno.ENAMETOOLONG: Cause("its name is too long", _RENAME),
    errno.ELOOP: Cause("its links lead in a circle", "Correct the links"),
    errno.ENOTDIR: Cause("no such file: a part of its path is a file, not a folder"),
    errno.EISDIR: Cause("a folder, where a file was expected", "Name a file"),
    errno.EEXIST: Cause("a file of that name is there, and a folder was expected", _RENAME),
    errno.EMFILE: Cause("too many files are open", "Raise the limit: ulimit -n"),
    errno.EIO: Cause("the disk reports an error of its own", "Check the disk"),
    errno.ESTALE: Cause("the network disk has lost it", "Mount the disk again"),
}


def _names_of(error: BaseException) -> set[str]:
    """Return the names of an exception's classes, and S3's code, with those of its causes."""
    names: set[str] = set()
    link: BaseException | None = error
    for _ in range(_MAX_CAUSES):
        if link is None:
            break
        names.update(kind.__name__ for kind in type(link).__mro__)
        response = getattr(link, "response", None)
        if isinstance(response, dict):  # botocore's
            names.add(str(response.get("Error", {}).get("Code")))
        if getattr(link, "status", None) in _FORBIDDEN:  # aiohttp's
            names.add("Forbidden")
        link = link.__cause__
    return names


_MAX_CAUSES = 8
_FORBIDDEN = (401, 403)


def _scheme_of(url: str) -> str:
    """Return "s3" of "s3://…"; "" of a local path."""
    scheme = url.partition("://")[0] if "://" in url else ""
    return {"file": "", "local": "", "s3a": "s3", "gcs": "gs"}.get(scheme, scheme)
