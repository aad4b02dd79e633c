"""The benchmarks at their smallest size: what they print, and bars on memory, counts and bytes.

Bars on time hold on a quiet machine only: `make bench` checks them, at full size.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from tests.support.processes import PROJECT

pytestmark = pytest.mark.heavy

needs_trl = pytest.mark.skipif(
    find_spec("trl") is None, reason="the peer takes a chat template from the package trl"
)

NUMBER = r"[\d,]+(?:\.\d+)?(?:e[-+]?\d+)?"
BAR = re.compile(rf"{NUMBER}, bar: at (?:least|most) {NUMBER}, (?:met|MISSED)")


def benchmark(name: str, *words: str | Path) -> str:
    """Run a benchmark; return what it printed."""
    line = [sys.executable, PROJECT / "benchmarks" / name, *words]
    done = subprocess.run(line, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def sample(assets: Path, tokenizer: Path) -> list[str | Path]:
    """Return the words that name the real rows and a tokenizer."""
    return ["--source", assets / "data/openhermes_sample.parquet", "--tokenizer", tokenizer]


@needs_trl
def test_encode_prints_every_path(assets: Path) -> None:
    rows = sample(assets, assets / "qwen3-tokenizer")
    printed = benchmark("encode.py", *rows, "--rounds", "1", "--max-rows", "1024")
    for text in ("warm", "new text"):
        assert re.search(rf"{text}: 1,024 rows, {NUMBER} tokens, one core", printed), text
    ours = ("ours, fastokens", "ours, tiktoken", "ours, tokenizers", r"encode\(\), one at a time")
    for path in (*ours, "ours, by JSON text, tiktoken", "read", "encode_batch", "transformers"):
        assert len(re.findall(rf"{path} +│(?: +{NUMBER} │){{4}}", printed)) == 2, path
    same = re.search(r"our mask within theirs: ([\d,]+) of 1,024 rows", printed)
    assert same is not None
    assert int(same[1].replace(",", "")) > 800, "one turn, and their template and ours say the same"
    assert len(BAR.findall(printed)) == 6


SMALL_STREAM = {
    ("steady", "slow", "resume", "feed"): [
        *("--rows", 4356, "--window-rows", 1024, "--block-kib", 512, "--rounds", 1),
        *("--steady-rounds", 1, "--peer-rows", 64, "--feed-rounds", 1),
        *("--slow-steps", 16, "--slow-window", 1024),
    ],
    ("growth",): [
        *("--growth", 3, "--growth-rows", 4096, "--growth-window", 256, "--batch-size", 64),
        *("--growth-hold-seconds", 0.05, "--rounds", 1),
    ],
}
"""Sections that share their rows run in one process. Growth is judged from more, in small steps."""
SECTIONS = {
    "steady": ["outside normalize and encode", "  others", "rows a CPU second", "peer, end to end"],
    "slow": ["waited after the first step", "longest wait", "steps ready", "peak memory"],
    "resume": ["from row 0", "from row 3,840"],
    "growth": ["4,096 rows: first step", "12,288 rows: first step", "peak memory"],
    "feed": ["1 data ranks, a chunk for each rank", "1,024 data ranks, a chunk for each node"],
}
"""Lines of each section."""


@needs_trl
@pytest.mark.parametrize("sections", SMALL_STREAM, ids="-".join)
def test_stream_prints_its_sections(
    assets: Path, chatml_tokenizer_folder: Path, tmp_path: Path, sections: tuple[str, ...]
) -> None:
    """With a small tokenizer: each of many processes certifies it, which a real one makes long."""
    report = tmp_path / "report.json"
    words = [str(word) for word in SMALL_STREAM[sections]]
    for section in sections:
        words += ["--section", section]
    rows = sample(assets, chatml_tokenizer_folder)
    printed = benchmark("stream.py", *rows, "--json", report, *words)
    found = json.loads(report.read_text())
    assert tuple(found) == sections

    for section in sections:
        assert f"{section}: " in printed
        for line in SECTIONS[section]:
            assert re.search(rf"{re.escape(line)} +│.*{NUMBER}", printed), line
        CHECKS[section](found[section])
    num_bars = sum(len(content["bars"]) for content in found.values())
    assert len(BAR.findall(printed)) == num_bars


def check_steady(found: dict[str, Any]) -> None:
    (stream,) = found["streams"]
    assert stream["num_rows"] == 4356, "as many in each of 12 files"
    assert stream["num_steps"] == 35
    assert set(stream["loader_us"]) == {"read", "normalize", "encode", "tables", "pack", "ray"}
    assert {"feed", "driver", "consumer", "ray"} <= set(stream["others_us"])
    costs = [*stream["loader_us"].values(), *stream["others_us"].values()]
    assert min(costs) >= 0, "a role may rest in so short a time"
    assert stream["loader_us"]["encode"] > stream["loader_us"]["pack"] > 0
    assert found["peer"]["num_rows"] == 64


def check_slow(found: dict[str, Any]) -> None:
    assert found["stream"]["num_steps"] == len(found["stream"]["queue_depths"]) == 16


def check_resume(found: dict[str, Any]) -> None:
    assert len(found["seconds_from_0"]) == len(found["seconds_from_90_percent"]) == 1


def check_growth(found: dict[str, Any]) -> None:
    assert [stream["num_rows"] for stream in found["streams"]] == [4096, 12288]
    of_memory = [bar for bar in found["bars"] if bar["name"].startswith("peak of ")]
    assert len(of_memory) == 4
    for bar in of_memory:
        assert bar["limit"] == 1.3
        assert bar["is_met"], bar


def check_feed(found: dict[str, Any]) -> None:
    by_ranks = found["by_ranks"]
    assert list(by_ranks) == ["1", "8", "64", "1024"]
    assert len({cut["num_tokens"] for by_cut in by_ranks.values() for cut in by_cut.values()}) == 1
    many = by_ranks["1024"]
    assert many["node"]["cut_ms"] < many["rank"]["cut_ms"], "128 chunks instead of 1,024"


CHECKS = {
    "steady": check_steady,
    "slow": check_slow,
    "resume": check_resume,
    "growth": check_growth,
    "feed": check_feed,
}


def test_converting_holds_little_memory(tmp_path: Path) -> None:
    """Both ways; the benchmark compares the files that come back with the first ones."""
    printed = benchmark(
        "convert.py",
        "--gigabytes",
        "1",
        "--rounds",
        "1",
        "--folder",
        tmp_path,
        "--max-resident-gigabytes",
        "1.1",
    )
    assert re.search(r"1\.\d\d GB, the fastest of 1 rounds", printed)

    for contender in ("cp", "cp, then sync", "hf-to-megatron", "megatron-to-hf"):
        assert re.search(rf"{contender} +│(?: +{NUMBER} │){{3}}", printed), contender
    assert len(BAR.findall(printed)) == 2
    assert re.search(r"peak memory of a conversion, GB +│ .*, bar: at most 1\.1, met", printed)


def test_prepare_compares_two_checkouts(
    assets: Path, chatml_tokenizer_folder: Path, tmp_path: Path
) -> None:
    rows = pq.read_table(assets / "data/openhermes_sample.parquet").slice(0, 64)
    pq.write_table(rows, tmp_path / "rows.parquet")
    size: list[str | Path] = [
        "--section",
        "array",
        "--rows",
        "128",
        "--rounds",
        "1",
        "--part-rows",
        "128",
        "--against",
        PROJECT,
    ]
    source: list[str | Path] = [
        "--source",
        tmp_path / "rows.parquet",
        "--tokenizer",
        chatml_tokenizer_folder,
    ]
    printed = benchmark("prepare.py", *source, *size)
    assert "array: 128 rows" in printed
    for name in ("ours", "theirs"):
        assert re.search(rf"{name} +│ +first (?:│ +{NUMBER} ){{4}}│", printed)
    parts = ("count the rows", "read", "normalize, encode", "write Parquet")
    assert all(re.search(rf"{part}.*│ +{NUMBER} us", printed) for part in parts)
    assert len(BAR.findall(printed)) == 3


def test_pack_prints_its_bars(assets: Path, chatml_tokenizer_folder: Path) -> None:
    source: list[str | Path] = [
        "--source",
        assets / "data/openhermes_sample.parquet",
        "--tokenizer",
        chatml_tokenizer_folder,
    ]
    printed = benchmark(
        "pack.py", "--rows", "5000", "--chain-rows", "256", "--chain-rounds", "1", *source
    )
    assert "5,000 samples" in printed
    parts = ("plan", "the rest of reading", "fingerprint", "pack", "table of segments", "encode")
    assert all(re.search(rf"{part} +│ {NUMBER} ", printed) for part in parts)
    assert len(BAR.findall(printed)) == 3


def test_a_lora_step_is_compared_with_two_others() -> None:
    size = ["--hidden-size", "128", "--layers", "1", "--sample-tokens", "32", "--steps", "1"]
    printed = benchmark("lora_step.py", *size)
    assert re.search(rf"128 tokens a step, .* LoRA {NUMBER} ms, PEFT's {NUMBER} ms", printed)
    assert len(BAR.findall(printed)) == 2


def test_saving_prints_its_bar() -> None:
    printed = benchmark("saving.py", "--fsync-seconds", "0.1", "--save-interval", "8")
    assert re.search(
        rf"\d+ steps before the save: {NUMBER} ms; \d+ beside it: {NUMBER} ms", printed
    )
    assert len(BAR.findall(printed)) == 1


def test_the_gpu_check_runs_without_a_gpu(tmp_path: Path) -> None:
    """The part that measures a step, on the CPU; the others are run by hand (`make gpu`)."""
    done = subprocess.run(
        [PROJECT / "benchmarks/gpu_check.sh", "train"],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "PYTHON": sys.executable, "OUT": str(tmp_path), "GPU_CHECK_TINY": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr

    found = json.loads((tmp_path / "results.json").read_text())["train"]["found"]
    for section in ("ceilings", "step", "profile", "peer", "switches", "further"):
        assert "error" not in found[section], found[section]
    assert found["step"]["tokens_per_second"] > 0
    assert found["step"]["last_loss"] < found["step"]["first_loss"]
    assert found["profile"]["by_kind_ms"]["matrix products"] > 0
    assert found["peer"]["varlen"]["tokens_per_second"] > 0
    errors = [name for name, result in found["switches"].items() if "error" in result]
    assert not errors
    assert (tmp_path / "summary.md").read_text() in done.stdout


def test_the_page_has_the_tables_of_the_roofline() -> None:
    page = (PROJECT / "docs/performance.md").read_text().splitlines()
    printed = benchmark("roofline.py").splitlines()
    assert len(printed) > 20
    missing = [line for line in printed if line and line not in page]
    assert not missing, "\n".join(missing)
