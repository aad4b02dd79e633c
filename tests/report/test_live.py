"""The page of a run that goes on: what is read, what is answered, and to whom."""

from __future__ import annotations

import http.client
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from miles.cli import main
from miles.common import run_folder
from miles.errors import ConfigError, SourceError
from miles.report.live import LiveServer
from miles.report.live_run import LiveRun
from miles.report.tail import GrowingFile
from tests.support.metrics_lines import PLAIN_RUN, metrics_line, write_lines


class Reader:
    """A growing file, and the steps that were read from it."""

    def __init__(self, path: Path) -> None:
        self.steps: list[int] = []
        self.file = GrowingFile(
            str(path), lambda line: self.steps.append(line["step"]), self.steps.clear
        )


def text_of(*steps: int, loss: float = 2.0) -> str:
    return "".join(json.dumps(metrics_line(step, loss)) + "\n" for step in steps)


def test_only_what_was_appended_is_read(tmp_path: Path) -> None:
    path = tmp_path / run_folder.METRICS
    reader = Reader(path)
    assert not reader.file.look(), "no file yet"

    path.write_text(text_of(*range(200)))
    assert reader.file.look()
    before = reader.file.num_bytes_read
    with path.open("a") as file:
        file.write(text_of(200) + text_of(201)[:50])
    assert reader.file.look()
    assert reader.steps == list(range(201)), "half a line waits for its end"
    assert reader.file.num_bytes_read - before < 2_048 + 2 * len(text_of(200))
    assert not reader.file.look()


def test_a_run_that_goes_back_is_read_again(tmp_path: Path) -> None:
    """Whether it has fewer lines by now, as many, or more."""
    path = tmp_path / run_folder.METRICS
    for num_lines in (5, 10, 14):
        path.write_text(text_of(*range(10)))
        reader = Reader(path)
        reader.file.look()
        path.write_text(text_of(*range(4)) + text_of(*range(4, num_lines), loss=1.5))
        assert reader.file.look()
        assert reader.steps == list(range(num_lines))
    path.unlink()
    assert reader.file.look()
    assert reader.steps == []


def test_a_broken_line_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / run_folder.METRICS
    path.write_text(text_of(0) + "\0\0\0\n[]\n" + text_of(1))
    reader = Reader(path)
    assert reader.file.look()
    assert reader.steps == [0, 1]


def test_news_are_what_changed(tmp_path: Path) -> None:
    write_lines(tmp_path / run_folder.METRICS, PLAIN_RUN)
    run = LiveRun(str(tmp_path))
    assert "data-live" in run.page()
    first = run.news(0)
    assert run.news(first["version"]) == {"version": first["version"]}, "nothing new"

    skipped = {"step": 2, "reason": "the loss is not finite", "rows": []}
    write_lines(tmp_path / run_folder.SKIPPED_STEPS, [skipped])
    news = run.news(first["version"])
    assert list(news["parts"]) == ["skipped"]

    with (tmp_path / run_folder.METRICS).open("a") as file:
        file.write(text_of(4))
    later = run.news(news["version"])
    assert later["version"] > news["version"]
    assert "5 steps" in later["parts"]["summary"]
    assert later["data"]["charts"][0]["x"]["step"] == [0, 1, 1, 1, 1], "each behind the last"
    assert "skipped" not in later["parts"]


def test_a_run_before_its_first_step(tmp_path: Path) -> None:
    page = LiveRun(str(tmp_path)).page()
    assert "0 steps" in page
    assert "cannot be shown" not in page


@pytest.fixture
def server(tmp_path: Path) -> Iterator[LiveServer]:
    write_lines(tmp_path / run_folder.METRICS, PLAIN_RUN)
    with LiveServer(str(tmp_path)) as serving:
        thread = threading.Thread(target=serving.serve_forever, daemon=True)
        thread.start()
        yield serving
        serving.shutdown()
        thread.join()


def ask(server: LiveServer, path: str, host: str = "", method: str = "GET") -> tuple[int, Any, str]:
    """Return the status, the headers and the text of an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.request(method, path, headers={"Host": host or f"127.0.0.1:{server.port}"})
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, answer.headers, text


def test_it_answers_to_its_own_name_alone(server: LiveServer) -> None:
    """Another name that leads here is DNS rebinding."""
    assert server.server_address[0] == "127.0.0.1"
    for host in (f"127.0.0.1:{server.port}", f"localhost:{server.port}"):
        assert ask(server, "/", host)[0] == 200
    for host in ("evil.example", f"evil.example:{server.port}", "127.0.0.1", "localhost:1"):
        for path in ("/", "/news.json?version=0"):
            status, _, text = ask(server, path, host)
            assert status == 421
            assert "loss" not in text


def test_what_it_answers(server: LiveServer) -> None:
    status, headers, page = ask(server, "/")
    assert status == 200
    assert "Loss" in page
    assert "connect-src 'self'" in headers["Content-Security-Policy"]
    assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]
    assert "Access-Control-Allow-Origin" not in headers

    for version in ("", "x", "9" * 400, "-1"):
        assert json.loads(ask(server, f"/news.json?version={version}")[2])["data"]["charts"]
    assert ask(server, "/metrics.jsonl")[0] == 404
    assert ask(server, "/../../etc/passwd")[0] == 404
    assert ask(server, "/", method="POST")[0] == 501


def test_a_port_that_is_taken(server: LiveServer, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="another process listens there"):
        LiveServer(str(tmp_path), server.port)
    with pytest.raises(SourceError, match="no such folder"):
        LiveServer(str(tmp_path / "none"))


def test_a_port_needs_live(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path), "--port", "8000"]) == 2
    assert "give --live, too" in capsys.readouterr().err


def test_ctrl_c_ends_it(tmp_path: Path) -> None:
    write_lines(tmp_path / run_folder.METRICS, PLAIN_RUN)
    command = [sys.executable, "-u", "-m", "miles.cli", "report", str(tmp_path), "--live"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline().strip().startswith("http://127.0.0.1:")
        assert "Ctrl-C ends it" in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=240)
    assert process.returncode == 130
    assert error == "miles: Ctrl-C: the page has ended; the run goes on\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == [run_folder.METRICS]
