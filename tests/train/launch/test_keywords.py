"""Keywords of `miles.train.run` give the settings that a launch line gives."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from miles.data.config import DataConfig, EncodeConfig, OrderConfig, SourceConfig
from miles.errors import ConfigError
from miles.train.config import TrainConfig
from miles.train.launch.arguments import parse, read_line
from miles.train.launch.keywords import in_keywords, read_keywords
from tests.support.launch import QWEN3


@pytest.fixture
def hf(tmp_path: Path) -> str:
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf/config.json").write_text(json.dumps(QWEN3))
    return str(tmp_path / "hf")


def read(**keywords: Any) -> TrainConfig:
    return read_keywords(keywords).config


def test_keywords_are_a_launch_line(hf: str) -> None:
    line = f"--hf-checkpoint {hf} --save out --prompt-data chat a.jsonl code b.jsonl --lr 2e-4"
    line += " --rollout-shuffle --num-epoch 3 --no-bf16 --prompt-data-weights 3 1"
    line += ' --max-tokens-per-gpu 512 --apply-chat-template-kwargs {"think":true}'
    assert parse(line.split()) == read(
        hf_checkpoint=Path(hf),
        save="out",
        prompt_data=["chat", Path("a.jsonl"), "code", "b.jsonl"],
        lr=2e-4,
        rollout_shuffle=True,
        num_epoch=np.int64(3),
        no_bf16=True,
        prompt_data_weights=(3, 1),
        max_tokens_per_gpu=512,
        apply_chat_template_kwargs={"think": True},
        save_hf=None,
    )


@pytest.mark.parametrize("rows", ["a.jsonl", ["a.jsonl"], Path("a.jsonl"), {"a": "a.jsonl"}])
def test_rows_are_given_in_the_usual_ways(hf: str, rows: Any) -> None:
    config = read(hf_checkpoint=hf, save="out", prompt_data=rows)
    assert [source.paths for source in config.data.sources] == [(str(Path("a.jsonl").resolve()),)]


def test_notices_and_a_file_are_those_of_a_line(hf: str, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(f"hf_checkpoint: {hf}\nsave: out\nprompt_data: a.jsonl\nlr: 1e-3\n")
    line = read_keywords({"lr": 2e-3, "loss_mask_type": "qwen"}, str(file))
    words = ["--config", str(file), "--lr", "2e-3", "--loss-mask-type", "qwen"]
    assert line == read_line(words)
    assert line.config.optimizer.lr == 2e-3
    assert "--loss-mask-type qwen has no effect" in line.notices[0]


@pytest.mark.parametrize(
    ("keywords", "expected"),
    [
        ({"num_epochs": 1}, "there is no flag --num-epochs; did you mean --num-epoch?"),
        ({"num_epoch": "three"}, "--num-epoch takes a whole number, not 'three'"),
        ({"num_epoch": 1.5}, "--num-epoch takes a whole number, not 1.5"),
        ({"rollout_shuffle": 1}, "--rollout-shuffle takes true or false, not 1"),
        ({"rollout_batch_size": 0}, "--rollout-batch-size must be positive, not 0"),
        ({"prompt_data": ["a", None]}, "--prompt-data takes a list, each item text, not None"),
        ({"no_bf16": False}, "--no-bf16=False negates twice; write --bf16=True"),
        ({"hf_checkpoint": ""}, "--hf-checkpoint is empty"),
        ({"loss_type": "dpo"}, "this is SFT only"),
        ({}, "--hf-checkpoint, --save and --prompt-data are missing"),
    ],
)
def test_a_mistake_names_the_keyword(keywords: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError) as error:
        read_keywords(keywords)
    assert expected in str(error.value)


def test_a_secret_is_not_quoted() -> None:
    with pytest.raises(ConfigError) as error:
        read_keywords({"wandb_key": 12345678, "use_wandb": True})
    assert "12345678" not in str(error.value)


def prepared(hf: str, **encode: Any) -> Any:
    settings = DataConfig(
        (SourceConfig("chat", ("chat.jsonl",)),),
        OrderConfig(batch_size=7),
        EncodeConfig(hf, max_sample_tokens=99, too_long="truncate_end", **encode),
        max_bad_fraction=0.5,
    )
    return SimpleNamespace(settings=settings)


def test_a_prepared_set_brings_its_rows_and_encoding(hf: str) -> None:
    ds = prepared(hf)
    config = read(hf_checkpoint=hf, save="out", prompt_data=ds, rollout_batch_size=4)
    assert config.data.sources == ds.settings.sources
    assert config.data.encode == ds.settings.encode
    assert config.data.max_bad_fraction == 0.5
    assert config.data.order.batch_size == 4
    given = read(hf_checkpoint=hf, save="out", prompt_data=ds, max_bad_fraction=0.1)
    assert given.data.max_bad_fraction == 0.1


@pytest.mark.parametrize("keyword", ["max_sample_tokens", "too_long", "row_shape", "split"])
def test_settings_of_a_prepared_set_are_not_given_twice(hf: str, keyword: str) -> None:
    value = {"max_sample_tokens": 5, "too_long": "drop", "row_shape": "text", "split": "all"}
    keywords = {"hf_checkpoint": hf, "save": "out", keyword: value[keyword]}
    with pytest.raises(ConfigError, match=r"give it to miles\.data\.prepare"):
        read_keywords({**keywords, "prompt_data": prepared(hf)})


def test_texts_speak_of_keywords() -> None:
    assert in_keywords("--lr must be positive; see miles train --help") == (
        "lr= must be positive; see miles train --help"
    )
    assert in_keywords("there is no flag --max-x; did you mean --max-y?") == (
        "there is no keyword max_x=; did you mean max_y=?"
    )
    assert in_keywords("/a/--b--c a--lr -- --") == "/a/--b--c a--lr -- --", "no flag"
    assert in_keywords("--lr 1e-3 and --hf-checkpoint /hf, --too-long drop.") == (
        'lr=1e-3 and hf_checkpoint="/hf", too_long="drop".'
    )
    assert in_keywords("--transform my:f: no such") == 'transform="my:f": no such'
    assert in_keywords("--save s3://b/run: the same command goes on") == (
        'save="s3://b/run": the same call goes on'
    )


def test_all_mistakes_of_a_call_are_named(hf: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(hf_checkpoint=hf, save="out", prompt_data="a", num_epochs=3, lr="x", optimizer="sgd")
    assert str(caught.value).startswith(
        "3 mistakes: (1) there is no flag --num-epochs; did you mean --num-epoch? (2) --lr takes a "
        "number, not 'x'; (3) --optimizer sgd is not supported"
    )


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        (
            {"prompt_data": [{"messages": []}]},
            r"a mapping from names to paths, or one data set .*dict",
        ),
        ({"prompt_data": {"chat": object()}}, "Rows themselves are given to miles"),
        ({"eval_prompt_data": 5}, r"a mapping from names to paths, not 5 \(int\)"),
        ({"transform": print}, "a function itself is given to miles"),
        (
            {"rollout_batch_size": 8, "global_batch_size": 16},
            "^--rollout-batch-size 8 and --global-batch-size 16 must be equal",
        ),
    ],
)
def test_what_belongs_elsewhere_is_told_so(hf: str, keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(**{"hf_checkpoint": hf, "save": "out", "prompt_data": "a", **keywords})
