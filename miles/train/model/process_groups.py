"""Join the process groups of a layout over TCP, and leave them for those of another layout."""

from __future__ import annotations

import datetime
import gc
import os
import socket
import sys

import torch

from miles.train.model import device
from miles.train.parallel_layout import Layout

LOCALHOST = "127.0.0.1"


def initialize(
    layout: Layout,
    rank: int,
    address: str,
    seed: int,
    timeout_minutes: float,
    listener: socket.socket | None = None,
) -> None:
    """Join the process groups and seed Megatron's random states. On a CPU: gloo; on a GPU: NCCL.

    Args:
        address: `tcp://host:port` of rank 0.
        timeout_minutes: how long a collective may wait before the run fails.
        listener: rank 0's socket, if it listens at the address already.
    """
    from megatron.core import parallel_state, tensor_parallel

    host, port = address.removeprefix("tcp://").rsplit(":", 1)
    timeout = datetime.timedelta(minutes=timeout_minutes)
    # The sockets of gloo and NCCL must be as local as the store.
    if host == LOCALHOST and sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")

    if rank == 0 and listener is None:
        listener = socket.create_server((host, int(port)))
    store = torch.distributed.TCPStore(
        host,
        int(port),
        is_master=rank == 0,
        timeout=timeout,
        wait_for_workers=False,
        # Without a socket of ours torch would listen on every address of the machine.
        master_listen_fd=None if listener is None else listener.detach(),
    )
    torch.distributed.init_process_group(
        "nccl" if device.has_gpu() else "gloo",
        store=store,
        rank=rank,
        world_size=layout.world_size,
        timeout=timeout,
    )

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=layout.expert_tensor,
    )
    assert parallel_state.get_data_parallel_rank() == layout.data_rank(rank)

    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


def shutdown() -> None:
    """Leave the process groups, so that another layout can be set up in this process.

    Drop the trainer first: a reference to a group keeps its threads alive, about fifty with gloo.
    """
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    # A trainer's modules refer to each other in circles, and to the groups.
    gc.collect()
