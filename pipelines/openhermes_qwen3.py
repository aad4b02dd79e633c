"""OpenHermes-2.5 on Qwen3-4B-Base, on one node of eight GPUs: the recipe of the README.

    python -m pipelines.openhermes_qwen3 --hf-checkpoint Qwen3-4B-Base --data messages/ \\
        --save run/
"""

from __future__ import annotations

import argparse

from miles.data.config import (
    DataConfig,
    EncodeConfig,
    OrderConfig,
    PackConfig,
    SourceConfig,
    StreamConfig,
)
from miles.train.config import ClusterConfig, TrainConfig
from miles.train.driver.loop import train
from miles.train.optimizer_settings import OptimizerSettings
from miles.train.recompute_config import RecomputeConfig


def config(hf_checkpoint: str, data: str, save: str, num_gpus: int = 8) -> TrainConfig:
    """Return the run: one epoch, 128 rows a step, a rate that falls from 1e-5 along a cosine.

    Args:
        hf_checkpoint: folder with config.json, tokenizer and the weights to begin from.
        data: folder that `miles prepare openhermes` wrote, or any files of rows.
        save: folder for the run's checkpoints.
        num_gpus: GPUs of the node, each a data-parallel rank.
    """
    max_tokens = 9216
    data_config = DataConfig(
        sources=(SourceConfig("openhermes", (data,)),),
        order=OrderConfig(batch_size=128, shuffle=True, num_epoch=1),
        encode=EncodeConfig(hf_checkpoint, max_sample_tokens=max_tokens),
        pack=PackConfig(dp_size=num_gpus, max_tokens_per_gpu=max_tokens),
        stream=StreamConfig(loader_cpus=8),
    )

    return TrainConfig(
        hf_checkpoint=hf_checkpoint,
        ref_load=None,
        save=save,
        data=data_config,
        save_interval=500,
        optimizer=OptimizerSettings(lr=1e-5, lr_decay_style="cosine", lr_warmup_iters=100),
        cluster=ClusterConfig(gpus_per_node=num_gpus),
        bf16=True,
        # Without recomputation the activations of a micro-batch take 34 GiB of each GPU
        # (miles train … --dry-run).
        recompute=RecomputeConfig("full", "uniform", 1),
    )


def main() -> None:
    """Train, with folders from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for flag in ("--hf-checkpoint", "--data", "--save"):
        parser.add_argument(flag, required=True)
    parser.add_argument("--num-gpus", type=int, default=8)
    flags = parser.parse_args()
    train(config(flags.hf_checkpoint, flags.data, flags.save, flags.num_gpus))


if __name__ == "__main__":
    main()
