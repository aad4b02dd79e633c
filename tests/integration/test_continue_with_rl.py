"""docs/continue-with-rl.md: what a run leaves for one of Miles, and two packages on one cluster."""

from __future__ import annotations

import json
import pickle
import sys
import venv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from miles.architecture.families import read_shape
from miles.train.parallel_layout import Layout
from tests.support import plain_megatron
from tests.support.commands import Workspace
from tests.support.nodes import JobServer
from tests.support.ranks import run_ranks, start
from tests.support.runs import NUM_STEPS

pytestmark = pytest.mark.slow

TEXT = list(range(7, 107))
UNCHANGED_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
)


@dataclass(frozen=True)
class PlainModel:
    """What a plain megatron-core model asked of a checkpoint, and what it made of it."""

    tensors: dict[str, tuple[tuple[int, ...], torch.dtype]]
    """the shape and type of each tensor that it asks for, by key"""
    extra_states: set[str]
    """the keys of its other objects"""
    logits: np.ndarray
    """float32 [tokens, vocabulary], with the weights of the checkpoint"""


def load_plain_model(layout: Layout, rank: int, meeting: Path, hf: str, url: str) -> PlainModel:
    """Load a checkpoint as Megatron-LM does: nothing filtered, the default strictness."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedObject, apply_factories

    start(layout, rank, meeting)
    model = plain_megatron.build(read_shape(hf))
    asked = model.sharded_state_dict()
    apply_factories(asked)  # such as the two halves of a gated layer's first matrix
    tensors, extra_states = {}, set()
    for value in nested_values(asked):
        if isinstance(value, ShardedObject):
            extra_states.add(value.unique_key)
        else:
            tensors[value.key] = (tuple(value.global_shape), value.dtype)

    loaded = dist_checkpointing.load({"model": model.sharded_state_dict()}, url)
    model.load_state_dict(loaded["model"])
    return PlainModel(tensors, extra_states, plain_megatron.logits(model, TEXT))


@pytest.fixture(scope="module")
def checkpoint(unbroken: Path) -> Path:
    """The folder of the checkpoint that the run's tracker names, as `--load` finds it."""
    iteration = (unbroken / "latest_checkpointed_iteration.txt").read_text()
    assert int(iteration) == NUM_STEPS
    return unbroken / f"iter_{int(iteration):07d}"


@pytest.fixture(scope="module")
def plain(checkpoint: Path, unbroken: Path) -> PlainModel:
    layout = Layout(1)
    (model,) = run_ranks(load_plain_model, layout, str(unbroken / "export"), str(checkpoint))
    return model


def test_a_plain_model_finds_what_it_asks_for(checkpoint: Path, plain: PlainModel) -> None:
    stored = pickle.loads((checkpoint / ".metadata").read_bytes()).state_dict_metadata
    found = {key: (tuple(stored[key].size), stored[key].properties.dtype) for key in plain.tensors}
    assert found == plain.tensors
    assert len(plain.tensors) >= 10
    assert plain.extra_states, "local layers have them"
    assert plain.extra_states <= stored.keys()


def test_the_common_part_has_what_megatron_compares(checkpoint: Path, unbroken: Path) -> None:
    common = torch.load(checkpoint / "common.pt", weights_only=False)
    config = json.loads((unbroken / "export/config.json").read_text())
    args = common["args"]
    assert common["checkpoint_version"] == 3.0
    assert common["iteration"] == NUM_STEPS
    assert args.consumed_train_samples == NUM_STEPS * 32
    assert (args.no_save_optim, args.no_save_rng) == (False, True)
    assert args.num_layers == config["num_hidden_layers"]
    assert args.hidden_size == config["hidden_size"]
    assert args.num_attention_heads == config["num_attention_heads"]
    assert args.padded_vocab_size == config["vocab_size"]
    assert args.tensor_model_parallel_size == args.pipeline_model_parallel_size == 1


def test_the_export_is_the_trained_model(
    workspace: Workspace, unbroken: Path, plain: PlainModel
) -> None:
    """Weights, tokenizer, template and generation configuration, by transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    export, before = unbroken / "export", workspace.folder / "hf"
    models = [
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        for folder in (export, before)
    ]
    with torch.no_grad():
        trained, untrained = (model(torch.tensor([TEXT])).logits[0].numpy() for model in models)
    assert np.abs(trained - plain.logits).max() < 1e-4
    assert np.abs(trained - untrained).max() > 1e-2, "it did train"

    for name in UNCHANGED_FILES:
        assert (export / name).read_bytes() == (before / name).read_bytes(), name
    tokenizer = AutoTokenizer.from_pretrained(export)
    messages = [{"role": "user", "content": "2+2?"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    prompt = tokenizer.decode(ids)
    assert prompt == "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"
    generation = GenerationConfig.from_pretrained(export)
    assert generation.eos_token_id == GenerationConfig.from_pretrained(before).eos_token_id


JOB = """
import json, sys, time
from pathlib import Path

import miles, ray

@ray.remote(num_cpus=0)
class Actor:
    def package(self):
        import miles
        return getattr(miles, "WHOSE", "installed")

ray.init(log_to_driver=False)
own_variables = {"env_vars": {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}}
actors = [Actor.remote(), Actor.options(runtime_env=own_variables).remote()]
found = [getattr(miles, "WHOSE", "installed"), *ray.get([a.package.remote() for a in actors])]

folder, name, num_jobs = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
folder.joinpath(name).touch()
deadline = time.monotonic() + 120
while len(list(folder.iterdir())) < num_jobs and time.monotonic() < deadline:
    time.sleep(0.05)
print("FOUND", json.dumps([found, len(list(folder.iterdir()))]))
"""
"""Says which package `miles` is, to the driver and to two actors, once all jobs have looked."""


def make_package(folder: Path, whose: str) -> Path:
    """Write another package of the name `miles`; return the folder that it lies in."""
    (folder / "miles").mkdir(parents=True)
    (folder / "miles/__init__.py").write_text(f"WHOSE = {whose!r}")
    return folder


def make_environment(folder: Path, whose: str) -> Path:
    """Make a virtual environment with another `miles`, and the rest of this one; return its Python."""
    venv.create(folder, symlinks=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    make_package(packages, whose)
    here = [path for path in sys.path if path.endswith("site-packages")]
    (packages / "here.pth").write_text("\n".join(here))
    return folder / "bin/python"


def test_jobs_at_once_have_each_their_own_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray starts in this checkout: without a working_dir, workers would look there first."""
    monkeypatch.delenv("PYTHONPATH", raising=False)  # `miles` is what is installed
    seen, scripts = tmp_path / "seen", tmp_path / "scripts"
    checkout = make_package(tmp_path / "checkout", "of the working_dir")
    python = make_environment(tmp_path / "environment", "of the environment")
    seen.mkdir()
    scripts.mkdir()
    for folder in (scripts, checkout):
        (folder / "job.py").write_text(JOB)

    jobs: dict[str, tuple[str, dict[str, str]]] = {
        "installed": (sys.executable, {"working_dir": str(scripts)}),
        "of the working_dir": (sys.executable, {"working_dir": str(checkout)}),
        "of the environment": (
            str(python),
            {"working_dir": str(scripts), "py_executable": str(python)},
        ),
    }
    server = JobServer()
    try:
        sent = {}
        for number, (whose, (executable, runtime_env)) in enumerate(jobs.items()):
            words = [executable, "job.py", str(seen), str(number), str(len(jobs))]
            sent[whose] = server.submit(words, runtime_env)
        logs = {whose: job.wait() for whose, job in sent.items()}
    finally:
        server.end()

    for whose, printed in logs.items():
        assert "FOUND" in printed, printed
        found, num_at_once = json.loads(printed.rpartition("FOUND")[2])
        assert found == [whose] * 3, "the driver, and actors without and with variables"
        assert num_at_once == len(jobs)
