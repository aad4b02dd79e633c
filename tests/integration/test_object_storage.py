"""The whole path from object storage and back, as a user types it, against a real S3 API server on
loopback.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import s3fs
from safetensors.numpy import load

from miles.common import storage
from miles.data.config import DataConfig, EncodeConfig, OrderConfig, PackConfig, SourceConfig
from miles.data.files.manifest import Manifest
from miles.data.notebook.dataset import prepare
from miles.demo import rows
from miles.demo.model import build_model
from tests.support.object_storage import SECRETS
from tests.support.processes import miles
from tests.support.streams import demo_tokenizer, local


@pytest.fixture
def ray_logs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder in which the commands' own Rays keep their logs."""
    folder = tempfile.mkdtemp(
        prefix="logs-", dir="/tmp"
    )  # a path of Ray's sockets has few characters to spend
    monkeypatch.setenv("RAY_TMPDIR", folder)
    yield Path(folder)
    shutil.rmtree(folder, ignore_errors=True)


def no_secret_in(content: bytes, where: Any) -> None:
    for name, value in SECRETS.items():
        assert value.encode() not in content, f"{name} is in {where}"


def read_metrics(url: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in storage.read_text(f"{url}/metrics.jsonl").splitlines()]


@pytest.mark.slow
def test_rows_and_model_on_object_storage(bucket: str, tmp_path: Path, ray_logs: Path) -> None:
    build_model(demo_tokenizer(), tmp_path / "hf")
    here = rows.copy_rows(tmp_path / "rows")
    storage.upload_folder(tmp_path / "hf", f"{bucket}/hf", last="config.json")
    storage.upload_folder(tmp_path / "rows", f"{bucket}/rows", last="code.jsonl")

    printed = miles(
        *(
            "prepare",
            "chat",
            "--source",
            f"{bucket}/rows/chat.jsonl",
            "--tokenizer",
            f"{bucket}/hf",
        ),
        *("--output", f"{bucket}/data/chat"),
    )
    printed += miles(
        "convert",
        "hf-to-megatron",
        "--hf-checkpoint",
        f"{bucket}/hf",
        "--save",
        f"{bucket}/megatron",
    )
    run = f"{bucket}/run"
    line = [
        *(
            "train",
            "--hf-checkpoint",
            f"{bucket}/hf",
            "--ref-load",
            f"{bucket}/megatron",
            "--save",
            run,
        ),
        *("--prompt-data", "chat", f"{bucket}/data/chat", "code", f"{bucket}/rows/code.jsonl"),
        *(
            "--rollout-batch-size",
            "32",
            "--max-tokens-per-gpu",
            "2048",
            "--lr",
            "1e-3",
            "--max-bad-fraction",
            "0.02",
        ),
        *("--rollout-shuffle", "--num-rollout", "6", "--save-interval", "3"),
    ]
    printed += miles(*line, "--actor-num-gpus-per-node", "2")
    whole = read_metrics(run)
    storage.write_text(
        f"{run}/latest_checkpointed_iteration.txt", "3"
    )  # as if it had been killed after step 5
    printed += (again := miles(*line))
    assert "going on at step 3" in again
    printed += miles(
        "convert",
        "megatron-to-hf",
        "--load",
        run,
        "--hf-checkpoint",
        f"{bucket}/hf",
        "--save",
        f"{run}/hf",
    )
    printed += miles("inspect", run) + miles("report", run)

    # The same rows as on this machine, in the same steps; on two ranks, then on one.
    prepared = str(tmp_path / "prepared")
    prepare("chat", source=str(here["chat"]), tokenizer=str(tmp_path / "hf")).write(prepared)
    config = DataConfig(
        (SourceConfig("chat", (prepared,)), SourceConfig("code", (str(here["code"]),))),
        OrderConfig(batch_size=32, shuffle=True),
        EncodeConfig(str(tmp_path / "hf"), max_sample_tokens=2048),
        PackConfig(1, 2048),
    )
    expected = [step.fingerprint for step in local(config)[:6]]
    for metrics in (whole, read_metrics(run)):
        assert [metric["data/step_fingerprint"] for metric in metrics] == expected
    assert [metric["sft/loss"] for metric in read_metrics(run)] == pytest.approx(
        [metric["sft/loss"] for metric in whole], rel=1e-4
    )
    exported, fresh = (
        load(storage.read_bytes(f"{url}/model.safetensors"))
        for url in (f"{run}/hf", f"{bucket}/hf")
    )
    assert exported.keys() == fresh.keys()
    assert any((exported[name] != fresh[name]).any() for name in fresh), "it has learned"

    manifest = Manifest.from_json(storage.read_text(f"{bucket}/data/chat/manifest.json"))
    assert manifest.sources[0].files[0].path == f"{bucket}/rows/chat.jsonl"
    assert json.loads(storage.read_text(f"{run}/ledger.json"))["chat"]["counts"]["read"] > 0
    assert storage.exists(f"{run}/rejects.jsonl")
    no_secret_in(printed.encode(), "what was printed")
    store = s3fs.S3FileSystem()
    objects = store.find("bucket")
    assert {
        "bucket/run/report.html",
        "bucket/run/config.json",
        "bucket/run/first_batch.json",
    } <= set(objects)
    for path in objects:
        no_secret_in(store.cat_file(path), path)
    logs = [path for path in ray_logs.rglob("*") if path.is_file()]
    assert any(path.suffix == ".log" for path in logs)
    for path in [*logs, *Path(os.environ["MILES_CACHE"]).rglob("*.json")]:
        no_secret_in(path.read_bytes(), path)


def test_errors_hold_no_secret(
    bucket: str, chatml_tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, secret = SECRETS["AWS_ACCESS_KEY_ID"], SECRETS["AWS_SECRET_ACCESS_KEY"]
    store = s3fs.S3FileSystem()
    store.pipe_file("bucket/rows/cut.parquet", b"PAR1 and then nothing")

    def refused(source: str) -> str:
        words = (
            "prepare",
            "x",
            "--source",
            source,
            "--tokenizer",
            chatml_tokenizer_folder,
            "--output",
            f"{bucket}/out",
        )
        printed = miles(*words, expect=1)
        assert printed.count("miles: error:") == 1

        no_secret_in(printed.encode(), printed)
        return printed

    assert "bucket/none.parquet: no such file" in refused(f"{bucket}/none.parquet")
    assert "nobucket" in refused("s3://nobucket/rows/*.parquet")
    assert "cut.parquet: cannot be read" in refused(f"{bucket}/rows/cut.parquet")
    assert "holds a password" in refused(f"s3://{key}:{secret}@bucket/rows.parquet")
    assert not store.exists("bucket/out"), "nothing was written"
    for name in SECRETS:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    assert "credentials" in refused(f"{bucket}/rows/cut.parquet").lower(), (
        "they come from the environment alone"
    )
