"""SIGTERM before, during and after the steps of a run."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from miles.train.driver.preemption import Stopped, StopSignal


def send() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_during_the_steps_it_is_only_noted() -> None:
    with StopSignal() as stop:
        stop.begin_steps()
        assert not stop.is_requested
        send()
        assert stop.is_requested


def test_before_the_steps_it_stops_at_once() -> None:
    with StopSignal() as stop:
        with pytest.raises(Stopped):
            send()
        send()  # a second one changes nothing
        with pytest.raises(Stopped):
            stop.begin_steps()


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
