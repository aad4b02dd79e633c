"""Declared settings: read from fields; records made from values, words from records."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import pytest

from miles.common.flags import (
    Flag,
    Setting,
    all_settings,
    build,
    check_settings,
    records_of,
    settings_of,
    words_of,
)
from miles.errors import ConfigError


@dataclass(frozen=True)
class Filling:
    jam: Annotated[str, Flag("--jam", "KIND", "on top", choices=("plum", "fig"))] = "plum"
    layers: Annotated[int, Flag("--num-layers", "N", "of it", minimum=2)] = 2

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(frozen=True)
class Cake:
    flour: Annotated[float, Flag("--flour", "GRAMS", "weighed")]
    filling: Filling = Filling()
    fillings: tuple[Filling, ...] = ()
    names: Annotated[
        Mapping[str, str],
        Flag("--names", "JSON", "said", also=(Flag("--nick", "NAME", "short", key="nick"),)),
    ] = field(default_factory=dict)
    slices: Annotated[
        int | None,
        Flag("--slices", "N", "cut", also=(Flag("--pieces", "N", "the same"),)),
    ] = None
    is_vegan: Annotated[bool, Flag("--vegan", help="no eggs")] = False
    note: Annotated[str | None, Flag("--note-path", "FILE", "a card", is_file=True)] = None
    weights: Annotated[tuple[float, ...], Flag("--weights", "X", "of slices")] = ()
    is_iced: Annotated[
        bool | None,
        Flag("--iced", help="sugar", also=(Flag("--plain", help="no sugar", negates=True),)),
    ] = None
    oven: int = 180


def test_settings_say_what_their_fields_say() -> None:
    by_name = {setting.flag.name: setting for setting in settings_of(Cake)}
    assert list(by_name) == [
        *("--flour", "--names", "--nick", "--slices", "--pieces", "--vegan", "--note-path"),
        *("--weights", "--iced", "--plain"),
    ]
    assert by_name["--flour"].is_required
    assert by_name["--vegan"].is_switch
    assert by_name["--names"].is_mapping
    assert (by_name["--weights"].is_list, by_name["--weights"].item_type) == (True, float)
    assert by_name["--slices"] == Setting(
        settings_of(Cake)[3].flag, "slices", int, default=None, is_required=False
    )
    assert by_name["--nick"].value_type is str
    assert by_name["--pieces"].value_type is int


def test_records_inside_a_record_are_found_once() -> None:
    assert records_of(Cake) == (Cake, Filling)
    assert [setting.flag.name for setting in all_settings(Cake)][-2:] == ["--jam", "--num-layers"]


def test_a_record_is_made_from_values(tmp_path: Path) -> None:
    (tmp_path / "note").write_text("Enjoy!")
    values = {
        "--flour": 500.0,
        "--jam": "fig",
        "--names": {"full": "Victoria"},
        "--nick": "Vicky",
        "--pieces": 8,
        "--note-path": str(tmp_path / "note"),
        "--weights": [1.0, 2.0],
    }
    assert build(Cake, values, {"oven": 200}) == Cake(
        500.0,
        Filling("fig"),
        names={"full": "Victoria", "nick": "Vicky"},
        slices=8,
        note="Enjoy!",
        weights=(1.0, 2.0),
        oven=200,
    )
    assert build(Cake, {"--flour": 1.0}) == Cake(1.0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"--slices": 4, "--pieces": 5}, "--slices 4 and --pieces 5 must be equal"),
        ({"--names": {"nick": "V"}, "--nick": "W"}, "--nick W: --names says nick is 'V'"),
        ({"--iced": True, "--plain": True}, "--iced and --plain contradict one another; give one"),
        ({"--jam": "tar"}, "--jam must be one of plum, fig, not 'tar'"),
        ({"--num-layers": 1}, "--num-layers must be at least 2, not 1"),
        ({"--note-path": "nowhere"}, "--note-path .*nowhere: no such file"),
    ],
)
def test_a_contradiction_is_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(Cake, {"--flour": 1.0, **values})


def test_two_switches_of_one_field_say_opposite_things() -> None:
    values = ({}, {"--iced": True}, {"--plain": True}, {"--iced": False}, {"--plain": False})
    cakes = [build(Cake, {"--flour": 2.5, **given}) for given in values]
    assert [cake.is_iced for cake in cakes] == [None, True, False, False, True]
    words = [words_of(Cake, dataclasses.asdict(cake))[2:] for cake in cakes[:3]]
    assert words == [[], ["--iced"], ["--plain"]]


def test_words_give_the_same_record_again() -> None:
    cake = Cake(2.5, names={"nick": "V"}, is_vegan=True, weights=(1.0, 2.0))
    assert words_of(Cake, dataclasses.asdict(cake)) == [
        *("--flour", "2.5", "--names", '{"nick": "V"}', "--vegan", "--weights", "1.0", "2.0"),
    ]
    assert words_of(Filling, dataclasses.asdict(Filling())) == []
