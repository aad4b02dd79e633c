"""Whatever a user does wrong, one paragraph says so: no traceback, no chained exception."""

from __future__ import annotations

import subprocess
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from miles.cli import main
from miles.common.debugging import VARIABLE
from miles.common.first_contact import SILENT_SECONDS
from miles.data.types import RowRejected
from miles.errors import MilesError
from miles.train.launch.parser import launch_settings
from tests.support.mistakes import CALLS, COMMANDS, Call, Mistake, make_places

CHAINS = ("Traceback", "During handling", "The above exception")


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


@pytest.mark.parametrize("mistake", COMMANDS, ids=lambda mistake: mistake.line[:60] or "nothing")
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
    assert "mistake in miles" not in printed


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_a_mistake_in_a_notebook_stands_alone(
    call: Call, places: Mapping[str, str], chatml_tokenizer: Any
) -> None:
    with pytest.raises((MilesError, RowRejected)) as caught:
        call.call(places, chatml_tokenizer)
    assert call.text in str(caught.value)
    shown = "".join(traceback.format_exception(caught.value))
    assert shown.count("Traceback") == 1
    # The line of the notebook, and those of the decorators.
    frames = traceback.extract_tb(caught.value.__traceback__)
    inner = [frame.filename for frame in frames if "/miles/" in frame.filename]
    assert all(name.endswith(("checked.py", "debugging.py")) for name in inner), inner


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
    assert done.stderr.startswith("miles: error: ")
    assert done.stderr.count("\n") == 1


def test_the_other_entry_says_the_same(places: Mapping[str, str]) -> None:
    script = Path(__file__).parents[2] / "train_async.py"
    command = [sys.executable, str(script), "--config", places["latin_text"]]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
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
    assert SILENT_SECONDS < 3
    waiting, error, _ = printed.split("\n")
    assert waiting == "miles: waiting for hf://datasets/a/b/x.jsonl, which does not answer yet"
    assert "Check the network" in error
    assert "HF_HUB_OFFLINE=1" in error


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
