"""Which files of a folder hold rows, and what is said of the others."""

from __future__ import annotations

from pathlib import Path

import pytest

from miles.data.config import RowFormat, SourceConfig
from miles.data.file_formats import FAMILIES, FORMATS
from miles.data.files.left_out import LeftOut, merged
from miles.data.files.locate import locate
from miles.data.files.manifest import Manifest, build_manifest
from miles.errors import MissingFileError, SourceError
from tests.support.row_cases import CASES, take
from tests.support.row_folders import fill, said, taken


def test_every_format_belongs_to_a_family() -> None:
    families = {format for family in FAMILIES for format in family}
    assert {format for format, _ in FORMATS.values()} <= families


def test_a_suffix_is_told_in_any_case() -> None:
    case = take("folder-suffixes/mixed")
    assert case.manifest.num_rows == 6
    assert [Path(f.path).name for f in case.manifest.sources[0].files] == ["B.JSONL", "a.jsonl"]
    assert case.manifest.sources[0].left_out == ()


def test_what_cannot_be_rows_of_the_folder_is_named() -> None:
    packed = CASES / "folder-suffixes/packed"
    assert "a.jsonl" in taken(packed, packed)
    groups = locate(str(packed)).left_out
    assert {"d.csv", "e.arrow"} <= {name for group in groups for name in group.names}
    assert all(group.looks_like_rows for group in groups)


@pytest.mark.parametrize(
    ("folder", "rows", "left_out"),
    [
        ("snapshot", ["test.jsonl", "train.jsonl"], {"README.md", "dataset_infos.json"}),
        ("factory", ["alpaca_demo.jsonl"], {"dataset_info.json"}),
    ],
)
def test_sidecar_files_are_no_data(folder: str, rows: list[str], left_out: set[str]) -> None:
    path = CASES / "splits-and-sidecars" / folder
    assert set(taken(path, path)) <= set(rows)
    groups = [group for group in locate(str(path)).left_out if not group.looks_like_rows]
    assert [set(group.names) for group in groups] == [left_out]


def test_partitions_are_read_and_hidden_files_named() -> None:
    case = take("names-and-hive/hive")
    assert len(case.conversations) == 4
    (group,) = case.manifest.sources[0].left_out
    assert str(group) == "2 hidden (_SUCCESS, lang=en/.part-0.jsonl.crc)"
    assert take("names-and-hive/rows[v2].jsonl").manifest.sources[0].left_out == ()


def test_json_beside_parquet_is_left_out_by_name(tmp_path: Path) -> None:
    fill(tmp_path, "data/0.parquet data/1.PARQUET rejects.jsonl manifest.json run.log .git/config")
    assert taken(tmp_path, tmp_path) == ["data/0.parquet", "data/1.PARQUET"]
    assert said(tmp_path) == (
        "2 in another format than the others (manifest.json, rejects.jsonl); "
        "1 known to hold no rows (run.log); 1 hidden (.git/)"
    )
    # A pattern says itself which formats it wants.
    assert taken(tmp_path / "*.json*", tmp_path) == ["manifest.json", "rejects.jsonl"]
    assert said(tmp_path / "*") == "1 known to hold no rows (run.log)"
    assert len(taken(tmp_path / "**/*", tmp_path)) == 4


def test_the_first_family_of_formats_is_taken(tmp_path: Path) -> None:
    """Which one it is depends on no order of names."""
    suffixes = {format: suffix for suffix, (format, _) in reversed(FORMATS.items())}
    families = [[suffixes[name] for name in family if name in suffixes] for family in FAMILIES]
    for number, family in enumerate(families):
        folder = tmp_path / str(number)
        names = [f"z{suffix}" for suffix in family]
        beside = [f"a{suffix}" for later in families[number + 1 :] for suffix in later]
        fill(folder, " ".join([*names, *beside]))
        if names:
            assert taken(folder, folder) == sorted(names)
            assert bool(said(folder)) == bool(beside)


def test_json_alone_beside_arrow_describes_it(tmp_path: Path) -> None:
    fill(tmp_path, "a/data-00000-of-00001.arrow a/stats.json b/x.arrow b/stats.json b/rows.jsonl")
    assert taken(tmp_path / "a", tmp_path / "a") == ["data-00000-of-00001.arrow"]
    assert said(tmp_path / "a") == "1 in another format than the others (stats.json)"
    assert taken(tmp_path / "b", tmp_path / "b") == ["rows.jsonl", "stats.json"]


def test_a_file_by_its_own_name_is_always_taken(tmp_path: Path) -> None:
    fill(tmp_path, "state.json _rows.jsonl rows.txt a/b.jsonl")
    for name in ("state.json", "_rows.jsonl", "rows.txt", "_*.jsonl"):
        assert taken(tmp_path / name, tmp_path) == [name.replace("*", "rows")]
        assert said(tmp_path / name) == ""


def test_a_folder_without_rows_says_what_it_holds(tmp_path: Path) -> None:
    fill(tmp_path, "part-00000 rows.orc README.md")
    with pytest.raises(SourceError) as caught:
        locate(str(tmp_path))
    assert (
        "holds no file of rows, only 2 of an unknown format (part-00000, rows.orc); 1 known to "
        "hold no rows (README.md); expected a name that ends in .parquet, .jsonl"
        in str(caught.value)
    )
    with pytest.raises(SourceError, match="holds no file of rows"):
        locate(str(tmp_path), "train")
    with pytest.raises(MissingFileError, match="no such file"):
        locate(str(tmp_path / "*.parquet"))


def test_a_pattern_of_folders_says_how_to_take_what_is_in_them(tmp_path: Path) -> None:
    fill(tmp_path, "shard_0/a.jsonl shard_1/x/b.jsonl")
    with pytest.raises(MissingFileError) as caught:
        locate(f"{tmp_path}/shard_*")
    pattern = str(caught.value).split("below: ")[1].strip("'")
    assert "no such file; the pattern matches 2 folders" in str(caught.value)
    assert taken(Path(pattern), tmp_path) == ["shard_0/a.jsonl", "shard_1/x/b.jsonl"]


def test_linked_folders_are_followed_once(tmp_path: Path) -> None:
    for name in ("mix/own.jsonl", "store/x/a.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes((CASES / "folder-links" / name).read_bytes())
    mix = tmp_path / "mix"
    (mix / "x").symlink_to("../store/x")
    manifest = build_manifest([SourceConfig("s", (str(mix),))])
    assert [Path(f.path).name for f in manifest.sources[0].files] == ["own.jsonl", "a.jsonl"]
    assert manifest.num_rows == 6

    (mix / "again").symlink_to(tmp_path / "store/x")  # the same rows by another name
    (mix / "up").symlink_to("..")
    (tmp_path / "store/x/loop").symlink_to(tmp_path / "store")
    (tmp_path / "c.jsonl").write_bytes(b"")
    (mix / "b.jsonl").symlink_to("../c.jsonl")  # a link to a file is a file
    assert taken(mix, tmp_path) == ["mix/again/a.jsonl", "mix/b.jsonl", "mix/own.jsonl"]
    assert said(mix) == "3 in a folder that is there twice (again/loop/x/, up/, x/)"
    assert taken(mix / "**" / "*.jsonl", tmp_path) == taken(mix, tmp_path)


def test_a_file_with_two_names_is_read_once(tmp_path: Path) -> None:
    fill(tmp_path, "rows/z.jsonl hub/blobs/1")
    (tmp_path / "rows/a.jsonl").symlink_to("z.jsonl")
    for path in (tmp_path / "rows", tmp_path / "rows/*.jsonl"):
        assert taken(path, tmp_path) == ["rows/z.jsonl"]
        assert said(path) == "1 the same file as z.jsonl, by a link (a.jsonl)"
    # Who names the link means it.
    assert taken(tmp_path / "rows/a.jsonl", tmp_path) == ["rows/a.jsonl"]

    # The hub's cache: the file itself has a name without a suffix, and a link in each snapshot.
    for snapshot in ("x", "y"):
        (tmp_path / "hub" / snapshot).mkdir()
        (tmp_path / "hub" / snapshot / "rows.jsonl").symlink_to("../blobs/1")
    assert taken(tmp_path / "hub", tmp_path) == ["hub/x/rows.jsonl"]
    assert "1 the same file as x/rows.jsonl, by a link (y/rows.jsonl)" in said(tmp_path / "hub")


def test_a_real_folder_goes_before_a_link_to_it(tmp_path: Path) -> None:
    fill(tmp_path, "z/rows.jsonl")
    (tmp_path / "a").symlink_to("z")
    assert taken(tmp_path, tmp_path) == ["z/rows.jsonl"]
    assert taken(tmp_path / "*" / "*.jsonl", tmp_path) == ["z/rows.jsonl"]
    assert said(tmp_path / "*" / "*.jsonl") == "1 in a folder that is there twice (a/)"
    # A folder that no part of the pattern matches takes nothing away.
    assert taken(tmp_path / "a*" / "*.jsonl", tmp_path) == ["a/rows.jsonl"]
    assert taken(tmp_path / "a*" / "**" / "*.jsonl", tmp_path) == ["a/rows.jsonl"]


def test_names_are_few_and_short() -> None:
    group = LeftOut.of("hidden", [f"{number:04}{'x' * 500}" for number in range(5_000)], False)
    again = merged([group, LeftOut.of("of split test", ["t"], True), group])
    assert [str(entry)[:16] for entry in again] == ["1 of split test ", "10,000 hidden (0"]
    assert len(str(again[1])) < 500
    assert str(again[1]).endswith(", …)")


def test_the_manifest_keeps_what_was_left_out() -> None:
    path = str(CASES / "splits-and-sidecars/factory")
    manifest = build_manifest([SourceConfig("s", (path,), RowFormat("alpaca"))])
    (alone,) = build_manifest(
        [SourceConfig("s", (f"{path}/alpaca_demo.jsonl",), RowFormat("alpaca"))]
    ).sources
    again = Manifest.from_json(manifest.to_json())
    assert again == manifest
    assert again.sources[0].left_out
    assert not alone.left_out
    assert again.fingerprint == Manifest((alone,)).fingerprint
    older = manifest.to_json().replace('"left_out"', '"unknown"')
    assert Manifest.from_json(older).sources[0].left_out == ()
