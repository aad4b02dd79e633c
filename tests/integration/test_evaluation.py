"""The evaluation set in the object store, and the training feed that leaves its rows out."""

from __future__ import annotations

import contextlib
import gzip
import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from miles.data.config import DataConfig, RowFormat, SourceConfig, StreamConfig
from miles.data.encoding.encoder import Encoder
from miles.data.files.manifest import Manifest, build_manifest
from miles.data.rows.normalize import normalize
from miles.data.stream import pipeline, stages
from miles.data.stream.eval_rows import eval_config
from miles.data.stream.eval_set import EvalPrompt, EvalSet, micro_batches
from miles.data.stream.row_outcomes import hash_share
from miles.data.types import Cursor, Encoded, MicroBatch, RowRejected
from miles.errors import ClusterError, DataError, TemplateError
from tests.support.streams import config_of, delivered, demo_settings, follow, opened, with_layout

FRACTION = 0.2
DP_SIZES = (1, 2, 3)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """The demo's rows, of which a fifth is held out."""
    settings = demo_settings(tmp_path_factory.mktemp("evaluation"))
    return replace(config_of(settings), held_out_fraction=FRACTION)


@pytest.fixture(scope="module")
def own_sources(config: DataConfig) -> tuple[SourceConfig, ...]:
    """One of the demo's files, as if it were a set of its own."""
    return (SourceConfig("own", config.sources[0].paths),)


OpenSet = Callable[[str, int], EvalSet]


@pytest.fixture(scope="module")
def open_set(config: DataConfig, own_sources: tuple[SourceConfig, ...]) -> OpenSet:
    """A function that opens a set for a number of ranks, once: "held out", or of "own" sources."""

    @cache
    def open_once(kind: str, dp_size: int) -> EvalSet:
        evaluated = eval_config(config, own_sources if kind == "own" else ())
        if dp_size > 1:  # few rows a step, so that there are several
            order = replace(evaluated.order, batch_size=100, window_rows=100)
            evaluated = replace(evaluated, order=order)
        return EvalSet.open(with_layout(evaluated, dp_size, loader_cpus=2))

    return open_once


def encoded_rows(config: DataConfig) -> list[tuple[int, Encoded]]:
    """Return row id and sample of each row of a set, in file order, without the stream."""
    encoder = Encoder.from_config(config.encode)
    samples = []
    row_id = 0
    for source in config.sources:
        for payload in Path(source.paths[0]).read_bytes().splitlines():
            with contextlib.suppress(RowRejected):
                conversation = normalize(payload, RowFormat("messages"))
                share = hash_share(conversation)
                if config.held_out == "leave_out" or share < config.held_out_fraction:
                    samples.append((row_id, encoder.encode(conversation)))
            row_id += 1
    return samples


def by_rank(evaluation: EvalSet) -> list[list[tuple[MicroBatch, ...]]]:
    """Return what each rank evaluates: [data ranks][steps][micro-batches]."""
    num_ranks = len(evaluation.references[0])
    return [
        list(micro_batches([chunk[rank] for chunk in evaluation.references]))
        for rank in range(num_ranks)
    ]


def samples_of(evaluation: EvalSet) -> list[tuple[int, list[int], list[float]]]:
    """Return the samples of all ranks, by row: row id, token ids, mask of the labels."""
    samples = []
    for batch in (batch for rank in by_rank(evaluation) for step in rank for batch in step):
        for number, row_id in enumerate(batch.row_ids.tolist()):
            part = slice(batch.cu_seqlens[number], batch.cu_seqlens[number + 1])
            if row_id >= 0:
                samples.append(
                    (row_id, batch.input_ids[part].tolist(), batch.loss_mask[part].tolist())
                )
    return sorted(samples)


# --- the set


@pytest.mark.parametrize("kind", ["held out", "own"])
@pytest.mark.parametrize("dp_size", DP_SIZES)
def test_set_is_that_of_a_plain_loop(
    config: DataConfig,
    own_sources: tuple[SourceConfig, ...],
    open_set: OpenSet,
    kind: str,
    dp_size: int,
) -> None:
    evaluated = eval_config(config, own_sources if kind == "own" else ())
    expected = encoded_rows(evaluated)
    assert len(expected) > 100
    source_of = build_manifest(evaluated.sources).source_of
    trained = [0] * len(evaluated.sources)
    for row, sample in expected:
        trained[source_of(np.array([row]))[0]] += int(sample.loss_mask[1:].sum())

    eval_set = open_set(kind, dp_size)
    assert eval_set.source_names == tuple(source.name for source in evaluated.sources)
    assert eval_set.num_samples == len(expected) == eval_set.num_rows - eval_set.num_rejected
    assert eval_set.num_tokens == sum(len(sample.input_ids) for _, sample in expected)
    assert eval_set.source_trained_tokens == tuple(trained)
    assert eval_set.num_trained_tokens == sum(trained)

    assert {len(chunk) for chunk in eval_set.references} == {dp_size}
    samples = samples_of(eval_set)
    assert len(samples) == len(expected)
    for (row, ids, mask), (expected_row, sample) in zip(samples, expected, strict=True):
        assert (row, ids) == (expected_row, sample.input_ids.tolist())
        assert mask == [*sample.loss_mask[1:].tolist(), 0]

    ranks = by_rank(eval_set)
    assert all(len({len(rank) for rank in step}) == 1 for step in zip(*ranks, strict=True))
    assert all(step for rank in ranks for step in rank), (
        "a rank without micro-batches would hold up the others"
    )


def test_rejected_rows_are_counted(open_set: OpenSet) -> None:
    """Two broken rows are in the first file; a row that is no conversation is never held out."""
    assert open_set("own", 2).num_rejected == 2
    assert open_set("held out", 2).num_rejected == 0


def test_trainers_read_their_chunks(open_set: OpenSet) -> None:
    """Each reads its own rank's: references in a list stay references."""

    @ray.remote(num_cpus=0)
    class Trainer:
        def evaluate(self, references: list[Any]) -> int:
            return sum(
                int(batch.loss_mask.sum()) for step in micro_batches(references) for batch in step
            )

    made = open_set("held out", 2)
    trainers = [Trainer.remote() for _ in range(2)]
    for _ in range(2):  # an evaluation, and a later one
        counted = ray.get(
            [
                one.evaluate.remote([of[rank] for of in made.references])
                for rank, one in enumerate(trainers)
            ]
        )
        assert sum(counted) == made.num_trained_tokens
        assert all(counted)


def test_empty_steps_are_left_out(config: DataConfig) -> None:
    """In steps of one row, most have none that is held out."""
    evaluated = eval_config(config, ())
    evaluated = replace(evaluated, order=replace(evaluated.order, batch_size=1, window_rows=2_000))
    made = EvalSet.open(evaluated)
    assert [len(rank) for rank in by_rank(made)] == [made.num_samples] * 2
    assert (
        sum(len(batch.row_ids) for step in by_rank(made)[1] for batch in step) == made.num_samples
    ), "dummies"


def test_packed_file_is_one_window(
    config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With more windows, each would read the file again from its start."""
    lines = Path(config.sources[0].paths[0]).read_bytes().splitlines()
    with gzip.open(tmp_path / "rows.jsonl.gz", "wb") as stream:
        stream.write(b"\n".join(lines * 30))
    evaluated = eval_config(config, (SourceConfig("packed", (str(tmp_path / "rows.jsonl.gz"),)),))
    num_windows, build = [], pipeline.build

    def counted(manifest: Manifest, built: DataConfig) -> Any:
        num_windows.append(len(list(stages.make_plan(manifest, built).windows(0))))
        return build(manifest, built)

    monkeypatch.setattr(pipeline, "build", counted)
    made = EvalSet.open(evaluated)
    assert made.num_rows == 30 * len(lines) > evaluated.order.rounded_window_rows
    assert num_windows == [1]


# --- prompts


def last_run(one: Encoded) -> tuple[list[int], list[int]]:
    """Return the ids before the last run of trained tokens, and those of the run."""
    ids, mask = one.input_ids.tolist(), one.loss_mask.tolist()
    end = len(mask) - mask[::-1].index(1)
    begin = end
    while begin > 0 and mask[begin - 1]:
        begin -= 1
    return ids[:begin], ids[begin:end]


def test_prompts_are_rows_without_last_answers(config: DataConfig, open_set: OpenSet) -> None:
    evaluated = eval_config(config, ())
    manifest = build_manifest(evaluated.sources)
    expected = [
        EvalPrompt(*manifest.locate(row), *last_run(one)) for row, one in encoded_rows(evaluated)
    ]

    for dp_size in DP_SIZES:
        made = open_set("held out", dp_size)
        for count in (0, 1, 7, len(expected), len(expected) + 5):
            assert made.prompts(count) == expected[:count]

    tokenizer = Encoder.from_config(config.encode).tokenizer
    first = expected[0]
    row = json.loads(Path(first.file).read_text().splitlines()[first.row])
    assert made.decode(first.answer_ids) == row["conversations"][-1]["value"] + "<|im_end|>"
    assert "<|im_start|>assistant\n" in made.decode(first.prompt_ids[-8:]), (
        "and what serving puts before it"
    )
    assert all(
        prompt.answer_ids[-1] == tokenizer.convert_tokens_to_ids("<|im_end|>")
        for prompt in expected
    )


def test_plain_text_is_no_prompt(config: DataConfig, tmp_path: Path) -> None:
    """Plain text is trained from its first token on."""
    (tmp_path / "text.jsonl").write_text('{"text": "Once upon a time."}\n' * 3)
    made = EvalSet.open(
        eval_config(
            config, (SourceConfig("text", (str(tmp_path / "text.jsonl"),)), *config.sources)
        )
    )
    prompts = made.prompts(4)
    assert [prompt.source for prompt in prompts] == ["chat"] * 4
    assert [prompt.row for prompt in prompts] == [0, 1, 2, 3]


# --- beside training


def test_feed_trains_the_other_rows(config: DataConfig, open_set: OpenSet, tmp_path: Path) -> None:
    made = open_set("held out", 2)
    evaluated = {row for row, _, _ in samples_of(made)}
    steps = list(stages.local_steps(build_manifest(config.sources), config))
    cursor, taken = None, []

    for dp_size, num_steps in ((2, 5), (1, 8), (3, None)):
        layout = with_layout(config, dp_size)
        with opened(layout, str(tmp_path), cursor) as feed:
            for report, digest in follow(feed, layout, num_steps):
                taken.append(
                    [
                        report.position.index,
                        report.content.fingerprint,
                        digest,
                        report.rows.held_out,
                    ]
                )
            if num_steps is None:
                feed.finish()
                assert feed.locate(412 + 7) == ("code", config.sources[1].paths[0], 7)
            cursor = Cursor.from_json(feed.cursor().to_json(), "there")
            summary = feed.ledger_summary()

    assert taken == [
        [step.index, step.fingerprint, delivered(step.micro_batches), step.report.rows.held_out]
        for step in steps
    ]

    trained = {
        int(row)
        for step in steps
        for rank in step.micro_batches
        for one in rank
        for row in one.row_ids
    }
    assert not trained & evaluated
    assert len((trained - {-1}) | evaluated) == 652 - 4, "all but the broken ones"
    assert cursor.held_out_fraction == FRACTION

    held_out = {name: counts["held_out"] for name, counts in cursor.ledger_totals.items()}
    assert sum(held_out.values()) == 2 * len(evaluated)
    assert {name: entry["counts"]["held_out"] for name, entry in summary.items()} == held_out
    assert len((tmp_path / "rejects.jsonl").read_text().splitlines()) == 4, (
        "held-out rows are no rejects"
    )
    assert samples_of(made) == samples_of(EvalSet.open(eval_config(config, ()))), (
        "still there, and the same"
    )


# --- what is refused


def lines_of(folder: Path, *rows: Any) -> tuple[SourceConfig, ...]:
    (folder / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return (SourceConfig("own", (str(folder / "own.jsonl"),), RowFormat("messages")),)


def chat(answer: str) -> dict[str, Any]:
    return {
        "messages": [{"role": "user", "content": "a?"}, {"role": "assistant", "content": answer}]
    }


LONG = chat("word " * 300)


def test_too_many_rejects_are_named_by_reason(config: DataConfig, tmp_path: Path) -> None:
    sources = lines_of(tmp_path, *[chat("b")] * 7, LONG, {"messages": []}, LONG)
    message = (
        r"3 of the 10 rows to evaluate were dropped, "
        r"more than the share 0\.29 that --max-bad-fraction allows: "
        r"2 too_long \(first: row 7 \(from 0\) of .*own\.jsonl, .* at most 256.*\), "
        r"1 no_messages \(first: row 8 \(from 0\) of .*own\.jsonl, .*\)\. "
        r"Most often: too_long\. What to do: raise --max-sample-tokens, .*\. Mend or remove them, or raise the share"
    )
    with pytest.raises(DataError, match=message):
        EvalSet.open(eval_config(replace(config, max_bad_fraction=0.29), sources))
    made = EvalSet.open(eval_config(replace(config, max_bad_fraction=0.3), sources))
    assert (made.num_rows, made.num_rejected, made.num_samples) == (10, 3, 7)


def test_held_out_rejects_end_only_fatally(config: DataConfig, tmp_path: Path) -> None:
    sources = lines_of(tmp_path, *[chat(f"b {number}") for number in range(40)], *[LONG] * 3)
    held_out = hash_share(normalize(json.dumps(LONG).encode()))
    training = replace(
        config, sources=sources, held_out_fraction=max(held_out * 1.01, 0.5), max_bad_fraction=0.0
    )
    made = EvalSet.open(eval_config(training, ()))
    assert made.num_rejected == 3
    assert 0 < made.num_samples < 40

    fatal = replace(training, encode=replace(config.encode, too_long="error"))
    with pytest.raises(
        DataError, match=r"evaluate 3 too_long \(first: row 40 .*\)\. --too-long error ends the run"
    ):
        EvalSet.open(eval_config(fatal, ()))


def test_nothing_to_evaluate_says_what_to_do(config: DataConfig, tmp_path: Path) -> None:
    tiny = replace(config, held_out_fraction=1e-9)
    with pytest.raises(
        DataError,
        match=r"--eval-fraction 1e-09 holds out 0 of 652 rows, .*Raise it, or give --eval-p",
    ):
        EvalSet.open(eval_config(tiny, ()))
    sources = lines_of(tmp_path, LONG, LONG)
    with pytest.raises(
        DataError,
        match=r"none of the 2 rows of --eval-prompt-data .*own\.jsonl .*: 2 too_long \(first",
    ):
        EvalSet.open(eval_config(replace(config, max_bad_fraction=1.0), sources))


def test_small_cluster_and_bad_template_are_refused(
    config: DataConfig,
) -> None:
    with pytest.raises(ClusterError, match="--loader-cpus 64"):
        EvalSet.open(replace(eval_config(config, ()), stream=StreamConfig(loader_cpus=64)))
    unusable = replace(
        config.encode, chat_template="{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    )
    with pytest.raises(TemplateError, match="cannot be certified"):
        EvalSet.open(replace(eval_config(config, ()), encode=unusable))
