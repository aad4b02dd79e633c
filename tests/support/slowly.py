"""The `miles` command, converting so slowly that a test can stop it in the middle."""

from __future__ import annotations

import signal
import sys
import time
from typing import Any

from miles import cli
from miles.convert import hf_to_megatron, megatron_to_hf


def slowed(function: Any) -> Any:
    def run(*arguments: Any) -> Any:
        time.sleep(0.5)
        return function(*arguments)

    return run


if __name__ == "__main__":
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # what a shell starts in the background ignores it
    hf_to_megatron._make = slowed(hf_to_megatron._make)
    megatron_to_hf.tensors_of = slowed(megatron_to_hf.tensors_of)
    sys.exit(cli.main())
