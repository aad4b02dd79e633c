"""The results of a run for a person, also while it runs: report.html, loss.png, the first batch.

In: the files of a run's folder, local or remote. Out: a page that needs no network, a picture, text
for the terminal, or a page that follows the run. It runs in the user's own process; no Ray, no GPU.
It may import everything below `miles.demo` and `miles.cli`, and imports matplotlib only when it
draws.

    run_data      the files of a run's folder -> metrics, ledger, answers, starts, skipped steps
    columns       metrics -> arrays by key; stalls, thinning and chart_data make curves of them
    facts         starts and metrics -> model, hardware, versions, durations
    run_settings  config.json -> a table beside the defaults
    parts, page   all of it -> report.html, from the templates, style and scripts in page/
    charts        metrics -> pictures: loss.png, and those of a browser without scripts
    live          serves the page on this machine (live_run, tail: what is new since it was opened)
    report        writes report.html and loss.png
    first_batch   the samples of the first step -> the terminal, the page

`miles.report.write_report` is a function. It is imported when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from miles.report.report import write_report

__all__ = ["write_report"]


def __getattr__(name: str) -> Any:
    """Import the public function when it is first used."""
    if name == "write_report":
        from miles.report.report import write_report

        return write_report
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """Return what tab completion shows: the function, without the modules behind it."""
    return __all__
