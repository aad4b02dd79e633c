"""The split of a file by its name, and the files of a folder that are read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from miles.common import storage
from miles.data.config import RowFormat, SourceConfig
from miles.data.files.locate import locate
from miles.data.files.manifest import build_manifest
from miles.data.files.read import read_rows
from miles.data.files.splits import splits_of
from miles.errors import ConfigError, SourceError
from tests.support.fault_table import NOTHING, observed
from tests.support.row_cases import CASES, refusal, take
from tests.support.row_folders import fill, said, taken


@pytest.mark.parametrize(
    ("path", "sign", "name", "kind"),
    [
        ("train-00000-of-00001.parquet", "DECLARED", "train", "train"),
        ("data/test_sft-00000-of-00003-0a1b2c3d.parquet", "DECLARED", "test_sft", "test"),
        ("data/chat-00000-of-00003.parquet", "DECLARED", "chat", None),
        ("lang=en/split=dev/part-0.parquet", "DECLARED", "dev", "validation"),
        ("train/data-00000-of-00002.parquet", "CERTAIN", "train", "train"),
        ("train/test_cases.jsonl", "CERTAIN", "train", "train"),
        ("train/validation.jsonl", "CERTAIN", "validation", "validation"),
        ("Test_02.JSONL.GZ", "CERTAIN", "Test", "test"),
        ("chat_test.v2.jsonl", "HINT", "chat_test", "test"),
        ("alpaca-eval-v2.json", "HINT", "alpaca-eval", "test"),
        ("my_train_v2.jsonl", "HINT", "my_train", "train"),
        ("unit-test-generation.jsonl", "NONE", "", None),
        ("trainset-1/a.jsonl", "CERTAIN", "trainset", "train"),
        ("latest.jsonl", "NONE", "", None),
        ("contest/evaluator.jsonl", "NONE", "", None),
        ("lang=test/part-00000-of-00002.parquet", "NONE", "", None),
        ("data-00000-of-00001.parquet", "NONE", "", None),
    ],
)
def test_a_name_tells_the_split(path: str, sign: str, name: str, kind: str | None) -> None:
    (split,) = splits_of([path])
    assert (split.sign.name, split.name, split.kind) == (sign, name, kind)


TRAINED = [
    # files of a folder, those that are trained, what is said
    ("train.jsonl test.jsonl valid.jsonl", "train.jsonl",
     "1 of split test (test.jsonl); 1 of split valid (valid.jsonl)"),
    ("train/0.jsonl dev/0.jsonl", "train/0.jsonl", "1 of split dev (dev/0.jsonl)"),
    ("a/split=train/x.jsonl a/split=val/x.jsonl", "a/split=train/x.jsonl", "1 of split val (a/split=val/x.jsonl)"),
    # Not of a split: it is trained. Where the hub's form names the splits, it is another split.
    ("train.jsonl more.jsonl test.jsonl", "more.jsonl train.jsonl", "1 of split test (test.jsonl)"),
    (
        "train-00000-of-00001.parquet extra-00000-of-00001.parquet",
        "train-00000-of-00001.parquet",
        "1 of split extra (extra-00000-of-00001.parquet)",
    ),
    ("en-00000-of-00001.parquet de-00000-of-00001.parquet", "de-00000-of-00001.parquet en-00000-of-00001.parquet", ""),
    (
        "train_sft-00000-of-00001.parquet train_gen-00000-of-00001.parquet test_sft-00000-of-00001.parquet",
        "train_sft-00000-of-00001.parquet",
        "1 of split test_sft (test_sft-00000-of-00001.parquet); "
        "1 of split train_gen (train_gen-00000-of-00001.parquet)",
    ),
    ("train_en.jsonl train_de.jsonl dev_en.jsonl", "train_de.jsonl train_en.jsonl",
     "1 of split validation (dev_en.jsonl)"),
    # No file says train: what surely is held out, or stands beside its own rows, is left out.
    ("chat.jsonl test.jsonl", "chat.jsonl", "1 of split test (test.jsonl)"),
    ("chat.jsonl chat_test.jsonl code_test.jsonl", "chat.jsonl code_test.jsonl", "1 of split test (chat_test.jsonl)"),
    ("chat/0.jsonl chat_test/0.jsonl", "chat/0.jsonl", "1 of split test (chat_test/0.jsonl)"),
    ("unit-test-generation.jsonl dev-chat.jsonl", "dev-chat.jsonl unit-test-generation.jsonl", ""),
]  # fmt: skip


OF_SEVERAL_FORMATS = [
    ("train.jsonl test.parquet", "train.jsonl", "1 of split test (test.parquet)"),
    ("train.csv val.jsonl test.parquet", "train.csv",
     "1 of split test (test.parquet); 1 of split val (val.jsonl)"),
    ("train.parquet train.jsonl test.csv about.json", "train.parquet",
     "1 of split test (test.csv); 2 in another format than the others (about.json, train.jsonl)"),
]  # fmt: skip


@pytest.mark.parametrize(("names", "trained", "left_out"), OF_SEVERAL_FORMATS)
def test_the_split_is_told_before_the_format(
    tmp_path: Path, names: str, trained: str, left_out: str
) -> None:
    fill(tmp_path, names)
    assert taken(tmp_path, tmp_path) == trained.split()
    assert said(tmp_path) == left_out
    (evaluated,) = locate(str(tmp_path), is_evaluation=True).urls
    (tested,) = locate(str(tmp_path), "test").urls
    assert Path(evaluated).stem == ("val" if "val" in names else "test")
    assert Path(tested).stem == "test"


@pytest.mark.parametrize(("names", "trained", "left_out"), TRAINED)
def test_training_takes_the_split_named_train(
    tmp_path: Path, names: str, trained: str, left_out: str
) -> None:
    fill(tmp_path, names)
    assert taken(tmp_path, tmp_path) == trained.split()
    assert said(tmp_path) == left_out
    assert len(locate(str(tmp_path), "all").urls) == len(names.split())


@pytest.mark.parametrize(
    ("names", "evaluated"),
    [
        ("train.jsonl test.jsonl valid.jsonl", "valid.jsonl"),
        ("train/0.jsonl test/0.jsonl test/1.jsonl", "test/0.jsonl test/1.jsonl"),
        (
            "train_sft-00000-of-00001.parquet test_gen-00000-of-00001.parquet test_sft-00000-of-00001.parquet",
            "test_sft-00000-of-00001.parquet",
        ),
        ("chat.jsonl chat_test.jsonl", "chat_test.jsonl"),
        # Nothing says that some of them are for something else.
        ("chat_dev.jsonl math_test.jsonl", "chat_dev.jsonl math_test.jsonl"),
        ("train.jsonl", "train.jsonl"),
        ("a.jsonl b.jsonl", "a.jsonl b.jsonl"),
    ],
)  # fmt: skip
def test_evaluation_takes_what_is_named_for_it(tmp_path: Path, names: str, evaluated: str) -> None:
    fill(tmp_path, names)
    urls = locate(str(tmp_path), is_evaluation=True).urls
    assert [str(Path(url).relative_to(tmp_path)) for url in urls] == evaluated.split()


def test_a_split_can_be_asked_for(tmp_path: Path) -> None:
    names = "train_sft.jsonl test_sft.jsonl test_gen.jsonl dev/a.jsonl math.jsonl math.py"
    fill(tmp_path, names)

    def read(split: str) -> list[str]:
        return [Path(url).name for url in locate(str(tmp_path), split).urls]

    assert read("TEST_SFT") == ["test_sft.jsonl"]
    assert read("test") == ["test_gen.jsonl", "test_sft.jsonl"]
    assert read("validation+train") == ["a.jsonl", "train_sft.jsonl"]
    assert read("math") == ["math.jsonl"]
    with pytest.raises(SourceError) as caught:
        read("train+chat")
    assert "--split train+chat: no file of split 'chat': its files are of dev, test, train." in str(
        caught.value
    )


def test_a_folder_of_test_files_is_not_trained_by_itself(tmp_path: Path) -> None:
    fill(tmp_path, "only/test-00000-of-00001.parquet only/validation-00000-of-00001.parquet")
    with pytest.raises(SourceError) as caught:
        locate(str(tmp_path / "only"))
    assert str(caught.value).endswith(
        "only: no file is for training, by their names: its files are of test, "
        "validation. To train on them, say so: --split test, or all for every file"
    )
    observed("folder of test files alone", str(caught.value), "only", NOTHING)
    assert len(locate(str(tmp_path / "only"), "test").urls) == 1
    assert len(locate(str(tmp_path / "only"), is_evaluation=True).urls) == 1
    # Who names the file, or its folder, has said so.
    assert locate(str(tmp_path / "only/test-00000-of-00001.parquet")).left_out == ()
    with pytest.raises(
        SourceError, match=r"--split train: no file of split 'train': its files are"
    ):
        locate(str(tmp_path / "only/test-00000-of-00001.parquet"), "train")


def test_a_hub_snapshot_trains_its_train_split() -> None:
    case = take("splits-and-sidecars/splits")
    (source,) = case.manifest.sources
    assert [Path(file.path).name for file in source.files] == ["train-00000-of-00001.parquet"]
    said = [str(group) for group in source.left_out]
    assert said == [
        "1 of split test (data/test-00000-of-00001.parquet)",
        "1 of split validation (data/validation-00000-of-00001.parquet)",
        "1 known to hold no rows (README.md)",
    ]
    evaluated = take("splits-and-sidecars/splits", is_evaluation=True).manifest.sources[0]
    assert [Path(file.path).name[:10] for file in evaluated.files] == ["validation"]
    everything = take("splits-and-sidecars/splits", split="all")
    assert everything.manifest.num_rows > case.manifest.num_rows
    assert (
        take("splits-and-sidecars/splits/**/t*.parquet").manifest.num_rows == case.manifest.num_rows
    )
    assert "its files are of test, train, validation" in refusal(
        "splits-and-sidecars/splits", split="chat"
    )
    assert len(take("splits-and-sidecars/snapshot").conversations) == 5


def test_a_dataset_dict_trains_its_train_folder(tmp_path: Path) -> None:
    """The folders of `DatasetDict.save_to_disk` are splits, whatever their names."""
    fill(tmp_path, "dataset_dict.json train/state.json")
    for split in ("train", "chat", "test"):
        target = tmp_path / split / "data-00000-of-00001.parquet"
        target.parent.mkdir(exist_ok=True)
        shutil.copy(CASES / "splits-and-sidecars/splits/data/train-00000-of-00001.parquet", target)
    assert taken(tmp_path, tmp_path) == ["train/data-00000-of-00001.parquet"]
    assert "1 of split chat" in said(tmp_path)
    (tmp_path / "dataset_dict.json").unlink()
    assert len(taken(tmp_path, tmp_path)) == 2


def test_a_source_without_splits_keeps_its_fingerprint(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text('{"text": "x"}\n')

    def source(split: str | None) -> SourceConfig:
        return SourceConfig("s", (str(tmp_path),), RowFormat("text"), split)

    by_hand = SourceConfig("s", (f"{tmp_path}/a.jsonl", f"{tmp_path}/b.jsonl"), RowFormat("text"))
    fingerprints = {build_manifest([s]).fingerprint for s in (source(None), source("all"), by_hand)}
    assert len(fingerprints) == 1


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ("949,50,1", "--split 949,50,1: shares of one set, as in Megatron-LM, are not supported"),
        ("train+", r"--split 'train\+': a name is empty"),
        ("", "--split '': a name is empty"),
    ],
)
def test_a_split_has_a_name(split: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SourceConfig("s", ("a.jsonl",), split=split)


HUB_LIKE = """README.md .gitattributes dataset_infos.json data/train-00000-of-00001.jsonl
data/test-00000-of-00001.jsonl lang=en/split=train/part-0.JSONL lang=en/.part-0.jsonl.crc _SUCCESS
data/d.docx"""


def test_a_bucket_is_read_as_a_folder_is(bucket: str, tmp_path: Path) -> None:
    """Folders, patterns, and names that look like patterns or hold blanks, on either side."""
    names = ["odd/rows[v2].jsonl", "odd/a b.jsonl", "odd/~c.jsonl", "odd/100%+#ü.jsonl"]
    for name in [*HUB_LIKE.split(), *names]:
        (tmp_path / "rows" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "rows" / name).write_text(f'{{"text": {json.dumps(name)}}}\n')
    storage.upload_folder(tmp_path / "rows", f"{bucket}/rows")

    def read(root: str, path: str, split: str | None = None) -> tuple[list[str], list[str]]:
        located = locate(f"{root}/{path}", split)
        return [url.removeprefix(f"{root}/") for url in located.urls], list(
            map(str, located.left_out)
        )

    local = str(tmp_path / "rows")
    remote = f"{bucket}/rows"
    for path in ("", "data", "**/*", "*/*.jsonl", "odd", "odd/rows[v2].jsonl", "odd/r*"):
        assert read(local, path) == read(remote, path), path
        assert read(local, path, "all") == read(remote, path, "all"), path
    files, left_out = read(remote, "")
    assert files == [
        "data/train-00000-of-00001.jsonl",
        "lang=en/split=train/part-0.JSONL",
        *sorted(names),
    ]
    assert [group.split(" (")[0] for group in left_out] == [
        "1 of split test",
        "1 of an unknown format",
        "2 known to hold no rows",
        "3 hidden",
    ]

    for root in (local, remote):
        for name in names:
            manifest = build_manifest([SourceConfig("s", (f"{root}/{name}",), RowFormat("text"))])
            assert read_rows(manifest, np.array([0])) == [
                (tmp_path / "rows" / name).read_bytes().strip()
            ]
