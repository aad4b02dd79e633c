"""No error of a launch line or a file of flags quotes a key."""

from __future__ import annotations

from pathlib import Path

import pytest

from miles.common.flags import words_of
from miles.common.secret import Secret
from miles.errors import ConfigError, MilesError
from miles.train.driver.opening import describe
from miles.train.launch.arguments import parse
from miles.train.logging_config import LoggingConfig

KEY = "hunter2"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--wandb-kye hunter2", "there is no flag --wandb-kye; did you mean --wandb-key?"),
        ("--wandb-kye=hunter2", "there is no flag --wandb-kye; did you mean --wandb-key?"),
        ("-wandb-key hunter2", "word 7 of the line, behind --save, belongs to no flag"),
        ("-wandb-key=hunter2", "word 7 of the line, behind --save, belongs to no flag"),
        ("wandb-key hunter2", "word 7 of the line, behind --save, belongs to no flag"),
        ("--wandb-key run hunter2", "word 9 of the line, behind --wandb-key, belongs to no flag"),
        ("--use-wandb=hunter2", "--use-wandb: it takes no value"),
        ("--wandb-key hunter2 --lr abc", "--lr takes a number, not 'abc'"),
        ("--wandb-key hunter2 --kl-coef 1", "--kl-coef belongs to the loss of reinforcement"),
        ("--lr 1 --wandb-key", "--wandb-key: expected one argument"),
    ],
)
def test_a_line_with_a_mistake_keeps_the_key(base: list[str], words: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse([*base, *words.split()])
    assert message in str(caught.value)
    assert KEY not in str(caught.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--wandb-key hunter2"], "--wandb-key is joined to other text, which is not shown; divi"),
        (["--wandb-key:hunter2"], "--wandb-key is joined to other text"),
        (["--wandb-keyhunter2"], "--wandb-key is joined to other text"),
        (["--wandb-key-hunter2"], "--wandb-key is joined to other text"),
        (["--WANDB_KEY_hunter2"], "--wandb-key is joined to other text"),
        (["--wandb-kye hunter2"], "there is no flag --wandb-kye; did you mean --wandb-key?"),
        (["--kl-coef:hunter2"], "--kl-coef belongs to the loss of reinforcement learning"),
        (["--wandb-key", "--hunter2"], "argument --wandb-key: expected one argument"),
        (['--train-env-vars {"A":"hunter2"}'], "--train-env-vars is joined to other text"),
    ],
)
def test_a_word_with_a_key_in_it_is_not_quoted(
    base: list[str], words: list[str], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        parse([*base, *words])
    assert message in str(caught.value)
    assert KEY not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("wandb_key=hunter2: 1", "line 1: --wandb-key is joined to other text"),
        ("wandb_key: *hunter2", "line 1: not YAML (found undefined alias)"),
        ("a: &hunter2 1\nb: &hunter2 1", "line 2: not YAML (found duplicate anchor; first occ"),
        ("wandb_key: !hunter2 a", "--wandb-key: not YAML (could not determine a constructor"),
        ("wandb_key: !hunter2!a b", "line 1: not YAML (while parsing a node, found undefined tag"),
        ("wandb_kye: hunter2", "line 1: there is no flag --wandb-kye; did you mean --wandb-key?"),
        ("wandb_key: [hunter2]", "line 1: --wandb-key takes text, not (hidden)"),
        ("wandb_key: {hunter2: 1}", "line 1: --wandb-key takes text, not (hidden)"),
        ("wandb_key: !!int hunter2", "line 1: --wandb-key takes text, not (hidden)"),
        ("wandb_key: hunter2\nlr: abc", "line 2: --lr takes a number, not abc"),
        ("wandb_key: 1234567", "line 1: --wandb-key takes text, not (hidden); put it in quotes"),
    ],
)
def test_a_file_with_a_mistake_keeps_the_key(
    base: list[str], tmp_path: Path, text: str, message: str
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        parse([*base, "--config", str(path)])
    assert message in str(caught.value)
    assert KEY not in str(caught.value) + repr(caught.value.__cause__)
    assert "1234567" not in str(caught.value)


def test_a_key_comes_from_the_line_or_a_file(base: list[str], tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("wandb_key: hunter2")
    from_file = parse([*base, "--config", str(path)])
    from_line = parse([*base, "--config", str(path), "--wandb-key", "hunter3"])
    assert from_file.logging.wandb_key == Secret("hunter2")
    assert from_line.logging.wandb_key == Secret("hunter3")
    for config in (from_file, from_line):
        assert "hunter" not in repr(config)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{A: hunter2}", "--train-env-vars: not JSON: (hidden); a JSON object was expected"),
        ('["hunter2"]', "--train-env-vars: a JSON object was expected"),
        ('{"A": ["hunter2"]}', "--train-env-vars: the value of A must be text, in quotes"),
        ('{"A=hunter2": 1}', "--train-env-vars: the value of A must be text, in quotes"),
        ('{"A=hunter2": ""}', "--train-env-vars: 'A': the name of a variable is not empty"),
    ],
)
def test_variables_of_the_ranks_are_not_quoted(base: list[str], text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse([*base, "--train-env-vars", text])
    assert message in str(caught.value)
    assert KEY not in str(caught.value) + repr(caught.value.__cause__)


def test_the_record_of_a_run_names_its_variables(base: list[str]) -> None:
    config = parse([*base, "--train-env-vars", '{"TOKEN": "hunter2"}'])
    assert config.cluster.train_env_vars["TOKEN"].reveal() == KEY
    assert '"TOKEN": "(hidden)"' in describe(config)
    assert KEY not in describe(config) + repr(config)


def test_a_key_is_no_part_of_a_written_line() -> None:
    fields = {"wandb_key": Secret("hunter2"), "wandb_team": "team"}
    assert words_of(LoggingConfig, fields) == ["--wandb-team", "team"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--wandb-host https://me:hunter2@wandb.example", "the URL holds a password"),
        ("--wandb-dir s3://bucket/wandb", "--wandb-dir s3://bucket/wandb: give a local folder"),
    ],
)
def test_a_server_and_a_folder_are_checked(base: list[str], words: str, message: str) -> None:
    with pytest.raises(MilesError, match=message) as caught:
        parse([*base, *words.split()])
    assert KEY not in str(caught.value)
