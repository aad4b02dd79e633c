"""The address of a Ray cluster: asked whether a Ray answers there, and given its token.

    "10.0.0.7:6379"   listens? speaks HTTP/2, as gRPC does? takes our token?   ->  ray.init may join
    "auto"            the Ray of this machine
    "local"           none is joined

`ray.init` waits for minutes where nobody answers, deaf to signals. Here, it takes seconds.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import socket
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

from ray import exceptions as ray_errors
from ray._private import services

from miles.common.debugging import one_paragraph
from miles.common.ray_address_form import AUTO, CLIENT_SCHEME, FLAG, VARIABLE, RayAddress
from miles.errors import ClusterError

_raylet: Any = importlib.import_module("ray._raylet")  # its stub names a few classes alone

_AUTH_MODE = "RAY_AUTH_MODE"
_ANSWER_SECONDS = 5.0
_HTTP2_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"
"""The first bytes of a client of HTTP/2, with settings of its own: none."""
_SETTINGS_TYPE = 4
"""Type of the frame that a server of HTTP/2 answers with."""
_REMEDY = (
    f"Correct or remove {FLAG} and the variable {VARIABLE}: without them, a run starts its own Ray. "
    "`ray start --head` on the head node starts a cluster"
)
_HOW_TO_GIVE_IT = (
    "Put the token of the cluster (~/.ray/auth_token on its head node) into ~/.ray/auth_token here, "
    "or name its file in RAY_AUTH_TOKEN_PATH"
)


def require_answer(address: RayAddress) -> None:
    """Refuse an address at which no Ray answers, or none that takes this process's token.

    Raises:
        ConfigError: it is no address.
        ClusterError: why it cannot be joined.
    """
    host, port = _host_and_port(address)
    try:
        with socket.create_connection((host, port), timeout=_ANSWER_SECONDS) as connection:
            if not address.text.startswith(CLIENT_SCHEME) and not os.environ.get("RAY_USE_TLS"):
                connection.settimeout(_ANSWER_SECONDS)
                _require_http2(connection)
    except OSError as error:
        reason = "no answer" if isinstance(error, TimeoutError) else str(error)
        raise ClusterError(f"{address}: no Ray answers there: {reason}. {_REMEDY}") from error

    if not address.text.startswith(CLIENT_SCHEME):
        _require_token(address, f"{host}:{port}")


def use_token(address: RayAddress) -> None:
    """Use the cluster's token where this user has one, unless RAY_AUTH_MODE decides.

    A cluster that asks for none is joined all the same. Ray itself does so only for "auto".

    Raises:
        ClusterError: the file that is named for it cannot be read.
    """
    loader = getattr(_raylet, "AuthenticationTokenLoader", None)
    if loader is None or _AUTH_MODE in os.environ:  # older versions of Ray have no tokens
        return
    try:
        has_token = loader.instance().has_token(ignore_auth_mode=True)
    except ray_errors.RayError as error:
        raise refused(address, error) from error
    if has_token:
        os.environ[_AUTH_MODE] = "token"
        _raylet.Config.initialize("")  # or Ray would go by what it read when it was imported


def refused(address: RayAddress, error: BaseException) -> ClusterError:
    """Return the error for a token that is missing or wrong. The token itself is never shown."""
    mode = os.environ.get(_AUTH_MODE, "token")
    remedy = _HOW_TO_GIVE_IT
    if mode != "token":
        remedy = f"Remove {_AUTH_MODE}={mode} from the environment. {_HOW_TO_GIVE_IT}"
    if "RAY_AUTH_TOKEN_PATH is set" in str(error):
        path = os.environ.get("RAY_AUTH_TOKEN_PATH")
        return ClusterError(f"RAY_AUTH_TOKEN_PATH: {path} is empty, or cannot be read. {remedy}")
    return ClusterError(
        f"{address}: the cluster asks for a token, and this process has none, or a wrong one. "
        f"{remedy}"
    )


def _host_and_port(address: RayAddress) -> tuple[str, int]:
    """Return where the cluster listens.

    Raises:
        ConfigError: the text is no address.
        ClusterError: "auto", and no Ray runs here.
    """
    text = address.text
    if text == AUTO:
        try:
            text = services.canonicalize_bootstrap_address_or_die(AUTO)
        except (ConnectionError, ValueError) as error:
            raise ClusterError(
                f"{address}: {one_paragraph(str(error)).split('. ')[0]}. {_REMEDY}"
            ) from error

    return address.host_and_port(text)


def _require_http2(connection: socket.socket) -> None:
    """Refuse who does not speak HTTP/2, such as a dashboard, or says nothing, as a frozen process.

    Raises:
        OSError: why.
    """
    connection.sendall(_HTTP2_PREFACE)
    answer = connection.makefile("rb").read(9)
    if len(answer) < 9 or answer[3] != _SETTINGS_TYPE:
        raise ConnectionError("another program listens there")


def _require_token(address: RayAddress, bootstrap: str) -> None:
    """Refuse a cluster that does not take this process's token.

    Raises:
        ClusterError: it does not, or it is no head node.
    """
    try:
        with _quiet_native_log():
            _raylet.GcsClient(address=bootstrap)
    except ray_errors.RayError as error:
        if type(error).__name__ == "AuthenticationError":
            raise refused(address, error) from error
        raise ClusterError(
            f"{address}: no head node of Ray answers there: {one_paragraph(str(error))}. {_REMEDY}"
        ) from error


@contextlib.contextmanager
def _quiet_native_log() -> Iterator[None]:
    """Keep what Ray's native code writes to this process's error stream from the terminal."""
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as nowhere:
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
