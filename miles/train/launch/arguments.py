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
from miles.data.config import (
    DataConfig,
    EncodeConfig,
    PackConfig,
    RowFormat,
    SourceConfig,
)
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

_ROWS = "--prompt-data"
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
    mistakes = Mistakes()
    missing = _missing(values, record, has_rows=prepared is not None)
    if missing:
        mistakes.add([ConfigError(missing_text(missing))])
    mistakes.of(partial(require_fixed, values))

    hf_checkpoint = mistakes.of(partial(absolute, values.get("--hf-checkpoint") or "")) or ""
    cluster = mistakes.of(partial(_cluster, values))
    if hf_checkpoint:
        layout = None if cluster is None else cluster.layout
        mistakes.of(partial(_require_model, hf_checkpoint, layout, values))
    row_format = mistakes.of(partial(build, RowFormat, values)) or RowFormat()
    data_parallel = 1 if cluster is None else cluster.layout.data
    data = mistakes.of(partial(_data, values, hf_checkpoint, data_parallel, row_format, prepared))
    evaluation = mistakes.of(partial(_evaluation, values, row_format))

    run = {
        "ref_load": values.get("--ref-load"),
        "cluster": ClusterConfig() if cluster is None else cluster,
        "data": data,
        "evaluation": evaluation,
    }
    failed = [name for name in ("data", "evaluation") if run[name] is None]
    config = build(record, values, run, mistakes, failed)
    return LaunchLine(config, (*notices, *notices_of(values)))


def _missing(values: Values, record: type, *, has_rows: bool) -> list[str]:
    """Return the flags that a run lacks."""
    required = [name for name, setting in launch_settings(record).items() if setting.is_required]
    if has_rows:
        required.remove(_ROWS)
    return [name for name in required if not values.get(name)]


def _cluster(values: Values) -> ClusterConfig:
    """Return the settings of the cluster, with a layout that there can be."""
    cluster = build(ClusterConfig, values)
    if is_sequence_parallel_alone(values):
        cluster = replace(cluster, sequence_parallel=False)
    cluster.layout  # noqa: B018  # raises where the ranks cannot be divided
    return cluster


def _data(
    values: Values,
    hf_checkpoint: str,
    data_parallel: int,
    row_format: RowFormat,
    prepared: DataConfig | None,
) -> DataConfig:
    """Return the settings of the rows.

    Args:
        prepared: as for `complete`.
    """
    mistakes = Mistakes()
    pack = mistakes.of(partial(build, PackConfig, values, {"dp_size": data_parallel}))
    most_tokens = PackConfig.max_tokens_per_gpu if pack is None else pack.max_tokens_per_gpu
    encoding = {
        "tokenizer": hf_checkpoint,
        "max_sample_tokens": values.get("--max-sample-tokens", most_tokens),
    }
    encode = mistakes.of(partial(build, EncodeConfig, values, encoding))
    sources = mistakes.of(partial(_sources, _ROWS, values, row_format)) or _some_sources(values)

    fixed: dict[str, Any] = {"pack": pack, "encode": encode, "sources": sources}
    if prepared is not None:
        fixed["sources"] = prepared.sources
        fixed["encode"] = replace(prepared.encode, tokenizer=hf_checkpoint)
        if "--max-bad-fraction" not in values:
            fixed["max_bad_fraction"] = prepared.max_bad_fraction
    failed = [name for name, part in fixed.items() if part is None]
    return build(DataConfig, values, fixed, mistakes, failed)


def _some_sources(values: Values) -> tuple[SourceConfig, ...]:
    """Return what stands in for sources that are missing, so that the rest can be checked."""
    num_sources = max(len(values.get("--prompt-data-weights", ())), 1)
    return tuple(SourceConfig(f"rows-{n}", ("rows",)) for n in range(num_sources))


def _evaluation(values: Values, row_format: RowFormat) -> EvalConfig:
    """Return the settings of the evaluation."""
    mistakes = Mistakes()
    sources = mistakes.of(partial(_sources, "--eval-prompt-data", values, row_format))
    return build(EvalConfig, values, {"sources": sources or ()}, mistakes)


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
    mistakes = Mistakes()
    on_line = _values_of(words, record, settings, mistakes)
    path = on_line.pop(CONFIG.flag.name, None)
    values = mistakes.of(partial(with_file, on_line, path, record))
    in_recipe = _values_of(recipe, record, settings, mistakes)
    mistakes.raise_all()
    return _with_those_below(values or {}, in_recipe, record)


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


def _values_of(
    words: Sequence[str], record: type, settings: dict[str, Setting], mistakes: Mistakes
) -> dict[str, Any]:
    """Return the values of the flags of a line, as far as they can be taken.

    Args:
        mistakes: gets each flag that is unknown, and each value that cannot be taken.
    """
    known = [*settings, CONFIG.flag.name, "--help"]
    for flag in dict.fromkeys(written_flags(words)):
        mistakes.of(partial(require_known, flag, known))

    namespace, of_words = build_parser(record).parse_as_far_as_possible(words)
    mistakes.add(of_words.found)
    taken = [*settings.values(), CONFIG]
    values = mistakes.of(partial(given_values, namespace, taken))
    # Whatever else is wrong, a file that the line names is looked at.
    return {**vars(namespace)} if values is None else values


def _with_those_below(values: Values, below: Values, record: type) -> dict[str, Any]:
    """Return values with those of another place where they settle nothing themselves."""
    settled = {*values, *names_of_same_values(record, values)}
    kept = {flag: value for flag, value in below.items() if flag not in settled}
    return {**kept, **values}


def _require_model(hf_checkpoint: str, layout: Layout | None, values: Values) -> None:
    """Check the layout, and the model's sizes on the launch line, against config.json.

    Args:
        layout: None: there can be none.
    """
    from miles.architecture.families import read_shape

    shape = read_shape(hf_checkpoint)
    mistakes = Mistakes()
    if layout is not None:
        mistakes.of(partial(layout.require_fits, shape))
    mistakes.of(partial(require_sizes, hf_checkpoint, shape, values))
    mistakes.raise_all()


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
    wanted = values.get("--split", ()) if flag == _ROWS else ()
    splits = splits_for(wanted, len(pairs))
    return tuple(
        SourceConfig(name, (path,), row_format, split)
        for (name, path), split in zip(pairs, splits, strict=True)
    )
