"""The `miles` command. Each subcommand imports what it needs, so that `miles --help` is quick."""

from __future__ import annotations

import argparse
import errno
import json
import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from miles import __version__
from miles.errors import CheckpointError, ConfigError, MilesError
from miles.train.launch.values import chat_template, json_object, num_bytes, positive

_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)
"""What is no mistake of ours: full, full for this user, read-only, not permitted. The error names the file."""


def main(words: Sequence[str] | None = None) -> int:
    """Runs a command line. Returns the exit status: 0, or 1 with one message on the error stream."""
    words = sys.argv[1:] if words is None else list(words)
    console = Console(highlight=False)
    try:
        if words[:1] == ["train"]:  # its flags are the trainer's own
            _train(words[1:], console)
        else:
            flags = _parser().parse_args(words)
            flags.run(flags, console)
    except MilesError as error:
        _say_error(error)
        return 1
    except OSError as error:
        if error.errno not in _OF_THE_DISK:
            raise
        _say_error(error)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="miles", description="Supervised fine-tuning: data -> loss -> optimizer."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="the main job, end to end, on an embedded default")
    demo.add_argument(
        "--output",
        default="runs/demo",
        help="the run's folder (default: runs/demo); it is made anew",
    )
    demo.set_defaults(run=_demo)

    prepare = commands.add_parser(
        "prepare", help="rows -> OpenAI messages in Parquet, with manifest and ledger"
    )
    prepare.add_argument("dataset", help="openhermes, or the name that the source gets")
    prepare.add_argument(
        "--source", nargs="+", metavar="FILES", help="fsspec URLs, globs or folders"
    )
    prepare.add_argument("--tokenizer", required=True, metavar="DIR")
    prepare.add_argument("--output", required=True, metavar="DIR")
    prepare.add_argument("--max-sample-tokens", type=int, default=8192)
    prepare.add_argument("--revision", help="of the hub's data set")
    prepare.add_argument("--max-bad-fraction", type=float, default=0.01)
    prepare.add_argument(
        "--input-key", metavar="COLUMN", help="column of the conversation (default: found)"
    )
    prepare.add_argument(
        "--tool-key", metavar="COLUMN", help="column of the tools (default: tools)"
    )
    prepare.add_argument(
        "--row-shape",
        default="auto",
        help="messages, alpaca, prompt_completion or text (default: auto, found from the first rows)",
    )
    prepare.add_argument(
        "--column-names",
        metavar="JSON",
        help='field of the row shape -> column, such as {"prompt": "question"}',
    )
    prepare.add_argument(
        "--role-names", metavar="JSON", help="role in the rows -> system, user, assistant or tool"
    )
    prepare.set_defaults(run=_prepare)

    certify = commands.add_parser(
        "certify", help="what is proven of a tokenizer and its chat template"
    )
    certify.add_argument("tokenizer", metavar="TOKENIZER", help="folder (fsspec URL) or hub name")
    certify.add_argument(
        "--chat-template-path", metavar="FILE", help="a Jinja file in place of the tokenizer's own"
    )
    certify.add_argument("--apply-chat-template-kwargs", metavar="JSON", default="{}")
    certify.add_argument(
        "--trust-remote-code", action="store_true", help="run code that the tokenizer brings"
    )
    certify.add_argument(
        "--json",
        metavar="FILE",
        help="write the certificate as JSON, too; -: instead, to the output",
    )
    certify.set_defaults(run=_certify)

    convert = commands.add_parser("convert", help="Hugging Face <-> Megatron torch_dist")
    directions = convert.add_subparsers(required=True, metavar="DIRECTION")
    to_megatron = directions.add_parser("hf-to-megatron", help="DIR/*.safetensors -> SAVE/release")
    to_megatron.add_argument("--hf-checkpoint", required=True, metavar="DIR")
    to_megatron.add_argument("--save", required=True, metavar="DIR")
    to_megatron.add_argument(
        "--make-vocab-size-divisible-by",
        type=positive,
        default=1,
        metavar="N",
        help="add rows of zeros to the embedding and the output layer, up to a multiple (default: 1, none)",
    )
    to_megatron.set_defaults(run=_hf_to_megatron)
    to_hf = directions.add_parser(
        "megatron-to-hf", help="LOAD/iter_… or LOAD/release -> SAVE/*.safetensors"
    )
    to_hf.add_argument("--load", required=True, metavar="DIR")
    to_hf.add_argument(
        "--hf-checkpoint", required=True, metavar="DIR", help="config and tokenizer come from here"
    )
    to_hf.add_argument("--save", required=True, metavar="DIR")
    to_hf.add_argument(
        "--ckpt-step", type=int, metavar="N", help="of the checkpoint (default: the newest)"
    )
    to_hf.add_argument(
        "--max-shard-size",
        type=num_bytes,
        metavar="SIZE",
        help="of a safetensors file, such as 5GB (default: files as in --hf-checkpoint, or else 5GB)",
    )
    to_hf.set_defaults(run=_megatron_to_hf)
    verify = directions.add_parser(
        "verify", help="compare two checkpoints tensor by tensor; exit 1 where they differ"
    )
    verify.add_argument("one", metavar="A", help="of Hugging Face or of Megatron")
    verify.add_argument("other", metavar="B")
    verify.set_defaults(run=_verify)

    commands.add_parser("train", help="fine-tune; flags have Miles's names (miles train --help)")

    inspect = commands.add_parser(
        "inspect", help="what the model was fed first, coloured by its mask"
    )
    inspect.add_argument("folder", metavar="RUN")
    inspect.add_argument("--samples", type=int, default=3)
    inspect.set_defaults(run=_inspect)

    report = commands.add_parser("report", help="report.html and loss.png of a run")
    report.add_argument("folder", metavar="RUN")
    report.set_defaults(run=_report)

    tiny = commands.add_parser(
        "tiny-model", help="a tiny Qwen3 with random weights for a tokenizer, to try things"
    )
    tiny.add_argument("--tokenizer", required=True, metavar="DIR")
    tiny.add_argument("--save", required=True, metavar="DIR")
    tiny.set_defaults(run=_tiny_model)
    return parser


def _say_error(error: Exception) -> None:
    """On one line, which the terminal wraps, and a search finds whole."""
    text = f"[red]miles: error:[/red] {_escape(str(error))}"
    Console(stderr=True, highlight=False).print(text, soft_wrap=True, emoji=False)


def _escape(text: str) -> str:
    return text.replace("[", r"\[")


def _train(words: Sequence[str], console: Console) -> None:
    from miles.train.launch.arguments import parse

    config = parse(words)
    if config.dry_run:
        from miles.train.estimate.dry_run import dry_run

        dry_run(config, console)
        return
    from miles.train.driver.loop import train

    summary = train(config, console)
    if not summary.num_steps:
        return
    console.print(
        f"  {summary.num_steps} steps, loss {summary.first_loss:.4f} -> {summary.last_loss:.4f}, "
        f"{summary.tokens_seen:,} trained tokens; checkpoint {summary.checkpoint}"
    )
    if not summary.is_finished:
        console.print(f"  stopped by SIGTERM; the same command goes on at step {summary.next_step}")


def _demo(flags: argparse.Namespace, console: Console) -> None:
    from miles.demo.run import run_demo

    run_demo(flags.output, console)


def _prepare(flags: argparse.Namespace, console: Console) -> None:
    from miles.data.notebook.dataset import prepare

    prepared = prepare(
        flags.dataset,
        source=flags.source,
        tokenizer=flags.tokenizer,
        max_sample_tokens=flags.max_sample_tokens,
        revision=flags.revision,
        messages_key=flags.input_key,
        tools_key=flags.tool_key,
        row_shape=flags.row_shape,
        column_names=_json_object("--column-names", flags.column_names),
        role_names=_json_object("--role-names", flags.role_names),
        max_bad_fraction=flags.max_bad_fraction,
    )
    prepared.write(flags.output)
    console.print(str(prepared))


def _json_object(flag: str, text: str | None) -> dict[str, Any]:
    try:
        return json_object(text or "{}")
    except argparse.ArgumentTypeError as error:
        raise ConfigError(f"{flag}: {error}") from error


def _certify(flags: argparse.Namespace, console: Console) -> None:
    from miles.common import storage
    from miles.data.config import EncodeConfig
    from miles.data.template.certify import certify, load_tokenizer

    config = EncodeConfig(
        tokenizer=flags.tokenizer,
        chat_template=chat_template(flags.chat_template_path),
        template_kwargs=_json_object(
            "--apply-chat-template-kwargs", flags.apply_chat_template_kwargs
        ),
        trust_remote_code=flags.trust_remote_code,
    )
    certificate = certify(load_tokenizer(config), config)
    text = json.dumps(certificate.to_json(), indent=1, ensure_ascii=False)
    if flags.json == "-":
        print(text)
        return
    console.print(certificate)
    if flags.json:
        storage.write_text(flags.json, text + "\n")


def _hf_to_megatron(flags: argparse.Namespace, console: Console) -> None:
    from miles.convert.hf_to_megatron import hf_to_megatron

    made = hf_to_megatron(
        flags.hf_checkpoint,
        flags.save,
        make_vocab_size_divisible_by=flags.make_vocab_size_divisible_by,
        console=console,
    )
    console.print(f"  {made}")


def _megatron_to_hf(flags: argparse.Namespace, console: Console) -> None:
    from miles.convert.megatron_to_hf import megatron_to_hf

    made = megatron_to_hf(
        flags.load,
        flags.hf_checkpoint,
        flags.save,
        iteration=flags.ckpt_step,
        max_shard_bytes=flags.max_shard_size,
        console=console,
    )
    console.print(f"  {made}")


def _verify(flags: argparse.Namespace, console: Console) -> None:
    from miles.convert.verify import verify

    found = verify(flags.one, flags.other, console=console)
    for difference in found.differences:
        console.print(
            f"  [red]{_escape(difference.tensor)}[/red]: {_escape(difference.text)}", soft_wrap=True
        )
    if found.differences:
        raise CheckpointError(f"{len(found.differences)} of {found.num_tensors:,} tensors differ")
    console.print(
        f"  {found.num_tensors:,} tensors, {found.num_bytes:,} bytes: the same in both, bit by bit"
    )


def _inspect(flags: argparse.Namespace, console: Console) -> None:
    from miles.report.report import inspect_run

    inspect_run(flags.folder, console, flags.samples)


def _report(flags: argparse.Namespace, console: Console) -> None:
    from miles.report.report import write_report

    for path in write_report(flags.folder):
        console.print(f"  {path}")


def _tiny_model(flags: argparse.Namespace, console: Console) -> None:
    from miles.demo.model import build_tiny_qwen3

    build_tiny_qwen3(flags.tokenizer, flags.save)
    console.print(f"  {flags.save}")


if __name__ == "__main__":
    sys.exit(main())
