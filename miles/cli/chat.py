"""`miles chat`: talk with a trained model in the terminal, or through a pipe."""

from __future__ import annotations

import argparse
import sys

from miles.cli.answering import add_answer_flags, choice_of, sampling_of
from miles.cli.console import Subparsers
from miles.common.ctrl_c import on_ctrl_c
from miles.common.help_lines import explain
from miles.common.patience import until_answered
from miles.errors import ConfigError

NAME = "chat"
_EXAMPLES = (
    "chat run",
    "chat run --ckpt-step 200 --system 'Answer in one word.'",
    "chat Qwen3-4B-OpenHermes --temperature 0.7 --top-p 0.9 --seed 1",
)


def add_parser(commands: Subparsers) -> None:
    """Add the command and its flags."""
    parser = commands.add_parser(
        NAME,
        help="talk with a run, an export or a Hugging Face folder",
    )
    explain(
        parser,
        "Talk with a trained model. The ids of its prompts are those that training saw. "
        "/reset, /undo, /save FILE, /exit; Ctrl-C stops an answer, and a second one leaves.",
        *_EXAMPLES,
    )
    add_answer_flags(parser)
    parser.add_argument("--system", metavar="TEXT", help="a system message (default: none)")
    parser.set_defaults(run=run)


def run(flags: argparse.Namespace) -> None:
    """Answer messages until they end."""
    choice = choice_of(flags)
    with until_answered("loading the model"), on_ctrl_c("left"):
        sampling = sampling_of(flags)
        if sys.stdin is None or sys.stdout is None:
            raise ConfigError("messages come from the standard input, which is closed: open it")

        from miles.chat.conversation import Conversation
        from miles.chat.model import load
        from miles.chat.source import opened
        from miles.chat.talk import Talk, from_pipe, from_terminal, heading
        from miles.common.patience import answered
        from miles.common.prose import Prose
        from miles.common.screen import Screen

        screen = Screen(stderr=True, highlight=False, markup=False, emoji=False)
        is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
        if is_terminal:
            import readline  # noqa: F401  # keys and a history for `input`

        with opened(flags.model, choice, screen) as found:
            model = load(found, flags.dtype)
            answered()
            for line in heading(found.title, model, sampling):
                screen.print(Prose(line), soft_wrap=True, style="dim")
            if is_terminal:
                screen.print(
                    "/help tells the commands; Ctrl-C stops an answer", soft_wrap=True, style="dim"
                )
            talk = Talk(model, sampling, Conversation(flags.system), is_terminal, screen)
            talk.run(from_terminal if is_terminal else from_pipe)
