"""`miles convert`: checkpoints from Hugging Face to Megatron and back, merged, and compared."""

from __future__ import annotations

import argparse
import re
from functools import partial

from miles.cli.console import Subparsers, open_console, path_word
from miles.cli.model_line import add_model_line, require_known_flag, require_model
from miles.cli.parser import CommandParser
from miles.common.counts import counted
from miles.common.ctrl_c import on_ctrl_c
from miles.common.help_lines import explain
from miles.errors import MilesError, TemplateError

NAME = "convert"
HF_TO_MEGATRON = "hf-to-megatron"
_LEAVES_NOTHING = "stopped; nothing of it is left, and --save is as it was"
_LEAVES_WHOLE = "stopped; the files that it had begun are removed, what is there is complete"


class DifferenceFound(MilesError):
    """Two checkpoints that are not the same: what `verify` was asked."""

    exit_status = 1


def add_parser(commands: Subparsers) -> None:
    """Add the command, its directions and their flags."""
    parser = commands.add_parser(NAME, help="Hugging Face <-> Megatron torch_dist")
    explain(
        parser,
        "Convert checkpoints between Hugging Face's format and Megatron's, merge adapters, and "
        "compare two checkpoints tensor by tensor. No GPU is needed.",
        "convert megatron-to-hf --load runs/qwen3 --hf-checkpoint models/qwen3 --save export",
        "convert verify models/qwen3 export",
    )
    directions = parser.add_subparsers(required=True, metavar="DIRECTION")
    _add_hf_to_megatron(directions)
    _add_megatron_to_hf(directions)
    _add_merge_adapter(directions)
    _add_verify(directions)


def _add_hf_to_megatron(directions: Subparsers) -> None:
    parser = directions.add_parser(
        HF_TO_MEGATRON, help="DIR/*.safetensors -> SAVE/release", allow_abbrev=False
    )
    explain(
        parser,
        "Convert a Hugging Face folder into a Megatron checkpoint, as tools of Miles do, with the "
        "same flags. Optional: miles train reads Hugging Face folders.",
        "convert hf-to-megatron --hf-checkpoint models/qwen3 --save models/qwen3_torch_dist",
    )
    _add_place(parser, "--hf-checkpoint", "the folder of config.json and the weights")
    _add_place(parser, "--save", "the folder to write: release/, and the tracker that names it")
    _add_vocabulary_flag(parser)
    parser.add_argument(
        "--padded-vocab-size", type=positive, metavar="ROWS", help="the same, up to so many rows"
    )
    add_model_line(parser)
    if isinstance(parser, CommandParser):
        parser.require_known_flag = partial(require_known_flag, parser._option_string_actions)
    parser.set_defaults(run=run_hf_to_megatron)


def _add_place(parser: argparse.ArgumentParser, flag: str, text: str) -> None:
    parser.add_argument(
        flag, type=path_word, required=True, metavar="DIR", help=f"{text} (required)"
    )


def _add_vocabulary_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--make-vocab-size-divisible-by",
        type=positive,
        default=1,
        metavar="N",
        help="add rows of zeros to the embedding and the output layer, up to a multiple of N "
        "(default: 1, none)",
    )


def _add_megatron_to_hf(directions: Subparsers) -> None:
    parser = directions.add_parser(
        "megatron-to-hf",
        help="LOAD/iter_… or LOAD/release -> SAVE/*.safetensors; of a LoRA run, PEFT's adapter",
    )

    explain(
        parser,
        "Convert a Megatron checkpoint, such as the newest of a run, into a Hugging Face folder "
        "that transformers and servers load. A checkpoint of adapters becomes a PEFT adapter.",
        "convert megatron-to-hf --load runs/qwen3 --hf-checkpoint models/qwen3 --save export",
    )
    _add_place(parser, "--load", "the checkpoints of a run, or a converted model")
    _add_place(parser, "--hf-checkpoint", "config and tokenizer come from here")
    _add_place(parser, "--save", "the folder to write")
    _add_export_flags(parser)
    parser.set_defaults(run=run_megatron_to_hf)


def _add_export_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of a checkpoint of a run, and of the files that are written of it."""
    parser.add_argument(
        "--ckpt-step",
        type=int,
        metavar="N",
        help="iteration of the checkpoint (default: the newest)",
    )
    parser.add_argument(
        "--max-shard-size",
        type=num_bytes,
        metavar="SIZE",
        help="largest safetensors file, such as 5GB (default: files as in --hf-checkpoint, or else "
        "5GB)",
    )
    parser.add_argument(
        "--chat-template-path",
        type=path_word,
        metavar="FILE",
        help="a Jinja file in place of the template in --hf-checkpoint (default: the template that "
        "the run trained with)",
    )


def _add_merge_adapter(directions: Subparsers) -> None:
    parser = directions.add_parser(
        "merge-adapter", help="an adapter + its base -> SAVE/*.safetensors, SAVE_MEGATRON/release"
    )
    explain(
        parser,
        "Merge an adapter into the weights of its base, and write whole checkpoints: one of "
        "Hugging Face's format, one of Megatron's, or both.",
        "convert merge-adapter --adapter runs/lora --hf-checkpoint models/qwen3 --save merged",
    )
    _add_place(parser, "--adapter", "an adapter in PEFT's format, or the checkpoints of a LoRA run")
    _add_place(
        parser,
        "--hf-checkpoint",
        "config and tokenizer come from here, and the weights of the base",
    )
    parser.add_argument(
        "--ref-load",
        type=path_word,
        metavar="DIR",
        help="the weights of the base, of either format (default: those of --hf-checkpoint)",
    )

    parser.add_argument(
        "--save", type=path_word, metavar="DIR", help="write a Hugging Face checkpoint"
    )
    parser.add_argument(
        "--save-megatron", type=path_word, metavar="DIR", help="write a torch_dist checkpoint"
    )

    _add_export_flags(parser)
    _add_vocabulary_flag(parser)
    parser.set_defaults(run=run_merge_adapter)


def _add_verify(directions: Subparsers) -> None:
    parser = directions.add_parser(
        "verify", help="compare two checkpoints tensor by tensor; exit 1 where they differ"
    )
    explain(
        parser,
        "Compare two checkpoints, of one format or of two, tensor by tensor and bit by bit. The "
        "exit status is 1 where they differ, and each difference is printed.",
        "convert verify models/qwen3 runs/qwen3/iter_0000500",
    )
    parser.add_argument(
        "first", type=path_word, metavar="A", help="a checkpoint of Hugging Face or of Megatron"
    )
    parser.add_argument("second", type=path_word, metavar="B", help="the one to compare it with")
    parser.set_defaults(run=run_verify)


def run_hf_to_megatron(flags: argparse.Namespace) -> None:
    """Convert a Hugging Face folder.

    Raises:
        MilesError: the line says another model than config.json, or a file cannot be used.
    """
    console = open_console()
    with on_ctrl_c(_LEAVES_NOTHING):
        from miles.convert.hf_to_megatron import hf_to_megatron  # torch, which takes seconds

        require_model(flags)
        folder = hf_to_megatron(
            flags.hf_checkpoint,
            flags.save,
            make_vocab_size_divisible_by=flags.padded_vocab_size
            or flags.make_vocab_size_divisible_by,
            console=console,
        )
    console.print(f"  {folder}", soft_wrap=True)


def run_megatron_to_hf(flags: argparse.Namespace) -> None:
    """Convert a Megatron checkpoint."""
    console = open_console()
    with on_ctrl_c(_LEAVES_NOTHING):
        from miles.convert.megatron_to_hf import megatron_to_hf  # torch, which takes seconds

        folder = megatron_to_hf(
            flags.load,
            flags.hf_checkpoint,
            flags.save,
            iteration=flags.ckpt_step,
            max_shard_bytes=flags.max_shard_size,
            chat_template=_template_of(flags.chat_template_path),
            console=console,
        )
    console.print(f"  {folder}", soft_wrap=True)


def run_merge_adapter(flags: argparse.Namespace) -> None:
    """Merge an adapter into the weights of its base."""
    from miles.convert.merge_adapter import Targets, merge_adapter

    targets = Targets(
        flags.save, flags.save_megatron, flags.max_shard_size, flags.make_vocab_size_divisible_by
    )
    console = open_console()
    with on_ctrl_c(_LEAVES_WHOLE):
        folders = merge_adapter(
            flags.adapter,
            flags.hf_checkpoint,
            targets,
            ref_load=flags.ref_load,
            iteration=flags.ckpt_step,
            chat_template=_template_of(flags.chat_template_path),
            console=console,
        )
    for folder in folders:
        console.print(f"  {folder}", soft_wrap=True)


def _template_of(path: str | None) -> str | None:
    """Return the chat template in a file; None where there is no path.

    Raises:
        TemplateError: it does not compile, so that neither a run nor a server takes it.
    """
    if path is None:
        return None
    from miles.common import storage
    from miles.data.template.symbols import Untraceable
    from miles.data.template.trace import Tracer

    with storage.reading(path):
        template = storage.read_text(path)
    try:
        Tracer(template, {})
    except Untraceable as error:
        cause = " ".join(str(error).split())
        raise TemplateError(f"{path}: not a chat template that can run: {cause}") from error
    return template


def run_verify(flags: argparse.Namespace) -> None:
    """Compare two checkpoints.

    Raises:
        DifferenceFound: they differ; the differences have been printed.
    """
    from rich.text import Text

    from miles.common.prose import Prose
    from miles.convert.verify import verify

    console = open_console()
    comparison = verify(flags.first, flags.second, console=console)
    for difference in comparison.differences:
        line = Text.assemble("  ", (difference.tensor, "red"), f": {difference.text}")
        console.print(Prose(line), soft_wrap=True)

    if comparison.differences:
        raise DifferenceFound(
            f"{len(comparison.differences):,} of {counted(comparison.num_tensors, 'tensor')} differ"
        )
    same = f"{counted(comparison.num_tensors, 'tensor')}, {counted(comparison.num_bytes, 'byte')}"
    console.print(Prose(f"  {same}: the same in both, bit by bit"), soft_wrap=True)


def positive(text: str) -> int:
    """Return a whole number from 1 on, for argparse's `type`.

    Raises:
        argparse.ArgumentTypeError: the text is something else.
    """
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a number from 1 on was expected; found {text}")
    return int(text)


_SIZE = re.compile(r"(\d{1,15}(?:\.\d+)?)\s*([KMGT]?)(i)?B?", re.IGNORECASE)


def num_bytes(text: str) -> int:
    """Return a size, such as 5GB (5,000,000,000 bytes), 512MiB or 1000, for argparse's `type`.

    Raises:
        argparse.ArgumentTypeError: the text is something else, or no bytes at all.
    """
    match = _SIZE.fullmatch(text.strip())
    size = 0
    if match:
        number, unit, binary = match.groups()
        size = int(float(number) * (1024 if binary else 1000) ** " KMGT".index(unit.upper() or " "))
    if size < 1:
        raise argparse.ArgumentTypeError(
            f"a size was expected, such as 5GB or 512MiB; found {text}"
        )
    return size
