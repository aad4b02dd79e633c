"""The parts and the curves of a run -> report.html, a page that needs no network.

All that the page needs lies in it: its style, its scripts, the data of the charts as JSON. Its
content security policy allows the scripts by their hashes, and no connection; a live page may ask
the server that it came from.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping
from functools import cache
from typing import Any

from miles import __version__
from miles.report.chart_data import page_data
from miles.report.charts import run_chart, to_png
from miles.report.parts import (
    LEFT_OUT,
    ON_TOP,
    PAGE_FOLDER,
    PARTS,
    RunView,
    environment,
    render,
    render_left_out,
)
from miles.report.run_data import Metrics

_UPLOT = PAGE_FOLDER / "vendor" / "uplot"
_SECTION = re.compile(r'<section id="([\w-]+)"><h2(?: data-short="([^"]*)")?>(.*?)</h2>')
_NO_CHARTS: dict[str, Any] = {"charts": [], "marks": [], "num_steps": 0}


def write_page(view: RunView, metrics: list[Metrics]) -> str:
    """Return report.html.

    Args:
        view: of the run; it is told what the page lacks.
        metrics: of the run, for the pictures that stand in for charts where scripts do not run.
    """

    def picture() -> str:
        return base64.b64encode(to_png(run_chart(metrics))).decode()

    data = charts_of(view)
    parts = {part.name: render(view, part) for part in PARTS}
    image = view.made("The charts", picture, "")
    parts[LEFT_OUT] = render_left_out(view)
    return frame(view.folder, parts, data, picture=image)


def charts_of(view: RunView) -> dict[str, Any]:
    """Return the data of the charts."""
    if not view.columns.num_steps:
        return _NO_CHARTS
    starts = view.made("The starts", lambda: view.starts, [])
    return view.made("The curves", lambda: page_data(view.columns, starts), _NO_CHARTS)


def frame(
    folder: str,
    parts: Mapping[str, str],
    data: Mapping[str, Any],
    *,
    picture: str = "",
    version: int | None = None,
) -> str:
    """Return the page around its parts.

    Args:
        folder: of the run.
        parts: name of a part -> its HTML.
        data: of the charts.
        picture: PNG in base64, for a browser without scripts.
        version: of a live page's content; None: the page is not live.
    """
    contents = [("curves", "Curves")]
    for part in PARTS:
        if part.name not in ON_TOP:
            found = _SECTION.search(parts[part.name])
            contents += [(found[1], found[2] or found[3])] if found else []
    scripts = _scripts()
    return (
        environment()
        .get_template("report.html.jinja")
        .render(
            name=folder.rstrip("/").rsplit("/", 1)[-1],
            parts=parts,
            later_parts=[part.name for part in PARTS if part.name not in ON_TOP],
            contents=contents,
            data=as_script_data(data),
            picture=picture,
            version=version,
            policy=policy(is_live=version is not None),
            style=_style(),
            theme_script=scripts["theme"],
            uplot_script=scripts["uplot"],
            page_script=scripts["page"],
            uplot_version=re.findall(r"\(v([\d.]+)\)", scripts["uplot"])[0],
            uplot_licence=(_UPLOT / "LICENSE").read_text(encoding="utf-8"),
            miles_version=__version__,
        )
    )


@cache
def policy(*, is_live: bool) -> str:
    """Return the content security policy of a page: its own scripts, and no network."""
    hashes = []
    for script in _scripts().values():
        digest = hashlib.sha256(script.encode()).digest()
        hashes.append(f"'sha256-{base64.b64encode(digest).decode()}'")
    rules = {
        "default-src": "'none'",
        "script-src": " ".join(hashes),
        "style-src": "'unsafe-inline'",
        "img-src": "data:",
        "connect-src": "'self'" if is_live else "'none'",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    return "; ".join(f"{name} {value}" for name, value in rules.items())


def as_script_data(data: Mapping[str, Any]) -> str:
    """Return JSON that cannot end the script element around it, nor begin another one."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("&", r"\u0026").replace("<", r"\u003c").replace(">", r"\u003e")


@cache
def _scripts() -> dict[str, str]:
    paths = {
        "theme": PAGE_FOLDER / "theme.js",
        "uplot": _UPLOT / "uPlot.iife.min.js",
        "page": PAGE_FOLDER / "report.js",
    }
    return {name: path.read_text(encoding="utf-8") for name, path in paths.items()}


@cache
def _style() -> str:
    paths = (_UPLOT / "uPlot.min.css", PAGE_FOLDER / "report.css")
    return "\n".join(path.read_text(encoding="utf-8") for path in paths)
