"""The commands as a user types them, in processes of their own."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from miles.data.tokens import engines
from tests.support.pages import block, typed
from tests.support.processes import PROJECT, miles, miles_here

ODD_NAME = "my run [v2]:1 #50%::'é\" {x} $HOME"
"""A pattern, a tag of rich's markup, parts of a URL and of a shell's line; it is a name here."""


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("demo") / ODD_NAME
    return folder, miles("demo", "--output", folder)


def test_the_two_commands_of_the_front_page_are_these() -> None:
    """`make demo` is the run of the tests below; `make test` is what runs them."""
    demo_words, test_words = typed(block("README.md", "make demo"))
    assert demo_words == ["make", "demo"]

    def recipe(words: list[str]) -> str:
        dry = ["make", "--dry-run", "--always-make", *words[1:]]
        return subprocess.run(dry, cwd=PROJECT, capture_output=True, text=True, check=True).stdout

    assert recipe(demo_words).splitlines()[-1] == ".venv/bin/miles demo"
    parts = recipe(test_words)
    assert "pytest --quick --part 1/2" in parts
    assert "pytest --heavy --part 2/2" in parts


@pytest.mark.slow
def test_the_demo_keeps_its_promises(demo: tuple[Path, str]) -> None:
    folder, printed = demo
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics] == list(range(len(metrics)))
    assert metrics[-1]["sft/loss"] < 0.6 * metrics[0]["sft/loss"]

    wanted = {
        "sft/loss",
        "sft/per_token_loss",
        "sft/tokens_seen",
        "sft/epoch",
        "sft/loss/chat",
        "sft/loss/code",
        "sft/grad_norm",
        "sft/lr",
        "data/prefetch_queue_depth",
        "data/wait_seconds",
        "data/pack_fill",
        "data/dp_imbalance",
        "perf/step_seconds",
        "perf/tokens_per_second",
        "perf/tflops_per_gpu",
    }
    assert wanted <= metrics[0].keys()
    assert metrics[-1]["sft/epoch"] == 8

    for line in metrics:
        assert (line["data/prefetch_queue_depth"] == 0) == (line["data/wait_seconds"] > 0), (
            "the one says why the other"
        )

    assert f"{folder}/report.html\n" in printed, "as it is, on one line"
    assert "After the first step" in printed
    assert (folder / "checkpoints/latest_checkpointed_iteration.txt").read_text() == str(
        len(metrics)
    )
    assert len(list((folder / "checkpoints").glob("iter_*"))) == 2, "one midway, one at the end"
    assert "largest difference" in printed
    assert "answered:" in printed

    for reason in ("no_messages", "unknown_role", "malformed_json", "bad_message"):
        assert reason in printed
    ledger = json.loads((folder / "ledger.json").read_text())
    assert {source: entry["counts"] for source, entry in ledger.items()} == {
        "chat": {"read": 3280, "trained": 3280},
        "code": {"read": 1904, "trained": 1904},
    }
    assert {entry["row_shape"] for entry in ledger.values()} == {"messages"}

    page = (folder / "report.html").read_text()
    assert "data:image/png;base64," in page
    assert "unknown_role" in page
    assert 'src="http' not in page
    assert 'href="http' not in page
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_inspect_shows_what_was_trained(demo: tuple[Path, str]) -> None:
    printed = miles_here("inspect", demo[0], "--samples", "2")
    assert "<|im_start|>assistant" in printed
    assert "trained" in printed


def test_certify_certifies_or_refuses_by_name(
    chatml_tokenizer_folder: Path, tmp_path: Path
) -> None:
    path = tmp_path / "certificate.json"
    printed = miles("certify", chatml_tokenizer_folder, "--json", path)
    assert "is certified" in printed
    assert "trained exactly once a turn" in printed
    engine = "fastokens" if engines.is_installed() else "tiktoken"
    assert f"by {engine}" in printed
    certificate = json.loads(path.read_text())
    printed = miles_here("certify", chatml_tokenizer_folder, "--json", "-")
    assert json.loads(printed[printed.index("{") :]) == certificate, "behind what takes long"
    assert certificate["terminator"] == "<|im_end|>"
    assert certificate["tool_grouping"] == "grouped"

    def refused(template: Path, status: int) -> str:
        words = ("certify", chatml_tokenizer_folder, "--chat-template-path", template)
        return miles_here(*words, expect=status)

    (tmp_path / "own.jinja").write_text(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% endfor %}"
    )
    message = f"{chatml_tokenizer_folder}: the chat template that was given"
    assert message in refused(tmp_path / "own.jinja", 3)
    assert "none: no such file" in refused(tmp_path / "none", 2)


def test_mistakes_get_one_clear_line(tmp_path: Path) -> None:
    """The first runs in a process of its own: its exit status is of its kind, and there is no traceback."""
    save = tmp_path / "out"
    words: tuple[str | Path, ...]

    words = ("convert", "hf-to-megatron", "--hf-checkpoint", tmp_path, "--save", save)
    assert "config.json: no such file" in miles(*words, expect=3)

    assert "the folder is empty" in miles_here("inspect", tmp_path, expect=3)

    words = ("train", "--loss-type", "dpo", "--prompt-data", "x")
    words = (*words, "--save", "y", "--hf-checkpoint", "z")
    assert "this is SFT only" in miles_here(*words, expect=2)

    rows = tmp_path / "rows.jsonl"
    rows.write_text("{}\n")
    words = ("prepare", "rows", "--source", rows, "--tokenizer", tmp_path, "--output", save)
    assert "tokenizer" in miles_here(*words, expect=3)
