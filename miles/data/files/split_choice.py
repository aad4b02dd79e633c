"""Which files of a folder are read, by their splits.

for                            of train-….parquet, test-….parquet, README.md
training                       train; a folder of nothing but test files is refused
evaluation                     the split named validation, or else test, or else all
--split test, train+test, all  what is asked for
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from miles.data.files.splits import HELD_OUT, KINDS, TRAIN, FileSplit, Sign
from miles.errors import SourceError

ALL = "all"
"""The word of `--split` for every file."""
_FINE_TUNING = "_sft"


@dataclass(frozen=True)
class Choice:
    """The files that are read, and the others."""

    taken: tuple[FileSplit, ...]
    left: tuple[FileSplit, ...]

    @classmethod
    def of(cls, splits: Sequence[FileSplit], is_taken: Callable[[FileSplit], bool]) -> Choice:
        """Divide files by a question."""
        answers = [(split, is_taken(split)) for split in splits]
        taken = tuple(split for split, is_yes in answers if is_yes)
        left = tuple(split for split, is_yes in answers if not is_yes)
        return cls(taken, left)


def choose(
    splits: Sequence[FileSplit], wanted: str | None, where: str, *, is_evaluation: bool
) -> Choice:
    """Return the files of a folder that are read.

    Args:
        splits: of its files with rows.
        wanted: names of splits with `+` between them, or `ALL`; None: what the use asks for.
        where: names the folder in errors.
        is_evaluation: the rows are evaluated, not trained on.

    Raises:
        SourceError: no file is of that split; or, without a wish, all are held-out splits.
    """
    if wanted == ALL:
        return Choice(tuple(splits), ())
    if wanted is not None:
        return _asked_for(splits, wanted, where)
    return _for_evaluation(splits) if is_evaluation else _for_training(splits, where)


def _asked_for(splits: Sequence[FileSplit], wanted: str, where: str) -> Choice:
    taken: set[str] = set()
    for name in wanted.split("+"):
        matches = _matches(splits, name.strip().lower())
        if not matches:
            raise SourceError(
                f"{where}: --split {wanted}: no file of split {name.strip()!r}: {_found(splits)}. "
                "--split takes a name of these, several as train+validation, or all for every file"
            )
        taken.update(split.path for split in matches)
    return Choice.of(splits, lambda split: split.path in taken)


def _matches(splits: Sequence[FileSplit], name: str) -> list[FileSplit]:
    """Return the files of a split: by its name, or else of its kind, or else of a file's name."""
    named = [split for split in splits if split.sign and split.name.lower() == name]
    if not named and name in KINDS:
        named = [split for split in splits if split.kind == KINDS[name]]
    return named or [split for split in splits if name in split.words]


def _for_training(splits: Sequence[FileSplit], where: str) -> Choice:
    if splits and all(split.is_held_out for split in splits):
        raise SourceError(
            f"{where}: no file is for training, by their names: {_found(splits)}. To "
            f"train on them, say so: --split {splits[0].shown}, or all for every file"
        )

    if any(split.kind == TRAIN for split in splits):
        return Choice.of(splits, _is_trained_among(splits))
    siblings: set[str] = set()
    for split in splits:
        if split.kind is None:
            siblings |= {split.rest, *split.words}
    return Choice.of(splits, lambda split: not _is_set_apart(split, siblings))


def _is_trained_among(splits: Sequence[FileSplit]) -> Callable[[FileSplit], bool]:
    """Return the question whether a file is trained, where some are of splits for training."""
    trained = [split for split in splits if split.kind == TRAIN]
    names = {split.name.lower() for split in trained}
    declared = {split.name.lower() for split in trained if split.sign == Sign.DECLARED}

    def is_trained(split: FileSplit) -> bool:
        if split.is_held_out:
            return False
        if split.sign == Sign.DECLARED and TRAIN in declared:
            return split.name.lower() == TRAIN
        if split.kind == TRAIN and TRAIN + _FINE_TUNING in names:
            # Of ultrachat_200k and its kin: train_gen and train_prefs are for other methods.
            return split.name.lower() in (TRAIN, TRAIN + _FINE_TUNING)
        return True

    return is_trained


def _is_set_apart(split: FileSplit, siblings: set[str]) -> bool:
    """Return whether a file is held out where no file is named train.

    Args:
        siblings: names of files without a split, and of their folders: `chat` makes a test set of
            `chat_test`.
    """
    return split.is_held_out and (split.sign >= Sign.CERTAIN or split.rest in siblings)


def _for_evaluation(splits: Sequence[FileSplit]) -> Choice:
    sure = [split for split in splits if split.is_held_out and split.sign >= Sign.CERTAIN]
    for kind in HELD_OUT:
        names = {split.name.lower() for split in sure if split.kind == kind}
        fine_tuning = {name for name in names if name.endswith(_FINE_TUNING)}
        wanted = fine_tuning or names
        if wanted:
            return Choice.of(splits, lambda split: split.name.lower() in wanted)  # noqa: B023

    rests = {split.rest for split in splits if split.is_held_out}
    is_train_there = any(
        split.kind == TRAIN or (split.kind is None and split.rest in rests) for split in splits
    )
    if rests and is_train_there:
        return Choice.of(splits, lambda split: split.is_held_out)
    return Choice(tuple(splits), ())


def _found(splits: Sequence[FileSplit]) -> str:
    """Return the splits that files are of: the middle of an error."""
    names = list(dict.fromkeys(split.shown for split in splits if split.sign))
    if not names:
        return "the names of its files speak of no split"
    more = f", and {len(names) - 8} more" if len(names) > 8 else ""
    return f"its files are of {', '.join(names[:8])}{more}"
