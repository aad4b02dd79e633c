"""Names and texts in the report, the card and the previews; files in shared folders; YAML."""

from __future__ import annotations

import json
import os
import re
import stat
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from miles.common import run_folder, storage
from miles.data.config import RowFormat, SourceConfig
from miles.data.files.manifest import build_manifest
from miles.data.notebook import preview
from miles.data.notebook.card import Card, Summary
from miles.errors import ConfigError
from miles.report.report import write_report
from miles.train.launch.arguments import parse
from tests.support.bad_rows import GOOD
from tests.support.launch import write_model
from tests.support.metrics_lines import PLAIN_RUN, write_lines

SCRIPT = "<img src=x onerror=alert(1)>\"'><script>alert(2)</script>"


def require_harmless(page: str) -> None:
    assert "<img src=x" not in page
    assert "<script" not in page
    assert "&lt;script" in page, "it is shown as what it is"


def test_names_in_the_report_are_text(tmp_path: Path) -> None:
    """Of sources, files, reasons, answers, starts and skipped steps."""
    counts = {"read": 3, "trained": 2, SCRIPT: 1}
    entry = {"row_shape": SCRIPT, "rows": 3, "epochs": 1.0, "counts": counts}
    (tmp_path / run_folder.LEDGER).write_text(json.dumps({SCRIPT: entry}))
    place = {"source": SCRIPT, "file": f"/rows/{SCRIPT}", "row": 1}
    reject = {**place, "reason": SCRIPT, "detail": SCRIPT}
    write_lines(tmp_path / run_folder.REJECTS, [reject])
    answer = {**place, "step": 1, "prompt": SCRIPT, "answer": SCRIPT, "expected": SCRIPT}
    write_lines(tmp_path / run_folder.EVAL_SAMPLES, [answer | {"ended": True}])
    start = {"time": SCRIPT, "world_size": 2, "reason": SCRIPT, "first_step": 0}
    starts = [start | {"start": 1}, {"end": 1, "how": SCRIPT}, start | {"start": 2}]
    write_lines(tmp_path / run_folder.ATTEMPTS, starts)
    skipped = {"step": 2, "reason": SCRIPT, "rows": [place]}
    write_lines(tmp_path / run_folder.SKIPPED_STEPS, [skipped])

    write_lines(tmp_path / run_folder.METRICS, PLAIN_RUN)
    page = Path(write_report(str(tmp_path))[0]).read_text()
    scripts = re.findall(r"<script([^>]*)>", page)
    assert scripts == ["", ' type="application/json" id="run-data"', "", ""], "ours alone"
    for content in re.findall(r"<script[^>]*>.*?</script>", page, re.DOTALL):
        assert "<img" not in content
        page = page.replace(content, "")
    require_harmless(page)
    assert page.count("&lt;script") >= 12


def test_names_and_columns_in_the_card_are_text(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(GOOD.replace(b'"messages"', json.dumps(SCRIPT).encode()))
    form = RowFormat("messages", {"messages": SCRIPT})
    manifest = build_manifest([SourceConfig(SCRIPT, (str(file),), form)])
    summary = Summary(1, np.array([5]), 2, {SCRIPT: 1})
    require_harmless(Card(manifest, summary, is_sample=False).to_html())


def test_text_in_a_preview_is_text(chatml_tokenizer: Any) -> None:
    ids = chatml_tokenizer.encode(SCRIPT + "\x1b[2J")
    page = preview.to_html((ids, [1] * len(ids)), chatml_tokenizer)
    assert "<script" not in page
    assert "<img" not in page
    assert "\x1b" not in page + preview.to_text((ids, [0] * len(ids)), chatml_tokenizer).plain


def test_temporary_folders_are_the_users_alone(tmp_path: Path) -> None:
    """Whatever the umask is; and a link that someone has put in the place of a file is replaced."""
    before = os.umask(0)
    try:
        with tempfile.TemporaryDirectory(prefix="miles-") as folder:
            assert stat.S_IMODE(Path(folder).stat().st_mode) == 0o700
        victim = tmp_path / "victim"
        victim.write_text("kept")
        (tmp_path / "file.json").symlink_to(victim)
        storage.write_text(str(tmp_path / "file.json"), "new")
    finally:
        os.umask(before)
    assert victim.read_text() == "kept"
    assert not (tmp_path / "file.json").is_symlink()


def test_no_file_of_ours_has_a_name_that_can_be_guessed() -> None:
    """`tempfile` makes them: no path in /tmp stands in the code."""
    for file in sorted((Path(__file__).parents[2] / "miles").rglob("*.py")):
        text = file.read_text()
        # The folder that Ray itself makes, with a random name in it for each session.
        assert '"/tmp' not in text.replace('"/tmp/ray"', ""), file
        assert "mktemp(" not in text, file


LAUGHS = "\n".join(
    ["a0: &a0 [x, x]", *[f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 60)]]
)


@pytest.mark.parametrize(
    "text",
    [
        "lr: !!python/object/apply:os.system ['touch RAN']",
        "lr: !!python/name:os.system",
        LAUGHS,
        LAUGHS.replace("a59:", "lr:"),
        LAUGHS.replace("a59:", "prompt_data:").replace("a0: ", "wandb_key: "),
        "lr: " + "9" * 1_000_000,
        "lr: " + "{a: " * 5_000,
    ],
)
def test_yaml_builds_nothing_large_and_runs_nothing(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path)
    (tmp_path / "run.yaml").write_text(text)
    words = ["--hf-checkpoint", str(tmp_path), "--prompt-data", "x.jsonl", "--save", "s"]
    with pytest.raises(ConfigError) as caught:
        parse([*words, "--config", "run.yaml"])
    assert len(str(caught.value)) < 1_000 or "9999" in str(caught.value)
    assert not (tmp_path / "RAN").exists()
