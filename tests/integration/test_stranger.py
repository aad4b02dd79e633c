"""A stranger's path, by the commands of the pages themselves: own rows, a notebook, chat.

    docs/first-run.md   prepare -> tiny-model -> train -> convert -> inspect -> report, then Python
    README.md           the notebook, and the lines for real GPUs with --dry-run
    docs/chat.md        talk with what was trained
    docs/lora.md        read an adapter by peft

The first two commands, `make demo` and `make test`, are those of test_commands.py.
"""

from __future__ import annotations

import io
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.support.pages import block, run_python, typed
from tests.support.processes import miles_here
from tests.support.row_files import random_conversations
from tests.support.runs import lines
from tests.support.streams import demo_tokenizer

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder that the stranger works in, with rows and a tokenizer under the pages' names."""
    folder = tmp_path_factory.mktemp("stranger")
    (folder / "assets/data").mkdir(parents=True)
    (folder / "rows").mkdir()
    shutil.copytree(demo_tokenizer(), folder / "assets/qwen3-tokenizer")

    usable = [row for row in random_conversations(300) if row["messages"]]
    table = pa.Table.from_pylist(usable)
    pq.write_table(table, folder / "assets/data/openhermes_sample.parquet")
    pq.write_table(table, folder / "rows/part-0.parquet")
    (folder / "questions.jsonl").write_text('{"prompt": "What is 2+2?"}\n')

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder


def run_all(commands: list[list[str]], *more: str) -> str:
    """Run commands of Miles one after another; return what they printed.

    Args:
        more: words behind each.
    """
    printed = ""
    for words in commands:
        assert words[0] == "miles", words
        printed += miles_here(*words[1:], *more)
    return printed


def test_own_rows_are_trained_by_the_lines_of_the_page(place: Path) -> None:
    page = block("docs/first-run.md", "ASSETS=").with_stand_ins({"../shared/assets": "assets"})
    printed = run_all(typed(page))
    assert "20 steps, loss" in printed
    assert "runs/real/run/report.html" in printed
    assert len(lines(place / "runs/real/run")) == 20
    assert (place / "runs/real/export/model.safetensors").exists()


def test_the_same_is_trained_by_the_python_of_the_page(place: Path) -> None:
    run, report = run_python(block("docs/first-run.md", "import miles"), {})
    assert run.is_finished
    assert Path(report[0]).exists()

    def fingerprints(folder: str) -> list[str]:
        return [line["data/step_fingerprint"] for line in lines(place / folder)]

    assert fingerprints("runs/real/notebook") == fingerprints("runs/real/run"), "the same rows"


def test_the_notebook_of_the_front_page_runs(place: Path, bucket: str) -> None:
    shutil.copytree(place / "runs/real/hf", place / "Qwen3-4B-Base")
    page = block("README.md", "import miles").with_stand_ins({"s3://bucket": bucket})
    ds, preview, nothing, run = run_python(page, {})
    assert "rows" in ds._repr_html_()
    assert "</" in preview._repr_html_()
    assert nothing is None, "written"
    assert run.is_finished
    assert (place / "run/metrics.jsonl").exists()


def test_the_lines_for_gpus_hold_with_small_stand_ins(place: Path) -> None:
    """The rows are few, and not the hub's; the run ends with its estimate, as there are no GPUs."""
    page = block("README.md", "miles prepare openhermes")
    page = page.with_stand_ins({"--save run ": "--save run-on-gpus ", "-iters 100": "-iters 2"})
    prepare, train, report = typed(page)
    printed = run_all([prepare], "--source", "rows/part-0.parquet")
    assert "openhermes-messages" in printed
    assert "fits on GPUs of" in run_all([train], "--dry-run")
    assert not (place / "run-on-gpus").exists()
    assert "run/report.html" in run_all([report])


def test_what_was_trained_answers(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(place / "runs/real/export", place / "Qwen3-4B-OpenHermes")
    save_adapter(place)
    commands = typed(block("docs/chat.md", "miles chat run"))
    assert [words[:2] for words in commands] == [["miles", "chat"]] * 3
    for words in commands:
        monkeypatch.setattr(sys, "stdin", io.StringIO("What is 2+2?\n"))
        assert run_all([words], "--max-new-tokens", "4").strip()

    generate = typed(block("docs/chat.md", "miles generate run"))
    run_all(generate, "--max-new-tokens", "4")
    (answer,) = lines(place, "answers.jsonl")
    assert answer["answer_tokens"] <= 4


def save_adapter(place: Path) -> None:
    """Write an adapter of the small model by peft."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(place / "Qwen3-4B-Base")
    adapter = get_peft_model(
        base, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    )
    adapter.save_pretrained(place / "adapter")


def test_peft_reads_an_adapter_by_the_lines_of_the_page(place: Path) -> None:
    page = block("docs/lora.md", "from peft import")
    names: dict[str, object] = {}
    run_python(page.with_stand_ins({"MODEL": "Qwen3-4B-Base", "ADAPTER": "adapter"}), names)
    assert "lora" in str(names["model"]).lower()
