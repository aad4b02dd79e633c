"""The data path as a Ray Data stream: files -> packed steps in the hands of the trainers.

In: a `DataConfig`, and a cursor to resume from. Out: each rank's `MicroBatch`es step by step, a
`StepReport` of each step, the ledger and the next cursor; an `EvalSet`; before that a
`CountedStream` and a `Survey`, without Ray.
`stages.py` has the pure functions, `pipeline.py` runs them in the loaders, `feed_actor.py` is an
actor, `step_iterator.py` runs in the trainers, `feed.py`, `ledger.py`, `eval_set.py` and
`token_ids.py` in the driver. May import all of `miles.data` but the notebook; no Megatron, nothing
of `miles.train`.
"""
