"""The parts of benchmarks/gpu_check.sh that need no GPU: processes, summary, kernels, wheels."""

from __future__ import annotations

import importlib
import json
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support.processes import PROJECT, wait_until


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that imports a file of benchmarks/ by its name."""
    monkeypatch.syspath_prepend(PROJECT / "benchmarks")
    return importlib.import_module


def job(module: Any, name: str, code: str, limit_seconds: float = 60) -> Any:
    return module.Job(name, [sys.executable, "-c", code], limit_seconds)


@pytest.fixture
def check(benchmark: Any, tmp_path: Path) -> Any:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    check = benchmark("_gpu_check").Check(tmp_path, scratch, time.monotonic() + 60)
    check.patience = 1
    return check


def test_the_next_part_runs_where_one_fails(
    benchmark: Any, check: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module = benchmark("_gpu_check")
    fails = "for n in range(99): print('line', n)\nraise SystemExit(3)"
    check.run_part("first", [job(module, "bad", fails), job(module, "good", "print('fine')")])
    check.run_part("second", [job(module, "last", "print('the end')")])

    assert not check.is_good
    results = json.loads((tmp_path / "results.json").read_text())
    assert [results[name]["status"] for name in ("bad", "good", "last")] == [
        "exit status 3",
        "ok",
        "ok",
    ]
    assert "line 98" in (tmp_path / "first.log").read_text()
    shown = capsys.readouterr().out
    assert "line 98" in shown
    assert "line 68\n" not in shown
    summary = (tmp_path / "summary.md").read_text()
    assert "line 98" in summary
    assert "the end" in summary


def test_a_process_that_takes_too_long_is_ended_with_its_children(
    benchmark: Any, check: Any, tmp_path: Path
) -> None:
    pids = tmp_path / "pids"
    hangs = f"""
import os, pathlib, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
apart = subprocess.Popen(
    [sys.executable, "-c", "import time; time.sleep(300)"], start_new_session=True
)
pathlib.Path({str(pids)!r}).write_text(f"{{child.pid}} {{apart.pid}}")
time.sleep(300)
"""
    check.run_part("slow", [job(benchmark("_gpu_check"), "hangs", hangs, limit_seconds=5.5)])
    assert check.results["hangs"]["status"].startswith("ended after")
    for pid in map(int, pids.read_text().split()):
        wait_until(lambda pid=pid: not is_running(pid), lambda pid=pid: f"{pid} still runs")


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_nothing_begins_behind_the_budget(benchmark: Any, tmp_path: Path) -> None:
    module = benchmark("_gpu_check")
    check = module.Check(tmp_path, tmp_path, time.monotonic() + 1)
    check.run_part("late", [job(module, "late", "open('here', 'w')")])
    assert check.results["late"]["status"] == "no time was left"


def test_the_summary_is_short_whatever_was_found(benchmark: Any) -> None:
    case = {
        "case": "qwen3-4b, 16,384 tokens",
        "micro_batches": 4,
        "tokens": 65_536,
        "median_seconds": 1.5,
        "tokens_per_second": 43_690.0,
        "tflops": 470.0,
        "mfu": 0.48,
        "of_matrix_product": 0.6,
        "peak_allocated": 120 << 30,
        "estimated_bytes": 119 << 30,
    }
    found = {
        "device": "NVIDIA H200",
        "case": case["case"],
        "versions": {"torch": "2.11.0"},
        "switches": {f"switch {number}": case for number in range(60)} | {"all on": case},
        "further": {f"case {number}": case for number in range(60)},
        "estimate": {f"case {number}": case for number in range(60)},
    }
    names = ("step", "peer", "switches", "further", "estimate")
    results = {name: {"status": "ok", "seconds": 60.0, "found": found} for name in names}
    results["tests"] = results["demo"] = {
        "status": "exit status 1",
        "seconds": 9.0,
        "tail": "\n".join(["x" * 200] * 30),
    }

    module = benchmark("_gpu_summary")
    summary = module.summarize(results)
    assert len(summary) < module.MOST_CHARACTERS
    for name in results:
        assert f"### {name}" in summary


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("nvjet_tst_256x128_64x4_1x2_h_bz_coopA_NNT", "matrix products"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "matrix products"),
        ("void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<…>", "attention"),
        ("_rms_norm_backward_kernel", "norms"),
        ("_triton_rope", "heads: norms, rotation"),
        ("_split_heads", "heads: norms, rotation"),
        ("_sum_row", "loss"),
        ("_swiglu_forward_kernel", "SwiGLU"),
        ("Memcpy DtoD (Device -> Device)", "copies"),
        ("ncclDevKernel_AllReduce_Sum_f32_RING_LL", "communication"),
        ("void at::native::multi_tensor_apply_kernel<…FusedAdamMathFunctor…>", "optimizer"),
        ("void at::native::reduce_kernel<512, 1, …>", "sums"),
        ("void at::native::vectorized_elementwise_kernel<4, AddFunctor>", "other elementwise"),
    ],
)
def test_kernels_have_a_kind(benchmark: Any, name: str, kind: str) -> None:
    assert benchmark("_gpu_kernels").kind_of(name) == kind


def test_the_time_of_no_kernel_is_between_kernels(benchmark: Any) -> None:
    module = benchmark("_gpu_kernels")
    spans = [(0, 10), (5, 3), (8, 4), (20, 5)]
    kernels = [module.Kernel("k", start, duration) for start, duration in spans]
    assert module._union(kernels) == 12 + 5


def test_made_up_steps_are_packed_and_full(benchmark: Any) -> None:
    shape = benchmark("_gpu_models").SHAPES["tiny"]
    make_step = benchmark("_gpu_batches").make_step
    for seed in range(20):
        small = make_step(shape, capacity=256, num_micro_batches=3, seed=seed)
        assert len(small.micro_batches) == 3

    step = make_step(shape, capacity=4096, num_micro_batches=3, seed=1)
    assert len(step.micro_batches) == 3
    assert 0.95 < step.num_tokens / (3 * 4096) <= 1
    trained = sum(int(batch.loss_mask.sum()) for batch in step.micro_batches)
    assert trained == step.report.content.num_trained_tokens
    assert 0.4 < trained / step.num_tokens < 0.65

    full = make_step(shape, capacity=512, num_micro_batches=2, seed=1, is_full=True)
    assert [batch.cu_seqlens.tolist() for batch in full.micro_batches] == [[0, 512], [0, 512]]


def test_a_wheel_without_folders_is_still_a_wheel(benchmark: Any, tmp_path: Path) -> None:
    wheel = tmp_path / "ray-1-py3-none-any.whl"
    server = zipfile.ZipInfo("ray/server")
    server.external_attr = 0o100755 << 16
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr(server, "program")
        file.writestr("ray/jars/a.jar", "java")
        file.writestr("ray/jarsmith.py", "kept")
        record = "ray/server,sha256=1,7\nray/jars/a.jar,sha256=2,4\nray/jarsmith.py,sha256=3,4\n"
        file.writestr("ray-1.dist-info/RECORD", record)

    benchmark("_slim_wheel").leave_out(wheel, ["ray/jars"])

    with zipfile.ZipFile(wheel) as file:
        assert set(file.namelist()) == {"ray/server", "ray/jarsmith.py", "ray-1.dist-info/RECORD"}
        assert "jars/" not in file.read("ray-1.dist-info/RECORD").decode()
        assert file.getinfo("ray/server").external_attr == 0o100755 << 16
