"""What a notebook shows is what a run with the same settings trains: for each setting by itself."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from miles.data import prepare
from miles.data.config import DataConfig, EncodeConfig, RowFormat
from miles.data.files.manifest import build_manifest
from miles.data.notebook.dataset import Prepared
from miles.data.stream import stages
from miles.train.launch.arguments import parse
from tests.support.chatml import MARKED
from tests.support.launch import QWEN3


def turns(*contents: str, role: str = "user") -> list[dict[str, str]]:
    roles = itertools.cycle([role, "assistant"])
    return [{"role": name, "content": text} for name, text in zip(roles, contents, strict=False)]


ROWS: list[dict[str, Any]] = [
    {"messages": turns("What is <|im_end|> for?", "It ends a turn.", "And then?", "The next.")},
    {"messages": turns("Tell me all", 60 * "and the next, ")},
    {"messages": turns("2+2?", "4", "Thank you", "")},
    {"messages": turns("Whose?", "Ann's", role="Ann")},
    {"messages": [{**turn, "train": 0} for turn in turns("a", "b")] + turns("c", "d")},
    {"messages": turns("first", "one"), "chat": turns("second", "two")},
    {"messages": turns("call", "it"), "chat": turns("2", "3"), "fs": [{"name": "add"}]},
]


def last_turns(row: dict[str, Any]) -> list[Any]:
    """Return the last two turns of a row: a function that makes the rows."""
    turns: list[Any] = row["messages"][-2:]
    return turns


@dataclass(frozen=True)
class Case:
    """A setting that is no default, as a command and as a notebook give it."""

    flags: list[str]
    arguments: dict[str, Any]
    fields: tuple[str, ...] = field(default=())
    """those that it settles; none: the one of its name"""


CASES = {
    "chat_template": Case(
        ["--chat-template-path", "{template}"], {"chat_template_path": "{template}"}
    ),
    "template_kwargs": Case(
        ["--chat-template-path", "{template}", "--apply-chat-template-kwargs", '{"mark": "!"}'],
        {"chat_template_path": "{template}", "template_kwargs": {"mark": "!"}},
    ),
    "turns": Case(["--loss-mask-turns", "last"], {"turns": "last"}),
    "empty_think": Case(
        ["--chat-template-path", "{template}", "--empty-think", "train"],
        {"chat_template_path": "{template}", "empty_think": "train"},
    ),
    "empty_answer": Case(["--empty-answer", "train"], {"empty_answer": "train"}),
    "history": Case(["--history", "as_served"], {"history": "as_served"}),
    "special_text": Case(["--special-text", "escape"], {"special_text": "escape"}),
    "too_long": Case(
        ["--too-long", "truncate_end", "--max-sample-tokens", "40"],
        {"too_long": "truncate_end", "max_sample_tokens": 40},
    ),
    "max_sample_tokens": Case(["--max-sample-tokens", "60"], {"max_sample_tokens": 60}),
    "trust_remote_code": Case(["--trust-remote-code"], {"trust_remote_code": True}),
    "tokenizer_engine": Case(
        ["--tokenizer-engine", "tokenizers"], {"tokenizer_engine": "tokenizers"}
    ),
    "shape": Case(["--row-shape", "messages"], {"row_shape": "messages"}),
    "columns": Case(
        ["--column-names", '{"messages": "chat", "tools": "fs"}'],
        {"column_names": {"messages": "chat", "tools": "fs"}},
    ),
    "messages_key": Case(["--input-key", "chat"], {"messages_key": "chat"}),
    "tools_key": Case(["--tool-key", "fs"], {"tools_key": "fs"}),
    "roles": Case(["--role-names", '{"Ann": "user"}'], {"role_names": {"Ann": "user"}}),
    "transform": Case(["--transform", f"{__name__}:last_turns"], {"transform": last_turns}),
    "split": Case(["--split", "test"], {"split": "test"}),
    "max_bad_fraction": Case(["--max-bad-fraction", "0.5"], {"max_bad_fraction": 0.5}),
}
"""Each field of the settings of encoding and of rows, and what has another name for it."""
OF_OTHER_NAMES = {"messages_key", "tools_key", "split", "max_bad_fraction"}

Shown = dict[int, tuple[list[int], list[int]]]
"""row id -> ids and mask"""


def trained(config: DataConfig) -> Shown:
    """Return what a run trains; the mask of a micro-batch is shifted, as its labels are."""
    samples: Shown = {}
    for step in stages.local_steps(build_manifest(config.sources), config):
        for batch in step.micro_batches[0]:
            bounds = itertools.pairwise(batch.cu_seqlens.tolist())
            for row_id, (begin, end) in zip(batch.row_ids.tolist(), bounds, strict=True):
                mask = batch.loss_mask[begin : end - 1].astype(int).tolist()
                samples[row_id] = (batch.input_ids[begin:end].tolist(), [0, *mask])
    return samples


def shown(data: Prepared) -> Shown:
    """Return what a notebook shows of each usable row: as an item, and in a preview."""
    items: Shown = {}
    for row in data:
        if row.input_ids is not None and row.loss_mask is not None:
            items[row.row_id] = (row.input_ids.tolist(), row.loss_mask.tolist())

    previewed: Shown = {}
    for row in data.preview(rows=sorted(items)):
        assert row.encoded is not None
        previewed[row.row_id] = (row.encoded.input_ids.tolist(), row.encoded.loss_mask.tolist())
    assert previewed == items
    return items


@pytest.fixture(scope="module")
def places(
    tmp_path_factory: pytest.TempPathFactory, chatml_tokenizer_folder: Path
) -> dict[str, str]:
    """One folder for all cases, so that what is certified for one serves the next."""
    folder = tmp_path_factory.mktemp("places")
    model = folder / "model"
    shutil.copytree(chatml_tokenizer_folder, model)
    (model / "config.json").write_text(json.dumps(QWEN3))
    (folder / "own.jinja").write_text(MARKED)
    (folder / "rows").mkdir()
    lines = [json.dumps(row) + "\n" for row in ROWS]
    (folder / "rows/train.jsonl").write_text("".join(lines))
    (folder / "rows/test.jsonl").write_text("".join(reversed(lines)))
    return {
        "model": str(model),
        "template": str(folder / "own.jinja"),
        "rows": str(folder / "rows"),
    }


def filled(value: Any, places: dict[str, str]) -> Any:
    return places["template"] if value == "{template}" else value


@pytest.mark.parametrize("name", CASES)
def test_a_notebook_shows_what_a_run_trains(name: str, places: dict[str, str]) -> None:
    case = CASES[name]
    line = ["--hf-checkpoint", places["model"], "--prompt-data", "chat", places["rows"]]
    line += ["--save", "x", *(filled(word, places) for word in case.flags)]
    config = parse(line).data

    arguments = {key: filled(value, places) for key, value in case.arguments.items()}
    data = prepare("chat", source=places["rows"], tokenizer=places["model"], **arguments)
    samples = shown(data)
    assert samples == trained(config)
    assert len(samples) > 0
    assert data.manifest == build_manifest(config.sources)

    if name in ("chat_template", "turns", "empty_answer", "special_text", "roles", "split"):
        plain = prepare("chat", source=places["rows"], tokenizer=places["model"])
        assert shown(plain) != samples, "the setting changes what is trained"


def test_no_setting_is_left_out() -> None:
    fields = {
        field.name for record in (EncodeConfig, RowFormat) for field in dataclasses.fields(record)
    }
    assert set(CASES) - OF_OTHER_NAMES == fields - {"tokenizer"}
