"""The trainers: Megatron ranks fed by the data stream. README.md walks through a step.

In: a `TrainConfig`, and the rows of `miles.data`. Out: checkpoints and the files of the run folder.
`driver` runs in the process of `miles train`, `rank` and `model` in one process for each rank.
Of `miles.data` only the settings, the records and the stream may be imported here. `driver`,
`launch` and `config` import neither torch nor Megatron when they are imported.
"""
