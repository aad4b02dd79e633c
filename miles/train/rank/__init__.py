"""One rank: the actor, the training step, evaluation, and its part of loading and saving checkpoints.

In: a `RankSetup`, then the rank's micro-batches of each step. Out: a `StepResult`, checkpoint files.
It runs in a process for each rank, on one GPU or on the CPU; `actor` calls it there, and the driver
imports no other module of it.
It may import `miles.train.model`, the settings and records of `miles.train`, and `miles.data.stream`.
"""
