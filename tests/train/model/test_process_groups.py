"""Joining the ranks of a layout."""

from __future__ import annotations

import socket

import psutil

from miles.train.model import process_groups
from miles.train.parallel_layout import Layout
from miles.train.rank.rank_process import start_rank


def listening() -> set[tuple[str, int]]:
    """Return the addresses and ports at which this process listens."""
    connections = psutil.Process().net_connections("tcp")
    listeners = [each for each in connections if each.status == psutil.CONN_LISTEN]
    return {tuple(each.laddr) for each in listeners}


def test_ranks_meet_on_one_address_only() -> None:
    """torch's own server would listen on all addresses of the machine."""
    before = listening()
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]

    start_rank(Layout(1), 0, f"tcp://127.0.0.1:{port}", 1, 1.0, listener)
    try:
        opened = listening() - before
        assert port in [port for _, port in opened]
        assert {address for address, _ in opened} == {"127.0.0.1"}
    finally:
        process_groups.shutdown()
