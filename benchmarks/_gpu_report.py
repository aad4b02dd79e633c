"""The results of benchmarks/gpu_train.py as tables in Markdown, for a terminal and for the docs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

MOST_KERNELS = 10


def print_results(results: Mapping[str, Any]) -> None:
    """Print every section that was measured."""
    print("\n".join(markdown(results)))


def markdown(results: Mapping[str, Any]) -> list[str]:
    """Return the lines of all sections that were measured."""
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    lines = [f"{results['device']}; {results['case']}; {versions}", ""]
    for name, section in SECTIONS.items():
        found = results.get(name)
        if found is None:
            continue
        if "error" in found:
            lines += [f"{name}: {found['error']}", ""]
            continue
        lines += [*section(found), ""]
    return lines


def _ceilings(found: Mapping[str, float]) -> Iterable[str]:
    product = found["matrix_product_flops"] / 1e12
    copy = found["copy_bytes_per_second"] / 1e12
    yield f"ceilings: {product:,.1f} TFLOP/s of a matrix product, {copy:.3f} TB/s of a copy"


def _step(found: Mapping[str, Any]) -> Iterable[str]:
    yield from _figures({"step": found})
    yield ""
    parts = ", ".join(
        f"{name} {seconds * 1e3:,.1f} ms" for name, seconds in found["split_seconds"].items()
    )
    yield f"parts of a step: {parts}"
    yield f"loss {found['first_loss']:.3f} -> {found['last_loss']:.3f}"


def _profile(found: Mapping[str, Any]) -> Iterable[str]:
    wall = found["wall_ms"]
    rows = [[kind, f"{ms:,.1f}", f"{ms / wall:.1%}"] for kind, ms in found["by_kind_ms"].items()]
    rows.append(["no kernel", f"{found['idle_ms']:,.1f}", f"{found['idle_ms'] / wall:.1%}"])
    yield from _table(
        [f"{found['num_kernels']:,} kernels of a profiled step", "ms", "of the step"], rows
    )
    yield ""
    rows = [
        [f"`{entry['kernel'][:70]}`", f"{entry['calls']:,}", f"{entry['ms']:,.1f}"]
        for entry in found["longest"][:MOST_KERNELS]
    ]
    yield from _table(["kernel", "calls", "ms"], rows)


def _peer(found: Mapping[str, Any]) -> Iterable[str]:
    yield from _figures({_PEERS.get(name, name): result for name, result in found.items()})
    yield ""
    ours = found["ours"].get("tokens_per_second")
    for name, result in found.items():
        if name != "ours" and ours and "error" not in result:
            yield f"ours / {name}: {ours / result['tokens_per_second']:.2f}"


_PEERS = {
    "liger": "transformers, Liger's kernels",
    "varlen": "transformers, varlen attention",
    "sdpa": "transformers, as it is",
}


def _switches(found: Mapping[str, Any]) -> Iterable[str]:
    base = found["all on"].get("median_seconds")
    rows = []
    for name, result in found.items():
        if "error" in result:
            rows.append([name, result["error"], "", ""])
            continue
        seconds = result["median_seconds"]
        ratio = f"{seconds / base:.3f}" if base else ""
        rows.append([name, f"{seconds * 1e3:,.1f}", ratio, _gib(result["peak_allocated"])])
    yield from _table(["switch", "ms a step", "times all on", "peak GiB"], rows)


def _further(found: Mapping[str, Any]) -> Iterable[str]:
    yield from _figures(found)


def _estimate(found: Mapping[str, Any]) -> Iterable[str]:
    rows = []
    for name, result in found.items():
        if "error" in result:
            rows.append([name, result["error"], "", ""])
            continue
        estimated, peak = result["estimated_bytes"], result["peak_allocated"]
        ratio = "" if peak is None else f"{peak / estimated:.2f}"
        rows.append([name, _gib(estimated), _gib(peak), ratio])
    yield from _table(["memory", "estimated GiB", "peak GiB", "peak / estimate"], rows)


def _figures(found: Mapping[str, Mapping[str, Any]]) -> Iterable[str]:
    rows = []
    for name, result in found.items():
        if "error" in result:
            rows.append([name, result["error"], *[""] * 7])
            continue
        rows.append(
            [
                name,
                "" if name == result["case"] else result["case"],
                f"{result['micro_batches']} x {result['tokens'] // result['micro_batches']:,}",
                f"{result['median_seconds'] * 1e3:,.1f}",
                f"{result['tokens_per_second']:,.0f}",
                f"{result['tflops']:,.2f}",
                _percent(result["mfu"]),
                _percent(result["of_matrix_product"]),
                _peak(result),
            ]
        )

    titles = ["", "case", "tokens", "ms a step", "tokens/s", "TFLOP/s", "MFU", "of product"]
    yield from _table([*titles, "peak (estimated) GiB"], rows)


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterable[str]:
    yield f"| {' | '.join(titles)} |"
    yield f"|{'---|' * len(titles)}"
    for row in rows:
        yield f"| {' | '.join(row)} |"


def _peak(result: Mapping[str, Any]) -> str:
    """Return the peak of a case, and what is estimated for it where that is known."""
    estimated = result.get("estimated_bytes")
    peak = _gib(result["peak_allocated"])
    return peak if estimated is None else f"{peak} ({_gib(estimated)})".strip()


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"


def _gib(num_bytes: int | None) -> str:
    return "" if num_bytes is None else f"{num_bytes / 2**30:.2f}"


SECTIONS = {
    "ceilings": _ceilings,
    "step": _step,
    "profile": _profile,
    "peer": _peer,
    "switches": _switches,
    "further": _further,
    "estimate": _estimate,
}
