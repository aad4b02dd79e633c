"""The parser of `miles train`: every flag, with its unit and default. Defaults are those of the records."""

from __future__ import annotations

import argparse
from typing import NoReturn

from miles.data.config import (
    ROLE_NAMES,
    ROW_FIELDS,
    DataConfig,
    EncodeConfig,
    OrderConfig,
    PackConfig,
    RowFormat,
    StreamConfig,
)
from miles.errors import ConfigError
from miles.train.config import (
    ClusterConfig,
    EvalConfig,
    LoggingConfig,
    OptimizerSettings,
    RecomputeConfig,
    TrainConfig,
)
from miles.train.launch.launch_line import ALWAYS, ONE_VALUE, SIZES, SWITCHES, flag_of
from miles.train.launch.values import json_object


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see {self.prog} --help")


def build_parser() -> argparse.ArgumentParser:
    """The parser of `miles train`; defaults are those of the dataclasses that the values go into."""
    parser = _Parser(
        prog="miles train",
        allow_abbrev=False,
        usage="%(prog)s [--config YAML] --hf-checkpoint DIR --prompt-data PATH --save DIR [flag ...]",
        description="Fine-tune. Flags have Miles's names; docs/flags.md lists them all.",
    )
    parser.add_argument(
        "--config", metavar="YAML", help="flags from a YAML mapping (names with _ or -)"
    )
    _add_data(parser)
    _add_files(parser)
    _add_evaluation(parser)
    _add_layout(parser)
    _add_cluster(parser)
    _add_optimizer(parser)
    _add_logging(parser)
    _add_fixed(parser)
    _add_model(parser)
    return parser


def _add_data(parser: argparse.ArgumentParser) -> None:
    data = parser.add_argument_group("data")
    data.add_argument(
        "--prompt-data",
        nargs="+",
        metavar="PATH",
        help="rows: one path, or NAME PATH pairs for a mixture (required)",
    )
    data.add_argument(
        "--prompt-data-weights",
        nargs="+",
        type=float,
        default=[],
        metavar="WEIGHT",
        help="one a source, on any scale: its share of every step (default: all rows once an epoch)",
    )
    data.add_argument(
        "--input-key", metavar="COLUMN", help="column of the conversation (default: found)"
    )
    data.add_argument("--tool-key", metavar="COLUMN", help="column of the tools (default: tools)")
    data.add_argument(
        "--row-shape",
        default=RowFormat.shape,
        metavar="SHAPE",
        help=f"{', '.join(ROW_FIELDS)}; auto: found from the first rows of each source (default: %(default)s)",
    )
    data.add_argument(
        "--column-names",
        type=json_object,
        default={},
        metavar="JSON",
        help='field of the row shape -> column, such as {"prompt": "question"}; others: usual names',
    )
    data.add_argument(
        "--role-names",
        type=json_object,
        default={},
        metavar="JSON",
        help=f"role in the rows -> {', '.join(ROLE_NAMES)}; beside the known ones",
    )
    data.add_argument(
        "--rollout-shuffle",
        action="store_true",
        help="shuffle by seed and epoch (default: file order)",
    )
    data.add_argument(
        "--rollout-seed",
        type=int,
        default=OrderConfig.seed,
        metavar="SEED",
        help="of the shuffle (default: %(default)s)",
    )
    data.add_argument(
        "--shuffle-window",
        type=int,
        default=OrderConfig.window_rows,
        metavar="ROWS",
        help="rows shuffled among each other (default: %(default)s)",
    )
    data.add_argument(
        "--drop-last", action="store_true", help="leave out the short step at an epoch's end"
    )
    data.add_argument(
        "--num-epoch",
        type=int,
        default=OrderConfig.num_epoch,
        metavar="N",
        help="times over the rows (default: %(default)s)",
    )
    data.add_argument(
        "--num-rollout", type=int, metavar="STEPS", help="a limit in steps (default: none)"
    )
    data.add_argument(
        "--rollout-batch-size",
        type=int,
        metavar="ROWS",
        help=f"rows of the input in one step, which is one optimizer step (default: {OrderConfig.batch_size})",
    )
    data.add_argument(
        "--global-batch-size",
        type=int,
        metavar="ROWS",
        help="the same number (default: --rollout-batch-size)",
    )
    data.add_argument(
        "--max-tokens-per-gpu",
        type=int,
        default=PackConfig.max_tokens_per_gpu,
        metavar="TOKENS",
        help="of a micro-batch: as many as fit into memory (default: %(default)s)",
    )
    data.add_argument(
        "--max-sample-tokens",
        type=int,
        metavar="TOKENS",
        help="of a sample; see --too-long (default: --max-tokens-per-gpu)",
    )
    data.add_argument(
        "--chat-template-path",
        metavar="FILE",
        help="a Jinja file in place of the tokenizer's own template",
    )
    data.add_argument(
        "--apply-chat-template-kwargs",
        type=json_object,
        default={},
        metavar="JSON",
        help='what the template is given beside the messages, such as {"enable_thinking": false}',
    )
    data.add_argument(
        "--loss-mask-type",
        default="auto",
        metavar="TYPE",
        help="auto: learned from the template and certified; qwen and qwen3 mean the same (default: %(default)s)",
    )
    data.add_argument(
        "--loss-mask-turns",
        default=EncodeConfig.turns,
        metavar="TURNS",
        help="assistant turns that are trained: all, last, or flags: only those that a row flags "
        "(default: %(default)s); a turn that a row flags 0 never is",
    )
    data.add_argument(
        "--empty-think",
        default=EncodeConfig.empty_think,
        metavar="POLICY",
        help="an empty think block that the template puts before an answer: mask or train (default: %(default)s)",
    )
    data.add_argument(
        "--history",
        default=EncodeConfig.history,
        metavar="POLICY",
        help="earlier turns that a template changes: as_served, as it renders them (default: %(default)s)",
    )
    data.add_argument(
        "--special-text",
        default=EncodeConfig.special_text,
        metavar="POLICY",
        help="content that spells a control token: allow, it becomes that token; escape, ordinary text; reject "
        "(default: %(default)s)",
    )
    data.add_argument(
        "--too-long",
        default=EncodeConfig.too_long,
        metavar="POLICY",
        help="a row over --max-sample-tokens: drop, truncate_end or error (default: %(default)s)",
    )
    data.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run code that the tokenizer's folder brings with it",
    )
    data.add_argument(
        "--max-bad-fraction",
        type=float,
        default=DataConfig.max_bad_fraction,
        metavar="SHARE",
        help="a larger share of dropped rows ends the run (default: %(default)s)",
    )
    data.add_argument(
        "--max-bad-rows-in-a-row",
        type=int,
        default=DataConfig.max_bad_rows_in_a_row,
        metavar="ROWS",
        help="so many dropped rows one after the other end the run (default: %(default)s)",
    )
    data.add_argument(
        "--loader-cpus",
        type=int,
        default=StreamConfig.loader_cpus,
        metavar="CPUS",
        help="CPUs that read, encode and pack (default: %(default)s)",
    )
    data.add_argument(
        "--prefetch-steps",
        type=int,
        default=StreamConfig.prefetch_steps,
        metavar="STEPS",
        help="steps that are held ready (default: %(default)s)",
    )


def _add_files(parser: argparse.ArgumentParser) -> None:
    files = parser.add_argument_group("checkpoints and the run's folder")
    files.add_argument(
        "--hf-checkpoint",
        metavar="DIR",
        help="config.json and the tokenizer (URL or local; required)",
    )
    files.add_argument(
        "--ref-load", metavar="DIR", help="torch_dist checkpoint to start from (default: --load)"
    )
    files.add_argument(
        "--load", metavar="DIR", help="a run's checkpoints to go on from (default: --save)"
    )
    files.add_argument(
        "--save", metavar="DIR", help="where checkpoints go; one there is gone on from (required)"
    )
    files.add_argument(
        "--save-interval",
        type=int,
        default=TrainConfig.save_interval,
        metavar="STEPS",
        help="steps between checkpoints; 0: only after the last (default: %(default)s)",
    )
    files.add_argument(
        "--save-hf",
        metavar="DIR",
        help="the weights in Hugging Face's format, after the last step; with {rollout_id} in it, at each checkpoint",
    )
    files.add_argument(
        "--keep-last", type=int, metavar="N", help="newest checkpoints that stay (default: all)"
    )
    files.add_argument(
        "--keep-best",
        type=int,
        metavar="N",
        help="checkpoints of the lowest evaluation loss that stay beside them",
    )
    files.add_argument(
        "--on-save-error",
        default=TrainConfig.on_save_error,
        metavar="POLICY",
        help="a checkpoint that cannot be written: end, or continue without it (default: %(default)s)",
    )
    files.add_argument(
        "--output-dir",
        default="",
        metavar="DIR",
        help="the run's folder: metrics, config, first batch, rejects (default: --save)",
    )


def _add_evaluation(parser: argparse.ArgumentParser) -> None:
    evaluation = parser.add_argument_group("evaluation")
    evaluation.add_argument(
        "--eval-prompt-data",
        nargs="+",
        default=[],
        metavar="PATH",
        help="rows to evaluate on; as --prompt-data",
    )
    evaluation.add_argument(
        "--eval-fraction",
        type=float,
        default=DataConfig.held_out_fraction,
        metavar="SHARE",
        help="in its place: a share of the training rows, chosen by a hash of what they say; not trained on",
    )
    evaluation.add_argument(
        "--eval-interval",
        type=int,
        metavar="STEPS",
        help="steps between evaluations (default: after the last only)",
    )
    evaluation.add_argument(
        "--eval-samples",
        type=int,
        default=EvalConfig.num_samples,
        metavar="N",
        help="greedy answers that each evaluation writes to eval_samples.jsonl (default: %(default)s)",
    )
    evaluation.add_argument(
        "--eval-max-response-len",
        type=int,
        default=EvalConfig.max_response_tokens,
        metavar="TOKENS",
        help="where such an answer is cut (default: %(default)s)",
    )


def _add_layout(parser: argparse.ArgumentParser) -> None:
    layout = parser.add_argument_group("parallelism")
    layout.add_argument(
        "--tensor-model-parallel-size",
        type=int,
        default=ClusterConfig.tensor,
        metavar="RANKS",
        help="ranks that share each layer's matrices (default: %(default)s)",
    )
    layout.add_argument(
        "--sequence-parallel",
        action="store_true",
        help="norms on a part of the tokens of each tensor rank",
    )
    layout.add_argument(
        "--pipeline-model-parallel-size",
        type=int,
        default=ClusterConfig.pipeline,
        metavar="RANKS",
        help="stages of layers (default: %(default)s)",
    )
    layout.add_argument(
        "--expert-model-parallel-size",
        type=int,
        default=ClusterConfig.expert,
        metavar="RANKS",
        help="ranks over which a layer's experts are spread (default: %(default)s)",
    )
    layout.add_argument(
        "--expert-tensor-parallel-size",
        type=int,
        default=ClusterConfig.expert_tensor,
        metavar="RANKS",
        help="ranks that share each expert's matrices (default: the tensor size)",
    )
    layout.add_argument(
        "--recompute-granularity",
        default=RecomputeConfig.granularity,
        metavar="WHAT",
        help="activations computed again in the backward pass: selective (in attention) or full (default: none)",
    )
    layout.add_argument(
        "--recompute-method",
        default=RecomputeConfig.method,
        metavar="HOW",
        help="of full: uniform (every N layers are a piece) or block (a stage's first N layers)",
    )
    layout.add_argument(
        "--recompute-num-layers", type=int, metavar="N", help="layers, see --recompute-method"
    )
    layout.add_argument(
        "--bf16", action="store_true", help="compute in bfloat16 (default: float32)"
    )


def _add_cluster(parser: argparse.ArgumentParser) -> None:
    cluster = parser.add_argument_group("cluster")
    cluster.add_argument(
        "--actor-num-nodes",
        type=int,
        default=ClusterConfig.num_nodes,
        metavar="NODES",
        help="(default: %(default)s)",
    )
    cluster.add_argument(
        "--actor-num-gpus-per-node",
        type=int,
        default=ClusterConfig.gpus_per_node,
        metavar="GPUS",
        help="ranks on each node; without CUDA, processes (default: %(default)s)",
    )
    cluster.add_argument(
        "--num-gpus-per-node",
        type=int,
        default=ClusterConfig.num_gpus_per_node,
        metavar="GPUS",
        help="GPUs that a machine has (default: %(default)s)",
    )
    cluster.add_argument(
        "--ray-address",
        metavar="ADDRESS",
        help="a Ray that runs (default: $RAY_ADDRESS, or one on localhost)",
    )
    cluster.add_argument(
        "--distributed-timeout-minutes",
        type=float,
        default=ClusterConfig.timeout_minutes,
        metavar="MINUTES",
        help="how long a step, an evaluation, a start or the end of a save may take (default: %(default)s)",
    )
    cluster.add_argument(
        "--max-restarts",
        type=int,
        default=TrainConfig.max_restarts,
        metavar="N",
        help="a run that lost a part of itself starts again from its last checkpoint, so often from the same one "
        "(default: %(default)s)",
    )
    cluster.add_argument(
        "--seed",
        type=int,
        default=TrainConfig.seed,
        metavar="SEED",
        help="of the ranks' random states (default: %(default)s)",
    )
    cluster.add_argument(
        "--dry-run",
        action="store_true",
        help="resolve, certify, count rows and tokens, estimate memory; train nothing",
    )


def _add_optimizer(parser: argparse.ArgumentParser) -> None:
    optimizer = parser.add_argument_group("optimizer (Adam)")
    optimizer.add_argument(
        "--lr",
        type=float,
        default=OptimizerSettings.lr,
        metavar="RATE",
        help="highest learning rate (default: %(default)s)",
    )
    optimizer.add_argument(
        "--min-lr",
        type=float,
        default=OptimizerSettings.min_lr,
        metavar="RATE",
        help="where it decays to (default: %(default)s)",
    )
    optimizer.add_argument(
        "--lr-decay-style",
        default=OptimizerSettings.lr_decay_style,
        metavar="STYLE",
        help="constant, linear, cosine or inverse-square-root (default: %(default)s)",
    )
    optimizer.add_argument(
        "--lr-warmup-iters",
        type=int,
        default=OptimizerSettings.lr_warmup_iters,
        metavar="STEPS",
        help="over which the rate rises from 0 (default: %(default)s)",
    )
    optimizer.add_argument(
        "--lr-warmup-fraction",
        type=float,
        metavar="SHARE",
        help="the same as a share of the run's steps",
    )
    for name, meaning in (
        ("weight_decay", "of matrices; norms and biases have none"),
        ("adam_beta1", "decay of the first moment"),
        ("adam_beta2", "decay of the second moment"),
        ("adam_eps", "added to the root of the second moment"),
        ("clip_grad", "norm above which the gradient is scaled down; 0: never"),
    ):
        optimizer.add_argument(
            flag_of(name),
            type=float,
            default=getattr(OptimizerSettings, name),
            metavar="X",
            help=f"{meaning} (default: %(default)s)",
        )
    optimizer.add_argument(
        "--max-skipped-steps",
        type=int,
        default=TrainConfig.max_skipped_steps,
        metavar="STEPS",
        help="more in a row whose loss or gradient is not finite end the run (default: %(default)s)",
    )

    optimizer.add_argument(
        "--deterministic-mode",
        action="store_true",
        help="kernels that give the same bits each time, or an error where there are none (on a CPU they do anyway)",
    )


def _add_logging(parser: argparse.ArgumentParser) -> None:
    logging = parser.add_argument_group("logging (metrics.jsonl is always written)")
    logging.add_argument(
        "--use-tensorboard", action="store_true", help="also to tensorboard/ in the run's folder"
    )
    logging.add_argument("--use-wandb", action="store_true", help="also to Weights & Biases")
    logging.add_argument(
        "--wandb-project",
        default=LoggingConfig.wandb_project,
        metavar="NAME",
        help="(default: %(default)s)",
    )
    logging.add_argument("--wandb-group", metavar="NAME", help="(default: none)")
    logging.add_argument(
        "--wandb-mode",
        metavar="MODE",
        help="online, offline or disabled (default: as the environment says)",
    )


def _add_fixed(parser: argparse.ArgumentParser) -> None:
    fixed = parser.add_argument_group("flags of launch scripts that have one value here")
    for name, values in ONE_VALUE.items():
        fixed.add_argument(
            flag_of(name), default=values[0], metavar="VALUE", help=" or ".join(values)
        )
    for name, meaning in ALWAYS.items():
        fixed.add_argument(flag_of(name), action="store_true", help=f"always so: {meaning}")


def _add_model(parser: argparse.ArgumentParser) -> None:
    model = parser.add_argument_group(
        "the model's sizes: config.json decides; where given here they must say the same"
    )
    for name, kind in SIZES.items():
        model.add_argument(
            flag_of(name),
            type=kind,
            metavar="N",
            help=f"as {name} of the checkpoint's configuration",
        )
    for name in SWITCHES:
        model.add_argument(flag_of(name), action="store_true", help="as config.json says")
