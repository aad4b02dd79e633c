"""SIGTERM, Ctrl-C and SIGHUP before, during and after the steps of a run."""

from __future__ import annotations

import contextlib
import os
import pty
import signal
import threading
from typing import Any, cast

import pytest

from miles.cli.outcome import exit_status_of
from miles.common.file_errors import reading
from miles.errors import ConfigError
from miles.train.driver import loop
from miles.train.driver.preemption import Stopped, StopSignal
from tests.support.fault_table import NOTHING, observed
from tests.support.processes import closed_pipe, wait_until


def send(number: int = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize(
    ("number", "name"), [(signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "Ctrl-C")]
)
def test_during_the_steps_it_is_only_noted(number: int, name: str) -> None:
    with StopSignal() as stop:
        stop.begin_steps()
        assert not stop.is_requested
        send(number)
        assert (stop.is_requested, stop.name) == (True, name)
        send()  # a second SIGTERM changes nothing
        assert stop.name == name


def test_the_first_ctrl_c_is_answered_at_once() -> None:
    said: list[str] = []
    with StopSignal(said.append) as stop:
        stop.begin_steps()
        stop.step = 7
        send(signal.SIGINT)
        wait_until(lambda: said)
        observed("Ctrl-C", said[0], "Ctrl-C", NOTHING)
        assert said == ["Ctrl-C: stopping after step 7; once more to stop at once"]


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_the_next_ctrl_c_stops_at_once(first: int) -> None:
    with StopSignal() as stop:
        stop.begin_steps()
        send(first)
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)


def test_ctrl_c_before_the_steps_stops_at_once() -> None:
    with StopSignal(), pytest.raises(KeyboardInterrupt):
        send(signal.SIGINT)


def test_ctrl_c_before_the_start_loses_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(loop, "preflight", lambda config: send(signal.SIGINT))
    assert exit_status_of(lambda: loop.train(cast(Any, None)) and None) == 130
    printed = capsys.readouterr().err
    observed("Ctrl-C before the first step", printed, "Ctrl-C", NOTHING)


def test_a_run_outlives_its_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(config: object) -> None:
        print("reading", flush=True)
        raise ConfigError("the end")

    monkeypatch.setattr(loop, "preflight", refuse)
    with closed_pipe() as pipe:
        monkeypatch.setattr("sys.stdout", pipe)
        with pytest.raises(ConfigError, match="the end"):
            loop.train(cast(Any, None))


def test_a_closed_terminal_is_not_written_to() -> None:
    """In a terminal of its own: what is printed after it has closed raises nothing."""
    pid, terminal = pty.fork()
    if pid == 0:
        status = 1
        with contextlib.suppress(BaseException):
            stop = StopSignal().__enter__()
            stop.begin_steps()
            os.write(1, b"ready")
            wait_until(lambda: stop.is_requested)
            for _ in range(9):
                os.write(1, b"still here")
            status = 0 if stop.name == "SIGHUP" else 2
        os._exit(status)

    assert os.read(terminal, 5) == b"ready"
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_what_was_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignal() as stop:
            send(signal.SIGHUP)
            assert not stop.is_requested
    finally:
        signal.signal(signal.SIGHUP, before)


def test_before_the_steps_it_stops_at_once() -> None:
    with StopSignal() as stop:
        with pytest.raises(Stopped):
            send()
        send()  # a second one changes nothing
        with pytest.raises(Stopped):
            stop.begin_steps()


def test_while_a_file_is_read_it_is_no_error_of_the_file() -> None:
    with StopSignal(), pytest.raises(Stopped), reading("s3://bucket/file"):
        send()


def test_between_attempts_it_stops_at_once() -> None:
    with StopSignal() as stop:
        stop.begin_steps()
        stop.end_steps()
        with pytest.raises(Stopped):
            send()


def test_the_handler_before_is_put_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopSignal():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before


def test_outside_the_main_thread_it_hears_nothing() -> None:
    before = signal.getsignal(signal.SIGTERM)

    def enter() -> None:
        with StopSignal() as stop:
            stop.begin_steps()

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGTERM) == before
