"""The settings of a step's computation: they change its time and memory, not its numbers.

Each has a plain way beside the fast one, which docs/parity.md compares. Names are Megatron's where
it has the switch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated

from miles.common.flags import Flag, check_settings
from miles.common.mistakes import Mistakes


@dataclass(frozen=True)
class ComputeConfig:
    """The ways in which a step is computed."""

    attention_backend: Annotated[
        str,
        Flag(
            "--attention-backend",
            "NAME",
            "attention on a GPU. auto: torch's variable-length kernel, and cuDNN's for long samples; "
            "flash: the fastest flash-attn that is installed, else as auto; fused: Transformer "
            "Engine's; local, unfused: one sample at a time, the plain definition, as on a CPU",
            choices=("auto", "flash", "fused", "local", "unfused"),
        ),
    ] = "auto"
    transformer_impl: Annotated[
        str,
        Flag(
            "--transformer-impl",
            "NAME",
            "the layers: auto and local are Megatron's local ones, with fused kernels in them; "
            "transformer_engine is refused, since nothing has run it yet",
            choices=("auto", "local", "transformer_engine"),
        ),
    ] = "auto"
    loss_chunk_size: Annotated[
        int,
        Flag(
            "--loss-chunk-size",
            "TOKENS",
            "trained tokens whose logits exist at the same time; 0: the logits of a whole "
            "micro-batch, trained or not",
            minimum=0,
        ),
    ] = 2048
    loss_fusion: Annotated[
        bool,
        Flag(
            "--cross-entropy-loss-fusion",
            help="the softmax of the loss in two kernels on a GPU",
            also=(
                Flag(
                    "--no-cross-entropy-loss-fusion",
                    help="the softmax by plain torch",
                    negates=True,
                ),
            ),
        ),
    ] = True
    rope_fusion: Annotated[
        bool,
        Flag(
            "--rope-fusion",
            help="rotary embeddings in one kernel on a GPU",
            also=(Flag("--no-rope-fusion", help="they are computed by plain torch", negates=True),),
        ),
    ] = True
    packed_rope: Annotated[
        bool,
        Flag(
            "--packed-rope",
            help="cosine and sine once a micro-batch, and one rotation of all its tokens",
            also=(
                Flag(
                    "--no-packed-rope",
                    help="Megatron's rotation, sample by sample in every layer",
                    negates=True,
                ),
            ),
        ),
    ] = True
    norm_fusion: Annotated[
        bool,
        Flag(
            "--norm-fusion",
            help="norms of query and key in the kernel that splits and rotates them on a GPU, with "
            "--rope-fusion",
            also=(Flag("--no-norm-fusion", help="they take kernels of their own", negates=True),),
        ),
    ] = True
    swiglu_fusion: Annotated[
        bool,
        Flag(
            "--bias-swiglu-fusion",
            help="SwiGLU in one kernel on a GPU",
            also=(Flag("--no-bias-swiglu-fusion", help="SwiGLU by plain torch", negates=True),),
        ),
    ] = True
    grad_accumulation_fusion: Annotated[
        bool,
        Flag(
            "--gradient-accumulation-fusion",
            help="gradients of matrices are added to the float32 sum by the product itself",
            also=(
                Flag(
                    "--no-gradient-accumulation-fusion",
                    help="they are computed in the model's precision and then added",
                    negates=True,
                ),
            ),
        ),
    ] = True
    adam_fusion: Annotated[
        bool,
        Flag(
            "--adam-fusion",
            help="Adam's step in one kernel on a GPU",
            also=(Flag("--no-adam-fusion", help="Adam by plain torch", negates=True),),
        ),
    ] = True
    grouped_experts: Annotated[
        bool | None,
        Flag(
            "--moe-grouped-gemm",
            help="the experts of a layer in one grouped product",
            default="on GPUs from Hopper on, in bfloat16",
            also=(Flag("--no-moe-grouped-gemm", help="one expert after another", negates=True),),
        ),
    ] = None
    overlap_grad_reduce: Annotated[
        bool | None,
        Flag(
            "--overlap-grad-reduce",
            help="gradients are summed over the data-parallel ranks during the backward pass",
            default="on GPUs, with more than one such rank",
            also=(Flag("--no-overlap-grad-reduce", help="after it", negates=True),),
        ),
    ] = None
    overlap_param_gather: Annotated[
        bool | None,
        Flag(
            "--overlap-param-gather",
            help="weights are gathered from the data-parallel ranks during the next forward pass; "
            "--overlap-grad-reduce goes with it",
            default="as --overlap-grad-reduce",
            also=(Flag("--no-overlap-param-gather", help="before it", negates=True),),
        ),
    ] = None
    ddp_bucket_size: Annotated[
        int | None,
        Flag(
            "--ddp-bucket-size",
            "WEIGHTS",
            "weights that are gathered, and whose gradients are summed, at a time, where that is "
            "overlapped",
            default="40 million, or 1 million for each data-parallel rank if that is more",
            minimum=1,
        ),
    ] = None

    def __post_init__(self) -> None:
        check_settings(self)
        mistakes = Mistakes()
        mistakes.require(
            self.transformer_impl != "transformer_engine",
            "--transformer-impl transformer_engine is not supported yet: its layers have not been "
            "run here (docs/decisions/028-layers-of-transformer-engine.md). Leave it out or give "
            "auto or local: the local layers have fused kernels of their own, and their "
            "checkpoints load into a model of Transformer Engine's layers",
        )
        mistakes.require(
            not self.overlap_param_gather or self.overlap_grad_reduce is not False,
            "--overlap-param-gather and --no-overlap-grad-reduce: megatron-core gathers weights "
            "during the forward pass only beside gradients that are summed during the backward "
            "pass; leave one of them out",
        )
        mistakes.raise_all()

    def resolved(self, *, has_gpus: bool, data_parallel: int) -> ComputeConfig:
        """Return the switches with those filled in that depend on the ranks.

        Args:
            data_parallel: the number of data-parallel ranks.
        """
        grouped, reduce = self.grouped_experts, self.overlap_grad_reduce
        gather = self.overlap_param_gather
        if reduce is None:
            is_spread = has_gpus and data_parallel > 1
            reduce = is_spread or bool(gather)  # the one goes only with the other
        return replace(
            self,
            grouped_experts=has_gpus if grouped is None else grouped,
            overlap_grad_reduce=reduce,
            overlap_param_gather=reduce if gather is None else gather,
        )


AS_USUAL = ComputeConfig()
"""The fast way wherever there is one."""
