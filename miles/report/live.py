"""Serving the page of a run on this machine while the run goes on.

    GET /                        the page
    GET /news.json?version=7     what is new to a page of that version (`live_run`)

It listens on 127.0.0.1 alone, and answers only those who ask for it by that name or as localhost: a
web page elsewhere that has its own name lead here (DNS rebinding) is refused. It changes nothing.
"""

from __future__ import annotations

import errno
import json
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

from miles.common import storage
from miles.common.local_paths import absolute
from miles.common.near_names import meant_path
from miles.errors import ConfigError, MilesError, SourceError
from miles.report.html_page import policy
from miles.report.live_run import LiveRun

ADDRESS = "127.0.0.1"
_NAMES = (ADDRESS, "localhost")
_HTML = "text/html; charset=utf-8"
_JSON = "application/json; charset=utf-8"
_TEXT = "text/plain; charset=utf-8"
_READ_SECONDS = 30.0


class LiveServer(ThreadingHTTPServer):
    """Serves the page of one run. `serve_forever` begins.

    Args:
        folder: of the run (fsspec URL).
        port: to listen at; 0: the system chooses one.

    Raises:
        SourceError: there is no such folder.
        ConfigError: the port cannot be listened at.
    """

    daemon_threads = True

    def __init__(self, folder: str, port: int = 0) -> None:
        folder = absolute(folder)
        if not storage.is_folder(folder):
            raise SourceError(
                f"{folder}: no such folder; expected the folder of a run{meant_path(folder)}"
            )
        self.run = LiveRun(folder)
        try:
            super().__init__((ADDRESS, port), _Handler)
        except OSError as error:
            is_taken = error.errno == errno.EADDRINUSE
            cause = "another process listens there" if is_taken else str(error.strerror)
            raise ConfigError(
                f"--port {port}: cannot be listened at ({cause}). Give another one, or leave it "
                "out, and the system chooses"
            ) from error

    @property
    def port(self) -> int:
        """The port that is listened at."""
        return int(self.server_address[1])

    @property
    def url(self) -> str:
        """The address of the page."""
        return f"http://{ADDRESS}:{self.port}/"


class _Handler(BaseHTTPRequestHandler):
    """Answers one connection."""

    server: LiveServer
    timeout = _READ_SECONDS
    server_version = "miles"
    sys_version = ""

    def do_GET(self) -> None:
        if self.headers.get("Host", "").lower() not in self._own_hosts():
            text = f"This is {self.server.url}, and answers to no other name.\n"
            self._answer(HTTPStatus.MISDIRECTED_REQUEST, _TEXT, text)
            return

        asked = urlsplit(self.path)
        try:
            if asked.path == "/":
                self._answer(HTTPStatus.OK, _HTML, self.server.run.page())
            elif asked.path == "/news.json":
                version = _whole_number(parse_qs(asked.query).get("version", [""])[0])
                news = self.server.run.news(version)
                self._answer(HTTPStatus.OK, _JSON, json.dumps(news, allow_nan=False))
            else:
                self._answer(HTTPStatus.NOT_FOUND, _TEXT, "There is no such page.\n")
        except MilesError as error:  # an object store that does not answer now
            self._answer(HTTPStatus.SERVICE_UNAVAILABLE, _TEXT, f"{error}\n")

    def log_message(self, format: str, *args: object) -> None:
        """Print nothing: the terminal is the user's."""

    def _own_hosts(self) -> list[str]:
        hosts = [f"{name}:{self.server.port}" for name in _NAMES]
        # A browser leaves out the usual port.
        return [*hosts, *_NAMES] if self.server.port == 80 else hosts

    def _answer(self, status: HTTPStatus, kind: str, text: str) -> None:
        content = text.encode()
        headers = {
            "Content-Type": kind,
            "Content-Length": str(len(content)),
            "Cache-Control": "no-store",
            "Content-Security-Policy": f"{policy(is_live=True)}; frame-ancestors 'none'",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
        }
        try:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True  # the reader has closed the page


def _whole_number(text: str) -> int:
    """Return a version; 0, which no page has, where the text is none."""
    return int(text) if text.isascii() and text.isdigit() and len(text) < 16 else 0
