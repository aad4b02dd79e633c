"""An S3 server on loopback, and its credentials."""

from __future__ import annotations

import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

SECRETS = {
    "AWS_ACCESS_KEY_ID": "AKIAMILESTEST0001",
    "AWS_SECRET_ACCESS_KEY": "secret-of-the-tests-9f2c61",
    "AWS_SESSION_TOKEN": "token-of-the-tests-77ab02",
}
"""Long enough to be found wherever they should not be."""


@contextmanager
def s3_bucket(patch: pytest.MonkeyPatch) -> Iterator[str]:
    """Serve one empty bucket and give its URL; credentials come from the environment, as in a
    shell.
    """
    import s3fs
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"

    # Buckets live as long as the process: one of an earlier test may be there.
    reset = urllib.request.Request(f"{url}/moto-api/reset", method="POST")
    urllib.request.urlopen(reset).close()

    environment = {**SECRETS, "AWS_ENDPOINT_URL": url, "AWS_DEFAULT_REGION": "us-east-1"}
    for name, value in environment.items():
        patch.setenv(name, value)

    s3fs.S3FileSystem.clear_instance_cache()
    s3fs.S3FileSystem().mkdir("bucket")
    try:
        yield "s3://bucket"
    finally:
        s3fs.S3FileSystem.clear_instance_cache()
        server.stop()
