"""The same order everywhere, and every row once an epoch: whatever the cluster, the layout, the
files, the deaths.
"""

from __future__ import annotations

import gzip
import json
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from miles.data.config import DataConfig, EncodeConfig, OrderConfig, PackConfig, SourceConfig
from miles.data.files.manifest import build_manifest
from miles.data.packing.shards import unpack
from miles.data.stream import pipeline, stages
from miles.data.types import Step
from tests.support.row_files import json_lines, random_conversations, write_conversations
from tests.support.scenarios import run, stream_over_ray
from tests.support.streams import (
    Seen,
    add_unread_keys,
    config_of,
    delivered,
    demo_settings,
    local,
    seen,
    trained_rows,
    with_layout,
)

GOLDEN = Path(__file__).with_name("golden_order.json")
"""Written anew, after a change of the order that is meant, by
MILES_WRITE_GOLDEN=1 pytest tests/integration/test_order.py -k golden"""


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    settings = demo_settings(tmp_path_factory.mktemp("order"))
    add_unread_keys(settings)
    return settings


@pytest.fixture(scope="module")
def config(settings: dict[str, Any]) -> DataConfig:
    return config_of(settings)


@pytest.fixture(scope="module")
def unbroken(config: DataConfig) -> list[Step]:
    return local(config)


@pytest.fixture(scope="module")
def expected(unbroken: list[Step]) -> list[Seen]:
    return [seen(step) for step in unbroken]


# --- the layout and the cluster


@pytest.mark.parametrize(("dp_size", "max_tokens"), [(1, 300), (2, 4096), (4, 256), (8, 300)])
def test_order_is_the_same_for_any_layout(
    config: DataConfig, expected: list[Seen], dp_size: int, max_tokens: int
) -> None:
    """Each number of ranks, each capacity; the tests over Ray have other pairs of them."""
    steps = local(with_layout(config, dp_size, max_tokens))
    assert [seen(step) for step in steps] == expected
    assert {len(step.micro_batches) for step in steps} == {dp_size}


def layout(loader_cpus: int, dp_size: int, max_tokens: int, block_bytes: int) -> dict[str, Any]:
    """Return settings of a layout that replace those of the demo."""
    return {
        "pack": {"dp_size": dp_size, "max_tokens_per_gpu": max_tokens},
        "stream": {"loader_cpus": loader_cpus, "target_block_bytes": block_bytes},
    }


@pytest.mark.parametrize(
    "settings_of_layout",
    [layout(1, 2, 512, 1 << 20), layout(2, 2, 512, 1), layout(2, 4, 300, 64 << 20)],
    ids=["one loader", "blocks of a step", "4 ranks"],
)
def test_order_is_the_same_over_ray(
    settings: dict[str, Any], expected: list[Seen], settings_of_layout: dict[str, Any]
) -> None:
    """On the two CPUs of these tests' own Ray."""
    assert stream_over_ray({**settings, **settings_of_layout}) == expected


@pytest.mark.slow
def test_order_is_the_same_for_any_cluster(settings: dict[str, Any], expected: list[Seen]) -> None:
    """On a Ray of one CPU, and on one of four."""
    clusters = [
        (1, [layout(1, 1, 4096, 1 << 20), layout(1, 8, 256, 1 << 12)]),
        (4, [layout(4, 1, 256, 1 << 12), layout(4, 8, 1000, 1)]),
    ]
    results = run("stream", {"settings": settings, "clusters": clusters})
    assert len(results) == 4
    for result in results:
        assert result == expected


def test_another_seed_is_another_order(config: DataConfig, unbroken: list[Step]) -> None:
    changed = replace(config, order=replace(config.order, seed=4))
    first = next(stages.local_steps(build_manifest(config.sources), changed))
    assert first.fingerprint != unbroken[0].fingerprint
    assert len({step.fingerprint for step in unbroken}) == len(unbroken)


# --- deaths


@pytest.fixture(scope="module")
def attacked(
    settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory, seed: int
) -> tuple[Any, DataConfig, Path]:
    """A run over a feed whose loaders are killed at random moments."""
    folder = tmp_path_factory.mktemp("attacked")
    stream = {"loader_cpus": 2, "max_retries": 20, "target_block_bytes": 1 << 14}
    changed = {**settings, "stream": stream}
    arguments = {"settings": changed, "run_dir": str(folder), "num_kills": 4, "seed": seed}
    result = run("attacked", arguments)
    return result, config_of(changed), folder


@pytest.mark.slow
def test_order_survives_killed_loaders(
    attacked: tuple[Any, DataConfig, Path],
) -> None:
    result, config, _ = attacked
    assert len(set(result["killed"])) >= 2, "too few were killed for this to say anything"
    assert max(Counter(result["begun"]).values()) > 1, "no step was lost and made again"
    assert result["seen"] == [seen(step) for step in local(config)]


@pytest.mark.slow
def test_every_row_comes_once_an_epoch(
    attacked: tuple[Any, DataConfig, Path],
) -> None:
    """Over the feed whose loaders were killed: the digest shows that the ranks got what `local`
    gives.
    """
    result, config, folder = attacked
    manifest = build_manifest(config.sources)
    steps = local(config)
    assert all(len({len(rank) for rank in step.micro_batches}) == 1 for step in steps)

    per_epoch = len(steps) // config.order.num_epoch
    for epoch in range(config.order.num_epoch):
        part = slice(epoch * per_epoch, (epoch + 1) * per_epoch)
        rows = [row for step in steps[part] for row in trained_rows(step)]
        rows += [row for rejected in result["rejected"][part] for row in rejected]
        assert np.array_equal(np.bincount(rows), np.ones(manifest.num_rows, int))
        assert sum(result["rows"][part]) == manifest.num_rows

    listed = [json.loads(line) for line in (folder / "rejects.jsonl").read_text().splitlines()]
    rejected = [
        manifest.locate(row) for row in sorted({row for step in result["rejected"] for row in step})
    ]
    assert sorted((entry["source"], entry["file"], entry["row"]) for entry in listed) == sorted(
        rejected
    )
    assert len(rejected) == 4

    for source in manifest.sources:
        counts = result["totals"][source.name]
        assert counts["read"] == config.order.num_epoch * source.num_rows
        assert counts["read"] == counts["trained"] + sum(
            count for key, count in counts.items() if key not in ("read", "trained", "truncated")
        )


# --- the files


def cut(rows: list[dict[str, Any]], bounds: list[int]) -> list[list[dict[str, Any]]]:
    return [rows[begin:end] for begin, end in zip([0, *bounds], [*bounds, len(rows)], strict=True)]


@pytest.fixture(scope="module")
def splits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same 401 rows, written in many ways."""
    rows, root = random_conversations(401), tmp_path_factory.mktemp("splits")
    names = (
        "one file",
        "7 files",
        "gzip",
        "array",
        "groups of 1",
        "groups of 50",
        "one group",
        "mixed",
    )
    folders = {name: root / name for name in names}

    for folder in folders.values():
        folder.mkdir()
    (folders["one file"] / "rows.jsonl").write_bytes(json_lines(rows))

    for number, part in enumerate(cut(rows, [1, 60, 61, 200, 333, 400])):
        (folders["7 files"] / f"part-{number}.jsonl").write_bytes(json_lines(part))
    (folders["gzip"] / "rows.jsonl.gz").write_bytes(gzip.compress(json_lines(rows)))
    (folders["array"] / "rows.json").write_text(json.dumps(rows, indent=2))

    for name, group_rows in (("groups of 1", 1), ("groups of 50", 50), ("one group", 1000)):
        write_conversations(folders[name] / "rows.parquet", rows, group_rows)
    for number, part in enumerate(cut(rows, [7, 100, 390])):
        write_conversations(
            folders["mixed"] / f"part-{number}.parquet", part, (3, 64, 1000, 2)[number]
        )

    return folders


@pytest.mark.parametrize("shuffle", [True, False], ids=["shuffled", "in file order"])
def test_order_is_the_same_for_any_files(
    config: DataConfig, splits: dict[str, Path], shuffle: bool
) -> None:
    order = OrderConfig(batch_size=32, shuffle=shuffle, seed=11, window_rows=401, num_epoch=2)

    def of(folder: Path) -> list[Seen]:
        made = replace(config, sources=(SourceConfig("rows", (str(folder),)),), order=order)
        return [seen(step) for step in local(made)]

    results = {name: of(folder) for name, folder in splits.items()}
    assert len(results["one file"]) == 26
    for name, result in results.items():
        assert result == results["one file"], name
    fingerprints = [fingerprint for _, fingerprint, *_ in results["one file"]]
    first_epoch, second_epoch = fingerprints[:13], fingerprints[13:]
    assert (first_epoch == second_epoch) == (not shuffle)


# --- the golden file


def byte_tokenizer(folder: Path) -> str:
    """Every byte is a token, its id the byte's place in the alphabet of byte-level BPE; then
    ChatML's two tokens.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(
        models.BPE(vocab={sign: number for number, sign in enumerate(alphabet)}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token in ("<|im_start|>", "<|im_end|>")
        ]
    )
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    template = (
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "clean_up_tokenization_spaces": False,
        "chat_template": template,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return str(folder)


def golden_row(number: int) -> dict[str, Any]:
    turns = [
        ("user", f"Question {number}?"),
        ("assistant", f"Answer {number}: " + "é" * (number % 5) + "."),
    ]
    messages = [{"role": role, "content": content} for role, content in turns * (1 + number % 2)]
    return {"messages": [] if number == 17 else messages}


def golden_config(folder: Path, shuffle: bool) -> DataConfig:
    """41 rows in two files; windows of 16, of which the last is short, as is the last step."""
    for name, numbers in (("a", range(23)), ("b", range(23, 41))):
        write_conversations(
            folder / f"{name}.parquet", [golden_row(number) for number in numbers], 5
        )
    return DataConfig(
        sources=tuple(
            SourceConfig(name, (str(folder / f"{name}.parquet"),)) for name in ("a", "b")
        ),
        order=OrderConfig(batch_size=8, shuffle=shuffle, seed=2024, window_rows=16, num_epoch=2),
        encode=EncodeConfig(byte_tokenizer(folder / "tokenizer"), max_sample_tokens=512),
        pack=PackConfig(2, 512),
    )


def rows_of_steps(config: DataConfig) -> list[list[int]]:
    """Return the rows of each step in the order of its samples, without the rejected ones."""
    manifest = build_manifest(config.sources)
    plan, formats = stages.make_plan(manifest, config), stages.source_formats(manifest)
    return [
        row_ids
        for ref in plan.windows(0)
        for raw in stages.read_window(manifest, plan, ref, 0)
        for row_ids in stages.encode_steps(raw, formats, stages.encoder_of(config.encode))[
            "sample_row_ids"
        ].to_pylist()
    ]


def fingerprint_of(step: Step, row_ids: list[int]) -> str:
    """A step's fingerprint, made here from what the ranks are given: lengths, ids and masks in
    sample order.
    """
    samples = {}
    for batch in (batch for rank in step.micro_batches for batch in rank):
        for number, row_id in enumerate(batch.row_ids.tolist()):
            part = slice(batch.cu_seqlens[number], batch.cu_seqlens[number + 1])
            mask = np.concatenate(
                [[0], batch.loss_mask[part][:-1]]
            )  # a label's mask is that of the next token
            samples[row_id] = batch.input_ids[part].astype(np.int32), mask.astype(np.uint8)

    digest = xxhash.xxh64(np.array([len(samples[row][0]) for row in row_ids], np.int32).tobytes())
    for index in range(2):
        for row in row_ids:
            digest.update(samples[row][index].tobytes())

    return digest.hexdigest()


@pytest.mark.parametrize("shuffle", [True, False], ids=["shuffled", "in file order"])
def test_order_is_that_of_the_golden_file(tmp_path: Path, shuffle: bool) -> None:
    config = golden_config(tmp_path, shuffle)
    steps, rows = local(config), rows_of_steps(config)
    got = [
        {
            "rows": row_ids,
            "fingerprint": step.fingerprint,
            "delivered": delivered(step.micro_batches),
        }
        for step, row_ids in zip(steps, rows, strict=True)
    ]
    kind = "shuffled" if shuffle else "in file order"
    if os.environ.get("MILES_WRITE_GOLDEN"):
        golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
        lines = (
            f'  "{name}": [\n   ' + ",\n   ".join(map(json.dumps, all_)) + "\n  ]"
            for name, all_ in sorted({**golden, kind: got}.items())
        )
        GOLDEN.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    assert got == json.loads(GOLDEN.read_text())[kind]
    assert [fingerprint_of(step, row_ids) for step, row_ids in zip(steps, rows, strict=True)] == [
        step.fingerprint for step in steps
    ]

    over_ray = pipeline.blocks(pipeline.build(build_manifest(config.sources), config))
    assert [seen(step) for block in over_ray for step in unpack(block)] == [
        seen(step) for step in steps
    ]

    if not shuffle:
        assert rows[0] == list(range(8))
        assert rows[2] == [16, 18, 19, 20, 21, 22, 23], (
            "row 17 leaves its step shorter, and moves no other"
        )
