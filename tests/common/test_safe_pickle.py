"""A checkpoint's pickle is read only where it holds nothing but records."""

from __future__ import annotations

import ast
import pickle
from pathlib import Path

import pytest

from miles.common.safe_pickle import require_plain
from miles.convert.hf_to_megatron import hf_to_megatron
from miles.convert.megatron_to_hf import megatron_to_hf
from miles.errors import CheckpointError
from tests.support.models import make_hf
from tests.support.pickles import ShellCommand


def test_a_checkpoint_of_a_stranger_runs_nothing(tmp_path: Path) -> None:
    hf = make_hf(tmp_path / "hf", "qwen3", tied=True)
    hf_to_megatron(str(hf), str(tmp_path / "megatron"))
    folder = tmp_path / "megatron/release"
    require_plain(folder, "there")
    (folder / ".metadata").write_bytes(pickle.dumps({"x": ShellCommand(f"touch {tmp_path}/ran")}))
    with pytest.raises(
        CheckpointError, match=r"release/\.metadata: refused: it names posix\.system, which no"
    ):
        megatron_to_hf(str(tmp_path / "megatron"), str(hf), str(tmp_path / "back"))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "content",
    [
        b"ctorch.distributed.checkpoint.metadata\nos.system\n.",  # protocol 0: a global by its text
        b"ctorch.distributed.checkpoint.planner\nreduce\n.",  # imported there from functools
        b"ctorch\nload\n.",
        b"cbuiltins\neval\n.",
        b"",
        b"PK\x03\x04",
    ],
)
def test_ways_round_it(tmp_path: Path, content: bytes) -> None:
    (tmp_path / ".metadata").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"there/\.metadata: refused: "):
        require_plain(tmp_path, "there")


def test_without_one(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"there: no \.metadata there"):
        require_plain(tmp_path, "there")


def test_nothing_is_unpickled_without_limits() -> None:
    """Every `torch.load` has `weights_only=True`; only the one guarded unpickler unpickles."""
    calls = []
    for path in sorted((Path(__file__).parents[2] / "miles").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr in ("load", "loads")
            ):
                owner = ast.unparse(node.func.value)
                assert owner not in ("pickle", "cloudpickle", "joblib", "dill"), path
                if owner == "torch":
                    calls.append(path.name)
                    assert {(one.arg, ast.unparse(one.value)) for one in node.keywords} >= {
                        ("weights_only", "True")
                    }, path
    assert "torch_dist.py" in calls
