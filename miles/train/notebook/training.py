"""Training from a notebook or a script: the flags of `miles train` as keywords.

run(hf_checkpoint="hf", prompt_data=ds, save="runs/first", num_epoch=1)
    -> <run runs/first: 40 steps, finished, loss 7.66 -> 3.71, 12,345 trained tokens>
"""

from __future__ import annotations

import inspect
import logging
import os
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from rich.console import ConsoleOptions, RenderableType
from rich.segment import Segment

from miles.common import patience
from miles.common.ctrl_c import on_ctrl_c
from miles.common.debugging import unchained
from miles.common.screen import WIDE_COLUMNS, Screen
from miles.common.shown import shown
from miles.errors import ConfigError, MilesError
from miles.train.config import TrainConfig
from miles.train.driver.command import carry_out
from miles.train.launch.arguments import LaunchLine
from miles.train.launch.keywords import PreparedSet, in_keywords, read_keywords
from miles.train.launch.notices import LOOKING
from miles.train.launch.parser import launch_settings
from miles.train.notebook.trained_run import TrainedRun

if TYPE_CHECKING:
    from miles.common.flags import Setting


@unchained
@on_ctrl_c("stopped; nothing was begun")
def run(config: TrainConfig | str | None = None, **flags: Any) -> TrainedRun | None:
    """Train as `miles train` does, in this process: the same checks, files and errors.

    The first interrupt (Ctrl-C, or "interrupt" in a notebook) finishes the step that is under way,
    saves it and returns; the same call goes on from there. A second one stops at once. A Ray that
    this process is connected to is used, and stays; else one is started, and ends with the run.

    Args:
        config: all settings as a record, or a YAML file of flags.
        flags: the flags of `miles train` (docs/flags.md), `_` for `-`: `hf_checkpoint="hf"`,
            `rollout_shuffle=True`. `prompt_data` is a path, a list of names and paths, a mapping
            from names to paths, or a data set of `miles.data.prepare`: then its rows are trained
            as they were shown, by its settings of rows and encoding.

    Returns:
        the run's folder, steps and losses; None after `dry_run=True`.

    Raises:
        MilesError: what cannot be run, or ended the run.
        KeyboardInterrupt: a second interrupt, or one while no step was under way.
    """
    # Ray 2.60 asks for ipywidgets in a notebook, for a picture of its cluster that nobody asked for.
    logging.getLogger("ray.widgets.util").setLevel(logging.ERROR)
    try:
        with patience.until_answered(LOOKING):
            line = _line_of(config, flags)
            screen = open_screen()
            summary = carry_out(line, screen)
    except MilesError as error:
        error.args = (in_keywords(str(error)),)
        raise
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(in_keywords(str(error))) from None
    if line.config.dry_run:
        return None
    trained = TrainedRun.of(line.config, summary)
    if summary is not None and summary.num_steps:
        screen.print(f"  to see its page: {trained.report_call}", soft_wrap=True)
    return trained


def _line_of(config: TrainConfig | str | None, flags: dict[str, Any]) -> LaunchLine:
    """Return the run that a call asks for.

    Raises:
        ConfigError: a setting that cannot be used, or two that contradict one another.
    """
    if isinstance(config, TrainConfig):
        if flags:
            raise ConfigError(
                f"run: a TrainConfig has all settings, and {next(iter(flags))} is given beside it; "
                "put it into the TrainConfig (dataclasses.replace), or give keywords alone"
            )
        return LaunchLine(config, ())
    path = None if config is None else _path_of(config)
    line = read_keywords(flags, path)
    _require_tokenizer(line.config, flags.get("prompt_data"))
    return line


def _path_of(config: Any) -> str:
    """Return the path of a YAML file."""
    if not isinstance(config, str | os.PathLike):
        raise ConfigError(
            "run: config must be a TrainConfig, or the path of a YAML file of flags, not "
            f"{shown(config)} ({type(config).__name__})"
        )
    return os.fspath(config)


def _require_tokenizer(config: TrainConfig, rows: Any) -> None:
    """Refuse to train a prepared set with a tokenizer that encodes it otherwise than was shown.

    Raises:
        ConfigError: says which two differ.
    """
    if not isinstance(rows, PreparedSet):
        return
    shown_encode = rows.settings.encode
    if shown_encode.tokenizer == config.data.encode.tokenizer:
        return

    from miles.data.stream.stages import encoder_of

    shown_encoder = encoder_of(shown_encode)
    if shown_encoder.fingerprint != encoder_of(config.data.encode).fingerprint:
        raise ConfigError(
            f"--prompt-data was prepared with the tokenizer of {shown_encode.tokenizer}, which "
            f"encodes otherwise than that of --hf-checkpoint {config.hf_checkpoint}: what was "
            "shown would not be what is trained. Prepare it with the tokenizer of the model"
        )


class _KeywordScreen(Screen):
    """A screen that speaks of keywords where a command would speak of flags."""

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """Yield the segments of what is printed."""
        for segment in super().render(renderable, options):
            if segment.control:
                yield segment
            else:
                yield Segment(in_keywords(segment.text), segment.style)


def open_screen() -> Screen:
    """Return the screen of a notebook or a script; only a terminal breaks lines."""
    width = None if sys.stdout is not None and sys.stdout.isatty() else WIDE_COLUMNS
    return _KeywordScreen(
        highlight=False, markup=False, emoji=False, width=width, force_jupyter=False
    )


def _signature() -> inspect.Signature:
    """Return the signature of `run` with a keyword for each flag, for help and tab completion."""
    kind = inspect.Parameter.KEYWORD_ONLY
    config = inspect.signature(run).parameters["config"]
    own = [setting for setting in launch_settings().values() if setting.field]
    keywords = [
        inspect.Parameter(setting.flag.key_in_yaml, kind, default=_default_of(setting))
        for setting in own
    ]
    return inspect.Signature([config, *keywords], return_annotation="TrainedRun | None")


def _default_of(setting: Setting) -> Any:
    """Return what stands for a keyword that is not given."""
    return setting.default if not setting.flag.negates else False


run.__signature__ = _signature()  # type: ignore[attr-defined]
