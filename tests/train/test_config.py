"""Settings of a run that contradict one another are refused; the warm-up as a share of the run."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from miles.common.local_paths import absolute
from miles.data.config import DataConfig, EncodeConfig, OrderConfig, PackConfig, SourceConfig
from miles.errors import ConfigError
from miles.train.compute_config import ComputeConfig
from miles.train.config import ClusterConfig, TrainConfig
from miles.train.optimizer_settings import OptimizerSettings, check_schedule
from miles.train.precision import Precision
from miles.train.recompute_config import RecomputeConfig


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("some",), "--recompute-granularity must be one of full, selective, not 'some'"),
        (("full",), "--recompute-granularity full needs --recompute-method uniform or block"),
        (("full", "uniform"), "--recompute-num-layers of at least 1, not 'uniform' and None"),
        (("full", "uniform", 0), "of at least 1"),
        (("selective", "uniform", 1), "go with --recompute-granularity full"),
        ((None, None, 1), "go with --recompute-granularity full"),
    ],
)
def test_recomputation_is_said_in_full(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RecomputeConfig(*arguments)  # type: ignore[arg-type]


def test_a_warm_up_may_be_a_share_of_the_run() -> None:
    assert OptimizerSettings(lr_warmup_fraction=0.1).warmup_steps(250) == 25
    assert OptimizerSettings(lr_warmup_iters=7).warmup_steps(250) == 7
    with pytest.raises(ConfigError, match="say the same; give one of them"):
        OptimizerSettings(lr_warmup_iters=7, lr_warmup_fraction=0.1)
    with pytest.raises(ConfigError, match=r"must be in \[0, 1\), not 1"):
        OptimizerSettings(lr_warmup_fraction=1.0)
    with pytest.raises(ConfigError, match="is not shorter than the run, which has 7 steps"):
        check_schedule(OptimizerSettings(lr_warmup_iters=7), 7)


def test_the_precision_follows_from_the_device_unless_it_is_given() -> None:
    data = DataConfig((SourceConfig("a", ("a.jsonl",)),), OrderConfig(), EncodeConfig("t"))
    config = TrainConfig("hf", "megatron", "save", data)
    assert config.precision is None
    assert config.for_device(has_gpus=True).precision is Precision.BF16
    assert config.for_device(has_gpus=False).precision is Precision.FP32

    for bf16, precision in ((True, Precision.BF16), (False, Precision.FP32)):
        given = replace(config, bf16=bf16)
        assert given.precision is precision
        assert given.for_device(has_gpus=not bf16) == given


def test_an_export_has_a_folder_of_its_own() -> None:
    data = DataConfig((SourceConfig("a", ("a.jsonl",)),), OrderConfig(), EncodeConfig("t"))
    for save, save_hf in (
        ("run", "run/"),
        ("all/run", "all"),
        ("run", "../" + Path.cwd().name + "/run"),
        ("s3://bucket/all/run", "s3://bucket/all"),
    ):
        shown = f"--save-hf {absolute(save_hf)} is --save {absolute(save)}, or holds it"
        with pytest.raises(ConfigError, match=re.escape(shown)):
            TrainConfig("hf", "megatron", save, data, save_hf=save_hf)
    with pytest.raises(ConfigError, match=r"is --output-dir .*/all/logs, or holds it"):
        TrainConfig("hf", "megatron", "run", data, output_dir="all/logs", save_hf="all")

    for save_hf in ("run/hf", "run-hf", "run/{rollout_id}", "s3://bucket/run"):
        config = TrainConfig("hf", "megatron", "run", data, save_hf=save_hf)
        assert config.save_hf == absolute(save_hf)


@pytest.mark.parametrize(
    "save_hf",
    ["{bad}", "hf/{step}", "{rollout_id", "rollout_id}", "{}", "{{rollout_id}}", "{rollout_id:04}"],
)
def test_an_export_is_named_by_the_step_alone(save_hf: str) -> None:
    data = DataConfig((SourceConfig("a", ("a.jsonl",)),), OrderConfig(), EncodeConfig("t"))
    with pytest.raises(ConfigError, match=r"\{rollout_id\} is all that braces may hold here"):
        TrainConfig("hf", "megatron", "run", data, save_hf=save_hf)


def test_no_other_folder_is_named_by_the_step() -> None:
    data = DataConfig((SourceConfig("a", ("a.jsonl",)),), OrderConfig(), EncodeConfig("t"))
    with pytest.raises(ConfigError, match=r"--save .*/\{rollout_id\}: .* in --save-hf alone"):
        TrainConfig("hf", "megatron", "{rollout_id}", data)
    with pytest.raises(ConfigError, match=r"--output-dir .*/\{rollout_id\}: "):
        TrainConfig("hf", "megatron", "run", data, output_dir="logs/{rollout_id}")


def test_an_optimizer_that_needs_another_device_or_precision_is_refused() -> None:
    data = DataConfig((SourceConfig("a", ("a.jsonl",)),), OrderConfig(), EncodeConfig("t"))
    alone = OptimizerSettings(precision_aware=True)
    config = TrainConfig("hf", "megatron", "save", data, optimizer=alone)
    assert config.for_device(has_gpus=True).precision is Precision.BF16
    with pytest.raises(ConfigError, match="FusedAdam of Transformer Engine, which is for GPUs"):
        config.for_device(has_gpus=False)

    config = replace(config, optimizer=replace(alone, cpu_offload=True))
    assert replace(config, bf16=True).for_device(has_gpus=False).precision is Precision.BF16
    with pytest.raises(ConfigError, match="--optimizer-cpu-offload needs --bf16"):
        config.for_device(has_gpus=False)
    with pytest.raises(ConfigError, match="--optimizer-cpu-offload needs --bf16"):
        replace(config, bf16=False)


def test_float16_is_chosen_alone() -> None:
    data = DataConfig((SourceConfig("a", ("a.jsonl",)),), OrderConfig(), EncodeConfig("t"))
    config = TrainConfig("hf", "megatron", "save", data, fp16=True)
    assert config.precision is Precision.FP16
    assert config.for_device(has_gpus=False) == config
    for bf16, flag in ((True, "--bf16"), (False, "--no-bf16")):
        with pytest.raises(ConfigError, match=f"--fp16 and {flag} choose another precision"):
            replace(config, bf16=bf16)

    cluster = ClusterConfig(gpus_per_node=2, expert=2)
    with pytest.raises(ConfigError, match="--fp16 with --expert-model-parallel-size above 1"):
        replace(config, cluster=cluster)


def test_the_data_is_packed_for_the_ranks_that_there_are() -> None:
    data = DataConfig(
        (SourceConfig("a", ("a.jsonl",)),), OrderConfig(), EncodeConfig("t"), PackConfig(dp_size=4)
    )
    cluster = ClusterConfig(gpus_per_node=4, tensor=2)
    with pytest.raises(ConfigError, match="packed for 4 data-parallel ranks, but the layout has 2"):
        TrainConfig("hf", "megatron", "save", data, cluster=cluster)


def test_gathering_weights_brings_the_sums_of_gradients() -> None:
    """megatron-core gathers them beside each other only; a flag alone is enough."""
    gathered = ComputeConfig(overlap_param_gather=True)
    for has_gpus, ranks in ((False, 1), (True, 1), (True, 2)):
        resolved = gathered.resolved(has_gpus=has_gpus, data_parallel=ranks)
        assert (resolved.overlap_grad_reduce, resolved.overlap_param_gather) == (True, True)
    assert not ComputeConfig().resolved(has_gpus=False, data_parallel=2).overlap_grad_reduce
