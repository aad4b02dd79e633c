"""A few steps of a tiny model on ranks that stay alive, and the same steps in plain PyTorch."""

from __future__ import annotations

import copy
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from miles.architecture.adapter import PEFT_PREFIX, module_of, projection_sizes
from miles.architecture.config import ModelShape
from miles.architecture.families import read_shape
from miles.common import checkpoint_folder
from miles.convert.hf_to_megatron import hf_to_megatron
from miles.data.config import DataConfig, PackConfig
from miles.data.stream.feed import Feed
from miles.train.compute_config import ComputeConfig
from miles.train.config import ClusterConfig, TrainConfig
from miles.train.driver.group import TrainerGroup
from miles.train.lora_config import FULL, LoraConfig
from miles.train.optimizer_settings import OptimizerSettings
from miles.train.parallel_layout import Layout
from miles.train.recompute_config import RecomputeConfig
from miles.train.types import RankSetup, StartPoint
from tests.support.models import make_hf
from tests.support.plain_loop import train_plainly
from tests.support.run_numbers import Numbers
from tests.support.streams import config_of, demo_settings

NUM_STEPS = 6
OPTIMIZER = OptimizerSettings(lr=2e-3, min_lr=2e-4, lr_warmup_iters=2, weight_decay=0.1)

EVEN = 2048
ODD = 2049
"""Two tensor-parallel ranks add a row of padding to a vocabulary of so many tokens."""

MODELS = {
    "Qwen3, tied": ("qwen3", True, ODD),
    "Qwen3, untied": ("qwen3", False, EVEN),
    "Qwen2.5, tied": ("qwen2", True, EVEN),
    "Qwen2.5, untied": ("qwen2", False, ODD),
    "Llama 3, tied": ("llama", True, EVEN),
    "Llama 3, untied": ("llama", False, ODD),
    "Qwen3-MoE": ("qwen3_moe", False, ODD),
}
"""A name -> the model's family, whether its embeddings are tied, its vocabulary."""


ONE_RANK = Layout(1)
MAX_RANKS = 4
"""of a case"""

FAST = ComputeConfig(grouped_experts=True)
"""The ways of a GPU, as far as a CPU has them."""
PLAIN = ComputeConfig(
    attention_backend="local",
    transformer_impl="local",
    loss_chunk_size=0,
    loss_fusion=False,
    rope_fusion=False,
    packed_rope=False,
    norm_fusion=False,
    swiglu_fusion=False,
    grad_accumulation_fusion=False,
    adam_fusion=False,
    grouped_experts=False,
    overlap_grad_reduce=False,
    overlap_param_gather=False,
)
"""Every switch off."""
REDUCE = replace(FAST, overlap_grad_reduce=True, overlap_param_gather=False, ddp_bucket_size=1)
OVERLAP = replace(REDUCE, overlap_param_gather=True)
"""Each weight travels by itself: whatever does not wait for its own computes with an old one."""


@dataclass(frozen=True)
class Case:
    """A layout, a way to compute, and what else may not change the numbers."""

    layout: Layout = ONE_RANK
    max_tokens_per_gpu: int = 2048
    batch_size: int = 16
    recompute: RecomputeConfig = field(default_factory=RecomputeConfig)
    compute: ComputeConfig = FAST
    lora: LoraConfig = FULL
    balancing: float = 0.0
    """`--moe-aux-loss-coeff`"""

    @property
    def optimizer(self) -> OptimizerSettings:
        """Return the settings of the optimizer."""
        return replace(OPTIMIZER, moe_aux_loss_coeff=self.balancing)


REFERENCE = Case(compute=PLAIN)

LORA = LoraConfig(rank=4, alpha=16.0)
BALANCING = 0.1
"""The weight of the loss that balances experts, in the lines that are balanced."""


class Bench:
    """Trainers that stay alive, models as they are asked for, and one open feed.

    The first block of a feed holds more steps than are taken, and stays as long as none beyond it is
    needed: every model that takes the same data reads them from the same feed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.settings = demo_settings(folder, batch_size=16, num_epoch=1)
        self.everyone: TrainerGroup | None = None
        self.known: dict[tuple[str, Case], Numbers] = {}
        self.open_feed: tuple[DataConfig, Feed] | None = None

    def close(self) -> None:
        """Close the feed and end the trainers."""
        if self.everyone is not None:
            self.everyone.shut_down()
        if self.open_feed is not None:
            self.open_feed[1].close()

    def data(self, case: Case) -> DataConfig:
        """Return the data's configuration for a case."""
        config = config_of(self.settings)
        return replace(
            config,
            order=replace(config.order, batch_size=case.batch_size),
            pack=PackConfig(case.layout.data, case.max_tokens_per_gpu),
        )

    def model(self, name: str) -> tuple[Path, ModelShape, checkpoint_folder.SavedCheckpoint]:
        """Return a model's folder, its shape and its converted checkpoint; make them if need be."""
        hf, megatron = self.folder / "hf" / name, self.folder / "megatron" / name
        if not hf.exists():
            model_type, tied, vocab_size = MODELS[name]
            make_hf(hf, model_type, tied=tied, vocab_size=vocab_size)
            hf_to_megatron(str(hf), str(megatron))
        found = checkpoint_folder.find(str(megatron))
        assert found is not None
        return hf, read_shape(str(hf)), found

    def feed(self, data: DataConfig) -> Feed:
        """Return the feed of a configuration; close that of another one."""
        if self.open_feed is None or self.open_feed[0] != data:
            if self.open_feed is not None:
                self.open_feed[1].close()
            run_dir = tempfile.mkdtemp(dir=self.folder)
            num_ranks = data.pack.dp_size
            feed = Feed.open(
                data, cursor=None, cursor_path="", num_ranks=num_ranks, run_dir=run_dir
            )
            self.open_feed = (data, feed)
        return self.open_feed[1]

    def group(self, cluster: ClusterConfig) -> TrainerGroup:
        """Return as many trainers as a cluster has ranks: the first ones of those that are there."""
        if self.everyone is None:
            self.everyone = TrainerGroup(replace(cluster, gpus_per_node=MAX_RANKS), on_gpu=False)
        group = copy.copy(self.everyone)
        group._actors = self.everyone._actors[: cluster.world_size]
        return group

    def run(self, name: str, case: Case) -> Numbers:
        """Return the numbers of a model's steps on a layout."""
        if (name, case) not in self.known:
            self.known[name, case] = self._run(name, case)
        return self.known[name, case]

    def _run(self, name: str, case: Case) -> Numbers:
        hf, shape, found = self.model(name)
        cluster = ClusterConfig(
            gpus_per_node=case.layout.world_size,
            tensor=case.layout.tensor,
            pipeline=case.layout.pipeline,
            expert=case.layout.expert,
            expert_tensor=case.layout.expert_tensor,
            sequence_parallel=case.layout.sequence_parallel,
            timeout_minutes=3,
        )
        assert cluster.layout == case.layout
        data = self.data(case)
        config = TrainConfig(
            hf_checkpoint=str(hf),
            ref_load="",
            save="",
            data=data,
            optimizer=case.optimizer,
            recompute=case.recompute,
            compute=case.compute,
            lora=case.lora,
            cluster=cluster,
            bf16=False,
        )

        group, feed = self.group(cluster), self.feed(data)
        start = StartPoint(found, is_resume=False)
        setup = RankSetup.of(
            config, shape, start, num_steps=NUM_STEPS, num_sources=len(data.sources)
        )
        group.setup(setup)
        group.attach_feed(feed.handle, 0, NUM_STEPS)
        results = [group.train_step() for _ in range(NUM_STEPS)]

        assert not any(result.skip for result in results)
        numbers = Numbers([], [], [], [])
        for result in results:
            sums = zip(result.source_losses, result.source_tokens, strict=True)
            numbers.losses.append(result.loss)
            numbers.source_losses.append(tuple(loss / max(count, 1) for loss, count in sums))
            numbers.grad_norms.append(result.grad_norm)
            numbers.rates.append(result.lr)
            if case.balancing:
                numbers.balancing_losses.append(result.router.aux_loss)
        return numbers


def adapted(model: Any, shape: ModelShape) -> Any:
    """Return PEFT's model around one of transformers, with the adapter that a run begins with."""
    import peft

    from miles.train.model.adapters import initial_a

    adapter = LORA.adapter(shape)
    assert adapter is not None
    config = peft.LoraConfig(
        r=adapter.rank, lora_alpha=adapter.alpha, target_modules=list(adapter.targets)
    )
    model = peft.get_peft_model(model, config)
    tensors = {}
    for target in adapter.targets:
        _, num_in = projection_sizes(shape, target)
        for layer in range(shape.num_layers):
            name = f"{PEFT_PREFIX}{module_of(target).format(layer=layer)}.lora_A.weight"
            seed = TrainConfig.seed
            tensors[name] = initial_a(seed, layer, target, adapter.rank, num_in)
    assert not peft.set_peft_model_state_dict(model, tensors).unexpected_keys
    return model


def plain(hf: Path, config: DataConfig, case: Case) -> Numbers:
    """The same steps in plain PyTorch: transformers' model, each sample by itself."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32)
    if case.lora != FULL:
        model = adapted(model, read_shape(str(hf)))
    return train_plainly(model, config, case.optimizer, NUM_STEPS)
