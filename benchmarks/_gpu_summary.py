"""The summary of benchmarks/gpu_check.sh in Markdown: short enough for the end of a terminal."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping
from typing import Any

from _gpu_report import markdown

MOST_CHARACTERS = 10_000
MOST_OF_A_PART = {
    "tests": 1_400,
    "demo": 500,
    "step": 2_700,
    "peer": 1_100,
    "switches": 1_300,
    "further": 900,
    "estimate": 700,
    "ray": 1_000,
    "train": 5_000,  # all of the four before, on a CPU
}
"""Characters. Together they are fewer than those of the whole."""


def summarize(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the results of all processes, a section for each, with the first error lines of all.

    Args:
        results: process -> `status`, `seconds`, and `found` (its JSON), `junit` or `tail`.
    """
    overview = ", ".join(
        f"{name} {result['status']} ({result['seconds']:.0f} s)" for name, result in results.items()
    )
    text = f"## GPU check\n\n{overview}\n"
    for name, result in results.items():
        body = "\n".join(_lines(name, result)).strip()
        most = MOST_OF_A_PART.get(name, MOST_OF_A_PART["demo"])
        if len(body) > most:
            body = body[:most].rsplit("\n", 1)[0] + "\n…"
        text += f"\n### {name}\n\n{body}\n"
    return text


def _lines(name: str, result: Mapping[str, Any]) -> list[str]:
    lines: list[str] = []
    if "junit" in result:
        lines += _tests(result["junit"])
    found = result.get("found")
    if found is not None:
        lines += _ray(found) if name == "ray" else markdown(found)
    if result["status"] != "ok" or (found is None and "junit" not in result):
        last = 12 if result["status"] != "ok" else 4
        lines += ["```", *result.get("tail", "").splitlines()[-last:], "```"]
    return lines


def _tests(junit: str) -> list[str]:
    """Return the counts of a test run, its failures, and its longest tests."""
    root = ElementTree.fromstring(junit)  # noqa: S314 - pytest wrote it just now
    (suite,) = root.iter("testsuite")
    counts = ", ".join(
        f"{suite.get(kind)} {kind}" for kind in ("tests", "failures", "errors", "skipped")
    )
    lines = [f"{counts} in {float(suite.get('time', 0)):.0f} s"]
    for case in suite.iter("testcase"):
        for problem in (*case.iter("failure"), *case.iter("error")):
            message = " ".join((problem.get("message") or "").split())
            lines.append(f"- {case.get('classname')}::{case.get('name')}: {message[:220]}")
    skipped = {problem.get("message") for problem in suite.iter("skipped")}
    lines += [f"- skipped: {message}" for message in sorted(filter(None, skipped))[:4]]
    return lines


def _ray(found: Mapping[str, Any]) -> list[str]:
    """Return the figures of a run through Ray."""
    return [f"| {name} | {value} |" for name, value in found["shown"].items()]
