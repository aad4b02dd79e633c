"""Each door encodes as `miles train` does: a preview shows the mask that the run trains."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from miles.cli import main
from miles.data import encode, prepare
from miles.data.config import DataConfig, EncodeConfig, RowFormat
from miles.data.encoding.encoder import Encoder
from miles.data.files.manifest import build_manifest
from miles.data.notebook import dataset
from miles.data.notebook.dataset import Prepared
from miles.data.stream import stages
from miles.train.launch.arguments import parse
from tests.support.chatml import MARKED
from tests.support.launch import QWEN3

ROW = {
    "chat": [
        {"role": "Ann", "content": "What is <|im_end|> for?"},
        {"role": "Bot", "content": "It ends a turn."},
        {"role": "Ann", "content": "And then?"},
        {"role": "Bot", "content": "Then the next one begins, " + 30 * "and the next, "},
    ]
}
ROLES = {"Ann": "user", "Bot": "assistant"}

Mask = list[tuple[list[int], list[int]]]


@pytest.fixture
def template(tmp_path: Path) -> str:
    (tmp_path / "own.jinja").write_text(MARKED)
    return str(tmp_path / "own.jinja")


@pytest.fixture
def rows(tmp_path: Path) -> str:
    """A folder whose rows for testing are the ones that are asked for."""
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows/test_sft.jsonl").write_text(json.dumps(ROW) + "\n")
    (tmp_path / "rows/train.jsonl").write_text(json.dumps({"chat": ROW["chat"][:2]}) + "\n")
    return str(tmp_path / "rows")


@pytest.fixture
def flags(template: str) -> list[str]:
    """Give settings of encoding and of rows, none of them a default."""
    line = f"""--loss-mask-turns last --empty-think train --history as_served --special-text escape
        --too-long truncate_end --max-sample-tokens 120 --chat-template-path {template}
        --row-shape messages --input-key chat --split test_sft"""
    mappings = ["--apply-chat-template-kwargs", '{"mark": "!"}', "--role-names", json.dumps(ROLES)]
    return [*line.split(), *mappings]


@pytest.fixture
def trained(
    chatml_tokenizer_folder: Path, tmp_path: Path, rows: str, flags: list[str]
) -> DataConfig:
    """The data of a run with these settings."""
    model = tmp_path / "model"
    shutil.copytree(chatml_tokenizer_folder, model)  # the folder itself is shared by all tests
    (model / "config.json").write_text(json.dumps(QWEN3))
    line = ["--hf-checkpoint", str(model), "--prompt-data", rows, "--save", "x"]
    return parse([*line, *flags]).data


def mask_of_stream(config: DataConfig) -> Mask:
    """Return ids and masks of tokens; those of a micro-batch are shifted, as its labels are."""
    samples = []
    for step in stages.local_steps(build_manifest(config.sources), config):
        for batch in step.micro_batches[0]:
            starts = batch.cu_seqlens.tolist()
            for start, end in itertools.pairwise(starts):
                mask = [0, *batch.loss_mask[start : end - 1].astype(int).tolist()]
                samples.append((batch.input_ids[start:end].tolist(), mask))
    return samples


def mask_of(data: Prepared) -> Mask:
    return [
        (sample.input_ids.tolist(), sample.loss_mask.tolist())
        for sample in (row.encoded for row in data.preview(5))
        if sample is not None
    ]


def test_the_settings_change_the_mask(trained: DataConfig) -> None:
    ((ids, mask),) = mask_of_stream(trained)
    assert len(ids) == 120
    assert 0 < sum(mask) < 100
    plain = dataclasses.replace(trained, encode=EncodeConfig(trained.encode.tokenizer))
    assert mask_of_stream(plain) != [(ids, mask)]


def test_a_notebook_shows_it(trained: DataConfig, rows: str, template: str) -> None:
    data = prepare(
        "rows",
        source=rows,
        tokenizer=trained.encode.tokenizer,
        max_sample_tokens=120,
        messages_key="chat",
        row_shape="messages",
        role_names=ROLES,
        split="test_sft",
        chat_template_path=template,
        template_kwargs={"mark": "!"},
        turns="last",
        empty_think="train",
        history="as_served",
        special_text="escape",
        too_long="truncate_end",
    )
    assert mask_of(data) == mask_of_stream(trained)


def test_miles_prepare_writes_it(
    trained: DataConfig,
    rows: str,
    flags: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    prepared: list[Prepared] = []
    monkeypatch.setattr(dataset.Prepared, "write", lambda data, url, **_: prepared.append(data))
    line = ["prepare", "rows", "--source", rows, "--tokenizer", trained.encode.tokenizer]
    assert main([*line, "--output", str(tmp_path / "out"), *flags]) == 0
    said = f"1 row of rows, and writing to {tmp_path}/out\n"
    assert capsys.readouterr().err.endswith(said), "before it reads for long"
    assert mask_of(prepared[0]) == mask_of_stream(trained)
    assert prepared[0]._encode == trained.encode


def test_miles_certify_proves_it(
    trained: DataConfig, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    encoding = flags[: flags.index("--row-shape")]
    encoding += ["--apply-chat-template-kwargs", '{"mark": "!"}']
    assert main(["certify", trained.encode.tokenizer, *encoding, "--json", "-"]) == 0
    certificate = json.loads(capsys.readouterr().out)
    assert certificate["fingerprint"] == Encoder.from_config(trained.encode).fingerprint


def test_miles_inspect_shows_it(
    trained: DataConfig, rows: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ((ids, mask),) = mask_of_stream(trained)
    segment = {"input_ids": ids, "loss_mask": mask, "source": "a", "file": "a.jsonl", "row": 0}
    content: dict[str, Any] = {"tokenizer": trained.encode.tokenizer, "micro_batches": [[segment]]}
    (tmp_path / "first_batch.json").write_text(json.dumps(content))
    run = {"data": dataclasses.asdict(trained)}
    (tmp_path / "config.json").write_text(json.dumps(run))

    assert main(["inspect", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert f"120 tokens, {sum(mask)} trained" in " ".join(printed.split())
    assert (
        'encoded with --chat-template-path FILE --apply-chat-template-kwargs \'{"mark": "!"}\' '
        "--loss-mask-turns last --empty-think train --special-text escape --too-long truncate_end "
        "--max-sample-tokens 120" in printed
    )


def test_no_setting_is_missing_in_a_notebook() -> None:
    taken = set(inspect.signature(prepare).parameters)
    other_names = {"chat_template": "chat_template_path", "shape": "row_shape"}
    other_names |= {"columns": "column_names", "roles": "role_names"}
    for field in (*dataclasses.fields(EncodeConfig), *dataclasses.fields(RowFormat)):
        assert other_names.get(field.name, field.name) in taken


def test_defaults_stand_in_one_place() -> None:
    for function in (prepare, encode):
        for parameter in inspect.signature(function).parameters.values():
            if parameter.name in {field.name for field in dataclasses.fields(EncodeConfig)}:
                default = getattr(EncodeConfig, parameter.name, None)
                assert parameter.default in (default, inspect.Parameter.empty, None)
