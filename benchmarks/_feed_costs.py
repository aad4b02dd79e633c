"""The cost of a block of the stream in the feed's actor, by the number of data ranks.

    a block -> give: reports -> cut: a chunk for each node into the object store
            -> ask: a request of every rank, one node's by processes of their own, which read them

The actor is the feed's own, without a stream: it is given one block again and again. The ranks of
one node are real: each reads its chunk, and cuts its micro-batches. Those of all other nodes only
ask, from one process. What is measured is the CPU time of the actor's process.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from miles.data.config import DataConfig, PackConfig
from miles.data.files.manifest import Manifest, build_manifest
from miles.data.packing import shards
from miles.data.stream import stages
from miles.data.stream.feed_actor import FeedActor

NODE_RANKS = 8


class GivenFeed(FeedActor):
    """The feed's actor, given its blocks by hand."""

    def run_stream(self, manifest: Manifest, start_row: int) -> None:
        """Nothing comes by itself."""

    def give(self, block: pa.Table, first_step: int) -> float:
        """Take a block whose steps are numbered anew; return the CPU seconds."""
        steps = np.arange(first_step, first_step + block.num_rows)
        numbered = block.set_column(block.column_names.index("step"), "step", pa.array(steps))
        started = time.process_time()
        self.put(numbered)
        return time.process_time() - started

    def cut(self, step: int, nodes: Sequence[tuple[int, ...]]) -> float:
        """Cut and store the chunks of all nodes; return the CPU seconds."""
        started = time.process_time()
        content = self._ready.fetch(step, -1)
        for node in nodes:
            content.reference(node)
        return time.process_time() - started

    def cpu_seconds(self) -> float:
        """Return the CPU time of this process so far."""
        return time.process_time()


@ray.remote(num_cpus=0)
class Ranks:
    """Several ranks in one process, which ask one after another without waiting."""

    def ready(self) -> None:
        pass

    def ask(self, handle: Any, step: int, requests: Sequence[tuple[int, tuple[int, ...]]]) -> None:
        """Ask for a step.

        Args:
            requests: rank, and the data ranks of its node.
        """
        ray.get([handle.fetch.remote(step, rank, node) for rank, node in requests])

    def read(self, handle: Any, step: int, rank: int, node: tuple[int, ...]) -> float:
        """Ask for a step, and cut the rank's micro-batches; return the CPU seconds."""
        started = time.process_time()
        (reference,) = ray.get(handle.fetch.remote(step, rank, node))
        chunk = ray.get(reference)
        assert sum(1 for _ in shards.micro_batches(chunk, rank)) == len(chunk.reports)
        return time.process_time() - started


def block_of(config: DataConfig, num_bytes: int) -> list[pa.Table]:
    """Return ENCODED_STEP rows for a block of some size, made in this process."""
    manifest = build_manifest(config.sources)
    plan = stages.make_plan(manifest, config)
    formats = stages.source_formats(manifest)
    encoder = stages.encoder_of(config.encode)
    encoded: list[pa.Table] = []
    for raw in stages.read_window(manifest, plan, next(plan.windows(0)), 0):
        encoded.append(stages.encode_steps(raw, formats, encoder))
        if sum(table.nbytes for table in encoded) >= num_bytes:
            break
    return encoded


def start_ranks() -> list[Any]:
    """Start the processes of a node's ranks, and one more for the requests of all others."""
    processes = [Ranks.remote() for _ in range(NODE_RANKS + 1)]
    ray.get([process.ready.remote() for process in processes])
    return processes


def costs(
    config: DataConfig,
    encoded: Sequence[pa.Table],
    processes: Sequence[Any],
    num_ranks: int,
    node_ranks: int,
    rounds: int,
) -> dict[str, float]:
    """Measure a number of data ranks, so many to a node.

    Args:
        processes: of `start_ranks`.

    Returns:
        The block's tokens and bytes; CPU milliseconds of the feed for a block: to take it, to cut
        and store it for all nodes, and for all requests; of a request; and of a rank that reads.
        Medians of the rounds; a first one is not counted.
    """
    block = pa.concat_tables(
        [stages.pack_steps(table, PackConfig(dp_size=num_ranks)) for table in encoded]
    ).combine_chunks()
    actor = ray.remote(
        num_cpus=0, max_concurrency=num_ranks + 4, concurrency_groups={"clock": 1, "gate": 1}
    )(GivenFeed)
    handle = actor.remote(build_manifest(config.sources), config, 0, num_ranks)
    local = min(node_ranks, num_ranks)
    readers = processes[: min(NODE_RANKS, num_ranks)]
    others = processes[-1]

    nodes = []
    for first in range(0, num_ranks, local):
        nodes.append(tuple(range(first, first + local)))
    requests = [(rank, nodes[rank // local]) for rank in range(len(readers), num_ranks)]
    reference = ray.put(block)
    found = []
    for number in range(rounds + 1):
        step = number * block.num_rows
        give = ray.get(handle.give.remote(reference, step))
        cut = ray.get(handle.cut.remote(step, nodes))
        before = ray.get(handle.cpu_seconds.remote())
        asked = others.ask.remote(handle, step, requests)
        reads = []
        for rank, reader in enumerate(readers):
            reads.append(reader.read.remote(handle, step, rank, nodes[rank // local]))
        ray.get(asked)
        read = float(np.mean(ray.get(reads)))
        asking = ray.get(handle.cpu_seconds.remote()) - before
        ray.get(handle.begin.options(num_returns=1).remote(step + block.num_rows - 1))
        found.append((give, cut, asking, asking / num_ranks, read))
    ray.kill(handle)

    names = ("take", "cut", "ask", "request", "read")
    middle = np.median(np.array(found[1:]), axis=0) * 1e3
    return {
        "num_tokens": sum(len(ids) for ids in block["input_ids"]),
        "num_bytes": block.nbytes,
        "num_rows": int(np.sum(block["num_rows"].to_numpy())),
        **{f"{name}_ms": float(value) for name, value in zip(names, middle, strict=True)},
    }
