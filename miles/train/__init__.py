"""The trainers: Megatron ranks fed by the data stream. README.md walks through a step.

In: a `TrainConfig`, and the rows of `miles.data`. Out: checkpoints and the files of the run folder.
`driver` runs in the process of `miles train`, `rank` and `model` in one process for each rank.
It may import the settings, the records and the stream of `miles.data`, and `architecture`,
`convert` (driver, ranks, dry run) and `common`. `driver`, `launch` and `config` load no torch and
no Megatron when they are imported.
"""
