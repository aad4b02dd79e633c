"""Secrets of URLs are neither taken nor shown."""

from __future__ import annotations

import pytest

from miles.common import storage
from miles.common.redact import redact
from miles.data.config import SourceConfig
from miles.data.files.manifest import build_manifest
from miles.errors import SourceError

SECRET = [
    "https://user:hunter2@host/x.jsonl",
    "https://user:hunter2@host:8080/x.jsonl",
    "https://user:hun/ter2@host/x.jsonl",
    "https://hunter2@host/x.jsonl",
    "s3://AKIA:hunter2@bucket/x.jsonl",
    "s3://AKIA:hun?ter2@bucket/x.jsonl",
    "https://host/x.jsonl?X-Amz-Credential=AKIA&X-Amz-Signature=hunter2",
    "https://host/x?sig=hunter2&end=.jsonl",
    "simplecache::https://user:hunter2@host/x.jsonl",
]
PLAIN = [
    "/data/part-?.jsonl",
    "s3://bucket/part-?.jsonl",
    "s3://bucket/a=1/b@2/x.jsonl",
    "s3://arn:aws:s3:us-west-2:123456789012:accesspoint/mine/a@b.jsonl",
    "hdfs://host:9000/a@b.jsonl",
    "hdfs://host:9000",
    "abfs://container@account.dfs.core.windows.net/x.jsonl",
    "sftp://user@host/x.jsonl",
    "hf://datasets/teknium/OpenHermes-2.5@refs%2Fconvert%2Fparquet/x.parquet",
    "zip://a.jsonl::s3://bucket/x@y.zip",
]


@pytest.mark.parametrize("url", SECRET)
def test_a_url_with_a_secret_is_refused(url: str) -> None:
    with pytest.raises(SourceError, match="Credentials come from the environment") as caught:
        build_manifest([SourceConfig("s", (url,))])
    for part in ("hunter2", "ter2", "AKIA"):
        assert part not in str(caught.value)


@pytest.mark.parametrize("url", PLAIN)
def test_what_only_looks_like_one_is_left(url: str) -> None:
    assert redact(url) == url
    assert redact(f"{url}: no such file") == f"{url}: no such file"


def test_signed_urls_are_cut_from_errors() -> None:
    text = "403 Forbidden for url 'https://cdn/x?Expires=1&Signature=hunter2' (try again)"
    with pytest.raises(SourceError) as caught, storage.reading("hf://datasets/a/b/x.parquet"):
        raise RuntimeError(text)
    assert "https://cdn/x?…' (try again)" in str(caught.value)
    assert "hunter2" not in str(caught.value)
