"""File names -> formats; OpenHermes from files and from the hub, and the errors where the hub
cannot help."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from miles.data.config import RowFormat, SourceConfig
from miles.data.file_formats import format_of
from miles.data.files.openhermes import openhermes_sources
from miles.errors import ConfigError, SourceError


def test_formats() -> None:
    assert format_of("s3://b/A.PARQUET") == ("parquet", None)
    assert format_of("a.jsonl.zst") == ("jsonl", "zstd")
    assert format_of("a.json.gz") == ("json", "gzip")
    assert format_of("a.csv.gz") == ("csv", "gzip")
    assert format_of("a.feather") == ("arrow", None)
    with pytest.raises(SourceError, match=r"a\.txt: .*\.parquet"):
        format_of("a.txt")


def test_openhermes_from_the_users_files() -> None:
    assert openhermes_sources("x/*.parquet") == (SourceConfig("openhermes", ("x/*.parquet",)),)
    assert openhermes_sources(["/x.json", "/y.json"])[0].paths == ("/x.json", "/y.json")
    assert openhermes_sources("x.json", format=RowFormat("text"))[0].format == RowFormat("text")
    with pytest.raises(ConfigError, match="revision"):
        openhermes_sources("x.json", revision="main")


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's HTTP interface as its client asks for: revisions and their files."""

    revisions: dict[str, list[str]] = {}  # noqa: RUF012  (set by each test)
    error: tuple[int, str] | None = None

    def do_GET(self) -> None:
        parts = self.path.split("?")[0].split(
            "/"
        )  # /api/datasets/teknium/OpenHermes-2.5/revision|tree/REVISION
        revision = parts[6].replace("%2F", "/") if len(parts) > 6 else "main"
        if self.error is not None:
            self._answer(self.error[0], {"error": self.error[1]}, self.error[1])
        elif revision not in self.revisions:
            self._answer(404, {"error": "no such revision"}, "RevisionNotFound")
        elif "tree" in parts:
            files = [
                {"type": "file", "path": path, "size": 1, "oid": "0" * 40}
                for path in self.revisions[revision]
            ]
            self._answer(200, files)
        else:
            self._answer(200, {"id": "teknium/OpenHermes-2.5", "sha": "0" * 40, "siblings": []})

    def _answer(self, status: int, content: object, code: str = "") -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if code:
            self.send_header("X-Error-Code", code)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    hub_constants = pytest.importorskip("huggingface_hub.constants")
    from huggingface_hub import HfFileSystem

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    monkeypatch.setattr(hub_constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", False)
    HfFileSystem.clear_instance_cache()
    Hub.revisions, Hub.error = {}, None
    yield Hub
    HfFileSystem.clear_instance_cache()
    server.shutdown()
    server.server_close()
    thread.join()


ROOT = "hf://datasets/teknium/OpenHermes-2.5@"
PARQUET = ["default/train/0001.parquet", "default/train/0000.parquet"]


def test_hub_parquet_branch_first(hub: type[Hub]) -> None:
    hub.revisions = {"refs/convert/parquet": PARQUET, "main": ["README.md", "openhermes2_5.json"]}
    (source,) = openhermes_sources(None)
    assert source.paths == tuple(
        f"{ROOT}refs%2Fconvert%2Fparquet/{name}" for name in sorted(PARQUET)
    )


def test_hub_array_without_a_parquet_branch(hub: type[Hub]) -> None:
    hub.revisions = {"main": ["README.md", "openhermes2_5.json"]}
    assert openhermes_sources(None)[0].paths == (f"{ROOT}main/openhermes2_5.json",)


def test_a_pinned_revision_is_the_only_one(hub: type[Hub]) -> None:
    hub.revisions = {"refs/convert/parquet": PARQUET, "v1": ["openhermes2_5.json"]}
    assert openhermes_sources(None, revision="v1")[0].paths == (f"{ROOT}v1/openhermes2_5.json",)
    with pytest.raises(SourceError, match="at revision v2"):
        openhermes_sources(None, revision="v2")


def test_a_hub_that_asks_for_a_login(hub: type[Hub]) -> None:
    hub.error = (401, "GatedRepo")
    with pytest.raises(SourceError, match="asks for a login") as caught:
        openhermes_sources(None)
    assert "source='PATH'" in str(caught.value)


def test_an_unreachable_hub_names_the_way_out(
    hub: type[Hub], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9"
    )  # nobody listens there
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    with pytest.raises(SourceError, match="cannot be reached") as caught:
        openhermes_sources(None)
    assert "source='PATH'" in str(caught.value)
    assert sum(pauses) < 20
