"""What is known before a start stops `train` and `--dry-run` alike: without Ray, without a trace.

Each mistake is made on a launch line that would train, and given to both.
"""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ray

from miles.cli import main
from miles.common.checkpoint_tracker import TRACKER, write_tracker
from miles.convert.hf_to_megatron import hf_to_megatron
from miles.data import prepare
from miles.data.encoding import kept_encoders, state_cache
from miles.demo.model import build_model
from miles.errors import ConfigError, WriteError
from miles.train.estimate.gpu_fit import GpuFit
from miles.train.estimate.memory import StageMemory
from miles.train.estimate.preflight import preflight
from miles.train.launch.arguments import parse
from tests.support.checkpoints import write_checkpoint
from tests.support.disks import small_disk
from tests.support.fault_table import NOTHING, SINCE, observed
from tests.support.object_storage import s3_bucket
from tests.support.processes import PROJECT, without_patience
from tests.support.streams import demo_tokenizer

NUM_ROWS = 40
STEP_ROWS = 8


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("preflight") / "hf"
    build_model(demo_tokenizer(), folder)
    return folder


@pytest.fixture(autouse=True)
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test beside these may have a Ray; nothing here starts one or joins it."""

    def start(*words: Any, **more: Any) -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr(ray, "init", start)
    monkeypatch.setattr(ray, "is_initialized", start)


class Line:
    """A launch line that would train: a model with weights, and rows that can be used.

    Args:
        folder: for the rows, and for the run's folder.
        model: folder of the model.
    """

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder = folder
        self.model = model
        self.rows = folder / "rows.jsonl"
        self.write_rows(num_bad=0)

    def write_rows(self, num_bad: int, name: str = "rows.jsonl") -> Path:
        """Write a file of rows, of which the last ones cannot be used."""
        good = {
            "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        }
        bad = {"messages": [{"role": "user", "content": "nobody answers"}]}
        rows = [good] * (NUM_ROWS - num_bad) + [bad] * num_bad
        path = self.folder / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    def words(self, **changes: Any) -> list[str]:
        """Return the words.

        Args:
            changes: flags that are added or replaced; True for one without a value.
        """
        flags: dict[str, Any] = {
            "hf_checkpoint": self.model,
            "save": self.folder / "run",
            "prompt_data": self.rows,
            "rollout_batch_size": STEP_ROWS,
            "max_tokens_per_gpu": 256,
            **changes,
        }
        words = []
        for name, value in flags.items():
            words.append("--" + name.replace("_", "-"))
            if value is not True:
                words.append(str(value))
        return words

    def refused(self, capsys: pytest.CaptureFixture[str], **changes: Any) -> tuple[int, str]:
        """Give the line to `train` and to `--dry-run`; return the status and the text of both.

        Neither may leave anything behind.
        """
        before = everything_in(self.folder)
        capsys.readouterr()
        outcomes = []
        for more in ([], ["--dry-run"]):
            status = main(["train", *self.words(**changes), *more])
            printed = capsys.readouterr()
            assert everything_in(self.folder) == before
            outcomes.append((status, without_patience(printed.err)))
        assert outcomes[0] == outcomes[1]
        status, error = outcomes[0]
        assert "Traceback" not in error
        assert error.count("\n") == 1, "one paragraph"
        return status, error


@pytest.fixture
def line(tmp_path: Path, model: Path) -> Line:
    return Line(tmp_path, model)


def everything_in(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*"))


def test_a_second_start_imports_no_torch(
    line: Line, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the first start has certified is kept, and headers are read without torch."""
    monkeypatch.setenv("MILES_CACHE", str(tmp_path / "cache"))
    config = kept_encoders.first_engine(parse(line.words()).data.encode)  # the run is short
    key, state = state_cache.key_of(config), kept_encoders.state_of(config)
    assert key is not None
    assert state is not None
    state_cache.keep(key, config, state)

    code = (
        "import sys; from miles.train.estimate.preflight import preflight; "
        "from miles.train.launch.arguments import parse; print(preflight(parse(sys.argv[1:]))); "
        "print([name for name in ('torch', 'transformers', 'ray') if name in sys.modules]); "
        "import miles.train.driver.loop; "
        "print([name for name in ('torch', 'transformers', 'ray.data') if name in sys.modules])"
    )
    words = [sys.executable, "-c", code, *line.words()]
    done = subprocess.run(words, capture_output=True, text=True, cwd=PROJECT, timeout=240)
    assert done.stdout.splitlines()[-2:] == ["[]", "[]"], done.stderr


def test_rows_that_are_all_unusable(line: Line, capsys: pytest.CaptureFixture[str]) -> None:
    line.write_rows(num_bad=NUM_ROWS)
    status, error = line.refused(capsys, max_bad_fraction=1)
    assert status == 3
    observed("no row can be used", error, "can be used", NOTHING)

    status, error = line.refused(capsys, max_tokens_per_gpu=3)
    assert status == 3
    assert "--max-sample-tokens (at most what --max-tokens-per-gpu holds)" in error


def test_a_small_set_with_too_many_bad_rows(line: Line, capsys: pytest.CaptureFixture[str]) -> None:
    """The sample is the whole set: it says what the last step of an epoch would."""
    line.write_rows(num_bad=30)
    status, error = line.refused(capsys)
    assert status == 3
    observed("too large a share of a small set cannot be used", error, "were dropped", NOTHING)

    # Two steps read the first 16 rows alone.
    assert preflight(parse(line.words(max_bad_fraction=0.75))).num_steps == 5
    assert preflight(parse(line.words(num_rollout=1))).num_steps == 1


def test_no_row_to_evaluate(line: Line, capsys: pytest.CaptureFixture[str]) -> None:
    bad = line.write_rows(NUM_ROWS, "eval.jsonl")
    status, error = line.refused(capsys, eval_prompt_data=bad)
    assert status == 3
    observed("no row to evaluate can be used", error, "nothing to evaluate", NOTHING)

    status, error = line.refused(capsys, eval_fraction=0.001)
    assert status == 3
    assert "--eval-fraction 0.001 holds out 0 of 40 rows" in error


def test_a_warm_up_as_long_as_the_run(line: Line, capsys: pytest.CaptureFixture[str]) -> None:
    status, error = line.refused(capsys, lr_warmup_iters=5)
    assert status == 2
    observed("warm-up not shorter than the run", error, "is not shorter than", NOTHING)


def test_no_weights_to_begin_with(line: Line, capsys: pytest.CaptureFixture[str]) -> None:
    """All that is known beside them is printed by the dry run."""
    missing = line.folder / "nowhere"
    status, error = line.refused(capsys, ref_load=missing)
    assert status == 3
    observed("no checkpoint to begin with", error, "no Megatron checkpoint there", NOTHING)

    main(["train", *line.words(ref_load=missing), "--dry-run"])
    printed = capsys.readouterr().out
    assert "Memory of a GPU" in printed
    assert "missing: the error at the end says what to do" in printed


def test_a_checkpoint_of_other_data(line: Line, capsys: pytest.CaptureFixture[str]) -> None:
    """The position of a run in its data is compared before Ray is started."""
    run = line.folder / "run"
    checkpoint = Path(write_checkpoint(run, 2))
    write_tracker(str(run), 2)
    beginning = preflight(parse(line.words(save=line.folder / "other"))).cursor
    cursor = json.loads(beginning.to_json()) | {"consumed_rows": 16}
    (checkpoint / "miles.json").write_text(json.dumps({"cursor": cursor}))

    found = preflight(parse(line.words()))
    assert (found.first_step, found.num_steps, found.is_finished) == (2, 5, False)
    assert preflight(parse(line.words(num_rollout=2))).is_finished
    status, error = line.refused(capsys, rollout_seed=7)
    assert status == 3
    assert "Give the old values" in error
    assert "--rollout-seed: the checkpoint has 42, this run 7" in error

    checkpoint = Path(write_checkpoint(run, 3, (checkpoint / "miles.json").read_text()))
    write_tracker(str(run), 3)
    (checkpoint / "__0_0.distcp").unlink()
    status, error = line.refused(capsys, num_rollout=2)
    assert status == 3
    observed("file of the newest checkpoint lost", error, "__0_0.distcp", SINCE)
    assert (
        f"{checkpoint}: __0_0.distcp: no such file, so that the checkpoint cannot be read" in error
    )


def test_folders_without_a_tracker(line: Line, capsys: pytest.CaptureFixture[str]) -> None:
    """The absence of one small file does not mean a new run."""

    def see(fault: str, marker: str, expected: int = 3, **changes: Any) -> None:
        status, error = line.refused(capsys, **changes)
        assert status == expected
        observed(fault, error, marker, NOTHING)

    run, other = line.folder / "run", line.folder / "other"
    see("mistyped `--load` beside `--ref-load`", "--load", load=other, ref_load=line.model)
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"step": 0}\n')
    see("metrics of a run, and nothing else of it", "holds the metrics")
    (run / "starts.jsonl").write_text('{"start": 1, "first_checkpoint": 20}\n')
    see("run whose checkpoints are gone", "that had checkpoints")

    for iteration in (20, 40):
        write_checkpoint(run, iteration)
    see("checkpoints, and no tracker", "names no checkpoint")
    see("checkpoints, and no tracker, in `--load`", "--load", save=other, load=run)
    for content, fault in (("", "empty tracker"), ("60", "tracker that names what is not there")):
        (run / TRACKER).write_text(content)
        see(fault, "To go on from step 40: echo 40 >")

    (run / "config.json").write_text(json.dumps({"save": str(run)}))
    see("`--output-dir` of another run", "another run", 2, save=other, output_dir=run)


def test_all_mistakes_are_named_at_once(line: Line, capsys: pytest.CaptureFixture[str]) -> None:
    (line.folder / "file").touch()
    status, error = line.refused(
        capsys,
        save=line.folder / "file/run",
        ref_load=line.folder / "nowhere",
        use_tensorboard=True,
        output_dir="memory://run",
    )
    assert status == 5, "that of the first"
    assert re.findall(r"[:;] \((\d)\) ", error) == ["1", "2", "3"], error
    assert "3 mistakes, and nothing was started" in error


@pytest.mark.parametrize("flag", ["save", "output_dir", "save_hf"])
def test_a_folder_that_cannot_be_made(
    line: Line, capsys: pytest.CaptureFixture[str], flag: str
) -> None:
    (line.folder / "file").touch()
    status, error = line.refused(capsys, **{flag: line.folder / "file/run"})
    assert status == 5
    assert f"--{flag.replace('_', '-')} {line.folder}/file" in error
    if flag == "save":
        observed("folder below a file", error, "is not a folder", NOTHING)


def test_a_disk_that_is_read_only(line: Line, capsys: pytest.CaptureFixture[str]) -> None:
    with small_disk(line.folder / "disk", "size=1m") as disk:
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        status, error = line.refused(capsys, save=disk / "run")
    assert status == 5
    observed("disk read-only before the start", error, "the disk is read-only", NOTHING)


def test_a_bucket_is_never_created(
    line: Line, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import s3fs

    with s3_bucket(monkeypatch) as bucket:
        status, error = line.refused(capsys, save="s3://buckett/run")
        assert status == 5
        observed("bucket mistyped", error, "no such bucket", NOTHING)
        status, error = line.refused(capsys, output_dir="s3://buckett/run")
        assert status == 5

        with pytest.raises(
            WriteError, match=r"the folder to write s3://buckett/.*: no such bucket"
        ):
            prepare("x", source=str(line.rows), tokenizer=str(line.model)).write("s3://buckett/x")
        with pytest.raises(WriteError, match=r"--save s3://buckett/.*: no such bucket"):
            hf_to_megatron(str(line.model), "s3://buckett/x")

        store = s3fs.S3FileSystem(use_listings_cache=False)
        assert store.ls("") == ["bucket"]
        assert preflight(parse(line.words(save=f"{bucket}/run"))).num_steps == 5
        assert store.find("bucket") == [], "the probe is removed"


def test_sinks_without_their_package(
    line: Line, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "wandb" else found(name)
    )
    status, error = line.refused(capsys, use_wandb=True)
    assert status == 2
    observed("package of a sink missing", error, "needs its package", NOTHING)


def stage(total_gib: float) -> StageMemory:
    """Return the memory of a stage that is half weights, half their state."""
    half = int(total_gib * 2**29)
    return StageMemory(0, 1, 1, 1, half, 0, half, 0, 0)


def test_no_gpu_is_large_enough(line: Line) -> None:
    """A dry run refuses what no known GPU holds; a run only says that its GPU seems too small."""
    config = parse(line.words())
    huge = GpuFit.of(config, [stage(100), stage(200)], None)
    with pytest.raises(ConfigError, match=r"would need 222 GiB .*more than the 192 GiB") as refused:
        huge.require_some_gpu()
    observed("no GPU is large enough, in a dry run", str(refused.value), "would need", NOTHING)
    assert list(huge.notices()) == []

    GpuFit.of(config, [stage(200)], 288.0).require_some_gpu()  # a GPU that no table has
    small = GpuFit.of(config, [stage(100)], 80.0)
    small.require_some_gpu()
    assert (small.smallest_gib, small.fits_seen) == (141, False)
    (notice,) = small.notices()
    assert notice.startswith("this machine's GPU has 80 GiB; the run is estimated to need 111 GiB")
    assert "--optimizer-cpu-offload" in notice
    assert [text.split(",")[0] for text in small.verdict()] == [
        "fits on GPUs of 141 GiB or more (with 10% to spare)",
        "not on the GPU of this machine",
        "most of it are weights and their state: more GPUs",
    ]


def test_what_may_be_a_mistake_is_said(line: Line, capsys: pytest.CaptureFixture[str]) -> None:
    """These runs go on: fewer rows in a step than ranks, bad rows beside those that it reads."""
    line.write_rows(num_bad=30)
    with small_disk(line.folder / "disk", "size=1m") as disk:
        words = line.words(
            save=disk / "run", num_rollout=1, actor_num_gpus_per_node=8, rollout_batch_size=6
        )
        assert main(["train", *words, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "a step has 6 rows for 8 data-parallel ranks: 2 of them have nothing to" in printed
    assert "30 of 40 sampled rows are dropped: 30 nothing_to_train; a larger share" in printed
    assert re.search(r"a checkpoint takes about 0.0147 GB, .* has 0.0010\d GB free", printed)
