"""`miles convert`: checkpoints from Hugging Face to Megatron and back, merged, and compared."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence

from miles.cli.console import Subparsers, open_console, path_word
from miles.cli.model_line import add_model_line, require_known_flags, require_model
from miles.common.ctrl_c import on_ctrl_c
from miles.errors import MilesError, TemplateError

NAME = "convert"
HF_TO_MEGATRON = "hf-to-megatron"
_LEAVES_NOTHING = "stopped; nothing of it is left, and --save is as it was"
_LEAVES_WHOLE = "stopped; the files that it had begun are removed, what is there is complete"
_OWN_FLAGS = (
    "--hf-checkpoint",
    "--save",
    "--make-vocab-size-divisible-by",
    "--padded-vocab-size",
    "--help",
)


class DifferenceFound(MilesError):
    """Two checkpoints that are not the same: what `verify` was asked."""

    exit_status = 1


def add_parser(commands: Subparsers) -> None:
    """Add the command, its directions and their flags."""
    parser = commands.add_parser(NAME, help="Hugging Face <-> Megatron torch_dist")
    directions = parser.add_subparsers(required=True, metavar="DIRECTION")
    _add_hf_to_megatron(directions)
    _add_megatron_to_hf(directions)
    _add_merge_adapter(directions)
    _add_verify(directions)


def _add_hf_to_megatron(directions: Subparsers) -> None:
    parser = directions.add_parser(
        HF_TO_MEGATRON, help="DIR/*.safetensors -> SAVE/release", allow_abbrev=False
    )
    parser.add_argument("--hf-checkpoint", type=path_word, required=True, metavar="DIR")
    parser.add_argument("--save", type=path_word, required=True, metavar="DIR")

    _add_vocabulary_flag(parser)
    parser.add_argument(
        "--padded-vocab-size", type=positive, metavar="ROWS", help="the same, up to so many rows"
    )
    add_model_line(parser)
    parser.set_defaults(run=run_hf_to_megatron)


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

    parser.add_argument("--load", type=path_word, required=True, metavar="DIR")
    parser.add_argument(
        "--hf-checkpoint",
        type=path_word,
        required=True,
        metavar="DIR",
        help="config and tokenizer come from here",
    )
    parser.add_argument("--save", type=path_word, required=True, metavar="DIR")
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
    parser.add_argument(
        "--adapter",
        type=path_word,
        required=True,
        metavar="DIR",
        help="an adapter in PEFT's format, or the checkpoints of a LoRA run",
    )
    parser.add_argument(
        "--hf-checkpoint",
        type=path_word,
        required=True,
        metavar="DIR",
        help="config and tokenizer come from here, and the weights of the base",
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
    parser.add_argument(
        "first", type=path_word, metavar="A", help="a checkpoint of Hugging Face or of Megatron"
    )
    parser.add_argument("second", type=path_word, metavar="B")
    parser.set_defaults(run=run_verify)


def check_hf_to_megatron(words: Sequence[str]) -> None:
    """Check the names of the flags of a line of Miles's converter, before it is parsed.

    Raises:
        ConfigError: names a flag that cannot be there, and what to do.
    """
    require_known_flags(words, _OWN_FLAGS)


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

    from miles.convert.verify import verify

    console = open_console()
    comparison = verify(flags.first, flags.second, console=console)
    for difference in comparison.differences:
        line = Text.assemble("  ", (difference.tensor, "red"), f": {difference.text}")
        console.print(line, soft_wrap=True)

    if comparison.differences:
        raise DifferenceFound(
            f"{len(comparison.differences)} of {comparison.num_tensors:,} tensors differ"
        )
    console.print(
        f"  {comparison.num_tensors:,} tensors, {comparison.num_bytes:,} bytes: the same in both, "
        "bit by bit"
    )


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
