"""Leave folders out of a wheel, in place.

python benchmarks/_slim_wheel.py ray-2.60.0-cp312-cp312-manylinux2014_x86_64.whl ray/jars ray/rllib
"""

from __future__ import annotations

import argparse
import zipfile
from collections.abc import Sequence
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("wheel", type=Path)
    parser.add_argument("folders", nargs="+", help="inside the wheel")
    flags = parser.parse_args()
    leave_out(flags.wheel, flags.folders)


def leave_out(wheel: Path, folders: Sequence[str]) -> None:
    """Rewrite a wheel without some of its folders, and without their lines in its RECORD."""
    prefixes = tuple(f"{folder.rstrip('/')}/" for folder in folders)
    slim = wheel.with_suffix(".slim")

    with (
        zipfile.ZipFile(wheel) as full,
        zipfile.ZipFile(slim, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as out,
    ):
        for entry in full.infolist():
            if entry.filename.startswith(prefixes):
                continue
            content = full.read(entry)
            if entry.filename.endswith(".dist-info/RECORD"):
                content = _without(content, prefixes)
            # The entry keeps its mode: Ray's servers are programs.
            out.writestr(entry, content, zipfile.ZIP_DEFLATED)

    slim.replace(wheel)


def _without(record: bytes, prefixes: tuple[str, ...]) -> bytes:
    """Return a RECORD without the lines of some folders."""
    lines = record.decode().splitlines(keepends=True)
    kept = [line for line in lines if not line.startswith(prefixes)]
    return "".join(kept).encode()


if __name__ == "__main__":
    main()
