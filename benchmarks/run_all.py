"""Run every benchmark at full size; a missed bar is exit status 1.

make bench
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

BENCHMARKS = (
    "encode.py",
    "pack.py",
    "stream.py",
    "convert.py",
    "saving.py",
    "lora_step.py",
    "startup.py",
)


def main() -> None:
    missed = []
    for name in BENCHMARKS:
        print(f"\n=== {name}\n", flush=True)
        script = Path(__file__).with_name(name)
        if subprocess.run([sys.executable, script, "--check"]).returncode:
            missed.append(name)
    print(f"\nmissed or failed: {', '.join(missed)}" if missed else "\nevery bar is met")
    sys.exit(bool(missed))


if __name__ == "__main__":
    main()
