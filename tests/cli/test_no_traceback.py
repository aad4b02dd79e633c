"""Whatever a user does wrong, one paragraph says so: no traceback, no chained exception."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from miles.cli import main
from miles.common import atomic_folders, lease, storage
from miles.common.debugging import VARIABLE
from miles.data import prepare
from miles.data.notebook.parts import PartFiles
from miles.data.rows.message_parts import LIMITS, PartMaker
from miles.data.step_schemas import MESSAGES
from miles.data.types import RowRejected
from miles.errors import MilesError, WriteError
from miles.train.launch.parser import launch_settings
from tests.support.answer_mistakes import ANSWERS
from tests.support.disks import small_disk
from tests.support.fault_table import NOTHING, observed
from tests.support.mistakes import CALLS, COMMANDS, RUN, Call, Mistake, make_places
from tests.support.object_storage import s3_bucket
from tests.support.processes import without_patience

CHAINS = ("Traceback", "During handling", "The above exception")

MOST_CHARACTERS = 2_000
"""Of an error, whatever stands in it."""


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory, chatml_tokenizer_folder: Path) -> Any:
    """Files and folders for the mistakes, in an environment without credentials and hub."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE", VARIABLE):
            patch.delenv(name, raising=False)
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        patch.setenv("AWS_CONFIG_FILE", "/nowhere")
        patch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield make_places(tmp_path_factory.mktemp("places"), chatml_tokenizer_folder)


def status_of(words: list[str]) -> int:
    """Return the exit status of a command line that is run in this process."""
    try:
        return main(words)
    except SystemExit as end:  # argparse
        return int(end.code or 0)


@pytest.mark.parametrize(
    "mistake", [*COMMANDS, *ANSWERS], ids=lambda mistake: mistake.line[:60] or "nothing"
)
def test_a_mistake_is_one_paragraph(
    mistake: Mistake, places: Mapping[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    status = status_of(mistake.words(places))
    printed = capsys.readouterr().err
    assert (status, not any(words in printed for words in CHAINS)) == (mistake.status, True), (
        printed
    )
    paragraph = printed.partition("error:")[2]
    assert mistake.text in paragraph, printed
    assert paragraph.count("\n") == 1
    assert len(paragraph) < MOST_CHARACTERS
    assert "mistake in miles" not in printed


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_a_mistake_in_a_notebook_stands_alone(
    call: Call, places: Mapping[str, str], chatml_tokenizer: Any
) -> None:
    with pytest.raises((MilesError, RowRejected)) as caught:
        call.call(places, chatml_tokenizer)
    assert call.text in str(caught.value)
    assert len(str(caught.value)) < MOST_CHARACTERS
    shown = "".join(traceback.format_exception(caught.value))
    assert shown.count("Traceback") == 1
    # The line of the notebook, and those of the decorators.
    frames = traceback.extract_tb(caught.value.__traceback__)
    inner = [frame.filename for frame in frames if "/miles/" in frame.filename]
    assert all(
        name.endswith(("checked.py", "debugging.py", "python_words.py")) for name in inner
    ), inner


@pytest.mark.parametrize(
    "line",
    [
        "certify {none}",
        "prepare x --tokenizer {tokenizer} --output {out} --source s3://bucket/x.jsonl",
    ],
)
def test_a_process_of_its_own_says_the_same(line: str, places: Mapping[str, str]) -> None:
    command = [sys.executable, "-m", "miles.cli", *Mistake(line, 3, "").words(places)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 3
    printed = without_patience(done.stderr)
    assert printed.startswith("miles: error: ")
    assert printed.count("\n") == 1


def test_the_other_entry_says_the_same(places: Mapping[str, str]) -> None:
    script = Path(__file__).parents[2] / "train_async.py"
    command = [sys.executable, str(script), "--config", places["latin_text"]]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, without_patience(done.stderr).count("\n")) == (2, 1)
    assert "not UTF-8 text" in done.stderr


def test_a_hub_that_is_not_there_is_given_up_soon(
    places: Mapping[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import huggingface_hub
    from huggingface_hub import HfFileSystem

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    hub = HfFileSystem(endpoint="http://127.0.0.1:1", skip_instance_cache=True)
    monkeypatch.setattr("fsspec.core.url_to_fs", lambda url: (hub, url.removeprefix("hf://")))
    line = "prepare x --tokenizer {tokenizer} --output {out} --source hf://datasets/a/b/x.jsonl"
    assert main(Mistake(line, 3, "").words(places)) == 3
    printed = capsys.readouterr().err
    waiting, error, _ = without_patience(printed).split("\n")
    assert waiting == "miles: waiting for hf://datasets/a/b/x.jsonl, which does not answer yet"
    assert "tried 4 times" in error, "later calls, in a run, are tried 7 times"
    assert "Check the network" in error
    assert "HF_HUB_OFFLINE=true" in error
    observed("hub that cannot be reached", printed, "miles: error:", NOTHING)


def test_missing_credentials_say_which(
    places: Mapping[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    line = "prepare x --tokenizer {tokenizer} --output {out} --source s3://bucket/x.jsonl"
    assert main(Mistake(line, 3, "").words(places)) == 3
    printed = capsys.readouterr().err
    assert "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE" in printed
    observed("no credentials for a store", printed, "miles: error:", NOTHING)


@pytest.mark.parametrize(
    "line",
    [
        "train --dry-run --hf-checkpoint {hf} --prompt-data {rows} --save {out} --num-epoch 1 "
        "--rollout-batch-size 4 --save-hf",
        "convert megatron-to-hf --hf-checkpoint {hf} --load {empty} --save",
    ],
)
def test_an_export_onto_a_mount_point_is_refused_before_the_start(
    line: str, places: Mapping[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with small_disk(tmp_path / "disk", "size=1m") as disk:
        assert main([*Mistake(line, 5, "").words(places), str(disk)]) == 5
        printed = capsys.readouterr().err
        assert printed.startswith(f"miles: error: {disk}: a disk is mounted there")
        observed("export onto a mount point", printed, "miles: error:", NOTHING)

        # A folder in it may be replaced, unless another of the same disk is mounted there.
        atomic_folders.require_movable(disk / "export")
        (disk / "export").mkdir()
        (disk / "other").mkdir()
        bind = ["mount", "--bind", str(disk / "other"), str(disk / "export")]
        subprocess.run(bind, check=True)
        try:
            with pytest.raises(WriteError, match="a disk is mounted there"):
                atomic_folders.require_movable(disk / "export")
        finally:
            subprocess.run(["umount", "--lazy", str(disk / "export")], check=True)


@pytest.mark.parametrize("is_pressed_again", [False, True])
def test_ctrl_c_leaves_nothing_of_a_conversion(
    is_pressed_again: bool,
    places: Mapping[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupt(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    def write_half(folder: Path, *_: Any) -> None:
        (folder / "__0_0.distcp").write_bytes(b"half")
        interrupt()

    def interrupt_clearing_up(folder: atomic_folders.StagedFolder) -> None:
        os.close(folder._lock)  # as the end of the process does
        interrupt()

    monkeypatch.setattr("miles.convert.hf_to_megatron._write", write_half)
    if is_pressed_again:
        monkeypatch.setattr(atomic_folders.StagedFolder, "discard", interrupt_clearing_up)
    line = ["convert", "hf-to-megatron", "--hf-checkpoint", places["hf"], "--save"]
    assert main([*line, str(tmp_path / "out")]) == 130
    left = [path.name for path in (tmp_path / "out").glob("*")]
    said = "stopped; nothing of it is left, and the folder to write is as it was"
    if is_pressed_again:
        said = "stopped at once; what was begun may be left, and the same command removes it"
    assert capsys.readouterr().err == f"miles: Ctrl-C: {said}\n"
    assert left == ([".release.converting"] if is_pressed_again else [])

    monkeypatch.undo()
    assert main([*line, str(tmp_path / "out")]) == 0
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"release", "latest_checkpointed_iteration.txt"}


def test_one_conversion_at_a_time_writes_into_a_bucket(
    places: Mapping[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with s3_bucket(monkeypatch) as bucket:
        to_megatron = ["convert", "hf-to-megatron", "--hf-checkpoint", places["hf"]]
        to_hf = ["convert", "megatron-to-hf", "--hf-checkpoint", places["hf"]]
        to_hf += ["--load", f"{bucket}/run"]
        for line, save in ((to_megatron, f"{bucket}/run"), (to_hf, f"{bucket}/hf")):
            assert main([*line, "--save", save]) == 0
            before = storage.names(save)
            assert lease.LEASE not in before

            capsys.readouterr()
            with lease.hold(save, "--save", "miles convert", print):
                assert main([*line, "--save", save]) == RUN
                assert set(storage.names(save)) == {*before, lease.LEASE}
            printed = capsys.readouterr().err
            assert f"--save {save}: another run is writing there: miles convert on host" in printed
            assert main([*line, "--save", save]) == 0
            assert storage.names(save) == before


def test_ctrl_c_in_a_script_stands_alone(
    places: Mapping[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr("miles.data.notebook.prepare.build_manifest", interrupt)
    with pytest.raises(KeyboardInterrupt, match="stopped; nothing was written") as caught:
        prepare("x", source=places["rows"], tokenizer=places["tokenizer"])
    shown = "".join(traceback.format_exception(caught.value))
    assert shown.count("Traceback") == 1
    frames = traceback.extract_tb(caught.value.__traceback__)
    inner = [frame.filename for frame in frames if "/miles/" in frame.filename]
    assert all(
        name.endswith(("checked.py", "debugging.py", "python_words.py")) for name in inner
    ), inner


def test_a_full_disk_names_the_file_that_prepare_writes(tmp_path: Path) -> None:
    def fill(folder: Path) -> None:
        texts = [{"text": secrets.token_hex(500)} for _ in range(500)]
        maker = PartMaker(LIMITS)
        maker.add(pa.Table.from_pylist(texts, schema=MESSAGES))
        part = maker.finish()
        assert part is not None
        with PartFiles(str(folder)) as files:
            files.add(part)

    with small_disk(tmp_path / "disk", "size=128k") as disk:
        with pytest.raises(WriteError) as caught:
            fill(disk / "rows")
        printed = str(caught.value)
        assert printed.startswith(f"{disk}/rows/part-00000.parquet: cannot be written: no space")
        observed("disk full while `prepare` writes", printed, "part-", NOTHING)


FLAGS = sorted(name for name in launch_settings() if "wandb" not in name and "ray" not in name)
VALUES = st.one_of(
    st.text(max_size=12),
    st.integers().map(str),
    st.floats().map(str),
    st.sampled_from(["", "0", "-1", "{", "[1]", "null", "true", "..", "/", "1e999", "s3://", "*"]),
)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(flags=st.lists(st.tuples(st.sampled_from(FLAGS), VALUES), min_size=1, max_size=3))
def test_random_words_never_give_a_traceback(
    flags: list[tuple[str, str]], places: Mapping[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    line = "train --hf-checkpoint {hf} --prompt-data {rows} --save {out} --rollout-batch-size 4"
    words = Mistake(line, 0, "").words(places)
    for name, value in flags:
        words += [name, value]
    status = status_of([*words, "--dry-run"])
    printed = capsys.readouterr().err
    assert status in (0, 2, 3, 4, 5), printed
    assert not any(words in printed for words in CHAINS)
