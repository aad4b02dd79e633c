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
seen = [data._repr_html_(), data.preview(1)._repr_html_(), data[0]._repr_html_(), data.to_text()]
steps = data.steps(batch_size=1, max_tokens_per_gpu=8192)
seen += [data.ledger._repr_html_(), list(steps), steps._repr_html_()]
again = miles.data.prepare("rows", source=folder, tokenizer=tokenizer)
seen += [again.to_text(), repr(again.ledger)]
assert all(map(len, seen)), seen
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
