"""`miles report`: report.html and loss.png of a run, or its page while it goes on."""

from __future__ import annotations

import argparse

from miles.cli.console import Subparsers, open_console, path_word
from miles.common.help_lines import explain
from miles.common.patience import until_answered

NAME = "report"
_MAX_PORT = 65_535


def add_parser(commands: Subparsers) -> None:
    """Add the command and its flags."""
    parser = commands.add_parser(NAME, help="report.html and loss.png of a run")
    explain(
        parser,
        "Write the page report.html and the picture loss.png into the folder of a run, also while "
        "it goes on. The page needs no network. With --live, serve it instead of writing it.",
        "report runs/qwen3",
        "report runs/qwen3 --live --port 8000",
    )
    parser.add_argument("folder", type=path_word, metavar="RUN", help="the run's folder")
    parser.add_argument(
        "--live",
        action="store_true",
        help="serve the page on this machine alone while the run goes on, until Ctrl-C; write "
        "nothing",
    )
    parser.add_argument(
        "--port", type=_port, metavar="PORT", help="of the page; the system chooses (with --live)"
    )
    parser.set_defaults(run=run)


def _port(word: str) -> int:
    if not (word.isascii() and word.isdigit() and 0 < int(word[:6]) <= _MAX_PORT):
        raise argparse.ArgumentTypeError(f"a port is a number from 1 to {_MAX_PORT}")
    return int(word)


def run(flags: argparse.Namespace) -> None:
    """Write both files and print their paths, or serve the page."""
    from miles.common.prose import Prose
    from miles.errors import ConfigError

    if flags.live:
        _serve(flags.folder, flags.port or 0)
        return
    if flags.port is not None:
        raise ConfigError("--port is that of a page which is served: give --live, too")

    from miles.report.report import write_report

    console = open_console()

    def tell(text: str) -> None:
        console.print(Prose(f"  {text}"), soft_wrap=True)

    with until_answered("reading the metrics of the run"):
        for path in write_report(flags.folder, notify=tell):
            tell(path)


def _serve(folder: str, port: int) -> None:
    """Serve the page of a run until Ctrl-C."""
    from miles.common.ctrl_c import on_ctrl_c
    from miles.common.prose import Prose
    from miles.report.live import LiveServer

    console = open_console()
    with LiveServer(folder, port) as server, on_ctrl_c("the page has ended; the run goes on"):
        console.print(Prose(f"  {server.url}  the page of {folder}"), soft_wrap=True)
        console.print("  Ctrl-C ends it; the run is not touched.", soft_wrap=True)
        server.serve_forever()
