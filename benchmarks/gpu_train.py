"""The training step on a GPU, against the chip's ceilings and against transformers.

    python benchmarks/gpu_train.py --json step.json

One process, without Ray: `Trainer.train_step` on a model with random weights and on packed samples
of real lengths. The model is the largest that fits on the card. Sections:

- ceilings: a large matrix product in bfloat16, and a large copy
- step: tokens/s, TFLOP/s, MFU, peak memory, and the time of forward, backward and optimizer
- profile: where the time goes, by kind of kernel
- peer: the same model and tokens by transformers
- switches: each switch of `miles.train.compute_config` off in turn, against all on
- further: other models and sizes, as far as they fit
- estimate: the memory that `--dry-run` estimates against the peak that is measured

Without a GPU a tiny model is taken, which shows that everything runs and nothing else. Whatever
fails is stated in its place, and the rest goes on.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from miles.train.rank.environment import variables_to_set
from miles.train.types import RankEnvironment

# A rank's environment, before torch is imported.
os.environ.update(variables_to_set(RankEnvironment(has_gpu=True), os.environ, has_nvlink=None))
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from _gpu_batches import MadeUpStep, make_step
from _gpu_kernels import ceilings, profile, synchronize
from _gpu_models import RECOMPUTE_LAYERS, SHAPES, Case, further_cases, main_case
from _gpu_peer import WAYS, Peer
from _gpu_report import print_results

from miles.train.compute_config import AS_USUAL, ComputeConfig
from miles.train.estimate.flops import peak_flops, training_flops
from miles.train.model import device
from miles.train.optimizer_settings import OptimizerSettings
from miles.train.parallel_layout import Layout
from miles.train.precision import Precision
from miles.train.recompute_config import KEEP_ALL
from miles.train.types import TrainerSettings

SECTIONS = ("ceilings", "step", "profile", "peer", "switches", "further", "estimate")
TOKENS_OF_STEP = 65_536
SHORT_STEP = 32_768
"""Tokens of a step where many ways are compared."""
PEER_TOKENS = 9_216
PRECISION = Precision.BF16
OUT_OF_MEMORY = "out of memory"

Measurement = Callable[[], dict[str, Any]]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--section", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--model", choices=SHAPES, help="default: the largest that fits")
    parser.add_argument("--tokens", type=int, help="of a full micro-batch; with --model")
    parser.add_argument("--layers", type=int, help="fewer than the model's; with --model")
    parser.add_argument("--micro-batches", type=int, help="of a step")
    parser.add_argument(
        "--full-samples",
        action="store_true",
        help="samples as long as the micro-batch; with --model",
    )
    parser.add_argument("--recompute", action="store_true", help="every layer; with --model")
    parser.add_argument("--steps", type=int, default=8, help="timed steps of the main case")
    parser.add_argument("--budget", type=float, default=150, help="seconds; nothing begins later")
    parser.add_argument("--json", type=Path, help="written after each section")
    flags = parser.parse_args()

    bench = Benchmark(flags)
    bench.run()
    print_results(bench.results)


class Benchmark:
    """The sections of one process, and what they have found so far."""

    def __init__(self, flags: argparse.Namespace) -> None:
        self.flags = flags
        self.started = time.monotonic()
        self.card_bytes: int | None = None
        if device.has_gpu():
            self.card_bytes = torch.cuda.get_device_properties(0).total_memory
        self.main = main_case(self.card_bytes)
        if flags.model is not None:
            tokens = flags.tokens or self.main.num_tokens
            recompute = RECOMPUTE_LAYERS if flags.recompute else KEEP_ALL
            self.main = Case(flags.model, tokens, flags.layers, recompute, flags.full_samples)
        self.results: dict[str, Any] = _machine()
        self.results["case"] = self.main.name
        self.ceiling: float | None = None

    @property
    def left_seconds(self) -> float:
        return self.flags.budget - (time.monotonic() - self.started)

    def run(self) -> None:
        """Run the sections in turn; one that fails leaves its error in its place."""
        start_rank()
        self.results["seconds_to_start"] = time.monotonic() - self.started
        sections: dict[str, Callable[[], Any]] = {
            "ceilings": self._ceilings,
            "step": self._step,
            "profile": self._profile,
            "peer": self._peer,
            "switches": self._switches,
            "further": self._further,
            "estimate": self._estimate,
        }

        for name in self.flags.section:
            started = time.monotonic()
            if self.left_seconds <= 0:
                self.results[name] = {"error": "no time was left"}
            else:
                self.results[name] = attempt(sections[name])
            self.results.setdefault("seconds", {})[name] = time.monotonic() - started
            self._write()

    def _write(self) -> None:
        if self.flags.json is not None:
            draft = self.flags.json.with_suffix(".draft")
            draft.write_text(json.dumps(self.results, indent=1))
            draft.replace(self.flags.json)

    def _ceilings(self) -> dict[str, float]:
        found = ceilings(is_tiny=self.card_bytes is None)
        self.ceiling = found["matrix_product_flops"]
        return found

    def _step(self) -> dict[str, Any]:
        return self._measure(self.main, self.flags.steps)

    def _profile(self) -> dict[str, Any]:
        step = self._make_step(self.main)
        run = OurRun(self.main, AS_USUAL)
        for _ in range(2):
            run.step(step)
        return profile(lambda: run.step(step))

    def _peer(self) -> dict[str, Any]:
        """Time the peers, with micro-batches that leave room for what they keep."""
        case = replace(self.main, num_tokens=min(self.main.num_tokens, PEER_TOKENS))
        ways: dict[str, Measurement] = {
            "ours": partial(self._measure, case, 4, tokens_of_step=SHORT_STEP)
        }
        for way in WAYS:
            ways[way] = partial(self._measure_peer, case, way)
        return self._each("peer", ways)

    def _measure_peer(self, case: Case, way: str) -> dict[str, Any]:
        """Time a peer; where its activations do not fit, with half the tokens."""
        while True:
            step = self._make_step(case, SHORT_STEP)
            try:
                seconds = time_peer(case, way, step)
            except torch.cuda.OutOfMemoryError:
                if case.num_tokens < 2048:
                    raise
            else:
                return self._figures(case, step, seconds)
            free()
            case = replace(case, num_tokens=case.num_tokens // 2)

    def _switches(self) -> dict[str, Any]:
        is_moe = self.main.shape.num_experts is not None
        settings = {"all on": AS_USUAL, **switched_off(is_moe=is_moe)}
        runs: dict[str, Measurement] = {}
        for name, compute in settings.items():
            runs[name] = partial(self._measure, self.main, 3, compute, SHORT_STEP)
        return self._each("switches", runs)

    def _further(self) -> dict[str, Any]:
        runs: dict[str, Measurement] = {}
        for case in further_cases(self.card_bytes, self.main):
            runs[case.name] = partial(self._measure, case, 3, tokens_of_step=SHORT_STEP)
        return self._each("further", runs)

    def _estimate(self) -> dict[str, Any]:
        """Compare estimate and peak of cases with fewer layers, after two steps each."""
        runs: dict[str, Measurement] = {}
        for case in estimate_cases(self.main):
            runs[case.name] = partial(self._measure, case, 1, tokens_of_step=2 * case.num_tokens)
        return self._each("estimate", runs)

    def _each(self, section: str, runs: Mapping[str, Measurement]) -> dict[str, Any]:
        """Return the results of a section's runs, as many as the budget allows.

        Each is written as it ends: a process that is ended in the middle leaves the others.
        """
        found: dict[str, Any] = {}
        self.results[section] = found
        for name, measure in runs.items():
            if self.left_seconds <= 0:
                break
            found[name] = attempt(measure)
            self._write()
        return found

    def _measure(
        self,
        case: Case,
        num_steps: int,
        compute: ComputeConfig = AS_USUAL,
        tokens_of_step: int = TOKENS_OF_STEP,
    ) -> dict[str, Any]:
        """Time steps of a case with the project's own trainer."""
        step = self._make_step(case, tokens_of_step)
        run = OurRun(case, compute)
        reset_peak()
        seconds = time_steps(lambda: run.step(step), 2, num_steps)
        return self._figures(case, step, seconds) | {
            "allocated_before": run.bytes_before,
            "estimated_bytes": case.estimated_bytes(PRECISION),
            "split_seconds": run.split_seconds(),
            "first_loss": run.losses[0],
            "last_loss": run.losses[-1],
            "grad_norm": run.grad_norm,
        }

    def _make_step(self, case: Case, tokens_of_step: int = TOKENS_OF_STEP) -> MadeUpStep:
        number = self.flags.micro_batches
        if number is None:
            number = 2 if self.card_bytes is None else max(tokens_of_step // case.num_tokens, 1)
        return make_step(
            case.shape,
            capacity=case.num_tokens,
            num_micro_batches=number,
            seed=17,
            is_full=case.is_full,
        )

    def _figures(self, case: Case, step: MadeUpStep, seconds: list[float]) -> dict[str, Any]:
        """Return the figures of a case's timed steps."""
        median = statistics.median(seconds)
        flops = training_flops(case.shape, step.num_tokens, step.num_causal_pairs)
        peak = peak_flops(device.gpu_name() or "")

        return {
            "case": case.name,
            "tokens_of_micro_batch": case.num_tokens,
            "micro_batches": len(step.micro_batches),
            "rows": step.report.content.num_samples,
            "tokens": step.num_tokens,
            "trained_tokens": step.report.content.num_trained_tokens,
            "seconds": seconds,
            "median_seconds": median,
            "tokens_per_second": step.num_tokens / median,
            "tflops": flops / median / 1e12,
            "mfu": None if peak is None else flops / median / peak,
            "of_matrix_product": None if self.ceiling is None else flops / median / self.ceiling,
            **peak_memory(),
        }


class OurRun:
    """The project's trainer of a case, and the time of the parts of its steps."""

    def __init__(self, case: Case, compute: ComputeConfig) -> None:
        from miles.train.rank.trainer import Trainer

        free()
        self.bytes_before = allocated_bytes()
        settings = TrainerSettings(
            case.shape,
            Layout(1),
            OptimizerSettings(lr=1e-5),
            num_steps=1000,
            num_sources=1,
            precision=PRECISION,
            recompute=case.recompute,
            compute=compute,
        )
        self.trainer = Trainer(settings, rank=0)
        self.losses: list[float] = []
        self.grad_norm = float("nan")
        self._marks: list[list[tuple[str, Any]]] = []
        self._watch()

    def step(self, step: MadeUpStep) -> None:
        """Train on a step, whose loss must be a number."""
        self._marks.append([])
        self._mark("begin")
        result = self.trainer.train_step(step.report, step.micro_batches)
        self._mark("end")
        assert result.skip is None, result.skip
        self.losses.append(result.loss)
        self.grad_norm = result.grad_norm

    def _watch(self) -> None:
        """Mark where a forward pass begins and ends, and where the optimizer begins."""
        self.trainer.model.register_forward_pre_hook(lambda *_: self._mark("forward"))
        self.trainer.model.register_forward_hook(lambda *_: self._mark("forward ends"))
        optimizer = self.trainer.optimizer
        prepare = optimizer.prepare_grads

        def marked() -> Any:
            self._mark("optimizer")
            return prepare()

        optimizer.prepare_grads = marked

    def _mark(self, name: str) -> None:
        mark: Any = time.perf_counter()
        if device.has_gpu():
            mark = torch.cuda.Event(enable_timing=True)
            mark.record()
        self._marks[-1].append((name, mark))

    def split_seconds(self) -> dict[str, float]:
        """Return the seconds of the parts of the last step, as the device saw them.

        The output layer's gradients may be computed in the forward pass, with the loss.
        """
        synchronize()
        marks = self._marks[-1]
        first_forward = next(mark for name, mark in marks if name == "forward")
        optimizer = next((mark for name, mark in marks if name == "optimizer"), marks[-1][1])
        starts = [mark for name, mark in marks if name == "forward"]
        ends = [mark for name, mark in marks if name == "forward ends"]

        forward = sum(_between(start, end) for start, end in zip(starts, ends, strict=True))
        return {
            "before": _between(marks[0][1], first_forward),
            "forward": forward,
            "backward": _between(first_forward, optimizer) - forward,
            "optimizer": _between(optimizer, marks[-1][1]),
        }


def _between(start: Any, end: Any) -> float:
    """Return the seconds from one mark to another."""
    if device.has_gpu():
        return start.elapsed_time(end) / 1e3
    return end - start


def time_peer(case: Case, way: str, step: MadeUpStep) -> list[float]:
    """Return the seconds of some steps of the peer."""
    peer = Peer(case.shape, way)
    reset_peak()
    try:
        return time_steps(lambda: peer.train_step(step), 2, 4)
    finally:
        peer.close()


def time_steps(step: Callable[[], Any], num_warm_up: int, num_steps: int) -> list[float]:
    """Return the seconds of some steps after a warm-up."""
    for _ in range(num_warm_up):
        step()
    synchronize()

    seconds = []
    for _ in range(num_steps):
        started = time.perf_counter()
        step()
        synchronize()
        seconds.append(time.perf_counter() - started)
    return seconds


def switched_off(*, is_moe: bool) -> dict[str, ComputeConfig]:
    """Return each setting of `ComputeConfig` that has an effect here, off and the others on."""
    found: dict[str, ComputeConfig] = {}
    for field in fields(ComputeConfig):
        is_default_on = getattr(AS_USUAL, field.name) is True
        if is_default_on or (field.name == "grouped_experts" and is_moe):
            found[f"{field.name} off"] = replace(AS_USUAL, **{field.name: False})
    found["loss_chunk_size 0"] = replace(AS_USUAL, loss_chunk_size=0)
    everything = {name.removesuffix(" off"): False for name in found if name.endswith(" off")}
    # The sum of all first, in case that the budget does not suffice for each.
    return {"all off": replace(AS_USUAL, loss_chunk_size=0, **everything), **found}


def estimate_cases(main: Case) -> list[Case]:
    """Return cases of few layers, with and without recomputation, at two sizes."""
    few = replace(main, num_layers=max(main.shape.num_layers // 4, 1))
    half = replace(few, num_tokens=few.num_tokens // 2)
    return [few, half, replace(few, recompute=RECOMPUTE_LAYERS)]


def attempt(section: Callable[[], Any]) -> Any:
    """Return the result of a section, or its error."""
    try:
        return section()
    except torch.cuda.OutOfMemoryError:
        return {"error": OUT_OF_MEMORY}
    except Exception as error:
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"[:500]}
    finally:
        free()


def start_rank() -> None:
    """Make this process the only rank of a run."""
    import socket

    from miles.train.rank import rank_process

    listener = socket.create_server(("127.0.0.1", 0))
    address = f"tcp://127.0.0.1:{listener.getsockname()[1]}"
    rank_process.start_rank(Layout(1), 0, address, seed=7, timeout_minutes=5, listener=listener)


def free() -> None:
    """Give the memory of what is no longer used back to the card."""
    gc.collect()
    if device.has_gpu():
        torch.cuda.empty_cache()


def reset_peak() -> None:
    if device.has_gpu():
        torch.cuda.reset_peak_memory_stats()


def allocated_bytes() -> int:
    return torch.cuda.memory_allocated() if device.has_gpu() else 0


def peak_memory() -> dict[str, int | None]:
    """Return the most memory that tensors took, and that torch took from the card, in bytes."""
    if not device.has_gpu():
        return {"peak_allocated": None, "peak_reserved": None}
    return {
        "peak_allocated": torch.cuda.max_memory_allocated(),
        "peak_reserved": torch.cuda.max_memory_reserved(),
    }


def _machine() -> dict[str, Any]:
    """Return the card and the versions."""
    from importlib.metadata import PackageNotFoundError, version

    def of(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    packages = ("torch", "triton", "megatron-core", "transformers", "liger-kernel")
    return {
        "device": device.gpu_name() or "CPU",
        "versions": {package: of(package) for package in packages},
    }


if __name__ == "__main__":
    main()
