"""The oldest versions that pyproject.toml allows have no advisory that is known to us."""

from __future__ import annotations

import json
import re
import tomllib

from packaging.requirements import Requirement
from packaging.version import Version

from tests.support.audit import verdict
from tests.support.processes import PROJECT

FIXED_IN = {
    "setuptools": "78.1.1",  # CVE-2025-47273: a path out of the folder
    "ray": "2.52.0",  # CVE-2025-62593: a web page could submit jobs to a local dashboard
    "torch": "2.8.0",  # CVE-2025-32434: code in spite of weights_only; CVE-2025-3730
    "transformers": "4.53.0",  # CVE-2025-1194 and others: regular expressions without end
    "pyarrow": "23.0.1",  # CVE-2023-47248: code in extension types; CVE-2026-25087
    "orjson": "3.11.6",  # CVE-2025-67221: recursion in what it writes
    "Jinja2": "3.1.6",  # CVE-2025-27516, CVE-2024-56201, CVE-2024-56326: ways out of the sandbox
    "PyYAML": "5.4",  # CVE-2020-14343: code in a full load, which is not used
    "jupyterlab": "4.4.8",  # CVE-2025-59842: links of a notebook
    "pytest": "9.0.3",  # CVE-2025-71176: names in /tmp that can be guessed
}
"""As known on 2026-11-26, from the projects' own advisories, by hand."""


def requirements() -> list[Requirement]:
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())
    lines = [*project["build-system"]["requires"], *project["project"]["dependencies"]]
    for extra in project["project"]["optional-dependencies"].values():
        lines += extra
    return [Requirement(line) for line in lines if not line.startswith("miles[")]


def floor_of(requirement: Requirement) -> Version | None:
    floors = [Version(each.version) for each in requirement.specifier if each.operator == ">="]
    return max(floors, default=None)


def test_floors_are_above_known_advisories() -> None:
    floors = {(each.name, str(each)): floor_of(each) for each in requirements()}
    named = {name for name, _ in floors}
    assert set(FIXED_IN) <= named
    for (name, line), floor in floors.items():
        if name in FIXED_IN:
            assert floor is not None, line
            assert floor >= Version(FIXED_IN[name]), line


def test_pinned_versions_are_within_the_floors() -> None:
    pinned = dict(
        re.findall(r"^([\w.-]+)==(\S+)$", (PROJECT / "constraints.txt").read_text(), re.M)
    )
    known = {name.lower().replace("_", "-"): version for name, version in pinned.items()}
    for each in requirements():
        version = known.get(each.name.lower().replace("_", "-"))
        if version is not None:
            assert each.specifier.contains(version), f"{each} and {version}"


def test_the_audit_does_not_take_silence_for_a_pass() -> None:
    """Where the index is not reachable, pip-audit finds nothing, and says so of each package."""
    skipped = {"name": "a", "skip_reason": "not found on PyPI"}
    clean = {"name": "b", "version": "1", "vulns": []}
    hole = {"id": "PYSEC-1", "fix_versions": ["2"], "description": "…"}
    struck = {"name": "c", "version": "1", "vulns": [hole]}

    def said(*dependencies: object) -> tuple[int, str]:
        return verdict(json.dumps({"dependencies": dependencies, "fixes": []}))

    assert said(skipped, skipped) == (0, "audit: no index of advisories is reachable from here")
    assert said(clean, skipped) == (0, "audit: 1 packages without advisories, 1 not known there")
    assert said(clean, struck) == (1, "audit: c 1: PYSEC-1, fixed in 2")
    assert verdict("") == (0, "audit: no index of advisories is reachable from here")
