"""An S3 server on loopback behind a proxy that answers some requests as a bad day would.

    run ── proxy ── moto's server          what the run sees
    soak ────────── moto's server          what is really there

The weather decides: at all times a few requests fail; in a storm most of them do.
"""

from __future__ import annotations

import contextlib
import http.client
import logging
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

CREDENTIALS = {"AWS_ACCESS_KEY_ID": "soak", "AWS_SECRET_ACCESS_KEY": "soak"}
SHARE_IN_CALM = 0.01
SHARE_IN_STORM = 0.8
SLOW_SECONDS = 4.0
_ANSWER_SECONDS = 120.0


@dataclass
class Weather:
    """Draws for each request whether it fails, and how."""

    draw: random.Random
    counts: Counter[str] = field(default_factory=Counter)
    """kind of failure -> how often it happened"""
    is_on: bool = False
    _storm_ends: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def storm(self, seconds: float) -> None:
        """Have most requests fail for some seconds."""
        self._storm_ends = time.monotonic() + seconds

    def next_failure(self) -> Failure | None:
        """Return how the next request fails; None: it does not."""
        with self._lock:
            is_stormy = time.monotonic() < self._storm_ends
            share = SHARE_IN_STORM if is_stormy else SHARE_IN_CALM
            if not self.is_on or self.draw.random() >= share:
                return None
            name = self.draw.choice(list(FAILURES))
            self.counts[name] += 1
            return FAILURES[name]


class _Proxy(BaseHTTPRequestHandler):
    """Passes requests on to the server, and its answers back, unless the weather is against it."""

    protocol_version = "HTTP/1.1"
    weather: Weather
    server_url: str

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        failure = self.weather.next_failure()
        if failure is None:
            self.pass_on(body)
        else:
            failure(self, body)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = answer

    def pass_on(self, body: bytes, share: float = 1.0) -> None:
        """Ask the server; send a share of its answer, and hang up if that is not all."""
        status, headers, content = self.ask(body)
        self.send_response(status)
        for name, value in headers:
            if name.lower() not in ("transfer-encoding", "connection", "server", "date"):
                self.send_header(name, value)
        if not any(name.lower() == "content-length" for name, _ in headers):
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: int(share * len(content))])
        if share < 1:
            self.close_connection = True

    def ask(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        """Return the server's status, headers and content."""
        address = urlsplit(self.server_url).netloc
        connection = http.client.HTTPConnection(address, timeout=_ANSWER_SECONDS)
        try:
            connection.putrequest(
                self.command, self.path, skip_host=True, skip_accept_encoding=True
            )
            for name, value in self.headers.items():
                if name.lower() not in ("expect", "connection"):
                    connection.putheader(name, value)
            connection.endheaders(body)
            answer = connection.getresponse()
            return answer.status, answer.getheaders(), answer.read()
        finally:
            connection.close()

    def fail(self, status: int, code: str) -> None:
        """Send an error as S3 does."""
        text = f"<Error><Code>{code}</Code><Message>a bad day</Message></Error>".encode()
        content = b"" if self.command == "HEAD" else text
        self.send_response(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def reset(self) -> None:
        """Reset the connection."""
        linger = struct.pack("ii", 1, 0)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.close_connection = True
        self.connection.close()

    def log_message(self, format: str, *args: Any) -> None: ...


Failure = Callable[[_Proxy, bytes], None]


def _internal_error(proxy: _Proxy, body: bytes) -> None:
    proxy.fail(500, "InternalError")


def _slow_down(proxy: _Proxy, body: bytes) -> None:
    proxy.fail(503, "SlowDown")


def _reset(proxy: _Proxy, body: bytes) -> None:
    proxy.reset()


def _lost_answer(proxy: _Proxy, body: bytes) -> None:
    proxy.ask(body)
    proxy.reset()


def _truncated(proxy: _Proxy, body: bytes) -> None:
    proxy.pass_on(body, 0.5)


def _slow(proxy: _Proxy, body: bytes) -> None:
    time.sleep(SLOW_SECONDS)
    proxy.pass_on(body)


FAILURES: dict[str, Failure] = {
    "S3: 500": _internal_error,
    "S3: 503 SlowDown": _slow_down,
    "S3: connection reset": _reset,
    "S3: answer lost": _lost_answer,
    "S3: body cut off": _truncated,
    "S3: slow answer": _slow,
}


class _QuietServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of clients that were killed."""


@dataclass(frozen=True)
class Store:
    """An object store, as the runs and as the soak see it."""

    client: Any
    """of boto3, past the proxy"""
    weather: Weather
    environment: dict[str, str]
    """for runs: it leads to the proxy"""

    def read(self, url: str) -> bytes:
        """Return the content of an object; nothing where there is none."""
        bucket, _, key = url.removeprefix("s3://").partition("/")
        try:
            content: bytes = self.client.get_object(Bucket=bucket, Key=key)["Body"].read()
        except self.client.exceptions.NoSuchKey:
            return b""
        return content

    def write(self, url: str, content: bytes) -> None:
        """Write an object."""
        bucket, _, key = url.removeprefix("s3://").partition("/")
        self.client.put_object(Bucket=bucket, Key=key, Body=content)

    def clear(self, url: str) -> None:
        """Remove the objects below a URL."""
        bucket, _, prefix = url.removeprefix("s3://").partition("/")
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        for page in pages:
            for entry in page.get("Contents", []):
                self.client.delete_object(Bucket=bucket, Key=entry["Key"])


@contextlib.contextmanager
def object_store(draw: random.Random) -> Iterator[Store]:
    """Serve a bucket named `soak`."""
    import boto3
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # it logs each request
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    client = boto3.client(
        "s3",
        endpoint_url=url,
        region_name="us-east-1",
        aws_access_key_id="soak",
        aws_secret_access_key="soak",  # noqa: S106
    )
    client.create_bucket(Bucket="soak")

    weather = Weather(draw)
    handler = type("Handler", (_Proxy,), {"weather": weather, "server_url": url})
    proxy = _QuietServer(("127.0.0.1", 0), handler)
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    environment = {
        **CREDENTIALS,
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{proxy.server_port}",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    try:
        yield Store(client, weather, environment)
    finally:
        proxy.shutdown()
        server.stop()
