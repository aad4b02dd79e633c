"""`prepare` on Ray: what it writes reads back to the same tokens, and nothing else is left."""

from __future__ import annotations

import functools
import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from miles.cli import main
from miles.data.config import RowFormat
from miles.data.files.manifest import Manifest
from miles.data.notebook import dataset as dataset_module
from miles.data.notebook import parts
from miles.data.notebook.dataset import Prepared
from miles.data.notebook.prepare import prepare
from miles.data.rows import message_parts
from miles.data.rows.message_parts import PartLimits
from miles.errors import ConfigError, SourceError
from tests.support.fault_table import observed

CALL = {"name": "add", "arguments": {"b": 2, "a": "é"}}


def conversation(number: int, **last: Any) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": f"What is {number} and {number}?"},
            {"role": "assistant", "content": f"{2 * number}"},
            {"role": "user", "content": "And then?"},
            {"role": "assistant", "content": "fox", **last},
        ]
    }


def write_lines(path: Path, lines: list[dict[str, Any]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def dataset(
    folder: Path, tokenizer: Path, lines: list[dict[str, Any]], name: str = "rows"
) -> Prepared:
    source = write_lines(folder / f"{name}.jsonl", lines)
    return prepare(name, source=source, tokenizer=str(tokenizer), max_bad_fraction=0.5)


def tokens(data: Prepared) -> list[tuple[list[int], list[float]]]:
    found = []
    for step in data.steps(batch_size=64, max_tokens_per_gpu=8192, shuffle=False):
        for batch in step.micro_batches[0]:
            found.append((batch.input_ids.tolist(), batch.loss_mask.tolist()))
    return found


def test_written_rows_read_back_the_same(chatml_tokenizer_folder: Path, tmp_path: Path) -> None:
    call = {"id": "c1", "type": "function", "function": CALL}
    lines = [
        conversation(1),
        conversation(2, weight=0),
        conversation(3, reasoning_content="think hard"),
        conversation(4, tool_calls=[call]),
        conversation(5, tool_calls=[{"function": {"name": "add", "arguments": '{"a":  1}'}}])
        | {
            "tools": [
                {"type": "function", "function": {"name": "add", "parameters": {"b": {}, "a": 1}}}
            ]
        },
        {
            "conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}],
            "system_prompt": "Be.",
        },
        {"messages": []},
    ]
    data = dataset(tmp_path, chatml_tokenizer_folder, lines)
    data.write(str(tmp_path / "out"))

    again = prepare("again", source=str(tmp_path / "out"), tokenizer=str(chatml_tokenizer_folder))
    assert again.num_rows == len(lines) - 1
    assert tokens(again) == tokens(data)

    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert (summary["rows"], summary["written"]) == (7, 6)
    assert summary["ledger"]["rows"]["counts"] == {"read": 7, "trained": 6, "no_messages": 1}
    (line,) = (tmp_path / "out/rejects.jsonl").read_text().splitlines()
    reject = json.loads(line)
    assert (reject["row"], reject["reason"]) == (6, "no_messages")


def test_ctrl_c_says_what_is_left(
    chatml_tokenizer_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = write_lines(tmp_path / "rows.jsonl", [conversation(1)])
    words = ["prepare", "rows", "--source", source, "--tokenizer", str(chatml_tokenizer_folder)]
    with monkeypatch.context() as patch:
        interrupt = lambda *_: os.kill(os.getpid(), signal.SIGINT)  # noqa: E731
        patch.setattr(parts.PartFiles, "add", interrupt)
        assert main([*words, "--output", str(tmp_path / "out")]) == 130
    printed = capsys.readouterr().err
    observed("Ctrl-C during `miles prepare`", printed, "no manifest", "what it had written")
    assert not (tmp_path / "out/manifest.json").exists()
    assert main([*words, "--output", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out/manifest.json").exists()


SHAPES: dict[str, tuple[dict[str, Any], str]] = {
    "messages": ({"chat": conversation(1)["messages"]}, "messages in chat"),
    "alpaca": (
        {"instruction": "What is 2", "input": "and 2?", "output": "4"},
        "alpaca in instruction, output",
    ),
    "prompt_completion": (
        {"ask": "2+2?", "response": "4"},
        "prompt and completion in ask, response",
    ),
    "text": ({"body": "The quick brown fox."}, "text in body"),
}
NAMED = {
    "messages": {"messages": "chat"},
    "prompt_completion": {"prompt": "ask"},
    "text": {"text": "body"},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_the_card_names_each_shape(
    chatml_tokenizer_folder: Path, tmp_path: Path, shape: str
) -> None:
    row, description = SHAPES[shape]
    source = write_lines(tmp_path / "rows.jsonl", [row, row])
    tokenizer = str(chatml_tokenizer_folder)
    data = prepare("rows", source=source, tokenizer=tokenizer, column_names=NAMED.get(shape))
    assert f"rows ({description})" in data.to_text()
    assert f"rows ({description})" in data._repr_html_()

    data.write(str(tmp_path / "out"))
    again = prepare("again", source=str(tmp_path / "out"), tokenizer=tokenizer)
    assert tokens(again) == tokens(data)
    assert len(tokens(again)) > 0
    kind = "text" if shape == "text" else "messages"
    assert f"again ({kind} in {kind})" in again.to_text()


@pytest.mark.slow
def test_every_real_row_is_accounted_for(assets: Path, tmp_path: Path) -> None:
    data = prepare(
        "openhermes",
        source=str(assets / "data/openhermes_sample.parquet"),
        tokenizer=str(assets / "qwen3-tokenizer"),
        max_sample_tokens=4096,
    )
    data.write(str(tmp_path / "out"))

    summary = json.loads((tmp_path / "out/summary.json").read_text())
    entry = summary["ledger"]["openhermes"]
    counts = entry["counts"]
    assert (entry["row_shape"], entry["columns"]) == ("messages", {"messages": "conversations"})
    assert counts["read"] == data.num_rows == 16_418
    dropped = [count for key, count in counts.items() if key not in ("read", "trained")]
    assert counts["read"] == counts["trained"] + sum(dropped)

    rejects = (tmp_path / "out/rejects.jsonl").read_text().splitlines()
    assert len(rejects) == counts["read"] - counts["trained"] == counts["too_long"] == 1
    assert summary["written"] == counts["trained"]
    assert 2_000_000 < summary["tokens"] < 2_200_000


def test_the_format_of_rows_can_be_given(chatml_tokenizer_folder: Path, tmp_path: Path) -> None:
    turns = [{"role": "Ann", "content": "2+2?"}, {"role": "Bot", "content": "4"}]
    source = write_lines(
        tmp_path / "rows.jsonl", [{"chat": turns, "text": "a", "fs": [{"name": "f"}]}]
    )
    tokenizer = str(chatml_tokenizer_folder)
    roles = {"Ann": "user", "Bot": "assistant"}
    named = {"messages": "chat", "tools": "fs"}
    for dataset_name in ("rows", "openhermes"):
        ask = functools.partial(
            prepare, dataset_name, source=source, tokenizer=tokenizer, role_names=roles
        )
        short = ask(messages_key="chat", tools_key="fs")
        long = ask(row_shape="messages", column_names=named)
        assert short.manifest == long.manifest
        assert short.manifest.sources[0].format == RowFormat("messages", named, roles)
        assert short.manifest.sources[0].columns == named

    with pytest.raises(
        ConfigError, match="messages_key=\"chat\": column_names= says messages is 'x'"
    ):
        prepare(
            "rows",
            source=source,
            tokenizer=tokenizer,
            messages_key="chat",
            column_names={"messages": "x"},
        )
    with pytest.raises(
        SourceError, match=r"source 'rows': .*rows\.jsonl: which columns hold its rows is not clear"
    ):
        prepare("rows", source=source, tokenizer=tokenizer, messages_key="nowhere")


def test_the_command_takes_the_same_names(
    chatml_tokenizer_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    turns = [{"role": "Ann", "content": "2+2?"}, {"role": "Bot", "content": "4"}]
    source = write_lines(
        tmp_path / "rows.jsonl", [{"chat": turns, "text": "a", "fs": [{"name": "f"}]}]
    )
    line = ["prepare", "rows", "--source", source, "--tokenizer", str(chatml_tokenizer_folder)]
    line += ["--output", str(tmp_path / "out")]
    line += ["--role-names", '{"Ann": "user", "Bot": "assistant"}']

    assert main([*line, "--row-shape", "messages", "--input-key", "chat", "--tool-key", "fs"]) == 0
    (source_entry,) = Manifest.from_json((tmp_path / "out/manifest.json").read_text()).sources
    assert source_entry.columns == {"messages": "chat", "tools": "fs"}

    assert main([*line, "--overwrite", "--column-names", '{"text": "text"}']) == 0
    (source_entry,) = Manifest.from_json((tmp_path / "out/manifest.json").read_text()).sources
    assert source_entry.format.shape == "text"

    for value, message in (
        ("{", "--column-names: not JSON"),
        ("[]", "--column-names: a JSON object was expected"),
    ):
        assert main([*line, "--column-names", value]) == 2
        assert message in capsys.readouterr().err


def test_an_earlier_write_leaves_nothing(
    chatml_tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(message_parts, "LIMITS", PartLimits(group_rows=10, part_rows=10))
    out = str(tmp_path / "out")
    dataset(tmp_path, chatml_tokenizer_folder, [conversation(n) for n in range(25)], "long").write(
        out
    )
    assert len(list((tmp_path / "out").glob("part-*.parquet"))) == 3
    short = dataset(
        tmp_path, chatml_tokenizer_folder, [conversation(n) for n in range(15)], "short"
    )
    with pytest.raises(ConfigError, match="holds prepared rows of other files"):
        short.write(out)
    assert len(list((tmp_path / "out").glob("part-*.parquet"))) == 3
    short.write(out, overwrite=True)
    short.write(out)  # the same rows
    assert len(list((tmp_path / "out").glob("part-*.parquet"))) == 2
    assert prepare("again", source=out, tokenizer=str(chatml_tokenizer_folder)).num_rows == 15


def test_a_sample_no_batch_can_hold_is_refused(
    chatml_tokenizer_folder: Path, tmp_path: Path
) -> None:
    data = dataset(tmp_path, chatml_tokenizer_folder, [conversation(1)])
    with pytest.raises(ConfigError, match="max_sample_tokens=8192"):
        data.steps(batch_size=1, max_tokens_per_gpu=100)


def test_no_step_is_left_at_the_end(chatml_tokenizer_folder: Path, tmp_path: Path) -> None:
    data = dataset(tmp_path, chatml_tokenizer_folder, [conversation(n) for n in range(4)])
    assert len(list(data.steps(batch_size=2, max_tokens_per_gpu=8192, start_row=2))) == 1
    assert list(data.steps(batch_size=2, max_tokens_per_gpu=8192, start_row=4)) == []


def test_a_card_says_it_is_a_sample(
    chatml_tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dataset_module, "SAMPLE_ROWS", 3)
    data = dataset(tmp_path, chatml_tokenizer_folder, [conversation(n) for n in range(9)])
    assert "from a sample of 3 rows" in data.to_text()
    data.write(str(tmp_path / "out"))
    assert "every row read" in data.to_text()
    assert data.summary().num_rows == 9
    assert np.all(data.summary().lengths > 0)


def test_steps_are_the_same_through_ray(
    chatml_tokenizer_folder: Path, tmp_path: Path, ray_cluster: None
) -> None:
    lines: list[dict[str, Any]] = [conversation(n) for n in range(30)]
    lines[7] = {"messages": []}
    data = dataset(tmp_path, chatml_tokenizer_folder, lines)
    here = data.steps(batch_size=4, max_tokens_per_gpu=8192, dp_size=2)
    through_ray = data.steps(batch_size=4, max_tokens_per_gpu=8192, dp_size=2, loader_cpus=1)
    assert (here.is_on_ray, through_ray.is_on_ray) == (False, True)
    assert len(here) == len(through_ray) == 8
    for step, other in zip(here, through_ray, strict=True):
        assert step.fingerprint == other.fingerprint
        assert step.report.rows == other.report.rows
        assert step.report.packing == other.report.packing
        for batch, other_batch in zip(
            sum(step.micro_batches, ()), sum(other.micro_batches, ()), strict=True
        ):
            assert batch.input_ids.tolist() == other_batch.input_ids.tolist()
            assert batch.loss_mask.tolist() == other_batch.loss_mask.tolist()
            assert batch.row_ids.tolist() == other_batch.row_ids.tolist()
