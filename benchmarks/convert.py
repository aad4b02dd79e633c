"""Converting a checkpoint, both ways, against copying the same bytes with `cp`, in the same run.

    python benchmarks/convert.py --gigabytes 2

A made-up Qwen3 in bfloat16, in files of 500 MB, is copied, converted to `torch_dist` and converted
back, in turn. A conversion waits until its files are on the disk: the copy does, too (`cp`, then
`sync`); `cp` by itself, which only fills the system's memory, is shown beside. Each direction has a
process of its own, which reports the most memory that it held (VmHWM: code and libraries too). The
time is that of the conversion, without the import of torch. The files that come back are compared
with the first ones. The ratios are what is claimed; the absolute numbers are the machine's.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from _common import Bar, add_check_flag, exit_where_missed, print_bars
from rich.console import Console
from rich.table import Table

CONVERSIONS = ("hf-to-megatron", "megatron-to-hf")
SHARD_BYTES = 500_000_000
CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 65_536,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
"""The widths of Qwen3-1.7B; as many layers as fill the size."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument(
        "--rounds", type=int, default=3, help="the fastest of each contender counts"
    )
    parser.add_argument(
        "--folder",
        help="where the checkpoints are made (default: the system's folder for such things)",
    )
    parser.add_argument("--min-ratio", type=float, default=0.33, help="of the copy's speed")
    parser.add_argument(
        "--max-resident-gigabytes", type=float, default=1.5, help="held by a conversion at most"
    )
    add_check_flag(parser)
    flags = parser.parse_args()

    with tempfile.TemporaryDirectory(prefix="miles-benchmark-", dir=flags.folder) as name:
        bars = _measure(Path(name), flags)
    print_bars(bars, Console(width=100))
    if flags.check:
        exit_where_missed(bars)


def _measure(folder: Path, flags: argparse.Namespace) -> list[Bar]:
    """Copy and convert a made-up model in rounds; print the speeds, and return the bars."""
    source = folder / "source"
    _in_a_process(_make, source, flags.gigabytes)
    num_bytes = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    targets = {
        "cp": folder / "copy",
        "hf-to-megatron": folder / "megatron",
        "megatron-to-hf": folder / "back",
    }
    seconds: dict[str, list[float]] = {label: [] for label in ("cp", "cp, then sync", *CONVERSIONS)}
    resident: dict[str, float] = {}

    with contextlib.ExitStack() as stack:
        pools = {label: stack.enter_context(_process()) for label in CONVERSIONS}
        # Memory and files are new in the first round, which does not count.
        for number in range(flags.rounds + 1):
            taken: dict[str, float] = {}
            for label, target in targets.items():
                if target.exists():
                    shutil.rmtree(target)
                if label == "cp":
                    taken["cp"], taken["cp, then sync"] = _copy(source, target)
                else:
                    arguments = (label, source, targets["hf-to-megatron"], target)
                    taken[label], resident[label] = pools[label].apply(_convert, arguments)
            for label in seconds if number else ():
                seconds[label].append(taken[label])

    same = subprocess.run(
        ["diff", "-r", source, targets["megatron-to-hf"]], capture_output=True, text=True
    )
    assert not same.returncode, same.stdout

    speeds = {label: num_bytes / min(rounds) for label, rounds in seconds.items()}
    _print_speeds(speeds, resident, num_bytes, flags.rounds)
    ratio = min(speeds[label] for label in CONVERSIONS) / speeds["cp, then sync"]
    gigabytes = max(resident.values()) / 1e9
    return [
        Bar("of the copy's speed", ratio, flags.min_ratio, is_lower=True),
        Bar("peak memory of a conversion, GB", gigabytes, flags.max_resident_gigabytes),
    ]


def _print_speeds(
    speeds: dict[str, float], resident: dict[str, float], num_bytes: int, num_rounds: int
) -> None:
    """Print bytes a second of each contender, and the most memory of those that convert."""
    table = Table(title=f"{num_bytes / 1e9:.2f} GB, the fastest of {num_rounds} rounds")
    for heading in ("", "GB/s", "/ (cp, then sync)", "/ cp", "peak memory, GB"):
        table.add_column(heading, justify="right" if heading else "left")
    for label, speed in speeds.items():
        ratios = [f"{speed / speeds[peer]:.2f}" for peer in ("cp, then sync", "cp")]
        table.add_row(
            label,
            f"{speed / 1e9:.2f}",
            *ratios,
            f"{resident[label] / 1e9:.2f}" if label in resident else "",
        )
    Console(width=100).print(table)


def _copy(source: Path, target: Path) -> tuple[float, float]:
    """Copy; return the seconds until `cp` returned, and until the copy was on the disk."""
    begin = time.perf_counter()
    subprocess.run(["cp", "-r", source, target], check=True)
    copied = time.perf_counter()
    subprocess.run(["sync", *target.iterdir()], check=True)
    return copied - begin, time.perf_counter() - begin


def _process() -> Any:
    """Start a process that can be given calls, with all that converting needs imported."""
    return multiprocessing.get_context("spawn").Pool(1, initializer=_import)


def _import() -> None:
    import miles.convert.hf_to_megatron
    import miles.convert.megatron_to_hf  # noqa: F401


def _in_a_process(function: Any, *arguments: Any) -> Any:
    with _process() as pool:
        return pool.apply(function, arguments)


def _convert(label: str, source: Path, megatron: Path, back: Path) -> tuple[float, float]:
    """Convert one way; return the seconds, and the most memory that was held."""
    from miles.convert.hf_to_megatron import hf_to_megatron
    from miles.convert.megatron_to_hf import megatron_to_hf

    begin = time.perf_counter()
    if label == "hf-to-megatron":
        hf_to_megatron(str(source), str(megatron))
    else:
        megatron_to_hf(str(megatron), str(source), str(back))
    return time.perf_counter() - begin, _peak_bytes()


def _peak_bytes() -> float:
    """Return the most memory that this process held, pages of mapped files too."""
    status = Path("/proc/self/status").read_text()
    return next(
        int(line.split()[1]) * 1024.0 for line in status.splitlines() if line.startswith("VmHWM")
    )


def _make(folder: Path, gigabytes: float) -> None:
    """Write a model of random weights."""
    import torch

    from miles.architecture.families import hf_shapes, shape_of
    from miles.convert.safetensors_files import ShardedWriter, Spec, index_text, split_into_files
    from miles.convert.safetensors_headers import INDEX

    def planned(num_layers: int) -> dict[str, Spec]:
        shape = shape_of({**CONFIG, "num_hidden_layers": num_layers}, "made up")
        return {name: Spec(torch.bfloat16, sizes) for name, sizes in hf_shapes(shape).items()}

    num_layers = 1
    while sum(tensor.num_bytes for tensor in planned(num_layers).values()) < gigabytes * 1e9:
        num_layers += 1
    tensors = planned(num_layers)
    files = split_into_files(tensors, SHARD_BYTES)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": num_layers}))
    writer = ShardedWriter(folder, tensors, files)
    generator = torch.Generator().manual_seed(0)
    for name, tensor in tensors.items():
        writer.write(name, torch.randn(tensor.shape, dtype=tensor.dtype, generator=generator))
    writer.close()
    if len(set(files.values())) > 1:
        (folder / INDEX).write_text(index_text(tensors, files))


if __name__ == "__main__":
    main()
