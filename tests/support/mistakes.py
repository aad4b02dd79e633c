"""Mistakes that users make: a line to type, or a call in a notebook, and what they should read.

Add a line to `COMMANDS` or `CALLS`. `{hf}`, `{rows}`, … are files and folders of `make_places`.
"""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from miles.data import encode, prepare
from miles.demo.model import build_model
from tests.support.checkpoints import SMALLEST

USAGE = 2
INPUT = 3
CLUSTER = 4
RUN = 5


@dataclass(frozen=True)
class Mistake:
    """A command line that cannot be run."""

    line: str
    status: int
    text: str
    """a part of what is printed"""

    def words(self, places: Mapping[str, str]) -> list[str]:
        """Return the words of the line."""
        return [word.format_map(places) for word in self.line.split()]


_PREPARE = "prepare x --tokenizer {tokenizer} --output {out} --source"
_PREPARE_BY = "prepare x --source {rows} --output {out} --tokenizer"
_TO_MEGATRON = "convert hf-to-megatron --save {out} --hf-checkpoint"
_TO_HF = "convert megatron-to-hf --hf-checkpoint {hf} --save {out} --load"
_TRAIN = (
    "train --hf-checkpoint {hf} --prompt-data {rows} --save {out} --rollout-batch-size 4 "
    "--num-epoch 1"
)
_DRY = f"{_TRAIN} --dry-run"
_LORA = "--lora-rank 8 --lora-alpha 16 --target-modules q_proj v_proj"

COMMANDS = (
    # The commands themselves.
    Mistake("", USAGE, "COMMAND is missing"),
    Mistake("nonsense", USAGE, "invalid choice"),
    Mistake("trian", USAGE, "did you mean miles train?"),
    Mistake("verify", USAGE, "did you mean miles convert verify?"),
    Mistake("convert hf-to-megtron", USAGE, "did you mean miles convert hf-to-megatron?"),
    Mistake("completion bsh", USAGE, "did you mean bash?"),
    Mistake("inspect {out} --colour never", USAGE, "no flag --colour here; did you mean --color?"),
    Mistake("convert", USAGE, "DIRECTION is missing"),
    Mistake("completion nonsense", USAGE, "invalid choice"),
    Mistake("report {out} --nonsense", USAGE, "there is no flag --nonsense here"),
    # Rows.
    Mistake(f"{_PREPARE} {{none}}.jsonl", INPUT, "none.jsonl: no such file"),
    Mistake(f"{_PREPARE} {{empty_word}}", INPUT, "the path of the rows is empty"),
    Mistake(f"{_PREPARE} {{file}}", INPUT, "its name does not say what is in it"),
    Mistake(f"{_PREPARE} {{file}}/x.jsonl", INPUT, "no such file"),
    Mistake(f"{_PREPARE} {{empty}}", INPUT, "no such file; the folder is empty"),
    Mistake(f"{_PREPARE} {{long}}.jsonl", INPUT, "its name is too long. Give it another name"),
    Mistake(f"{_PREPARE} {{nul}}", USAGE, "control character"),
    Mistake(f"{_PREPARE} {{not_parquet}}", INPUT, "cannot be read: not a Parquet file, or cut off"),
    Mistake(f"{_PREPARE} {{no_bytes_parquet}}", INPUT, "or cut off (0 bytes). Copy or write it"),
    Mistake(f"{_PREPARE} {{not_gzip}}", INPUT, "not a gzip file, as its name says, but"),
    Mistake(f"{_PREPARE} {{cut_gzip}}", INPUT, "damaged or cut off (EOFError"),
    Mistake(f"{_PREPARE} {{not_zstd}}", INPUT, "not a zstd file, as its name says, but"),
    Mistake(f"{_PREPARE} {{binary}}", INPUT, "binary.jsonl: none of the first 2 rows can be read"),
    Mistake(f"{_PREPARE} {{lists}}", INPUT, "is at line 1: a list, no object. Each row must be"),
    Mistake(f"{_PREPARE} {{scalars}}", INPUT, "is at line 1: a number, no object. Each row"),
    Mistake(f"{_PREPARE} {{wide}}", INPUT, "UTF-16 text; UTF-8 was expected. Convert it: iconv"),
    Mistake(f"{_PREPARE} {{prose}}", INPUT, "line 1, column 1: not JSON (Expecting value). Each"),
    Mistake(f"{_PREPARE} {{no_rows}}", INPUT, "has no row"),
    Mistake(f"{_PREPARE} s3://bucket/x.jsonl", INPUT, "no credentials were found. Set AWS_ACCESS"),
    Mistake(f"{_PREPARE} gs://bucket/x.jsonl", INPUT, "cannot be opened"),
    Mistake(f"{_PREPARE} nonsense://x.jsonl", INPUT, "cannot be opened"),
    Mistake(f"{_PREPARE} {{rows}} --row-shape nonsense", USAGE, "--row-shape"),
    Mistake(f"{_PREPARE} {{rows}} --column-names {{{{", USAGE, "--column-names"),
    Mistake(f"{_PREPARE} {{rows}} --max-bad-fraction 7", USAGE, "must be between 0 and 1, not 7"),
    Mistake("prepare x --tokenizer {tokenizer} --output {out}", USAGE, "'x' has no files: openher"),
    Mistake(
        "prepare s3://b/my.chat.jsonl --tokenizer {tokenizer} --output {out}",
        USAGE,
        "behind: miles prepare my --source s3://b/my.chat.jsonl …",
    ),
    Mistake("prepare {empty} --tokenizer {tokenizer} --output {out}", USAGE, "looks like a path"),
    Mistake(
        "prepare x --tokenizer {tokenizer} --output {hf} --source {rows}", USAGE, "--overwrite"
    ),
    Mistake("prepare x --tokenizer {tokenizer} --output s3://b/x --source {rows}", RUN, "no cred"),
    Mistake("prepare x --tokenizer {tokenizer} --output {file} --source {rows}", RUN, "folder"),
    # Tokenizers and templates.
    Mistake(f"{_PREPARE_BY} {{none}}", INPUT, "no such folder"),
    Mistake(f"{_PREPARE_BY} {{file}}", INPUT, "a file, not a folder"),
    Mistake(f"{_PREPARE_BY} s3://bucket/x", INPUT, "no credentials were found"),
    Mistake("certify {none}", INPUT, "no such folder"),
    Mistake("certify {empty}", INPUT, "no tokenizer in this folder"),
    Mistake("certify {long}", INPUT, "its name is too long"),
    Mistake("certify {broken_json}", INPUT, "/tokenizer.json: cannot be loaded: not JSON"),
    Mistake("certify {list_json}", INPUT, "/tokenizer.json: cannot be loaded: a JSON object was"),
    Mistake("certify {no_bytes}", INPUT, "cannot be loaded: not JSON"),
    Mistake("certify {latin}", INPUT, "cannot be loaded: not JSON"),
    Mistake("certify {empty_json}", INPUT, "/tokenizer.json: cannot be loaded: no 'model' in it"),
    Mistake("certify {config_of_list}", INPUT, "tokenizer_config.json: cannot be loaded: a JSON"),
    Mistake("certify {text_length}", INPUT, "model_max_length = 'x'; a number was expected. Copy"),
    Mistake("certify {number_class}", INPUT, "tokenizer_class = 7; a text was expected. Copy the"),
    Mistake("certify {number_token}", INPUT, "eos_token = 7; a text, or the object of"),
    Mistake("certify {model_of_text}", INPUT, "/tokenizer.json: cannot be loaded: its library"),
    Mistake("certify {tokenizer} --chat-template-path {latin_text}", USAGE, "not UTF-8 text"),
    Mistake("certify {tokenizer} --chat-template-path {empty}", USAGE, "a folder, where a file"),
    Mistake("certify {tokenizer} --chat-template-path {bad_jinja}", INPUT, "template"),
    Mistake("certify {tokenizer} --chat-template-path {endless_jinja}", INPUT, "does not end"),
    Mistake("certify {tokenizer} --max-sample-tokens x", USAGE, "--max-sample-tokens"),
    Mistake("certify {tokenizer} --json {empty}", RUN, "a folder, where a file was expected"),
    Mistake("certify {tokenizer} --json {file}/x", RUN, "cannot be written"),
    Mistake("certify {tokenizer} --json /{long}", RUN, "its name is too long"),
    Mistake("tiny-model --tokenizer {none} --save {out}", INPUT, "no such tokenizer folder"),
    Mistake("tiny-model --tokenizer {empty} --save {out}", INPUT, "no tokenizer can be loaded"),
    Mistake("tiny-model --tokenizer {tokenizer} --save {file}", RUN, "a folder was expected"),
    # Checkpoints.
    Mistake(f"{_TO_MEGATRON} {{none}}", INPUT, "config.json: no such file"),
    Mistake(f"{_TO_MEGATRON} {{file}}", INPUT, "no such file"),
    Mistake(f"{_TO_MEGATRON} {{tokenizer}}", INPUT, "config.json: no such file"),
    Mistake(f"{_TO_MEGATRON} s3://bucket/x", INPUT, "no credentials were found"),
    Mistake(f"{_TO_MEGATRON} {{config_list}}", INPUT, "a JSON object was expected"),
    Mistake(f"{_TO_MEGATRON} {{config_broken}}", INPUT, "not JSON"),
    Mistake(f"{_TO_MEGATRON} {{config_latin}}", INPUT, "not UTF-8 text"),
    Mistake(f"{_TO_MEGATRON} {{config_text}}", INPUT, "hidden_size = 'x'; a whole number was"),
    Mistake(f"{_TO_MEGATRON} {{config_deep}}", INPUT, "nested too deeply"),
    Mistake(f"{_TO_MEGATRON} {{config_absurd}}", INPUT, "num_layers would be 1000000000"),
    Mistake(f"{_TO_MEGATRON} {{cut_weights}}", INPUT, "not a safetensors file: "),
    Mistake("convert hf-to-megatron --hf-checkpoint {hf} --save {file}", RUN, "cannot be written"),
    Mistake("convert hf-to-megatron --hf-checkpoint {hf} --save s3://b/x", INPUT, "no credentials"),
    Mistake("convert hf-to-megatron --nonsense", USAGE, "there is no flag --nonsense"),
    Mistake(f"{_TO_HF} {{none}}", INPUT, "none"),
    Mistake(f"{_TO_HF} {{empty}}", INPUT, "latest_checkpointed_iteration.txt"),
    Mistake(f"{_TO_HF} {{tracker_text}}", INPUT, "expected an iteration or 'release'"),
    Mistake(f"{_TO_HF} {{tracker_gone}}", INPUT, "iter_0000007"),
    Mistake(f"{_TO_HF} {{empty}} --max-shard-size 5XB", USAGE, "a size was expected"),
    Mistake(
        "convert megatron-to-hf --hf-checkpoint {hf} --load {empty} --save {file}",
        INPUT,
        "a file, not a folder: give another place",
    ),
    Mistake("convert verify {hf} {none}", INPUT, "none"),
    Mistake("convert verify {hf} {file}", INPUT, "file"),
    # A run's folder.
    Mistake("inspect {none}", INPUT, "none: no such file"),
    Mistake("inspect {file}", INPUT, "its name does not say what is in it"),
    Mistake("inspect {broken_run}", INPUT, "first_batch.json: cut off behind line 1"),
    Mistake("inspect {moved_run}", INPUT, "cannot be shown as text without the run's tokenizer"),
    Mistake("report {broken_run}", INPUT, "metrics.jsonl: no line of it can be read"),
    Mistake("inspect s3://bucket/x", INPUT, "no credentials were found"),
    Mistake("report {none}", INPUT, "metrics.jsonl: no such file"),
    Mistake("report {long}", INPUT, "its name is too long"),
    Mistake("report s3://bucket/x", INPUT, "no credentials were found"),
    Mistake("demo --output {file}", RUN, "a file, not a folder; name another"),
    Mistake("demo --output s3://bucket/x", USAGE, "the demo writes to this machine"),
    Mistake("demo --output {hf}", RUN, "not empty, and not a demo's folder"),
    Mistake("inspect {empty_word}", USAGE, "argument PATH: it is empty, such as a variable"),
    Mistake("report {empty_word}", USAGE, "argument RUN: it is empty, such as a variable"),
    Mistake("certify {empty_word}", USAGE, "it is empty, such as a variable that is not set"),
    Mistake("convert verify {hf} {empty_word}", USAGE, "argument B: it is empty"),
    # Launch lines.
    Mistake("train", USAGE, "--hf-checkpoint, --save and --prompt-data are missing"),
    Mistake("train --config {latin_text}", USAGE, "not UTF-8 text"),
    Mistake("train --config {empty}", USAGE, "a folder, where a file was expected"),
    Mistake("train --config {bad_yaml}", USAGE, "bad_yaml"),
    Mistake("train --config {list_yaml}", USAGE, "list_yaml"),
    Mistake("train --config {python_yaml}", USAGE, "python_yaml"),
    Mistake(f"{_DRY} --nonsense 5", USAGE, "there is no flag --nonsense"),
    Mistake(f"{_DRY} --rollout-batch-size {'9' * 30}", USAGE, "must be at most"),
    Mistake(f"{_DRY} --lr nan", USAGE, "--lr"),
    Mistake(f"{_DRY} --save {{file}}", RUN, "--save"),
    Mistake(f"{_DRY} --save-hf {{file}}", INPUT, "a file, not a folder"),
    Mistake(f"{_DRY} --save-hf {{out}}/{{{{bad}}}}", USAGE, "is all that braces may hold here"),
    Mistake(f"{_DRY} --save {{out}}/{{{{rollout_id}}}}", USAGE, "in --save-hf alone"),
    Mistake(f"{_DRY} --save $RUNS/a", USAGE, "$RUNS would be the name of a folder"),
    Mistake(f"{_DRY} --hf-checkpoint {{config_list}}", INPUT, "a JSON object was expected"),
    Mistake(f"{_DRY} --hf-checkpoint {{config_latin}}", INPUT, "not UTF-8 text"),
    Mistake(f"{_DRY} --prompt-data s3://bucket/x.jsonl", INPUT, "no credentials were found"),
    Mistake(f"{_DRY} --load s3://bucket/x", INPUT, "no credentials were found"),
    Mistake(f"{_DRY} --load {{empty_word}}", USAGE, "--load is empty"),
    Mistake(f"{_DRY} --save s3:/bucket/x", USAGE, "a URL has two slashes"),
    Mistake(f"{_DRY} --save {{broken_run}}", INPUT, "miles.json: cut off behind line 1"),
    Mistake(f"{_DRY} --save {{newer_run}}", INPUT, "data cursor of version 99"),
    Mistake(f"{_DRY} --save {{tracker_text}}", INPUT, "There is no complete checkpoint in"),
    Mistake(f"{_DRY} --save {{tracker_gone}}", INPUT, "iter_0000007, which is not there"),
    Mistake(f"{_DRY} --save {{lora_run}}", INPUT, f"To go on with it, give {_LORA}. To begin from"),
    Mistake(f"{_TRAIN} --load {{lora_run}}", INPUT, "holds the checkpoints of a LoRA run, and w"),
    Mistake(
        f"{_DRY} --save {{lora_run}} --lora-rank 16", INPUT, "the checkpoint has 8, this run 16"
    ),
    Mistake(
        f"{_DRY} --save {{newer_run}} --lora-rank 8", INPUT, "trains all weights, and --lora-r"
    ),
    Mistake(
        f"{_DRY} --lora-rank 8 --lora-adapter-path {{peft}}", INPUT, "peft/adapter_config.json"
    ),
    Mistake(
        f"{_DRY} --lora-rank 8 --lora-adapter-path {{hf}}", INPUT, "in PEFT's format was expect"
    ),
    Mistake(f"{_DRY} --ref-load {{lora_run}}", INPUT, "no whole model. To begin from the model w"),
    Mistake(f"{_DRY} --ref-load {{peft}}", INPUT, "give it as --lora-adapter-path. To begin from"),
    Mistake(
        f"{_DRY} --save {{lora_broken}}", INPUT, "be gone on from: begin anew with another --save"
    ),
    Mistake(f"{_TRAIN} --save {{no_tracker}}", INPUT, "To go on from step 7: echo 7 >"),
    Mistake(f"{_DRY} --load {{empty}} --ref-load {{hf}}", INPUT, "no Megatron checkpoint there"),
    Mistake(f"{_DRY} --hf-checkpoint {{one_expert}}", INPUT, "num_experts_per_tok = 1"),
    Mistake(f"{_TRAIN} --prompt-data {{none}}.jsonl", INPUT, "none.jsonl: no such file"),
    Mistake(f"{_TRAIN} --save {{file}}", RUN, "--save"),
    # Values of any length.
    Mistake(f"{_DRY} --lr {'9x' * 50_000}", USAGE, "--lr takes a number, not '9x9x"),
    Mistake(f"{_DRY} --role-names {'[' * 100_000}", USAGE, "--role-names: not JSON: [[["),
    Mistake(f"{_DRY} --max-tokens-per-gpu {'9' * 5_000}", USAGE, "a whole number, not '999"),
    Mistake(f"{_DRY} --max-tokens-per-gpu {'9' * 4_000}", USAGE, "must be at most"),
    Mistake(f"{_DRY} --row-shape {'x' * 100_000}", USAGE, "--row-shape must be one of"),
    Mistake(f"{_DRY} --save {{out}}/{'x/' * 5_000}", INPUT, "characters left out)"),
    Mistake(f"{_DRY} --ray-address {'x' * 100_000}", USAGE, "expected HOST:PORT"),
    Mistake(f"{_DRY} --{'x' * 100_000} 5", USAGE, "there is no flag --xxx"),
    Mistake(f"{'x' * 100_000}", USAGE, "invalid choice"),
    Mistake(f"certify {'n/' * 50_000}", INPUT, "characters left out)"),
    Mistake(f"{_TO_HF} {{empty}} --ckpt-step {'9' * 5_000}x", USAGE, "--ckpt-step"),
    Mistake(f"{_TO_HF} {{empty}} --max-shard-size {'9' * 100_000}", USAGE, "a size was expected"),
    # A cluster.
    Mistake(f"{_TRAIN} --ray-address http://127.0.0.1:8265", USAGE, "expected HOST:PORT"),
    Mistake(f"{_DRY} --ray-address xx", USAGE, "--ray-address xx: expected HOST:PORT"),
    Mistake(f"{_DRY} --ray-address {{empty_word}}", USAGE, "--ray-address is empty"),
    Mistake(f"{_TRAIN} --ray-address 127.0.0.1:9", CLUSTER, "no Ray answers there"),
)


@dataclass(frozen=True)
class Call:
    """A call in a notebook that cannot be done."""

    call: Callable[[Mapping[str, str], Any], object]
    """is given the places, and a tokenizer"""
    text: str
    """a part of the error's text"""


_MESSAGES = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]


def _prepared(places: Mapping[str, str]) -> Any:
    return prepare("x", source=places["rows"], tokenizer=places["tokenizer"])


CALLS = {
    "tokenizer is None": Call(
        lambda places, _: prepare("x", source=places["rows"], tokenizer=None),  # type: ignore[arg-type]
        "prepare: tokenizer must be a text, not None",
    ),
    "tokenizer is an object": Call(
        lambda places, tokenizer: prepare("x", source=places["rows"], tokenizer=tokenizer),
        "prepare: tokenizer must be a text, not ",
    ),
    "source is a number": Call(
        lambda places, _: prepare("x", source=5, tokenizer=places["tokenizer"]),  # type: ignore[arg-type]
        "source= must be a path or URL, a list of them, ",
    ),
    "a path in place of the name": Call(
        lambda places, _: prepare("my rows.jsonl", tokenizer=places["tokenizer"]),
        "behind: prepare('my-rows', source='my rows.jsonl', tokenizer=…)",
    ),
    "a folder in place of the name": Call(
        lambda places, _: prepare(places["empty"], tokenizer=places["tokenizer"]),
        "behind: prepare('empty', source='/",
    ),
    "a name and no source": Call(
        lambda places, _: prepare("qwen2.5", tokenizer=places["tokenizer"]),
        "files: prepare('qwen2.5', source='rows.jsonl', tokenizer=…)",
    ),
    "source is gone": Call(
        lambda places, _: prepare("x", source=places["none"], tokenizer=places["tokenizer"]),
        "none: no such file",
    ),
    "source without credentials": Call(
        lambda places, _: prepare("x", source="s3://b/x.jsonl", tokenizer=places["tokenizer"]),
        "no credentials were found",
    ),
    "columns are a list": Call(
        lambda places, _: prepare("x", tokenizer="t", column_names=["a"]),  # type: ignore[arg-type]
        "column_names must be a mapping from texts or None",
    ),
    "written onto a file": Call(
        lambda places, _: _prepared(places).write(places["file"]), "is not a folder"
    ),
    "written to an empty path": Call(
        lambda places, _: _prepared(places).write(""), "write: url is empty"
    ),
    "written nowhere": Call(
        lambda places, _: _prepared(places).write(None), "write: url must be a text, not None"
    ),
    "written without credentials": Call(
        lambda places, _: _prepared(places).write("s3://bucket/x"), "no credentials were found"
    ),
    "written over its source": Call(
        lambda places, _: _prepared(places).write(str(Path(places["rows"]).parent)),
        "lies in the folder to write",
    ),
    "a preview of text": Call(
        lambda places, _: _prepared(places).preview("3"), "must be a whole number, not '3' (str)"
    ),
    "steps of nothing": Call(
        lambda places, _: _prepared(places).steps(batch_size=None, max_tokens_per_gpu=8192),
        "steps: batch_size must be a whole number, not None",
    ),
    "steps from nowhere": Call(
        lambda places, _: _prepared(places).steps(batch_size=0, max_tokens_per_gpu=8192),
        "must be positive, not 0",
    ),
    "messages are a text": Call(
        lambda _, tokenizer: encode("abc", tokenizer),  # type: ignore[arg-type]
        "encode: messages must be a sequence of mappings, not 'abc' (str)",
    ),
    "a tokenizer's name": Call(
        lambda _, tokenizer: encode(_MESSAGES, "Qwen/Qwen3-4B"),  # type: ignore[arg-type]
        "encode: tokenizer must be a fast tokenizer",
    ),
    "tools are a text": Call(
        lambda _, tokenizer: encode(_MESSAGES, tokenizer, tools="x"),  # type: ignore[arg-type]
        "encode: tools must be a sequence of mappings or None",
    ),
    "content is a number": Call(
        lambda _, tokenizer: encode([{"role": "user", "content": 5}, _MESSAGES[1]], tokenizer),
        "its content is a number, not text",
    ),
    "nothing to train": Call(
        lambda _, tokenizer: encode(_MESSAGES[:1], tokenizer), "nothing_to_train"
    ),
}


def make_places(folder: Path, tokenizer: Path) -> dict[str, str]:
    """Make the files and folders that the mistakes name; return them by name."""
    places = _Places(folder)
    places.add_folder("tokenizer", tokenizer, {})
    for name, content in {
        "broken_json": b"{",
        "list_json": b"[]",
        "no_bytes": b"",
        "empty_json": b"{}",
        "model_of_text": b'{"model": "x", "added_tokens": []}',
        "latin": b"\xff\xfe",
    }.items():
        places.add_folder(name, tokenizer, {"tokenizer.json": content})
    settings = json.loads((tokenizer / "tokenizer_config.json").read_text())
    for name, changes in {
        "text_length": {"model_max_length": "x"},
        "number_class": {"tokenizer_class": 7},
        "number_token": {"eos_token": 7},
    }.items():
        changed = json.dumps({**settings, **changes}).encode()
        places.add_folder(name, tokenizer, {"tokenizer_config.json": changed})
    places.add_folder("config_of_list", tokenizer, {"tokenizer_config.json": b"[]"})

    model = folder / "made"
    build_model(tokenizer, model)
    places.add_folder("hf", model, {})
    config = json.loads((model / "config.json").read_text())
    for name, content in {
        "config_list": b"[]",
        "config_broken": b"{",
        "config_latin": b"\xff\xfe",
        "config_deep": b"[" * 200_000,
        "config_absurd": json.dumps({**config, "num_hidden_layers": 10**9}).encode(),
        "config_text": json.dumps({**config, "hidden_size": "x"}).encode(),
        "one_expert": json.dumps({**config, **_ONE_EXPERT}).encode(),
    }.items():
        places.add_folder(name, model, {"config.json": content})
    places.add_folder("cut_weights", model, {"model.safetensors": b"\xff" * 20})
    places.add_folder("empty", None, {})
    places.add_folder("tracker_text", None, {"latest_checkpointed_iteration.txt": b"seven"})
    places.add_folder("tracker_gone", None, {"latest_checkpointed_iteration.txt": b"7"})
    _add_runs(places)

    row = json.dumps({"messages": _MESSAGES})
    for name, file, content in (
        ("rows", "rows/rows.jsonl", f"{row}\n".encode() * 20),
        ("no_rows", "no_rows.jsonl", b""),
        ("not_parquet", "not.parquet", b"PAR1 and then"),
        ("no_bytes_parquet", "no_bytes.parquet", b""),
        ("not_gzip", "not.jsonl.gz", b"no gzip"),
        ("cut_gzip", "cut.jsonl.gz", gzip.compress(f"{row}\n".encode() * 20)[:-20]),
        ("not_zstd", "not.jsonl.zst", b"no zstd"),
        ("binary", "binary.jsonl", b"\x82\xdc\n\x86\xc3\n"),
        ("lists", "lists.jsonl", b"[1]\n[2]\n"),
        ("scalars", "scalars.jsonl", b"1\n2\n"),
        ("wide", "wide.jsonl", f"{row}\n".encode("utf-16")),
        ("prose", "prose.jsonl", b"a letter\nof two lines\n"),
        ("file", "file", b"a file"),
        ("latin_text", "latin_text", b"save: \xff\xfe"),
        ("bad_jinja", "bad.jinja", b"{% for %}"),
        ("endless_jinja", "endless.jinja", b"{% if false %}{{ 10 ** (10 ** 10) }}{% endif %}"),
        ("bad_yaml", "bad_yaml", b"save: [\n"),
        ("list_yaml", "list_yaml", b"[1]\n"),
        ("python_yaml", "python_yaml", b"save: !!python/object:os.system x\n"),
    ):
        places.add_file(name, file, content)
    return {
        **places.paths,
        "none": str(folder / "none"),
        "out": str(folder / "out"),
        "long": "n" * 300,
        "nul": "a\0b",
        "empty_word": "",
    }


_KEYS = b"decoder.layers.adapter.q_proj.lora_A"
_ADAPTER = {
    "rank": 8,
    "alpha": 16.0,
    "targets": ["q_proj", "v_proj"],
    "is_rank_stabilized": False,
}

_ONE_EXPERT = {
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_experts": 4,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 32,
    "norm_topk_prob": True,
}


def _add_runs(places: _Places) -> None:
    """Make folders of runs whose files are broken, of another version, or of another machine."""
    whole = {f"iter_0000007/{name}": content for name, content in SMALLEST.items()}
    checkpoint = {
        **whole,
        "latest_checkpointed_iteration.txt": b"7",
        "iter_0000007/miles.json": b'{"cursor": {"vers',
    }
    places.add_folder("no_tracker", None, whole)
    broken = {"metrics.jsonl": b"\xff\n", "first_batch.json": b'{"tokenizer": "x", "micro'}
    places.add_folder("broken_run", None, {**checkpoint, **broken})
    for name, adapter in (("lora_run", _ADAPTER), ("lora_broken", {"rank": 8})):
        extra = json.dumps({"cursor": {}, "adapter": adapter, "base": {"url": "/nowhere"}})
        files = {"iter_0000007/miles.json": extra.encode(), "iter_0000007/.metadata": _KEYS}
        places.add_folder(name, None, {**checkpoint, **files})
    peft = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"", "config.json": b"{}"}
    places.add_folder("peft", None, peft)
    newer = {"iter_0000007/miles.json": b'{"cursor": {"version": 99}}'}
    places.add_folder("newer_run", None, {**checkpoint, **newer})

    sample = {"source": "chat", "file": "chat.jsonl", "row": 3}
    tokens = {"input_ids": [5, 6], "loss_mask": [0, 1]}
    batch = {"tokenizer": "/nowhere/tokenizer", "micro_batches": [[{**sample, **tokens}]]}
    places.add_folder("moved_run", None, {"first_batch.json": json.dumps(batch).encode()})


class _Places:
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.paths: dict[str, str] = {}

    def add_file(self, name: str, file: str, content: bytes) -> None:
        """Write a file."""
        path = self._folder / file
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        self.paths[name] = str(path)

    def add_folder(self, name: str, model: Path | None, files: Mapping[str, bytes]) -> None:
        """Make a folder: a copy of a model, with some files in other words."""
        folder = self._folder / name
        if model is None:
            folder.mkdir()
        else:
            shutil.copytree(model, folder)
        for file, content in files.items():
            (folder / file).parent.mkdir(exist_ok=True)
            (folder / file).write_bytes(content)
        self.paths[name] = str(folder)
