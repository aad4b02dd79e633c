"""A server that answers as Weights & Biases does, as far as a run of wandb 0.31 asks."""

from __future__ import annotations

import base64
import contextlib
import gzip
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class WandbServer:
    """A server on localhost, and what it was asked."""

    url: str = ""
    keys: set[str] = field(default_factory=set)
    """API keys of the requests that had one"""
    runs: list[dict[str, Any]] = field(default_factory=list)
    """variables of the calls that create or change a run"""
    bodies: list[bytes] = field(default_factory=list)
    accepts: bool = True
    """False: it knows no key"""

    def answer(self, path: str, body: bytes) -> dict[str, Any]:
        """Return the answer to a request."""
        if path != "/graphql":
            return {}
        asked = json.loads(body)
        variables = asked.get("variables") or {}
        if "upsertBucket" in asked["query"]:
            self.runs.append(variables)
            return {"data": {"upsertBucket": {"bucket": _run(variables), "inserted": True}}}
        if "createRunFiles" in asked["query"]:
            files = [{"name": name, "uploadUrl": self.url} for name in variables["files"]]
            return {"data": {"createRunFiles": {"runID": "1", "uploadHeaders": [], "files": files}}}
        if "RunResumeStatus" in asked["query"]:
            return {"data": {"model": None}}
        viewer = {
            "id": "1",
            "entity": "me",
            "username": "me",
            "flags": "{}",
            "teams": {"edges": []},
        }
        return {"data": {"viewer": viewer if self.accepts else None}}


def _run(variables: dict[str, Any]) -> dict[str, Any]:
    entity = {"id": "1", "name": variables.get("entity") or "me"}
    project = {"id": "1", "name": variables.get("project"), "entity": entity}
    name = variables.get("name")
    return {"id": "1", "name": name, "displayName": name, "project": project, "historyLineCount": 0}


@contextlib.contextmanager
def wandb_server() -> Iterator[WandbServer]:
    """Run the server."""
    server = WandbServer()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            kind, _, value = self.headers.get("Authorization", "").partition(" ")
            if kind == "Basic":
                server.keys.add(base64.b64decode(value).decode().partition(":")[2])

            server.bodies.append(body)
            data = json.dumps(server.answer(self.path, body)).encode()
            self.send_response(200 if server.accepts else 401)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_PUT = do_POST
        do_GET = do_POST

        def log_message(self, format: str, *args: Any) -> None: ...

    http_server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.url = f"http://127.0.0.1:{http_server.server_port}"
    thread = threading.Thread(target=http_server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        http_server.shutdown()
        http_server.server_close()
        thread.join()
