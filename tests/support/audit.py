"""`make audit`: ask pip-audit for advisories of the pinned versions, where that is possible.

pip-audit brings fifteen packages along, so it is not a part of the environment: `pip install
pip-audit` adds it. Without it, or without its index, one line says so and nothing fails.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

from tests.support.processes import PROJECT

_LIMIT_SECONDS = 120
_UNREACHABLE = "audit: no index of advisories is reachable from here"


def verdict(report: str) -> tuple[int, str]:
    """Return the exit status, and a line, for a report of pip-audit.

    Args:
        report: JSON; empty where it gave none.
    """
    dependencies = json.loads(report)["dependencies"] if report.strip() else []
    known = [each for each in dependencies if "skip_reason" not in each]
    if not known:
        return 0, _UNREACHABLE

    holes = []
    for each in known:
        for hole in each["vulns"]:
            fixed = " or ".join(hole["fix_versions"]) or "no version yet"
            holes.append(f"{each['name']} {each['version']}: {hole['id']}, fixed in {fixed}")
    if holes:
        return 1, "audit: " + "; ".join(holes)
    num_unknown = len(dependencies) - len(known)
    return 0, f"audit: {len(known)} packages without advisories, {num_unknown} not known there"


def main() -> int:
    """Run pip-audit over constraints.txt, and print the verdict."""
    program = shutil.which("pip-audit", path=str(Path(sys.executable).parent))
    if program is None:
        print("audit: pip-audit is not installed (pip install pip-audit): no advisories are asked")
        return 0
    words = [program, "--requirement", str(PROJECT / "constraints.txt"), "--no-deps"]
    try:
        done = subprocess.run(
            [*words, "--disable-pip", "--format", "json", "--progress-spinner", "off"],
            capture_output=True,
            text=True,
            timeout=_LIMIT_SECONDS,
        )
    except subprocess.TimeoutExpired:
        print(_UNREACHABLE)
        return 0
    status, line = verdict(done.stdout)
    print(line)
    return status


if __name__ == "__main__":
    sys.exit(main())
