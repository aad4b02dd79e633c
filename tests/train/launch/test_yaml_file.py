"""Flags from a YAML file: types are kept, and a mistake names the file, the line and the flag."""

from __future__ import annotations

from pathlib import Path

import pytest

from miles.errors import ConfigError
from miles.train.launch.arguments import parse
from tests.support.fault_table import NOTHING, observed


def written(folder: Path, text: str) -> str:
    (folder / "run.yaml").write_text(text)
    return str(folder / "run.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("num_epochs: 2", "line 1: there is no flag --num-epochs; did you mean --num-epoch?"),
        ("\nkl-coef: 0.1", "line 2: --kl-coef belongs to the loss of reinforcement learning"),
        ("config: other.yaml", "line 1: there is no flag --config"),
        ("lr: 0.1\nlr: 0.2", "line 2: --lr is given twice"),
        ("max_tokens_per_gpu: 9\nmax-tokens-per-gpu: 9", "line 2: --max-tokens-per-gpu is given"),
        # no value
        ("num_epoch:", "line 1: --num-epoch takes a whole number, not nothing"),
        ("num_epoch: null", "line 1: --num-epoch takes a whole number, not null"),
        ("eval_interval: ~", "line 1: --eval-interval takes a whole number, not ~"),
        ("input_key: null", "line 1: --input-key takes text, not null"),
        ("prompt_data: [a, null]", "--prompt-data takes a list, each item text, not null"),
        ("role_names: null", "line 1: --role-names takes a mapping"),
        ("rollout_shuffle:", "line 1: --rollout-shuffle takes true or false, not nothing"),
        # truth values for flags that take another value
        ("num_epoch: off", "line 1: --num-epoch takes a whole number, not off"),
        ("num_epoch: true", "line 1: --num-epoch takes a whole number, not true"),
        ("keep_last: false", "line 1: --keep-last takes a whole number, not false"),
        ("lr: no", "line 1: --lr takes a number, not no"),
        ("output_dir: false", "line 1: --output-dir takes text, not false; put it in quotes"),
        ("too_long: off", "--too-long takes one of drop, truncate_end, error, not off"),
        ("column_names: false", "line 1: --column-names: a JSON object was expected"),
        ("loss_type: off", "line 1: --loss-type takes sft_loss, not off"),
        ("n_samples_per_prompt: null", "line 1: --n-samples-per-prompt takes 1, not null"),
        ("moe_z_loss_coeff: [0]", "line 1: --moe-z-loss-coeff takes 0, not a list"),
        ("loss_mask_type:", "line 1: --loss-mask-type takes auto or qwen or qwen3, not nothing"),
        ("lr: 1\noptimizer: sgd", "line 2: --optimizer sgd is not supported; leave it out or"),
        # values that PyYAML cannot make
        ("lr: 2024-13-45", "line 1: --lr takes a number, not 2024-13-45"),
        ("lr: !!int abc", "line 1: --lr takes a number, not abc"),
        ('lr: !!int ""', "line 1: --lr takes a number, not ''"),
        ("lr: !!bool abc", "line 1: --lr takes a number, not abc"),
        ("lr: !!timestamp abc", "line 1: --lr takes a number, not abc"),
        ("wandb_group: 2024-13-45", "line 1: --wandb-group takes text, not 2024-13-45"),
        # switches
        ("rollout_shuffle: yes", "line 1: --rollout-shuffle takes true or false, not yes"),
        ("rollout_shuffle: off", "line 1: --rollout-shuffle takes true or false, not off"),
        ("rollout_shuffle: 1", "line 1: --rollout-shuffle takes true or false, not 1"),
        ('rollout_shuffle: "true"', "--rollout-shuffle takes true or false, not 'true'"),
        ("calculate_per_token_loss: false", "--calculate-per-token-loss: false is not supported"),
        ("qk_layernorm: false", "--qk-layernorm False: config.json says True"),
        # numbers and text
        ('num_epoch: "2"', "line 1: --num-epoch takes a whole number, not '2'"),
        ("num_epoch: 2.5", "line 1: --num-epoch takes a whole number, not 2.5"),
        ('lr: "0.1"', "line 1: --lr takes a number, not '0.1'"),
        ("wandb_group: 2024", "line 1: --wandb-group takes text, not 2024; put it in quotes"),
        ("wandb_group: 2024-01-02", "--wandb-group takes text, not 2024-01-02; put it in quo"),
        ("num_epoch: [2]", "line 1: --num-epoch takes a whole number, not a list"),
        ("num_epoch: {a: 2}", "line 1: --num-epoch takes a whole number, not a mapping"),
        ("prompt_data_weights: [1, b]", "takes a list, each item a number, not b"),
        ("wandb_group: [a]", "line 1: --wandb-group takes text, not a list"),
        ("too_long: {a: b}", "takes one of drop, truncate_end, error, not a mapping"),
        ("role_names: abc", '--role-names: not JSON: abc; a JSON object was expected, such as {"'),
        # allowed values
        ("lr: 1\ntoo_long: cut", "line 2: --too-long must be one of drop, truncate_end, error"),
        ("num_epoch: 0", "line 1: --num-epoch must be positive, not 0"),
        # no mapping of flags
        ("[1, 2]", "expected a mapping of flag names to values"),
        ("", "expected a mapping of flag names to values"),
        ("a: [", "not YAML"),
        ("lr: 1\n[a]: 2", "line 2: the name of a flag was expected, not a list"),
        ("? {a: 1}\n: 2", "line 1: the name of a flag was expected, not a mapping"),
        ("<<: 3", "line 1: not YAML"),
        ("lr: 1\na: \0", "not YAML (unacceptable character #x0000"),
        ("\0", "not YAML (unacceptable character #x0000"),
        ("lr: " + "[" * 2000, "not YAML (nested too deeply)"),
        ("lr: &a {<<: *a}", "line 1: --lr takes a number, not a mapping"),
        ("<<: {lr: 1}\nlr: 2\nlr: 3", "line 3: --lr is given twice"),
        ("lr: !!python/object:os.system {}", "line 1: --lr: not YAML (could not determine"),
    ],
)
def test_a_mistake_names_its_line(base: list[str], tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse(["--config", written(tmp_path, text), *base])
    assert message in str(error.value)
    assert "\n" not in str(error.value) or "config.json" in message
    if "line" in message:
        assert str(error.value).startswith(f"--config {tmp_path}/run.yaml, line ")


@pytest.mark.parametrize("text", ["wandb_group: [a]", "wandb_group: {a: b}", "too_long: off"])
def test_quotes_are_no_help(base: list[str], tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse(["--config", written(tmp_path, text), *base])
    assert "put it in quotes" not in str(error.value)


def test_a_file_that_cannot_be_read(base: list[str], tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_bytes(b"lr: \xff\xfe")
    for path in (tmp_path / "run.yaml", tmp_path, tmp_path / "nowhere.yaml"):
        with pytest.raises(ConfigError, match=rf"--config .*{path.name}"):
            parse(["--config", str(path), *base])


def test_the_line_has_the_last_word(base: list[str], tmp_path: Path) -> None:
    path = written(
        tmp_path, "num_epoch: 2\nrollout-shuffle: true\nlr: 3.0e-5\nrole-names: {a: user}\n"
    )
    config = parse(["--config", path, *base, "--num-epoch", "5"])
    order = config.data.order
    assert (order.num_epoch, order.shuffle, config.optimizer.lr) == (5, True, 3e-5)
    assert config.data.sources[0].format.roles == {"a": "user"}


def test_the_line_has_the_last_word_under_another_name(base: list[str], tmp_path: Path) -> None:
    path = written(tmp_path, "rollout_batch_size: 8\nbf16: true\ninput_key: chat\n")
    words = ["--global-batch-size", "16", "--no-bf16", "--tool-key", "fs"]
    config = parse(["--config", path, *base, *words])
    assert (config.data.order.batch_size, config.bf16) == (16, False)
    assert config.data.sources[0].format.columns == {"messages": "chat", "tools": "fs"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("bf16: true\n", "--fp16"),
        ("no-bf16: true\n", "--fp16"),
        ("fp16: true\n", "--bf16"),
        ("fp16: true\n", "--no-bf16"),
        ("lr_warmup_fraction: 0.1\n", "--lr-warmup-iters 5"),
        ("eval_fraction: 0.1\n", "--eval-prompt-data held.parquet"),
        ("eval_prompt_data: held.parquet\n", "--eval-fraction 0.1"),
    ],
)
def test_the_line_has_the_last_word_on_a_choice(
    base: list[str], tmp_path: Path, text: str, words: str
) -> None:
    on_line = [*base, *words.split()]
    assert parse(["--config", written(tmp_path, text), *on_line]) == parse(on_line)


def test_types_are_kept(base: list[str], tmp_path: Path) -> None:
    text = """
        lr: 1e-5
        min_lr: 0
        rollout_shuffle: false
        wandb_group: "2024"
        attention_dropout: 0
        apply_chat_template_kwargs: {enable_thinking: false, depth: 3}
        role_names: '{"Bot": "assistant"}'
        prompt_data: [a, a.parquet, "7", b.parquet]
        prompt_data_weights: [1, 2.5]
        eval_prompt_data: held.parquet
    """
    path = written(tmp_path, text)
    config = parse(["--config", path, *base[:2], *base[4:]])
    assert (config.optimizer.lr, config.optimizer.min_lr) == (1e-5, 0.0)
    assert config.data.order.shuffle is False
    assert config.logging.wandb_group == "2024"
    assert config.data.encode.template_kwargs == {"enable_thinking": False, "depth": 3}
    assert [source.name for source in config.data.sources] == ["a", "7"]
    assert config.data.sources[0].format.roles == {"Bot": "assistant"}
    assert config.data.order.weights == (1.0, 2.5)
    assert config.evaluation.sources[0].paths == (str(Path("held.parquet").absolute()),)


def test_a_merged_value_is_replaced(base: list[str], tmp_path: Path) -> None:
    path = written(tmp_path, "<<: {lr: 1e-4, num-epoch: 0, seed: 7}\nlr: 1e-5\nnum_epoch: 2\n")
    config = parse(["--config", path, *base])
    assert (config.optimizer.lr, config.data.order.num_epoch, config.seed) == (1e-5, 2, 7)


def test_a_replaced_value_is_not_judged(base: list[str], tmp_path: Path) -> None:
    path = written(tmp_path, "num_epoch: 0\nloss_type: policy_loss\n")
    words = ["--num-epoch", "2", "--loss-type", "sft_loss"]
    assert parse(["--config", path, *base, *words]).data.order.num_epoch == 2


@pytest.mark.parametrize("name", ["no_overlap_grad_reduce", "no-bf16", "no_rope_fusion"])
def test_a_negation_is_not_negated(base: list[str], tmp_path: Path, name: str) -> None:
    """`no_x: false` was x for some readers, and no x for others."""
    positive = name.replace("-", "_").removeprefix("no_")
    path = written(tmp_path, f"seed: 1\n{name}: false\n")
    message = (
        f"line 2: --no-{positive.replace('_', '-')}: false negates twice; write {positive}: true"
    )
    with pytest.raises(ConfigError, match=message) as refused:
        parse(["--config", path, *base])
    if name == "no_rope_fusion":
        observed("negation that is negated, in YAML", str(refused.value), "negates", NOTHING)

    path = written(tmp_path, f"{positive}: false\n")
    assert parse(["--config", path, *base]) == parse([*base, f"--no-{positive.replace('_', '-')}"])


def test_all_mistakes_of_a_file_and_its_line_are_named(base: list[str], tmp_path: Path) -> None:
    path = written(tmp_path, "num_epoch: off\nlrr: 3\nlr: fast\nseed: 1\nseed: 2\n")
    with pytest.raises(ConfigError) as caught:
        parse(["--config", path, *base, "--num-rollot", "3"])
    where = f"--config {path}, line"
    assert str(caught.value) == (
        "5 mistakes: (1) there is no flag --num-rollot; did you mean --num-rollout? "
        f"(2) {where} 2: there is no flag --lrr; did you mean --lr? "
        f"(3) {where} 5: --seed is given twice; leave out one of them; "
        f"(4) {where} 1: --num-epoch takes a whole number, not off; "
        f"(5) {where} 3: --lr takes a number, not fast"
    )
