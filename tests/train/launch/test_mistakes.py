"""Mistakes on a launch line, and the one line that names each."""

from __future__ import annotations

import pytest

from miles.errors import ConfigError
from miles.train.launch.arguments import parse


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--loss-type policy_loss", "--loss-type policy_loss: this is SFT only"),
        ("--rollout-batch-size 8 --global-batch-size 16", "must be equal"),
        (
            "--rollout-function-path other.generate",
            "--rollout-function-path other.generate: this is SFT only",
        ),
        (
            "--n-samples-per-prompt 8",
            "--n-samples-per-prompt 8: this is SFT only; leave it out or give 1",
        ),
        (
            "--advantage-estimator grpo",
            "--advantage-estimator belongs to the loss of reinforcement learning; leave it",
        ),
        ("--kl-loss-coef=0.1", "--kl-loss-coef belongs to the loss of reinforcement learning"),
        (
            "--rm-type deepscaler",
            "--rm-type belongs to rewards; leave it out: rows carry their own answers",
        ),
        (
            "--sglang-mem-fraction-static 0.7",
            "--sglang-mem-fraction-static belongs to the engines that generate",
        ),
        (
            "--colocate",
            "--colocate belongs to sharing GPUs between training and the engines that generate",
        ),
        ("--n-samples-per-eval-prompt 4", "evaluation here is the loss on --eval-prompt-data"),
        (
            "--train-iters 100",
            "--train-iters is the length of a run by other names; give --num-epoch, or --num-roll",
        ),
        ("--micro-batch-size 1", "packed into micro-batches of --max-tokens-per-gpu"),
        ("--lora-type lora", "--lora-type is about LoRA during reinforcement learning"),
        ("--target-modules q_proj", "--target-modules belongs to LoRA: give --lora-rank beside it"),
        ("--use-dora", "--use-dora belongs to DoRA"),
        ("--lora-alpha 32", "--lora-alpha belongs to LoRA: give --lora-rank beside it"),
        (
            "--max-token-per-gpu 100",
            "there is no flag --max-token-per-gpu; did you mean --max-tokens-per-gpu?",
        ),
        ("--frobnicate", "there is no flag --frobnicate; see miles train --help"),
        (
            "--attention-dropout 0.1",
            "--attention-dropout 0.1 is not supported; leave it out or give 0.0",
        ),
        ("--optimizer sgd", "--optimizer sgd is not supported; leave it out or give adam"),
        ("--num-experts 8", "--num-experts 8: config.json says None"),
        ("--add-qkv-bias", "--add-qkv-bias True: config.json says False"),
        ("--eval-prompt-data a.jsonl --eval-fraction 0.1", "give one of them"),
        ("--eval-prompt-data a b c", "--eval-prompt-data takes one path, or NAME PATH pairs"),
        ("--eval-interval 5", "--eval-interval needs rows to evaluate on"),
        ("--eval-samples 5", "--eval-samples needs rows to evaluate on"),
        ("--keep-best 1", "--keep-best needs rows to evaluate on"),
        ("--keep-last 0", "--keep-last must be positive, not 0"),
        ("--eval-fraction 1.5", r"--eval-fraction must be in \[0, 1\), not 1.5"),
        ("--eval-fraction 0.1 --eval-samples -1", "--eval-samples must not be negative"),
        ("--wandb-mode sometimes", "--wandb-mode must be one of online, offline, disabled"),
        ("--recompute-granularity full", "--recompute-granularity full needs --recompute-method"),
        ("--lr-warmup-iters 5 --lr-warmup-fraction 0.1", "say the same; give one of them"),
        (
            "--actor-num-gpus-per-node 8 --num-gpus-per-node 4",
            "is more than a machine has: --num-gpus-per-node 4",
        ),
        (
            "--actor-num-gpus-per-node 5 --pipeline-model-parallel-size 5",
            r"layers \(36\) cannot be divided by",
        ),
        (
            "--expert-model-parallel-size 2 --actor-num-gpus-per-node 2",
            "qwen3 has no experts to spread",
        ),
        ("--lr-decay-style wavy", "--lr-decay-style must be one of"),
        ("--max-sample-tokens 9000 --max-tokens-per-gpu 8000", "--max-sample-tokens 9000 exceeds"),
        ("--num-layers 28", "--num-layers 28: config.json says 36"),
        (
            "--context-parallel-size 2",
            "--context-parallel-size 2: context parallelism is not supported yet; leave it out",
        ),
        ("--bf16 --no-bf16", "--bf16 and --no-bf16 contradict one another; give one"),
        (
            "--transformer-impl transformer_engine",
            "--transformer-impl transformer_engine is not supported yet",
        ),
        (
            "--overlap-param-gather --no-overlap-grad-reduce",
            "--overlap-param-gather and --no-overlap-grad-reduce: megatron-core gathers",
        ),
        (
            "--actor-num-gpus-per-node 3 --tensor-model-parallel-size 2",
            "3 ranks .* cannot be divided",
        ),
        ("--empty-think maybe", "--empty-think must be one of mask, train"),
        ("--loss-mask-turns first", "--loss-mask-turns must be one of all, last, flags"),
        ("--history forgotten", "--history must be one of as_served"),
        ("--special-text keep", "--special-text must be one of allow, escape, reject"),
        ("--too-long shorten", "--too-long must be one of drop, truncate_end, error"),
        ("--max-bad-rows-in-a-row 0", "--max-bad-rows-in-a-row must be positive"),
        (
            "--row-shape xml",
            "--row-shape must be one of auto, messages, alpaca, prompt_completion, ",
        ),
        (
            "--row-shape text --input-key chat",
            "--column-names: 'messages' is no field of --row-shape text: text",
        ),
        ("--column-names {", "--column-names: not JSON: {"),
        ("--column-names abc", 'not JSON: abc; a JSON object was expected, such as {"prompt": "qu'),
        ("--column-names [1]", "--column-names: a JSON object was expected"),
        ('--column-names {"prompt":1}', "'prompt' must be the name of a column, not 1"),
        (
            '--column-names {"messages":"a"} --input-key b',
            "--input-key b: --column-names says messages is 'a'",
        ),
        (
            '--column-names {"tools":"a"} --tool-key b',
            "--tool-key b: --column-names says tools is 'a'",
        ),
        (
            '--role-names {"Bot":"robot"}',
            "--role-names: 'Bot' must be one of system, user, assistant, tool",
        ),
        ("--apply-chat-template-kwargs [1]", "a JSON object was expected"),
        ("--prompt-data a b c", "--prompt-data takes one path, or NAME PATH pairs"),
        ("--prompt-data a.jsonl b.jsonl", "a.jsonl' is a path, and stands where the name of a so"),
        ("--eval-prompt-data a.jsonl b.jsonl", "--eval-prompt-data a a.jsonl b b.jsonl"),
        ("--split train test", "--split gives 2 words for 1 source:"),
        ("--split 949,50,1", "shares of one set, as in Megatron-LM, are not supported"),
        ("--prompt-data rows.jsonl@[0:100]", "a slice of the rows is not supported; write these"),
        ("--prompt-data a rows.jsonl@[:-5] b c", "a slice of the rows is not supported"),
        ("--prompt-data rows.jsonl@[1:2:3]", "write these rows into a file of their own$"),
        ("--eval-prompt-data rows.jsonl@[5]", "a slice of the rows is not supported"),
        (
            "--seq-length 4096",
            "is the length of all samples .*; --max-sample-tokens is the longest",
        ),
        ("--wandb-entity me", "--wandb-entity is the team .*; give --wandb-team"),
        ("--wandb-name mine", "--wandb-name is the name of the run .* name of the run's folder"),
        ("--recompute-activations", "give --recompute-granularity selective"),
        ("--global-batch-size 0", "--global-batch-size must be positive, not 0"),
        ("--rope-scaling-factor 1.0", "--rope-scaling-factor 1.0: config.json scales no positions"),
        ("--chat-template-path nowhere.jinja", "nowhere.jinja: no such file"),
        ("--config nowhere.yaml", "nowhere.yaml: no such file"),
        ("--lr five", "--lr takes a number, not 'five'"),
        ("--num-epoch 1.5", "--num-epoch takes a whole number, not '1.5'"),
        ("--num-epoch 3.0", "--num-epoch takes a whole number, not '3.0'"),
        ("--num-epoch 1e3", "--num-epoch takes a whole number, not '1e3'"),
        ("--lr=--", "--lr: a value was expected; found --"),
        ("--wandb-group=--", "--wandb-group: a value was expected; found --"),
        ("--prompt-data=--", "--prompt-data: a value was expected; found --"),
        ("--num-epoch 2 --num-epoch 0", "--num-epoch must be positive, not 0"),
        ("--eval-interval null", "--eval-interval takes a whole number, not 'null'"),
        ("--prompt-data-weights 1 half", "takes a list, each item a number, not 'half'"),
        ("--loss-mask-type glm", "--loss-mask-type glm: the mask is learned from the chat templ"),
        ("--num-epoch", "argument --num-epoch: expected one argument"),
        ("--num-epoch 0", "--num-epoch must be positive"),
        ("--actor-num-nodes -1 --actor-num-gpus-per-node -8", "1. --actor-num-nodes must be pos"),
        ("--actor-num-gpus-per-node 0", "^--actor-num-gpus-per-node must be positive, not 0"),
        ("--num-gpus-per-node -8", "^--num-gpus-per-node must be positive, not -8"),
        ("--tensor-model-parallel-size -1", "^--tensor-model-parallel-size must be positive"),
        ("--expert-tensor-parallel-size 0", "^--expert-tensor-parallel-size must be positive"),
        ("--distributed-timeout-minutes 0", "^--distributed-timeout-minutes must be positive"),
        ("--distributed-timeout-minutes nan", "^--distributed-timeout-minutes must be a finite"),
        ("--lr inf", "^--lr must be a finite number, not inf"),
        ("--lr -1", "^--lr must not be negative, not -1.0"),
        ("--weight-decay 1e400", "^--weight-decay must be a finite number, not inf"),
        ("--weight-decay -1", "^--weight-decay must not be negative"),
        ("--adam-beta1 1.5", "^--adam-beta1 must be below 1, not 1.5"),
        ("--adam-beta2 nan", "^--adam-beta2 must be a finite number, not nan"),
        ("--clip-grad -1", "^--clip-grad must not be negative"),
        ("--prompt-data-weights 1 nan", "^--prompt-data-weights must be a finite number, not nan"),
    ],
)
def test_a_mistake_is_named(base: list[str], words: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse([*base, *words.split()])


def test_missing_flags_are_named() -> None:
    with pytest.raises(ConfigError, match="--hf-checkpoint and --prompt-data are missing"):
        parse(["--save", "run"])


@pytest.mark.parametrize("flag", ["--prompt-data", "--eval-prompt-data"])
@pytest.mark.parametrize(
    ("words", "place"),
    [([""], "1 of 1"), (["f.parquet", ""], "2 of 2"), (["", "f.parquet"], "1 of 2")],
)
def test_an_empty_path_is_refused(base: list[str], flag: str, words: list[str], place: str) -> None:
    with pytest.raises(ConfigError, match=f"^{flag}: word {place} is empty, such as a variable"):
        parse([*base, flag, *words])


def test_mistakes_that_do_not_depend_on_one_another_are_named_together(base: list[str]) -> None:
    line = "--lora-alpha 8 --use-rslora --min-lr 1 --fp16 --bf16 --eval-interval 5 --keep-best 1"
    line += " --lr-warmup-iters 3 --lr-warmup-fraction 0.1 --num-layers 7 --optimizer sgd"
    line += " --max-sample-tokens 9000 --prompt-data-weights 1 2 --recompute-method uniform"
    with pytest.raises(ConfigError) as caught:
        parse([*base, *line.split(), "--max-tokens-per-gpu", "100"])
    text = str(caught.value)
    assert text.startswith("9 mistakes: (1) --optimizer sgd is not supported")
    for part in (
        "--num-layers 7: config.json says 36",
        "--max-sample-tokens 9000 exceeds",
        "--prompt-data-weights gives 2 numbers",
        "--min-lr 1.0 must lie",
        "--lr-warmup-fraction say the same",
        "--lora-alpha belongs",
        "--use-rslora belongs",
        "--recompute-granularity full",
    ):
        assert part in text
    # What needs the settings of the rows is checked once these can be made.
    assert "--eval-interval" not in text

    with pytest.raises(
        ConfigError, match=r"^3 mistakes: .*bf16 .* --eval-interval .* --keep-best "
    ):
        parse([*base, *["--fp16", "--bf16", "--eval-interval", "5", "--keep-best", "1"]])


def test_a_line_that_lacks_flags_is_checked_all_the_same() -> None:
    with pytest.raises(ConfigError) as caught:
        parse(["--save", "run", "--min-lr", "1", "--prompt-data-weights", "1", "2"])
    assert str(caught.value) == (
        "2 mistakes: (1) --hf-checkpoint and --prompt-data are missing; (2) --min-lr 1.0 must lie "
        "between 0 and --lr 1e-05"
    )
