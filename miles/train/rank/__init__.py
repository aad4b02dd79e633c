"""One rank: the actor, the training step, evaluation, and its part of each checkpoint.

In: a `RankSetup`, then the rank's micro-batches of each step. Out: a `StepResult`, files of a
checkpoint. It runs in a process for each rank, on one GPU or on the CPU; the driver imports only
`actor`.
It may import `miles.train.model`, the settings and records of `miles.train`, `miles.data.stream`,
`miles.convert`, `miles.architecture` and `miles.common`.
"""
