"""An adapter merged into its base: PEFT's numbers, the base's files, both formats, little memory."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor

from miles.architecture.adapter import PEFT_PREFIX, TARGETS, AdapterShape, adapter_parameters
from miles.architecture.families import hf_shapes, read_shape
from miles.architecture.parameters import EMBEDDING
from miles.cli import main
from miles.common import storage
from miles.common.checkpoint_folder import BASE, CHAT_TEMPLATE, EXTRA
from miles.convert import tensor_io
from miles.convert.base_checksum import checksum_of
from miles.convert.hf_boxes import open_weights
from miles.convert.hf_to_megatron import hf_to_megatron
from miles.convert.megatron_to_hf import megatron_to_hf
from miles.convert.merge_adapter import Targets, merge_adapter
from miles.convert.peft_adapter import AdapterPlan
from miles.convert.safetensors_files import ShardedWriter, Spec
from miles.convert.safetensors_headers import ADAPTER, SINGLE
from miles.convert.torch_dist import Checkpoint
from miles.convert.verify import verify
from tests.support.adapters import ATTENTION, save_as_run, save_with_peft
from tests.support.bars import last_bars
from tests.support.launch import QWEN3
from tests.support.models import edit_tensors, make_hf, require_same_files
from tests.support.processes import PROJECT

RUN_ADAPTER = AdapterShape(4, 8.0, TARGETS)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, an adapter of it in PEFT's format, and one in a LoRA run's checkpoint."""
    folder = tmp_path_factory.mktemp("made")
    make_hf(folder / "hf", "qwen3", tied=True)
    save_as_run(folder / "hf", folder / "run", RUN_ADAPTER)
    megatron_to_hf(str(folder / "run"), str(folder / "hf"), str(folder / "adapter"))
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """The same, for a test to change."""
    return shutil.copytree(made, tmp_path / "made")


def deltas(folder: Path, scale: float, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return scale B A of each weight, by the weight's name."""
    tensors = load_file(folder / ADAPTER)
    found = {}
    for name in tensors:
        if ".lora_A." in name:
            a = tensors[name].to(dtype)
            b = tensors[name.replace("lora_A", "lora_B")].to(dtype)
            found[name.removeprefix(PEFT_PREFIX).replace(".lora_A", "")] = scale * b @ a
    return found


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("qwen3", {"target_modules": "all-linear"}),
        ("llama", {"target_modules": ["k_proj", "up_proj"], "use_rslora": True}),
        ("qwen3_moe", {"target_modules": list(ATTENTION)}),
    ],
)
def test_merged_weights_are_those_of_peft(
    family: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    hf = make_hf(tmp_path / "hf", family, tied=family == "qwen3")
    save_with_peft(hf, tmp_path / "adapter", dtype=torch.float32, **settings)
    targets = Targets(str(tmp_path / "merged"), str(tmp_path / "megatron"))
    merge_adapter(str(tmp_path / "adapter"), str(hf), targets)

    base = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32)
    theirs = PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload()
    theirs.save_pretrained(tmp_path / "theirs")
    expected = load_file(tmp_path / "theirs" / SINGLE)
    merged = load_file(tmp_path / "merged" / SINGLE)
    original = load_file(hf / SINGLE)
    assert merged.keys() == expected.keys() == original.keys()
    changed = {name for name in merged if not torch.equal(merged[name], original[name])}
    num_projections = len(load_file(tmp_path / "adapter" / ADAPTER)) // 2
    assert len(changed) == num_projections
    for name, tensor in expected.items():
        if name in changed:
            assert (merged[name] - tensor).abs().max() < 1e-6, name
        else:
            assert torch.equal(merged[name], tensor), name
    for file in hf.iterdir():
        if file.name != SINGLE:
            assert (tmp_path / "merged" / file.name).read_bytes() == file.read_bytes()

    hf_to_megatron(str(tmp_path / "merged"), str(tmp_path / "converted"))
    comparison = verify(str(tmp_path / "megatron"), str(tmp_path / "converted"))
    assert comparison.num_tensors > 0
    assert comparison.differences == ()


def test_bfloat16_is_rounded_once(tmp_path: Path) -> None:
    """No value is farther from the exact sum than half a unit of its last place.

    PEFT does the same, unless it is told to hold A and B in bfloat16.
    """
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    hf = make_hf(tmp_path / "hf", "qwen3", tied=False, dtype=torch.bfloat16)
    save_with_peft(hf, tmp_path / "adapter", dtype=torch.bfloat16, target_modules="all-linear")
    merge_adapter(str(tmp_path / "adapter"), str(hf), Targets(str(tmp_path / "merged"), None))

    original = load_file(hf / SINGLE)
    merged = load_file(tmp_path / "merged" / SINGLE)
    for name, delta in deltas(tmp_path / "adapter", 6 / 4, torch.float64).items():
        assert merged[name].dtype == torch.bfloat16
        exact = original[name].double() + delta
        half_unit = torch.exp2((exact.frexp().exponent - 9).double())
        assert ((merged[name].double() - exact).abs() <= half_unit * 1.001).all(), name

    shares = []
    for settings in ({}, {"autocast_adapter_dtype": False}):
        base = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.bfloat16)
        adapted = PeftModel.from_pretrained(base, tmp_path / "adapter", **settings)
        theirs = adapted.merge_and_unload().state_dict()
        differ = torch.cat([(merged[name] != theirs[name]).flatten() for name in merged])
        shares.append(float(differ.float().mean()))
    assert shares[0] < 1e-3
    assert shares[1] > 0.05


def test_either_format_of_adapter_and_base_gives_the_same_files(folder: Path) -> None:
    hf_to_megatron(
        str(folder / "hf"), str(folder / "base"), make_vocab_size_divisible_by=128
    )  # with rows of padding
    shutil.copytree(folder / "hf", folder / "bare")  # a folder without weights
    (folder / "bare" / SINGLE).unlink()
    extra = folder / "run/iter_0000007" / EXTRA
    extra.write_text(json.dumps({**json.loads(extra.read_text()), CHAT_TEMPLATE: "of the run"}))
    megatron_to_hf(str(folder / "run"), str(folder / "hf"), str(folder / "adapter"))

    for name, base in (("adapter", ["hf"]), ("run", ["bare", "base"])):
        words = ["convert", "merge-adapter", "--adapter", str(folder / name)]
        words += ["--hf-checkpoint", str(folder / base[0])]
        words += ["--ref-load", str(folder / base[1])] if base[1:] else []
        words += [
            "--save",
            str(folder / f"hf-{name}"),
            "--save-megatron",
            str(folder / f"m-{name}"),
        ]
        assert main(words) == 0
        assert main(words) == 0, "what a merge wrote, the next one may replace"
    require_same_files(folder / "hf-adapter", folder / "hf-run")
    assert (folder / "hf-run/chat_template.jinja").read_text() == "of the run"
    assert not verify(str(folder / "m-adapter"), str(folder / "m-run")).differences
    assert not verify(str(folder / "m-adapter"), str(folder / "hf-run")).differences
    assert verify(str(folder / "hf-run"), str(folder / "hf")).differences


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_padding_are_zeros(
    dtype: torch.dtype, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the base has another dtype, and none of them; memory holds other numbers."""
    make_hf(folder / "other", "qwen3", tied=True, dtype=dtype)
    hf_to_megatron(str(folder / "other"), str(folder / "base"))
    buffer = tensor_io.buffer
    monkeypatch.setattr(tensor_io, "buffer", lambda *of: buffer(*of).fill_(7))
    targets = Targets(None, str(folder / "merged"), make_vocab_size_divisible_by=100)
    merge_adapter(str(folder / "run"), str(folder / "hf"), targets, ref_load=str(folder / "base"))

    checkpoint = Checkpoint(folder / "merged/release", "merged")
    assert checkpoint.tensors[EMBEDDING].size == (200, 64)
    rows = checkpoint.read(EMBEDDING, (190, 0), torch.ones(10, 64))
    assert rows[:2].abs().min() > 0
    assert rows[2:].abs().max() == 0


def test_merging_from_a_store_to_a_store(folder: Path, bucket: str) -> None:
    for name in ("hf", "adapter", "run"):
        storage.upload_folder(folder / name, f"{bucket}/{name}")
    merge_adapter(
        str(folder / "run"),
        str(folder / "hf"),
        Targets(str(folder / "merged"), str(folder / "megatron"), max_shard_bytes=100_000),
    )

    screen = io.StringIO()
    screen.isatty = lambda: True  # type: ignore[method-assign]
    console = Console(file=screen, force_terminal=True, width=100, no_color=True)
    for name in ("run", "adapter"):
        targets = Targets(f"{bucket}/merged", f"{bucket}/megatron", max_shard_bytes=100_000)
        merge_adapter(f"{bucket}/{name}", f"{bucket}/hf", targets, console=console)
        assert not verify(f"{bucket}/merged", str(folder / "merged")).differences
        assert not verify(f"{bucket}/megatron", str(folder / "megatron")).differences
        assert storage.names(f"{bucket}/merged") == storage.names(str(folder / "merged"))
    bars = last_bars(screen.getvalue())
    labels = ["downloading", *["converting", "uploading"] * 2]
    assert [label for label, _, _ in bars] == labels * 2
    assert all(done == num_bytes for _, done, num_bytes in bars)


@pytest.mark.parametrize(
    ("words", "status", "found"),
    [
        ("--adapter adapter", 2, "nothing is to be written: give --save"),
        ("--adapter adapter --save adapter", 2, "adapter: is, or holds, --adapter "),
        ("--adapter adapter --save hf", 2, "hf: is, or holds, --hf-checkpoint "),
        ("--adapter adapter --save-megatron .", 2, "is, or holds, --adapter "),
        ("--adapter adapter --ref-load base --save-megatron base", 2, "holds, --ref-load "),
        ("--adapter adapter --save x --save-megatron x/y", 2, "x: is, or holds, --save-meg"),
        ("--adapter adapter --save x --ckpt-step 7", 2, "PEFT's format, which has no steps"),
        ("--adapter adapter --save run", 3, "run: holds iter_0000007, latest_checkpointed_it"),
        ("--adapter adapter --save-megatron run", 3, "run: holds the checkpoints of a run"),
        ("--adapter run --save x --ckpt-step 8", 3, "all/run: give --ckpt-step 7\n"),
        ("--adapter mistyped --save x", 3, "mistyped: no such folder: give one with an adapter in"),
        ("--adapter hf --save x", 3, "hf: neither an adapter in PEFT's format (adapter_config"),
        ("--adapter base --save x", 3, "base/release: holds a model's own weights, no adapter"),
        ("--adapter run --ref-load run --save x", 3, "iter_0000007: holds an adapter, not the"),
        ("--adapter run --ref-load moe --save x", 3, "moe: a checkpoint of another model: "),
        ("--adapter run --ref-load bare --save x", 3, "bare/model.safetensors: no such file"),
        ("--adapter dora --save x", 3, "dora/adapter_config.json: use_dora is True: DoRA"),
        ("--adapter nan --save x", 3, "nan: lora_B of up_proj in layer 2 holds NaN or infinity"),
        ("--adapter run --ref-load eight --save x", 3, "float8_e4m3fn: nothing can be merged"),
        ("--adapter run --ref-load columns --save x", 3, "columns: not the weights that the ad"),
        (
            "--adapter large --hf-checkpoint half --save x --save-megatron y",
            3,
            "large: tensor model.layers.2.mlp.up_proj.weight would have 1e+06, and float16 ends at",
        ),
        (
            "--adapter adapter --ref-load big --hf-checkpoint half --save-megatron y",
            3,
            "adapter: tensor model.norm.weight would have 1e+05, and float16 ends at 6.55e+04: give",
        ),
        ("--adapter huge --save x", 3, "huge: tensor model.layers.2.mlp.up_proj.weight would hold"),
        (
            "--adapter run --save x --chat-template-path broken.jinja",
            3,
            "broken.jinja: not a chat template that can run: TemplateSyntaxError: unexpected",
        ),
    ],
)
def test_refusals_leave_everything_as_it_was(
    words: str, status: int, found: str, sources: Path, capsys: Any, monkeypatch: Any
) -> None:
    before = sorted(sources.rglob("*"))
    monkeypatch.chdir(sources)
    line = ["convert", "merge-adapter", "--hf-checkpoint", "hf", *words.split()]
    assert main(line) == status
    error = capsys.readouterr().err
    assert found in error
    assert error.count("\n") == 1
    assert sorted(sources.rglob("*")) == before


@pytest.fixture(scope="module")
def sources(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters and bases of which some cannot be merged."""
    folder = shutil.copytree(made, tmp_path_factory.mktemp("sources") / "all")
    hf_to_megatron(str(folder / "hf"), str(folder / "base"))
    make_hf(folder / "moe", "qwen3_moe", tied=False)
    make_hf(folder / "half", "qwen3", tied=True, dtype=torch.float16)
    for name in ("bare", "eight", "columns", "big"):
        shutil.copytree(folder / "hf", folder / name)
    (folder / "bare" / SINGLE).unlink()
    edit_tensors(
        folder / "eight",
        lambda held: held.update({name: held[name].to(torch.float8_e4m3fn) for name in held}),
    )

    extra = folder / "run/iter_0000007" / EXTRA
    stated = {"url": str(folder / "hf"), "checksums": {"float32": checksum(folder / "hf")}}
    extra.write_text(json.dumps({**json.loads(extra.read_text()), BASE: stated}))
    name = "model.layers.1.mlp.down_proj.weight"
    edit_tensors(folder / "columns", lambda held: held.update({name: held[name].flip(1)}))

    edit_tensors(folder / "big", lambda held: held["model.norm.weight"].fill_(1e5))
    (folder / "broken.jinja").write_text("{% for message in messages %}{{ message }")

    for name in ("dora", "nan", "large", "huge"):
        shutil.copytree(folder / "adapter", folder / name)
    config = folder / "dora/adapter_config.json"
    config.write_text(config.read_text().replace('"use_dora": false', '"use_dora": true'))
    module = f"{PEFT_PREFIX}model.layers.2.mlp.up_proj"
    for name, value in {"nan": float("nan"), "large": 1e6 / 2, "huge": 3e38}.items():
        tensors = load_file(folder / name / ADAPTER)
        tensors[f"{module}.lora_A.weight"][1, 7] = 1  # the scale is 2
        tensors[f"{module}.lora_B.weight"][5, 1] = value
        save_file(tensors, folder / name / ADAPTER)
    return folder


def checksum(hf: Path) -> str:
    """Return the checksum that a run in float32 states of its base."""
    shape = read_shape(str(hf))
    return checksum_of(open_weights(str(hf), shape), shape, "float32", None)


MEASURE = """
import sys
from pathlib import Path
from miles.convert import parallel
from miles.convert.merge_adapter import Targets, merge_adapter

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

folder = sys.argv[1]
parallel.NUM_THREADS = 1
before = peak()
targets = Targets(folder + "/merged", folder + "/megatron")
merge_adapter(folder + "/adapter", folder + "/hf", targets)
print(peak() - before)
"""


def test_a_tensor_at_a_time_is_in_memory(tmp_path: Path) -> None:
    """A model of 200 MB, whose largest tensor has 4 MB, in files with holes for zeros."""
    hf = tmp_path / "hf"
    hf.mkdir()
    sizes = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 24}
    config = {**QWEN3, **sizes, "vocab_size": 8, "architectures": ["Qwen3ForCausalLM"]}
    (hf / "config.json").write_text(json.dumps(config))
    shape = read_shape(str(hf))
    specs = {name: Spec(torch.bfloat16, sizes) for name, sizes in hf_shapes(shape).items()}
    ShardedWriter(hf, specs, dict.fromkeys(specs, SINGLE)).close()

    adapter = tmp_path / "adapter"
    adapter.mkdir()
    keys = (parameter.megatron for parameter in adapter_parameters(shape, RUN_ADAPTER))
    plan = AdapterPlan(str(hf), shape, RUN_ADAPTER, dict.fromkeys(keys, torch.float32))
    plan.create(adapter).close()
    plan.complete(adapter, None)

    words = [sys.executable, "-c", MEASURE, str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, cwd=PROJECT, check=True)
    assert (tmp_path / "merged" / SINGLE).stat().st_size > 200e6
    assert int(done.stdout) < 80e6, f"{int(done.stdout):,} bytes"
