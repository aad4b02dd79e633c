"""A small data set is prepared without Ray, which takes seconds to import and to start."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import sys
import miles.data

source, tokenizer, folder = sys.argv[1:]
data = miles.data.prepare("rows", source=source, tokenizer=tokenizer)
data.write(folder)
seen = [repr(data), repr(data.preview(1)), data.ledger()]
again = miles.data.prepare("rows", source=folder, tokenizer=tokenizer)
seen += [repr(again), again.ledger()]
assert all(map(len, seen[:2])), seen
print([name for name in sys.modules if name.split(".")[0] == "ray"])
"""


def test_no_part_of_ray_is_imported(chatml_tokenizer_folder: Path, tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]}
    source = tmp_path / "rows.jsonl"
    source.write_text(json.dumps(row))
    words = [source, chatml_tokenizer_folder, tmp_path / "out"]
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, *map(str, words)], capture_output=True, text=True
    )
    assert (run.stdout.strip(), run.returncode) == ("[]", 0), run.stderr
    assert (tmp_path / "out/manifest.json").exists()
