"""Where a cluster is to be joined: what is told within seconds of an address that cannot be."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import pytest

from miles.common import local_ray, ray_address
from miles.common.ray_address_form import FLAG, RayAddress, find_address, require_address
from miles.errors import ClusterError, ConfigError, MilesError
from tests.support.fault_table import NOTHING, observed
from tests.support.processes import free_port


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener


def address_of(listener: socket.socket) -> str:
    return f"127.0.0.1:{listener.getsockname()[1]}"


def refusal(address: str | None) -> MilesError:
    """Return why a cluster was not joined, as the notebook and the command line get it."""
    with pytest.raises(MilesError) as raised:
        local_ray.connect(1, 80 << 20, address)
    assert "\n" not in str(raised.value)
    return raised.value


def test_nobody_answers() -> None:
    address = f"127.0.0.1:{free_port()}"
    error = refusal(address)
    assert type(error) is ClusterError
    assert str(error).startswith(f"--ray-address {address}: no Ray answers there: ")
    observed("nobody answers at `--ray-address`", str(error), "no Ray answers", NOTHING)


def test_the_variable_is_named_where_the_address_comes_from_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    address = f"127.0.0.1:{free_port()}"
    monkeypatch.setenv("RAY_ADDRESS", address)
    assert str(refusal(None)).startswith(f"RAY_ADDRESS {address}: no Ray answers there: ")


def test_a_frozen_cluster_is_given_up(
    listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system takes the connection for a process that stands still."""
    monkeypatch.setattr(ray_address, "_ANSWER_SECONDS", 0.2)
    error = refusal(address_of(listener))
    assert type(error) is ClusterError
    assert ": no Ray answers there: no answer. " in str(error)


def test_another_program_is_not_waited_for(listener: socket.socket) -> None:
    def answer() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(1000)
            connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    threading.Thread(target=answer, daemon=True).start()
    error = refusal(address_of(listener))
    assert type(error) is ClusterError
    observed("another program at `--ray-address`", str(error), "another program", NOTHING)


@pytest.mark.parametrize(
    "text",
    [
        *("10.0.0.7", "http://10.0.0.7:8265", ":6379", "head:many", "head:70000", "anyscale://x:1"),
        *("a b:6379", "x/y:6379", "user@head:6379"),
    ],
)
def test_what_is_no_address_is_refused(text: str) -> None:
    error = refusal(text)
    assert type(error) is ConfigError
    assert str(error).startswith(f"--ray-address {text}: expected HOST:PORT of the head node")
    with pytest.raises(ConfigError, match="expected HOST:PORT"):
        require_address(text)
    if text.startswith("http"):
        observed("the dashboard's URL as `--ray-address`", str(error), "expected", NOTHING)


@pytest.mark.parametrize(
    "text",
    ["auto", "local", "head:6379", "10.0.0.7:6379", "[::1]:6379", "ray://head:10001"],
)
def test_nobody_is_asked_to_tell_an_address(text: str) -> None:
    require_address(text)


def test_an_empty_address_is_no_ray_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="--ray-address is empty"):
        require_address("")
    monkeypatch.setenv("RAY_ADDRESS", "nonsense")
    with pytest.raises(ConfigError, match="RAY_ADDRESS nonsense: expected HOST:PORT"):
        require_address(None)
    require_address("local")


@pytest.mark.parametrize("given", [None, "local"])
def test_a_ray_of_its_own_is_no_address(given: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert find_address(given) is None
    monkeypatch.setenv("RAY_ADDRESS", "local")
    assert find_address(None) is None
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    assert str(find_address("other:6379")) == "--ray-address other:6379"


def test_the_token_is_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    address = RayAddress("head:6379", FLAG)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "s3cret-token")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    text = str(ray_address.refused(address, RuntimeError("InvalidAuthToken: s3cret-token")))
    assert "asks for a token, and this process has none, or a wrong one" in text
    assert "Remove RAY_AUTH_MODE=disabled" in text
    assert "s3cret" not in text
