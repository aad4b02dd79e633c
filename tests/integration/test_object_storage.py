"""The whole path from object storage and back, as a user types it, against a real S3 API server on
loopback.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import s3fs
from safetensors.numpy import load

from miles.common import storage
from miles.data.config import DataConfig, EncodeConfig, OrderConfig, PackConfig, SourceConfig
from miles.data.files.manifest import Manifest
from miles.data.notebook.prepare import prepare
from miles.demo import rows
from miles.demo.model import build_model
from tests.support.object_storage import SECRETS
from tests.support.processes import miles, miles_here
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
    files = rows.copy_rows(tmp_path / "rows")
    storage.upload_folder(tmp_path / "hf", f"{bucket}/hf", last="config.json")
    storage.upload_folder(tmp_path / "rows", f"{bucket}/rows", last="code.jsonl")

    printed = prepare_and_convert(bucket)
    printed += train_on(bucket, num_ranks=2)
    unbroken = read_metrics(f"{bucket}/run")
    # As if the run had been killed after step 5.
    storage.write_text(f"{bucket}/run/latest_checkpointed_iteration.txt", "3")
    resumed = train_on(bucket, num_ranks=1)
    assert "going on at step 3" in resumed
    printed += resumed + export_and_report(bucket)

    expected = local_fingerprints(files, tmp_path)
    for metrics in (unbroken, read_metrics(f"{bucket}/run")):
        assert [metric["data/step_fingerprint"] for metric in metrics] == expected
    assert [metric["sft/loss"] for metric in read_metrics(f"{bucket}/run")] == pytest.approx(
        [metric["sft/loss"] for metric in unbroken], rel=1e-4
    )
    require_trained_export(bucket)
    require_run_folder(bucket)
    require_no_secret_anywhere(printed, ray_logs)


def prepare_and_convert(bucket: str) -> str:
    """Prepare the chat rows and convert the model, from the bucket to the bucket."""
    source = f"--source {bucket}/rows/chat.jsonl --tokenizer {bucket}/hf"
    printed = miles_here(*f"prepare chat {source} --output {bucket}/data/chat".split())
    convert = f"convert hf-to-megatron --hf-checkpoint {bucket}/hf --save {bucket}/megatron"
    return printed + miles_here(*convert.split())


def train_on(bucket: str, *, num_ranks: int) -> str:
    """Train six steps on the prepared chat rows and the code rows as they are.

    The run begins from the Hugging Face folder, of which each rank reads its own ranges.
    """
    model = f"--hf-checkpoint {bucket}/hf --save {bucket}/run"
    data = f"--prompt-data chat {bucket}/data/chat code {bucket}/rows/code.jsonl"
    steps = "--rollout-batch-size 32 --rollout-shuffle --num-rollout 6 --save-interval 3"
    limits = "--max-tokens-per-gpu 2048 --lr 1e-3 --max-bad-fraction 0.02"
    ranks = f"--actor-num-gpus-per-node {num_ranks}"
    return miles(*f"train {model} {data} {steps} {limits} {ranks}".split())


def export_and_report(bucket: str) -> str:
    """Convert the trained checkpoint back, and look at the run."""
    run = f"{bucket}/run"
    export = f"convert megatron-to-hf --load {run} --hf-checkpoint {bucket}/hf --save {run}/hf"
    return miles_here(*export.split()) + miles_here("inspect", run) + miles_here("report", run)


def local_fingerprints(files: Mapping[str, Path], folder: Path) -> list[str]:
    """Return the fingerprints of the same six steps from this machine's files, without Ray."""
    prepared = str(folder / "prepared")
    prepare("chat", source=str(files["chat"]), tokenizer=str(folder / "hf")).write(prepared)
    config = DataConfig(
        (SourceConfig("chat", (prepared,)), SourceConfig("code", (str(files["code"]),))),
        OrderConfig(batch_size=32, shuffle=True),
        EncodeConfig(str(folder / "hf"), max_sample_tokens=2048),
        PackConfig(1, 2048),
    )
    return [step.fingerprint for step in local(config)[:6]]


def require_trained_export(bucket: str) -> None:
    exported = load(storage.read_bytes(f"{bucket}/run/hf/model.safetensors"))
    fresh = load(storage.read_bytes(f"{bucket}/hf/model.safetensors"))
    assert exported.keys() == fresh.keys()
    assert any((exported[name] != fresh[name]).any() for name in fresh), "it has learned"


def require_run_folder(bucket: str) -> None:
    manifest = Manifest.from_json(storage.read_text(f"{bucket}/data/chat/manifest.json"))
    assert manifest.sources[0].files[0].path == f"{bucket}/rows/chat.jsonl"
    assert json.loads(storage.read_text(f"{bucket}/run/ledger.json"))["chat"]["counts"]["read"] > 0
    for name in ("rejects.jsonl", "report.html", "config.json", "first_batch.json"):
        assert storage.exists(f"{bucket}/run/{name}"), name


def require_no_secret_anywhere(printed: str, ray_logs: Path) -> None:
    """Look into everything that was printed, stored, logged by Ray or cached."""
    no_secret_in(printed.encode(), "what was printed")
    store = s3fs.S3FileSystem()
    for path in store.find("bucket"):
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

    def refused(source: str, run: Callable[..., str] = miles_here) -> str:
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
        printed = run(*words, expect=3)
        assert printed.count("miles: error:") == 1

        no_secret_in(printed.encode(), printed)
        return printed

    assert "bucket/none.parquet: no such file" in refused(f"{bucket}/none.parquet")
    assert "nobucket" in refused("s3://nobucket/rows/*.parquet")
    assert "cut.parquet: cannot be read" in refused(f"{bucket}/rows/cut.parquet", miles)
    assert "holds a password" in refused(f"s3://{key}:{secret}@bucket/rows.parquet")
    assert not store.exists("bucket/out"), "nothing was written"
    for name in SECRETS:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    assert "credentials" in refused(f"{bucket}/rows/cut.parquet", miles).lower(), (
        "they come from the environment alone"
    )
