"""Fixtures that several rooms share: a small tokenizer, a bucket, real assets where they are."""

from __future__ import annotations

import gc
import os
import random
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from tests.support.chatml import save_chatml_tokenizer
from tests.support.heavy import is_heavy, part_of_files
from tests.support.object_storage import s3_bucket

PROJECT = Path(__file__).parent.parent


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--quick", action="store_true", help="leave out files that start Ray or Megatron"
    )
    parser.addoption("--heavy", action="store_true", help="only files that start Ray or Megatron")
    parser.addoption("--part", metavar="K/N", help="of --quick or --heavy: share K of N")
    parser.addoption("--seed", type=int, help="of random choices; by default another each time")
    parser.addoption(
        "--chaos-seeds", type=int, default=0, metavar="N", help="of tests of chaos: from --seed on"
    )


def pytest_configure(config: pytest.Config) -> None:
    # How long an example takes is the machine's: no test goes by the clock.
    hypothesis.settings.register_profile("miles", deadline=None)
    hypothesis.settings.load_profile("miles")

    # In a shell's background Ctrl-C is ignored, below nohup SIGHUP, and so they would be in all
    # that tests start.
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    if config.option.seed is None:
        config.option.seed = random.SystemRandom().randrange(1_000_000)


def pytest_report_header(config: pytest.Config) -> str:
    return f"random choices: --seed {config.option.seed}"


def pytest_terminal_summary(terminalreporter: Any, exitstatus: int, config: pytest.Config) -> None:
    if exitstatus:
        terminalreporter.write_line(f"to draw the same again: --seed {config.option.seed}")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out the files that were not asked for, before they are imported."""
    if not collection_path.match("test_*.py") or not (config.option.quick or config.option.heavy):
        return None
    if config.option.quick == is_heavy(collection_path):
        return True
    if config.option.part:
        part, num_parts = map(int, config.option.part.split("/"))
        own_files = part_of_files(part, num_parts, heavy=config.option.heavy)
        return collection_path not in own_files or None
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if is_heavy(item.path):
            item.add_marker("heavy")


@pytest.fixture(autouse=True)
def nothing_heavy_in_a_quick_test(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fail where a test starts Ray though its file is not known as heavy."""
    if "ray" in sys.modules and request.node.get_closest_marker("heavy") is None:
        refuse = "this file starts Ray: import ray in it, so that `make quick` leaves it out"
        monkeypatch.setattr("ray.init", lambda *_, **__: pytest.fail(refuse))


@pytest.fixture(scope="module", autouse=True)
def spared_garbage_collector() -> None:
    """Have Python's garbage collector pass over what is there when a file's tests begin.

    torch, transformers and Ray are hundreds of thousands of objects, which live as long as the
    process. Looking through them again and again took a fifth of the time of the light tests.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def end_of_ranks() -> Iterator[None]:
    """End the ranks that a file's tests have left alive."""
    yield
    ranks = sys.modules.get("tests.support.ranks")
    if ranks is not None:
        ranks.end_ranks()


@pytest.fixture(scope="session")
def seed(request: pytest.FixtureRequest) -> int:
    """The seed of this session's random choices."""
    chosen: int = request.config.option.seed
    return chosen


@pytest.fixture
def draw(seed: int, request: pytest.FixtureRequest) -> random.Random:
    """A test's random choices: the same for the same `--seed`, whatever other tests run."""
    return random.Random(f"{seed} {request.node.nodeid}")


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the cache out of the user's home, here and in the processes that Ray starts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MILES_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of an empty bucket on an S3 server on loopback."""
    with s3_bucket(monkeypatch) as url:
        yield url


@pytest.fixture(scope="session")
def assets() -> Path:
    """The folder of real tokenizers and rows (`MILES_ASSETS`)."""
    path = Path(os.environ.get("MILES_ASSETS", PROJECT.parent / "shared" / "assets"))
    if not path.is_dir():
        pytest.skip(f"real assets are not at {path}; name their folder in MILES_ASSETS")
    return path


@pytest.fixture(scope="session")
def chatml_tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small byte-level BPE tokenizer with ChatML and Qwen3's special tokens."""
    folder = tmp_path_factory.mktemp("chatml") / "tokenizer"
    save_chatml_tokenizer(folder)
    return folder


@pytest.fixture
def chatml_tokenizer(chatml_tokenizer_folder: Path) -> Any:
    """The small tokenizer, loaded anew for each test, which may change it."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(chatml_tokenizer_folder)
