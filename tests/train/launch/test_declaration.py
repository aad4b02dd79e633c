"""A flag is declared once: everything else follows from the field."""

from __future__ import annotations

from pathlib import Path

import pytest

from miles.common.flags import flag_of
from miles.errors import ConfigError
from miles.train.launch.arguments import parse
from miles.train.launch.flags_table import table
from miles.train.launch.parser import build_parser, launch_settings
from miles.train.launch.refusals import REFUSALS
from tests.support.launch import OneMore, Weather


def test_a_declared_field_has_its_flag(base: list[str]) -> None:
    config = parse([*base, "--num-cups", "7", "--sky", "grey"], OneMore)
    assert isinstance(config, OneMore)
    assert (config.cups, config.weather) == (7, Weather("grey"))
    assert parse(base, OneMore).cups == 3
    for words, message in (
        ("--num-cups 0", "--num-cups must be positive, not 0"),
        ("--num-cups many", "--num-cups takes a whole number, not 'many'"),
        ("--num-cup 5", "there is no flag --num-cup; did you mean --num-cups?"),
        ("--sky green", "--sky must be one of blue, grey, not 'green'"),
    ):
        with pytest.raises(ConfigError, match=message):
            parse([*base, *words.split()], OneMore)


def test_a_declared_field_has_its_yaml_key(base: list[str], tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("num_cups: 7\nsky: grey\n")
    config = parse(["--config", str(tmp_path / "run.yaml"), *base], OneMore)
    assert isinstance(config, OneMore)
    assert (config.cups, config.weather) == (7, Weather("grey"))
    (tmp_path / "run.yaml").write_text("num_cups: no\n")
    with pytest.raises(ConfigError, match="line 1: --num-cups takes a whole number, not no"):
        parse(["--config", str(tmp_path / "run.yaml"), *base], OneMore)


def test_a_declared_field_has_its_help() -> None:
    help_text = build_parser(OneMore).format_help()
    assert "--num-cups CUPS       of tea, 100 % green (default: 3)" in help_text
    assert "The weather:\n  --sky COLOUR          what is above [blue | grey] (default: blue)" in (
        help_text
    )


def test_a_declared_field_has_its_row() -> None:
    page = table(OneMore)
    assert "| `--num-cups` | CUPS | `3` | of tea, 100 % green |" in page
    assert "## The weather\n" in page
    assert "| `--sky` | `blue`, `grey` | `blue` | what is above |" in page


def test_every_flag_has_a_help_text() -> None:
    for setting in launch_settings().values():
        assert setting.flag.help, setting.flag.name
        assert bool(setting.flag.metavar) != setting.is_switch, setting.flag.name


def test_the_page_of_flags_is_current() -> None:
    path = Path(__file__).parents[3] / "docs/flags.md"
    assert path.read_text() == table(), "python -m miles.train.launch.flags_table > docs/flags.md"


def test_no_flag_is_also_refused() -> None:
    for refusal in REFUSALS:
        for setting in launch_settings().values():
            assert not refusal.covers(setting.flag.key_in_yaml), setting.flag.name
        for name in refusal.names.split():
            assert flag_of(name.replace("*", "x")) not in launch_settings(), name
