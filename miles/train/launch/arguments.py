"""A launch line, with or without a YAML file or a recipe -> a `TrainConfig`.

Each flag fills the field that declares it (`miles.common.flags`). Only the exceptions stand here:

    --prompt-data, --eval-prompt-data   one path or NAME PATH pairs -> sources of one row format
    --hf-checkpoint                     also the tokenizer
    --max-sample-tokens                 --max-tokens-per-gpu where it is not given
    --sequence-parallel                 left out beside a tensor size of 1
    the data-parallel size              follows from the layout

Flags of launch lines that are no settings here are taken by `fixed_flags` and `model_flags`, or
refused by `refusals`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from miles.common.flags import Setting, Values, build, names_of_same_values
from miles.common.line_parser import missing_text
from miles.common.local_paths import absolute
from miles.common.mistakes import Mistakes
from miles.data.config import DataConfig, EncodeConfig, PackConfig, RowFormat, SourceConfig
from miles.data.source_names import named_paths, splits_for
from miles.errors import ConfigError, MilesError
from miles.train.config import ClusterConfig, EvalConfig, TrainConfig
from miles.train.launch.fixed_flags import require_fixed
from miles.train.launch.known_flags import require_known, written_flags
from miles.train.launch.model_flags import require_sizes
from miles.train.launch.notices import is_sequence_parallel_alone, notices_of, repetitions_of
from miles.train.launch.parser import CONFIG, build_parser, given_values, launch_settings
from miles.train.launch.yaml_file import read_yaml
from miles.train.parallel_layout import Layout

_SLICE = re.compile(r"@\[[^\]]*\]$")
"""Miles's `rows.jsonl@[0:100]`."""


@dataclass(frozen=True)
class LaunchLine:
    """A launch line that was read."""

    config: TrainConfig
    notices: tuple[str, ...]
    """sentences on flags that are taken, but have another effect than they say"""


def parse(
    words: Sequence[str], record: type[TrainConfig] = TrainConfig, recipe: Sequence[str] = ()
) -> TrainConfig:
    """Return the run that a launch line asks for: `read_line` without its notices."""
    return read_line(words, record, recipe).config


def read_line(
    words: Sequence[str], record: type[TrainConfig] = TrainConfig, recipe: Sequence[str] = ()
) -> LaunchLine:
    """Return the run that a launch line asks for, and what is to be said about the line.

    Args:
        words: the line without `miles train`.
        record: the settings of a run.
        recipe: a line whose flags hold where `words`, and a file that they name, say nothing else.

    Raises:
        ConfigError: names the flag, what was found, what was expected and what to do.
    """
    settings = launch_settings(record)
    try:
        values = _read(words, recipe, record, settings)
    except ConfigError as error:
        raise _with_missing(error, [*words, *recipe], settings) from error.__cause__
    return complete(values, record, repetitions_of(words))


def complete(
    values: Values,
    record: type[TrainConfig] = TrainConfig,
    notices: Sequence[str] = (),
    prepared: DataConfig | None = None,
) -> LaunchLine:
    """Return the run that the values of flags make, and what is to be said about them.

    Args:
        record: the settings of a run.
        notices: sentences that are known already.
        prepared: rows and their encoding, in place of those that the values would give.

    Raises:
        ConfigError: names the flag, what was found, what was expected and what to do.
    """
    settings = launch_settings(record)
    required = [name for name, setting in settings.items() if setting.is_required]
    if prepared is not None:
        required.remove("--prompt-data")
    missing = [name for name in required if not values.get(name)]
    if missing:
        raise ConfigError(missing_text(missing))
    require_fixed(values)

    hf_checkpoint = absolute(values["--hf-checkpoint"])
    cluster = build(ClusterConfig, values)
    if is_sequence_parallel_alone(values):
        cluster = replace(cluster, sequence_parallel=False)
    layout = cluster.layout
    _require_model(hf_checkpoint, layout, values)

    row_format = build(RowFormat, values)
    pack = build(PackConfig, values, {"dp_size": layout.data})
    encode = {
        "tokenizer": hf_checkpoint,
        "max_sample_tokens": values.get("--max-sample-tokens", pack.max_tokens_per_gpu),
    }
    data: dict[str, Any] = {
        "sources": _sources("--prompt-data", values, row_format),
        "encode": build(EncodeConfig, values, encode),
        "pack": pack,
    }
    if prepared is not None:
        data["sources"] = prepared.sources
        data["encode"] = replace(prepared.encode, tokenizer=hf_checkpoint)
        if "--max-bad-fraction" not in values:
            data["max_bad_fraction"] = prepared.max_bad_fraction
    run = {
        "ref_load": values.get("--ref-load"),
        "data": build(DataConfig, values, data),
        "cluster": cluster,
        "evaluation": build(
            EvalConfig, values, {"sources": _sources("--eval-prompt-data", values, row_format)}
        ),
    }
    return LaunchLine(build(record, values, run), (*notices, *notices_of(values)))


def _with_missing(
    error: MilesError, words: Sequence[str], settings: dict[str, Setting]
) -> MilesError:
    """Return the error of a line together with the flags that it lacks, if no file can have them."""
    written = written_flags(words)
    required = [name for name, setting in settings.items() if setting.is_required]
    missing = [name for name in required if name not in written]
    if not missing or CONFIG.flag.name in written:
        return error
    mistakes = Mistakes()
    mistakes.add(error.errors or [error])
    mistakes.add([ConfigError(missing_text(missing))])
    return mistakes.joined()


def _read(
    words: Sequence[str], recipe: Sequence[str], record: type, settings: dict[str, Setting]
) -> dict[str, Any]:
    """Return the values of a line, of its `--config` file, and of a recipe.

    The line has the last word, and the file has it before the recipe.
    """
    on_line = _values_of(words, record, settings)
    path = on_line.pop(CONFIG.flag.name, None)
    values = with_file(on_line, path, record)
    return _with_those_below(values, _values_of(recipe, record, settings), record)


def with_file(values: Values, path: str | None, record: type = TrainConfig) -> dict[str, Any]:
    """Return values with those of a YAML file where they settle nothing themselves.

    Raises:
        ConfigError: the file cannot be read, or one of its flags not be taken.
    """
    if not path:
        return dict(values)
    replaced = names_of_same_values(record, values)
    in_file = read_yaml(path, launch_settings(record), replaced=[*values, *replaced])
    return _with_those_below(values, in_file, record)


def _values_of(words: Sequence[str], record: type, settings: dict[str, Setting]) -> dict[str, Any]:
    """Return the values of the flags of a line.

    Raises:
        ConfigError: names each flag that is unknown, and each value that cannot be taken.
    """
    mistakes = Mistakes()
    known = [*settings, CONFIG.flag.name, "--help"]
    for flag in dict.fromkeys(written_flags(words)):
        mistakes.of(partial(require_known, flag, known))

    namespace, of_words = build_parser(record).parse_as_far_as_possible(words)
    mistakes.add(of_words.found)
    values = mistakes.of(partial(given_values, namespace, [*settings.values(), CONFIG]))
    mistakes.raise_all()
    return values or {}


def _with_those_below(values: Values, below: Values, record: type) -> dict[str, Any]:
    """Return values with those of another place where they settle nothing themselves."""
    settled = {*values, *names_of_same_values(record, values)}
    kept = {flag: value for flag, value in below.items() if flag not in settled}
    return {**kept, **values}


def _require_model(hf_checkpoint: str, layout: Layout, values: Values) -> None:
    """Check the layout, and the model's sizes on the launch line, against config.json."""
    from miles.architecture.families import read_shape

    shape = read_shape(hf_checkpoint)
    layout.require_fits(shape)
    require_sizes(hf_checkpoint, shape, values)


def _sources(flag: str, values: Values, row_format: RowFormat) -> tuple[SourceConfig, ...]:
    """Return the sources of one path, or of NAME PATH pairs."""
    words = values.get(flag, ())
    for place, word in enumerate(words, 1):
        if not word.strip():
            raise ConfigError(
                f"{flag}: word {place} of {len(words)} is empty, such as a variable that is not "
                "set; give one path, or NAME PATH pairs"
            )
        if _SLICE.search(word):
            raise ConfigError(
                f"{flag} {word}: a slice of the rows is not supported; write these rows into a "
                "file of their own"
            )

    pairs = named_paths(flag, words) if words else []
    # Rows to evaluate are taken from the split that is named for it.
    wanted = values.get("--split", ()) if flag == "--prompt-data" else ()
    splits = splits_for(wanted, len(pairs))
    return tuple(
        SourceConfig(name, (path,), row_format, split)
        for (name, path), split in zip(pairs, splits, strict=True)
    )
