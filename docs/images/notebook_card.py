"""notebook-card.png: what a notebook shows of the demo's rows. Needs Chromium.

python docs/images/notebook_card.py
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from miles.data import prepare
from miles.demo import rows
from miles.demo.tokenizer import build_tokenizer

PICTURE = Path(__file__).parent / "notebook-card.png"
CODE = """\
import miles.data

data = miles.data.prepare("chat", source="chat.jsonl", tokenizer="tokenizer")
data
data.preview(1)"""
PAGE = """\
<!doctype html>
<meta charset="utf-8">
<body style="margin:24px;background:#fff;color:#1f2328;width:760px">
<pre style="font:13px/1.6 ui-monospace,Menlo,Consolas,monospace;background:#f6f8fa;
border-radius:6px;padding:12px 16px;margin:0 0 16px">{code}</pre>{card}<div style="height:12px"></div>{preview}"""


def main() -> None:
    """Draw the picture."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if not browser:
        sys.exit("needs chromium or google-chrome")

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = rows.copy_rows(folder / "rows")
        build_tokenizer(rows.texts(), folder / "tokenizer")
        data = prepare(
            "chat",
            source=str(files["chat"]),
            tokenizer=str(folder / "tokenizer"),
            max_sample_tokens=1024,
        )
        page = PAGE.format(
            code=CODE, card=data._repr_html_(), preview=data.preview(1)._repr_html_()
        )
        (folder / "page.html").write_text(page)
        command = [browser, "--headless", "--no-sandbox", "--hide-scrollbars"]
        command += ["--window-size=810,900", f"--screenshot={PICTURE}"]
        command += [f"file://{folder}/page.html"]
        subprocess.run(command, check=True, capture_output=True)  # noqa: S603
    print(PICTURE)


if __name__ == "__main__":
    main()
